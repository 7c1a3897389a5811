import re
import subprocess
import sys

import pytest
import torch

from cxr_vae.precision import advise, autocast
from tests.helpers import environment


def test_types_inside_autocast() -> None:
    layer, x = torch.nn.Linear(4, 4), torch.rand(2, 4)
    for precision, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(precision, torch.device("cpu")):
            assert layer(x).dtype == expected


def test_advice_where_bf16_is_emulated() -> None:
    code = (
        "import torch; from cxr_vae.precision import advise; "
        "print(advise('bf16', torch.device('cpu')), advise('fp32', torch.device('cpu')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(ONEDNN_MAX_CPU_ISA="AVX2"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"note: bf16 is 0\.\d+ times as fast as fp32 .* None\n", result.stdout)


def test_no_advice_where_bf16_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cxr_vae.precision.peak_flops", lambda device, precision, side: {"bf16": 2.0, "fp32": 1.0}[precision]
    )
    assert advise("bf16", torch.device("cpu")) is None


def test_a_gpu_gets_no_advice() -> None:
    assert advise("bf16", torch.device("cuda")) is None

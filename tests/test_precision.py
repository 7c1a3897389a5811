import subprocess
import sys

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
        "print([advise(p, torch.device('cpu')) is not None for p in ('bf16', 'fp32')])"
    )
    native = torch.backends.cpu.get_cpu_capability()
    for capability in ("avx2", native.lower()):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(ATEN_CPU_CAPABILITY=capability),
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == str([capability == "avx2", False])


def test_a_gpu_gets_no_advice() -> None:
    assert advise("bf16", torch.device("cuda")) is None

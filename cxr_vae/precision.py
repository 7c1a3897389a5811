"""Mixed precision: the types of `train.precision`."""

import time

import torch

from cxr_vae.errors import UserError

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context a network runs in; losses are computed outside it."""
    return torch.autocast(device.type, dtype=AUTOCAST_TYPES[precision], enabled=precision != "fp32")


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError for fp16 without a GPU: nothing here runs it faster than fp32."""
    if precision == "fp16" and device.type != "cuda":
        raise UserError("train.precision=fp16 needs a GPU and torch sees none here; use bf16 or fp32")


def advise(precision: str, device: torch.device) -> str | None:
    """A sentence where bf16 is slower than fp32 on this CPU, which it is told by trying a product of matrices."""
    if precision != "bf16" or device.type != "cpu":
        return None
    ratio = peak_flops(device, "bf16", 512) / peak_flops(device, "fp32", 512)
    if ratio > 1.1:
        return None
    return f"note: bf16 is {ratio:.2g} times as fast as fp32 on this CPU: train.precision=fp32 suits it better"


def peak_flops(device: torch.device, precision: str, largest: int) -> float:
    """Operations a second of a product of two square matrices in this precision: the best of a few.

    Of `largest` a side, or of the size that takes a twentieth of a second where that is smaller: a CPU without units
    for bf16 needs minutes for what others do at once.
    """
    side = min(256, largest)
    while (seconds := _seconds(device, precision, side)) < 0.05 and side < largest:
        side *= 2
    return 2 * side**3 / min(seconds, *(_seconds(device, precision, side) for _ in range(4)))


def _seconds(device: torch.device, precision: str, side: int) -> float:
    matrix = torch.randn(side, side, device=device).to(AUTOCAST_TYPES[precision])  # constants multiply faster
    _wait(device)
    start = time.perf_counter()
    matrix @ matrix
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

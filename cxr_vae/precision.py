"""Mixed precision: the types of `train.precision`."""

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
    """A sentence where another precision would be many times as fast here: bf16 on a CPU that must emulate it."""
    if precision != "bf16" or device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return None
    return "note: this CPU emulates bf16 (no AVX-512), which is some ten times slower than train.precision=fp32"

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

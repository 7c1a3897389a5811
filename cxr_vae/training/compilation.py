"""torch.compile for the training step, and the profiler that shows what a step does."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.profiler import profile, schedule

from cxr_vae.errors import UserError
from cxr_vae.files import cache_folder

MODES = {"default": "default", "max": "max-autotune-no-cudagraphs"}
"""torch.compile's mode by `train.compile`; a whole step is captured as a graph by `capture`, compiled or not."""

PROFILED = schedule(wait=3, warmup=1, active=3, repeat=1)


def share_compiled() -> None:
    """Keeps what is compiled in a folder that all of this user's jobs share, unless the user names one.

    To be called early: torch settles for a folder of its own as soon as an optimizer is made.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))


def check_compiler(choice: str) -> None:
    """Raises UserError where `train.compile` asks for what needs a compiler, and there is none."""
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    if choice != "off" and not any(shutil.which(name) for name in compilers):
        raise UserError(f"train.compile={choice} needs a C++ compiler and there is no g++: install one, or use off")


def compiled(model: nn.Module, choice: str) -> nn.Module:
    """`model` as `train.compile` asks."""
    if choice == "off":
        return model
    return cast(nn.Module, torch.compile(model, mode=MODES[choice], dynamic=False))


def profiler(folder: Path | None) -> AbstractContextManager[Any]:
    """A torch profiler whose `step` is called after each step; writes a trace of the fifth to the seventh to `folder`.

    chrome://tracing and ui.perfetto.dev show it. Without a folder the context is None.
    """
    if folder is None:
        return nullcontext()

    def save(profiled: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(folder / "trace.json.gz"))
        print(f"trace of a few steps: {folder / 'trace.json.gz'}", flush=True)

    return profile(schedule=PROFILED, on_trace_ready=save, record_shapes=True)

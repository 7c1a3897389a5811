"""What `cxr-vae checkpoints` shows."""

from pathlib import Path
from typing import Any

from tabulate import tabulate

from cxr_vae.checkpoints.manifest import find_fault, published, read_manifest
from cxr_vae.checkpoints.saving import best_of
from cxr_vae.errors import UserError
from cxr_vae.run_dir import RunDir

HEADERS = ("checkpoint", "images seen", "test loss", "processes", "MB", "")


def list_checkpoints(run: RunDir, *, every_byte: bool) -> tuple[str, bool]:
    """A table of a run's checkpoints, newest first, and whether all are whole; what a kill left is listed below."""
    run.saved_config()  # says so where this is no run
    best = best_of(run.checkpoints)
    whole = "whole" if every_byte else "whole by names and sizes"
    rows, all_whole = [], True
    for path in published(run.checkpoints):
        facts, fault = _facts(path), find_fault(path, every_byte=every_byte)
        if path.is_dir():  # else it was removed meanwhile, for a newer one
            rows.append([*facts, fault or (f"{whole}, best" if path == best else whole)])
            all_whole = all_whole and fault is None
    lines = [tabulate(rows, HEADERS, floatfmt=".1f") if rows else f"{run.path} has no checkpoint yet"]
    for path in sorted(run.checkpoints.glob("*.unusable")):
        lines.append(f"{path.name}: was skipped when the run was resumed; may be deleted")
    for path in sorted(run.checkpoints.glob("*.tmp")):
        lines.append(
            f"{path.name}: being written or removed, or left so by a kill: then it goes when the run is resumed"
        )
    return "\n".join(lines), all_whole


def _facts(path: Path) -> list[Any]:
    megabytes = None
    try:
        megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        manifest = read_manifest(path)
    except (UserError, OSError):
        return [path.name, None, None, None, megabytes]
    return [path.name, manifest["samples_seen"], manifest["test_loss_nats"], manifest["world_size"], megabytes]

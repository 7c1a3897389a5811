"""What the jobs of a run print: `cxr-launch logs`."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cxr_vae.errors import UserError
from cxr_vae.run_dir import RunDir

POLL_S = 0.5

STAGES = ("shard", "train", "prior", "evaluate", "report")

LOG = re.compile(rf".*-(?P<stage>{'|'.join(STAGES)})-(job|\d+_\d+-job|.+-rank\d+)\.log")
"""A log's name, whatever the run was called when it was written: a run may have been moved since."""

LAST_LINES = 40
"""Of each log, before what comes."""


@dataclass
class Tail:
    """A log file that grows while it is read."""

    path: Path
    position: int = 0
    rest: str = field(default="", repr=False)

    def new_lines(self) -> list[str]:
        """The whole lines that came since the last call, without submitit's own."""
        try:
            with self.path.open(errors="replace") as file:
                file.seek(self.position)
                text = self.rest + file.read()
                self.position = file.tell()
        except OSError:
            return []
        *lines, self.rest = text.split("\n")
        return [line for line in lines if not line.startswith("submitit ")]


def show(run: RunDir, stage: str | None, *, follow: bool, is_over: Callable[[], bool]) -> Iterator[str]:
    """The last lines of the newest stage's logs (or of `stage`'s), and with `follow` what comes until `is_over`."""
    tails = {path: Tail(path) for path in log_files(run, stage)}
    if not tails and not follow:
        raise UserError(f"{run.logs} holds no logs of {stage or 'any stage'}: no job of it has started yet")
    several = len(tails) > 1
    for path, tail in tails.items():
        yield from (f"{path.stem}: {line}" if several else line for line in tail.new_lines()[-LAST_LINES:])
    while follow:
        over = is_over()
        tails |= {path: Tail(path) for path in log_files(run, stage) if path not in tails}
        for path, tail in tails.items():  # also the last lines of the stage before
            yield from (f"{path.stem}: {line}" for line in tail.new_lines())
        if over:
            return
        time.sleep(POLL_S)


def log_files(run: RunDir, stage: str | None) -> list[Path]:
    """Of a stage; without one, of that which wrote last."""
    found = ((path, LOG.fullmatch(path.name)) for path in run.logs.glob("*.log"))
    stages = {path: match["stage"] for path, match in found if match}
    if stage is None and stages:
        stage = stages[max(stages, key=lambda path: path.stat().st_mtime)]
    return sorted(path for path, of in stages.items() if of == stage)

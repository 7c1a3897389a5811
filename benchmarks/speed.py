"""How fast every part is, against the plain program on the same machine.

    make bench [DATA=/path/to/chest_xray]        some 20 minutes on 2 cores
    python -m benchmarks.speed [--data FOLDER] [--only loading,step] [--out benchmarks/results]

Ratios of interleaved rounds: the median, and the least and most. Without --data, on phantoms of an X-ray's size that
are drawn first. Prints the table and writes it, dated, with the machine, as Markdown and JSON into --out.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from cxr_vae.run_dir import git_revision

ROUNDS = 5


@dataclass
class Row:
    """One line of the table. `values` are those of the rounds; `target` is a bound of their median."""

    what: str
    against: str
    target: str
    values: list[float]
    unit: str = "×"
    note: str = ""

    @property
    def verdict(self) -> str:
        """`met`, `missed`, or nothing where there is no target."""
        if not self.values:
            return "**not measured**"
        if not self.target:
            return ""
        bound, median = float(self.target[1:].split()[0]), statistics.median(self.values)
        return "met" if (median >= bound if self.target[0] == "≥" else median <= bound) else "**missed**"

    def cells(self) -> list[str]:
        """As in the table."""
        middle = f"{statistics.median(self.values):.3g} {self.unit}".strip() if self.values else ""
        spread = f"{min(self.values):.3g} … {max(self.values):.3g}" if len(self.values) > 1 else ""
        return [self.what, self.against, self.target, middle, spread, self.verdict, self.note]


def interleaved(measures: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """What each measure gives, in rounds of all of them."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure())
    return values


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def table_of(rows: list[Row]) -> str:
    """Markdown."""
    headers = ["what", "against", "target", "median", "least … most", "", "note"]
    return tabulate([row.cells() for row in rows], headers, tablefmt="github", disable_numparse=True)


def prepare(data: Path | None, work: Path) -> Path:
    """A folder of originals: `data`, or phantoms drawn into `work`."""
    if data is not None:
        return data
    from cxr_vae.phantoms.folder import write_phantoms

    if not (work / "phantoms").is_dir():
        write_phantoms(work / "phantoms", 500, 0)
    return work / "phantoms"


def originals(source: Path, out: Path, train: int, test: int) -> Path:
    """A folder of so many training and test images, links to those of `source`, which may be fewer: then under names
    of their own, as of other patients."""
    for split, count in (("train", train), ("test", test)):
        files = sorted(path for path in (source / split).rglob("*.*") if path.suffix in (".jpeg", ".jpg", ".png"))
        for number in range(count):
            path = files[number * len(files) // count if count < len(files) else number % len(files)]
            target = out / split / path.parent.name / f"person{number}_bacteria_{number}{path.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(path.resolve())
    return out


def machine() -> dict[str, Any]:
    """Where and with what."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": git_revision(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/*.jpeg and test/CLASS/*.jpeg")
    parser.add_argument("--only", help="some of: loading,sharding,step,start,ranks,epoch,lost,generation,peers")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, help="folder to keep images, shards and runs in")
    arguments = parser.parse_args()

    from benchmarks import speed_loading, speed_peers, speed_step, speed_training

    parts: dict[str, Callable[[Path, Path], list[Row]]] = {
        "loading": speed_loading.loading,
        "sharding": speed_loading.sharding,
        "step": speed_step.steps,
        "start": speed_training.start,
        "ranks": speed_training.ranks,
        "epoch": speed_training.epoch,
        "lost": speed_training.lost,
        "generation": speed_training.generation,
        "peers": speed_peers.peers,
    }
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    source = prepare(arguments.data, work)
    rows: list[Row] = []
    for name in arguments.only.split(",") if arguments.only else parts:
        rows += parts[name](source, work)
        print(f"{time.monotonic() - began:.0f} s: {name} done", flush=True)
    facts = machine() | {
        "images": "originals given" if arguments.data else "drawn phantoms of an X-ray's size",
        "seconds": round(time.monotonic() - began),
    }
    table = table_of(rows)
    print(f"\n{table}\n\n{facts}")
    if not arguments.only:
        path = arguments.out / f"{facts['date']}-speed"
        text = f"# Speed, {facts['date']}\n\n`make bench`. {json.dumps(facts, ensure_ascii=False)}\n\n{table}\n"
        path.with_suffix(".md").write_text(text)
        record = facts | {"rows": [asdict(row) for row in rows]}
        path.with_suffix(".json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if arguments.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()

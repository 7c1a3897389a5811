"""Which images each step trains on, by 1, 2 and 4 processes: they should be the same.

    python -m benchmarks.order SHARDS [--steps 40] [--batch-size 32]

Each run opens the shards with torchrun's processes as training does, and takes the rows of its own slices from the
index; the ids of a step are the ranks' ids one after another. Prints a line a step and the verdict; exits with 1 where
two runs differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

RANKS = (1, 2, 4)


def dump(shards: str, steps: int, batch_size: int, out: Path) -> None:
    """Runs on each rank: the ids this rank trains on, step by step, as the training loop asks for them."""
    from cxr_vae.config_file import load_config
    from cxr_vae.data.index import ShardDirectory
    from cxr_vae.distributed import world
    from cxr_vae.run_dir import RunDir
    from cxr_vae.training.train import Training

    index = ShardDirectory.open(Path(shards)).split("train")
    options = [f"data.shards={shards}", f"image_size={index.image_size}", f"batch_size={batch_size}", "device=cpu"]
    with world("cpu") as here:
        config = load_config(None, [*options, f"run_dir={out / 'run'}", "loading=shards"])
        training = Training(config, RunDir(Path(config.run_dir)), here)
        keys = index.texts("key")
        ids = [[keys[row] for row in rows] for _, rows in zip(range(steps), training.slices(), strict=False)]
        (out / f"rank{here.rank}.json").write_text(json.dumps(ids))


def visited(ranks: int, arguments: argparse.Namespace) -> list[list[str]]:
    """The ids of each step in a run of `ranks` processes."""
    with tempfile.TemporaryDirectory() as folder:
        call = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
        call += [
            arguments.shards,
            f"--steps={arguments.steps}",
            f"--batch-size={arguments.batch_size}",
            "--dump",
            folder,
        ]
        subprocess.run(call, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        parts = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return [[key for part in parts for key in part[step]] for step in range(arguments.steps)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dump:
        dump(arguments.shards, arguments.steps, arguments.batch_size, arguments.dump)
        return 0
    runs = {ranks: visited(ranks, arguments) for ranks in RANKS}
    rows = []
    for step, ids in enumerate(runs[1]):
        digests = [hashlib.sha256("\n".join(run[step]).encode()).hexdigest()[:12] for run in runs.values()]
        rows.append([step, len(ids), ids[0], *digests, "same" if len(set(digests)) == 1 else "DIFFER"])
    print(tabulate(rows, ["step", "images", "first id", *(f"{ranks} ranks" for ranks in RANKS), "verdict"]))
    same = all(run == runs[1] for run in runs.values())
    print(f"\n{len(rows)} steps of {arguments.batch_size} images: ids and order {'the same' if same else 'DIFFER'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

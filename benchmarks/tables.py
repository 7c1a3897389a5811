"""Any table of benchmarks/results again, by one command.

    python -m benchmarks.tables                                  which there are
    python -m benchmarks.tables quality-64px --data chest_xray   what made benchmarks/results/*-quality-64px.md

Shows each command, then runs it; the first that fails ends it. Everything lands below --work (default: tables), and
what is done there already finds itself done. `--show` only prints the commands.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SEEDS = (0, 1, 2)
BEST, REFERENCE = ([f"{{work}}/{name}-{seed}" for seed in SEEDS] for name in ("best", "reference"))
AT_64_PX, OF_64_PX = "data.shards={work}/shards_64", "--shards {work}/shards_64"
LIKE_BEST = f"{AT_64_PX} image_size=64 epochs=24 precision=bf16"

PARTS = {
    "recipe": "",
    "not_adversarial": "objective.adversarial_weight=0",
    "no_feature_matching": "objective.feature_matching_weight=0",
    "bernoulli": "objective.likelihood=bernoulli",
    "gaussian": "objective.likelihood=gaussian",
    "kl_weight_1": "objective.kl_weight=1",
    "vector": "model.name=conv model.channels=[32,64,128,256] model.latent_dim=512 model.num_blocks=null "
    "model.latent_channels=null",
    "not_told_the_class": "model.num_classes=0",
    "recipe_seed_1": "seed=1",
    "not_told_the_class_seed_1": "model.num_classes=0 seed=1",
    "laplacian": "objective.adversarial_weight=0 objective.laplacian_weight=10",
    "ms_ssim": "objective.adversarial_weight=0 objective.ms_ssim_weight=10",
    "no_average": "train.ema_decay=0",
    "kl_cycles": "objective.kl_warmup_steps=0 objective.kl_cycle_steps=326",
    "free_bits": "objective.kl_weight=1 objective.free_bits=2",
    "continuous_bernoulli": "objective.likelihood=continuous_bernoulli",
}
"""The 64 px recipe, and what it is with one part changed."""

SHARD_64 = "cxr-vae shard {data} {work}/shards_64 --image-size 64"
SHARD_224 = "cxr-vae shard {data} {work}/shards_224"
RUN_224 = "cxr-vae train configs/reference.yaml data.shards={work}/shards_224 run_dir={work}/run epochs=2"

TABLES: dict[str, list[str]] = {
    "first-light": [SHARD_224, "python -m benchmarks.order {work}/shards_224 --steps 170"],
    "training-that-cannot-be-hurt": [
        SHARD_224,
        "python -m benchmarks.faults --kills 200 --seed 4",
        "python -m benchmarks.corruption",
        "python -m benchmarks.elastic {work}/shards_224 --steps 40",
        "python -m benchmarks.checkpoint_cost --rounds 3",
        "python -m benchmarks.resume_cost {work}/shards_224 --rounds 3",
    ],
    "slurm-chaos": [
        "slurm/local_cluster install",
        "slurm/local_cluster up",
        "bash -c 'eval \"$(slurm/local_cluster env)\" && python -m benchmarks.slurm_chaos --rounds 3'",
        "slurm/local_cluster down",
    ],
    "evaluation": [
        SHARD_224,
        RUN_224,
        "python -m benchmarks.floors {work}/shards_224",
        "python -m benchmarks.evaluate {work}/run --num 128 --rounds 5",
    ],
    "memorisation": ["python -m benchmarks.memorisation {data} {work}/memorisation --features benchmarks.lite0:lite0"],
    "scale": ["python -m benchmarks.scale", "python -m benchmarks.on_paper"],
    "speed": ["python -m benchmarks.speed"],
    "h200": ["python -m benchmarks.speed_gpu {data} {work}/speed_gpu"],
    "quality-224px": [
        SHARD_224,
        "cxr-vae train configs/best.yaml data.shards={work}/shards_224 run_dir={work}/best_224",
        "cxr-vae prior {work}/best_224",
        "python -m benchmarks.quality {work}/best_224 --out {work}/best_224.json",
        "cxr-vae train configs/reference.yaml data.shards={work}/shards_224 run_dir={work}/reference_224 epochs=10",
        "python -m benchmarks.quality {work}/reference_224 --priors standard --out {work}/reference_224.json",
    ],
    "parts-64px": [
        SHARD_64,
        *(
            f"cxr-vae train configs/best_64px.yaml {AT_64_PX} run_dir={{work}}/parts/{name} epochs=6 {options}"
            for name, options in PARTS.items()
        ),
        f"python -m benchmarks.quality {' '.join(f'{{work}}/parts/{name}' for name in PARTS)} --priors standard"
        " --out {work}/parts.json",
    ],
    "quality-64px": [
        SHARD_64,
        *(
            command
            for seed, best, reference in zip(SEEDS, BEST, REFERENCE, strict=True)
            for command in (
                f"cxr-vae train configs/best_64px.yaml {AT_64_PX} run_dir={best} seed={seed}",
                f"cxr-vae prior {best}",
                f"cxr-vae train configs/reference.yaml {LIKE_BEST} run_dir={reference} seed={seed}",
            )
        ),
        f"python -m benchmarks.quality {' '.join(BEST)} --out {{work}}/best.json",
        f"python -m benchmarks.quality {' '.join(REFERENCE)} --priors standard gmm --out {{work}}/reference.json",
        *(
            command
            for seed, best in zip(SEEDS, BEST, strict=True)
            for command in (
                f"cxr-vae generate {best} --num 1341 --label NORMAL --out {{work}}/made-{seed}/NORMAL",
                f"cxr-vae generate {best} --num 3875 --label PNEUMONIA --out {{work}}/made-{seed}/PNEUMONIA",
                f"python -m benchmarks.usefulness --seeds 1 --generated {{work}}/made-{seed} {OF_64_PX}",
            )
        ),
    ],
}
"""By the name of its file in benchmarks/results, without the date."""


def commands_of(table: str, data: str, work: Path) -> list[str]:
    """What is to be run, in order."""
    return [command.format(data=shlex.quote(data), work=shlex.quote(str(work))) for command in TABLES[table]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=sorted(TABLES))
    parser.add_argument("--data", default="chest_xray", help="folder of X-rays: split/class/*.jpeg")
    parser.add_argument("--work", type=Path, default=Path("tables"))
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args(arguments)
    if options.table is None:
        print("\n".join(sorted(TABLES)))
        return
    own = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands_of(options.table, options.data, options.work):
        print(f"$ {command}", flush=True)
        if not options.show and (code := subprocess.run(shlex.split(command), env=own, check=False).returncode):
            raise SystemExit(code)


if __name__ == "__main__":
    main()

"""How long figures take, against torch-fidelity's own command on the same PNGs with the same network.

    python benchmarks/evaluate.py RUN [--num 200] [--rounds 5]

RUN is a trained run; its shards have to be there. Interleaved rounds, each in processes of its own: torch-fidelity on
the two folders of PNGs that an evaluation left (FID, KID, IS), `cxr-vae evaluate` with nothing kept, the same with the
features of real images in the cache, and on two processes. Prints medians and ratios with their spread.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

TORCH_FIDELITY = """
import sys, torch_fidelity
torch_fidelity.calculate_metrics(
    input1=sys.argv[1], input2=sys.argv[2], isc=True, fid=True, kid=True, cuda=False, cache=False, verbose=False,
    isc_splits=10, kid_subset_size=int(sys.argv[4]), feature_extractor_weights_path=sys.argv[3], batch_size=64,
)
"""


def timed(call: list[str], **variables: str) -> float:
    start = time.perf_counter()
    subprocess.run(call, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def ratio(a: list[float], b: list[float]) -> str:
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"


def distances(num: int) -> str:
    """The Fréchet distance alone, at `num` images of 2048 features."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    from cxr_vae.metrics import frechet_distance

    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(num, 2048)).astype(np.float32) for _ in range(2))
    times: dict[str, list[float]] = {"ours": [], "torch-fidelity": []}
    for _ in range(5):
        start = time.perf_counter()
        ours = frechet_distance(a, b)
        middle = time.perf_counter()
        statistics_ = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
        theirs = fid_statistics_to_metric(*statistics_, verbose=False)["frechet_inception_distance"]
        times["ours"].append(middle - start)
        times["torch-fidelity"].append(time.perf_counter() - middle)
    return f"{ratio(times['torch-fidelity'], times['ours'])}, relative difference {abs(ours / theirs - 1):.1e}"


def extraction(num: int) -> str:
    """The network alone on `num` images of 224 px in blocks of 64, as torch-fidelity calls it and as we do."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from cxr_vae.features import LAYERS, build_inception, load_network

    ours = load_network("random", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        torch.save(build_inception("random")[0].state_dict(), path)
        theirs = FeatureExtractorInceptionV3("theirs", LAYERS, feature_extractor_weights_path=path)
    images = torch.randint(0, 256, (num, 1, 224, 224), dtype=torch.uint8)
    times: dict[str, list[float]] = {"ours": [], "torch-fidelity": []}
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            for block in images.split(64):
                ours(block)
            middle = time.perf_counter()
            for block in images.split(64):
                theirs(block.expand(-1, 3, -1, -1))
            times["ours"].append(middle - start)
            times["torch-fidelity"].append(time.perf_counter() - middle)
    return (
        f"{ratio(times['torch-fidelity'], times['ours'])}; ours {num / statistics.median(times['ours']):.1f} images/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    from cxr_vae.features import build_inception

    folder = Path(tempfile.mkdtemp())
    weights = folder / "weights.pth"
    torch.save(build_inception("random")[0].state_dict(), weights)
    run = shutil.copytree(arguments.run, folder / "run", ignore=shutil.ignore_patterns("evaluation", "checkpoints"))
    options = [f"num_generated={arguments.num}", f"num_real={arguments.num}", "features=random"]
    ours = ["-m", "cxr_vae", "evaluate", str(run), *options]
    pngs = [str(run / "evaluation" / name) for name in ("generated", "real")]
    fidelity = [sys.executable, "-c", TORCH_FIDELITY, *pngs, str(weights), str(arguments.num // 2)]

    def evaluation(*, cached: bool, ranks: int = 1, threads: int = 2) -> float:
        shutil.rmtree(run / "evaluation", ignore_errors=True)
        if not cached:
            shutil.rmtree(folder / "cache", ignore_errors=True)
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        call = [sys.executable, *many, *ours]
        return timed(call, CXR_VAE_CACHE=str(folder / "cache"), OMP_NUM_THREADS=str(threads))

    times: dict[str, list[float]] = {
        name: [] for name in ("ours", "reference cached", "2 x 1 thread", "torch-fidelity")
    }
    for number in range(arguments.rounds):
        times["ours"].append(evaluation(cached=False))
        times["torch-fidelity"].append(timed(fidelity, OMP_NUM_THREADS="2"))
        times["reference cached"].append(evaluation(cached=True))
        times["2 x 1 thread"].append(evaluation(cached=False, ranks=2, threads=1))
        print(f"round {number + 1}", flush=True)
    rows = [[name, statistics.median(values), min(values), max(values)] for name, values in times.items()]
    print(tabulate(rows, ["", "median s", "least", "most"], floatfmt=".1f"))
    print(f"torch-fidelity / ours: {ratio(times['torch-fidelity'], times['ours'])}")
    print(f"ours / ours with the reference cached: {ratio(times['ours'], times['reference cached'])}")
    print(f"1 process of 2 threads / 2 of 1: {ratio(times['ours'], times['2 x 1 thread'])}")
    print(f"Fréchet distance alone, torch-fidelity / ours: {distances(1000)}")
    print(f"the network alone, torch-fidelity / ours: {extraction(128)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

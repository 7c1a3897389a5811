"""How long figures take, against torch-fidelity's own command on the same PNGs with the same network.

    python -m benchmarks.evaluate RUN [--num 128] [--rounds 5]

RUN is a trained run; its shards have to be there. Interleaved rounds, each in processes of its own, on the two folders
of PNGs that an evaluation left: torch-fidelity (FID, KID, IS); our features and figures of them (more of them, with
intervals), nothing kept; the same with the reference's features kept. Then the whole of `cxr-vae evaluate`, which also
generates, reconstructs, bounds the likelihood and measures the floor, on one process of two threads and on two of one.
Prints medians and ratios with their spread. `--num` is best a multiple of 128, so that two ranks have equally many.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from cxr_vae.run_dir import RunDir

TORCH_FIDELITY = """
import sys, torch_fidelity
torch_fidelity.calculate_metrics(
    input1=sys.argv[1], input2=sys.argv[2], isc=True, fid=True, kid=True, cuda=False, cache=False, verbose=False,
    isc_splits=10, kid_subset_size=min(1000, int(sys.argv[4])), batch_size=64,
    feature_extractor_weights_path=sys.argv[3],
)
"""


OURS = """
import sys
from pathlib import Path
import torch
from cxr_vae.audit.samples import from_folder
from cxr_vae.config import EvaluateConfig
from cxr_vae.distributed import world
from cxr_vae.evaluation.features import Features, load_network
from cxr_vae.evaluation.image_sets import ImageSet, extract
from cxr_vae.evaluation.metrics import compare
found = []
with world("cpu") as here:
    network = load_network("random", here.device)
    for name, root in (("generated", sys.argv[3]), ("real", sys.argv[4])):
        samples = from_folder(Path(sys.argv[1 if name == "generated" else 2]), int(sys.argv[5]))
        fetch = lambda start, stop, samples=samples: (samples.fetch(start, stop), {})
        of = extract(ImageSet(name, len(samples.names), fetch, samples.facts, Path(root)), network, here)
        found.append(Features(of["pooled"], of["logits"]))
print(compare(*found, EvaluateConfig()))
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

    from cxr_vae.evaluation.metrics import frechet_distance

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

    from cxr_vae.evaluation.features import LAYERS, build_inception, load_network

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
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    from cxr_vae.evaluation.features import build_inception

    folder = Path(tempfile.mkdtemp())
    weights = folder / "weights.pth"
    torch.save(build_inception("random")[0].state_dict(), weights)
    run = shutil.copytree(arguments.run, folder / "run", ignore=shutil.ignore_patterns("evaluation", "checkpoints"))
    size = RunDir(run).saved_config().data.image_size
    options = [f"num_generated={arguments.num}", f"num_real={arguments.num}", "features=random"]

    def evaluation(*, ranks: int = 1, threads: int = 2) -> float:
        shutil.rmtree(run / "evaluation", ignore_errors=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        call = [sys.executable, *many, "-m", "cxr_vae", "evaluate", str(run), *options]
        return timed(call, CXR_VAE_CACHE=str(folder / "cache"), OMP_NUM_THREADS=str(threads))

    def fidelity() -> float:
        call = [sys.executable, "-c", TORCH_FIDELITY, *pngs, str(weights), str(arguments.num)]
        return timed(call, OMP_NUM_THREADS="2")

    def ours(*, cached: bool) -> float:
        for name in ("generated", *([] if cached else ["real"])):
            shutil.rmtree(folder / "kept" / name, ignore_errors=True)
        kept = [str(folder / "kept" / name) for name in ("generated", "real")]
        return timed([sys.executable, "-c", OURS, *pngs, *kept, str(size)], OMP_NUM_THREADS="2")

    evaluation()
    for name in ("generated", "real"):
        (run / "evaluation" / name).rename(folder / name)
        (folder / name / "images.json").unlink()
    pngs = [str(folder / name) for name in ("generated", "real")]
    kinds: dict[str, Callable[[], float]] = {
        "torch-fidelity": fidelity,
        "ours": lambda: ours(cached=False),
        "ours, reference kept": lambda: ours(cached=True),
        "evaluate": evaluation,
        "evaluate, 2 x 1 thread": lambda: evaluation(ranks=2, threads=1),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(arguments.rounds):
        for name, measure in kinds.items():
            times[name].append(measure())
        print(f"round {number + 1}", flush=True)
    rows = [[name, statistics.median(values), min(values), max(values)] for name, values in times.items()]
    print(tabulate(rows, ["", "median s", "least", "most"], floatfmt=".1f"))
    print(f"torch-fidelity / ours: {ratio(times['torch-fidelity'], times['ours'])}")
    print(f"torch-fidelity / ours, reference kept: {ratio(times['torch-fidelity'], times['ours, reference kept'])}")
    print(f"ours / ours, reference kept: {ratio(times['ours'], times['ours, reference kept'])}")
    print(f"evaluate on 1 process of 2 threads / 2 of 1: {ratio(times['evaluate'], times['evaluate, 2 x 1 thread'])}")
    print(f"Fréchet distance alone, torch-fidelity / ours: {distances(1000)}")
    print(f"the network alone, torch-fidelity / ours: {extraction(128)}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""Small real data that many tests share: X-ray-like JPEGs in Kaggle's layout, and shards of them."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from tests.helpers import TINY, cxr_vae, draw_source
from tests.slurm_helpers import SlurmCluster, local_cluster


def pytest_configure() -> None:
    """Ctrl-C works in the commands the tests start, also where a background shell had made all of us ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["CXR_VAE_CORES"] = "1"  # also for what is called in this process: see `environment` in helpers
    os.environ["CXR_VAE_CACHE"] = tempfile.mkdtemp(prefix="cxr-vae-cache-")  # not the user's


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws in this process doesn't depend on which ran before."""
    torch.manual_seed(0)


SLOW_FILES = (
    "slurm",
    "slurm_interruptions",
    "faults",
    "train",
    "recipe",
    "extending",
    "sbatch",
    "launch",
    "evaluate",
    "guard",
    "doctor",
    "audit",
    "efficiency",
    "local_cluster",
    "stopping",
)
"""The slowest first: each file runs in one process, and the last must not be a long one."""


LEFT_OUT = pytest.StashKey[int]()
"""How many tests need a GPU that isn't there."""


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files in SLOW_FILES first, marked `slow`; without the tests marked `gpu` where there is none."""
    order = {f"test_{name}": place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.path.stem in order:
            item.add_marker("slow")
    need_gpu = [] if torch.cuda.is_available() else [item for item in items if item.get_closest_marker("gpu")]
    config.stash[LEFT_OUT] = len(need_gpu)
    if need_gpu:
        config.hook.pytest_deselected(items=need_gpu)
        items[:] = [item for item in items if item not in need_gpu]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist tells the one that prints."""
    told = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every process of pytest-xdist collects all tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what was not tested: no skip, since CI's machines have no GPU."""
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests need a GPU, and torch sees none here: they were left out")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI nothing may be skipped: its machine can run every test."""
    report = yield
    if os.environ.get("CXR_VAE_CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where it should run: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 train and 18 test images, of several sizes."""
    root = tmp_path_factory.mktemp("source")
    draw_source(root, {"train": (28, 42), "test": (8, 10)})
    return root


@pytest.fixture(scope="session")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` at 32 px."""
    out = tmp_path_factory.mktemp("sharded") / "shards"
    write_shards(source, out, Preprocessing(image_size=32), workers=2)
    return out


@pytest.fixture(scope="session")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on `shards`."""
    run = tmp_path_factory.mktemp("trained") / "run"
    options = [*TINY, "epochs=2", f"data.shards={shards}", f"run_dir={run}"]
    result = cxr_vae("train", "configs/reference.yaml", *options)
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A real Slurm of two emulated nodes, for the tests of one process."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets must have short paths
    with local_cluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)

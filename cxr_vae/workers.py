"""Processes that do a stage's work on the cores of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager


def num_cores(num_processes: int = 1) -> int:
    """Cores for this process: CXR_VAE_CORES where its launcher sets it (and may have bound it to them), else its share.

    `num_processes` like this one share what this machine lets them use.
    """
    allowed = len(os.sched_getaffinity(0))
    told = os.environ.get("CXR_VAE_CORES", "")
    return min(int(told), allowed) if told.isdigit() and int(told) else max(1, allowed // num_processes)


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """A pool whose unstarted work is dropped when it is left, and whose processes never outlive this one.

    Spawned, not forked: they start clean of this process's threads. One worker is a thread of this process.
    """
    pool: Executor = ThreadPoolExecutor(1)
    if workers > 1:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends when the parent does, even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

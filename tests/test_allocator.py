import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from cxr_vae.distributed import world
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(25_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
torch.ones(25_000_000)
fill()
with world("cpu"):
    fill()
    fill()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    told = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True).stdout
    before, _, within = map(int, told.split())
    assert before > 10 * 24_000  # 100 MB in pages of 4 kB, ten times
    assert within < 1_000

"""A real Chromium without a screen, for pages we write."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import HANG_S


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright; where there can be none, the test is skipped."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome") or install()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=HANG_S * 1000)
        try:
            yield browser
        finally:
            browser.close()


def install() -> str:
    """Debian's package, with apt-get, as root; returns the program."""
    if os.geteuid() or not Path("/etc/debian_version").exists() or not shutil.which("apt-get"):
        pytest.skip("no chromium here, and installing one needs root on Debian")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", *command]
        result = subprocess.run(apt, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    program = shutil.which("chromium")
    assert program
    return program

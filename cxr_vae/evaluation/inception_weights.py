"""The weights that make a Fréchet distance an FID: the 2015 Inception network, as torch-fidelity distributes it.

They lie in torch's own cache, where torch-fidelity looks for them too, and are used only after their SHA-256 was seen.
"""

import http.client
import math
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO

import torch

from cxr_vae.errors import UserError
from cxr_vae.files import sha256_of

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
NAME = URL.rpartition("/")[2]
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NUM_BYTES = 95_628_359

HOW_TO_GET_THEM = (
    "run `cxr-vae fetch-weights` on a machine with internet that shares this cache, or download "
    f"{URL} anywhere and run `cxr-vae fetch-weights --from FILE`"
)


def cache_path() -> Path:
    """Where the file belongs: below $TORCH_HOME, by default ~/.cache/torch."""
    return Path(torch.hub.get_dir()) / "checkpoints" / NAME


def find_weights() -> Path | None:
    """The verified file in the cache, None where there is none; UserError where it is another file of that name."""
    path = cache_path()
    if not path.is_file():
        return None
    fault = find_fault(path)
    if fault:
        raise UserError(f"{path} {fault}; delete it, then {HOW_TO_GET_THEM}")
    return path


def require_weights() -> Path:
    """The verified file in the cache; UserError with the ways to get it where there is none."""
    path = find_weights()
    if path is None:
        raise UserError(
            f"the Inception weights are not in {cache_path().parent}: {HOW_TO_GET_THEM}. "
            "For figures that are no FID: features=random"
        )
    return path


def fetch_weights(source: Path | None = None, timeout_s: float = 30.0, within_s: float = math.inf) -> Path:
    """Puts the file into the cache, from `source` or the internet; only a file with the right hash gets there.

    `timeout_s`: how long the server may stay silent. `within_s`: how long all of the download may take.
    """
    target = cache_path()
    if find_weights():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if source is not None and not source.is_file():
        raise UserError(f"{source}: no such file; name the downloaded {NAME}")
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=NAME, suffix=".tmp") as file:
        if source is not None:
            with source.open("rb") as original:
                shutil.copyfileobj(original, file)
        else:
            try:
                _download(file, timeout_s, within_s)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                raise UserError(f"{URL} can't be downloaded ({reason}): {HOW_TO_GET_THEM}") from None
        file.flush()
        fault = find_fault(Path(file.name))
        if fault:
            raise UserError(f"{source or URL} {fault}: {HOW_TO_GET_THEM}")
        Path(file.name).chmod(0o644)  # a shared cache is for others, too
        # A hard link to the finished content: the name appears with all of it or not at all.
        target.unlink(missing_ok=True)
        target.hardlink_to(file.name)
    return target


def _download(file: IO[bytes], timeout_s: float, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    with urllib.request.urlopen(URL, timeout=timeout_s) as response:
        while block := response.read1(1 << 20):  # what is there: `read` waits for the whole block
            file.write(block)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{file.tell() >> 20} of {NUM_BYTES >> 20} MiB came in {within_s:g} s")


def find_fault(path: Path) -> str | None:
    """Why this is not the Inception file; None where it is."""
    size = path.stat().st_size
    if size != NUM_BYTES:
        return f"is not the Inception file: it has {size} bytes, not {NUM_BYTES}"
    if sha256_of(path) != SHA256:
        return f"is not the Inception file: its SHA-256 is not {SHA256}"
    return None

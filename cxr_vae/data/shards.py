"""A folder of X-rays to WebDataset tars with an index: `cxr-vae shard`.

Every tar is a function of the source and the options alone, whichever process writes it, and is published by a rename
together with a part of the index; so a job that was killed goes on where it was, and its bytes are those of one that
wasn't. The manifest is written last.
"""

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections import Counter
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL

from cxr_vae import __version__
from cxr_vae.console import Progress
from cxr_vae.data.index import FORMAT_VERSION, MANIFEST, ShardDirectory, concatenate, save_columns
from cxr_vae.data.sources import Layout, keys_of, scan
from cxr_vae.data.split_file import NOT_LISTED, SplitFile, apply_split, read_split_file
from cxr_vae.data.tars import PARTS, Entry, Preprocessing, Shard, read_part, write_tar
from cxr_vae.errors import UserError
from cxr_vae.files import read_json, sha256_of, sync_directory, write_atomically, write_json
from cxr_vae.locks import LOCK, DirectoryLock
from cxr_vae.workers import num_cores, worker_pool

MIN_SHARDS = 64  # so that ranks and loader workers get equal shares ...
MIN_PER_SHARD = 16  # ... where there are images enough,
MAX_PER_SHARD = 4096  # and no tar becomes unwieldy

REJECTED = "rejected.csv"


def write_shards(
    source: Path,
    out: Path,
    preprocessing: Preprocessing,
    *,
    split_file: Path | None = None,
    max_rejected: float = 0.01,
    workers: int | None = None,
) -> ShardDirectory:
    """Shards the images of `source` into `out`, or finishes what an earlier call began, or finds it finished.

    The splits are those of `split_file`, if there is one, else the source's folders.

    Processes that are asked for the same folder take turns; the later ones find it finished.

    Images that can't be read are listed in `rejected.csv`; where they are more than the share `max_rejected` of all,
    the job stops with UserError. `workers` processes (all cores by default) give the same bytes as one.
    """
    layout = scan(source, every_class=split_file is None)
    divided = read_split_file(split_file) if split_file else None
    if divided:
        layout = apply_split(layout, divided)
    fingerprint = _fingerprint(layout, preprocessing, divided)
    if not _is_finished(out, fingerprint):
        _refuse_foreign(out)
        lock = DirectoryLock(out, wait_s=math.inf)  # what another process is making there is most likely this
        try:
            if not _is_finished(out, fingerprint):
                _claim(out, fingerprint)
                shards = _plan(layout, out, preprocessing)
                num_rejected = _write_all(shards, layout, max_rejected, workers or num_cores())
                _finish(shards, layout, preprocessing, fingerprint, num_rejected, divided)
        finally:
            lock.release()
    return ShardDirectory.open(out)


# --------------------------------------------------------------------------------------------------------------------
# before: what to write


def num_shards(num_images: int) -> int:
    """64 shards where each then has at least 16 images, fewer below; above, multiples of 64 of at most 4096 images."""
    if num_images <= MIN_SHARDS * MAX_PER_SHARD:
        return max(1, min(MIN_SHARDS, num_images // MIN_PER_SHARD))
    return -(-num_images // (MIN_SHARDS * MAX_PER_SHARD)) * MIN_SHARDS


def _plan(layout: Layout, out: Path, preprocessing: Preprocessing) -> list[Shard]:
    shards = []
    keys = dict(zip((image.path for image in layout.images), keys_of(layout.images), strict=True))
    for split in layout.splits:
        entries = [
            Entry(image.path, keys[image.path], layout.classes.index(image.label), image.patient)
            for image in layout.images
            if image.split == split
        ]
        # Mixed by a hash of the path, so that a reader that goes through a tar meets all classes.
        entries.sort(key=lambda entry: hashlib.sha256(os.fsencode(entry.path)).digest())
        count = num_shards(len(entries))
        for number in range(count):
            part = entries[number * len(entries) // count : (number + 1) * len(entries) // count]
            name = f"{split}-{number:06d}"
            shards.append(Shard(name, number, str(layout.root), str(out), preprocessing, tuple(part)))
    return shards


def _fingerprint(layout: Layout, preprocessing: Preprocessing, divided: SplitFile | None) -> str:
    """Tells whether an output was made from this source with these options."""
    options = [FORMAT_VERSION, asdict(preprocessing), *([divided.sha256] if divided else [])]
    digest = hashlib.sha256(json.dumps(options).encode())
    for image in layout.images:
        digest.update(os.fsencode(f"{image.path}\0{image.num_bytes}\n"))
    return digest.hexdigest()


def _is_finished(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds these very shards, whole; UserError if it is finished otherwise."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a new or empty folder for the shards")
    if not (out / MANIFEST).exists():
        return False
    finished = ShardDirectory.open(out)
    if finished.manifest["fingerprint"] != fingerprint:
        raise UserError(f"{out} holds shards of another source or with other options; name another folder or delete it")
    shutil.rmtree(out / PARTS, ignore_errors=True)
    for split in finished.manifest["splits"]:
        finished.split(split)  # whole, or an error that says what is not
    return True


def _refuse_foreign(out: Path) -> None:
    """Raises UserError if `out` holds anything that no sharding began, nor another process has just finished."""
    foreign = sorted({path.name for path in out.iterdir()} - {LOCK}) if out.exists() else []
    if foreign and not (out / PARTS).is_dir() and not (out / MANIFEST).exists():
        raise UserError(f"{out} holds something else ({foreign[0]}); name a new or empty folder for the shards")


def _claim(out: Path, fingerprint: str) -> None:
    """Makes `out` that of these shards: what is there of others, unfinished, is of a source that has changed since."""
    plan = out / PARTS / "plan.json"
    plan.parent.mkdir(exist_ok=True)
    if not plan.is_file() or read_json(plan, hint=f"delete {out}") != fingerprint:
        for path in [*plan.parent.iterdir(), *out.glob("*-[0-9][0-9][0-9][0-9][0-9][0-9].tar*")]:
            path.unlink()
        write_json(plan, fingerprint)


# --------------------------------------------------------------------------------------------------------------------
# the work


def _write_all(shards: list[Shard], layout: Layout, max_rejected: float, workers: int) -> int:
    """Writes the tars that are missing and `rejected.csv`; returns how many images were left out."""
    out, num_images = Path(shards[0].out), len(layout.images)
    allowed = int(max_rejected * num_images)
    try:
        rejected = _write_missing(shards, allowed, workers, num_images)
    except BrokenProcessPool:
        raise UserError(
            f"{out}: a worker process was killed, probably for want of memory; run the same command again with fewer "
            "--workers, it goes on where it was"
        ) from None
    _write_rejected(out / REJECTED, rejected, layout.ignored)
    if len(rejected) > allowed:
        raise UserError(
            f"{len(rejected)} of {num_images} images can't be read, more than the {max_rejected:.3g} allowed: "
            f"see {out / REJECTED}; mend or remove them, or allow more with --max-rejected"
        )
    return len(rejected)


def _write_missing(shards: list[Shard], allowed: int, workers: int, num_images: int) -> list[tuple[str, str]]:
    """Writes the tars that are missing; returns (path, reason) of the images left out, stopping past `allowed`."""
    rejected: list[tuple[str, str]] = []
    missing = []
    for shard in shards:
        # What was rejected may have been mended since.
        if not shard.tar.is_file() or not shard.part.is_file() or read_part(shard).rejected:
            missing.append(shard)
    done = num_images - sum(len(shard.entries) for shard in missing)
    with Progress(num_images, "shard", done=done) as progress, worker_pool(min(workers, len(missing) or 1)) as pool:
        futures = {pool.submit(write_tar, shard): shard for shard in missing}
        for future in as_completed(futures):
            future.result()
            rejected += read_part(futures[future]).rejected
            progress.advance(len(futures[future].entries), f"{len(rejected)} rejected" if rejected else "")
            if len(rejected) > allowed:
                break
    return sorted(rejected, key=lambda row: os.fsencode(row[0]))


# --------------------------------------------------------------------------------------------------------------------
# after: index and manifest


def _write_rejected(path: Path, rejected: list[tuple[str, str]], ignored: tuple[tuple[str, str], ...]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["source", "status", "reason"])
    table.writerows([source, "rejected", reason] for source, reason in rejected)
    table.writerows([source, "ignored", reason] for source, reason in ignored)
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


def _finish(
    shards: list[Shard],
    layout: Layout,
    preprocessing: Preprocessing,
    fingerprint: str,
    num_rejected: int,
    divided: SplitFile | None,
) -> None:
    out = Path(shards[0].out)
    splits = {}
    for split in layout.splits:
        mine = [shard for shard in shards if shard.name.rpartition("-")[0] == split]
        parts = [read_part(shard) for shard in mine]
        counts = [len(part.columns.get("label", ())) for part in parts]
        if not sum(counts):
            raise UserError(f"{layout.root / split}: none of its images can be read; see {out / REJECTED}")
        columns = concatenate([part.columns for part in parts if part.columns])
        index = out / f"{split}.index.safetensors"
        save_columns(index, columns)
        labels = Counter(columns["label"].tolist())
        splits[split] = {
            "count": sum(counts),
            "count_per_class": {label: labels[number] for number, label in enumerate(layout.classes)},
            "num_patients": len(np.unique(columns["patient"], axis=0)),
            "index": {"file": index.name, "bytes": index.stat().st_size, "sha256": sha256_of(index)},
            "shards": [
                {"file": shard.tar.name, "count": count, "bytes": shard.tar.stat().st_size, "sha256": part.sha256}
                for shard, count, part in zip(mine, counts, parts, strict=True)
            ],
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        **asdict(preprocessing),
        "classes": list(layout.classes),
        "num_rejected": num_rejected,
        "num_ignored": sum(reason != NOT_LISTED for _, reason in layout.ignored),
        "num_not_in_split_file": sum(reason == NOT_LISTED for _, reason in layout.ignored),
        "split_file_sha256": divided.sha256 if divided else None,
        "fingerprint": fingerprint,
        "versions": {"cxr_vae": __version__, "pillow": PIL.__version__, "numpy": np.__version__},
        "splits": splits,
    }
    write_json(out / MANIFEST, manifest)
    sync_directory(out)
    shutil.rmtree(out / PARTS, ignore_errors=True)  # another process that finds it finished does so, too

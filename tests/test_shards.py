import csv
import filecmp
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cxr_vae.data.images import decode_grey, to_square
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.shards import num_shards, write_shards
from cxr_vae.data.tars import Entry, Preprocessing, Shard, read_entries
from cxr_vae.errors import UserError
from cxr_vae.locks import DirectoryLock
from tests.helpers import HANG_S, check_sentence, command, cxr_vae, draw_source, environment, with_patch


def same_files(a: Path, b: Path) -> bool:
    names, others = (sorted(path.name for path in folder.iterdir()) for folder in (a, b))
    assert names == others
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [(1, 1), (15, 1), (32, 2), (624, 39), (1024, 64), (5216, 64), (262144, 64), (262145, 128)],
)
def test_number_of_shards(num_images: int, expected: int) -> None:
    assert num_shards(num_images) == expected
    assert num_images / num_shards(num_images) <= 4096


def test_same_bytes_for_any_number_of_workers(source: Path, shards: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "one", Preprocessing(image_size=32), workers=1)
    assert same_files(shards, tmp_path / "one")


@pytest.mark.parametrize("format", ["png", "raw", "jpg"])
def test_webdataset_reads_the_tars(source: Path, tmp_path: Path, format: str) -> None:
    directory = write_shards(source, tmp_path / "shards", Preprocessing(32, "stretch", format), workers=2)
    urls = [str(path) for path in directory.split("train").shards]
    suffix = {"png": "png", "raw": "npy", "jpg": "jpg"}[format]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8").to_tuple("__key__", suffix, "cls"))
    index = directory.split("train")
    assert [key for key, _, _ in samples] == index.texts("key")
    assert [label for _, _, label in samples] == index.labels.tolist()
    for (_, image, _), name in zip(samples, index.texts("source"), strict=True):
        expected = to_square(decode_grey((source / name).read_bytes()), 32, "stretch").astype(int)
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= (8 if format == "jpg" else 0)


def test_index_says_where_each_image_lies_and_where_it_came_from(source: Path, shards: Path) -> None:
    index = ShardDirectory.open(shards).split("train")
    assert len(index) == 70
    offsets, sizes, numbers = index.numbers("offset"), index.numbers("size"), index.numbers("shard")
    for row, (key, name, patient) in enumerate(
        zip(index.texts("key"), index.texts("source"), index.texts("patient"), strict=True)
    ):
        with tarfile.open(index.shards[numbers[row]]) as tar:
            member = tar.getmember(f"{key}.png")
            assert (member.offset_data, member.size) == (offsets[row], sizes[row])
            assert (member.mtime, member.uid, member.uname) == (0, 0, "")
        original = (source / name).read_bytes()
        assert index.numbers("sha256")[row].tobytes() == hashlib.sha256(original).digest()
        with Image.open(io.BytesIO(original)) as image:
            assert image.size == (index.numbers("width")[row], index.numbers("height")[row])
        assert Path(name).stem.startswith(patient)
    assert set(index.texts("source")) == {str(path.relative_to(source)) for path in (source / "train").rglob("*.jpeg")}


def test_manifest_describes_the_shards(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["splits"]["train"]["count_per_class"] == {"NORMAL": 28, "PNEUMONIA": 42}
    for split in manifest["splits"].values():
        assert sum(shard["count"] for shard in split["shards"]) == split["count"]
        for file in [*split["shards"], split["index"]]:
            content = (shards / file["file"]).read_bytes()
            assert len(content) == file["bytes"]
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


HELD_AFTER_A_TAR = """
import functools, time, cxr_vae.data.tars as tars
write = tars.write_tar
@functools.wraps(write)
def held(shard):
    write(shard)
    time.sleep(600)
tars.write_tar = held
"""
"""In each worker: however slow the machine, the shards aren't finished before they are interrupted."""


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    draw_source(tmp_path / "source", {"train": (120, 120), "test": (40, 40)})
    arguments = ["shard", tmp_path / "source", tmp_path / "killed", "--image-size", 448, "--workers", 2]
    kills, held = 0, with_patch(tmp_path, HELD_AFTER_A_TAR)
    for _ in range(3):
        process = subprocess.Popen(
            command("cxr-vae", *arguments), env=held, stderr=subprocess.PIPE, start_new_session=True
        )
        before = len(list((tmp_path / "killed").glob("*.tar")))
        while process.poll() is None and len(list((tmp_path / "killed").glob("*.tar"))) < before + 1:
            time.sleep(0.002)
        if process.poll() is None:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills == 3
    assert cxr_vae(*arguments).returncode == 0
    arguments[2] = tmp_path / "whole"
    assert cxr_vae(*arguments).returncode == 0
    assert same_files(tmp_path / "whole", tmp_path / "killed")


def test_two_at_once_take_turns_and_the_second_finds_them_finished(tmp_path: Path) -> None:
    draw_source(tmp_path / "source", {"train": (60, 60), "test": (20, 20)})
    both = tmp_path / "both"
    lock = DirectoryLock(both, wait_s=0)  # until both stand at the door
    call = command("cxr-vae", "shard", tmp_path / "source", both, "--image-size", 224, "--workers", 1)
    processes = [subprocess.Popen(call, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        told = process.stderr.readline()
        assert told.startswith(f"{both} is in use by process {os.getpid()} on "), told
        assert told.endswith("; waiting for it to leave\n")
    lock.release()
    told = [process.communicate(timeout=HANG_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    whole = write_shards(tmp_path / "source", tmp_path / "whole", Preprocessing(224), workers=1)
    assert len(whole.split("train")) == 120
    assert same_files(both, tmp_path / "whole")


def test_finished_shards_are_left_alone(source: Path, shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    write_shards(source, shards, Preprocessing(image_size=32))
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_unreadable_images_are_listed_and_the_rest_is_sharded(tmp_path: Path) -> None:
    source = tmp_path / "source"
    draw_source(source, {"train": (20, 20), "test": (4, 4)})
    (source / "train" / "NORMAL" / "empty, but named so.jpeg").write_bytes(b"")
    (source / "train" / "NORMAL" / "ä text.png").write_text("no image")
    (source / "test" / "NORMAL" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "test" / "NORMAL" / "pipe.jpg")
    (source / "train" / "Thumbs.db").write_bytes(b"x")
    arguments = ["shard", source, tmp_path / "out", "--image-size", 32]
    refused = cxr_vae(*arguments)
    check_sentence(refused, "of 52 images can't be read", str(tmp_path / "out" / "rejected.csv"), "--max-rejected")
    assert not (tmp_path / "out" / "manifest.json").exists()

    accepted = cxr_vae(*arguments, "--max-rejected", "10%")
    assert accepted.returncode == 0, accepted.stderr
    assert "4 images rejected, 1 other files ignored" in accepted.stdout
    with (tmp_path / "out" / "rejected.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["source"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}
    assert rows == {
        "train/NORMAL/empty, but named so.jpeg": ("rejected", "empty file"),
        "train/NORMAL/ä text.png": ("rejected", "not a JPEG or PNG image"),
        "test/NORMAL/gone.jpg": ("rejected", "a broken link"),
        "test/NORMAL/pipe.jpg": ("rejected", "not a regular file"),
        "train/Thumbs.db": ("ignored", "not a class folder"),
    }
    directory = ShardDirectory.open(tmp_path / "out")
    assert (len(directory.split("train")), len(directory.split("test"))) == (40, 8)


def test_a_file_without_permission_is_rejected_by_name(tmp_path: Path) -> None:
    draw_source(tmp_path, {"train": (2, 0)})
    paths = sorted((tmp_path / "train" / "NORMAL").iterdir())
    paths[0].chmod(0)
    entries = tuple(Entry(str(path.relative_to(tmp_path)), f"NORMAL/{path.stem}", 0, path.stem) for path in paths)
    shard = Shard("train-000000", 0, str(tmp_path), str(tmp_path), Preprocessing(32), entries)
    for folder in [tmp_path, *tmp_path.parents][:-2]:
        folder.chmod(folder.stat().st_mode | 0o055)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        (_, secret), (_, plain) = read_entries(shard)
    finally:
        os.seteuid(user)
    assert secret == "can't be read: Permission denied"
    assert plain["width"] > 0


def test_odd_names_and_equal_stems_become_separate_samples(tmp_path: Path) -> None:
    folder = tmp_path / "source" / "train"
    names = ["a.b.v1.jpeg", "a.b.v2.jpeg", "x.jpg", "x.png", "mit Leerzeichen.png", "лёгкие.png", b"latin-\xe9.png"]
    for number, name in enumerate(names):
        path = folder / "NORMAL" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        format = "PNG" if path.suffix == ".png" else "JPEG"
        Image.new("L", (40, 40), number * 20).save(path, format)
    directory = write_shards(tmp_path / "source", tmp_path / "out", Preprocessing(32), workers=1)
    index = directory.split("train")
    assert set(index.texts("source")) == {f"train/NORMAL/{os.fsdecode(name)}" for name in names}
    urls = [str(path) for path in index.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))
    assert len(read) == len(names)
    assert {int(sample["png"][16, 16]) for sample in read} == {number * 20 for number in range(len(names))}


def test_other_outputs_are_refused_and_left_alone(source: Path, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("x")
    check_sentence(cxr_vae("shard", source, other), str(other), "holds something else (chapter1.tex)")
    assert [path.name for path in other.iterdir()] == ["chapter1.tex"]
    check_sentence(cxr_vae("shard", source, other / "chapter1.tex"), "is a file")
    before = {path: path.read_bytes() for path in shards.iterdir()}
    check_sentence(cxr_vae("shard", source, shards, "--fit", "crop"), "another source or with other options")
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


def test_an_unfinished_output_of_a_source_that_changed_is_begun_anew(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    draw_source(source, {"train": (10, 10)})
    broken = source / "train" / "NORMAL" / "broken.jpg"
    broken.write_text("x")
    with pytest.raises(UserError, match="can't be read"):
        write_shards(source, out, Preprocessing(32), workers=1)
    broken.unlink()
    directory = write_shards(source, out, Preprocessing(32), workers=1)
    assert len(directory.split("train")) == 20


def test_an_image_that_was_mended_is_taken(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    draw_source(source, {"train": (20, 20)})
    damaged = next((source / "train" / "NORMAL").iterdir())
    content = damaged.read_bytes()
    damaged.write_bytes(bytes(len(content)))  # of the same size
    with pytest.raises(UserError, match="mend or remove them"):
        write_shards(source, out, Preprocessing(32), workers=1)
    damaged.write_bytes(content)
    assert len(write_shards(source, out, Preprocessing(32), workers=1).split("train")) == 40
    assert damaged.name not in (out / "rejected.csv").read_text()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount a small tmpfs")
def test_a_full_disk_is_told_in_one_sentence_and_loses_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", out], check=True)
    try:
        line = check_sentence(cxr_vae("shard", source, out, "--format", "raw"), "No space left on device")
        assert str(out) in line
        subprocess.run(["mount", "-o", "remount,size=20m", out], check=True)
        assert cxr_vae("shard", source, out, "--format", "raw").returncode == 0
        assert len(ShardDirectory.open(out).split("train")) == 70
    finally:
        subprocess.run(["umount", out], check=True)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda out: (out / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda out: (out / "manifest.json").write_text("{}"), "not a manifest of format version"),
        (lambda out: (out / "train.index.safetensors").unlink(), "train.index.safetensors is missing"),
        (lambda out: (out / "train.index.safetensors").write_bytes(b""), "train.index.safetensors is damaged"),
        (lambda out: (out / "train-000001.tar").unlink(), "train-000001.tar is missing"),
        (lambda out: os.truncate(out / "train-000001.tar", 700), "has 700 bytes"),
        (lambda out: (out / "train-000001.tar").write_bytes(b""), "has 0 bytes"),
    ],
)
def test_damaged_shards_are_refused_in_words(source: Path, shards: Path, tmp_path: Path, damage, expected: str) -> None:
    out = shutil.copytree(shards, tmp_path / "copy")
    damage(out)
    with pytest.raises(UserError) as error:
        ShardDirectory.open(out).split("train")
    assert expected in str(error.value)
    assert "cxr-vae shard" in str(error.value)
    if (out / "manifest.json").exists():  # sharding again doesn't call them finished
        with pytest.raises(UserError, match=re.escape(expected)):
            write_shards(source, out, Preprocessing(32), workers=1)


@pytest.mark.parametrize("size", [-224, 0, 7, 5000])
def test_impossible_sizes_are_refused(source: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"image size {size} should be from 8 to 4096"):
        write_shards(source, tmp_path / "out", Preprocessing(size))
    assert not (tmp_path / "out").exists()


def test_an_unknown_split_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="no split tset; it has test, train"):
        ShardDirectory.open(shards).split("tset")

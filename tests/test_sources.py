from pathlib import Path

import pytest

from cxr_vae.data.sources import SourceImage, keys_of, patient_of, scan
from cxr_vae.errors import UserError
from tests.helpers import draw_source


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("person123_bacteria_4.jpeg", "person123_bacteria"),
        ("person123_virus_4.jpeg", "person123_virus"),
        ("person1372_virus_2365_2.jpeg", "person1372_virus"),
        ("IM-0115-0001.jpeg", "IM-0115"),
        ("IM-0500-0001-0002.jpeg", "IM-0500"),
        ("NORMAL2-IM-0115-0001.jpeg", "NORMAL2-IM-0115"),
        ("scan 17.left.png", "train/NORMAL/scan 17.left"),
        ("0001.png", "train/NORMAL/0001"),
    ],
)
def test_patient_of(name: str, patient: str) -> None:
    assert patient_of(f"train/NORMAL/{name}") == patient


def test_keys_are_plain_unique_and_independent_of_one_another() -> None:
    paths = ["a.b.jpg", "a_b.jpg", "a b.png", "ärzte.jpeg", "x.jpg", "x.png", "y" * 300 + ".jpg"]
    images = [SourceImage(f"train/NORMAL/{path}", "train", "NORMAL", 1) for path in paths]
    keys = keys_of(images)
    assert len(set(keys)) == len(keys)
    assert all(key.isascii() and "." not in key and " " not in key and len(key) < 90 for key in keys)
    # Dropping one file of a pair with equal names leaves the other's neighbours alone, and order plays no part.
    assert keys_of(images[::-1])[::-1] == keys
    assert keys_of([images[3]]) == [keys[3]]


def test_scan_finds_all_and_lists_what_it_leaves_out(tmp_path: Path) -> None:
    draw_source(tmp_path, {"train": (2, 3), "test": (1, 1)})
    (tmp_path / "train" / "NORMAL" / ".DS_Store").write_text("x")
    (tmp_path / "train" / "NORMAL" / "notes.txt").write_text("x")
    (tmp_path / "train" / "NORMAL" / "deeper").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "readme.md").write_text("x")
    layout = scan(tmp_path)
    assert layout.classes == ("NORMAL", "PNEUMONIA")
    assert len(layout.images) == 7
    assert {path for path, _ in layout.ignored} == {
        "train/NORMAL/.DS_Store",
        "train/NORMAL/notes.txt",
        "train/NORMAL/deeper",
        "__MACOSX",
        "readme.md",
    }


def make(root: Path, *paths: str) -> None:
    for path in paths:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(b"")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], "holds no images"),
        (["train/NORMAL/a.jpg", "train/PNEUMONIA/b.jpg", "test/NORMAL/c.jpg"], "test/PNEUMONIA is missing"),
        (["train/NORMAL/a.jpg", "train/PNEUMONIA/b.jpg", "test/NORMAL/c.jpg", "test/PNEUMONIA/"], "is empty"),
        (["train/a.jpg"], "train holds images but no class folders"),
        (["train/NORMAL/a.txt"], "train holds no images in class folders"),
        (["chest_xray/train/NORMAL/a.jpg"], "did you mean"),
    ],
)
def test_other_layouts_are_refused_in_words(tmp_path: Path, paths: list[str], expected: str) -> None:
    make(tmp_path, *paths)
    with pytest.raises(UserError) as error:
        scan(tmp_path)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_and_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        scan(tmp_path / "none")
    (tmp_path / "file.zip").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file"):
        scan(tmp_path / "file.zip")

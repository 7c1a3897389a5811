import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.shards import write_shards
from cxr_vae.data.tars import Preprocessing
from cxr_vae.errors import UserError
from cxr_vae.inspection.duplicates import aligned_correlation, candidate_pairs, equal_groups, near_pairs, small_copies
from cxr_vae.inspection.inspect import inspect_shards, most_telling
from cxr_vae.inspection.survey import constant_borders, letterbox_bars, survey
from tests.helpers import cxr_vae, draw_source

SIDE = 128
NUM = 120


def radiograph(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(128, 128): anatomy that all share, which makes them correlate, and structure of their own at several scales."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    picture = 190 * np.exp(-((x / 0.8) ** 4) - (y / 1.1) ** 4)
    for side in (-0.4, 0.4):
        picture -= 100 * np.exp(-(((x - side) / 0.22) ** 2) - (y / 0.6) ** 2)
    picture += 8 * np.sin(18 * y + 3 * x**2)  # ribs
    for scale, strength in ((20, 12), (6, 8), (2.5, 6)):
        field = gaussian_filter(rng.normal(size=(SIDE, SIDE)), scale)
        picture += strength * field / field.std()
    return (picture + 30 + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8)


def shifted(image: npt.NDArray[Any], down: int, right: int) -> npt.NDArray[Any]:
    return np.pad(image, ((down, 0), (right, 0)), mode="edge")[:SIDE, :SIDE]


def compressed(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


def brightened(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return (image * 1.2 + 15).clip(0, 255).astype(np.uint8)


COPIES = {
    "shifted by one": lambda image: shifted(image, 0, 1),
    "shifted by two": lambda image: shifted(image, 2, 2),
    "brightened": brightened,
    "compressed": compressed,
    "all": lambda image: compressed(brightened(shifted(image, 1, 2))),
}


def save(root: Path, name: str, image: npt.NDArray[np.uint8], mode: str = "L") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).convert(mode).save(root / name)


@pytest.fixture(scope="module")
def originals() -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [radiograph(rng) for _ in range(NUM)]


@pytest.fixture(scope="module")
def planted(originals: list[npt.NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its shards with one leak of every kind."""
    source = tmp_path_factory.mktemp("planted") / "source"
    for number, image in enumerate(originals):
        split = "train" if number < 100 else "test"
        label = "NORMAL" if number % 2 else "PNEUMONIA"
        name = f"IM-{number:04d}-0001" if number % 2 else f"person{number}_virus_{number}"
        save(source, f"{split}/{label}/{name}.png", image, "L" if number % 2 else "RGB")
    # The same file in both splits, of one patient; the same file under two labels; the same pixels in another file.
    shutil.copy(source / "train/NORMAL/IM-0001-0001.png", source / "test/NORMAL/IM-0001-0002.png")
    shutil.copy(source / "train/NORMAL/IM-0003-0001.png", source / "train/PNEUMONIA/person9003_virus_1.png")
    Image.fromarray(originals[5]).convert("RGB").save(source / "train/NORMAL/IM-0005-0002.png", compress_level=1)
    for number, change in enumerate(COPIES.values()):
        save(source, f"test/PNEUMONIA/person{8000 + number}_virus_1.png", change(originals[10 + 2 * number]))
    framed = originals[20].copy()
    framed[:, :10] = framed[:, -10:] = 0
    save(source, "test/PNEUMONIA/person7000_virus_1.png", framed[::-1])
    out = source.parent / "shards"
    write_shards(source, out, Preprocessing(SIDE), workers=1)
    return source, out


@pytest.fixture(scope="module")
def record(planted: tuple[Path, Path]) -> dict[str, Any]:
    result = cxr_vae("inspect", planted[1], "--source", planted[0])
    assert result.returncode == 0, result.stderr
    assert "warning " in result.stdout
    loaded: dict[str, Any] = json.loads((planted[1] / "inspection.json").read_text())
    return loaded


def files_of(record: dict[str, Any], kind: str) -> set[frozenset[str]]:
    groups = [group for group in record["duplicates"] if group["kind"] == kind]
    return {frozenset(Path(image["source"]).stem for image in group["images"]) for group in groups}


def said(record: dict[str, Any], level: str) -> str:
    return "\n".join(finding["text"] for finding in record["findings"] if finding["level"] == level)


def test_planted_copies_are_found_and_nothing_else(record: dict[str, Any]) -> None:
    assert files_of(record, "same file") == {
        frozenset({"IM-0001-0001", "IM-0001-0002"}),
        frozenset({"IM-0003-0001", "person9003_virus_1"}),
    }
    assert files_of(record, "same pixels") == {frozenset({"IM-0005-0001", "IM-0005-0002"})}
    assert files_of(record, "near") == {
        frozenset({f"person{10 + 2 * number}_virus_{10 + 2 * number}", f"person{8000 + number}_virus_1"})
        for number in range(len(COPIES))
    }
    assert [group["kind"] for group in record["duplicates"][:1]] == ["same file"]  # under two labels: the worst first
    assert "2 groups of images that are the same file; 1 of them across splits" in said(record, "warning")
    assert "5 groups of images that are near copies; 5 of them across splits" in said(record, "warning")


def test_a_patient_in_two_splits_is_named(record: dict[str, Any]) -> None:
    assert record["patients_across_splits"] == {"IM-0001": {"train": 1, "test": 1}}
    assert "1 patient is in more than one split, with 2 images (IM-0001 first)" in said(record, "warning")


def test_counts_sizes_channels_and_borders(record: dict[str, Any]) -> None:
    tables = {table["title"].partition(":")[0]: table for table in record["tables"]}
    rows = {(row[0], row[1]): row[2:] for row in tables["Images"]["rows"]}
    assert rows["train", "NORMAL"] == [51, 50, 2, "IM-0005"]
    assert rows["test", "PNEUMONIA"][0] == 10 + len(COPIES) + 1
    aspects = next(table for table in record["tables"] if table["title"].startswith("Originals: minimum"))
    assert all(row[-1] == "1.000 / 1.000 / 1.000" for row in aspects["rows"])
    channels = next(table for table in record["tables"] if "channels" in table["title"])
    assert channels["headers"] == ["split", "class", "L", "RGB"]
    assert ["train", "NORMAL", 50, 1] in channels["rows"]
    assert ["train", "PNEUMONIA", 1, 50] in channels["rows"]
    assert "originals of the mode" in said(record, "note")
    bordered = next(table for table in record["tables"] if table["title"].startswith("Constant borders"))
    assert ["test", "PNEUMONIA", "6.2 %", "0.0 %", "6.2 %", 10.0] in bordered["rows"]
    assert ["test", "NORMAL", "0.0 %", "0.0 %", "0.0 %", None] in bordered["rows"]


def test_the_record_tells_which_shards_it_is_of_and_has_a_picture(
    record: dict[str, Any], planted: tuple[Path, Path]
) -> None:
    manifest = json.loads((planted[1] / "manifest.json").read_text())
    assert record["index_hashes"] == {name: split["index"]["sha256"] for name, split in manifest["splits"].items()}
    for picture in record["pictures"]:
        with Image.open(planted[1] / picture["file"]) as image:
            image.load()
            assert min(image.size) > 300
    assert all(len(row) == len(table["headers"]) for table in record["tables"] for row in table["rows"])
    assert {finding["level"] for finding in record["findings"]} <= {"ok", "note", "warning"}
    assert len(record["duplicates"]) == 2 + 1 + len(COPIES)
    for row in (image for group in record["duplicates"] for image in group["images"]):
        assert row["split"] == row["source"].split("/")[0]
    # The shards are still finished ones.
    write_shards(planted[0], planted[1], Preprocessing(SIDE), workers=1)


def test_clean_shards_raise_nothing(
    originals: list[npt.NDArray[np.uint8]], planted: tuple[Path, Path], tmp_path: Path
) -> None:
    for number, image in enumerate(originals):
        label = "NORMAL" if number % 3 else "PNEUMONIA"
        save(tmp_path / "source", f"{'train' if number < 60 else 'test'}/{label}/IM-{number:04d}-0001.png", image)
    write_shards(tmp_path / "source", tmp_path / "shards", Preprocessing(64), workers=1)
    (tmp_path / "shards" / "inspection_duplicates.png").write_bytes(b"of an earlier inspection")
    _, record = inspect_shards(tmp_path / "shards", tmp_path / "source", workers=1)
    assert record["duplicates"] == []
    assert record["pictures"] == []
    assert not (tmp_path / "shards" / "inspection_duplicates.png").exists()
    assert all("too few to compare" in line for line in said(record, "warning").splitlines())
    assert "no patient is in more than one split" in said(record, "ok")
    with pytest.raises(UserError, match="no readable image, though"):
        inspect_shards(tmp_path / "shards", planted[0] / "test", workers=1)


def test_names_that_say_no_patient_are_said_to_be_so(tmp_path: Path) -> None:
    """Also where several folders have files of the same names, which are no patients in several splits."""
    rng = np.random.default_rng(1)
    for folder in ("train/A", "train/B", "test/A", "test/B"):
        for number in range(3):
            save(tmp_path / "source", f"{folder}/{number:04d}.png", radiograph(rng))
    write_shards(tmp_path / "source", tmp_path / "shards", Preprocessing(32), workers=1)
    _, record = inspect_shards(tmp_path / "shards", workers=1)
    assert "no file name says who the patient is" in said(record, "note")
    assert record["patients_across_splits"] == {}


def test_images_too_smooth_to_be_told_apart_are_said_to_be_so(tmp_path: Path) -> None:
    draw_source(tmp_path / "source", {"train": (12, 12)})  # one formula
    write_shards(tmp_path / "source", tmp_path / "shards", Preprocessing(32), workers=1)
    _, record = inspect_shards(tmp_path / "shards", workers=1)
    assert len(record["duplicates"]) > 3
    assert "more likely too smooth or too small" in said(record, "note")
    assert "--source FOLDER looks at them" in said(record, "note")


def test_candidates_are_those_of_the_whole_correlation_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr_vae.inspection.duplicates.BLOCK", 7)
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    copies = points / points.norm(dim=1, keepdim=True)
    matrix = np.triu((copies @ copies.T).numpy(), 1)
    expected = np.argwhere(matrix >= 0.75)
    pairs, least = candidate_pairs(copies, limit=1000)
    assert least == 0.75
    assert {tuple(pair) for pair in pairs.tolist()} == {tuple(pair) for pair in expected.tolist()}
    some, least = candidate_pairs(copies, limit=20)
    strongest = sorted(matrix[matrix >= 0.75])[-20:]
    assert sorted(matrix[first, second] for first, second in some) == pytest.approx(strongest)
    assert least == pytest.approx(strongest[0])


def test_alignment_agrees_with_numpy(originals: list[npt.NDArray[np.uint8]]) -> None:
    first, second = originals[0][8:120, 8:120], originals[0][10:122, 7:119]
    other = originals[1][8:120, 8:120]
    images = torch.from_numpy(np.stack([first, second, other]))[:, None]
    assert float(aligned_correlation(images[:1], images[1:2])) == pytest.approx(1, abs=0.02)

    def fine(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        padded = np.pad(image.astype(float), 4, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9))
        return image - windows.mean((2, 3))

    a, b = fine(first), fine(other)
    best = max(
        np.corrcoef(a[4:-4, 4:-4].ravel(), b[4 + y : 108 + y, 4 + x : 108 + x].ravel())[0, 1]
        for y in range(-4, 5)
        for x in range(-4, 5)
    )
    assert float(aligned_correlation(images[:1], images[2:])) == pytest.approx(best, abs=1e-4)
    assert best < 0.5


def test_blank_images_are_no_copies_of_one_another() -> None:
    images = torch.arange(0, 250, 50, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 64, 64).contiguous()
    pairs, _ = near_pairs(small_copies(images), np.arange(5), lambda rows: images[list(rows)])
    assert pairs == []
    assert equal_groups(np.array([[1, 2], [3, 4], [1, 2], [1, 2]], np.uint8)) == [[0, 2, 3]]


def test_letterbox_bars_are_not_called_borders(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [(int(width), int(height)) for width, height in rng.integers(20, 200, (40, 2))]
    for number, (width, height) in enumerate(sizes):
        pixels = rng.integers(60, 255, (height, width), dtype=np.uint8)
        save(tmp_path / "source", f"train/NORMAL/{number}.png", pixels)
    directory = write_shards(tmp_path / "source", tmp_path / "out", Preprocessing(64, "letterbox"), workers=1)
    images = survey(directory)
    assert images.borders.max() == 0
    stored = constant_borders(images.images(range(40))).numpy()
    assert (stored == letterbox_bars(images.width, images.height, 64)).all()
    assert stored.max() > 10


def test_a_telling_number_has_the_auc_of_mann_and_whitney(planted: tuple[Path, Path]) -> None:
    images = survey(ShardDirectory.open(planted[1]))
    values = np.random.default_rng(2).integers(0, 9, len(images)) + 2 * (images.label == 1)
    label, auc = most_telling(images, values)
    mine = images.label == images.classes.index(label)
    differences = values[mine][:, None] - values[~mine]
    assert auc == pytest.approx(((differences > 0) + 0.5 * (differences == 0)).mean())


def test_what_is_no_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is missing.*cxr-vae shard"):
        inspect_shards(tmp_path)

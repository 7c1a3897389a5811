import csv
import hashlib
import json
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

from cxr_vae.audit import audit
from cxr_vae.cli import build_parser
from cxr_vae.config import Config, DataConfig
from cxr_vae.config_file import load_config, override_config
from cxr_vae.data.dataset import open_split
from cxr_vae.data.index import ShardDirectory
from cxr_vae.data.make_split import divide, parse_fractions
from cxr_vae.data.shards import write_shards
from cxr_vae.data.sources import Layout, SourceImage, scan
from cxr_vae.data.split_file import read_split_file, write_split_file
from cxr_vae.data.tars import Preprocessing
from cxr_vae.errors import UserError
from cxr_vae.evaluation import evaluate
from launch.stages import Shape, shard_stage
from tests.helpers import check_sentence, cxr_vae, draw_source

FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}
HEADER = "path,split,label,patient\n"


def kaggle_like(seed: int = 0, num_patients: int = 900) -> Layout:
    """Names as Kaggle's, with one to thirty images a patient; no files."""
    rng = random.Random(seed)
    images = []
    for number in range(num_patients):
        split = "train" if number % 10 else "test"
        for image in range(rng.choice([1] * 20 + [2] * 8 + [3, 5, 9, 30])):
            if number % 4 == 0:
                images.append(SourceImage(f"{split}/NORMAL/IM-{number:04d}-{image:04d}.jpeg", split, "NORMAL", 1))
            else:
                pathogen = "virus" if number % 3 else "bacteria"
                name = f"{split}/PNEUMONIA/person{number // 2}_{pathogen}_{image}.jpeg"
                images.append(SourceImage(name, split, "PNEUMONIA", 1))
    images = list({image.path: image for image in images}.values())
    return Layout(Path("source"), ("test", "train"), ("NORMAL", "PNEUMONIA"), tuple(images), ())


def places(images: tuple[SourceImage, ...]) -> dict[str, str]:
    return {image.path: image.split for image in images}


def splits_by_patient(images: tuple[SourceImage, ...]) -> dict[str, set[str]]:
    found = defaultdict(set)
    for image in images:
        found[image.patient].add(image.split)
    return found


def test_no_patient_is_in_two_splits_and_each_class_is_shared_out_as_asked() -> None:
    layout = kaggle_like()
    division = divide(layout, FRACTIONS, 0)
    assert {image.path for image in division.images} == {image.path for image in layout.images}
    assert all(len(splits) == 1 for splits in splits_by_patient(division.images).values())
    counts = Counter((image.label, image.split) for image in division.images)
    for label in layout.classes:
        total = sum(count for (name, _), count in counts.items() if name == label)
        for split, share in FRACTIONS.items():
            assert abs(counts[label, split] - share * total) <= 1, (label, split)


def test_every_split_gets_patients_with_many_images_and_with_one() -> None:
    division = divide(kaggle_like(), {"train": 0.5, "val": 0.25, "test": 0.25}, 0)
    sizes = Counter(image.patient for image in division.images)
    for split in ("train", "val", "test"):
        mine = [sizes[image.patient] for image in division.images if image.split == split]
        assert max(mine) >= 30, split
        assert min(mine) == 1, split


def test_the_order_of_files_plays_no_part_and_the_seed_does() -> None:
    layout = kaggle_like()
    shuffled = list(layout.images)
    random.Random(7).shuffle(shuffled)
    once = places(divide(layout, FRACTIONS, 3).images)
    again = places(divide(Layout(layout.root, layout.splits, layout.classes, tuple(shuffled), ()), FRACTIONS, 3).images)
    assert once == again
    other = places(divide(layout, FRACTIONS, 4).images)
    assert sum(once[path] != other[path] for path in once) > len(once) / 10


def test_keep_test_leaves_it_as_it_is_and_its_patients_out_of_the_rest() -> None:
    layout = kaggle_like()
    twin = SourceImage("train/NORMAL/IM-0000-9999.jpeg", "train", "NORMAL", 1)  # IM-0000 is in test
    layout = Layout(layout.root, layout.splits, layout.classes, (*layout.images, twin), ())
    division = divide(layout, FRACTIONS, 0, keep_test=True)
    before = {image.path for image in layout.images if image.split == "test"}
    assert {image.path for image in division.images if image.split == "test"} == before
    assert all(len(splits) == 1 for splits in splits_by_patient(division.images).values())
    left_out = {image.path for image in layout.images} - places(division.images).keys()
    tested = {image.patient for image in layout.images if image.split == "test"}
    assert left_out == {image.path for image in layout.images if image.split != "test" and image.patient in tested}
    assert twin.path in left_out
    assert division.left_out == {"whose patient is in the test split": len(left_out)}
    counts = Counter(image.split for image in division.images)
    assert counts["val"] == pytest.approx((counts["train"] + counts["val"]) / 9, abs=2)


def test_equal_names_in_several_folders_are_several_people() -> None:
    """As in data sets that number each class from 1; taken for one person, most of them would be left out."""
    paths = [f"{split}/{label}/{n:04d}.png" for split in ("test", "train") for label in "AB" for n in range(20)]
    images = tuple(SourceImage(path, *path.split("/")[:2], 1) for path in paths)
    layout = Layout(Path("none"), ("test", "train"), ("A", "B"), images, ())
    division = divide(layout, FRACTIONS, 0, keep_test=True)
    assert len(division.images) == 80
    assert division.left_out == {}
    assert len({image.patient for image in division.images}) == 80


def test_of_equal_files_one_is_kept_and_none_of_two_classes(tmp_path: Path) -> None:
    draw_source(tmp_path, {"train": (20, 20), "test": (20, 20)})
    folder = tmp_path / "train" / "NORMAL"
    first = min(folder.iterdir())
    shutil.copy(first, folder / "IM-9000-0001.jpeg")
    shutil.copy(max(folder.glob("IM-0*")), tmp_path / "train" / "PNEUMONIA" / "person9001_virus_1.jpeg")
    shutil.copy(min((tmp_path / "test" / "NORMAL").iterdir()), folder / "IM-9002-0001.jpeg")
    layout = scan(tmp_path)
    kept = places(divide(layout, FRACTIONS, 0, drop_duplicates=True).images)
    dropped = {image.path for image in layout.images} - kept.keys()
    assert dropped == {
        "train/NORMAL/IM-9000-0001.jpeg",
        "train/NORMAL/IM-9002-0001.jpeg",
        f"train/NORMAL/{max(folder.glob('IM-0*')).name}",
        "train/PNEUMONIA/person9001_virus_1.jpeg",
    }
    assert len(kept) == 80 - 1


def test_a_class_that_lies_in_one_split_alone_is_divided_among_all(tmp_path: Path) -> None:
    """As a class is that a user adds to Kaggle's folder; sharded as it lies it would be missing in the test split."""
    source = tmp_path / "source"
    draw_source(source, {"train": (20, 20, 20), "test": (20, 20)})
    with pytest.raises(UserError, match=r"test/COVID is missing.*cxr-vae split"):
        write_shards(source, tmp_path / "none", Preprocessing(32))
    file = tmp_path / "split.csv"
    assert cxr_vae("split", source, "--out", file, "--fractions", "train=0.8,test=0.2").returncode == 0
    shards = write_shards(source, tmp_path / "shards", Preprocessing(32), split_file=file, workers=1)
    for name in ("train", "test"):
        index = shards.split(name)
        assert set(index.labels.tolist()) == {0, 1, 2}, name
        assert index.classes == ["COVID", "NORMAL", "PNEUMONIA"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train=0.8,val=0.1", "add up to 0.9, not 1"),
        ("train=0.8,val", "'val' is no share"),
        ("train=0.5,train=0.5", "each split once"),
        ("train=1.5,val=-0.5", "each split once"),
        ("train=nan,val=0.5", "share above 0"),
        ("../x=0.5,val=0.5", "should be a word"),
    ],
)
def test_impossible_fractions_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        parse_fractions(text)
    assert expected in str(error.value)


def test_a_split_that_would_lack_a_class_is_refused(tmp_path: Path) -> None:
    draw_source(tmp_path, {"train": (2, 30)})
    with pytest.raises(UserError, match="too few patients of the class NORMAL"):
        divide(scan(tmp_path), FRACTIONS, 0)


def test_split_then_shard_then_train_reads_them(source: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "split.csv", tmp_path / "shards"
    arguments = ["split", source, "--out", file, "--fractions", "train=0.6,val=0.2,test=0.2"]
    made = cxr_vae(*arguments)
    assert made.returncode == 0, made.stderr
    content = file.read_bytes()
    assert cxr_vae(*arguments).returncode == 0  # the same again
    check_sentence(cxr_vae(*arguments, "--seed", 1), str(file), "says something else")
    assert file.read_bytes() == content

    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert {row["path"] for row in rows} == {str(path.relative_to(source)) for path in source.rglob("*.jpeg")}
    dropped = next(row for row in rows if row["split"] == "train")
    lines = [line for line in content.decode().splitlines(keepends=True) if not line.startswith(dropped["path"] + ",")]
    file.write_text("".join(lines))

    sharded = cxr_vae("shard", source, out, "--image-size", 32, "--split-file", file)
    assert sharded.returncode == 0, sharded.stderr
    assert f"1 images left out: {file} doesn't list them" in sharded.stdout
    assert f"{dropped['path']},ignored,not in the split file" in (out / "rejected.csv").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["split_file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["num_not_in_split_file"] == 1
    for split in ("train", "val", "test"):
        index = ShardDirectory.open(out).split(split)
        mine = {row["path"]: row["patient"] for row in rows if row["split"] == split and row is not dropped}
        assert dict(zip(index.texts("source"), index.texts("patient"), strict=True)) == mine

    config = DataConfig(shards=str(out), image_size=32, split_file=str(file))
    assert len(open_split(config, "val"))
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"was made with another split file, not with data\.split_file"):
        open_split(config, "val")
    for other in (file, None):
        with pytest.raises(UserError, match="another source or with other options"):
            write_shards(source, out, Preprocessing(32), split_file=other)


def test_shards_of_no_split_file_are_refused_where_one_is_asked_for(source: Path, shards: Path, tmp_path: Path) -> None:
    write_split_file(tmp_path / "split.csv", divide(scan(source), FRACTIONS, 0).images)
    with pytest.raises(UserError, match="made with no split file"):
        open_split(DataConfig(shards=str(shards), image_size=32, split_file=str(tmp_path / "split.csv")), "train")


@pytest.mark.parametrize("stage", [evaluate, audit])
def test_a_split_file_that_was_moved_may_be_named_anew(shards: Path, tmp_path: Path, stage: ModuleType) -> None:
    """Or left out; what no later stage reads can't be given there."""
    options = [f"data.shards={shards}", "image_size=32", f"data.split_file={tmp_path / 'gone.csv'}"]
    config = load_config(None, options)
    held_out = (None,) if stage is audit else ()
    with pytest.raises(UserError, match=r"gone\.csv"):
        stage.open_splits(config, *held_out)
    found = override_config(config, ["data.split_file=null"], stage.MAY_OVERRIDE)
    assert all(len(index) for index in stage.open_splits(found, *held_out))
    with pytest.raises(UserError, match=r"data\.workers was settled by the training run"):
        override_config(config, ["data.workers=2"], stage.MAY_OVERRIDE)


def test_an_unfinished_sharding_begins_anew_with_another_split_file(source: Path, tmp_path: Path) -> None:
    layout, out = scan(source), tmp_path / "shards"
    for seed in (0, 1):
        write_split_file(tmp_path / f"{seed}.csv", divide(layout, FRACTIONS, seed).images)
    write_shards(source, out, Preprocessing(32), split_file=tmp_path / "0.csv", workers=1)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    image = next(path for path in sorted(broken.rglob("*.jpeg")))
    intact = image.read_bytes()
    image.write_bytes(bytes(len(intact)))
    with pytest.raises(UserError, match="can't be read"):
        write_shards(broken, out, Preprocessing(32), split_file=tmp_path / "1.csv", workers=1, max_rejected=0)
    image.write_bytes(intact)
    write_shards(broken, out, Preprocessing(32), split_file=tmp_path / "0.csv", workers=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_odd_names_survive_the_file(tmp_path: Path) -> None:
    names = ["a,b.png", 'say "x".png', "лёгкие.png", "latin-\udce9.png", "two\nlines.png"]
    images = [SourceImage(f"train/NORMAL/{name}", "train", "NORMAL", 0) for name in names]
    write_split_file(tmp_path / "split.csv", images)
    assert set(read_split_file(tmp_path / "split.csv").images) == {image.path for image in images}


ROWS = "train/NORMAL/IM-0001-0001.jpeg,train,NORMAL,IM-0001\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no column path"),
        (b"path,label,patient\n", "no column split"),
        (HEADER.encode(), "lists no images"),
        (HEADER.encode() + b"a.jpeg,train\n", "line 2: label is missing"),
        (HEADER.encode() + ROWS.encode() * 2, "line 3: train/NORMAL/IM-0001-0001.jpeg is listed twice"),
        (HEADER.encode() + ROWS.replace(",train,", ",../up,").encode(), "line 2: the split '../up' should be a word"),
        (
            (HEADER + ROWS + ROWS.replace("-0001.", "-0002.").replace(",train,", ",val,")).encode(),
            "the patient IM-0001 is in train and val",
        ),
        (
            (HEADER + ROWS + "train/NORMAL/none.jpeg,train,NORMAL,none\n").encode(),
            "lists train/NORMAL/none.jpeg, which",
        ),
        ((HEADER + ROWS.replace(",NORMAL,", ",PNEUMONIA,")).encode(), "whose folder says NORMAL"),
        (
            (HEADER + ROWS + "train/PNEUMONIA/person15_bacteria_30.jpeg,val,PNEUMONIA,x\n").encode(),
            "the split train has no image of the class PNEUMONIA",
        ),
        (b"\x89PNG\r\n\x1a\n\0\0", "no column path"),
    ],
)
def test_wrong_files_are_told_in_one_sentence(source: Path, tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "split.csv"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        write_shards(source, tmp_path / "out", Preprocessing(32), split_file=file)
    assert expected in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_launcher_hands_the_file_on(source: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(source), shards=str(tmp_path / "shards"), split_file="my/split.csv")
    stage = shard_stage(Config(data=data), Shape(1, 1, 1))
    assert stage is not None
    assert build_parser().parse_args(stage.arguments).split_file == Path("my/split.csv")


def test_a_missing_file_is_refused(source: Path, tmp_path: Path) -> None:
    result = cxr_vae("shard", source, tmp_path / "out", "--split-file", tmp_path / "none.csv")
    check_sentence(result, "no such split file", "cxr-vae split")

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cxr_vae.audit.audit import audit
from cxr_vae.audit.record import keep_earlier_audit
from cxr_vae.audit.samples import choose_samples, in_words
from cxr_vae.config_file import override_config
from cxr_vae.data.dataset import XrayDataset
from cxr_vae.data.index import ShardDirectory
from cxr_vae.distributed import world
from cxr_vae.errors import UserError
from cxr_vae.files import write_json
from cxr_vae.run_dir import RunDir
from cxr_vae.sampling.generate import generate
from tests.audit_images import draw_images, shifted
from tests.helpers import check_sentence, cxr_vae


def write(folder: Path, images: Tensor, name: str) -> None:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{name}-{number:03d}.png")


@pytest.fixture(scope="module")
def planted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """30 PNGs, 12 of them shifted copies of training images; and the keys of these."""
    index = ShardDirectory.open(shards).split("train")
    rows = list(range(3, 63, 5))
    folder = tmp_path_factory.mktemp("planted") / "images"
    write(folder, draw_images(18, 20), "new")
    write(folder, shifted(XrayDataset(index, in_memory=False, workers=1).images(rows), 2, -1), "copy")
    return folder, {f"copy-{number:03d}.png": key for number, key in enumerate(index.texts("key", rows))}


@pytest.fixture(scope="module")
def audited(trained: Path, planted: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run whose record is that of the planted copies, by two processes."""
    run = tmp_path_factory.mktemp("audited") / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("evaluation", "checkpoints"))
    result = cxr_vae("audit", run, "features=random", "--images", planted[0], ranks=2)
    assert result.returncode == 0, result.stderr
    assert "Memorisation: in pixels" in result.stdout
    assert str(run / "evaluation" / "memorisation.json") in result.stdout
    return run


def record_of(run: Path, name: str = "memorisation.json") -> dict:
    return json.loads((run / "evaluation" / name).read_text())


def test_planted_copies_raise_the_flag_and_are_named(audited: Path, planted: tuple[Path, dict[str, str]]) -> None:
    record = record_of(audited)
    assert record["flag"] is True
    assert record["findings"][0]["level"] == "warning"
    pairs = [pair for pair in record["closest_pairs"] if pair["space"] == "pixels"][: len(planted[1])]
    assert {pair["sample"]: pair["key"] for pair in pairs} == planted[1]
    assert all(pair["is_suspect"] for pair in pairs)
    assert record["spaces"]["pixels"]["p_copies"] <= record["level_of_a_test"]
    for table in record["tables"]:
        assert all(len(row) == len(table["headers"]) for row in table["rows"])


def test_the_record_says_what_it_was_made_from(
    audited: Path, shards: Path, planted: tuple[Path, dict[str, str]]
) -> None:
    record = record_of(audited)
    splits = json.loads((shards / "manifest.json").read_text())["splits"]
    for part, split, num in (("training", "train", 70), ("held_out", "test", 18)):
        assert record[part]["split"] == split
        assert record[part]["index_sha256"] == splits[split]["index"]["sha256"]
        assert record[part]["num"] == num
    assert (record["num_samples"], record["num_reference"]) == (30, 70)
    assert record["features"]["network"] == "random"
    assert f"Audited: 30 PNGs in {planted[0]}." in [finding["text"] for finding in record["findings"]]
    assert len(record["features"]["weights_sha256"]) == len(record["samples"]["content_sha256"]) == 64
    picture = audited / "evaluation" / record["pictures"][0]["file"]
    assert min(Image.open(picture).size) > 500


def test_one_process_finds_the_same_as_two_and_keeps_their_record(
    audited: Path, planted: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    run = shutil.copytree(audited, tmp_path / "run")
    one = audit(RunDir(run), ["features=random"], images=planted[0])
    two = record_of(run, "memorisation.1.json")
    assert record_of(run) == one
    assert (run / "evaluation" / two["pictures"][0]["file"]).name == "closest_pairs.1.png"
    assert (run / "evaluation" / "closest_pairs.1.png").is_file()
    found = [{(pair["space"], pair["sample"]): pair for pair in record["closest_pairs"]} for record in (one, two)]
    for place, pair in found[0].items():
        if place in found[1]:  # the last of those listed may differ by rounding, and so may ratios of about 0
            assert pair["key"] == found[1][place]["key"]
            assert pair["ratio"] == pytest.approx(found[1][place]["ratio"], abs=0.01)
    for space, of_one in one["spaces"].items():
        assert of_one["share"]["share"] == pytest.approx(two["spaces"][space]["share"]["share"], abs=1e-6)


def test_each_earlier_audit_is_kept_with_its_picture(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        keep_earlier_audit(tmp_path)
        (tmp_path / "closest_pairs.png").write_text(str(number))
        write_json(tmp_path / "memorisation.json", {"number": number, "pictures": [{"file": "closest_pairs.png"}]})
    assert len(list(tmp_path.iterdir())) == 6
    for path in tmp_path.glob("*.json"):
        record = json.loads(path.read_text())
        assert path.stem == ("memorisation" if record["number"] == 3 else f"memorisation.{record['number']}")
        assert (tmp_path / record["pictures"][0]["file"]).read_text() == str(record["number"])


def test_real_images_of_other_patients_are_no_alarm(audited: Path, shards: Path, tmp_path: Path) -> None:
    dataset = XrayDataset(ShardDirectory.open(shards).split("test"), in_memory=False, workers=1)
    write(tmp_path / "real", dataset.images(range(18)), "real")
    record = audit(RunDir(audited), ["features=random"], images=tmp_path / "real", out=tmp_path / "found")
    assert record["flag"] is False
    assert not any(pair["is_suspect"] for pair in record["closest_pairs"])
    assert json.loads((tmp_path / "found" / "memorisation.json").read_text()) == record
    assert record_of(audited)["flag"] is True  # where it was


def test_the_images_of_the_evaluation_are_taken_or_drawn_again(trained: Path, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")))
    config = override_config(run.saved_config(), ["num_generated=70"], ("evaluate",))
    with world("cpu") as here:
        drawn = choose_samples(run, config, None, here)
        images = drawn.fetch(0, 70)
        generated = run.evaluation / "generated"
        generate(run, generated, 70)
        read = choose_samples(run, config, None, here)
        assert read.facts["folder"] == str(generated)
        assert in_words(read.facts) == in_words(drawn.facts) == "generated images (prior: standard normal)"
        assert torch.equal(read.fetch(0, 70), images)
        assert torch.equal(drawn.at(66), images[66, 0])
        (generated / "images.json").write_text('{"weights_sha256": "of others", "seed": 0}')
        assert "folder" not in choose_samples(run, config, None, here).facts


class TestMistakes:
    """One sentence, exit code 2."""

    def test_the_training_split_as_held_out(self, trained: Path) -> None:
        result = cxr_vae("audit", trained, "features=random", "--held-out", "train")
        check_sentence(result, "what the model was trained on", "--held-out")

    def test_a_folder_without_images(self, trained: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no PNGs"):
            audit(RunDir(trained), ["features=random"], images=tmp_path)

    @pytest.mark.parametrize(
        ("size", "num", "parts"),
        [(31, 20, ("real-000.png has 31 x 31 pixels", "32 x 32")), (32, 3, ("3 images are too few", "16 or more"))],
    )
    def test_images_that_will_not_do(
        self, trained: Path, tmp_path: Path, size: int, num: int, parts: tuple[str, ...]
    ) -> None:
        write(tmp_path / "images", draw_images(num, 1, size=size), "real")
        with pytest.raises(UserError) as error:
            audit(RunDir(trained), ["features=random"], images=tmp_path / "images", out=tmp_path / "out")
        assert all(part in str(error.value) for part in parts)

    def test_an_unfinished_run(self, trained: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
        (copy / "vae_final.safetensors").unlink()
        with pytest.raises(UserError, match=r"vae_final.safetensors is missing"):
            audit(RunDir(copy), ["features=random"])

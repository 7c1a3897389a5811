from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers import check_sentence, cxr_vae


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_a_sample_depends_on_seed_and_number_alone(trained: Path, tmp_path: Path) -> None:
    few, many, two, other = (tmp_path / name for name in ("few", "many", "two", "other"))
    assert cxr_vae("generate", trained, "--num", 5, "--out", few).returncode == 0
    assert cxr_vae("generate", trained, "--num", 150, "--out", many).returncode == 0
    assert cxr_vae("--", "generate", trained, "--num", 150, "--out", two, ranks=2).returncode == 0
    assert cxr_vae("generate", trained, "--num", 5, "--out", other, "--seed", 1).returncode == 0
    assert [path.name for path in sorted(few.glob("*.png"))] == [f"{number:06d}.png" for number in range(5)]
    assert len(images(many)) == 150
    assert images(many)[:5] == images(few)
    assert images(two) == images(many)
    assert not set(images(other)) & set(images(few))
    with Image.open(few / "000000.png") as image:
        assert (image.size, image.mode) == ((32, 32), "L")
        assert np.asarray(image).std() > 0


def test_more_can_be_added_later_but_not_of_another_seed(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cxr_vae("generate", trained, "--num", 3, "--out", out)
    assert cxr_vae("generate", trained, "--num", 6, "--out", out).returncode == 0
    before = images(out)
    assert len(before) == 6
    result = cxr_vae("generate", trained, "--num", 6, "--out", out, "--seed", 5)
    check_sentence(result, "holds images of other weights or another seed")
    assert images(out) == before


def test_folders_that_are_not_ours_are_left_alone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.png").write_bytes(b"mine")
    check_sentence(cxr_vae("generate", trained, "--out", tmp_path), "holds something else (000000.png)")
    assert (tmp_path / "000000.png").read_bytes() == b"mine"


def test_runs_without_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    check_sentence(cxr_vae("generate", tmp_path, "--out", tmp_path / "x"), "vae_final.safetensors is missing")
    (tmp_path / "vae_final.safetensors").write_bytes((trained / "vae_final.safetensors").read_bytes()[:500])
    check_sentence(cxr_vae("generate", tmp_path, "--out", tmp_path / "x"), "not a file of trained weights, or damaged")

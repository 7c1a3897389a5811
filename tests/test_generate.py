import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_vae.errors import UserError
from cxr_vae.noise import normal
from cxr_vae.pictures import to_uint8
from cxr_vae.sampling.generate import claim, path_of
from cxr_vae.weights import load_vae, save_vae
from tests.helpers import check_sentence, cxr_vae


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_a_sample_depends_on_seed_and_number_alone(trained: Path, tmp_path: Path) -> None:
    few, many, two, other = (tmp_path / name for name in ("few", "many", "two", "other"))
    assert cxr_vae("generate", trained, "--num", 5, "--out", few).returncode == 0
    assert cxr_vae("generate", trained, "--num", 150, "--out", many).returncode == 0
    assert cxr_vae("generate", trained, "--num", 150, "--out", two, ranks=2).returncode == 0
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


def test_it_goes_on_after_the_millionth_image(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"seed": 0}, replace=False)
    for number in (0, 999_999, 1_000_000):
        path_of(tmp_path / "out", number).write_bytes(b"")
    (tmp_path / "out" / ".1000001.png.tmp").write_bytes(b"")
    claim(tmp_path / "out", {"seed": 0}, replace=False)
    (tmp_path / "out" / "00000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds something else \(00000\.png\)"):
        claim(tmp_path / "out", {"seed": 0}, replace=False)


def test_folders_that_are_not_ours_are_left_alone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.png").write_bytes(b"mine")
    check_sentence(cxr_vae("generate", trained, "--out", tmp_path), "holds something else (000000.png)")
    assert (tmp_path / "000000.png").read_bytes() == b"mine"


def test_runs_without_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    check_sentence(cxr_vae("generate", tmp_path, "--out", tmp_path / "x"), "vae_final.safetensors is missing")
    (tmp_path / "vae_final.safetensors").write_bytes((trained / "vae_final.safetensors").read_bytes()[:500])
    check_sentence(cxr_vae("generate", tmp_path, "--out", tmp_path / "x"), "not a file of trained weights, or damaged")


def test_weights_that_give_no_numbers_are_refused(trained: Path, tmp_path: Path) -> None:
    model, config = load_vae(trained / "vae_final.safetensors")
    with torch.no_grad():
        next(model.parameters()).fill_(0)
        list(model.parameters())[-1].fill_(float("nan"))
    save_vae(tmp_path / "vae_final.safetensors", model, config, step=1)
    shutil.copy(trained / "config.yaml", tmp_path)
    result = cxr_vae("generate", tmp_path, "--out", tmp_path / "x")
    check_sentence(result, "values that are no finite numbers")


def test_temperature_is_the_spread_of_the_latents(trained: Path, tmp_path: Path) -> None:
    model, config = load_vae(trained / "vae_final.safetensors")
    assert cxr_vae("generate", trained, "--num", 3, "--out", tmp_path / "x", "--temperature", 0.5).returncode == 0
    latents = 0.5 * normal(config.seed, "generate", 0, 64, model.latent_shape)
    with torch.inference_mode():
        expected = to_uint8(model.decode(latents).sigmoid())[:3]
    found = [np.asarray(Image.open(tmp_path / "x" / f"{number:06d}.png")) for number in range(3)]
    assert np.abs(np.stack(found).astype(int) - expected[:, 0].numpy()).max() <= 1
    check_sentence(
        cxr_vae("generate", trained, "--num", 3, "--out", tmp_path / "x"), "of other weights or another seed"
    )

from pathlib import Path

import pytest
import yaml

from cxr_vae.config import OPTIONS, Config
from cxr_vae.config_file import describe_config, differences, dump_config, load_config, override_config
from cxr_vae.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_loads_and_says_what_it_needs(path: Path) -> None:
    load_config(path)
    head = path.read_text().partition("\n\n")[0]
    for word in ("Needs", "Run", "Takes", "Expect"):
        assert f"# {word}" in path.read_text(), f"{path} lacks {word} in its head:\n{head}"


def test_reference_holds_the_reference_systems_defaults() -> None:
    config = load_config(CONFIGS / "reference.yaml")
    assert config.model.name == "conv"
    assert config.model.latent_dim == 128
    assert config.model.channels == [32, 64, 128, 256, 512]
    assert config.train.batch_size == 32
    assert config.train.epochs == 50
    assert config.optimizer.name == "adam"
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.weight_decay == 0
    assert config.objective.kl_weight == 1.0
    assert config.data.image_size == 224
    assert config.evaluate.num_generated == config.evaluate.num_real == 1000


def test_saved_configuration_loads_back(tmp_path: Path) -> None:
    overrides = ["run_dir=off", "data.source=1e3 x", "lr=3e-5", "channels=[1, 2, 3]", "memory_gb=7", "data.shards='12'"]
    config = load_config(CONFIGS / "demo.yaml", overrides)
    path = tmp_path / "saved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert config.run_dir == "off"  # YAML 1.1 would make it False


def test_command_line_wins_over_file_wins_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  epochs: 3\noptimizer:\n  lr: 1e-4\n")
    config = load_config(path, ["train.epochs=4"])
    assert (config.train.epochs, config.optimizer.lr, config.train.batch_size) == (4, 1e-4, 32)


def test_numbers_are_decimal_as_in_yaml_1_2() -> None:
    config = load_config(None, ["epochs=010", "seed=08", "latent_dim=+7"])
    assert (config.train.epochs, config.seed, config.model.latent_dim) == (10, 8, 7)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epoch=3", "did you mean train.epochs?"),
        ("latent_dmi=3", "did you mean model.latent_dim?"),
        ("data.epochs=3", "did you mean train.epochs?"),
        ("train=3", "train is a section"),
        ("name=conv", "ambiguous: write model.name or optimizer.name"),
        ("zzz=1", "cxr-vae config"),
        ("train.epochs", "write key=value"),
        ("train.epochs=two", "'two' should be a valid integer"),
        ("train.epochs=2.5", "should be a valid integer"),
        ("seed=true", "should be a valid integer"),
        ("train.batch_size=-1", "should be greater than or equal to 1"),
        ("optimizer.lr=0", "should be greater than 0"),
        ("optimizer.lr=.nan", "should be a finite number"),
        ("data.fit=squash", "should be 'stretch', 'letterbox' or 'crop'"),
        ("data.image_size=100", "divisible by 32"),
        ("model.name=[conv, residual]", "model.name=['conv', 'residual'] should be 'conv' or 'residual'"),
        ("model.channels=[]", "at least 1 item"),
        ("model.channels=[8, 0]", "model.channels[1]=0 should be greater than 0"),
        ("model.num_blocks=2", "model.num_blocks=2 is no option of model.name=conv, which has model.channels"),
        ("model.name=residual", "model.latent_dim=128 is no option of model.name=residual"),
        ("train.accumulate=64", "at least train.accumulate=64"),
        ("train.epochs={", "not valid YAML"),
    ],
)
def test_wrong_options_are_refused_in_words(override: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(CONFIGS / "reference.yaml", [override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["latent_dim=3"], "model.latent_dim=3 is no option of model.name=residual, which has model.channels"),
        (["norm=batch"], "model.norm=batch should be group"),
        (["channels=[8]"], "two widths or more"),
        (["num_blocks=0"], "should be greater than or equal to 1"),
        (["image_size=220"], "divisible by 8"),
        (["kl_warmup_steps=5", "kl_cycle_steps=10"], "kl_warmup_steps=5 should be 0"),
        (["image_size=8", "ms_ssim_weight=1"], "data.image_size=8 should be 11 or more with objective.ms_ssim_weight"),
        (["image_size=16", "adversarial_weight=1"], "should be 24 or more with objective.adversarial_weight"),
    ],
)
def test_options_that_the_network_or_image_size_has_no_use_for_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, ["model.name=residual", *overrides])
    assert expected in str(error.value)


def test_each_architecture_has_its_own_defaults(tmp_path: Path) -> None:
    conv, residual = load_config(None).model, load_config(None, ["model.name=residual"]).model
    assert (conv.latent_dim, conv.latent_channels, conv.num_blocks, conv.norm) == (128, None, None, "batch")
    assert (residual.latent_dim, residual.latent_channels, residual.num_blocks, residual.norm) == (None, 4, 1, "group")
    assert residual.channels == [24, 48, 96, 192]
    assert (conv.num_halvings, residual.num_halvings) == (5, 3)
    path = tmp_path / "saved.yaml"
    path.write_text(dump_config(load_config(None, ["model.name=residual"])))
    assert load_config(path).model == residual


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  epochz: 3\n", "unknown option train.epochz: did you mean train.epochs?"),
        ("epochs: 3\n", "unknown option epochs: did you mean train.epochs?"),
        ("trian:\n  epochs: 3\n", "unknown option trian.epochs: did you mean train.epochs?"),
        ("trian: {}\n", "unknown option trian"),
        ("train: 3\n", "train should hold keys such as train.epochs"),
        ("train:\n  epochs: 3\n  epochs: 4\n", "epochs is given twice"),
        ("train: [\n", "not a valid YAML file"),
        ("- a\n", "expected keys"),
        ("train:\n  epochs: -3\n", "train.epochs=-3 should be greater than or equal to 1"),
    ],
)
def test_wrong_files_are_refused_in_words(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a valid YAML file"):
        load_config(tmp_path / "b.yaml")


def test_fp16_is_refused_on_the_cpu() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        load_config(None, ["device=cpu", "precision=fp16"])


def test_differences_name_what_a_resumed_run_may_not_change() -> None:
    old = load_config(None)
    harmless = ["epochs=60", "checkpoint.every_steps=5", "run_dir=x", "num_generated=5", "hours=1", "loading=shards"]
    assert differences(old, load_config(None, harmless)) == []
    assert differences(old, load_config(None, ["latent_dim=5"])) == ["model.latent_dim: 128 → 5"]
    cosine = load_config(None, ["schedule=cosine"])
    assert "cosine" in differences(cosine, load_config(None, ["schedule=cosine", "epochs=60"]))[0]


def test_later_stages_may_set_only_their_own_options() -> None:
    config = load_config(None)
    assert override_config(config, ["features=random"], ("evaluate",)).evaluate.features == "random"
    with pytest.raises(UserError, match=r"model\.latent_dim was settled by the training run"):
        override_config(config, ["latent_dim=5"], ("evaluate",))


def test_description_shows_every_option_and_is_itself_a_configuration() -> None:
    text = describe_config(Config())
    assert all(f"{key.rpartition('.')[2]}:" in text for key in OPTIONS)
    assert yaml.safe_load(text).keys() == Config().model_dump().keys()
    assert all(field.description for field in OPTIONS.values())

from pathlib import Path
from typing import Any

import pytest

from cxr_vae.config_file import dump_config, load_config
from cxr_vae.errors import UserError
from cxr_vae.files import write_json
from cxr_vae.report.command import report_runs
from tests.helpers import cxr_vae
from tests.page_helpers import read_page, section, tables, text_of
from tests.report_runs import AUDIT, RESULTS, changed, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    make_run(folder / "a", RESULTS, losses=(700, 500))
    make_run(folder / "b", changed(figures={"fid": RESULTS["figures"]["fid"] | {"value": 80}}), losses=(700, 400))
    make_run(folder / "c", changed(features={"weights_sha256": "e" * 64}))
    make_run(folder / "d", changed(num_generated=50))
    larger = make_run(folder / "e")
    config = load_config(larger.config, ["image_size=64"])
    larger.config.write_text(dump_config(config))
    return folder


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Any:
    result = cxr_vae("report", folder)
    assert result.returncode == 0, result.stderr
    assert "5 runs, negative ELBO in nats an image" in result.stdout
    assert result.stdout.rstrip().endswith(str(folder / "report.html"))
    return read_page(folder / "report.html")


class TestComparison:
    """Several runs."""

    def test_figures_of_different_measures_stand_in_different_tables(self, comparison: Any) -> None:
        found = dict(tables(section(comparison, "figures")))
        headers = {title: rows[0] for title, rows in found.items()}
        assert headers == {
            "Samples, group 1 of 3": ["figure", "floor", "b", "a"],
            "Samples, group 2 of 3": ["figure", "floor", "c"],
            "Samples, group 3 of 3": ["figure", "floor", "d"],
            "Reconstructions of real images, group 1 of 2": ["figure", "b", "a", "d"],  # generated ones don't matter
            "Reconstructions of real images, group 2 of 2": ["figure", "c"],
            "Likelihood": ["figure", "b", "a", "c", "d"],  # features don't matter
        }
        assert found["Samples, group 1 of 3"][1] == [
            *("FID|lower is better", "12.3|11.2 … 13.5", "80.0|78.1 … 84.4", "81.2|78.1 … 84.4")
        ]
        why = [text_of(one) for one in section(comparison, "figures").iter("p") if "Not to be compared" in text_of(one)]
        assert "its weights, SHA-256 eeeeeeeeeeee…, not cccccccccccc…" in why[0]
        assert "generated images 50, not 100" in why[1]
        bold = [text_of(one) for one in section(comparison, "figures").iter("strong")]
        assert bold[0] == "80.0"

    def test_losses_of_another_image_size_stand_apart(self, comparison: Any) -> None:
        found = dict(tables(section(comparison, "runs")))
        assert [row[0] for row in found["Runs, group 1 of 2"][1:]] == ["b", "a", "c", "d"]
        assert [row[0] for row in found["Runs, group 2 of 2"][1:]] == ["e"]
        assert "image size 64, not 32" in text_of(section(comparison, "runs"))

    def test_what_was_set_differently_and_who_lacks_figures(self, comparison: Any) -> None:
        ((_, rows),) = tables(section(comparison, "configuration"))
        assert rows == [["option", "b", "a", "c", "d", "e"], ["data.image_size", *["32"] * 4, "64"]]
        assert "e: No figures" in text_of(section(comparison, "figures"))

    def test_pictures_and_curves_of_each(self, comparison: Any) -> None:
        assert len(list(section(comparison, "samples").iter("img"))) == 5
        assert len(list(section(comparison, "training").iter("img"))) == 3
        assert len(list(section(comparison, "training-2").iter("img"))) == 3

    def test_runs_may_be_named_one_by_one(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "compared.html"
        text, page = report_runs([folder / "d", folder / "a", folder / "d"], out)
        assert page == out
        assert "2 runs" in text
        assert dict(tables(section(read_page(out), "runs")))["Runs"][1][0] == "d"

    def test_equal_names_are_told_apart(self, tmp_path: Path) -> None:
        for name in ("x/run", "y/run"):
            make_run(tmp_path / name, losses=())
        report_runs([tmp_path / "x/run", tmp_path / "y/run"], tmp_path / "r.html")
        assert text_of(read_page(tmp_path / "r.html").find(".//h1")) == "2 runs side by side"
        assert dict(tables(section(read_page(tmp_path / "r.html"), "runs")))["Runs"][2][0] == "y/run"

    def test_mistakes(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is no run directory and holds none"):
            report_runs([tmp_path])
        with pytest.raises(UserError, match=r"is a folder: name a file in it, such as .*report\.html"):
            report_runs([folder / "a"], tmp_path)
        broken = make_run(tmp_path / "broken")
        broken.config.write_text("{")
        with pytest.raises(UserError, match=r"config\.yaml, line 1: not a valid YAML file"):
            report_runs([broken.path, folder / "a"], tmp_path / "r.html")

    def test_the_training_of_a_prior_is_no_run(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run")
        inside = make_run(run.path / "priors" / "flow-12345678", losses=())
        copied = make_run(tmp_path / "copied", losses=())
        copied.metrics.write_text(
            '{"kind": "epoch", "step": 1, "epoch": 1, "train": {"loss": 2}, "test": {"loss": 3}}\n'
        )
        for path in (inside.path, inside.path.parent, copied.path):
            with pytest.raises(UserError, match=r"is the training of a prior, which has no report: name the run"):
                report_runs([path])
        assert report_runs([make_run(tmp_path / "priors" / "run").path])[1].is_file()  # a folder's name says nothing


def test_audits_stand_beside_what_they_are_of(tmp_path: Path) -> None:
    drawn = {"folder": "evaluation/generated", "prior": "flow_matching", "temperature": 0.8, "guidance": 2.0}
    runs = [make_run(tmp_path / name, RESULTS, ()) for name in ("a", "b", "c")]
    for run, facts in zip(runs, (drawn, AUDIT["samples"]), strict=False):
        write_json(run.evaluation / "memorisation.json", AUDIT | {"samples": facts})
    report_runs([tmp_path])
    ((_, rows),) = tables(section(read_page(tmp_path / "report.html"), "memorisation"))
    of = ["generated images (prior: flow_matching (temperature 0.8, guidance 2.0))", "PNGs in other/pngs", "–"]
    assert [row[:3] for row in rows[1:]] == [
        [name, level, words]
        for name, level, words in zip("abc", ("warning", "warning", "not audited"), of, strict=True)
    ]


def test_priors_stand_beside_the_figures_of_their_samples(tmp_path: Path) -> None:
    """And do not keep two runs apart: they are there to be compared."""
    drawn: tuple[dict[str, Any], ...] = (
        {"prior": "standard normal"},
        {"prior": "flow_matching", "temperature": 1.0, "num_steps": 25, "guidance": 2.0},
    )
    runs = [make_run(tmp_path / f"run{n}", RESULTS | {"generated": facts}).path for n, facts in enumerate(drawn)]
    report_runs(runs, tmp_path / "comparison.html")
    page = read_page(tmp_path / "comparison.html")
    (rows,) = [rows for caption, rows in tables(page) if caption.startswith("Samples")]
    assert rows[1] == ["prior", "–", "standard normal", "flow_matching (temperature 1.0, num_steps 25, guidance 2.0)"]


def test_another_pixel_likelihood_stands_apart(tmp_path: Path) -> None:
    """Nats of grey values taken as probabilities, and of a density: the lower is no better. Also in older records."""
    for name, likelihood, losses in (("a", "bernoulli", (700,)), ("b", "gaussian", (-900,))):
        run = make_run(tmp_path / name, RESULTS, losses)
        run.config.write_text(dump_config(load_config(run.config, [f"likelihood={likelihood}"])))
    make_run(tmp_path / "c", RESULTS | {"pixel_likelihood": "discretized_logistic"}, ())
    text, out = report_runs([tmp_path])
    page = read_page(out)
    of_figures = dict(tables(section(page, "figures")))
    assert [of_figures[f"Likelihood, group {n} of 3"][0][1:] for n in (1, 2, 3)] == [["b"], ["a"], ["c"]]
    assert of_figures["Samples"][0][2:] == ["b", "a", "c"]
    of_losses = dict(tables(section(page, "runs")))
    assert [row[0] for row in of_losses["Runs, group 2 of 2"][1:]] == ["a", "c"]
    assert "pixel likelihood bernoulli, not gaussian" in text_of(section(page, "runs"))
    assert "pixel likelihood bernoulli, not gaussian" in text_of(section(page, "figures"))
    shown = text.partition("Runs, group 1 of 2")[2].partition("Runs, group 2 of 2")
    assert "-900.00" in shown[0]
    assert "700.00" in shown[2]
    assert "Not to be compared with group 1: pixel likelihood bernoulli, not gaussian." in shown[2]

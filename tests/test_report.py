import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_vae.config_file import dump_config, load_config
from cxr_vae.files import sha256_of, write_json
from cxr_vae.report.command import report_runs
from cxr_vae.run_dir import RunDir
from tests.page_helpers import read_page, section, tables, text_of
from tests.report_runs import RESULTS, ROOT, as_number, changed, full_run, make_run, reported_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return reported_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(run: RunDir) -> Any:
    return read_page(run.path / "report.html")


class TestContent:
    """Against the files it was made from."""

    def test_every_figure_with_interval_and_floor(self, page: Any) -> None:
        found = dict(tables(section(page, "figures")))
        groups = {
            "Samples": RESULTS["figures"],
            "Reconstructions of real images": RESULTS["reconstructions"]["figures"],
            "Likelihood": RESULTS["likelihood"],
        }
        assert set(found) == set(groups)
        for title, figures in groups.items():
            header, *rows = found[title]
            assert len(rows) == len(figures)
            for row, figure in zip(rows, figures.values(), strict=True):
                cells = dict(zip(header, row, strict=True))
                low, high = figure.get("interval_95", (figure["value"], figure["value"]))
                slack = (high - low) / 30 or abs(figure["value"]) / 1000
                assert as_number(cells["value"]) == pytest.approx(figure["value"], abs=slack)
                if "interval_95" in figure:
                    ends = [as_number(end) for end in cells["95 % interval"].split("…")]
                    assert ends == pytest.approx([low, high], abs=slack)
                if figure.get("floor") is not None:
                    assert as_number(cells["floor"]) == pytest.approx(figure["floor"], rel=0.01)
        assert [row[0] for row in found["Samples"][1:]] == [
            "FID|lower is better",
            "KID|lower is better",
            "Inception Score",
        ]
        assert found["Likelihood"][2] == ["my own figure", "12345", ""]

    def test_figures_carry_their_circumstances(self, page: Any) -> None:
        facts = text_of(section(page, "figures").find(".//details"))
        for part in ("inception", "c" * 64, "float32", "TensorFlow's", "100", "90", "test", "train", "a" * 64):
            assert part in facts

    def test_figures_of_fewer_images_than_those_beside_them_say_so(self, tmp_path: Path) -> None:
        most = {"generated": 10_000, "real": 90, "reconstructions": 90, "floor": 5216}
        few = RESULTS | {"num_generated": 12_000, "num_floor": 5216, "num_pairs": most}
        run, other = (make_run(tmp_path / name, few, ()) for name in "ab")
        floor = "The floor is of 5 216 images, all that the train split has, not of 12 000"
        pairs = "the interval of the kernel distance are of at most 10 000 images of each set."
        text, page = report_runs([run.path])
        for told in (text, text_of(section(read_page(page), "figures"))):
            assert floor in told
            assert pairs in told
        _, page = report_runs([run.path, other.path], tmp_path / "r.html")
        assert floor in text_of(section(read_page(page), "figures"))
        assert "The floor is of" not in report_runs([make_run(tmp_path / "c", RESULTS, ()).path])[0]

    def test_losses_speed_and_curves(self, page: Any) -> None:
        training = section(page, "training")
        ((_, rows),) = tables(training)
        assert [row[0] for row in rows[1:]] == [
            *("1, train|first", "1, test|first"),
            *("2, train|best test loss", "2, test|best test loss", "3, train|last", "3, test|last"),
        ]
        assert [row[1] for row in rows[1::2]] == ["700.00", "600.00", "650.00"]
        assert "30 images/s" in text_of(training)
        titles = [text_of(caption) for caption in training.iter("figcaption")]
        assert titles == ["Loss", "Reconstruction", "KL"]

    def test_the_best_epoch_is_that_of_the_best_checkpoint(self, tmp_path: Path) -> None:
        """By the negative ELBO: the loss of the first epochs is low since a warm-up leaves out most of the KL."""
        runs = [
            make_run(tmp_path / name, losses=(610, 600, 605), kl_warmup=warmup) for name, warmup in (("a", 3), ("b", 1))
        ]
        text, out = report_runs([runs[0].path])
        page = read_page(out)
        ((_, rows),) = tables(section(page, "training"))
        assert rows[0][1] == "negative ELBO"
        assert rows[4] == ["2, test|best test loss", "600.00", "580.00", "20.00", f"{600 / 710:.4f}"]
        assert "600.0 negative ELBO, nats an image, epoch 2 of 3" in text_of(page.find(".//dl"))
        assert re.search(r"2, test +600.00 +580.00 +20.00", text)
        text, out = report_runs([tmp_path])
        (of_losses,) = (rows for _, rows in tables(section(read_page(out), "runs")))
        assert [row[3:6] for row in of_losses[1:]] == [["600.00", "2", "605.00"]] * 2
        assert re.search(r"a +no +3 +600.00 +2 +605.00", text)

    def test_pictures_audit_latent_space_and_data(self, page: Any) -> None:
        images = section(page, "images")
        assert [text_of(one) for one in images.iter("figcaption")] == [
            "Samples, epoch 2",
            "Reconstructions below their originals, epoch 2",
            "Generated images of the evaluation",
            "Real images, test split",
        ]
        audit = section(page, "memorisation")
        assert dict(tables(audit))["Closest pairs"] == [["sample", "ratio", "known"], ["000017", "0.031", "yes"]]
        assert "5 samples are copies" in text_of(audit)
        assert "5 samples are copies" in text_of(page.find(".//aside"))  # a warning is seen first
        assert "flagged audit of PNGs in other/pngs" in text_of(page.find(".//dl"))
        latent = section(page, "latent")
        assert "2 of 4 latent units are active" in text_of(latent)
        assert [text_of(one) for one in latent.iter("figcaption")] == ["Latent traversals", "KL of each latent unit"]
        data = section(page, "data")
        assert dict(tables(data))["Images"][1:] == [["test", "5 216"], ["val", "–"]]
        assert "No patient is in two splits." in text_of(data)

    def test_configuration_environment_and_history(self, run: RunDir, page: Any) -> None:
        found = dict(tables(section(page, "configuration")))
        options = dict(found["Options that differ from the defaults"])
        assert options["model.channels"] == "[8, 16]"
        assert "seed" not in options
        assert dict(found["Environment"])["device"] == "cpu"
        assert dict(found["Versions"])["torch"] == torch.__version__.partition("+")[0]
        assert text_of(section(page, "configuration").find(".//pre")) == " ".join(run.config.read_text().split())
        history = dict(tables(section(page, "history")))
        assert [row[1] for row in history["Stretches of training"][1:]] == ["1 … 2", "3 … 3"]
        assert history["Evaluations"][1][2:4] == ["FID", "81.2|78.1 … 84.4"]

    @pytest.mark.parametrize(
        ("options", "differing"),
        [
            (("run_dir=x",), {"run_dir"}),
            (("train.compile=default", "latent_dim=5"), {"train.compile", "model.latent_dim"}),
            (("model.name=residual", "prior.name=flow_matching"), {"model.name", "prior.name"}),
            (("model.name=residual", "num_blocks=2"), {"model.name", "model.num_blocks"}),
        ],
    )
    def test_only_what_was_set_differs_from_the_defaults(
        self, tmp_path: Path, options: tuple[str, ...], differing: set[str]
    ) -> None:
        run = make_run(tmp_path / "run", losses=())
        run.config.write_text(dump_config(load_config(None, options)))
        report_runs([run.path])
        found = dict(tables(section(read_page(run.path / "report.html"), "configuration")))
        assert {row[0] for row in found["Options that differ from the defaults"][1:]} == differing

    def test_a_run_of_a_version_with_other_options_is_shown(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run")
        text = run.config.read_text().replace("model:", "model:\n  name_of_later: off").replace("name: conv", "name: u")
        run.config.write_text(text)
        told, page = report_runs([run.path])
        assert "Losses, nats an image" in told
        options = dict(dict(tables(section(read_page(page), "configuration")))["Options that differ from the defaults"])
        assert (options["model.name_of_later"], options["model.name"]) == ("off", "u")

    def test_what_is_missing_is_said_with_the_command_that_makes_it(self, tmp_path: Path) -> None:
        bare = make_run(tmp_path / "run", losses=())
        for path in (*bare.path.glob("*/*.png"), bare.path / "environment.json"):
            path.unlink()
        report_runs([bare.path])
        page = read_page(bare.path / "report.html")
        expected = {"figures": "evaluate", "memorisation": "audit", "data": "inspect", "latent": "evaluate"}
        for anchor, command in (expected | {"training": "train", "images": "train"}).items():
            assert f"cxr-vae {command} {tmp_path}" in text_of(section(page, anchor)), anchor
        assert "environment.json" in text_of(section(page, "configuration"))

    @pytest.mark.parametrize("content", ["{", "[]", '{"tables": [{"title": 3}]}', '{"findings": "x"}'])
    def test_a_broken_record_is_said_to_be_broken(self, tmp_path: Path, content: str) -> None:
        broken = make_run(tmp_path / "run", losses=())
        broken.evaluation.mkdir()
        (broken.evaluation / "memorisation.json").write_text(content)
        report_runs([broken.path])
        said = text_of(section(read_page(broken.path / "report.html"), "memorisation"))
        assert re.search(r"memorisation.json is (damaged|not what this version writes).*cxr-vae audit", said)

    def test_what_is_out_of_date_is_not_shown_as_if_it_were_not(self, tmp_path: Path) -> None:
        stale = full_run(tmp_path / "run")
        write_json(tmp_path / "shards" / "manifest.json", {"splits": {"test": {"index": {"sha256": "f" * 64}}}})
        stale.weights.write_bytes(b"other weights")
        write_json(stale.results, changed(request={"run_weights_sha256": "d" * 64}))
        report_runs([stale.path])
        page = read_page(stale.path / "report.html")
        assert "of other shards than are there now" in text_of(section(page, "data"))
        assert "5 216" not in text_of(section(page, "data"))
        assert "of other weights than the run has now" in text_of(section(page, "figures"))
        write_json(stale.results, changed(request={"run_weights_sha256": sha256_of(stale.weights)}))
        report_runs([stale.path])
        assert "other weights" not in text_of(read_page(stale.path / "report.html"))

    def test_a_huge_picture_is_made_smaller_and_a_broken_one_left_out(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", losses=())
        noise = np.random.default_rng(0).integers(0, 256, (3000, 3000), dtype=np.uint8)
        Image.fromarray(noise).save(run.grid("samples", 2))
        run.grid("reconstructions", 2).write_bytes(b"no picture")
        report_runs([run.path])
        assert (run.path / "report.html").stat().st_size < 3_000_000
        captions = [text_of(one) for one in section(read_page(run.path / "report.html"), "images").iter("figcaption")]
        assert len(captions) == 1
        assert "made smaller, from 3000 × 3000 pixels" in captions[0]


class TestPage:
    """As a file and as a document."""

    def test_it_needs_no_network_and_no_other_file(self, run: RunDir, page: Any) -> None:
        ids = {element.get("id") for element in page.iter()}
        for element in page.iter():
            for name in ("src", "srcset", "href", "action", "poster", "data"):
                target = element.get(name)
                if target is not None:
                    assert target.startswith("data:image/") or target[1:] in ids, target[:80]
        assert page.find(".//link") is None
        style = page.find(".//style").text
        assert "url(" not in style
        assert "@import" not in style
        policy = next(one.get("content") for one in page.iter("meta") if one.get("http-equiv"))
        assert policy.startswith("default-src 'none'; img-src data:;")
        assert (run.path / "report.html").stat().st_size < 1_000_000

    def test_text_from_names_and_files_stays_text(self, tmp_path: Path) -> None:
        name = '<img src=x onerror=alert(1)>&amp;"'
        run = make_run(tmp_path / name, changed(features={"network": "<script>alert(2)</script>"}), ())
        finding = {"level": "</li><b>", "text": "<script>alert(3)</script> {{ 7 * 7 }}"}
        write_json(run.evaluation / "memorisation.json", {"findings": [finding]})
        report_runs([run.path])
        page = read_page(run.path / "report.html")
        assert text_of(page.find(".//h1")) == name
        assert "{{ 7 * 7 }}" in text_of(section(page, "memorisation"))
        assert len(list(page.iter("script"))) == 1
        assert not [one for one in page.iter() if any(attribute.startswith("on") for attribute in one.attrib)]
        assert all(one.get("src", "data:").startswith("data:") for one in page.iter("img"))

    def test_headings_tables_and_pictures_are_marked_up_for_everybody(self, page: Any) -> None:
        levels = [int(one.tag[1]) for one in page.iter() if re.fullmatch("h[1-6]", one.tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        ids = [one.get("id") for one in page.iter() if one.get("id")]
        assert len(ids) == len(set(ids))
        for one in page.iter():
            assert one.get("aria-labelledby", ids[0]) in ids
        assert all(one.get("alt") for one in page.find(".//main").iter("img"))
        assert all(one.get("scope") in ("col", "row") for one in page.iter("th"))
        assert page.find("html").get("lang") == "en"
        assert [link.get("href")[1:] for link in page.find(".//nav").iter("a")] == [
            one.get("aria-labelledby") for one in page.iter("section")
        ]

    def test_templates_are_part_of_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from setuptools.dist import Distribution

        monkeypatch.chdir(ROOT)
        distribution = Distribution()
        distribution.parse_config_files()
        patterns = distribution.package_data["cxr_vae"]
        for path in (ROOT / "cxr_vae/report/templates").iterdir():
            assert any(path.relative_to(ROOT / "cxr_vae").match(pattern) for pattern in patterns), path

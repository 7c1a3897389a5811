import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_vae.config_file import dump_config, load_config
from cxr_vae.errors import UserError
from cxr_vae.files import sha256_of, write_json
from cxr_vae.pictures import save_grid
from cxr_vae.report_command import report_runs
from cxr_vae.run_dir import RunDir
from tests.browser_helpers import chromium
from tests.helpers import cxr_vae
from tests.page_helpers import read_page, section, tables, text_of

ROOT = Path(__file__).parents[1]

RESULTS: dict[str, Any] = {
    "figures": {
        "fid": {
            "value": 81.2345,
            "interval_95": [78.1, 84.369],
            "floor": 12.345,
            "floor_interval_95": [11.2, 13.49],
        },
        "kid": {
            "value": 0.03459,
            "interval_95": [0.03318, 0.036],
            "floor": -2.9e-6,
            "floor_interval_95": [-2.35e-5, 1.77e-5],
        },
        "inception_score": {"value": 1.0000688, "interval_95": [1.0000637, 1.0000739], "floor": 1.25},
    },
    "reconstructions": {
        "num": 90,
        "figures": {
            "fid": {"value": 44.4, "interval_95": [44.0, 44.8]},
            "psnr_db": {"value": 24.51, "interval_95": [24.4, 24.62]},
        },
    },
    "likelihood": {
        "bits_per_dim": {"value": 0.8765, "interval_95": [0.8755, 0.8775]},
        "my_own_figure": {"value": 12345},
    },
    "latent": {"active_units": 2, "num_units": 4, "kl_nats_per_unit": [3.5, 1.25, 0.01, 0.001]},
    "num_generated": 100,
    "num_real": 90,
    "num_floor": 100,
    "real": {"split": "test", "index_sha256": "a" * 64},
    "floor": {"split": "train", "index_sha256": "b" * 64, "meaning": "real images of this split"},
    "interval": "value ± 1.96 standard errors",
    "features": {"network": "inception", "weights_sha256": "c" * 64, "dtype": "float32", "resize": "TensorFlow's"},
    "image_size": 32,
    "versions": {"torch": "2.15"},
    "request": {"evaluate": {"is_splits": 10, "kid_subset_size": 90}},
}


def changed(**parts: dict[str, Any] | int) -> dict[str, Any]:
    """RESULTS with other values in some parts."""
    results: dict[str, Any] = json.loads(json.dumps(RESULTS))
    for name, value in parts.items():
        if isinstance(value, dict):
            results[name] |= value
        else:
            results[name] = value
    return results


AUDIT = {
    "tables": [{"title": "Closest pairs", "headers": ["sample", "ratio", "known"], "rows": [["000017", 0.031, True]]}],
    "findings": [{"level": "warning", "text": "5 samples are copies of training images."}],
    "pictures": [{"title": "Samples above their nearest", "file": "closest_pairs.png"}],
    "samples": {},
}


def make_run(path: Path, results: dict[str, Any] | None = None, losses: tuple[float, ...] = (700, 600, 650)) -> RunDir:
    """A run directory as training leaves it, written by what training writes it with."""
    run = RunDir(path)
    config = load_config(
        ROOT / "configs/reference.yaml",
        ["image_size=32", "model.channels=[8, 16]", "latent_dim=4", f"data.shards={path.parent / 'shards'}"],
    )
    run.claim(config, {"world_size": 2, "device": "cpu"})
    lines = []
    for number, loss in enumerate(losses):
        of = {"loss_nats": loss, "reconstruction_nats": loss - 20, "kl_nats": 20.0, "bits_per_dim": loss / 710}
        lines.append({"kind": "epoch", "step": number + 1, "epoch": number + 1, "train": of, "test": of})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    speeds = [(1, 0.5), (2, 1.0), (3, 0.4)]  # broken off after the second
    run.speed.write_text(
        "".join(json.dumps({"step": step, "elapsed_s": s, "images_per_s": 30.0}) + "\n" for step, s in speeds)
    )
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for kind in ("samples", "reconstructions"):
        save_grid(run.grid(kind, 2), images, 2)
    if results is not None:
        run.evaluation.mkdir()
        write_json(run.results, results)
    return run


def full_run(path: Path) -> RunDir:
    """A run with everything a report can show."""
    run = make_run(path, RESULTS)
    rng = np.random.default_rng(0)
    for folder in ("generated", "real"):
        (run.evaluation / folder).mkdir()
        for number in range(3):
            image = Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8))
            image.save(run.evaluation / folder / f"{number:06d}.png")
    (run.evaluation / "pictures").mkdir()
    shutil.copy(run.grid("samples", 2), run.evaluation / "pictures" / "latent_traversals.png")
    shutil.copy(run.grid("samples", 2), run.evaluation / "closest_pairs.png")
    write_json(run.evaluation / "memorisation.json", AUDIT)
    shards = path.parent / "shards"
    shards.mkdir(exist_ok=True)
    write_json(shards / "manifest.json", {"splits": {"test": {"index": {"sha256": "a" * 64}}}})
    write_json(
        shards / "inspection.json",
        {
            "index_hashes": {"test": "a" * 64},
            "tables": [{"title": "Images", "headers": ["split", "images"], "rows": [["test", 5216], ["val", None]]}],
            "findings": [{"level": "ok", "text": "No patient is in two splits."}],
        },
    )
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = full_run(tmp_path_factory.mktemp("report") / "run")
    text, page = report_runs([run.path])
    assert page == run.path / "report.html"
    assert "training, nats an image" in text
    return run


@pytest.fixture(scope="module")
def page(run: RunDir) -> Any:
    return read_page(run.path / "report.html")


def as_number(text: str) -> float:
    return float(text.partition("|")[0].replace("−", "-").replace(" ", ""))


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
        for path in (ROOT / "cxr_vae/templates").iterdir():
            assert any(path.relative_to(ROOT / "cxr_vae").match(pattern) for pattern in patterns), path


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
    assert "5 runs, losses in nats an image" in result.stdout
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
        with pytest.raises(UserError, match=r"config\.yaml is damaged"):
            report_runs([broken.path, folder / "a"], tmp_path / "r.html")


PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


class TestInChromium:
    """Opened as a reader does."""

    @pytest.fixture
    def opened(self, browser: Any, run: RunDir) -> Iterator[Any]:
        """A function that opens the page; in the end nothing may have been complained of or asked for."""
        said: list[str] = []
        contexts = []

        def open_page(path: Path = run.path / "report.html", scheme: str = "light", size: Any = DESKTOP) -> Any:
            contexts.append(browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce"))
            page = contexts[-1].new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda asked: asked.url.startswith(("data:", "file:")) or said.append(asked.url))
            page.goto(path.as_uri())
            return page

        yield open_page
        for context in contexts:
            context.close()
        assert said == []

    @pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
    def test_nothing_sticks_out_and_every_picture_shows(self, opened: Any, size: Any) -> None:
        page = opened(size=size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert page.evaluate("[...document.images].filter(i => i.src && !(i.complete && i.naturalWidth)).length") == 0
        wide = page.locator(".table").first
        if size is PHONE:  # the table scrolls in its own box
            assert wide.evaluate("box => box.scrollWidth > box.clientWidth && box.clientWidth <= 360")

    def test_a_comparison_on_a_phone(self, opened: Any, tmp_path: Path) -> None:
        for name in ("a" * 90, "b"):
            make_run(tmp_path / name, RESULTS)
        _, path = report_runs([tmp_path])
        page = opened(path, size=PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360

    def test_dark_readers_get_a_dark_page_with_dark_plots(self, opened: Any) -> None:
        luminance, plots = {}, {}
        for scheme in ("light", "dark"):
            page = opened(scheme=scheme)
            colors = page.evaluate("""() => {
                const style = getComputedStyle(document.querySelector('section p'));
                return [style.color, getComputedStyle(document.querySelector('section')).backgroundColor];
            }""")
            ink, ground = (relative_luminance(color) for color in colors)
            contrast = (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)
            assert contrast > 4.5  # WCAG 2.2, 1.4.3
            luminance[scheme] = ground
            plots[scheme] = page.evaluate("document.querySelector('#training ~ * img').currentSrc")
        assert luminance["dark"] < 0.05 < 0.9 < luminance["light"]
        assert plots["dark"] != plots["light"]

    def test_pictures_open_and_close_by_keyboard(self, opened: Any) -> None:
        page = opened()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["x"] >= 0  # it is seen when it has the focus
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.className") == "zoom":
                break
        else:
            pytest.fail("no picture is reached by Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        source = page.evaluate("document.activeElement.querySelector('img').currentSrc")
        for close in ("Escape", "Enter"):
            page.keyboard.press("Enter")
            assert page.evaluate("document.getElementById('zoom').open")
            assert page.evaluate("document.querySelector('#stage img').src") == source
            before = page.locator("#stage img").bounding_box()["width"]
            page.keyboard.press("+")
            assert page.locator("#stage img").bounding_box()["width"] > before
            if close == "Enter":
                page.locator("#close").focus()
            page.keyboard.press(close)
            assert not page.evaluate("document.getElementById('zoom').open")
            assert page.evaluate("document.activeElement.className") == "zoom"  # back where one was

    def test_pictures_open_by_click_on_a_phone(self, opened: Any) -> None:
        page = opened(size=PHONE)
        page.locator("section[aria-labelledby=images] button.zoom").first.click()
        box = page.locator("#zoom").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert text_in(page, "#zoom-title") == "Samples, epoch 2"
        page.locator("#close").click()
        assert not page.evaluate("document.getElementById('zoom').open")


def text_in(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())


def relative_luminance(color: str) -> float:
    """Of `rgb(…)`: WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


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

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_vae.report.command import report_runs
from cxr_vae.run_dir import RunDir
from tests.browser_helpers import chromium
from tests.helpers import HANG_S
from tests.report_runs import RESULTS, make_run, reported_run

PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return reported_run(tmp_path_factory.mktemp("report"))


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
            contexts[-1].set_default_timeout(HANG_S * 1000)
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

"""The report in a real browser: it draws, fits a phone, asks for nothing, and runs nothing that is not its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import HOSTILE, write_run
from tests.waiting import HANGS

from lorafit.report.page import SECTIONS, write_report
from lorafit.run_dir import RunDirectory

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra `test`)")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = os.environ.get("LORAFIT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs chromium (LORAFIT_CHROMIUM names one that is not on the PATH)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"], timeout=1000 * HANGS
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    poison = "".join(HOSTILE) + "longwordwithoutanyblank" * 12
    return {
        "plain": write_report(RunDirectory.open(write_run(folder / "plain", 300))),
        "hostile": write_report(
            RunDirectory.open(write_run(folder / "hostile", say=lambda text: text + poison))
        ),
    }


class Opened:
    """A page, and what it did."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.context.set_default_timeout(1000 * HANGS)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_the_page_fits_and_asks_for_nothing(
    browser: Any, reports: dict[str, Path], which: str, width: int, scheme: str
) -> None:
    opened = Opened(browser, reports[which], width, scheme)
    assert opened.said == []
    assert opened.asked == [reports[which].as_uri()]
    assert opened.ask("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    inside = (
        f"{wide}.filter(e => !e.closest('.plot') && !e.closest('.say')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert opened.ask(inside) == []
    found = opened.ask("[...document.querySelectorAll('section')].map(section => section.id)")
    assert found == [name for _, name, _ in SECTIONS]
    empty = (
        "[...document.querySelectorAll('.plot')].filter(e => e.getBoundingClientRect().height < 100).length"
    )
    assert opened.ask(empty) == 0
    assert opened.ask("document.querySelectorAll('script').length") == 1
    opened.context.close()


def test_light_and_dark_differ_and_text_stands_out(browser: Any, reports: dict[str, Path]) -> None:
    """Body and dimmed text have the contrast that WCAG AA asks for, in both."""
    measure = """() => {
      const light = (text) => {
        const [r, g, b] = text.match(/[0-9]+/g).map(Number).map((v) => v / 255)
          .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const body = light(getComputedStyle(document.body).backgroundColor);
      const pairs = [...document.querySelectorAll('.sub, .badge, mark, .tile b, .tile span, .key, .plot .y, dt, th')]
        .map((element) => {
          let behind = element;
          while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
          return ratio(light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor));
        });
      return [body, Math.min(...pairs)];
    }"""
    backgrounds = []
    for scheme in ("light", "dark"):
        opened = Opened(browser, reports["plain"], 1400, scheme)
        background, least = opened.ask(measure)
        backgrounds.append(background)
        assert least >= 4.5, scheme
        opened.context.close()
    assert backgrounds[0] > 0.8
    assert backgrounds[1] < 0.05


def test_the_pointer_reads_values_off_a_curve(browser: Any, reports: dict[str, Path]) -> None:
    opened = Opened(browser, reports["plain"], 1400, "light")
    plot = opened.page.locator("#loss .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    tip = plot.locator(".tip").inner_text()
    assert tip.splitlines()[0] in ("step 150", "step 151")
    assert "held out, base 1.9" in tip
    opened.page.mouse.move(5, 5)
    assert not plot.locator(".tip").is_visible()
    assert opened.said == []
    opened.context.close()


def test_without_scripts_everything_is_there(browser: Any, reports: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(1000 * HANGS)
    page = context.new_page()
    page.goto(reports["plain"].as_uri())
    assert page.locator(".plot path.line").count() >= 8
    assert page.locator("#loss .plot > svg").bounding_box()["height"] > 100
    context.close()

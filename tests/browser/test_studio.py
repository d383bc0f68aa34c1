"""The studio in a real browser: wide and narrow, light and dark, both languages, live, by keyboard and pointer."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser.test_report_page import browser
from tests.report.runs import HOSTILE, write_run
from tests.waiting import HANGS, until

from lorafit.serve.listening import Server
from lorafit.storage.locks import lock
from lorafit.studio.server import TOKEN_VARIABLE, run_studio

__all__ = ["browser"]
pytestmark = [pytest.mark.browser, pytest.mark.slow]
TOKEN = "a-token-of-the-tests"


class Live:
    """A studio that listens, with its address."""

    def __init__(self, folder: Path, port: int = 0, token: str = TOKEN) -> None:
        self.folder, started, shown = folder, [], []
        self.servers: list[Server] = started
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(TOKEN_VARIABLE, token)
            options = {"show": shown.append, "ready": started.append}
            self.thread = threading.Thread(
                target=run_studio, args=(folder, port), kwargs=options, daemon=True
            )
            self.thread.start()
            until(lambda: shown)
        self.url = shown[0]
        self.base = self.url.partition("/open")[0]

    def end(self) -> int:
        """End it; its port."""
        self.servers[0].should_exit = True
        self.thread.join(HANGS)
        return int(self.base.rpartition(":")[2])


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("studio")
    write_run(folder / "plain", 120)
    write_run(folder / "hostile", 60, lambda text: text + "".join(HOSTILE) + "longwordwithoutanyblank" * 12)
    live = Live(folder)
    yield live
    live.end()


def opened(browser: Any, studio: Live, width: int = 1300, scheme: str = "light", language: str = "en") -> Any:
    """(context, what its pages said, what they asked for), logged in."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, locale=language
    )
    context.set_default_timeout(1000 * HANGS)
    context.said, context.asked = [], []
    context.on("console", lambda message: context.said.append(message.text))
    context.on("weberror", lambda error: context.said.append(str(error.error)))
    context.on("request", lambda request: context.asked.append(request.url))
    page = context.new_page()
    page.goto(studio.url)
    page.wait_for_url(f"{studio.base}/")
    context.first = page
    return context


def visited(page: Any, studio: Live) -> Iterator[str]:
    """Each page of the studio, opened, with all that is folded on it unfolded; its path."""
    links = page.locator("#run-table a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    ids = [link.rpartition("/")[2] for link in links]
    rows, odd = studio.folder / "rows.json", studio.folder / "odd.json"
    rows.write_text(
        json.dumps([{"instruction": "a" * 300, "output": "<think>b</think>" + "".join(HOSTILE[:4])}])
    )
    odd.write_text(json.dumps([{"frage": "Wer?", "wort": ["Ich."]}]))
    for path in (
        *(
            "/",
            *links,
            f"{links[0]}/export",
            "/new?demo=1",
            f"/data?data.path={rows}",
            f"/data?data.path={odd}",
        ),
        *("/compare?" + "&".join(f"run={name}" for name in ids), "/talk", "/nothing"),
    ):
        page.goto(studio.base + path)
        page.evaluate(
            "document.querySelectorAll('details:not([data-load])').forEach(e => { e.open = true; })"
        )
        yield path


@pytest.mark.parametrize(
    ("width", "scheme", "language"),
    [(1300, "light", "en"), (390, "dark", "ko"), (390, "light", "en"), (1300, "dark", "ko")],
)
def test_every_page_fits_and_asks_only_here(
    browser: Any, studio: Live, width: int, scheme: str, language: str
) -> None:
    context = opened(browser, studio, width, scheme, language)
    for path in visited(context.first, studio):
        assert context.first.evaluate("document.documentElement.lang") == language
        assert context.first.evaluate("document.documentElement.scrollWidth") <= width, path
    assert [url for url in context.asked if not url.startswith((studio.base, "data:"))] == []
    assert [text for text in context.said if "404" not in text] == []
    context.close()


@pytest.mark.parametrize(("width", "scheme", "language"), [(1300, "light", "en"), (390, "dark", "ko")])
def test_axe_finds_nothing(browser: Any, studio: Live, width: int, scheme: str, language: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe (the extra `test`)")
    context = opened(browser, studio, width, scheme, language)
    for path in visited(context.first, studio):
        context.first.evaluate(axe.AXE_SCRIPT)
        found = context.first.evaluate("axe.run()")["violations"]
        shown = [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found]
        assert shown == [], path
    context.close()


def test_ten_pages_follow_a_run_by_one_stream(browser: Any, studio: Live) -> None:
    context = opened(browser, studio)
    address = context.first.locator("#run-table a", has_text="plain").get_attribute("href")
    pages = [context.first, *(context.new_page() for _ in range(9))]
    for page in pages:
        page.goto(studio.base + address)
    context.asked.clear()
    metrics = studio.folder / "plain" / "metrics.jsonl"
    with metrics.open("a") as file:
        note = {
            "event": "diagnosis",
            "step": 120,
            "what": "x",
            "text": "the loss fell asleep",
            "hint": "wake it",
        }
        file.write(json.dumps(note) + "\n")
    for page in pages:
        page.get_by_text("the loss fell asleep").wait_for()
    assert sum(url.endswith("/events") for url in context.asked) <= 1
    assert sum(url.endswith("/live?smooth=usual&from=&to=") for url in context.asked) <= 2 * len(pages)
    pages[0].close()  # the page that listened: another one takes over
    with metrics.open("a") as file:
        file.write(json.dumps({**note, "text": "the loss woke up"}) + "\n")
    for page in pages[1:]:
        page.get_by_text("the loss woke up").wait_for()
    context.close()


def test_a_run_is_filtered_zoomed_and_noted_by_keyboard_and_pointer(browser: Any, studio: Live) -> None:
    context = opened(browser, studio)
    page = context.first
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_label("Filter").fill("plain")
    assert page.locator("#run-table tbody tr:visible").count() == 1
    page.get_by_role("link", name="plain").press("Enter")
    plot = page.locator("#loss .plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    page.mouse.up()
    page.wait_for_url("**from=*")
    page.locator("#loss").filter(has_not_text="120").wait_for()
    assert 28 <= int(page.locator("[name=from]").input_value()) <= 32
    page.get_by_label("Note").fill("the best <b>one</b>")
    page.get_by_role("button", name="Save", exact=True).click()
    assert (studio.folder / "plain" / "note.txt").read_text() == "the best <b>one</b>"
    context.close()


def test_problems_stand_at_their_fields_while_one_types(browser: Any, studio: Live) -> None:
    context = opened(browser, studio)
    page = context.first
    page.goto(f"{studio.base}/new?model.name=m&data.path=rows.json")
    page.get_by_label("Rank of the adapter lora.rank", exact=True).fill("0")
    page.locator("#e-lora-rank", has_text="greater than or equal to 1").wait_for()
    assert (
        page.get_by_label("Rank of the adapter lora.rank", exact=True).get_attribute("aria-invalid") == "true"
    )
    page.get_by_label("Rank of the adapter lora.rank", exact=True).fill("4")
    page.locator("aside .command pre", has_text="lorafit train").wait_for()
    assert "rank: 4" in page.locator("#recipe").text_content()
    page.get_by_role("link", name="Runs", exact=True).click()
    page.wait_for_url(f"{studio.base}/")
    page.go_back()
    page.locator("#recipe", has_text="rank: 4").wait_for(state="attached")  # what was typed is still there
    context.close()


def say(run: Path, text: str) -> None:
    """Append a diagnosis to the metrics of a run."""
    note = {"event": "diagnosis", "step": 120, "what": "x", "text": text, "hint": "wake it"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(note) + "\n")


def test_a_list_keeps_what_the_reader_has_done_to_it(browser: Any, studio: Live) -> None:
    other, _ = (write_run(studio.folder / name, 20) for name in ("xylo-1", "xylo-2"))
    context = opened(browser, studio)
    page = context.first
    page.get_by_label("Filter").fill("xylo")
    page.locator('#run-table [data-sort="1"]').dblclick()
    page.locator('#run-table [data-sort="1"]').click()
    page.get_by_label("xylo-1").check()
    page.get_by_role("button", name="step", exact=True).focus()
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "step", "step": 5555, "loss": 0.5}) + "\n")
    page.get_by_role("cell", name="5,555").wait_for()
    assert page.get_by_label("Filter").input_value() == "xylo"
    assert page.locator("th[aria-sort=ascending]").text_content() == "run"
    assert page.locator("#run-table tbody tr:visible a").all_text_contents() == ["xylo-1", "xylo-2"]
    assert page.get_by_label("xylo-1").is_checked()
    assert page.evaluate("document.activeElement.textContent") == "step"
    context.close()


def test_a_watched_run_changes_its_buttons_and_its_end_is_told(browser: Any, studio: Live) -> None:
    run = write_run(studio.folder / "going", 20, ended="nothing")
    context = opened(browser, studio)
    page = context.first
    with lock(run / "run.lock"):
        page.goto(studio.base + page.get_by_role("link", name="going").get_attribute("href"))
        page.get_by_role("button", name="Stop and save").wait_for()
        page.get_by_label("From step").fill("3")
        page.get_by_label("Note").fill("typed")
    page.get_by_role("button", name="Resume").wait_for()
    assert page.get_by_role("button", name="Stop and save").count() == 0
    assert page.get_by_label("From step").input_value() == "3"
    shutil.rmtree(run)
    page.get_by_text("there is no such run").wait_for()
    assert page.locator("#loss").count() == 0
    assert page.get_by_label("Note").input_value() == "typed"
    page.go_back()
    page.get_by_role("link", name="plain").wait_for()
    context.close()


def test_a_page_says_that_its_studio_has_ended_and_goes_on_with_the_next(
    browser: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", 20)
    first = Live(tmp_path)
    context = opened(browser, first)
    page = context.first
    page.goto(first.base + page.get_by_role("link", name="run", exact=True).get_attribute("href"))
    page.locator("#loss .plot").wait_for()
    port = first.end()
    lost = page.locator("#lost")
    lost.filter(has_text="does not answer").wait_for()
    say(run, "the loss fell asleep")
    second = Live(tmp_path, port)
    page.get_by_text("the loss fell asleep").wait_for()
    lost.filter(has_not_text="answer").wait_for(state="hidden")
    second.end()
    third = Live(tmp_path, port, "another-token-of-the-tests")
    lost.filter(has_text="another token").wait_for()
    assert page.get_by_text("the loss fell asleep").count() == 1, "what was there is still shown"
    say(run, "the loss woke up")
    other = context.new_page()
    other.goto(third.url)
    page.get_by_text("the loss woke up").wait_for()
    third.end()
    context.close()


def test_a_file_of_the_wrong_kind_is_told_where_it_was_dropped(browser: Any, studio: Live) -> None:
    context = opened(browser, studio)
    page = context.first
    page.goto(f"{studio.base}/data")
    file = {"name": "rows.docx", "mimeType": "text/plain", "buffer": b"x"}
    page.locator("[data-pick-file]").set_input_files(file)
    page.locator("[data-drop] .wrong", has_text="rows.docx is no data file").wait_for()
    rows = json.dumps([{"instruction": "a", "output": "b"}]).encode()
    page.locator("[data-pick-file]").set_input_files(
        {"name": "내 행 (1).json", "mimeType": "", "buffer": rows}
    )
    page.get_by_text("Row 1").wait_for()
    assert page.locator("#d-path").input_value().endswith("/uploads/내 행 (1).json")
    context.close()


@pytest.fixture
def studio_with_model(tmp_path: Path, finished_run: Path) -> Iterator[Live]:
    shutil.copytree(finished_run, tmp_path / "mine")
    live = Live(tmp_path)
    yield live
    live.end()  # and with it the server of its talk


def test_a_reload_keeps_the_talk_and_what_the_next_question_reads(
    browser: Any, studio_with_model: Live
) -> None:
    studio = studio_with_model
    context = opened(browser, studio)
    page = context.first
    asked: list[Any] = []
    page.on(
        "request", lambda request: asked.append(request.post_data_json) if "answer" in request.url else None
    )

    def ask(question: str) -> list[str]:
        """Ask all models; what stands on the page then."""
        page.locator("#talk-prompt").fill(question)
        page.locator("#talk-form button.primary").click()
        page.locator("#talk-prompt:focus").wait_for()
        page.wait_for_function("document.querySelector('#talk-prompt').value === ''")
        return turns()

    def turns() -> list[str]:
        return list(page.locator("#turns > .turn").evaluate_all("all => all.map(turn => turn.innerText)"))

    page.goto(f"{studio.base}/talk")
    page.locator("input[name=run]").check()
    page.locator("form[action='/talk/open'] button").click()
    page.locator("#talk-form").wait_for()
    page.locator("#talk-tokens").fill("4")
    first = ask("What is 2?")
    assert len(first) == 1
    assert "What is 2?" in first[0]
    page.reload()
    page.locator("#talk-form").wait_for()
    assert turns() == first
    page.locator("#talk-tokens").fill("4")
    second = ask("And 3?")
    assert second[1:] == first
    assert len(asked) == 4  # two models, twice
    for before, after in zip(sorted(asked[:2], key=str), sorted(asked[2:], key=str), strict=True):
        roles = [message["role"] for message in after["messages"]]
        assert after["messages"][0] == before["messages"][0]
        assert roles == ["user", "assistant", "user"]
    page.locator("[data-forget]").click()
    page.reload()
    page.locator("#talk-form").wait_for()
    assert turns() == []
    page.locator("form[action='/talk/close'] button").click()
    page.locator("#talk-form").wait_for(state="detached")
    assert context.said == []
    context.close()

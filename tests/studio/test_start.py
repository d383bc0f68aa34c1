"""The form of a new run: every key once, what is wrong at its field, and the recipe that the command runs."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from tests.config.test_load import VALUES
from tests.report.runs import write_run
from tests.studio.pages import Studio

from lorafit.config.guide import GUIDE
from lorafit.config.load import load_config, load_form, validate
from lorafit.config.schema import keys
from lorafit.errors import ConfigError
from lorafit.studio.schema_form import FIRST, OWN, changed_texts, form_fields, overrides_of


def test_every_key_of_the_schema_has_one_field_with_its_help() -> None:
    groups = form_fields()
    fields = [field for listed in groups.values() for field in listed]
    assert sorted([field.key for field in fields] + list(OWN)) == sorted(keys())
    assert all(field.help for field in fields)
    assert [field.key for field in groups["first"]] == list(FIRST)
    assert set(GUIDE) < set(FIRST)
    rank = next(field for field in fields if field.key == "lora.rank")
    assert (rank.bounds, rank.default, rank.input) == ("≥ 1, ≤ 1024", "16", "number")
    schedule = next(field for field in fields if field.key == "train.schedule")
    assert set(schedule.choices) >= {"cosine", "linear", "constant"}


@settings(deadline=None, max_examples=25)
@given(chosen=st.fixed_dictionaries({}, optional=VALUES))
def test_a_config_is_the_same_after_its_way_through_the_form(chosen: dict[str, Any]) -> None:
    values: dict[str, Any] = {"model": {"name": "m"}, "data": {"path": "rows"}}
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    try:
        config = validate(values)
    except ConfigError:
        return
    texts = changed_texts(config)
    lines = {key: text for key, text in texts.items() if key not in OWN}
    if any("\n" in item or item != item.strip() or not item for item in _listed(config)):
        return  # a line of the form holds one name
    again = load_form(*overrides_of(lines))
    assert again.model_copy(update={"run": config.run}) == config.model_copy(update={"run": config.run})


def _listed(config: Any) -> list[str]:
    values = [value for section in config.model_dump().values() for value in section.values()]
    texts = [value for value in values if isinstance(value, str)]
    return [
        *texts,
        *(item for value in values if isinstance(value, tuple) for item in value if isinstance(item, str)),
    ]


GOOD = {"name": "mine", "model.name": "m", "data.path": "rows.json"}


def test_problems_are_at_their_fields_all_at_once(tmp_path: Path) -> None:
    write_run(tmp_path / "taken", 2)
    studio = Studio(tmp_path)
    bad = {
        "name": "taken",
        "lora.rank": "0",
        "train.learning_rate": "fast",
        "data.path": " ",
        "data.format": "no",
    }
    told = studio.send("/new/check", **bad).json()
    assert {key for key, _, _ in told["errors"]} >= {
        "name",
        "lora.rank",
        "train.learning_rate",
        "data.path",
        "model.name",
    }
    assert told["command"] == told["recipe"] == ""
    page = studio.send("/new", **bad)
    assert page.status_code == 422
    assert re.search(r'id="e-lora-rank">[^<]*greater than or equal to 1', page.text)
    assert 'value="fast"' in page.text, "what was typed stays"
    assert not (tmp_path / "recipes").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 101, "a b", "a\0b", "-x"])
def test_a_name_is_one_folder_below_the_studios(tmp_path: Path, name: str) -> None:
    told = Studio(tmp_path).send("/new/check", **{**GOOD, "name": name}).json()
    assert [key for key, _, _ in told["errors"]] == ["name"]


def test_a_name_that_waits_in_the_queue_or_is_the_studios_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run of that name would replace the recipe of the first."""
    studio = Studio(tmp_path)
    monkeypatch.setattr(studio.app.state.jobs, "_spawn", lambda job: job)
    assert studio.send("/new", **GOOD, act="queue").headers["location"] == "/"
    assert studio.send("/new", **{**GOOD, "lora.rank": "3"}, act="queue").status_code == 422
    assert "rank" not in (tmp_path / "recipes" / "mine.yaml").read_text()
    for name in ("recipes", "uploads", "tasks.jsonl"):
        told = Studio(tmp_path / "new").send("/new/check", **{**GOOD, "name": name}).json()
        assert [key for key, _, _ in told["errors"]] == ["name"]
    for expected in ("demo", "demo-2"):
        (name,) = re.findall(r'id="f-name" name="name" value="([^"]+)"', studio.ask("/new?demo=1").text)
        assert name == expected
        studio.send("/new", **{**GOOD, "name": name}, act="queue")


def test_a_start_writes_the_recipe_that_its_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = Studio(tmp_path)
    started: list[list[str]] = []
    jobs = studio.app.state.jobs
    monkeypatch.setattr(jobs, "_spawn", lambda job: started.append(list(job.words)) or job)
    fields = {
        **GOOD,
        "model.name": "내 모델/a: #b",
        "data.path": "a.json\n한 글 & [1].json",
        "lora.rank": "8",
        "train.schedule": "",
        "lora.targets": "q_proj",
    }
    told = studio.send("/new/check", **fields).json()
    reply = studio.send("/new", **fields, act="start")
    assert reply.status_code == 303
    recipe = tmp_path / "recipes" / "mine.yaml"
    assert started == [["train", str(recipe)]]
    assert told["command"] == f"lorafit train {recipe}"
    assert recipe.read_text() == told["recipe"]
    assert set(yaml.safe_load(told["recipe"])["lora"]) == {"rank", "targets"}, "defaults are left out"
    config = load_config(recipe)
    assert (config.lora.rank, config.data.path) == (8, ("a.json", "한 글 & [1].json"))
    assert config.model.name == "내 모델/a: #b"
    assert config.run.output == str(tmp_path / "mine")


def test_three_clicks_lead_from_nothing_to_the_demo_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = Studio(tmp_path)
    started: list[str] = []
    monkeypatch.setattr(studio.app.state.jobs, "_spawn", lambda job: started.append(job.output) or job)
    home = studio.ask("/").text
    (first,) = re.findall(r'class="button primary" href="([^"]+)"', home)
    form = studio.ask(first).text
    sent = dict(re.findall(r'<input id="f-[\w-]+" name="([^"]+)" value="([^"]*)"', form))
    sent |= dict(re.findall(r'<textarea id="f-[\w-]+" name="([^"]+)"[^>]*>([^<]*)</textarea>', form))
    second = studio.send("/new", **sent, act="start")
    assert second.status_code == 303
    assert started == [str(tmp_path / "demo")]
    write_run(tmp_path / "demo", 5)
    assert f'href="/runs/{studio.ids()["demo"]}"' in studio.ask(second.headers["location"]).text


def test_a_run_starts_from_another_runs_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "first", 3)
    studio = Studio(tmp_path)
    page = studio.ask(f"/new?from={studio.ids()['first']}").text
    assert 'value="first-again"' in page
    assert 'name="model.name" value="demo/model"' in page
    assert 'name="train.learning_rate" value="0.0002"' in page


def test_a_shipped_recipe_fills_the_form_and_no_other_file_does(tmp_path: Path) -> None:
    studio = Studio(tmp_path)
    page = studio.ask("/new?recipe=classic").text
    assert re.search(r'name="train.learning_rate" value="[^"]+"', page)
    for name in ("../../pyproject", "/etc/passwd", "nothing"):
        assert studio.ask(f"/new?recipe={name}").status_code == 400


@pytest.mark.parametrize(
    ("printed", "key"),
    [
        ("error: 3 rows are longer than data.max_length=128; the longest has 153", "data.max_length"),
        ("error: it does not fit\n hint: train.micro_batch_tokens=512", "train.micro_batch_tokens"),
        ("error: no such model: a.b=c", None),
        ("error: nothing", None),
    ],
)
def test_what_the_plan_refuses_names_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, key: str | None
) -> None:
    from lorafit.studio import start

    async def only_one(request: object, kind: str, words: list[str]) -> tuple[int, str]:
        return 2, printed

    monkeypatch.setattr(start, "only_one", only_one)
    page = Studio(tmp_path).send("/new/plan", **GOOD).text
    assert re.findall(r'data-key="([^"]*)"', page) == ([key] if key else [])


def test_a_plan_ends_when_its_page_is_left_and_when_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.studio import start

    studio = Studio(tmp_path)
    state = studio.app.state
    monkeypatch.setattr(state.jobs, "_spawn", lambda job: job)
    monkeypatch.setattr(start, "WORDS", (sys.executable, "-c", "import time; time.sleep(600)"))

    async def leave_then_start() -> list[int | None]:
        messages = [{"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        request = Request({"type": "http", "app": studio.app}, receive)
        left, _ = await start.only_one(request, "plan", [])
        waiting = asyncio.create_task(start.only_one(request, "plan", []))
        while state.processes["plan"].returncode is not None:
            await asyncio.sleep(0)
        await start.end(state.processes["plan"])
        return [left, (await waiting)[0]]

    assert asyncio.run(leave_then_start()) == [-signal.SIGKILL, -signal.SIGKILL]
    ended: list[object] = []

    async def end(process: object) -> None:
        ended.append(process)

    monkeypatch.setattr(start, "end", end)
    studio.send("/new", **GOOD, act="start")
    assert ended == [state.processes["plan"]]


def test_the_plan_and_the_models_come_from_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.studio import start

    asked: list[list[str]] = []

    async def only_one(request: object, kind: str, words: list[str]) -> tuple[int, str]:
        asked.append(words)
        return (
            (0, json.dumps({"model": "owner/<b>name"}) + "\n") if kind == "models" else (2, "error: <script>")
        )

    monkeypatch.setattr(start, "only_one", only_one)
    studio = Studio(tmp_path)
    assert "owner/&lt;b&gt;name" in studio.ask("/new/models").text
    assert "owner/" in studio.ask("/new/models").text
    assert asked == [["models", "--json"]], "the table is measured once"
    assert "error: &lt;script&gt;" in studio.send("/new/plan", **GOOD).text
    assert asked[1][0] == "plan"
    assert load_config(Path(asked[1][1])).model.name == "m"

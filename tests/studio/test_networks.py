"""The studio with no network at all, and with ids of a hub as model and rows."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from tests.hostile.test_offline import WITHOUT_NETWORK, Cage
from tests.hub.conftest import _own_home, hub
from tests.hub.stub import GOOD_TOKEN, Hub
from tests.studio.pages import Studio
from tests.tiny_models import write_model, write_rows
from tests.waiting import until

__all__ = ["_own_home", "hub"]
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"model.name": "owner/tiny", "data.path": "owner/rows"}


@pytest.mark.slow
@pytest.mark.skipif(not WITHOUT_NETWORK, reason="this system gives no network namespace (unshare)")
def test_the_whole_studio_works_without_a_route_and_asks_for_nothing_elsewhere(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model", **SHAPE), write_rows(tmp_path / "rows.json", 8)
    cage = Cage(tmp_path)
    done = cage.python("-m", "tests.studio.alone", tmp_path / "runs", model, rows)
    assert done.returncode == 0, done.stderr
    assert cage.num_processes >= 2, "the training is watched, too"
    asked = set(cage.seen) - {"socket.connect (('192.0.2.1', 443),)"}  # the test's own look for a route
    (port,) = {
        match[1] for line in asked if (match := re.search(r"connect \(\('127\.0\.0\.1', (\d+)\)", line))
    }
    own = (
        f"socket.connect (('127.0.0.1', {port}),)",
        f"socket.getaddrinfo ({port}, 0, 1, 0)",
    )  # the test's client
    bound = ("socket.bind (('127.0.0.1', 0),)", "socket.getaddrinfo (0, 0, 1, 0)")  # the studio
    assert asked == {*own, *bound}


def put(hub: Hub, folder: Path) -> None:
    """A model and rows on the hub."""
    model = write_model(folder / "files", **SHAPE)
    hub.add("owner/tiny", {path.name: path.read_bytes() for path in model.iterdir()})
    rows = write_rows(folder / "rows.json", 8).read_bytes()
    hub.add("datasets/owner/rows", {"data/train.json": rows, "loader.py": "raise SystemExit"})


def test_rows_of_a_hub_are_shown_as_a_model_of_the_hub_reads_them(hub: Hub, tmp_path: Path) -> None:
    put(hub, tmp_path)
    page = Studio(tmp_path / "runs").ask("/data", params=IDS)
    assert page.status_code == 200
    assert page.text.count('<pre class="row-view">') == 8
    assert 'class="card problem"' not in page.text
    assert "alpaca" in page.text.partition('id="format"')[2].partition("</section>")[0]
    assert "model.safetensors" not in hub.fetched(), "rows need no weights"
    assert "loader.py" not in hub.fetched()


@pytest.mark.parametrize(("model", "rows"), [("owner/none", "owner/rows"), ("owner/tiny", "owner/none")])
def test_an_id_that_the_hub_does_not_know_is_told_with_what_to_do(
    hub: Hub, tmp_path: Path, model: str, rows: str
) -> None:
    put(hub, tmp_path)
    page = Studio(tmp_path / "runs").ask("/data", params={"model.name": model, "data.path": rows})
    problem = page.text.partition('class="card problem"')[2].partition("</div>")[0]
    assert "owner/none" in problem
    assert "What to do" in problem


def test_a_hub_that_fails_is_told(hub: Hub, tmp_path: Path) -> None:
    put(hub, tmp_path)
    hub.failing_on = "owner/rows"
    page = Studio(tmp_path / "runs").ask("/data", params=IDS)
    assert page.status_code == 200
    assert 'class="card problem"' in page.text


@pytest.mark.slow
def test_a_run_with_ids_of_a_hub_starts_from_the_form(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    monkeypatch.setenv("LORAFIT_NATIVE", "0")
    monkeypatch.chdir(Path(__file__).parents[2])
    studio = Studio(tmp_path / "runs")
    fields = {**IDS, "name": "own", "train.max_steps": "2", "run.verify": "false", "run.samples": "0"}
    reply = studio.send("/new", **fields, act="start")
    assert reply.status_code == 303
    jobs = studio.app.state.jobs
    until(lambda: jobs.advance() and jobs.listed()[0].is_over)
    assert jobs.listed()[0].state == "done", jobs.log(jobs.listed()[0])
    assert {"model.safetensors", "data/train.json"} <= hub.fetched()
    page = studio.ask(f"/runs/{studio.ids()['own']}").text
    assert ">finished<" in page
    assert "owner/tiny" in page
    assert GOOD_TOKEN not in "".join(path.read_text() for path in (tmp_path / "runs").rglob("*.yaml"))
    assert os.environ["HF_TOKEN"] not in page

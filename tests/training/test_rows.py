"""The record of the rows' losses: what the loss of each row was, also after a resume, over ranks and in both phases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.command import Cli
from tests.runs import digest, events, interrupt_after, tiny_run

from lorafit.config.load import load_config
from lorafit.data.packing import build_pack
from lorafit.errors import DataError
from lorafit.forward import pack_losses
from lorafit.model.lora import disable_adapter, evaluating
from lorafit.observe.visits import read_visits
from lorafit.training import run as run_module
from lorafit.training.run import Result, resume_run

WORDS = [
    "data.holdout=4",
    "train.max_steps=9",
    "train.save_every=2",
    "train.refit=true",
    "train.eval_every=3",
]


@pytest.fixture(scope="module")
def recorded(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return tiny_run([*tiny, *WORDS, "train.micro_batch_tokens=64"], tmp_path_factory.mktemp("rows") / "run")


def test_each_visit_of_each_step_is_recorded_with_the_loss_of_the_row(recorded: Result) -> None:
    visits = read_visits(recorded.path / "visits.bin")
    steps = events(recorded, "step")
    assert visits.damaged == 0
    for step in steps:
        of_step = visits.steps == step["step"]
        assert of_step.sum() == step["rows"]
        assert visits.losses[of_step].min() <= step["loss"] <= visits.losses[of_step].max()
    (refit,) = events(recorded, "refit")
    assert len(np.unique(visits.rows[visits.steps <= refit["step"]])) == 36  # without the held-out rows
    assert visits.steps.max() == refit["num_steps"] > refit["step"]


def test_the_losses_of_the_first_step_are_those_of_the_base(
    tiny: list[str], recorded: Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = []
    make = run_module.make_context
    monkeypatch.setattr(run_module, "make_context", lambda *rest: jobs.append(make(*rest)) or jobs[-1])
    tiny_run([*tiny, *WORDS], tmp_path / "run", "train.max_steps=1", "train.refit=false")
    (job,) = jobs
    visits = read_visits(recorded.path / "visits.bin")
    first = visits.steps == 1
    numbers = job.rows.numbers.tolist()
    with evaluating(job.network), disable_adapter(job.network):
        for number, loss, end in zip(
            visits.rows[first], visits.losses[first], visits.ends[first], strict=True
        ):
            each = pack_losses(job.network, build_pack([job.rows.row(numbers.index(number))]))[1].detach()
            assert loss == pytest.approx(float(each.mean()), rel=1e-3)
            assert end == pytest.approx(float(each[-1]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("step", [3, 10])
def test_a_resumed_run_has_the_same_record(
    tiny: list[str], recorded: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        stopped = tiny_run([*tiny, *WORDS], tmp_path / "run", "train.micro_batch_tokens=32")
    file = stopped.path / "visits.bin"
    file.write_bytes(file.read_bytes() + b"of a step that no checkpoint has")
    assert digest(resume_run(stopped.path, quiet=True)) == digest(recorded)
    again, whole = read_visits(file), read_visits(recorded.path / "visits.bin")
    np.testing.assert_array_equal(again.rows, whole.rows)
    np.testing.assert_array_equal(again.steps, whole.steps)
    np.testing.assert_allclose(again.losses, whole.losses, rtol=2e-3)  # a half has eleven bits


def test_a_record_that_lost_steps_is_said(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(4, patch)
        stopped = tiny_run([*tiny, *WORDS], tmp_path / "run")
    (stopped.path / "visits.bin").write_bytes((stopped.path / "visits.bin").read_bytes()[:-3])
    resumed = resume_run(stopped.path, quiet=True)
    texts = [event["text"] for event in events(resumed, "note")]
    assert "visits.bin has no losses of rows from step 4 to 4" in texts


def test_the_list_names_rows_whose_ids_drop_them(
    tiny: list[str], recorded: Result, tmp_path: Path, cli: Cli
) -> None:
    summary, *rows = map(json.loads, cli("rows", recorded.path, "--top", 3, "--json").out.splitlines())
    (refit,) = events(recorded, "refit")
    visits = read_visits(recorded.path / "visits.bin")
    second = np.unique(visits.rows[visits.steps > refit["step"]])  # the first phase was of another adapter
    assert summary["rows"] == sum(count for kind, count in summary.items() if kind != "rows") == len(second)
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert all(row["answer"].startswith("It is ") for row in rows)
    listed = cli("rows", recorded.path, "--top", 3, "--ids").out
    assert listed.split() == [row["id"] for row in rows]
    (tmp_path / "ids.txt").write_text(listed)
    words = ["data.holdout=0", "train.max_steps=7"]
    fewer = tiny_run([*tiny, *words], tmp_path / "run", f"data.drop_rows={tmp_path / 'ids.txt'}")
    ledger = json.loads((fewer.path / "ledger.json").read_text())
    dropped = ledger["dropped"]["named in data.drop_rows"]
    assert sorted(dropped["first"]) == sorted(row["row"] - 1 for row in rows)
    assert ledger["trained"]["rows"] == 37
    visited = read_visits(fewer.path / "visits.bin").rows
    assert not {*dropped["first"]} & {*visited.tolist()}
    assert len(np.unique(visited)) == 37


def test_ids_of_no_row_and_lines_without_an_id_are_named(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("0123456789abcdef\n\nrow 17\nrow 18\n")
    with pytest.raises(DataError, match="no id of a row stands in 2 lines: 3, 4"):
        tiny_run(tiny, tmp_path / "run", f"data.drop_rows={tmp_path / 'ids.txt'}")
    run = tiny_run(tiny, tmp_path / "run", "data.drop_rows=0123456789abcdef", "train.max_steps=1")
    texts = [event["text"] for event in events(run, "note")]
    assert any("1 of 1 ids are of no row of the data: data.drop_rows" in text for text in texts)
    assert load_config(run.path / "config.yaml").data.drop_rows == ("0123456789abcdef",)

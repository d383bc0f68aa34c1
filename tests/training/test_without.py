"""`lorafit without` ends in the bytes of a run that never had the rows, and resumes where that is possible."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
from pathlib import Path

import pytest
from tests.command import Cli
from tests.runs import digest, events, tiny_run

from lorafit.config.load import load_config
from lorafit.data.build import row_order
from lorafit.errors import RunError
from lorafit.report.rows_of_run import data_of
from lorafit.run_dir import RunDirectory
from lorafit.training.run import Result
from lorafit.training.without import plan_removal, train_without

WORDS = [
    "data.order=hash",
    "train.max_steps=7",
    "train.save_every=1",
    "train.keep=9",
    "lora.dropout=0.1",
    "data.holdout=4",
]
CASES = int(os.environ.get("WITHOUT_CASES", "2"))


def data_path(settings: list[str]) -> Path:
    return next(Path(word.partition("=")[2]) for word in settings if word.startswith("data.path="))


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return tiny_run([*tiny, *WORDS], tmp_path_factory.mktemp("without") / "run")


@pytest.mark.parametrize("case", range(CASES))
def test_the_bytes_are_those_of_a_run_that_never_had_the_rows(
    tiny: list[str], whole: Result, tmp_path: Path, case: int
) -> None:
    """The other run reads a file without the rows, so nothing of them can be in it but their empty places."""
    random_ = random.Random(case)
    run = RunDirectory.open(whole.path)
    data = data_of(run, quiet=True)
    late = data.training.numbers[data.training.numbers % 2 == case % 2].tolist()
    removed = random_.sample(late, random_.randint(1, 7))
    removal = plan_removal(run, data, removed)
    result = train_without(run, removal, tmp_path / "less", quiet=True)
    rows = json.loads(data_path(tiny).read_text())
    (tmp_path / "rows.json").write_text(
        json.dumps([row for number, row in enumerate(rows) if number not in removed])
    )
    words = [
        *tiny,
        *WORDS,
        f"data.path={tmp_path / 'rows.json'}",
        f"data.drop_rows={json.dumps(removal.ids)}",
    ]
    never = tiny_run(words, tmp_path / "never")
    assert digest(result) == digest(never) != digest(whole)
    assert result.heldout_loss == never.heldout_loss


def test_it_resumes_from_the_last_checkpoint_that_has_not_seen_the_rows(
    whole: Result, tmp_path: Path, cli: Cli
) -> None:
    run = RunDirectory.open(whole.path)
    data = data_of(run, quiet=True)
    order = row_order(run.config(), data)
    last = int(data.training.numbers[order.rows(5)[0]])
    removal = plan_removal(run, data, [last])
    assert (removal.untouched, removal.checkpoint) == (5, 5)
    first = int(data.training.numbers[order.rows(0)[0]])
    assert plan_removal(run, data, [first, last]).checkpoint is None
    (tmp_path / "ids.txt").write_text("\n".join(removal.ids))
    words = ("--ids", tmp_path / "ids.txt", "--output", tmp_path / "less", "--json")
    told = json.loads(cli("without", whole.path, *words).out)
    assert (told["from_step"], told["ids"]) == (5, [*removal.ids])
    assert [event["rows"] for event in events(tmp_path / "less", "step")] == [6, 6, 6, 6, 6, 5, 6]
    held = int(data.heldout.numbers[0])
    assert plan_removal(run, data, [held]).untouched == 6


def test_it_says_what_a_run_from_the_start_costs(whole: Result, tmp_path: Path, cli: Cli) -> None:
    rows = ",".join(map(str, range(1, 39)))
    done = cli("without", whole.path, "--rows", rows, "--output", tmp_path / "less")
    assert done.code == 2
    assert "no checkpoint before it is kept: from the start it takes 7 steps" in done.err
    assert "--from-start" in done.err
    assert not (tmp_path / "less").exists()
    done = cli("without", whole.path, "--rows", "99")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: there is no row 99")
    done = cli("without", whole.path, "--rows", "3-1")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: `3-1` names no row")
    assert cli("without", whole.path).code == 2


def test_of_equal_rows_the_last_one_is_removed_and_its_steps_decide(tiny: list[str], tmp_path: Path) -> None:
    rows = json.loads(data_path(tiny).read_text())
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[3], rows[3]]))
    result = tiny_run(
        [*tiny, *WORDS, "data.holdout=0"], tmp_path / "run", f"data.path={tmp_path / 'rows.json'}"
    )
    run = RunDirectory.open(result.path)
    data = data_of(run, quiet=True)
    order = row_order(run.config(), data)
    first = [min(step for step in range(7) if number in order.rows(step)) for number in (3, 40, 41)]
    for removed, step in (([3], first[2]), ([3, 40], min(first[1:])), ([3, 40, 41], min(first))):
        removal = plan_removal(run, data, removed)
        assert removal.untouched == step
        assert len({one.partition(".")[0] for one in removal.ids}) == 1
    assert [one.partition(".")[2] for one in removal.ids] == ["", "2", "3"]


def test_a_step_whose_rows_are_all_left_out_is_measured_and_saved(
    tiny: list[str], whole: Result, tmp_path: Path
) -> None:
    run = RunDirectory.open(whole.path)
    data = data_of(run, quiet=True)
    numbers = data.training.numbers[row_order(run.config(), data).rows(2)].tolist()
    removal = plan_removal(run, data, numbers)
    words = [*tiny, *WORDS, f"data.drop_rows={json.dumps(removal.ids)}", "train.eval_every=1"]
    less = tiny_run(words, tmp_path / "less")
    assert [event["step"] for event in events(less, "step")] == [1, 2, 4, 5, 6, 7]
    assert [event["step"] for event in events(less, "heldout")] == [1, 2, 3, 4, 5, 6, 7]
    assert events(less, "heldout")[1]["loss"] == events(less, "heldout")[2]["loss"]
    assert RunDirectory.open(less.path).saved_steps() == [1, 2, 3, 4, 5, 6, 7]
    assert {event["epoch"] for event in events(less, "step")} <= {e["epoch"] for e in events(whole, "step")}


@pytest.mark.parametrize(
    ("words", "why"), [(["data.order=null"], "the places of all rows"), (["train.budget=2h"], "a clock")]
)
def test_of_another_run_it_says_what_a_run_from_the_start_costs_and_how_to_start_it(
    tiny: list[str], whole: Result, tmp_path: Path, cli: Cli, words: list[str], why: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole.path, run)
    load = load_config(run / "config.yaml", [*words, *(["train.max_steps=null"] if "2h" in words[0] else [])])
    RunDirectory(run).write_config(load)
    data, source = data_of(RunDirectory.open(whole.path), quiet=True), RunDirectory.open(run)
    with pytest.raises(RunError, match=f"{why}.*begins at the start: 7 steps") as told:
        plan_removal(source, data, [1])
    command = shlex.split(told.value.problems[0].hint)
    if words == ["data.order=null"]:
        assert cli(*command[1:]).code == 0
        assert RunDirectory.open(f"{run}-without").config().data.order == "hash"
        assert json.loads((tmp_path / "run-without" / "ledger.json").read_text())["trained"]["rows"] == 35

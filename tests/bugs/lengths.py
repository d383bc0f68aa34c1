"""Rows that are too long, and the last rows: each is trained, truncated or dropped, and counted (bugs 15, 16, 17)."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from typing import Any

import pytest
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant

from lorafit.errors import DataError
from lorafit.training.run import Result, start_run

ROWS = [
    {"instruction": "Short?", "output": "yes"},
    {"instruction": "Long " * 20, "output": "never reached"},  # the answer begins after token 100
    {"instruction": "Cut?", "output": "on and on " * 20},
]


def _ledger(result: Result) -> Any:
    return json.loads((result.path / "ledger.json").read_text())


@probe(
    15, Plant("data.token_dataset:_Writer._fit", "if not outcome.is_supervised:", "if not outcome.trained:")
)
def a_row_without_an_answer_after_truncation_is_dropped_and_listed(lab: Lab) -> None:
    """The prompt fills the maximum length: the row is dropped and listed by number, and no step contains it."""
    lab.watch()
    cut = ("data.max_length=80", "data.too_long=truncate", "train.epochs=1", "train.batch_size=1")
    result = lab.run(f"data.path={lab.rows(ROWS)}", *cut, "train.max_steps=2")
    [(reason, dropped)] = _ledger(result)["dropped"].items() or [("", {"first": []})]
    assert "nothing to train on" in reason
    assert dropped == {"rows": 1, "first": [1]}
    assert Counter(chain(*lab.rows_seen)) == {0: 1, 1: 1}, "the two remaining rows"


@probe(
    16,
    Plant(
        "data.token_dataset:_Writer._fit", 'self._renderer.contract.too_long in ("error", "split")', "False"
    ),
    Plant(
        "data.token_dataset:_Writer._fit", "return outcome, length - len(outcome.ids)", "return outcome, 0"
    ),
    Plant(
        "data.token_dataset:_Writer._fit", 'self._drop(row.number, f"longer than {longest} tokens")', "pass"
    ),
)
def truncation_is_explicit_and_counted(lab: Lab) -> None:
    """By default, rows that are too long are an error with their numbers. Truncated and dropped tokens are counted."""
    rows = f"data.path={lab.rows(ROWS)}"
    try:
        start_run(lab.config(rows, "data.max_length=80", name="default"), quiet=True)
    except DataError as error:
        places = [problem.place for problem in error.problems]
        assert [place.rpartition(" ")[2] for place in places[0].split("; ")] == ["2", "3"], places
    else:
        raise AssertionError("rows were truncated by default")

    kept = lab.run(rows, "data.too_long=truncate", "data.max_length=80", name="cut")
    whole = lab.run(rows, "data.max_length=256", name="whole")
    cut, full = _ledger(kept)["trained"], _ledger(whole)["trained"]
    assert cut["truncated"] > 0
    lost = 7 + len(ROWS[1]["instruction"]) + len(ROWS[1]["output"])
    assert cut["trained"] + cut["masked"] == 80 + _tokens(ROWS[0])
    assert (
        cut["total"] == full["total"] - _tokens(ROWS[1]) == cut["trained"] + cut["masked"] + cut["truncated"]
    )
    assert lost < _tokens(ROWS[1])

    dropped = _ledger(lab.run(rows, "data.too_long=drop", "data.max_length=80", name="drop"))
    assert [entry["first"] for entry in dropped["dropped"].values()] == [[1, 2]]


def _tokens(row: dict[str, str]) -> int:
    """Tokens of a row in the tiny model's template: one for each of the two names, EOS and BOS."""
    return len(row["instruction"]) + len(row["output"]) + len("\n\n\n\n") + 2 + 2 + 1


@probe(
    17,
    Plant("data.row_order:RowOrder.steps_per_epoch", "math.ceil", "math.floor"),
    Plant(
        "data.packing:Packer.packs", "for members in bins\n", "for members in bins[: max(1, len(bins) - 1)]\n"
    ),
)
def every_row_is_trained_once_per_epoch(lab: Lab) -> None:
    """Twenty rows in steps of six, three epochs: each row three times, and the number of targets of the ledger."""
    lab.watch()
    rows = f"data.path={lab.rows(20, 'twenty.json')}"
    config = lab.config(rows, "train.epochs=3", "train.micro_batch_tokens=200")
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": None})})
    result = start_run(config, quiet=True)
    assert Counter(chain(*lab.rows_seen)) == dict.fromkeys(range(20), 3)
    from tests.bugs.lab import events

    steps = events(result, "step")
    assert sum(step["supervised_tokens"] for step in steps) == 3 * _ledger(result)["trained"]["trained"]
    with pytest.raises(AssertionError, match="refuses"):
        lab.run(rows, "data.max_length=8", name="nothing")

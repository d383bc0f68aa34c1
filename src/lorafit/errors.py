"""The errors of lorafit. Each carries all problems: what is wrong, where it is, and what to do.

LorafitError                     the user can fix it; the command line exits with 2
  + ConfigError (ValueError)     a recipe, override or flag
  + DataError (ValueError)       rows
  + ModelError (ValueError)      a model, tokenizer or adapter
  + RunError (RuntimeError)      a run directory or checkpoint
  + TrainingError (ArithmeticError)  a step that must not change the weights
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafit.redact import one_line

Outcome = Literal["pass", "warn", "fail"]
SLIP = (
    0.7  # likeness from which one name may be a slip in another: `rnak` and `rank`, but not `loss` and `eos`
)
MAX_LISTED = 1000  # row numbers that the result of a check lists, and results that an error becomes


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    `place` is a file, line, row or key (`alpaca.json row 17`, `recipe.yaml:4`), `hint` what to do. Both may be empty.
    """

    message: str
    place: str = ""
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"error: {one_line(self.message)}"]
        if self.place:
            lines.append(f"   at: {one_line(self.place)}")
        if self.hint:
            lines.append(f" hint: {one_line(self.hint)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check, as `check.json` stores it.

    `place` is a file with its rows, or a key; `hint` what to do; both may be empty. `rows` are the numbers of the
    first rows concerned, from 1, over all files.
    """

    name: str
    verdict: Outcome
    message: str
    place: str = ""
    hint: str = ""
    rows: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Message, place and hint in one sentence."""
        place = f" ({self.place})" if self.place else ""
        hint = f": {self.hint}" if self.hint else ""
        return one_line(f"{self.message}{place}{hint}")

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, safe to show and to store."""
        texts = {key: one_line(getattr(self, key)) for key in ("message", "place", "hint")}
        return {**asdict(self), **texts, "rows": list(self.rows)}


class LorafitError(Exception):
    """An error that the user can fix. It carries all problems, not only the first.

    `exit_code` is the exit code of the command line: 2 for the user's error, 1 for a bug.
    """

    exit_code = 2

    def __init__(self, message: str, *, place: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message, place, hint),)
        self.num_more = 0

    @classmethod
    def of(cls, problems: Iterable[Problem], num_more: int = 0) -> LorafitError:
        """The error with all `problems` (at least one), each once, and `num_more` of which only the number is known."""
        kept = tuple(dict.fromkeys(problems))
        assert kept, "an error needs a problem"
        count = len(kept) + num_more
        error = cls(kept[0].message if count == 1 else f"{count:,} problems")
        error.problems, error.num_more = kept, num_more
        return error

    def __str__(self) -> str:
        return report(self.problems, num_more=self.num_more)

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the problems. IPython calls it, and `%debug` still has the traceback."""
        return str(self).split("\n")


class ConfigError(LorafitError, ValueError):
    """A recipe, override or flag that cannot be used."""


class DataError(LorafitError, ValueError):
    """Rows that cannot be read, rendered or trained on."""


class ModelError(LorafitError, ValueError):
    """A model, tokenizer or adapter that cannot be found, read or used."""


class RunError(LorafitError, RuntimeError):
    """A run directory or checkpoint that cannot be written, read or resumed."""


class TrainingError(LorafitError, ArithmeticError):
    """A step that must not change the weights: a non-finite loss or gradient, or no supervised tokens."""


class Problems:
    """A collector of problems: the first `MAX_KEPT` are kept, all are counted."""

    MAX_KEPT = 1000

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.num_more = 0

    def __bool__(self) -> bool:
        return bool(self.kept)

    def add(self, problems: Iterable[Problem], num_more: int = 0) -> None:
        """Add `problems`, and `num_more` of which only the number is known."""
        for problem in problems:
            if len(self.kept) < self.MAX_KEPT:
                self.kept.append(problem)
            else:
                self.num_more += 1
        self.num_more += num_more


def similar(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Up to `most` of `known` that look like a slip in `name`, the nearest first. Case and file endings are ignored."""

    def stem(text: str) -> str:
        return text.lower().rpartition(".")[0] or text.lower()

    def likeness(one: str) -> float:
        compared = difflib.SequenceMatcher(None, stem(one), stem(name))
        return compared.ratio() if compared.quick_ratio() >= SLIP else 0.0

    likely = sorted(((likeness(one), one) for one in known), reverse=True)
    return [one for how, one in likely[:most] if how >= SLIP]


def several(names: Sequence[str], most: int = 3) -> str:
    """The first of `names` in a sentence, and how many more there are."""
    listed = ", ".join(f"`{name}`" for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most:,} more"


def report(problems: Sequence[Problem], limit: int = 50, num_more: int = 0) -> str:
    """All problems as text, one block each; those beyond `limit` and `num_more` are only counted."""
    blocks = [str(problem) for problem in problems[:limit]]
    if rest := max(len(problems) - limit, 0) + num_more:
        blocks.append(f"... and {rest:,} more problems")
    return "\n".join(blocks)

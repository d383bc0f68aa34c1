"""Rows of every dataset format as one small set of types; wrong rows become problems, all at once.

This file knows no data files (see sources), no templates and no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from pydantic_core import to_json

from lorafit.data.content import Call, Chat, Completion, Content, Instruction, Message, Preference, Role, Text
from lorafit.data.preference_rows import preference
from lorafit.data.row_fields import CONVERSATIONS, SYSTEM, TURN_LISTS, Fields, is_empty, kind, undecodable
from lorafit.data.turns import as_messages, conversation, finished, prompt_and_completion, question
from lorafit.errors import DataError, Problem

__all__ = [
    "FORMATS", "Call", "Chat", "Completion", "Content", "Detected", "Fields", "Format", "Instruction", "Message",
    "Preference", "Role", "Row", "Text", "as_messages", "detect", "parse", "question", "undecodable",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number over all files (from 0), its place for messages, and its texts.

    `weight` is the factor of its loss. `aliases` are the keys that were read as others, `unused` those
    that were not read.
    """

    number: int
    place: str
    content: Content
    weight: float = 1.0
    aliases: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def hash(self) -> int:
        """64 bits that are equal for rows with equal texts and weights, whatever their file, keys and place."""
        content = to_json([type(self.content).__name__, self.content, self.weight])
        return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Detected:
    """A format, and the reason for it as a sentence for the user."""

    format: str
    reason: str


def detect(first_rows: Sequence[object]) -> Detected:
    """The format that most of `first_rows` fit, the earlier of FORMATS where two fit equally.

    `parse` reports the rows that do not fit. Raises DataError when no format fits half of them.
    """
    keys_of_rows = [
        {str(key) for key, value in row.items() if key not in TURN_LISTS or isinstance(value, list)}
        for row in first_rows
        if isinstance(row, Mapping)
    ]
    fits = {name: sum(map(known.fits, keys_of_rows)) for name, known in FORMATS.items()}
    best = max(FORMATS, key=lambda name: fits[name])
    if not first_rows or 2 * fits[best] < len(first_rows):
        raise DataError.of([_nothing_fits(keys_of_rows)])
    needs = " and ".join(
        f"`{next((key for key in choice if any(key in keys for keys in keys_of_rows)), choice[0])}`"
        for choice in FORMATS[best].needs
    )
    if fits[best] == len(first_rows):
        return Detected(best, f"every row has {needs}")
    return Detected(best, f"{fits[best]} of the first {len(first_rows)} rows have {needs}")


def _nothing_fits(keys_of_rows: Sequence[set[str]]) -> Problem:
    keys = sorted(set().union(*keys_of_rows))
    named = ", ".join(f"`{key[:40]}`" for key in keys[:20]) + (", ..." if len(keys) > 20 else "")
    have = f"the rows have {named}" if keys else "no row is an object with keys"
    needs = "; ".join(
        f"{name} needs " + " and ".join(" or ".join(f"`{key}`" for key in choice) for choice in known.needs)
        for name, known in FORMATS.items()
    )
    return Problem(f"no format fits: {have}", hint=f"rename the fields to those of one format: {needs}")


def parse(
    raw_rows: Sequence[object],
    format: str,  # noqa: A002 (the name of the setting)
    places: Sequence[str],
    start: int = 0,
) -> list[Row]:
    """`raw_rows` as rows of `format`, numbered from `start`; `places[i]` is where row i is found.

    Raises DataError with a problem for every wrong field of every row.
    """
    read = FORMATS[format].read
    problems: list[Problem] = []
    rows: list[Row] = []
    for number, (raw, place) in enumerate(zip(raw_rows, places, strict=True), start):
        if isinstance(raw, dict):
            fields, before = Fields(raw, place, problems), len(problems)
            content, weight = read(fields), fields.weight()
            if len(problems) == before:
                fields.finish()
            rows.append(Row(number, place, content, weight, tuple(fields.aliases), tuple(fields.unused)))
        else:
            hint = f"each row must be an object with the fields of the {format} format"
            problems.append(Problem(f"the row is {kind(raw)}, not an object", place, hint))
    if problems:
        raise DataError.of(problems)
    return rows


def _alpaca(row: Fields) -> Content:
    # An empty answer is not wrong in itself: the original Alpaca has some, and whole-text training uses them.
    content = Instruction(
        row.filled("instruction"), row.optional("input"), row.required("output"), row.one_of(SYSTEM)
    )
    if is_empty(row.raw.get("history")):
        return content
    pairs = row.get("history")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        row.wrong("history", "is not a list of pairs", 'write it as [["question", "answer"], ...]')
        return content
    earlier: list[Message | None] = []
    for prompt, answer in pairs:
        earlier += [Message("user", prompt), Message("assistant", answer)]
    return finished(row, "history", [*earlier, *content.turns()[bool(content.system) :]])


def _completion(row: Fields) -> Content:
    values = {field: row.raw.get(field) for field in ("prompt", "completion")}
    lists = [field for field, value in values.items() if isinstance(value, list)]
    if len(lists) == 2:
        return prompt_and_completion(row)
    if lists and all(isinstance(value, str | list) for value in values.values()):
        [text] = values.keys() - set(lists)
        hint = "write both as text, or both as lists of turns"
        row.wrong(text, f"is text, but `{lists[0]}` is a list of turns", hint)
        return Completion("", "")
    return Completion(row.required("prompt"), row.filled("completion"))


@dataclass(frozen=True, slots=True)
class Format:
    """One row format: `needs` are the keys of a row, each a choice of names; `read` makes the `content` of a row."""

    needs: tuple[tuple[str, ...], ...]
    content: type[Content]
    read: Callable[[Fields], Content]

    def fits(self, keys: set[str]) -> bool:
        """Whether a row with `keys` has all that the format needs."""
        return all(any(key in keys for key in choice) for choice in self.needs)


_SHAREGPT = ("conversations", "conversation")
# By the name in `data.format`; an entry here is all that detection, training and checks need of a new format.
FORMATS: dict[str, Format] = {
    "alpaca": Format((("instruction",), ("output",)), Instruction, _alpaca),
    "messages": Format(
        (("messages", *TURN_LISTS),),
        Chat,
        lambda row: conversation(row, row.first(CONVERSATIONS)),
    ),
    "sharegpt": Format(
        (_SHAREGPT,), Chat, lambda row: conversation(row, row.first((*_SHAREGPT, *CONVERSATIONS)))
    ),
    "completion": Format((("prompt",), ("completion",)), Completion, _completion),
    "text": Format((("text",),), Text, lambda row: Text(row.filled("text"))),
    "preference": Format((("chosen",), ("rejected",)), Preference, preference),
}

"""The rows of a JSON file of any size and layout, decoded one by one from a window that moves over the text.

A value that the decoder cannot read is decoded again with more text, until the value is whole or the fault is too far
from the end of the window to come from the cut. A row with a key twice in an object comes as RepeatedKeyError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TextIO

from lorafit.data.columns import are_turns, is_row
from lorafit.data.strict_json import DECODER, MARKING_DECODER, RepeatedKeyError, mark_in
from lorafit.errors import DataError

BLOCK = 1 << 20  # characters read at a time
MAX_OBJECT = 1 << 24  # characters up to which an object at the top is decoded whole
MAX_ROW = 1 << 25  # characters of a row: far more than any model reads
_SNIFFED = 5  # lines that show whether each line is a row
KEEP_ONE = "keep one of the two"
_CUT = 64  # a fault from the cut is at most that far from the end, except for strings without an end
_BLANKS = re.compile(r"[ \t\n\r]*")


def too_long(place: str) -> DataError:
    """The error for a row of more than MAX_ROW characters."""
    hint = "remove the row, or cut it into several"
    return DataError(f"a row has more than {MAX_ROW:,} characters", place=place, hint=hint)


class _TooLongError(Exception):
    """A value is longer than the limit."""


def has_row_lines(text: TextIO) -> bool:
    """Whether each line of `text` is a row: of its first lines one is a whole object, and it is not the only line.

    Lines that are texts in quotes are rows too: prompts.
    """
    lines = (line for line in iter(lambda: text.readline(MAX_OBJECT), "") if not line.isspace())
    first = next(lines, "")
    if first.lstrip().startswith("["):
        return False
    second = next(lines, "")
    if not second or _is_whole(first, ("{", '"')):
        return bool(second)
    return any(_is_whole(line, ("{",)) for line in (second, *(next(lines, "") for _ in range(_SNIFFED - 2))))


def line_value(line: str) -> object:
    """The value of a line, which may end in a comma. Raises ValueError or RecursionError."""
    bare = line.strip(" \t\n\r")
    try:
        return DECODER.decode(bare)
    except RepeatedKeyError:
        raise
    except ValueError:
        if bare.endswith(","):
            return DECODER.decode(bare[:-1])
        raise


def _is_whole(line: str, beginnings: tuple[str, ...]) -> bool:
    """Whether a line is a whole value with one of `beginnings`. A line of an indented object begins with a blank."""
    if not line.startswith(beginnings):
        return False
    try:
        line_value(line)
    except RepeatedKeyError:
        return True
    except (ValueError, RecursionError):
        return False
    return True


def json_rows(text: TextIO, name: str) -> Iterator[tuple[int, object]]:
    """(line, value) of each row in `text`; the line is 0 where it is not known.

    The rows are the elements of an array, objects one after the other, or what `rows_of_object` finds in a single
    object. Raises DataError.
    """
    window = _Window(text, name)
    if window.peek() == "[":
        yield from ((0, value) for value in window.elements())
        window.end()
        return
    line = window.line()
    try:
        value = window.value(MAX_OBJECT)
    except _TooLongError:
        yield from ((0, value) for value in _long_object(window))
        window.end()
        return
    error = window.repeated
    if not window.follows():
        window.end()
        items = rows_of_object(value, name) if isinstance(value, dict) else [value]
        errors = [mark_in(item) if error else None for item in items]
        if error and not any(errors):
            raise DataError(str(error), place=name, hint=KEEP_ONE)
        for item, fault in zip(items, errors, strict=True):
            yield line if item is value else 0, fault or item
        return
    yield line, error or value
    while window.follows():
        line = window.line()
        yield line, window.row()
    window.end()


def rows_of_object(value: Mapping[str, object], name: str) -> list[object]:
    """The rows in the only object of a file: a table by columns, a list of rows under a key, or the object itself.

    Raises DataError where the object has several lists of rows.
    """
    if not any(map(are_turns, value.values())) and (rows := _table(value)) is not None:
        return rows
    if is_row(value):
        return [value]
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    of_rows = {
        key: item for key, item in lists.items() if len(value) == 1 or (item and isinstance(item[0], dict))
    }
    if len(of_rows) == 1:
        return next(iter(of_rows.values()))
    if of_rows:
        raise _no_list(
            name, f": it has several lists, {', '.join(f'`{key[:40]}`' for key in list(of_rows)[:9])}"
        )
    return [value]


def _table(value: Mapping[str, object]) -> list[object] | None:
    """The rows of a table that is written by columns or by its index, as pandas and `datasets` do; None for others."""
    items = list(value.values())
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list):  # orient="split"
        if all(isinstance(row, list) and len(row) == len(columns) for row in data):
            return [dict(zip(map(str, columns), row, strict=True)) for row in data]
        return None
    lists = [item for item in items if isinstance(item, list)]
    if lists and len(lists) == len(items):  # {"a": [1, 2], "b": [3, 4]}
        are_rows = all(item and isinstance(item[0], dict) for item in lists)
        is_table = lists[0] and not are_rows and len({len(item) for item in lists}) == 1
        return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)] if is_table else None
    inner = [item for item in items if isinstance(item, dict)]
    if not inner or len(inner) < len(items) or any(item.keys() != inner[0].keys() for item in inner):
        return None
    if inner[0] and all(key.isdigit() for key in inner[0]):  # {"a": {"0": 1, "1": 2}}
        return [{key: item[index] for key, item in zip(value, inner, strict=True)} for index in inner[0]]
    return list(inner) if all(key.isdigit() for key in value) else None  # {"0": {"a": 1}, "1": {"a": 2}}


def _long_object(window: _Window) -> Iterator[object]:
    """The elements of the only list among the values of the object at the window."""
    has_list = False
    keys = set[object]()
    window.position += 1
    while window.peek() == '"':
        key = window.value()
        if key in keys:
            raise DataError(str(RepeatedKeyError(str(key))), place=window.name, hint=KEEP_ONE)
        keys.add(key)
        if window.peek() != ":":
            raise window.fault("Expecting ':' delimiter")
        window.position += 1
        if window.peek() != "[":
            window.value()
        elif has_list:
            raise _no_list(window.name, "")
        else:
            has_list = True
            yield from window.elements()
        sign = window.peek()
        if sign not in (",", "}"):
            raise window.fault("Expecting ',' delimiter")
        window.position += 1
        if sign == "}":
            if not has_list:
                raise _no_list(window.name, "")
            return
    raise window.fault("Expecting property name enclosed in double quotes")


def _no_list(name: str, why: str) -> DataError:
    """The error for a file without rows, or with rows in two places."""
    hint = 'write [{...}, {...}], or one object per line; pandas: to_json(FILE, orient="records", lines=True)'
    return DataError(f"is not a list of rows{why}", place=name, hint=hint)


class _Window:
    """The part of the text that is not decoded yet; `position` is where decoding goes on."""

    def __init__(self, source: TextIO, name: str) -> None:
        self.name, self._source = name, source
        self._text, self.position = "", 0
        self._column = 1  # of the first character of the window
        self._line, self._counted = 1, 0  # the line ends before `_counted` are counted in `_line`
        self.repeated: RepeatedKeyError | None = None  # in the last value

    def peek(self) -> str:
        """The character after blanks, "" at the end of the text."""
        while True:
            blanks = _BLANKS.match(self._text, self.position)
            assert blanks is not None
            self.position = blanks.end()
            if self.position < len(self._text) or not self._more():
                return self._text[self.position : self.position + 1]

    def follows(self) -> bool:
        """Whether another object follows, with or without a comma before it."""
        if self.peek() == ",":
            self.position += 1
            return self.peek() != ""
        return self.peek() == "{"

    def value(self, longest: int | None = None) -> object:
        """The value after blanks; _TooLongError, with nothing lost, if it may have over `longest` characters."""
        self.peek()
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                near_end = error.pos + _CUT >= len(self._text) or error.msg.startswith("Unterminated string")
                long = longest is not None and len(self._text) - self.position > longest
                if near_end and long:
                    raise _TooLongError from None
                if near_end and len(self._text) - self.position > MAX_ROW:
                    raise too_long(f"{self.name} line {self.line()}") from None
                if not near_end or not self._more():
                    raise self.fault(error.msg, error.pos) from None
                continue
            except (RecursionError, ValueError) as error:
                hint = "flatten or split the file"
                raise DataError(f"is not usable JSON: {error}", place=self.name, hint=hint) from None
            if end + len("e+") >= len(self._text) and self._more():  # a number may continue
                continue
            self.position = end
            return value

    def row(self) -> object:
        """The value after blanks, or the error where it has a key twice."""
        value = self.value()
        return self.repeated or value

    def _decode(self) -> tuple[object, int]:
        self.repeated = None
        try:
            return DECODER.raw_decode(self._text, self.position)
        except RepeatedKeyError as error:
            self.repeated = error
            return MARKING_DECODER.raw_decode(self._text, self.position)

    def elements(self) -> Iterator[object]:
        """The elements of the array that begins at `position`."""
        self.position += 1
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            yield self.row()
            sign = self.peek()
            if sign not in (",", "]"):
                raise self.fault("Expecting ',' delimiter")
            self.position += 1
            if sign == "]":
                return

    def end(self) -> None:
        """Raise DataError if anything but blanks follows."""
        if self.peek():
            raise self.fault("Extra data")

    def line(self, index: int | None = None) -> int:
        """The line (from 1) of the character at `index`, which is never before an earlier one, or at `position`."""
        index = self.position if index is None else index
        self._line += self._text.count("\n", self._counted, index)
        self._counted = max(self._counted, index)
        return self._line

    def fault(self, message: str, index: int | None = None) -> DataError:
        """The error for a fault at `index`, or at `position`."""
        index = self.position if index is None else index
        before = self._text.rfind("\n", 0, index)
        column = index - before if before >= 0 else self._column + index
        place = f"{self.name} line {self.line(index)} column {column}"
        return DataError(f"is not JSON: {message}", place=place, hint="correct the syntax there")

    def _more(self) -> bool:
        """Read more text and drop what is decoded; False at the end of the text, with nothing changed."""
        unfinished = len(self._text) - self.position
        block = self._source.read(max(BLOCK, unfinished))  # at least doubles an unfinished value
        if not block:
            return False
        last = self._text.rfind("\n", 0, self.position)
        self._column = self.position - last if last >= 0 else self._column + self.position
        self.line()
        self._text, self.position, self._counted = self._text[self.position :] + block, 0, 0
        return True

"""The rows of a JSON file of any size, decoded one by one from a window that moves over the text.

The decoder is that of `json`. A value that it cannot read is decoded again with more text, until the value is whole or
the fault is too far from the end of the window to come from the cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TextIO

from lorafit.errors import DataError

BLOCK = 1 << 20  # characters read at a time
MAX_OBJECT = 1 << 24  # characters up to which an object at the top is decoded whole
MAX_ROW = 1 << 25  # characters of a row: far more than any model reads
_CUT = 64  # a fault from the cut is at most that far from the end, except for strings without an end
_BLANKS = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def too_long(place: str) -> DataError:
    """The error for a row of more than MAX_ROW characters."""
    hint = "remove the row, or cut it into several"
    return DataError(f"a row has more than {MAX_ROW:,} characters", place=place, hint=hint)


class SeveralValuesError(Exception):
    """The text has one value after another, as JSON lines."""


class _TooLongError(Exception):
    """A value is longer than the limit."""


def json_rows(text: TextIO, name: str) -> Iterator[object]:
    """The elements of the array in `text`, or of the only list among the values of an object.

    Raises DataError, and SeveralValuesError, before the first row, where lines follow the first value.
    """
    window = _Window(text, name)
    if window.peek() == "[":
        yield from window.elements()
    else:
        try:
            value = window.value(MAX_OBJECT)
        except _TooLongError:
            yield from _long_object(window)
        else:
            if window.peek() and window.line() > 1:
                raise SeveralValuesError
            items = value.values() if isinstance(value, dict) else ()
            lists = [item for item in items if isinstance(item, list)]
            window.end()
            if len(lists) != 1:
                raise window.no_list()
            yield from lists[0]
            return
    window.end()


def _long_object(window: _Window) -> Iterator[object]:
    """The elements of the only list among the values of the object at the window."""
    has_list = False
    window.position += 1
    while window.peek() == '"':
        window.value()
        if window.peek() != ":":
            raise window.fault("Expecting ':' delimiter")
        window.position += 1
        if window.peek() != "[":
            window.value()
        elif has_list:
            raise window.no_list()
        else:
            yield from window.elements()
            has_list = True
        if window.peek() == "}":
            window.position += 1
            if not has_list:
                raise window.no_list()
            return
        if window.peek() != ",":
            raise window.fault("Expecting ',' delimiter")
        window.position += 1
    window.peek()
    raise window.fault("Expecting property name enclosed in double quotes")


class _Window:
    """A part of the text; everything before `position` is decoded."""

    def __init__(self, source: TextIO, name: str) -> None:
        self._source, self._name = source, name
        self._text = ""
        self._line = self._column = 1  # of the first character of the window
        self.position = 0

    def peek(self) -> str:
        """The next character that is not blank, "" at the end of the text; `position` moves to it."""
        while True:
            blanks = _BLANKS.match(self._text, self.position)
            assert blanks is not None
            self.position = blanks.end()
            if self.position < len(self._text) or not self._more():
                return self._text[self.position : self.position + 1]

    def value(self, longest: int | None = None) -> object:
        """The value after blanks; _TooLongError, with nothing lost, if it may have over `longest` characters."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                near_end = error.pos + _CUT >= len(self._text) or error.msg.startswith("Unterminated string")
                long = longest is not None and len(self._text) - self.position > longest
                if near_end and long:
                    raise _TooLongError from None
                if near_end and len(self._text) - self.position > MAX_ROW:
                    raise too_long(f"{self._name} line {self.line()}") from None
                if not near_end or not self._more():
                    raise self.fault(error.msg, error.pos) from None
                continue
            except (RecursionError, ValueError) as error:
                hint = "flatten or split the file"
                raise DataError(f"is not usable JSON: {error}", place=self._name, hint=hint) from None
            if end + len("e+") >= len(self._text) and self._more():  # a number may continue
                continue
            self.position = end
            return value

    def elements(self) -> Iterator[object]:
        """The elements of the array that begins at `position`."""
        self.position += 1
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            yield self.value()
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
        """The line (from 1) of the character at `index`, or at `position`."""
        return self._line + self._text.count("\n", 0, self.position if index is None else index)

    def fault(self, message: str, index: int | None = None) -> DataError:
        """The error for a fault at `index`, or at `position`."""
        index = self.position if index is None else index
        before = self._text.rfind("\n", 0, index)
        column = index - before if before >= 0 else self._column + index
        place = f"{self._name} line {self.line(index)} column {column}"
        return DataError(f"is not JSON: {message}", place=place, hint="correct the syntax there")

    def no_list(self) -> DataError:
        """The error for a file without rows, or with rows in two places."""
        hint = 'write [{...}, {...}], or an object with one list, such as {"data": [...]}'
        return DataError("is not a list of rows", place=self._name, hint=hint)

    def _more(self) -> bool:
        """Read more text and drop what is decoded; False at the end of the text, with nothing changed."""
        unfinished = len(self._text) - self.position
        block = self._source.read(max(BLOCK, unfinished))  # at least doubles an unfinished value
        if not block:
            return False
        last = self._text.rfind("\n", 0, self.position)
        self._column = self.position - last if last >= 0 else self._column + self.position
        self._line += self._text.count("\n", 0, self.position)
        self._text, self.position = self._text[self.position :] + block, 0
        return True

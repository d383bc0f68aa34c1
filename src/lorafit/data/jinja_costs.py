"""What the operations of a chat template cost at most in CPython, and the budget that the costs are taken from.

A unit is about ten nanoseconds or a byte. A bound that holds for every input is charged before the operation runs: the
searches of `str` are quadratic for some texts, a list of characters takes a hundred bytes per character.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace
from markupsafe import Markup

BUDGET = 10_000_000  # units per rendering
BUDGET_PER_CHARACTER = 50  # of what is rendered
STEP = 60  # a pass of a loop, or one of our functions between
CALL = 120  # a filter, a test, a function, or an attribute or item looked up
NODE = 5  # any other node of a body
ITEM = 60  # an item of a list
CASE = 5  # a character in another case: up to three characters
QUOTED = 3  # a character inside a list or dict, whose text has it quoted
ESCAPED = 6  # a character with HTML's own characters escaped
MAX_BITS = 64  # of a number
MAX_DEPTH = 100  # of lists in lists: CPython hashes nested tuples by recursion without a limit
_HOLDS_ITEMS = (list, tuple, set, frozenset, range, dict, KeysView, ValuesView, ItemsView)
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_BLANKS = (
    _LINE_ENDS
    + "\t \x1f\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)


class OverdrawnError(TemplateError):
    """A template exceeds its budget."""


class Budget:
    """The units that are left of one rendering; `charge` raises OverdrawnError when there are too few."""

    def __init__(self) -> None:
        self.left = 0
        self.begin(0)

    def begin(self, num_characters: int) -> None:
        """Reset the budget for a rendering of `num_characters`."""
        self.left = BUDGET + BUDGET_PER_CHARACTER * num_characters

    def charge(self, cost: int) -> None:
        """Take `cost` units. Raises ValueError for a cost that is not a whole number of at least 0."""
        if type(cost) is not int or cost < 0:
            raise ValueError("a bug in lorafit: a cost is a whole number of at least 0")
        self.left -= cost
        if self.left < 0:
            raise OverdrawnError("it takes more time or memory than any chat template needs")

    def sized(self, value: Any) -> Any:
        """`value`, charged without the contents of its items; an iterator becomes a list."""
        value = self.held(value)
        self.charge(size(value))
        return value

    def held(self, value: Any) -> Any:
        """`value`; an iterator becomes a list."""
        return list(self.counted(value)) if isinstance(value, Iterator) else value

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, each charged when it is taken."""
        for item in items:
            self.charge(STEP)
            yield item

    def weighed(self, value: Any) -> Any:
        """`value`, charged with everything in it, as often as it is in it; an iterator becomes a list."""
        if type(value) is str:  # by far the most frequent
            self.charge(len(value))
            return value
        value = self.held(value)
        level = [value]
        for depth in range(MAX_DEPTH + 1):
            inner: list[Any] = []
            for item in level:
                self.charge(STEP + size(item) * (QUOTED if depth and isinstance(item, str) else 1))
                if isinstance(item, Namespace):
                    item = item._Namespace__attrs  # what its text shows
                    self.charge(size(item))
                if isinstance(item, dict):
                    inner += [*item.keys(), *item.values()]
                elif isinstance(item, _HOLDS_ITEMS):
                    inner += item
            if not inner:
                return value
            level = inner
        raise TemplateError(f"lists are nested more than {MAX_DEPTH} deep")

    def weight(self, value: Any) -> int:
        """Charge `value` as `weighed` does; returns how much."""
        before = self.left
        self.weighed(value)
        return before - self.left


def size(value: Any) -> int:
    """Units of a value without the contents of its items."""
    if isinstance(value, str):
        return ESCAPED * (len(value) + STEP) if isinstance(value, Markup) else len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 8
    return ITEM * len(value) if isinstance(value, _HOLDS_ITEMS) else 1


def search(length: int, part: int) -> int:
    """Find a text of `part` characters, or every one, in a text of `length`.

    Above 2,500 characters, or 30,000 for a part below 100, CPython's search is linear; below them it may compare the
    whole part at every position.
    """
    compared = length * min(part, 100) + min(length, 2500) * min(part, 2500)
    return length + part + (compared >> 3)


def compare_all(length: int, part: int) -> int:
    """Compare `part` characters at each of `length` positions: CPython's search from the end, and `strip`."""
    return length + part + (length * part >> 3)


def replace(text: str, old: str, new: str) -> int:
    """Replace each `old` by `new`; the search for them, which is made here too, is not in it."""
    return text.count(old) * (len(new) + CASE)


def lines(text: str) -> int:
    """Cut a text into lines."""
    return 3 * len(text) + ITEM * (1 + sum(map(text.count, _LINE_ENDS)))


def words(text: str, mark: str) -> int:
    """The pieces of a text cut at `mark`, or at blanks where it is empty."""
    if mark:
        return ITEM * (1 + len(text) // len(mark))
    return 3 * len(text) + ITEM * (1 + sum(map(text.count, _BLANKS)))


# Each method of a text that a template may call, with what it costs: (the text, the first argument that is one).
_case = dict.fromkeys(
    ("capitalize", "casefold", "lower", "swapcase", "title", "upper"), lambda text, _: CASE * len(text)
)
_plain = dict.fromkeys(
    (
        *(
            "endswith",
            "isalnum",
            "isalpha",
            "isdecimal",
            "isdigit",
            "islower",
            "isnumeric",
            "isspace",
            "istitle",
        ),
        *("isupper", "join", "removeprefix", "removesuffix", "startswith"),
    ),
    lambda text, part: len(text) + len(part),
)
_search = dict.fromkeys(
    ("count", "find", "index", "partition", "replace"), lambda text, part: search(len(text), len(part))
)
_compare_all = dict.fromkeys(
    ("lstrip", "rfind", "rindex", "rpartition", "rstrip", "strip"),
    lambda text, part: compare_all(len(text), len(part)),
)
TEXT_METHODS: dict[str, Callable[[str, str], int]] = {
    **_plain,
    **_case,
    **_search,
    **_compare_all,
    "split": lambda text, part: search(len(text), len(part)) + words(text, part),
    "rsplit": lambda text, part: compare_all(len(text), len(part)) + words(text, part),
    "splitlines": lambda text, _: lines(text),
}


def text_method(name: str, text: str, args: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Call the method `name` of TEXT_METHODS on `text`."""
    cost = TEXT_METHODS[name](
        text, next((one for one in (*args, *named.values()) if isinstance(one, str)), "")
    )
    if name == "join" and args and isinstance(args[0], (*_HOLDS_ITEMS, str)):
        cost += len(text) * len(args[0])
    return cost * (ESCAPED if isinstance(text, Markup) else 1)

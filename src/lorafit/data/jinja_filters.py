"""The filters, tests and functions of a chat template, each with its cost charged before it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date as Date
from functools import wraps
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.filters import FILTERS, do_indent, do_int, do_round, ignore_case, make_attrgetter
from jinja2.sandbox import safe_range
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from markupsafe import soft_str

from lorafit.data.jinja_costs import (
    CALL,
    CASE,
    ESCAPED,
    ITEM,
    MAX_BITS,
    Budget,
    compare_all,
    lines,
    replace,
    search,
)

MAX_INDENT = 16
MAX_MESSAGE = 1000  # characters
# Filters by their cost: the call alone, or the items of the arguments.
_FROM_OUTSIDE = ("count", "d", "default", "first", "last", "length")
_ITEM_BY_ITEM = ("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
# Filters that read everything in their arguments, and how often: characters, or items that are sorted.
_ONCE = ("abs", "float", "max", "min", "safe", "string")
_CASES = ("capitalize", "lower", "upper")
_SORTS = ("dictsort", "sort")
# Tests that cost only the call; all others read their arguments.
_TESTS_FROM_OUTSIDE = (
    *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number"),
    *("sameas", "sequence", "string", "true", "undefined"),
)
_TESTS_IN_DEPTH = (
    *(
        "==",
        "!=",
        "<",
        "<=",
        ">",
        ">=",
        "eq",
        "equalto",
        "ne",
        "lt",
        "lessthan",
        "le",
        "gt",
        "greaterthan",
        "ge",
    ),
    *("escaped", "filter", "lower", "test", "upper"),
)
_TESTS_OF_NUMBERS = ("divisibleby", "even", "odd")  # `%` of a text is its format
_DATE = re.compile(r"(?:[^%]|%-?[A-Za-z%])*")  # without widths


def filters(environment: Environment, budget: Budget) -> dict[str, Any]:
    """Name and function of each filter that a template has. Whatever is not here does not exist for it."""

    def weighed(factor: int) -> Callable[[Any], Any]:
        return lambda value: _weighed_often(budget, value, lambda _: factor)

    def sorted_(value: Any) -> Any:
        return _weighed_often(
            budget, value, lambda items: len(items).bit_length() if hasattr(items, "__len__") else 1
        )

    def by_item(value: Any) -> Any:
        if isinstance(value, str):  # its characters, or the names of attributes in it, are items
            budget.charge(ITEM * len(value))
        return budget.sized(value)

    def join(value: Any, d: str = "", attribute: Any = None) -> str:
        taken = make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
        items = budget.weighed([taken(item) for item in budget.counted(value)])
        between = str(budget.weighed(d))
        budget.charge(len(between) * len(items))
        return between.join(map(str, items))

    def replace_all(value: Any, old: Any, new: Any, count: int | None = None) -> str:
        budget.charge(CALL)
        text, before, after = (str(budget.weighed(item)) for item in (value, old, new))
        budget.charge(search(len(text), len(before)))
        budget.charge(replace(text, before, after))
        return text.replace(before, after, -1 if count is None else count)

    def trim(value: Any, chars: str | None = None) -> str:
        text = soft_str(budget.weighed(value))
        budget.charge(compare_all(len(text), len(chars or "")))
        return text.strip(chars)

    def indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        if (len(width) if isinstance(width, str) else abs(width)) > MAX_INDENT:
            raise TemplateError(f"an indent has at most {MAX_INDENT} characters")
        text = str(budget.weighed(value))
        budget.charge(2 * lines(text))
        return do_indent(text, width, first, blank)

    def unique(value: Any, case_sensitive: bool = False, attribute: Any = None) -> Iterator[Any]:
        budget.charge(2 * CALL)
        change = None if case_sensitive else ignore_case
        taken = make_attrgetter(environment, attribute, postprocess=change)
        found = {checked_key(budget.weighed(taken(item))): item for item in reversed(budget.weighed(value))}
        yield from reversed(found.values())

    def round_(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if type(precision) is not int or abs(precision) > MAX_BITS:
            raise TemplateError("a precision is too large")
        return checked_number(do_round(_number(value), precision, method))

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """transformers' filter: Jinja's own escapes HTML characters."""
        if indent is not None and (not isinstance(indent, int) or abs(indent) > MAX_INDENT):
            raise TemplateError(f"an indent is a number up to {MAX_INDENT}")
        budget.charge(4 * CALL)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=budget.weighed(separators),
            sort_keys=sort_keys,
        )
        pieces: list[str] = []
        for piece in encoder.iterencode(weighed(2 * ESCAPED if ensure_ascii else ESCAPED)(value)):
            budget.charge(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    return {
        **{name: _billed(FILTERS[name], budget, lambda value: value) for name in _FROM_OUTSIDE},
        **{name: _billed(FILTERS[name], budget, by_item) for name in _ITEM_BY_ITEM},
        **{name: _billed(FILTERS[name], budget, weighed(2)) for name in _ONCE},
        **{name: _billed(FILTERS[name], budget, weighed(CASE)) for name in _CASES},
        **{name: _billed(FILTERS[name], budget, weighed(ESCAPED)) for name in ("e", "escape")},
        **{name: _billed(FILTERS[name], budget, sorted_) for name in _SORTS},
        "title": _billed(FILTERS["title"], budget, weighed(ITEM)),
        "join": join,
        "replace": replace_all,
        "trim": trim,
        "indent": indent,
        "unique": unique,
        "round": round_,
        "int": lambda value, default=0: checked_number(do_int(budget.weighed(value), default)),
        "tojson": to_json,
    }


def tests(budget: Budget) -> dict[str, Any]:
    """Name and function of each test that a template has."""

    def of_number(name: str) -> Callable[..., Any]:
        return _billed(TESTS[name], budget, lambda value: checked_number(_number(value)))

    return {
        **{name: _billed(TESTS[name], budget, lambda value: value) for name in _TESTS_FROM_OUTSIDE},
        **{name: _billed(TESTS[name], budget, budget.weighed) for name in _TESTS_IN_DEPTH},
        **{name: of_number(name) for name in _TESTS_OF_NUMBERS},
        "in": lambda value, seq: contains(budget, value, seq),
    }


def functions(date: Date) -> dict[str, Any]:
    """Name and function of each global function; the sandbox charges their arguments."""

    def today(form: str) -> str:
        if len(form) > MAX_BITS or not _DATE.fullmatch(form):
            raise TemplateError("a date has no such form")
        return date.strftime(form)

    return {
        "range": lambda *numbers: safe_range(*map(checked_number, numbers)),
        "dict": _dict,
        "namespace": lambda *given, **named: Namespace(_dict(*given, **named)),
        "raise_exception": _raise,
        "strftime_now": today,
    }


def contains(budget: Budget, value: Any, items: Any) -> bool:
    """`value in items`, charged."""
    value, items = budget.held(value), budget.held(items)
    budget.charge(CALL)
    if isinstance(value, str) and isinstance(items, str):
        budget.charge(search(len(items), len(value)))
    else:
        budget.weighed(value)
        if not isinstance(items, dict):  # it is looked up by its hash
            budget.weighed(items)
    return value in items


def checked_number(value: Any) -> Any:
    """`value`, unless it is a whole number of more than MAX_BITS."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TemplateError("a number is too large")
    return value


def checked_key(value: Any) -> Any:
    """`value`, if it may be a key: nobody can choose many texts or numbers of MAX_BITS whose hashes are equal."""
    if value is not None and not isinstance(value, str | int | float):
        raise TemplateError("a key is a text or a number")
    return checked_number(value)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TemplateError(f"it needs a number, not a `{type(value).__name__}`")
    return value


def _billed(function: Any, budget: Budget, pay: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function`, with `pay` for each argument."""
    first = int(hasattr(function, "jinja_pass_arg"))  # jinja2 passes an argument of its own first

    @wraps(function)
    def billed(*args: Any, **kwargs: Any) -> Any:
        budget.charge(CALL)
        named = {key: pay(value) for key, value in kwargs.items()}
        return function(*args[:first], *map(pay, args[first:]), **named)

    return billed


def _weighed_often(budget: Budget, value: Any, times: Callable[[Any], int]) -> Any:
    """`value`, charged with everything in it and so many times again."""
    value = budget.held(value)
    weight = budget.weight(value)
    budget.charge(weight * max(times(value) - 1, 0))
    return value


def _dict(pairs: Any = (), /, **named: Any) -> dict[Any, Any]:
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    return {**{checked_key(key): value for key, value in items}, **named}


def _raise(message: Any) -> None:
    raise TemplateError(str(message)[:MAX_MESSAGE])

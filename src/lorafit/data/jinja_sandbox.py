"""Jinja for untrusted chat templates: only what they use, with a budget for every step and character.

A chat template is a program that comes with a model. jinja2's own sandbox blocks access to Python's internals, but not
hours of computing or a terabyte of memory. Here the cost of every operation is charged to a budget before it runs, so
that every rendering ends. No clock is involved: a row has the same result everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from datetime import date as Date
from functools import wraps
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_int, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SOURCE = 100_000  # characters
BUDGET = 10_000_000  # units per rendering, about ten nanoseconds or a byte each
BUDGET_PER_CHARACTER = 50  # of what is rendered
STEP, NODE, ITEM = 60, 5, 60  # units of a call or a pass of a loop, a node of its body, an item of a list
MAX_LOOPS = 20  # nested; Python's own limit
MAX_INDENT = 16
MAX_BITS = 64  # of a number

# Filters by their cost: the call alone, the items of the arguments, or everything in these items too.
FROM_OUTSIDE = frozenset({"count", "d", "default", "first", "last", "length"})
ITEM_BY_ITEM = frozenset({
    "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr",
})  # fmt: skip
IN_DEPTH = frozenset({
    "abs", "capitalize", "dictsort", "e", "escape", "float", "lower", "max", "min", "round", "safe", "sort", "string",
    "title", "trim", "unique", "upper",
})  # fmt: skip
# Tests that cost only the call; all others read their arguments.
TESTS_FROM_OUTSIDE = frozenset({
    "boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence",
    "string", "true", "undefined",
})  # fmt: skip
METHODS: dict[type, frozenset[str]] = {
    str: frozenset({
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit",
        "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
        "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
        "startswith", "strip", "swapcase", "title", "upper",
    }),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
}  # fmt: skip
_LOOP = frozenset({
    "changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem",
    "revindex", "revindex0",
})  # fmt: skip
_HOLDS_ITEMS = (list, tuple, set, frozenset, range, dict, KeysView, ValuesView, ItemsView)


class OverdrawnError(TemplateError):
    """A template exceeds its budget."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; `begin` resets its budget, and OverdrawnError is raised beyond it."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, date: Date) -> None:
        """`date` is the date of today for the template."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._weighed,
            cache_size=0,
        )
        self._date = date
        self._left = 0
        self.begin(0)
        costs = {
            **dict.fromkeys(FROM_OUTSIDE, _nothing),
            **dict.fromkeys(ITEM_BY_ITEM, self._sized),
            **dict.fromkeys(IN_DEPTH, self._weighed),
        }
        self.filters = {
            **{name: self._billed(self.filters[name], cost) for name, cost in costs.items()},
            "join": self._join,
            "replace": self._replace,
            "indent": self._indent,
            "int": lambda value, default=0: do_int(self._weighed(value), default),
            "tojson": self._to_json,
            # with a context, so that nothing is evaluated when the template is compiled
            "_counted": pass_context(lambda _, items: self._counted(items)),
            "_step": pass_context(lambda _, cost: self.charge(cost)),
            "_weighed": pass_context(lambda _, value: self._weighed(value)),
            "_sized": pass_context(lambda _, value: self._sized(value)),
        }
        self.tests = {
            name: self._billed(test, _nothing if name in TESTS_FROM_OUTSIDE else self._weighed)
            for name, test in dict[str, Any](self.tests).items()
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise,
            "strftime_now": self._strftime,
        }
        self.concat = self._concat  # type: ignore[method-assign]

    def begin(self, num_characters: int) -> None:
        """Reset the budget for a rendering of `num_characters`."""
        self._left = BUDGET + BUDGET_PER_CHARACTER * num_characters

    def charge(self, cost: int) -> None:
        """Take `cost` units from the budget."""
        self._left -= cost
        if self._left < 0:
            raise OverdrawnError("it takes more time or memory than any chat template needs")

    # Called by the compiled template

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"it has more than {MAX_SOURCE:,} characters")
        tree = super()._parse(source, name, filename)
        _put_steps(tree)
        for node in list(tree.find_all(nodes.Node)):
            match node:
                case nodes.Compare() if any(operand.op in ("in", "notin") for operand in node.ops) or not any(
                    isinstance(side, nodes.Const) for side in (node.expr, *(o.expr for o in node.ops))
                ):
                    node.expr = _filtered(node.expr, "_weighed")
                    for operand in node.ops:
                        operand.expr = _filtered(operand.expr, "_weighed")
                case nodes.Concat():
                    node.nodes = [_filtered(part, "_weighed") for part in node.nodes]
                case nodes.Getitem(arg=nodes.Slice()):
                    node.node = _filtered(node.node, "_sized")
                case nodes.Pair():
                    node.key = _filtered(node.key, "_weighed")
                case nodes.For():
                    node.iter = _filtered(cast(nodes.Expr, node.iter), "_counted")
                case nodes.Block() | nodes.Extends() | nodes.Include() | nodes.Import() | nodes.FromImport():
                    kind = type(node).__name__.lower()
                    raise TemplateSyntaxError(f"a chat template has no `{kind}`", node.lineno)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic of short numbers; sums and products of texts and lists are charged."""
        if operator == "+" and type(left) is str and type(right) is str:  # by far the most frequent
            self.charge(len(left) + len(right))
            return left + right
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise TemplateError("a number is too large")
        if operator == "%" and isinstance(left, str):
            raise TemplateError("`%` is for numbers only")
        if operator == "**" and abs(right) > MAX_BITS:
            raise TemplateError("a power is too large")
        numbers = [value for value in (left, right) if isinstance(value, int | float)]
        times = int(max(numbers[0], 1)) if operator == "*" and len(numbers) == 1 else 1
        self.charge((self._size(left) + self._size(right)) * times)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A macro, one of the globals, or a method from METHODS."""
        self.charge(STEP)
        if not isinstance(function, Macro):
            name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
            args = tuple(self._weighed(value) for value in args)
            kwargs = {key: self._weighed(value) for key, value in kwargs.items()}
            if isinstance(owner, str | list | tuple):
                self._weighed(owner)
            if isinstance(owner, str) and name == "replace" and len(args) > 1:
                self.charge(str.count(owner, args[0]) * len(args[1]))
            if isinstance(owner, str) and name == "join" and args:
                self.charge(len(owner) * len(args[0]))
        return super().call(context, function, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether the attribute is one of METHODS, or of a namespace or a loop."""
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        if isinstance(obj, LoopContext):
            return attr in _LOOP
        return any(isinstance(obj, kind) and attr in names for kind, names in METHODS.items())

    def wrap_str_format(self, value: Any) -> None:
        """No text has a format method."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As in jinja2's sandbox; a key that is not a text or number is charged, because it is hashed."""
        if not isinstance(argument, str | int):
            self._weighed(argument)
        return super().getitem(obj, argument)

    def _concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        self.charge(sum(map(len, pieces)))
        return "".join(pieces)

    # Costs

    def _size(self, value: Any) -> int:
        """Units of a value without the contents of its items."""
        if isinstance(value, str):
            return len(value)
        return ITEM * len(value) if isinstance(value, _HOLDS_ITEMS) else 1

    def _sized(self, value: Any) -> Any:
        """`value`, charged without the contents of its items; an iterator becomes a list."""
        value = self._held(value)
        self.charge(self._size(value))
        return value

    def _held(self, value: Any) -> Any:
        return list(self._counted(value)) if isinstance(value, Iterator) else value

    def _weighed(self, value: Any) -> Any:
        """`value`, charged with everything in it, as often as it is in it; an iterator becomes a list."""
        if type(value) is str:  # by far the most frequent
            self.charge(len(value))
            return value
        value = self._held(value)
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self.charge(STEP + self._size(item))
            if isinstance(item, Namespace):
                item = item._Namespace__attrs  # what its text shows
                self.charge(self._size(item))
            if isinstance(item, dict):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, _HOLDS_ITEMS):
                waiting += item
        return value

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.charge(STEP)
            yield item

    # Filters and functions

    def _billed(self, function: Callable[..., Any], pay: Callable[[Any], Any]) -> Callable[..., Any]:
        """`function`, with `pay` for each argument."""
        first = int(hasattr(function, "jinja_pass_arg"))  # jinja2 passes an argument of its own first

        @wraps(function)
        def billed(*args: Any, **kwargs: Any) -> Any:
            self.charge(STEP)
            named = {key: pay(value) for key, value in kwargs.items()}
            return function(*args[:first], *map(pay, args[first:]), **named)

        return billed

    def _join(self, value: Any, d: str = "", attribute: Any = None) -> str:
        taken = make_attrgetter(self, attribute) if attribute is not None else lambda item: item
        items = self._weighed([taken(item) for item in self._counted(value)])
        between = str(self._weighed(d))
        self.charge(len(between) * len(items))
        return between.join(map(str, items))

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, before, after = (str(self._weighed(item)) for item in (value, old, new))
        self.charge(text.count(before) * len(after))
        return text.replace(before, after, -1 if count is None else count)

    def _indent(self, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        if (len(width) if isinstance(width, str) else abs(width)) > MAX_INDENT:
            raise TemplateError(f"an indent has at most {MAX_INDENT} characters")
        text = str(self._weighed(value))
        self.charge((ITEM + MAX_INDENT) * len(text.splitlines()))
        return do_indent(text, width, first, blank)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """transformers' filter: Jinja's own escapes HTML characters."""
        if indent is not None and (not isinstance(indent, int) or abs(indent) > MAX_INDENT):
            raise TemplateError(f"an indent is a number up to {MAX_INDENT}")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=self._weighed(separators),
            sort_keys=sort_keys,
        )
        pieces: list[str] = []
        for piece in encoder.iterencode(self._weighed(value)):
            self.charge(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    def _strftime(self, form: str) -> str:
        if len(form) > MAX_BITS:
            raise TemplateError("a date has no such form")
        return self._date.strftime(form)


class _Generation(Extension):
    """`{% generation %}` blocks are accepted and ignored; answers are located by position instead."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(
            line
        )


def _filtered(node: nodes.Expr, name: str) -> nodes.Expr:
    """`node` put through the filter `name`, unless it is a short constant."""
    if isinstance(node, nodes.Const) and len(str(node.value)) < STEP:
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _put_steps(node: nodes.Node, loops: int = 0) -> int:
    """Charge every body of a loop or macro for its nodes when it runs; returns the number of nodes here."""
    loops += isinstance(node, nodes.For)
    if loops > MAX_LOOPS:
        raise TemplateSyntaxError(f"more than {MAX_LOOPS} loops in one another", node.lineno)
    count = 1 + sum(_put_steps(child, loops) for child in node.iter_child_nodes())
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        cost = nodes.Const(STEP + NODE * count, lineno=node.lineno)
        step = nodes.Filter(cost, "_step", [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
    return count


def _nothing(value: Any) -> Any:
    """No cost beyond the call."""
    return value


def _raise(message: str) -> None:
    raise TemplateError(message)

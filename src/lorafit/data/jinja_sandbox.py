"""Jinja for untrusted chat templates: only what they use, with a budget for every step and character.

A chat template is a program that comes with a model. jinja2's own sandbox blocks access to Python's internals, but not
hours of computing or a terabyte of memory. Here a template has the statements, filters, tests, functions, methods and
attributes that are listed, and the cost of every operation is charged to a budget before it runs, so that every
rendering ends. No clock is involved: a row has the same result everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from datetime import date as Date
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from lorafit.data import jinja_filters
from lorafit.data.jinja_costs import (
    CALL,
    ESCAPED,
    ITEM,
    MAX_BITS,
    NODE,
    STEP,
    TEXT_METHODS,
    Budget,
    replace,
    size,
    text_method,
)

MAX_SOURCE = 100_000  # characters
MAX_TOKENS = 10_000  # of the source: compiling takes up to 0.1 ms per token
MAX_LOOPS = 20  # nested; Python's own limit
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock),
    *(
        nodes.FilterBlock,
        nodes.With,
        nodes.Assign,
        nodes.AssignBlock,
        nodes.Scope,
        nodes.Continue,
        nodes.Break,
    ),
    *(nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice),
    *(nodes.Concat, nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr),
)
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(TEXT_METHODS),
    Markup: frozenset(TEXT_METHODS),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    LoopContext: frozenset({"changed", "cycle"}),
}
_LOOP = METHODS[LoopContext] | {
    *("depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem", "revindex"),
    "revindex0",
}
_COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; `begin` resets its budget, and OverdrawnError is raised beyond it."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, date: Date) -> None:
        """`date` is the date of today for the template."""
        self.budget = Budget()
        self.begin, self.charge = self.budget.begin, self.budget.charge
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            # with a context, so that nothing is evaluated when the template is compiled
            finalize=pass_context(lambda _, value: self.budget.weighed(value)),
            cache_size=0,
            optimized=False,
        )
        self.code_generator_class = _Code
        self.filters = jinja_filters.filters(self, self.budget)
        self.tests = jinja_filters.tests(self.budget)
        self.globals = jinja_filters.functions(date)
        self._functions = tuple(self.globals.values())
        self.concat = self._concat  # type: ignore[method-assign]

    # Called by the compiled template

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"it has more than {MAX_SOURCE:,} characters")
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all(nodes.Node)):
            if not isinstance(node, _NODES):
                kind = type(node).__name__.lower()
                raise TemplateSyntaxError(f"a chat template has no `{kind}`", node.lineno)
        _put_steps(tree)
        return cast(nodes.Template, _Billing().visit(tree))

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Raise the error as it is: jinja2 compiles a piece of code for each frame of its traceback."""
        raise

    def step(self, cost: int) -> bool:
        """Charge a body for its nodes."""
        self.charge(cost)
        return True

    def compare(self, value: Any, *rest: Any) -> Any:
        """A comparison: names of operators and values in turn."""
        result: Any = True
        for name, other in zip(rest[::2], rest[1::2], strict=True):
            self.charge(STEP)
            result = self._compared(name, self.budget.held(value), self.budget.held(other))
            if not result:
                break
            value = other
        return result

    def _compared(self, name: str, left: Any, right: Any) -> Any:
        if name in ("in", "notin"):
            found = jinja_filters.contains(self.budget, left, right)
            return found if name == "in" else not found
        if type(left) is str and type(right) is str:
            self.charge(min(len(left), len(right)))
        else:
            self.budget.weighed(left)
            self.budget.weighed(right)
        return _COMPARISONS[name](left, right)

    def key(self, value: Any) -> Any:
        """`value`, if it may be the key of a dict."""
        return jinja_filters.checked_key(self.budget.weighed(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic of short numbers; sums and products of texts and lists are charged."""
        if operator == "+" and type(left) is str and type(right) is str:  # by far the most frequent
            self.charge(STEP + len(left) + len(right))
            return left + right
        if operator == "%" and isinstance(left, str):
            raise TemplateError("`%` is for numbers only")
        for value in (left, right):
            if not isinstance(value, str | int | float | list | tuple | Undefined | None):
                raise TemplateError(f"`{operator}` is for numbers, texts and lists")
            jinja_filters.checked_number(value)
        if operator == "**" and abs(right) > MAX_BITS:
            raise TemplateError("a power is too large")
        numbers = [value for value in (left, right) if isinstance(value, int | float)]
        times = int(max(numbers[0], 1)) if operator == "*" and len(numbers) == 1 else 1
        if Markup in (type(left), type(right)):  # it escapes the other one
            times *= ESCAPED
        self.charge(STEP + (size(left) + size(right)) * times)
        return jinja_filters.checked_number(super().call_binop(context, operator, left, right))

    def call(
        self,
        context: Context,
        function: Any,
        /,
        *args: Any,
        _loop_vars: Any = None,
        _block_vars: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A macro, a loop, one of the globals, or a method from METHODS; none of them needs jinja2's variables."""
        self.charge(CALL)
        kind = type(function)
        if kind is Macro or isinstance(function, Undefined):  # what is undefined raises its own error
            return context.call(function, *args, **kwargs)
        if kind is LoopContext:
            return function(*map(self.budget.counted, args), **kwargs)
        args = tuple(self.budget.weighed(value) for value in args)
        kwargs = {key: self.budget.weighed(value) for key, value in kwargs.items()}
        if any(function is known for known in self._functions):
            return function(*args, **kwargs)
        name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if kind not in (MethodType, BuiltinMethodType) or name not in METHODS.get(type(owner), ()):
            raise TemplateError(f"a chat template cannot call a `{kind.__name__}`")
        if isinstance(owner, str):
            self.charge(text_method(name, owner, args, kwargs))
            if name == "replace":
                self.charge(replace(owner, *args[:2]))
        elif isinstance(owner, list | tuple):
            self.budget.weighed(owner)
        return function(*args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether the attribute is one of METHODS, or of a namespace or a loop."""
        if type(obj) is Namespace:
            return not attr.startswith("_")
        return attr in (_LOOP if type(obj) is LoopContext else METHODS.get(type(obj), ()))

    def wrap_str_format(self, value: Any) -> None:
        """No text has a format method."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As in jinja2's sandbox, charged."""
        self.charge(CALL)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """As in jinja2's sandbox, charged; a key that is not a text or number is weighed, because it is hashed."""
        self.charge(CALL)
        if not isinstance(argument, str | int):
            self.budget.weighed(argument)
        return super().getitem(obj, argument)

    def _concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        self.charge(sum(map(len, pieces)))
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` blocks are accepted and ignored; answers are located by position instead."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        """Refuse a source of too many tokens while it is read."""
        for number, token in enumerate(stream):
            if number >= MAX_TOKENS:
                raise TemplateSyntaxError(f"it has more than {MAX_TOKENS:,} words and signs", token.lineno)
            yield token


class _Code(CodeGenerator):
    """jinja2's compiler; what `_Billing` puts in is called as it is, without `Sandbox.call`."""

    def visit_Call(  # noqa: N802 (jinja2's name)
        self, node: nodes.Call, frame: Frame, forward_caller: bool = False
    ) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.visit(node.node, frame)
        self.write("(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


class _Billing(NodeTransformer):
    """Puts the sandbox's own functions around what is not charged by jinja2's hooks. No name leads to them."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.generic_visit(node)
        match node:
            case nodes.Const():
                jinja_filters.checked_number(node.value)
            case nodes.Compare(expr=left, ops=[nodes.Operand(op="eq" | "ne", expr=right)]) if _is_short(
                left
            ) or _is_short(right):
                pass
            case nodes.Compare():
                pairs = [part for one in node.ops for part in (nodes.Const(one.op), one.expr)]
                return _hook("compare", node.expr, *pairs)
            case nodes.Concat():
                node.nodes = [
                    part if _is_short(part) else _hook("budget.weighed", part) for part in node.nodes
                ]
            case nodes.Getitem(arg=nodes.Slice()):
                node.node = _hook("budget.sized", node.node)
            case nodes.Pair() if not _is_short(node.key):
                node.key = _hook("key", node.key)
            case nodes.For():
                node.iter = _hook("budget.counted", cast(nodes.Expr, node.iter))
            case (
                nodes.Call() | nodes.Filter() | nodes.Test()
            ):  # what is unpacked as arguments is held in memory
                for name in ("dyn_args", "dyn_kwargs"):
                    if (given := getattr(node, name)) is not None:
                        setattr(node, name, _hook("budget.sized", given))
        return node


def _hook(name: str, *arguments: nodes.Expr) -> nodes.Expr:
    """A call of the sandbox's own `name`."""
    line = arguments[0].lineno
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, list(arguments), [], None, None, lineno=line)


def _is_short(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) and len(str(node.value)) < ITEM


def _put_steps(node: nodes.Node, loops: int = 0) -> int:
    """Charge every body of a loop or macro for its nodes when it runs; returns the number of nodes here."""
    loops += isinstance(node, nodes.For)
    if loops > MAX_LOOPS:
        raise TemplateSyntaxError(f"more than {MAX_LOOPS} loops in one another", node.lineno)
    count = 1 + sum(_put_steps(child, loops) for child in node.iter_child_nodes())
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        step = _hook("step", nodes.Const(STEP + NODE * count, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
    return count

"""Chat templates made of the whole of Jinja's grammar and every name, allowed or not, with values that cost much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from random import Random

from jinja2.filters import FILTERS
from jinja2.tests import TESTS

from lorafit.data.jinja_sandbox import METHODS, Sandbox

_sandbox = Sandbox(date(2024, 1, 1))
NAMES = {
    "filter": sorted(_sandbox.filters),
    "test": sorted(_sandbox.tests),
    "function": sorted(_sandbox.globals),
}
_PRIVATE = (
    "_step", "_weighed", "_counted", "budget", "charge", "step", "compare", "key", "__class__", "_environment",
)  # fmt: skip
_OTHER = {
    "filter": (*FILTERS, *_PRIVATE),
    "test": (*TESTS, *_PRIVATE),
    "function": ("cycler", "joiner", "lipsum", "environment", "context", "open", "self", *_PRIVATE),
    "method": (
        *("append", "update", "pop", "center", "zfill", "format", "format_map", "translate"),
        *_PRIVATE,
    ),
}
_REFUSED = [
    "include 'a'",
    "import 'a' as b",
    "from 'a' import b",
    "extends 'a'",
    "block b",
    "autoescape true",
]
_NUMBERS = (
    "0", "1", "-1", "2", "3", "20", "99", "1000", "2500", "30000", "99999", "600000", "1000000", "5000000",
)  # fmt: skip
_ODD_NUMBERS = [
    "10**9",
    "-10**15",
    "2**61-1",
    "2**64",
    "10**18",
    "1.5",
    "1e308",
    "0.1",
    "(-8)**0.5",
    "0x" + "f" * 40,
]
_LETTERS = (
    "a", "ab", " ", "\\n", "\\u4e2d", "\\u0390", "\\U000e0001", "\"", "a b ", "%99d", "0.", "<", "\\x00", "aA",
)  # fmt: skip
_TEXTS = ("message.content", "messages[0].content", "bos_token", "x|string", "ns.a~''", "loop.index~''")
_LISTS = (
    "range({n})", "[1]*{n}", "['ab']*{n}", "[[1]*{n}]*{n}", "range({n})|map('string')|list", "('a',)*{n}",
    "range(0, {n}*(2**61-1), 2**61-1)", "messages", "[messages]*{n}", "[1, 'a', none]", "{{'a': x}}",
    "({t})|list", "messages[0].items()", "messages[0].keys()", "({t}).split({t})", "({t}).splitlines()",
    "[{t}]*{n}", "x", "ns.a",
)  # fmt: skip
_ATTRIBUTES = (
    "'role'", "0", "'0'", "'content'", "'0.0'", "'0.'*{n}~'0'", "'a.'*{n}~'a'", "'__class__'", "'x,0'",
)  # fmt: skip
_LOOP = [
    "index",
    "first",
    "last",
    "length",
    "revindex",
    "nextitem",
    "previtem",
    "depth",
    "changed(x)",
    "cycle(x, 1)",
]
_SIGNS = (
    "+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or",
)  # fmt: skip
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or", "is eq", "is in", "is sameas")
_OF_TWO_TEXTS = (
    "split", "rsplit", "find", "rfind", "index", "rindex", "count", "partition", "rpartition", "strip",
    "lstrip", "rstrip", "startswith", "endswith", "removeprefix", "removesuffix",
)  # fmt: skip
_OF_ONE_TEXT = sorted(METHODS[str] - {*_OF_TWO_TEXTS, "join", "replace"})
_TEXT_FILTERS = (
    "upper", "lower", "title", "capitalize", "trim", "e", "safe", "string", "tojson", "list", "length",
    "indent", "int", "float", "reverse", "first", "last", "unique", "sort", "join", "max", "escape",
)  # fmt: skip
_LIST_FILTERS = (
    "list", "sort", "unique", "reverse", "max", "min", "join", "tojson", "string", "length", "first", "last",
)  # fmt: skip


class Maker:
    """Writes one template after another with a source of random numbers."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._depth = 0

    def template(self) -> str:
        """A whole template: some values first, so that the statements meet them."""
        start = "{% set ns = namespace(a=" + self.value() + ") %}{% set x = " + self.value() + " %}"
        macro = (
            "{% macro m(a, b=1) %}" + self._statements() + "{{ a }}{% endmacro %}" if self._rarely(3) else ""
        )
        return start + macro + self._statements() + self._statements()

    def _one(self, choices: Sequence[str]) -> str:
        return choices[self._random.randrange(len(choices))]

    def _rarely(self, one_in: int) -> bool:
        return self._random.randrange(one_in) == 0

    def _name(self, kind: str) -> str:
        return self._one(_OTHER[kind] if self._rarely(60) else NAMES[kind])

    # Values

    def _number(self) -> str:
        return self._one(_ODD_NUMBERS if self._rarely(25) else _NUMBERS)

    def _text(self) -> str:
        kind, letters = self._random.randrange(6), f"'{self._one(_LETTERS)}'"
        if kind == 0:
            return self._one(_TEXTS)
        if kind == 1:
            return letters
        if kind == 2:
            return f"({letters}*{self._number()} ~ '{self._one(_LETTERS)}' ~ {letters}*{self._number()})"
        return f"({letters}*{self._number()})"

    def _list(self) -> str:
        pattern = self._one(_LISTS)
        return f"({pattern.format(n=self._number(), t=self._text())})"

    def value(self) -> str:
        """A value that may cost something."""
        return self._random.choice((self._text, self._text, self._list, self._list, self._number))()

    def expression(self) -> str:
        """Any expression."""
        if self._depth > 4 or self._rarely(6):
            return self.value()
        self._depth += 1
        made = self._random.choice(_EXPRESSIONS)(self)
        self._depth -= 1
        return f"({made})"

    def _method_of_text(self) -> str:
        text, name = self._text(), self._one(_OTHER["method"] if self._rarely(60) else _OF_TWO_TEXTS)
        return self._one(
            (
                *(
                    f"{text}.{name}({self._text()})",
                    f"{text}.{name}({self._text()})",
                    f"x.{name}({self._text()})",
                ),
                *(f"{text}.{self._one(_OF_ONE_TEXT)}()", f"{text}.replace({self._text()}, {self._text()})"),
                f"{text}.join({self._list()})",
            )
        )

    def _method_of_list(self) -> str:
        name = self._one(("count", "index", "get", "items", "keys", "values", *_OTHER["method"]))
        return f"{self._list()}.{name}({self._arguments(2)})"

    def _filter_of_text(self) -> str:
        text, name = self._text(), self._one(_TEXT_FILTERS)
        return self._one(
            (
                *(
                    f"{text}|{name}",
                    f"{text}|trim({self._text()})",
                    f"{text}|replace({self._text()}, {self._text()})",
                ),
                *(
                    f"{text}|indent({self._number()})",
                    f"{text}|tojson(ensure_ascii=true)",
                    f"{text}|map('upper')|list",
                ),
                *(
                    f"{text}|safe + {self._text()}",
                    f"({text}|e).split({self._text()})",
                    f"{text}|{name}|{name}",
                ),
            )
        )

    def _filter_of_list(self) -> str:
        items, attribute = self._list(), self._one(_ATTRIBUTES).format(n=self._number())
        tested = f"'{self._name('test')}', {self.value()}"
        return self._one(
            (
                *(f"{items}|{self._one(_LIST_FILTERS)}", f"{items}|join({self._text()})"),
                f"{items}|map('{self._name('filter')}')|list",
                *(f"{items}|select({tested})|list", f"{items}|reject({tested})|list"),
                f"{items}|first|{self._one(_TEXT_FILTERS)}",
                *(f"{items}|selectattr({attribute}, {tested})|list", f"{items}|map(attribute={attribute})|list"),
                f"{items}|{self._one(('sort', 'unique', 'join', 'min', 'max'))}(attribute={attribute})|list",
                "x|dictsort|list",
                f"{items}|tojson(indent={self._number()})",
            )
        )  # fmt: skip

    def _any_filter(self) -> str:
        return f"{self.expression()}|{self._name('filter')}({self._arguments(3)})"

    def _round(self) -> str:
        how = self._one(("common", "ceil", "floor"))
        return f"{self._one((self._number(), self._number(), self._text()))}|round({self._number()}, '{how}')"

    def _any_test(self) -> str:
        name = self._name("test")
        return f"{self.expression()} is {name if name.isidentifier() else 'in'}{self._one(('', f'({self.value()})'))}"

    def _sum(self) -> str:
        make = self._random.choice((self._text, self._list, self._number, self.expression))
        return f"{make()} {self._one(_SIGNS)} {make()}"

    def _comparison(self) -> str:
        make = self._random.choice((self._text, self._list, self.expression))
        more = f" < {make()}" if self._rarely(8) else ""
        return f"{make()} {self._one(_COMPARISONS)} {make()}{more}"

    def _part(self) -> str:
        index = self._one(
            (":", "1:", "::-1", ":-1", "0", "-1", "'a'", f"{self.value()}", f"{self._number()}:")
        )
        return self._one(
            (f"{self.value()}[{index}]", f"loop.{self._one(_LOOP)}", f"{self.value()}.{self._name('filter')}")
        )

    def _made(self) -> str:
        one, two = self.expression(), self.value()
        return self._one(
            (
                *(f"[{one}, {two}]", f"({one}, {two})", "{" + f"{two}: {one}" + "}", f"-{one}", f"not {one}"),
                *(f"{one} if {two} else {two}", f"dict(a={one})", f"dict({two})", f"namespace(a={one})"),
                f"{one} ~ {two}",
            )
        )  # fmt: skip

    def _function(self) -> str:
        return f"{self._name('function')}({self._arguments(2)})"

    def _arguments(self, most: int) -> str:
        given = [self.value() for _ in range(self._random.randrange(most + 1))]
        return ", ".join(
            given + [self._one(("*x", f"*{self._list()}", "**{'a': x}", "a=1"))] * self._rarely(8)
        )

    # Statements

    def _statements(self) -> str:
        return "".join(self._statement() for _ in range(1 + self._random.randrange(3)))

    def _statement(self) -> str:
        if self._depth > 2:
            return self._output()
        self._depth += 1
        made = self._random.choice(_STATEMENTS)(self)
        self._depth -= 1
        return made

    def _output(self) -> str:
        return "{{ " + self.expression() + self._one(("", "|length", "|string|length")) + " }}"

    def _set(self) -> str:
        return "{% set " + self._one(("x", "x", "y", "ns.a", "x, y")) + " = " + self.expression() + " %}"

    def _grow(self) -> str:
        more = self._one(
            ("ns.a + ns.a", "[ns.a, ns.a]", "(ns.a, ns.a)", "ns.a ~ ns.a", "(ns.a,)", "namespace(a=ns.a)")
        )
        use = self._one(
            (
                "{{ ns.a }}",
                "{{ {ns.a: 1} }}",
                "{{ ns.a == ns.a }}",
                "{{ ns.a in [ns.a] }}",
                "{{ ns.a|tojson }}",
            )
        )
        return "{% for i in range(" + self._number() + ") %}{% set ns.a = " + more + " %}{% endfor %}" + use

    def _set_block(self) -> str:
        filtered = f" | {self._one(_TEXT_FILTERS)}" if self._rarely(3) else ""
        return "{% set x" + filtered + " %}" + self._statements() + "{% endset %}"

    def _for(self) -> str:
        test = f" if {self.expression()}" if self._rarely(4) else ""
        again, call = (
            (" recursive", self._one(("", "{{ loop(x) }}", "{{ loop([x, x]) }}")))
            if self._rarely(4)
            else ("", "")
        )
        end = self._one(("", "{% break %}", "{% continue %}", "{% else %}b"))
        source = self._one((self._list(), self._list(), self._text(), self.expression()))
        head = f"for {self._one(('x', 'message', 'y', 'x, y'))} in {source}{test}{again}"
        return "{% " + head + " %}" + self._statements() + call + end + "{% endfor %}"

    def _if(self) -> str:
        rest = self._one(("", "{% else %}" + self._output(), "{% elif " + self.expression() + " %}b"))
        return "{% if " + self.expression() + " %}" + self._statements() + rest + "{% endif %}"

    def _call(self) -> str:
        call = "{% call(a) m(" + self._arguments(2) + ") %}" + self._statements() + "{% endcall %}"
        return "{% macro m(a) %}{{ caller(a) }}{{ varargs }}{% endmacro %}" + call

    def _filter_block(self) -> str:
        return "{% filter " + self._one(_TEXT_FILTERS) + " %}" + self._statements() + "{% endfilter %}"

    def _with(self) -> str:
        return "{% with x = " + self.expression() + " %}" + self._statements() + "{% endwith %}"

    def _rest(self) -> str:
        if self._rarely(10):
            return "{% " + self._one(_REFUSED) + " %}"
        return self._one(
            (
                *("text", "{# a #}", "{% raw %}{{ }}{% endraw %}", "{% generation %}a{% endgeneration %}"),
                "{%- set y = 1 -%}",
                *("{% macro m(a) %}{{ m(a) }}{{ m(a) }}{% endmacro %}{{ m(x) }}", "{{ ns }}"),
                "{{ raise_exception(x) }}",
                "{{ strftime_now(" + self._text() + ") }}",
            )
        )  # fmt: skip


_EXPRESSIONS: tuple[Callable[[Maker], str], ...] = (
    *(
        Maker._method_of_text,
        Maker._method_of_text,
        Maker._method_of_list,
        Maker._filter_of_text,
        Maker._filter_of_list,
    ),
    *(Maker._filter_of_list, Maker._any_filter, Maker._round, Maker._any_test, Maker._sum, Maker._comparison),
    *(Maker._part, Maker._made, Maker._function),
)
_STATEMENTS: tuple[Callable[[Maker], str], ...] = (
    *(
        Maker._output,
        Maker._output,
        Maker._output,
        Maker._set,
        Maker._set,
        Maker._for,
        Maker._for,
        Maker._for,
    ),
    *(Maker._if, Maker._call, Maker._filter_block, Maker._with, Maker._set_block, Maker._grow, Maker._rest),
)

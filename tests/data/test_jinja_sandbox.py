"""The sandbox of chat templates: only what is listed can be reached, it is billed, and the rest is Jinja."""

from __future__ import annotations

import re
from datetime import date
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS

from lorafit.data.jinja_costs import BUDGET, TEXT_METHODS, Budget, OverdrawnError, text_method
from lorafit.data.jinja_sandbox import MAX_TOKENS, METHODS, Sandbox

MESSAGES = [{"role": "user", "content": " Hello <World> "}, {"role": "assistant", "content": "a b\nc"}]
SANDBOX = Sandbox(date(2024, 7, 26))
OURS = sorted(
    name for name in dir(Sandbox(date(2024, 7, 26))) if name not in dir(ImmutableSandboxedEnvironment)
)


def render(source: str, **variables: Any) -> str:
    SANDBOX.begin(0)
    return "".join(SANDBOX.from_string(source).generate(messages=MESSAGES, **variables))


def by_jinja(source: str) -> str:
    """As transformers renders it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    return environment.from_string(source).render(messages=MESSAGES)


@pytest.mark.parametrize(
    "pattern",
    [
        "{{{{ 1|{} }}}}",
        "{{{{ [1]|map('{}')|list }}}}",
        "{{{{ messages|map(attribute='role')|map('{}', 1)|list }}}}",
    ],
)
def test_no_other_filter_has_a_name(pattern: str) -> None:
    names = ({*FILTERS} | {*OURS, "_step", "_weighed", "budget.weighed", "budget.charge", "__class__"}) - {
        *SANDBOX.filters
    }
    for name in sorted(names):
        with pytest.raises(TemplateError):
            render(pattern.format(name))


@pytest.mark.parametrize("filter_name", ["select", "reject"])
def test_no_other_test_has_a_name(filter_name: str) -> None:
    for name in sorted(({*TESTS, *OURS, "_step", "budget.charge"}) - {*SANDBOX.tests}):
        with pytest.raises(TemplateError):
            render(f"{{{{ [1]|{filter_name}('{name}')|list }}}}")
        with pytest.raises(TemplateError):
            render(f"{{{{ messages|{filter_name}attr('role', '{name}')|list }}}}")


@pytest.mark.parametrize(
    "value",
    [
        "''",
        "[]",
        "{}",
        "()",
        "1",
        "none",
        "range(1)",
        "namespace()",
        "namespace",
        "raise_exception",
        "strftime_now",
    ],
)
def test_no_attribute_of_ours_or_of_python_can_be_read(value: str) -> None:
    """By a dot, a key and the path of a filter."""
    known = {name for names in METHODS.values() for name in names}
    names = (
        {*dir(str), *dir(dict), *dir(list), *dir(budget_function)} | {*OURS, "__self__", "__globals__"}
    ) - known
    for name in sorted(names):
        for source in (f"{{{{ {value}.{name}() }}}}", f"{{{{ {value}['{name}']() }}}}"):
            with pytest.raises((TemplateError, TypeError)):
                render(source)
        assert "built-in" not in (text := _shown(f"{{{{ [{value}]|map(attribute='{name}')|list }}}}"))
        assert "function" not in text


def budget_function() -> None:
    """Something with the attributes of a function."""


def _shown(source: str) -> str:
    try:
        return render(source)
    except TemplateError as error:
        return type(error).__name__


@pytest.mark.parametrize(
    "source", ["{{ self }}", "{{ environment }}", "{{ context }}", "{{ budget }}", "{{ step }}"]
)
def test_nothing_of_ours_is_a_variable(source: str) -> None:
    assert "0x" not in render(source)
    assert "udget" not in render(source)


@pytest.mark.parametrize("statement", ["include 'a'", "import 'a' as b", "from 'a' import b", "extends 'a'"])
def test_other_statements_are_refused(statement: str) -> None:
    with pytest.raises(TemplateError, match="a chat template has no"):
        render("{% " + statement + " %}")


def test_blocks_and_escaping_are_refused() -> None:
    for source in ("{% block a %}{% endblock %}", "{% autoescape true %}{{ '<' }}{% endautoescape %}"):
        with pytest.raises(TemplateError, match="a chat template has no"):
            render(source)


@pytest.mark.parametrize("cost", [-1, -(10**15), 1.0, True, None, "1"])
def test_a_charge_is_a_whole_number_of_at_least_zero(cost: Any) -> None:
    budget = Budget()
    left = budget.left
    with pytest.raises(ValueError, match="whole number"):
        budget.charge(cost)
    assert budget.left == left


def test_every_method_of_a_text_has_its_price() -> None:
    for name in TEXT_METHODS:
        assert text_method(name, "a" * 1000, ("b" * 100,), {}) >= 1000
    assert text_method("split", "a" * 1000, (), {"sep": "a"}) > 60 * 1000
    assert METHODS[str] == {*TEXT_METHODS}


BIG = "{% set x = 'a' * 300000 %}{% set y = 'a' * 70000 ~ 'b' ~ 'a' * 70000 %}"
COSTLY = {
    "searches from the end": BIG + "{{ x.rfind(y) }}",
    "indices from the end": BIG + "{{ x.rindex(y) }}",
    "parts from the end": BIG + "{{ x.rpartition(y) }}",
    "splits from the end": BIG + "{{ x.rsplit(y) }}",
    "characters stripped": BIG + "{{ x.strip(y) }}",
    "characters stripped by filter": BIG + "{{ x|trim(y) }}",
    "a short search that compares all": "{% set x = 'a' * 2400 %}{% set y = 'a' * 600 ~ 'b' ~ 'a' * 600 %}"
    "{% for i in range(999) %}{{ x.find(y) }}{{ y in x }}{% endfor %}",
    "pieces": "{{ ('a b ' * 300000).split()|length }}",
    "lines": "{{ ('\\n' * 300000).splitlines()|length }}",
    "characters as a list": "{{ ('\\u4e2d' * 300000)|list|length }}",
    "titles": "{{ ('a b ' * 300000)|title|length }}",
    "a long path of attributes": "{{ ([['a']] * 20000)|map(attribute='0.' * 3000 ~ '0')|list|length }}",
    "a long path to sort by": "{{ ([['a']] * 20000)|sort(attribute='0.' * 3000 ~ '0')|length }}",
    "equal beginnings sorted": "{{ (['a' * 3000] * 1300)|sort|length }}",
    "an unpacked text": "{{ dict(*('\\u4e2d' * 11000000)) }}",
    "an unpacked text in a filter": "{{ 1|default(*('\\u4e2d' * 11000000)) }}",
    "nothing that fits, in a loop with a test": "{% for i in range(99999) if [" + "0, " * 500 + "0][0] %}{% endfor %}",
    "quoted texts": "{{ (['\\U000e0001' * 4000] * 1300)|string|length }}",
    "escaped texts": "{{ ('<' * 3000000)|e|length }}",
    "a text beside an escaped one": "{{ ('<' * 3000000 + 'a'|safe)|length }}",
    "comparisons": "{% for i in range(99999) %}{{ i < 5 < 6 }}{% endfor %}",
}  # fmt: skip
REFUSED = {
    "a precision below zero": "{{ 5|round(-300000000) }}",
    "a large precision": "{{ 5|round(300000000, 'ceil') }}",
    "a text that is rounded": "{{ 'a'|round(9, 'ceil') }}",
    "a text that is odd": "{{ '%500000000d' is odd }}",
    "a text that is even": "{{ ['%500000000d']|select('even')|list }}",
    "a text that is divided": "{{ '%500000000d' is divisibleby(3) }}",
    "numbers of one hash": "{{ range(0, (2**61-1) * 30000, 2**61-1)|unique|list }}",
    "large literals": "{{ {0xffffffffffffffffffffff: 1} }}",
    "nested tuples": "{% set ns = namespace(a=1) %}{% for i in range(9999) %}{% set ns.a = (ns.a,) %}{% endfor %}"
    "{{ ns.a in {} }}",
    "a tuple as a key": "{{ {(1, 2): 1} }}",
    "a tuple as a key of pairs": "{{ dict([[(1, 2), 1]]) }}",
    "a tuple as a name": "{{ namespace([[(1, 2), 1]]) }}",
    "tuples made unique": "{{ [(1, 2)]|unique|list }}",
    "differences of keys": "{{ messages[0].keys() - messages[0].keys() }}",
    "a date with a width": "{{ strftime_now('%099999d') }}",
    "a large whole number": "{{ 1e300|int }}",
}  # fmt: skip


@pytest.mark.parametrize("source", COSTLY.values(), ids=COSTLY)
def test_the_worst_case_is_billed(source: str) -> None:
    with pytest.raises(OverdrawnError):
        render(source)


@pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED)
def test_what_has_no_price_is_refused(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert not isinstance(caught.value, OverdrawnError)


def test_a_source_of_too_many_words_is_refused_before_it_is_compiled() -> None:
    with pytest.raises(TemplateError, match="words and signs"):
        render("{{a}}" * (MAX_TOKENS // 2))
    assert render("{{a}}" * (MAX_TOKENS // 4)) == ""


def test_a_message_is_cut() -> None:
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('a' * 1000000) }}")
    assert len(str(caught.value)) == 1000


def test_membership_in_a_dict_costs_no_more_for_a_long_one() -> None:
    """Templates ask every turn for its keys."""
    SANDBOX.begin(0)
    turn = {"role": "user", "content": "a" * 4_000_000}
    assert "".join(SANDBOX.from_string("{{ 'x' in turn }}" * 20).generate(turn=turn)) == "False" * 20
    assert SANDBOX.budget.left > BUDGET - 20_000


SAME = r"""
messages|length; messages|first; messages|last; messages|list|count; nothing|default('x'); ''|d('x', true);
messages[0]|items|list; messages[0]|dictsort; messages|map(attribute='role')|join(', '); [3, 1, 2]|sort;
messages|selectattr('role', 'equalto', 'user')|list; messages|rejectattr('role', 'eq', 'user')|list|length;
messages|selectattr('role')|map('length')|list; [1, 2, 3]|select('odd')|list; [1, 2]|reject('even')|list;
messages|map('items')|map('list')|list; ['b', 'B', 'a']|unique|list; messages|unique(attribute='role')|list;
['b', 'B', 'a']|sort(case_sensitive=true)|join; messages|sort(attribute='content', reverse=true)|list;
'abc'|reverse; ['b', 'A']|min; ['b', 'A']|max; messages|join('-', attribute='role'); 'a b c'|title;
'a-b (c) <d'|title; 'aBc'|upper; 'aBc'|lower; 'aBc'|capitalize; ' a '|trim; 'xaxx'|trim('x'); '<"a">'|e;
'<'|safe ~ '>'; '<'|safe + '>'; '>' + '<'|safe; ('<'|safe).split('a'); 'a.b.c'|replace('.', '-', 1);
'a\nb'|indent(2, true); '7'|int; 'x'|int(3); '1.5'|float; -3|abs; 2.567|round(1); 2.1|round(0, 'ceil');
123|round(-1)|string; [1, 'a']|string; 3 is odd; 4 is divisibleby(2); 'a' in 'abc'; 'a' not in ['b'];
'role' in messages[0]; x is defined; messages is sequence; messages[0] is mapping; 'a' is string; 1 is number;
none is none; 1 is in [1, 2]; 'a' is in 'abc'; 1 is eq 1; 'a' is lower; 1.5 is float; true is boolean;
x is undefined; messages is iterable; messages is sameas messages; range is callable; 1 < 2 < 3;
3 > 2 >= 2 == 2 != 1; 1 + 2 * 3 - 4 / 2; 7 // 2; 7 % 3; 2 ** 10; 'a' * 3; [1] + [2]; (1,) + (2,);
'a' ~ 1 ~ none; -(-3); messages[0]['content'][1:4]; messages[1:]; messages[::-1]|length;
messages[0].get('x', 'y'); messages[0].x; messages[0].keys()|list; messages[0].values()|list;
messages[0].items()|list; [1, 2, 1].count(1); (1, 2).index(2); 'a,b'.split(','); 'a b  c'.split();
'a,b,c'.split(',', 1); 'a,b,c'.rsplit(',', 1); 'a\nb'.splitlines(); 'a,b'.split(sep=','); 'abcb'.find('b');
'abcb'.rfind('b'); 'abc'.partition('b'); 'abcb'.rpartition('b'); 'abc'.replace('b', 'x'); '-'.join(['a', 'b']);
'-'.join('abc'); 'xxaxx'.strip('x'); ' a'.lstrip(); 'a '.rstrip(); 'abc'.startswith('a');
'abc'.endswith(('b', 'c')); 'abc'.removeprefix('a'); 'abc'.removesuffix('c'); 'ABC'.casefold(); 'a1'.isalnum();
'a'.isalpha(); '1'.isdigit(); '1'.isdecimal(); '1'.isnumeric(); ' '.isspace(); 'A'.istitle(); 'A'.isupper();
'a'.islower(); 'aB'.swapcase(); 'a b'.title(); 'aB'.capitalize(); 'abcb'.count('b'); 'ab'.index('b');
dict(a=1, b=2); dict([['a', 1]]); dict({'a': 1}, b=2); namespace(a=1).a; range(3)|list; {'a': 1, 2: 3}.a;
{1.5: 1}; 'abc'[1]; 'a' if false else 'b'; not 1; 1 and 0 or 2; [1, 2][0]; (1, 2)[-1]; 'abc'.rindex('c')
"""
EXPRESSIONS = SAME.strip().replace(";\n", "; ").split("; ")
STATEMENTS = [
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ m.role }}{{ loop.previtem }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{% else %}none{% endfor %}",
    "{% for m in messages recursive %}{{ m.role or m }}{{ loop(m.values()) if loop.depth == 1 }}{% endfor %}",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in [1, 1, 2] %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i) }}{{ loop.nextitem }}{% endfor %}",
    "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}"
    "{{ m(1) }}{{ m(1, 2, 3, c=4) }}{{ m(*[1, 2]) }}",
    "{% macro m(a) %}[{{ caller(a) }}]{% endmacro %}{% call(x) m('b') %}{{ x }}c{% endcall %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% set x %}{{ messages[0].role }}!{% endset %}{{ x|upper }}{% set a, b = (1, 2) %}{{ a + b }}",
    "{% with a = 1 %}{{ a }}{% endwith %}{% filter upper %}abc{% endfilter %}{% raw %}{{ x }}{% endraw %}{# no #}",
    "{% if 'a' in messages[0].content %}a{% elif messages[1] %}b{% else %}c{% endif %}{{- ' x ' -}}  y",
]  # fmt: skip


@pytest.mark.parametrize("source", [*(f"{{{{ {each} }}}}" for each in EXPRESSIONS), *STATEMENTS])
def test_it_renders_as_transformers_does(source: str) -> None:
    assert render(source) == by_jinja(source)


def test_everything_that_is_allowed_is_compared_with_jinja() -> None:
    compared = set(re.findall(r"\w+", " ".join([SAME, *STATEMENTS])))
    names = {*SANDBOX.filters} | {*SANDBOX.tests} | {name for names in METHODS.values() for name in names}
    same_elsewhere = {"tojson", "escape", "escaped", "filter", "test", "equalto", "integer", "upper", "even"}
    signs = {"ge", "gt", "greaterthan", "le", "lt", "lessthan", "ne"}
    assert {name for name in names if name.isalpha()} - compared <= same_elsewhere | signs

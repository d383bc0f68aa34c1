"""Hostile chat templates: ways out of the sandbox, loops without end, and every way to make much out of little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.hostile.case import Case, Place, cases


def doubled(double: str, use: str, start: str = "'aaaaaaaaaa'") -> str:
    """A template that doubles a value sixty times, then uses it."""
    step = "{% for i in range(60) %}" + double + "{% endfor %}"
    return "{% set ns = namespace(x=" + start + ", y=" + start + ") %}" + step + use


def often(what: str) -> str:
    return "{% set x = 'a' * 4000000 %}{% for i in range(99999) %}" + what + "{% endfor %}"


LISTS = "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
TUPLES = "{% set ns.x = (ns.x, ns.x) %}"
PRINTED = "{{ ns.x|length }}"
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by key": "{{ ''['__class__']['__mro__'] }}",
    "classes by filter": "{{ ''|attr('__class__') }}",
    "classes by map": "{{ [messages]|map(attribute='__class__')|first|map(attribute='x')|list }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "classes by format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "classes by format filter": "{{ '%s'|format(messages.__class__) }}",
    "classes by undefined": "{{ nothing.__init__.__globals__ }}",
    "globals of a function": "{{ raise_exception.__globals__.os.system('touch PWNED') }}",
    "globals of a cycler": "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('touch PWNED') }}",
    "globals of namespace": "{{ namespace.__init__.__globals__.os.system('touch PWNED') }}",
    "globals of the template": "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._environment.globals.clear() }}",
    "globals of a loop": "{% for x in messages %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "frame of a generator": "{% set g = messages|map('upper') %}{{ g.gi_frame.f_back }}",
    "code of a caller": "{% macro m() %}{{ caller.__func__.__code__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "builtins": "{{ __import__('os').system('touch PWNED') }}",
    "builtins by open": "{{ open('PWNED', 'w') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch PWNED') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '../../etc/passwd' %}",
    "changes the row": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "changes a turn": "{{ messages[0].update({'content': 'x'}) }}",
    "sets an attribute": "{% set messages.x = 1 %}",
    "statement": "{% do messages.pop() %}",
}
ENDLESS = {
    "range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{{ loop([[1]]) }}{% endfor %}",
    "recursive loop of ranges": "{% for x in range(99) recursive %}{{ loop(range(99999)) if loop.depth < 90 }}"
    "{% endfor %}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% call m() %}{% call m() %}{% endcall %}{% endcall %}" + often("{{ x.upper() }}"),
    "long body": "{% for i in range(99999) %}" + "{% set x = 1 %}" * 5_000 + "{% endfor %}",
    "searches": often("{{ 'aab' in x }}"),
    "copies": often("{% set y = x[1:] %}"),
    "capitals": often("{% set y = x.upper() %}"),
    "capitals by filter": often("{% set y = x|title %}"),
    "comparisons": often("{% set z = 'a' * 4000000 %}{{ x == z }}"),
    "lists of ranges": "{% for i in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "maxima": "{% for i in range(99999) %}{{ range(99999)|map('abs')|max }}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{{ range(99999)|sort|first }}{% endfor %}",
    "splitting": often("{% set y = x.split('a') %}"),
    "membership": "{% set x = range(99999)|list %}{% for i in range(99999) %}{{ 'a' in x }}{% endfor %}",
    "views": "{% for i in range(999999) %}{{ messages[0].items() == messages[0].items() }}{% endfor %}",
}
LARGE = {
    "product": "{{ 'a' * 10 ** 10 }}",
    "product of lists": "{{ ([1] * 10 ** 9)|length }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "repeated squares": "{% set ns = namespace(x=9 ** 9) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "hexadecimal": "{{ ('f' * 4000000)|int(0, 16) }}",
    "long literal": "{{ 0x" + "f" * 90_000 + " // 3 }}",
    "center": "{{ 'a'|center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 1000000}) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format filter": "{{ '%010000000000d'|format(1) }}",
    "indent": "{{ 'a\n'|indent(10 ** 10) }}",
    "indent with text": "{{ ('\n' * 100000)|indent('a' * 100000) }}",
    "tojson indent": "{{ [[1]]|tojson(indent=10 ** 10) }}",
    "tojson indent with text": "{{ [[1]]|tojson(indent='a' * 1000000) }}",
    "wordwrap": "{{ ('a ' * 100)|wordwrap(1, wrapstring='b' * 1000000) }}",
    "batch": "{{ [1]|batch(10 ** 10, 'x')|list }}",
    "slice": "{{ [1]|slice(10 ** 10)|list }}",
    "lipsum": "{{ lipsum(10 ** 9) }}",
    "join filter": "{{ range(99999)|join('a' * 4000000) }}",
    "join": "{{ ('a' * 4000000).join(range(99999)|map('string')|list) }}",
    "replace filter": "{{ ('a' * 4000000)|replace('a', 'b' * 4000000) }}",
    "replace": "{{ ('a' * 4000000).replace('', 'b' * 4000000) }}",
    "sum": "{{ [[1] * 1000] * 1000000|sum(start=[]) }}",
    "strftime": "{{ strftime_now('%c' * 1000000) }}",
    "sums": doubled("{% set ns.x = ns.x + ns.x %}", PRINTED),
    "concatenations": doubled("{% set ns.x = ns.x ~ ns.x %}", PRINTED),
    "concatenations in one": doubled("{% set ns.x = ns.x" + " ~ ns.x" * 999 + " %}", PRINTED),
    "set blocks": doubled("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}", PRINTED),
    "macros": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + doubled("{% set ns.x = m(ns.x) %}", PRINTED),
    "lists of lists": doubled(LISTS, "{{ ns.x }}", "[1]"),
    "lists as text": doubled(LISTS, "{{ ns.x|string|length }}", "[1]"),
    "lists as JSON": doubled(LISTS, "{{ ns.x|tojson }}", "[1]"),
    "lists compared": doubled(LISTS, "{{ ns.x == ns.y }}", "[1]"),
    "lists searched": doubled(LISTS, "{{ ns.x in [ns.y] }}", "[1]"),
    "lists sorted": doubled(LISTS, "{{ [ns.x, ns.y]|sort|length }}", "[1]"),
    "lists tested": doubled(LISTS, "{{ ns.x is eq(ns.y) }}", "[1]"),
    "lists counted": doubled(LISTS, "{{ [ns.x].count(ns.y) }}", "[1]"),
    "lists joined": doubled(LISTS, "{{ [ns.x]|join }}", "[1]"),
    "tuples as keys": doubled(TUPLES, "{{ {ns.x: 1} }}", "(1,)"),
    "tuples looked up": doubled(TUPLES, "{{ messages[0][ns.x] }}", "(1,)"),
    "tuples made unique": doubled(TUPLES, "{{ [ns.x]|unique|list|length }}", "(1,)"),
    "namespaces": doubled("{% set ns.x = namespace(a=ns.x, b=ns.x) %}", "{{ ns.x }}", "namespace()"),
    "namespace in itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "text in a loop": "{% set y %}{% for i in range(99999) %}" + "a" * 90_000 + "{% endfor %}{% endset %}",
    "output": "{% for i in range(9999) %}{{ 'abcdefgh' * 9999 }}{% endfor %}",
    "message": "{{ raise_exception('a' * 4000000) }}",
}
# Names of ours, and operations whose worst case in CPython is far above the size of what they read.
BIG = "{% set x = 'a' * 600000 %}{% set y = 'a' * 150000 ~ 'b' ~ 'a' * 150000 %}"
DEAR = {
    "refill by a filter": "{{ (-10 ** 15)|_step }}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "refill by map": "{{ [-10 ** 15]|map('_step')|list }}{{ 'a' * 4 * 10 ** 9 }}",
    "search from the end": BIG + "{{ x.rfind(y) }}",
    "index from the end": BIG + "{{ x.rindex(y) }}",
    "parts from the end": BIG + "{{ x.rpartition(y) }}",
    "splits from the end": BIG + "{{ x.rsplit(y) }}",
    "strip": BIG + "{{ x.strip(y) }}",
    "trim": BIG + "{{ x|trim(y) }}",
    "round below zero": "{{ 5|round(-10 ** 9) }}",
    "round up": "{{ 5|round(10 ** 9, 'ceil') }}",
    "round a text": "{{ 'a'|round(10, 'ceil') }}",
    "odd format": "{{ '%10000000000d' is odd }}",
    "even format": "{{ ['%10000000000d']|select('even')|list }}",
    "divided format": "{{ '%10000000000d' is divisibleby(3) }}",
    "equal hashes": "{{ range(0, (2 ** 61 - 1) * 50000, 2 ** 61 - 1)|unique|list|length }}",
    "long path": "{{ ([['a']] * 20000)|map(attribute='0.' * 30000 ~ '0')|list|length }}",
    "list of characters": "{{ ('\\u4e2d' * 9000000)|list|length }}",
    "titles": "{{ ('a b ' * 2000000)|title|length }}",
    "unpacked": "{{ dict(*('\\u4e2d' * 9000000)) }}",
    "deep tuple hashed": "{% set ns = namespace(x=1) %}{% for i in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}"
    "{{ messages[0][ns.x] }}",
    "date with a width": "{{ strftime_now('%0999999999d') }}",
}
SOURCE: dict[str, str | bytes] = {
    "parentheses": "{{ " + "(" * 40_000 + "1" + ")" * 40_000 + " }}",
    "brackets": "{{ " + "[" * 90_000,
    "sum of many": "{{ 1" + "+1" * 40_000 + " }}",
    "conditions": "{% if 1 %}" * 9_000,
    "loops in loops": "{% for x in [1] %}" * 200 + "{% endfor %}" * 200,
    "comments": "{#" * 45_000,
    "a text without end": "{{ '" + "a" * 90_000,
    "too long": "a" * 1_000_000,
    "not UTF-8": b"\xff\xfe{{ 1 }}",
    "null": b"\0" * 1000,
    "nothing": "",
}


def file(source: str | bytes) -> Callable[[Place], Path]:
    return lambda place: place.file("chat.jinja", source)


CASES = cases(
    {name: Case(file(source)) for name, source in {**ESCAPES, **ENDLESS, **LARGE, **DEAR, **SOURCE}.items()}
)

"""Mistakes on the command line, as typer raises them, in the words of all other errors."""

from __future__ import annotations

import re
from typing import Any

from lorafit.errors import Problem, similar

_COMMAND = re.compile(r"No such command '(?P<name>.*?)'\.(?: Did you mean '(?P<near>[^']+)'\?)?", re.DOTALL)
_EXTRA = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((?P<words>.*)\)", re.DOTALL)


def usage_problem(error: Any) -> Problem:
    """The problem of one of click's errors, of which typer has a copy without public names."""
    context = getattr(error, "ctx", None)
    hint = f"see `{context.command_path if context else 'lorafit'} --help`"
    message = str(error.message).removeprefix("Value error, ").partition(", unable to")[0].rstrip(".")
    message = message[:1].lower() + message[1:]
    if hasattr(error, "possibilities"):  # for an unknown option
        return Problem(
            f"there is no option `{error.option_name}`",
            hint=_instead(error.option_name, error.possibilities or []) or hint,
        )
    if (parameter := getattr(error, "param", None)) is not None:
        name = _name(parameter)
        return Problem(f"`{name}`: {message}" if message else f"`{name}` is missing", hint=hint)
    if found := _COMMAND.match(error.message):
        near = f"did you mean `lorafit {found['near']}`?" if found["near"] else hint
        return Problem(f"there is no command `{found['name']}`", hint=near)
    if found := _EXTRA.match(error.message):
        return Problem(f"unexpected `{found['words']}`", hint=hint)
    return Problem(message, hint=hint)


def _instead(option: str, possibilities: list[str]) -> str:
    from lorafit.config.load import option_hint

    near = similar(option, possibilities)
    return option_hint(option) or (f"did you mean `{near[0]}`?" if near else "")


def _name(parameter: Any) -> str:
    """`--top` of an option, `RUN` of an argument."""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return str(parameter.metavar or parameter.name).upper()

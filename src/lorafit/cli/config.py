"""`lorafit config`: all keys with type, default and meaning, as text or as a JSON Schema for editors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorafit.cli.output import put_text


def config(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A key or section, such as lora.rank.", show_default=False),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference as Markdown.")] = False,
) -> None:
    """List the configuration keys, or explain one.

    lorafit config lora.rank
    """
    import json

    from lorafit.config import reference
    from lorafit.config.guide import GUIDE
    from lorafit.config.load import nearest_key
    from lorafit.config.schema import Config
    from lorafit.errors import ConfigError
    from lorafit.observe.console import note, table

    if schema:
        put_text(json.dumps(Config.model_json_schema(), indent=2))
        return
    if markdown:
        put_text(reference.markdown(), end="")
        return
    rows = [
        [entry.name, entry.kind, entry.default, entry.help.replace("`", "")]
        for section, _, entries in reference.sections()
        for entry in entries
        if key is None or key in (section, entry.name)
    ]
    if not rows:
        raise ConfigError(f"there is no key `{key}`", hint=nearest_key(key or ""))
    table(["key", "type", "default", "what it does"], rows)
    if key in GUIDE:
        note(f"usual   {GUIDE[key].usual}", stream=sys.stdout)
        note(f"change  {GUIDE[key].change}", stream=sys.stdout)

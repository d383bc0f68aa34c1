"""`lorafit export`: writes a run for other programs, and verifies the result."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorafit.cli import options
from lorafit.cli.output import put_json, put_line


def export(
    run: options.RunArgument,
    kind: Annotated[
        Literal["adapter", "merged", "gguf", "gguf-lora", "ollama"],
        typer.Argument(
            help="PEFT adapter, merged model for transformers, GGUF for llama.cpp, the adapter alone in GGUF, or a "
            "folder for `ollama create`."
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(help="Folder to write. The default is in the run's exports/.", show_default=False),
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="merged: auto (the base's), f32, bf16, f16. gguf, ollama: q8_0 (default), q4_0, f16, bf16, f32.",
            show_default=False,
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload to the hub too, privately.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: visible for everybody.")] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the export with the adapter. It is marked so.")
    ] = False,
    offline: options.OfflineOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Export a run and verify that the export gives the same answers as the adapter.

    lorafit export runs/demo merged

    lorafit export runs/demo gguf --type q4_0 --output demo-gguf
    """

    from lorafit.errors import ConfigError

    if public and push is None:
        raise ConfigError("--public needs --push", hint="add --push OWNER/NAME")
    if push is not None and offline:
        raise ConfigError("--push needs a connection", hint="remove --offline")

    from lorafit.export.run import export_run

    done = export_run(run, kind, output=output, type_name=type_name, verify=not no_verify, offline=offline)
    parity = done.parity
    if parity["verified"]:
        put_line(
            f"verified by {parity['program']}: {parity['prompts']} prompts, same text, tokens and ends; logits within "
            f"{parity['largest_logit_difference']:.2g} (bound {parity['bound']:.2g})",
            err=True,
        )
    else:
        put_line(f"warning: not verified: {parity['why']}", err=True)
    summary = done.as_dict()
    if push is not None:
        from lorafit.export.push import push as push_folder

        summary["pushed"] = push_folder(done.path, push, private=not public)
        put_line(f"pushed to {summary['pushed']}", err=True)
    if as_json:
        put_json(summary)
    else:
        put_line(done.path)

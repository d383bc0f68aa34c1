"""`lorafit export`: writes a run for other programs, and verifies the result."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line


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
        typer.Option(
            metavar="FOLDER",
            help="Folder to write. The default is in the run's exports/.",
            show_default=False,
        ),
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="merged: auto (the base's), f32, bf16, f16. gguf, ollama: q8_0 (default), q6_k, q4_k_m and more.",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="gguf, ollama: try types from small to large, keep the first that is good."
        ),
    ] = False,
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="With --fit: most rise of the held-out loss. 1% if not given.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="With --fit: JSONL file of prompts with answers that must stay right. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="RUN",
            help="gguf-lora: another run on the same base, whose adapter is put into the folder. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    check_for: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SERVER",
            help="adapter: vllm or sglang; refuse what it would not load. Can be repeated.",
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

    if fit and (type_name is not None or no_verify):
        raise ConfigError("--fit chooses the type, by comparing", hint="remove --type and --no-verify")
    if not fit and (max_loss is not None or tasks):
        raise ConfigError("--max-loss and --tasks need --fit", hint="add --fit")

    if check_for and kind != "adapter":
        raise ConfigError("--check-for is for adapters", hint="lorafit export RUN adapter --check-for vllm")

    load_torch()
    from lorafit.export.parity import sentence
    from lorafit.export.run import export_run
    from lorafit.observe.units import memory_size

    if check_for:
        from lorafit.export.servers import check_servers

        for line in check_servers(run, check_for, offline=offline):
            put_line(line, err=True)
    if fit:
        from lorafit.export.fit import fit_or_fail, share

        bound = share(max_loss)
        done = fit_or_fail(run, kind, output=output, most_loss=bound, tasks=tasks or [], offline=offline)
    else:
        done = export_run(
            run,
            kind,
            output=output,
            type_name=type_name,
            verify=not no_verify,
            offline=offline,
            others=others or [],
        )
    parity = done.parity
    if parity["verified"]:
        put_line(f"verified by {parity['program']}: {sentence(parity)}", err=True)
        for name, other in parity.get("others", {}).items():
            put_line(f"{name}: {sentence(other)}", err=True)
    else:
        put_line(f"warning: not verified: {parity['why']}", err=True)
    if "other_types" in parity:
        put_line(f"note: {parity['other_types']}", err=True)
    put_line(f"size {memory_size(sum(done.files.values()))}", err=True)
    summary = done.as_dict()
    if push is not None:
        from lorafit.export.push import push as push_folder

        summary["pushed"] = push_folder(done.path, push, private=not public)
        put_line(f"pushed to {summary['pushed']}", err=True)
    if as_json:
        put_json(summary)
    else:
        put_line(done.path)

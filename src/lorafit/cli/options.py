"""The options and arguments that several commands share, with one help text each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

if TYPE_CHECKING:
    from lorafit.model.quant import Quantize
else:
    Quantize = str  # the schema's names are imported when the option is used: `lorafit --help` must stay fast


def _quantize(name: str) -> str:
    from lorafit.config.schema import ModelSection

    names = get_args(ModelSection.model_fields["quantize"].annotation)
    if name not in names:
        raise typer.BadParameter(f"`{name}` is not one of {', '.join(names)}")
    return name


def _device(name: str) -> str:
    from lorafit.config.fields import device_name

    try:
        return device_name(name)
    except ValueError as error:
        raise typer.BadParameter(f"`{name}`: {error}") from None


# A run from a recipe
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [SECTION.KEY=VALUE]...",
        help="A recipe (a YAML file or a shipped name) and overrides. `lorafit config` lists the keys.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="Base model: hub id, folder or GGUF file.", show_default=False
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="ROWS",
        help="Rows: a file, a folder or a hub data set. Can be repeated.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="FOLDER",
        help="Run directory that `lorafit train` creates. The default is runs/MODEL-DATE-TIME.",
        show_default=False,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="Recipe file or shipped name.", show_default=False),
]
AutoOption = Annotated[
    bool,
    typer.Option("--auto", help="When memory is short, select settings that fit (run.too_large=auto)."),
]

# A trained model
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")]
SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Run directory, PEFT adapter folder, model folder, GGUF file or hub id."
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="FOLDER", help="PEFT adapter to attach to a base model.", show_default=False
    ),
]
OtherBaseOption = Annotated[
    bool, typer.Option("--other-base", help="Accept an adapter that was made on another base model.")
]
BaseOption = Annotated[bool, typer.Option("--base", help="Disable the adapter.")]
CompareOption = Annotated[bool, typer.Option("--compare", help="Show base and tuned answers side by side.")]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="System prompt in place of the run's.", show_default=False),
]
DeviceOption = Annotated[
    str, typer.Option("--device", parser=_device, metavar="NAME", help="auto, cpu, gpu, cuda, cuda:N or mps.")
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        "--quantize",
        metavar="KIND",
        parser=_quantize,
        help="Quantization of the base, a value of `model.quantize`. The default is that of the training.",
        show_default=False,
    ),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Open no connection.")]

# Generation
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, help="Sample from the k most probable tokens; 0 is all.")
]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the tokens that have this probability."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]

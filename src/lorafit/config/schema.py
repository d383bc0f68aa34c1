"""Every key of a run, once: its type, default, bounds and help. No default is anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lorafit.config.fields import (
    AUTO,
    KEEPS_RESULTS,
    Encoding,
    Interval,
    OrAuto,
    Section,
    Strings,
    TimeBudget,
    as_mapping,
    device_name,
    resumable,
)
from lorafit.config.methods import Method, method_fault

Quantize = Literal["none", "int8", "nf4", "fp8"]  # "none" and the names of model/quant.py's QUANTIZERS
Offload = Literal["none", "layers"]


class ModelSection(Section):
    """The base model and how it is held in memory."""

    name: str = resumable(
        min_length=1, description="Hub id (`owner/name`) or local folder of the base model."
    )
    revision: str | None = resumable(None, description="Branch, tag or commit on the hub; a commit pins it.")
    device: Annotated[str, AfterValidator(device_name)] = resumable(
        "auto",
        description="Where to compute: `cpu`, `gpu`, `cuda`, `cuda:N` or `mps`. `auto` takes CUDA, then Apple MPS, "
        "then the CPU; `gpu` takes CUDA or MPS.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="Type of the base and of the compute: `auto` is bfloat16 where the hardware multiplies it, "
        "float16 on older CUDA chips, else float32. The adapter is float32 always (float64 with float64).",
    )
    quantize: Quantize = Field(
        "none",
        description="Type of the frozen linears: `int8` is faster than 16 bits and half as large, `nf4` is the "
        "smallest and slower (extra `nf4`), `fp8` is for CUDA chips of capability 8.9 or more.",
    )
    offload: Offload = resumable(
        "none",
        description="For a base larger than the GPU: `layers` keeps the frozen layers in the host's memory and copies "
        "each to the GPU while another one computes (docs/gpu.md). It costs time and does not change the result.",
    )


class LoraSection(Section):
    """The adapter."""

    rank: int = Field(16, ge=1, le=1024, description="Rank r of the two adapter matrices.")
    alpha: float = Field(32, gt=0, description="The adapter's output is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    targets: Strings = Field(
        ("all-linear",),
        min_length=1,
        description="Modules to adapt: names (`q_proj`), full names (`layers.3.mlp.up_proj`), `all-linear`, or "
        "one regular expression written `re:...` over full names. A name that matches nothing is an error.",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA).")
    ranks: Annotated[dict[str, Annotated[int, Field(ge=1, le=1024)]], BeforeValidator(as_mapping)] = Field(
        {},
        description="Ranks of modules that differ from `lora.rank`, by names as in `lora.targets`: `{q_proj: 8}`. The "
        "first name that matches counts.",
    )
    alphas: Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(as_mapping)] = Field(
        {}, description="The same for `lora.alpha`."
    )
    init: Literal["default", "pissa", "olora", "eva"] = Field(
        "default",
        description="Where A and B start: `default` at no change, `eva` too, with A at the directions in which the "
        "inputs of the first rows vary most; `pissa` and `olora` at a part of the base's weight (docs/variants.md). "
        "Their folder is plain LoRA of twice the rank, and the base stays as it is.",
    )
    dora: bool = Field(
        False,
        description="DoRA: each row of an adapted weight has a learned length. It is slower (docs/variants.md).",
    )
    b_rate: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="LoRA+: the learning rate of B is this many times `train.learning_rate`.",
    )
    layers: int | None = Field(
        None,
        ge=1,
        description="Adapt only this many of the upper layers. Nothing below them needs a backward pass, and "
        "`train.keep_activations` computes it once per row.",
    )
    tokens: Strings = Field(
        (),
        description="Tokens whose rows of embedding and head are trained, such as `[<tool>, </tool>]`. One that the "
        "model does not have is added, and starts at the mean of its pieces (docs/variants.md).",
    )
    save_modules: tuple[Literal["embed_tokens", "lm_head"], ...] = Field(
        (),
        description="Tables that are trained and saved whole, beside the adapter: `embed_tokens`, `lm_head`. This "
        "needs much memory; `lora.tokens` trains some rows only.",
    )
    init_from: str | None = resumable(
        None,
        description="PEFT adapter (folder or hub id) to continue; it sets rank, alpha, targets and rslora.",
    )
    other_base: bool = resumable(
        False, description="Continue `lora.init_from` also where it was made on another base model."
    )


class DataSection(Section):
    """The rows, how they are rendered as text, and which tokens are supervised."""

    path: Strings = resumable(
        min_length=1, description="Files, folders, patterns (`rows/*.jsonl`) or hub data sets (`owner/name`)."
    )
    weights: tuple[Annotated[float, Field(gt=0, le=100)], ...] | None = Field(
        None,
        description="How often an epoch sees each path's rows, one number per path: 2 is twice, 0.5 half.",
    )
    revision: str | None = resumable(None, description="Revision of a hub data set; a commit pins it.")
    split: str = resumable(
        "train",
        description="Split of a hub data set or of a folder with splits, or a part: `train[:1000]`, `train[10%:20%]`.",
    )
    config: str | None = resumable(None, description="Configuration of a data set that has several.")
    columns: Annotated[dict[str, str], BeforeValidator(as_mapping)] = resumable(
        {},
        description="Columns of a table by field: `{instruction: question, output: answer}`. The fields are "
        "`instruction`, `input`, `output`, `system`, `prompt`, `completion`, `text`, `messages`, `conversations`, "
        "`tools`, `history`, `weight` and `train`; a column is a name or a path (`answers.text.0`). Usual names are "
        "found without it.",
    )
    encoding: Encoding = resumable(
        "utf-8", description="Encoding of text files, such as `cp949` or `utf-16`."
    )
    bad_rows: Literal["error", "drop"] = resumable(
        "error",
        description="Rows that cannot be used end the run, or are left out and counted with the reason.",
    )
    drop_rows: Strings = resumable(
        (),
        description="Rows to leave out, by their ids: files with an id per line, or ids. `lorafit rows RUN --ids` "
        "prints the ids of rows that are worth a look.",
    )
    eval_path: Strings = resumable(
        (),
        description="Rows to measure the loss on, as `data.path`; then `data.holdout` takes no training rows.",
    )
    eval_split: str | None = resumable(
        None, description="Split to measure the loss on, of `data.eval_path` or else of `data.path`."
    )
    format: Literal["auto", "alpaca", "messages", "sharegpt", "completion", "text", "preference"] = resumable(
        "auto",
        description="Row format; `auto` detects it and says why. `preference` (`chosen` and `rejected`, or `label`) is "
        "that of every `train.method` but `sft`.",
    )
    template: str = resumable(
        "auto",
        description="How rows are rendered as text: `classic`, `alpaca`, `chat` (the model's own), a `.jinja` file, or "
        "`auto`: the model's chat template, or `alpaca` for instruction rows of a model without one.",
    )
    system: str = resumable("", description="System prompt for rows that have none.")
    max_length: int = resumable(2048, ge=8, le=1_048_576, description="Longest row in tokens.")
    too_long: Literal["error", "truncate", "drop", "split"] = resumable(
        "error",
        description="What happens to a longer row. `split` cuts texts (format `text`) into several rows; each repeats "
        "an eighth of `data.max_length` from the one before as context. A cut answer is always reported.",
    )
    template_args: dict[str, bool | int | float | str] = resumable(
        {},
        description="Variables of the chat template, such as `{enable_thinking: false}`. They belong to the run: "
        "generate, chat, serve and exports use them too.",
    )
    parse_special: bool = resumable(
        False,
        description="In `text` and `completion` rows, read the texts of control tokens (`<s>`) as these tokens.",
    )
    train_on: Literal["response", "last", "all"] = resumable(
        "response",
        description="Supervised tokens: those of the answers, of the last answer of each row, or all.",
    )
    eos: bool = resumable(
        True, description="End each answer with the stop token where the template has none, and supervise it."
    )
    packing: bool = resumable(
        True, description="Pack several rows of a step into one pass; no row attends to another."
    )
    shuffle: bool = Field(True, description="New row order every epoch, from the seed; else file order.")
    order: Literal["hash"] | None = Field(
        None,
        description="`hash`: the place of a row, in each epoch and among the held-out rows, is a function of its own "
        "id. The others keep theirs without it, and `lorafit without` can remove rows. `null`: a function of all rows.",
    )
    holdout: float = Field(
        100,
        ge=0,
        description="Rows kept out of training to measure the loss on: a fraction below 1 or a number of rows, at most "
        "a tenth of all; 0 for none.",
    )


class TrainSection(Section):
    """The loop."""

    method: Method = Field(
        "sft",
        description="What is learned: `sft` the answers of the rows; `dpo`, `orpo`, `simpo` that one answer is better "
        "than another (`chosen` and `rejected`); `kto` that an answer is good or bad (docs/preferences.md).",
    )
    beta: float | None = Field(
        None,
        gt=0,
        le=100,
        description="How much a divergence from the starting point costs (`dpo`, `kto`), the scale of the margin "
        "(`simpo`), or the weight lambda of the odds ratio (`orpo`). By default 0.1, and 2 for `simpo`.",
    )
    loss_type: Literal["sigmoid", "sigmoid_norm", "robust"] = Field(
        "sigmoid",
        description="The loss of `dpo`: of the answers' log-probabilities, of their means per token (`sigmoid_norm`), "
        "or with `train.label_smoothing` made unbiased (`robust`).",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs whose order may be wrong (`dpo`, `simpo`)."
    )
    simpo_gamma: float = Field(0.5, ge=0, le=100, description="The margin that `simpo` wants.")
    desirable_weight: float = Field(1.0, gt=0, le=1000, description="Weight of good answers (`kto`).")
    undesirable_weight: float = Field(1.0, gt=0, le=1000, description="Weight of bad answers (`kto`).")
    epochs: Annotated[float, Field(gt=0, le=1000), OrAuto] = Field(
        AUTO,
        description="Passes over the rows. `auto` is more for fewer rows and short answers (docs/defaults.md); the "
        "run ends earlier where the held-out loss rises.",
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Length of the run and of its schedule in optimizer steps; overrides `epochs`.",
    )
    budget: TimeBudget | None = Field(
        None,
        description="Length of the run in time: `20min`, `1h30m`, seconds, or a clock time such as `18:00`; overrides "
        "`epochs`. Loading, measuring, saving and the proof are in it, pauses are not (a clock time passes).",
    )
    batch_size: Annotated[int, Field(ge=1, le=65536), OrAuto] = Field(
        AUTO, description="Rows per optimizer step. `auto` is 16, and fewer where there are few rows."
    )
    micro_batch_tokens: int = resumable(
        2048,
        ge=8,
        description="Most tokens in one forward pass; a longer row gets a pass of its own. A smaller number needs less "
        "memory and does not change the result.",
    )
    recompute: Literal["none", "layers"] = resumable(
        "none",
        description="Gradient checkpointing: `layers` keeps one tensor per layer for the backward pass and computes "
        "the rest again. It costs a third more work, needs a fraction of the memory and does not change the result.",
    )
    keep_activations: bool = resumable(
        True,
        description="With an adapter on the upper layers alone, keep what the layers below compute on disk, so that "
        "later epochs start at the adapter. It takes hidden size x 2 or 4 bytes per token. On a CPU only.",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1), OrAuto] = Field(
        AUTO,
        description="Peak learning rate of AdamW. `auto` is 2e-4 for models of a billion parameters or more, and "
        "higher for smaller ones.",
    )
    schedule: Literal["auto", "cosine", "linear", "constant", "wsd"] = Field(
        "auto",
        description="Learning rate after warm-up; all but `constant` end at zero. `wsd` stays and falls in the "
        "last fifth. `auto` is `wsd` with `train.budget`, else `cosine`.",
    )
    warmup: float = Field(0.03, ge=0, description="Linear warm-up: a fraction of the run below 1, or steps.")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="Decoupled weight decay.")
    neftune: float = Field(
        0.0,
        ge=0,
        description="NEFTune: noise of up to this / sqrt(tokens of the row * hidden size) on the embeddings while "
        "training, such as 5; 0 for none.",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 for never.")
    deterministic: bool = resumable(
        False,
        description="On CUDA, use only kernels that give the same bits in every run, so that a resumed run ends with "
        "the same bytes as an uninterrupted one. They are slower. The CPU always computes so.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Adapter, row order, held-out rows and dropout.")
    log_every: int = resumable(
        10, ge=1, description="Steps between printed lines; metrics.jsonl has every step."
    )
    eval_every: Annotated[Interval, OrAuto] = resumable(
        AUTO,
        description="Steps between held-out measurements, or `epoch`. The last step is always measured. `auto` is 100, "
        "and with `train.epochs=auto` an epoch where that is shorter.",
    )
    save_every: Interval = resumable(
        200, description="Steps between checkpoints, or `epoch`. The last step is always saved."
    )
    keep: int = resumable(2, ge=1, description="Newest checkpoints to keep, beside the best one.")
    keep_best: bool = Field(
        True,
        description="The final adapter is the one with the lowest held-out loss (needs `data.holdout`), or a later one "
        "within `train.tolerance` of it.",
    )
    tolerance: Annotated[float, Field(ge=0, le=10), OrAuto] = resumable(
        AUTO,
        description="How far the held-out loss may be above the lowest one for a later step to count as better, as a "
        "fraction of it. `auto` is 2 with `train.epochs=auto` and short answers, because facts are learnt after "
        "the lowest loss, else 0.",
    )
    refit: Annotated[bool, OrAuto] = resumable(
        AUTO,
        description="Train again at the end on all rows, for the length that the held-out rows chose. `auto` does so "
        "with `train.epochs=auto` and fewer than 1,000 rows, where each row counts.",
    )
    anchor: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Weight of a second loss: the divergence from the base on its own answers to neutral prompts that "
        "ship with lorafit. 0.1 keeps more of what the base knew (docs/forgetting.md).",
    )
    max_drift: float | None = resumable(
        None,
        gt=0,
        description="End the run where its divergence from the base on other neutral prompts is above this, in nats "
        "per token. The adapter is then the best one before (needs `data.holdout`).",
    )
    patience: Annotated[int, Field(ge=0), OrAuto] = resumable(
        AUTO,
        description="End the run after this many held-out measurements in a row without a better one; 0 for never. "
        "`auto` is 3 with `train.epochs=auto`, else 0.",
    )

    def warmup_steps(self, num_steps: int) -> int:
        """Warm-up in steps of a run of `num_steps`: a share below 1, else a count; always shorter than the run."""
        steps = math.ceil(self.warmup * num_steps) if self.warmup < 1 else int(self.warmup)
        return min(num_steps - 1, steps)


class DistributedSection(Section):
    """Several processes on one run: `lorafit train --nproc N`, or torchrun."""

    strategy: Literal["auto", "single", "ddp", "fsdp"] = Field(
        "auto",
        description="`ddp`: every rank has the base, and only the adapter's gradients are sent; `fsdp`: the base is "
        "sharded over the ranks, for one that is larger than a device; `single`: one process, several are an error. "
        "`auto` is `ddp` for several and `single` for one.",
    )
    timeout: float = Field(
        600,
        ge=1,
        description="Seconds that a rank waits for the others before it reports which one is stuck, and ends.",
    )


class RunSection(Section):
    """Where the run writes, what it checks, and which trackers receive its metrics."""

    output: str | None = Field(None, description="Run directory; by default `runs/MODEL-DATE-TIME`.")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="Trackers that receive the metrics too."
    )
    offline: bool = Field(False, description="Never open a connection; hub files come from the local cache.")
    too_large: Literal["error", "auto", "try"] = Field(
        "error",
        description="When memory is too small by the plan: `error` names settings that fit, `auto` (the flag "
        "`--auto`) picks `train.micro_batch_tokens`, `train.recompute` and `model.quantize`, `try` starts.",
    )
    check: Literal["error", "warn", "none"] = Field(
        "error",
        description="The checks of `lorafit check` before the run: `error` stops where one fails, `warn` reports it "
        "and starts, `none` makes no checks.",
    )
    samples: int = Field(
        3, ge=0, le=50, description="Held-out prompts answered by base and tuned at the end."
    )
    prompts: str | None = Field(
        None,
        description="File of questions of your own (`lorafit generate --file` reads the same), answered by base and "
        "tuned beside the prompts of `run.samples`.",
    )
    samples_every: Interval | None = Field(
        None, description="Steps between answers to these prompts during training, or `epoch`."
    )
    drift: bool = Field(
        False,
        description="At each held-out measurement, measure how far the model has moved from its base on neutral "
        "prompts; `train.max_drift` does so too.",
    )
    verify: bool = Field(
        True,
        description="Verify the result: all tensors have changed, a new process loads the adapter from disk and "
        "computes the same logits, and answers stop with an end token.",
    )


class Config(Section):
    """A whole run: the recipe, the `section.key=value` overrides and the flags together."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    distributed: DistributedSection = resumable(DistributedSection())
    run: RunSection = resumable(RunSection())

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.data.weights is not None and len(self.data.weights) != len(self.data.path):
            raise ValueError(
                f"`data.weights` has {len(self.data.weights)} numbers for {len(self.data.path)} paths in `data.path`"
            )
        if twice := sorted({path for path in self.data.path if self.data.path.count(path) > 1}):
            raise ValueError(
                f"`data.path` names {twice[0]} twice; `data.weights` sets how often rows are seen"
            )
        if both := sorted(set(self.data.path) & set(self.data.eval_path)):
            raise ValueError(
                f"`data.path` and `data.eval_path` both name {both[0]}; `data.eval_split` names a split"
            )
        start, lora = self.lora.init, self.lora
        if wrong := [text for text in lora.tokens if not text.strip() or lora.tokens.count(text) > 1]:
            raise ValueError(f"`lora.tokens` has {wrong[0]!r}, which is empty or there twice")
        if lora.dora and start != "default":
            raise ValueError(f"`lora.dora` has no `lora.init={start}`; give one of them")
        if lora.init_from is not None and (start != "default" or lora.ranks or lora.alphas or lora.layers):
            raise ValueError(
                "`lora.init_from` decides `lora.init`, `lora.ranks`, `lora.alphas` and `lora.layers`; leave them out"
            )
        measures_others = self.data.eval_path or self.data.eval_split is not None
        if self.train.refit is True and measures_others:
            raise ValueError("`train.refit` trains rows of `data.holdout`, and never those to measure on")
        if self.train.budget is not None and self.train.max_steps is not None:
            raise ValueError("`train.max_steps` and `train.budget` both set the length of the run: give one")
        if self.train.budget is not None and self.train.refit is True:
            raise ValueError("`train.refit` trains a second time, for which `train.budget` leaves no time")
        if fault := method_fault(self.train, self.data, self.distributed.strategy):
            raise ValueError(fault)
        return self


def sections() -> dict[str, type[Section]]:
    """The section models by name, in the schema's order."""
    models = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: model for name, model in models.items() if isinstance(model, type)}


def keys() -> list[str]:
    """Every key as `section.key`."""
    return [f"{section}.{name}" for section, model in sections().items() for name in model.model_fields]


def with_defaults(stored: Mapping[str, Any]) -> dict[str, Any]:
    """`keys_that_change_results` that an earlier version stored, with the defaults of later keys."""
    usual = Config(model=ModelSection(name="-"), data=DataSection(path=("-",)))
    return {**keys_that_change_results(usual), **stored}


def keys_that_change_results(config: Config) -> dict[str, Any]:
    """The keys that decide what a run computes, as `section.key` and JSON values."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
        if KEEPS_RESULTS
        not in (
            Config.model_fields[section].json_schema_extra,
            sections()[section].model_fields[key].json_schema_extra,
        )
    }

"""Every key of a run, once: its type, default, bounds and help. Nothing else in lorafit holds a default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_tuple(value: object) -> object:
    """One string stands for a list of one."""
    return (value,) if isinstance(value, str) else value


def _interval(value: object) -> object:
    """A whole number of steps, or the word `epoch` (which is stored as 0)."""
    return 0 if value == "epoch" else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Quantize = Literal["none", "int8", "nf4", "fp8"]  # "none" and the names of model/quant.py's QUANTIZERS
Interval = Annotated[int, BeforeValidator(_interval), Field(ge=0)]


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model and how it is held in memory."""

    name: str = Field(min_length=1, description="Hub id (`owner/name`) or local folder of the base model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; a commit pins it.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="Where to compute: `auto` takes CUDA, then Apple MPS, then the CPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="Type of the base and of the compute: `auto` is bfloat16 where the hardware multiplies it, "
        "float16 on older CUDA chips, else float32. The adapter is float32 always (float64 with float64).",
    )
    quantize: Quantize = Field(
        "none",
        description="Bits of the frozen linears: `int8` is faster than 16 bits and half as large, `nf4` is the "
        "smallest and slower (extra `nf4`), `fp8` is for CUDA chips of capability 8.9 or more.",
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
    init_from: str | None = Field(
        None,
        description="PEFT adapter (folder or hub id) to continue; it sets rank, alpha, targets and rslora.",
    )


class DataSection(Section):
    """The rows, how they become text, and which tokens are trained."""

    path: Strings = Field(min_length=1, description="Files, folders or hub data sets (`owner/name`).")
    weights: tuple[Annotated[float, Field(gt=0, le=100)], ...] | None = Field(
        None, description="How often an epoch sees each path's rows, one number a path: 2 is twice, 0.5 half."
    )
    revision: str | None = Field(None, description="Revision of a hub data set; a commit pins it.")
    split: str = Field("train", description="Split of a hub data set.")
    format: Literal["auto", "alpaca", "messages", "sharegpt", "completion", "text"] = Field(
        "auto", description="Row format; `auto` detects it and says why."
    )
    template: str = Field(
        "auto",
        description="How rows become text: `classic`, `alpaca`, `chat` (the model's own), a `.jinja` file, or "
        "`auto`: the model's chat template, or `alpaca` for instruction rows of a model without one.",
    )
    system: str = Field("", description="System prompt for rows that have none.")
    max_length: int = Field(2048, ge=8, le=1_048_576, description="Longest row in tokens.")
    too_long: Literal["error", "truncate", "drop"] = Field(
        "error", description="What happens to a longer row. Cutting an answer is never silent."
    )
    train_on: Literal["response", "all"] = Field("response", description="Tokens that carry loss.")
    eos: bool = Field(
        True, description="End each answer with the stop token where the template has none, and train it."
    )
    packing: bool = Field(
        True, description="Lay several rows of a step into one pass; documents never see each other."
    )
    shuffle: bool = Field(True, description="New row order every epoch, from the seed; else file order.")
    holdout: float = Field(
        100,
        ge=0,
        description="Rows kept out of training to measure on: a share below 1 or a number of rows, never more "
        "than a tenth of all; 0 for none.",
    )


class TrainSection(Section):
    """The loop."""

    epochs: float = Field(1, gt=0, le=1000, description="Passes over the rows.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Length of the run and of its schedule in optimizer steps; overrides `epochs`.",
    )
    batch_size: int = Field(16, ge=1, le=65536, description="Rows an optimizer step.")
    micro_batch_tokens: int = Field(
        2048,
        ge=8,
        description="Most tokens in one forward pass: memory, never mathematics. One longer row fits.",
    )
    recompute: Literal["none", "layers"] = Field(
        "none",
        description="`layers` keeps one tensor a layer for the backward pass and computes the rest again: a "
        "third more work, a fraction of the memory, the same mathematics.",
    )
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Learning rate after warm-up; cosine and linear end at zero."
    )
    warmup: float = Field(0.03, ge=0, description="Linear warm-up: a share of the run below 1, or steps.")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm to this; 0 for never.")
    seed: int = Field(42, ge=0, lt=2**32, description="Adapter, row order, held-out rows and dropout.")
    log_every: int = Field(10, ge=1, description="Steps between printed lines; metrics.jsonl has every step.")
    eval_every: Interval = Field(
        100, description="Steps between held-out measurements, or `epoch`. The end is always measured."
    )
    save_every: Interval = Field(200, description="Steps between checkpoints, or `epoch`. The end is saved.")
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep, beside the best one.")
    keep_best: bool = Field(
        True, description="The final adapter is the one with the lowest held-out loss (needs `data.holdout`)."
    )
    patience: int = Field(
        0,
        ge=0,
        description="End the run after so many held-out measurements in a row without a better one; 0 for never.",
    )


class DistributedSection(Section):
    """Several processes on one run: `lorafit train --nproc N`, or torchrun."""

    strategy: Literal["auto", "single", "ddp", "fsdp"] = Field(
        "auto",
        description="`ddp`: every rank has the base, gradients of the adapter travel; `fsdp`: the base is shared out "
        "over the ranks, for one that is larger than a device; `single`: one process, several are an error. `auto` "
        "is `ddp` for several and `single` for one.",
    )
    timeout: float = Field(
        600,
        ge=1,
        description="Seconds that a rank waits for the others before it says which one stands still, and ends.",
    )


class RunSection(Section):
    """Where the run writes and who watches."""

    output: str | None = Field(None, description="Run directory; by default `runs/MODEL-DATE-TIME`.")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="Extra places that receive the metrics."
    )
    offline: bool = Field(False, description="Never open a connection; hub files come from the local cache.")
    too_large: Literal["error", "auto", "try"] = Field(
        "error",
        description="When the plan says that memory is short: `error` says what would fit, `auto` (the flag "
        "`--auto`) picks `train.micro_batch_tokens`, `train.recompute` and `model.quantize`, `try` starts.",
    )
    check: Literal["error", "warn", "none"] = Field(
        "error",
        description="What `lorafit check` finds wrong before the run: `error` refuses to start, `warn` says it and "
        "starts, `none` does not look.",
    )
    samples: int = Field(
        3, ge=0, le=50, description="Held-out prompts answered by base and tuned at the end."
    )
    samples_every: Interval | None = Field(
        None, description="Steps between answers to these prompts while training, or `epoch`."
    )
    verify: bool = Field(
        True,
        description="At the end a fresh process loads the adapter from disk and has to give the trained model's "
        "logits; whether every tensor changed and answers end is measured, too.",
    )


class Config(Section):
    """A whole run: what `recipe.yaml`, `section.key=value` and the flags add up to."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    distributed: DistributedSection = DistributedSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.data.weights is not None and len(self.data.weights) != len(self.data.path):
            raise ValueError(
                f"`data.weights` has {len(self.data.weights)} numbers for {len(self.data.path)} paths in `data.path`"
            )
        if twice := sorted({path for path in self.data.path if self.data.path.count(path) > 1}):
            raise ValueError(
                f"`data.path` names {twice[0]} twice; `data.weights` says how often rows are seen"
            )
        return self


# keys that may change in the middle of a run: memory, speed, places, and what digests of model and rows cover
KEYS_THAT_KEEP_RESULTS = {
    "model": {"name", "revision", "device"},
    "lora": {"init_from"},
    "data": {
        "path",
        "revision",
        "split",
        "format",
        "template",
        "system",
        "max_length",
        "too_long",
        "train_on",
    }
    | {"eos", "packing"},
    "train": {"micro_batch_tokens", "recompute", "log_every", "eval_every", "save_every", "keep", "patience"},
    "distributed": set(DistributedSection.model_fields),
    "run": set(RunSection.model_fields),
}


def keys_that_change_results(config: Config) -> dict[str, Any]:
    """The keys that decide what a run computes, as `section.key` and JSON values."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
        if key not in KEYS_THAT_KEEP_RESULTS[section]
    }

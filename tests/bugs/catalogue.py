"""The 32 bugs: their names, how lorafit rules them out, and the registry of their probes."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from tests.bugs.lab import Lab, Plant

from lorafit.model.native import kernels

__all__ = ["BUGS", "Outcome", "Plant", "Probe", "probe", "probes", "verdict"]
FAMILIES = (
    "accumulation",
    "packing",
    "stopping",
    "resuming",
    "prompts",
    "lengths",
    "adapters",
    "exports",
    "options",
)

Run = TypeVar("Run", bound=Callable[[Lab], None])


@dataclass(frozen=True)
class Bug:
    """A bug of other tools, and how lorafit rules it out."""

    name: str
    ruled_out: str


@dataclass(frozen=True)
class Probe:
    """A test of one bug: `run` passes on unchanged lorafit, and raises AssertionError with each of `plants`."""

    bug: int
    run: Callable[[Lab], None]
    plants: tuple[Plant, ...]

    @property
    def name(self) -> str:
        """The probe's name, `family.function`."""
        return f"{self.run.__module__.rpartition('.')[2]}.{self.run.__name__}"


@dataclass(frozen=True)
class Outcome:
    """The result of a probe: whether it passed, the first line of its AssertionError, and its seconds."""

    passed: bool
    message: str
    seconds: float


_PROBES: list[Probe] = []


def probe(bug: int, *plants: Plant) -> Callable[[Run], Run]:
    """Register a function as a probe of `bug`; each of `plants` alone must make it fail."""

    def register(run: Run) -> Run:
        _PROBES.append(Probe(bug, run, plants))
        return run

    return register


def probes() -> list[Probe]:
    """All probes, sorted by the number of the bug."""
    for family in FAMILIES:
        importlib.import_module(f"tests.bugs.{family}")
    return sorted(_PROBES, key=lambda probe: probe.bug)


def verdict(probe: Probe, plant: Plant | None, folder: Path) -> Outcome:
    """Run a probe in `folder`, with or without a bug. Only an AssertionError is a failure of the probe."""
    kernels()  # compiles into the common cache, because each probe has an empty cache
    started, message = time.perf_counter(), ""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bug can cause warnings of torch; they are not tested
        patch.setenv("LORAFIT_CACHE", str(folder / "cache"))  # cached tokens would hide the bug
        if plant is not None:
            plant.put_in(patch)
        try:
            probe.run(Lab(folder, patch))
        except AssertionError as error:
            message = str(error).strip().partition("\n")[0] or "AssertionError"
    return Outcome(not message, message, time.perf_counter() - started)


BUGS = {
    1: Bug(
        "loss is a mean of micro-batch means",
        "Losses are summed over the trained tokens of a step and divided once by their number.",
    ),
    2: Bug(
        "short examples have more weight than long ones",
        "The same single division: there is no mean over a row or a pass.",
    ),
    3: Bug(
        "partial last accumulation window is divided by the full one",
        "The divisor of a step is counted from its own rows, also when they are few.",
    ),
    4: Bug(
        "packed documents see each other",
        "Attention gets the borders of each document; no product mixes two documents.",
    ),
    5: Bug(
        "packing mask is silently ignored",
        "There is no mask argument: borders and cache lengths are the only interface of attention.",
    ),
    6: Bug(
        "padding equals EOS, so EOS is masked",
        "There is no padding, and masks depend on positions, never on token ids.",
    ),
    7: Bug(
        "template's end of turn is not the EOS of generation",
        "The token that the template puts after an answer joins the stop tokens, in generation and in exports.",
    ),
    8: Bug(
        "a resumed run sees the wrong rows",
        "The row order is a pure function of seed and step.",
    ),
    9: Bug(
        "random state is not restored",
        "Checkpoints contain the state of every generator; dropout uses torch's.",
    ),
    10: Bug(
        "a resumed run resets its optimizer",
        "Every checkpoint has the optimizer: adapter, optimizer and state are one verified folder.",
    ),
    11: Bug(
        "two BOS, or none",
        "BOS is added only if the rendered text does not begin with it.",
    ),
    12: Bug(
        "the prompt's tokens are not a prefix of those of prompt and answer",
        "A border token splits the text where generation splits it, before the tokenisation.",
    ),
    13: Bug(
        "templates rewrite earlier turns",
        "A conversation is rendered once. Each turn is located in it exactly, or the row is refused.",
    ),
    14: Bug(
        "response masks hold all tokens or none",
        "There is no search for markers. Trained tokens are counted per row; a row without any is not trained.",
    ),
    15: Bug(
        "truncation removes the whole answer",
        "A row with no trained token left is dropped, counted and listed.",
    ),
    16: Bug(
        "truncated answers are trained without a message",
        "A row that is too long is an error. With truncation, the ledger counts the removed tokens.",
    ),
    17: Bug(
        "remainder rows are never trained",
        "The last step of an epoch takes the remaining rows.",
    ),
    18: Bug(
        "adapter in 16 bits",
        "The adapter's matrices are float32 for every type of the base.",
    ),
    19: Bug(
        "gradient checkpointing with frozen embeddings: no gradient",
        "Recomputation without re-entrance, inside one hand-written backward.",
    ),
    20: Bug(
        "the adapter is saved or loaded without its tensors",
        "Loading checks every tensor by name and shape; a missing or additional tensor is an error.",
    ),
    21: Bug(
        "merging into a 4-bit base removes the adapter by rounding",
        "A merge always reads the 16-bit or 32-bit weights of the model's files, never the quantised base.",
    ),
    22: Bug(
        "tied embeddings on reload and merge",
        "Tied tables are one tensor; a file in which they differ is refused.",
    ),
    23: Bug(
        "added tokens and resized embeddings are lost",
        "Vocabularies are never resized; tokens without an embedding and adapters with embeddings are refused.",
    ),
    24: Bug(
        "requested target modules are silently dropped",
        "A target that matches nothing is an error, also lm_head and embed_tokens.",
    ),
    25: Bug(
        "RoPE scaling is dropped",
        "RoPE is read from config.json, unknown kinds are refused, and logits equal those of transformers.",
    ),
    26: Bug(
        "q and k are permuted wrongly in GGUF",
        "One function permutes rows, by heads or key heads; llama.cpp reads the file back and must agree.",
    ),
    27: Bug(
        "GGUF tokenizer differs",
        "The split pattern of the tokenizer must be a known one, or the export is refused.",
    ),
    28: Bug(
        "alpha / rank scaling is wrong",
        "One property computes the scale; the folder contains alpha, rank and rsLoRA in PEFT's form.",
    ),
    29: Bug(
        "dead options",
        "Each key has a run that another value changes, or a test that sets it; a new key without one fails.",
    ),
    30: Bug(
        "text that looks like a control token becomes one",
        "Control tokens have private names that no content can contain.",
    ),
    31: Bug(
        "checkpoint of live tensors",
        "The state is copied before the next step; a thread writes the copy, verified by its SHA-256.",
    ),
    32: Bug(
        "zero or NaN loss is reported as success",
        "A loss or gradient that is not finite, or a step without trained tokens, stops the run.",
    ),
}

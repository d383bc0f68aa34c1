"""The events of a run, which are immutable, and the type of their observers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run. `kind` is its name on disk."""

    kind: ClassVar[str]

    def as_dict(self) -> dict[str, object]:
        """The event's kind under `event`, and its fields, as values of JSON."""
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run, new or resumed, is about to take its first step."""

    kind = "run_started"
    model: str
    num_rows: int
    num_steps: int
    num_parameters: int
    num_trainable: int
    device: str
    dtype: str
    output: str


@dataclass(frozen=True, slots=True)
class Step(Event):
    """One optimizer step is done.

    `loss` is the mean over the step's supervised tokens, `grad_norm` the norm before clipping, `seconds` the wall time
    of the step, `tokens_per_second` the smoothed rate (see `meters.Meter`). With several `ranks` these are sums over
    all; `imbalance` is the excess work of the busiest rank over the mean, `memory_bytes` that of the first rank.
    """

    kind = "step"
    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    supervised_tokens: int
    tokens: int
    rows: int
    tokens_per_second: float
    seconds: float
    memory_bytes: int
    ranks: int = 1
    imbalance: float = 0.0


@dataclass(frozen=True, slots=True)
class Heldout(Event):
    """The held-out rows were evaluated after `step`; `base_loss` is the untrained model's, where known."""

    kind = "heldout"
    step: int
    loss: float
    base_loss: float | None
    best: bool


@dataclass(frozen=True, slots=True)
class Preferences(Event):
    """What the policy of a method that compares answers said of the rows of `step`, or of the held-out `rows` after it.

    Rewards are means of what the loss compares; `margin` is chosen minus rejected, `accuracy` the share of rows in
    order, `kl` the divergence of kto. `prefers` is the share of held-out pairs whose chosen answer has the larger mean
    log-probability per token, at the starting point and now; `prefers_longer` the same of the longer answer. `drift`,
    at the end of a run, is the mean divergence KL(policy | starting point) of the next token along held-out answers.
    """

    kind = "preferences"
    step: int
    rows: str
    margin: float | None
    accuracy: float
    chosen_reward: float | None
    rejected_reward: float | None
    kl: float = 0.0
    prefers: Sequence[float | None] | None = None
    prefers_longer: Sequence[float | None] | None = None
    drift: float | None = None


@dataclass(frozen=True, slots=True)
class Refit(Event):
    """After `step` the run begins again, with all its `num_rows` rows, up to step `num_steps`.

    `chosen_step` was the best one by the held-out rows, whose loss was `heldout_loss` then; all are trained from here.
    """

    kind = "refit"
    step: int
    num_steps: int
    num_rows: int
    chosen_step: int
    heldout_loss: float | None


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """A checkpoint was written after `step`."""

    kind = "saved"
    step: int
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drift(Event):
    """How far the model of `step` has moved from its base on neutral prompts: the mean divergence of the next token in
    nats, and the share of greedy tokens that changed.
    """

    kind = "drift"
    step: int
    divergence: float
    changed: float


@dataclass(frozen=True, slots=True)
class Digest(Event):
    """SHA-256 of the adapter's numbers after `step`: the first step of a run, and each first one after a checkpoint,
    so that `lorafit audit` can recompute the step and compare.
    """

    kind = "digest"
    step: int
    adapter: str


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """Work between two steps: `done` of `total` parts of `what`. It is shown and not recorded."""

    kind = "busy"
    what: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Sample(Event):
    """The answers of the base and of the tuned model to a held-out prompt."""

    kind = "sample"
    prompt: str
    base: str
    tuned: str


@dataclass(frozen=True, slots=True)
class Answers(Event):
    """The answers to the fixed held-out prompts after `step`, and whether each ended with a stop token.

    `base` are the base model's answers, in the first such event of a process only.
    """

    kind = "answers"
    step: int
    prompts: Sequence[str]
    tuned: Sequence[str]
    stopped: Sequence[bool]
    base: Sequence[str] | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Proved(Event):
    """The result of the proof at the end: `lines` for what holds, `faults` for what does not. proof.json has all."""

    kind = "proved"
    verdict: Literal["pass", "warn", "fail"]
    lines: Sequence[str]
    faults: Sequence[str]
    seconds: float


LearnedLevel = Literal["learned", "partly", "nothing", "unknown"]


@dataclass(frozen=True, slots=True)
class Learned(Event):
    """What the adapter of `step` has learned, in one word and in one sentence.

    `asked` are the numbers behind it: evaluate/learned.py's `Asked` of the trained and of the held-out rows.
    """

    kind = "learned"
    step: int
    level: LearnedLevel
    text: str
    asked: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Message(Event):
    """A message for the user that is none of the other events."""

    kind = "note"
    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True, slots=True)
class Diagnosis(Event):
    """A problem in the curves up to `step` (see `curve_monitor`), and what to do."""

    kind = "diagnosis"
    step: int
    what: str
    text: str
    hint: str


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """The run has ended; `loss` is that of the last step, `adapter` the folder to load."""

    kind = "run_ended"
    step: int
    reason: Literal["finished", "ended early", "interrupted"]
    seconds: float
    adapter: str
    loss: float


Observer = Callable[[Event], None]


def fan_out(observers: Iterable[Observer]) -> Observer:
    """One observer that passes every event to all of `observers`, in their order."""
    all_observers = tuple(observers)

    def observe(event: Event) -> None:
        for observer in all_observers:
            observer(event)

    return observe

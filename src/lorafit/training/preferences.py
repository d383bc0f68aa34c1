"""The losses that compare answers, from the log-probabilities of whole answers. The names are those of TRL.

A loss of a step is a sum over its rows, which is divided once by their number. So it does not depend on how the step is
cut into packs or divided over ranks. What depends on a whole step (`Step`) is computed before its passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.config.schema import TrainSection

_BETA = {"simpo": 2.0}  # that of the paper; 0.1 for the others, as in TRL


@dataclass(frozen=True, slots=True)
class Settings:
    """The keys of the losses, as in the train section."""

    beta: float
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @classmethod
    def of(cls, train: TrainSection) -> Settings:
        """The settings of a run."""
        values = {name: getattr(train, name) for name in cls.__slots__}
        return cls(**values | {"beta": train.beta or _BETA.get(train.method, 0.1)})

    @property
    def measuring(self) -> Settings:
        """The same for held-out rows, where no label is smoothed: then the loss falls as margins grow."""
        loss_type = "sigmoid" if self.loss_type == "robust" else self.loss_type
        return replace(self, loss_type=loss_type, label_smoothing=0.0)


@dataclass(frozen=True, slots=True)
class Step:
    """What the loss of a row takes from its whole step.

    `kl` is KTO's estimate of the divergence from the reference, `rows_per_token` the step's rows by the supervised
    tokens of the chosen answers, `rows_per_answer` by the answers.
    """

    kl: float | Tensor = 0.0
    rows_per_token: float = 1.0
    rows_per_answer: float = 1.0


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of some rows: all fields are (rows,).

    `chosen` and `rejected` are log-probabilities, NaN where a row has no such answer, `num_chosen` and `num_rejected`
    their tokens, `start_chosen` and `start_rejected` the log-probabilities at the starting point. `nll` is the negative
    log-probability of all supervised tokens of the chosen row.
    """

    chosen: Tensor
    rejected: Tensor
    num_chosen: Tensor
    num_rejected: Tensor
    start_chosen: Tensor
    start_rejected: Tensor
    nll: Tensor


@dataclass(frozen=True, slots=True)
class Judged:
    """The loss of each row with its gradient, and the rewards of its answers, NaN where there is none; all (rows,)."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


Loss = Callable[[Answers, Settings, Step], Judged]


def _rewards(answers: Answers, beta: float, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """beta times the log-ratio of policy and reference, of the answers or (`mean`) per token."""
    chosen, rejected = answers.chosen - answers.start_chosen, answers.rejected - answers.start_rejected
    if mean:
        chosen, rejected = chosen / answers.num_chosen, rejected / answers.num_rejected
    return beta * chosen, beta * rejected


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(margin), where the order of a share `smoothing` of the pairs is wrong (Mitchell, 2023)."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def dpo(answers: Answers, settings: Settings, step: Step) -> Judged:
    """Direct preference optimisation (Rafailov et al., 2023); `robust`: Chowdhury et al. (2024)."""
    chosen, rejected = _rewards(answers, settings.beta, mean=settings.loss_type == "sigmoid_norm")
    margin, smoothing = chosen - rejected, settings.label_smoothing
    if settings.loss_type == "robust":
        loss = -(1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)
        return Judged(loss / (1 - 2 * smoothing), chosen, rejected)
    return Judged(_smoothed(margin, smoothing), chosen, rejected)


def simpo(answers: Answers, settings: Settings, step: Step) -> Judged:
    """Simple preference optimisation (Meng et al., 2024): mean log-probabilities per token, and no reference."""
    chosen = settings.beta * answers.chosen / answers.num_chosen
    rejected = settings.beta * answers.rejected / answers.num_rejected
    return Judged(
        _smoothed(chosen - rejected - settings.simpo_gamma, settings.label_smoothing), chosen, rejected
    )


def orpo(answers: Answers, settings: Settings, step: Step) -> Judged:
    """Odds ratio preference optimisation (Hong et al., 2024): the loss of the chosen answers, and beta (the paper's
    lambda) times that of the odds ratio.
    """
    means = (answers.chosen / answers.num_chosen, answers.rejected / answers.num_rejected)
    chosen, rejected = (mean - torch.log(-torch.expm1(mean)) for mean in means)  # log-odds
    ratio = -settings.beta * F.logsigmoid(chosen - rejected)
    return Judged(
        answers.nll * step.rows_per_token + ratio, settings.beta * means[0], settings.beta * means[1]
    )


def kto(answers: Answers, settings: Settings, step: Step) -> Judged:
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024): each answer by itself, against the divergence `kl`."""
    chosen, rejected = _rewards(answers, settings.beta)
    kl = settings.beta * step.kl
    good = settings.desirable_weight * torch.sigmoid(kl - chosen)
    bad = settings.undesirable_weight * torch.sigmoid(rejected - kl)
    # a NaN has no gradient of its own, but a product with it has: it is replaced before
    loss = good.where(~chosen.isnan(), 0.0) + bad.where(~rejected.isnan(), 0.0)
    return Judged(loss * step.rows_per_answer, chosen, rejected)


LOSSES: dict[str, Loss] = {"dpo": dpo, "simpo": simpo, "orpo": orpo, "kto": kto}

"""The divisor of losses over the parts of a step, and steps without a valid loss (bugs 1, 2, 3, 32)."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant, difference, events
from torch import Tensor

from lorafit.data.batch import RankShare
from lorafit.data.packing import Pack
from lorafit.errors import TrainingError
from lorafit.model.llama import Llama
from lorafit.training import loop
from lorafit.training.run import start_run

RAGGED = [{"instruction": f"Say {n}.", "output": "so " * (4**n % 61) + "it is."} for n in range(6)]
EVENLY = ("train.max_grad_norm=0", "data.shuffle=false", "train.max_steps=1")


def _gradient(lab: Lab, name: str, *overrides: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The gradient of a run's last step, and what the step reported."""
    lab.gradients.clear()
    result = lab.run(*EVENLY, f"lora.init_from={lab.adapter()}", "lora.rank=4", *overrides, name=name)
    return lab.gradients[-1], events(result, "step")[-1]


@probe(
    1,
    Plant("training.loop:_passes", "state.scale.factor / batch.weight", "1 / len(pack.targets) / len(packs)"),
    Plant(
        "training.loop:_gradients",
        "mean = total / batch.weight",
        "mean = total / len(batch.packs)",
    ),
)
def a_gradient_does_not_depend_on_the_split_of_its_step(lab: Lab) -> None:
    """One batch of rows of different length, in one pass, in several and one per row: equal gradients and losses."""
    lab.watch()
    rows = f"data.path={lab.rows(RAGGED)}"
    whole, step = _gradient(lab, "whole", rows)
    for cut in ("train.micro_batch_tokens=300", "train.micro_batch_tokens=8", "data.packing=false"):
        other, its_step = _gradient(lab, cut, rows, cut)
        assert difference(whole, other) < 1e-5, cut
        assert math.isclose(step["loss"], its_step["loss"], rel_tol=1e-5), cut


@probe(
    2,
    Plant("training.loop:_passes", "state.scale.factor / batch.weight", "1 / len(pack.targets) / len(packs)"),
)
def every_trained_token_has_the_same_weight(lab: Lab) -> None:
    """A short and a long answer: the batch's gradient is the mean over tokens, not over rows."""
    lab.watch()
    rows = [RAGGED[0], RAGGED[2]]
    (short, one), (long, two) = (
        _gradient(lab, f"row{n}", f"data.path={lab.rows([row], f'{n}.json')}") for n, row in enumerate(rows)
    )
    few, many = one["supervised_tokens"], two["supervised_tokens"]
    assert many > 4 * few, "the rows are too similar for this test"
    both, _ = _gradient(lab, "both", f"data.path={lab.rows(rows, 'both.json')}", "data.packing=false")
    expected = {name: (few * short[name] + many * long[name]) / (few + many) for name in both}
    assert difference(expected, both) < 1e-5


@probe(
    3,
    Plant(
        "training.loop:_batch",
        "return job.share.of(job.rows.to_pack, job.order.rows(step), packer)",
        "made = job.share.of(job.rows.to_pack, job.order.rows(step), packer)\n"
        "    counted = made.weight * job.order.batch_size / len(made.indices)\n"
        "    return Batch(made.indices, made.packs, made.tokens, made.supervised, 0.0, counted)",
    ),
)
def the_last_step_of_an_epoch_counts_its_own_tokens(lab: Lab) -> None:
    """Six rows in steps of four: the gradient of the second step is that of its two rows alone."""
    lab.watch()
    constant = "train.learning_rate=1e-12"  # so that both steps have the same weights
    epoch = (f"data.path={lab.rows(RAGGED)}", "train.batch_size=4", "train.max_steps=2", constant)
    last, step = _gradient(lab, "epoch", *epoch)
    rest = (f"data.path={lab.rows(RAGGED[4:], 'rest.json')}", "train.batch_size=2", constant)
    alone, its_step = _gradient(lab, "alone", *rest)
    assert step["rows"] == 2
    assert difference(alone, last) < 1e-5
    assert math.isclose(step["loss"], its_step["loss"], rel_tol=1e-5)


@probe(
    32,
    Plant(
        "data.batch:RankShare.of",
        "sum(pack.weight for pack in packs))",
        "max(1, sum(pack.weight for pack in packs)))",
    ),
)
def a_step_without_trained_tokens_is_an_error(lab: Lab) -> None:
    """Rows with empty masks: the run stops with step and rows, and does not report a loss of 0.0."""
    of_step = RankShare.of

    def masked(share: RankShare, rows: Any, *rest: Any) -> Any:
        untrained = SimpleNamespace(row=lambda index: (rows.row(index)[0], rows.row(index)[1] & False))
        return of_step(share, untrained, *rest)

    lab.patch.setattr(RankShare, "of", masked)
    _must_stop(lab, "step 1 has no supervised tokens")


@probe(
    32,
    Plant("training.loop:_gradients", "if math.isfinite(mean) and math.isfinite(norm):", "if True:"),
    Plant(
        "training.loop:_gradients",
        "if math.isfinite(mean) and math.isfinite(norm):",
        "if math.isfinite(norm):",
    ),
)
def a_loss_that_is_not_finite_is_an_error(lab: Lab) -> None:
    """The loss of one pass is NaN, or infinite with a finite gradient: the run stops, and no weight changes."""
    pack_losses = loop.pack_losses
    for value in (math.nan, math.inf):

        def broken(network: Llama, pack: Pack, offset: float = value) -> tuple[Tensor, Tensor]:
            total, each = pack_losses(network, pack)
            return total + offset, each

        with lab.patch.context() as patch:
            patch.setattr(loop, "pack_losses", broken)
            _must_stop(lab, "the loss is not finite", name=str(value))


def _must_stop(lab: Lab, message: str, name: str = "run") -> None:
    try:
        start_run(lab.config("train.max_steps=1", name=name), quiet=True)
    except TrainingError as error:
        assert message in str(error)
        assert "row" in str(error)
    else:
        raise AssertionError("the run did not stop")

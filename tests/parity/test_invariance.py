"""One step, cut in 24 ways: micro-batches, accumulation, packing, order and recomputation change no gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from tests.bugs.lab import Lab, events

# How a step is cut, from all rows in one pass to each in its own, and the number of passes.
LAYOUTS = {
    "train.micro_batch_tokens=4096": 1,
    "train.micro_batch_tokens=500": 2,
    "train.micro_batch_tokens=300": 3,
    "train.micro_batch_tokens=150": 5,
    "train.micro_batch_tokens=8": 12,
    "data.packing=false": 12,
}
ORDERS = ("data.shuffle=false", "data.shuffle=true")
RECOMPUTE = ("train.recompute=none", "train.recompute=layers")
WAYS = list(itertools.product(LAYOUTS, ORDERS, RECOMPUTE))
ROWS = [
    {"instruction": f"Say {n}{' please' * (n % 3)}.", "output": "so " * (7 * n % 23) + "it is."}
    for n in range(12)
]

Gradient = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        yield Lab(tmp_path_factory.mktemp("invariance"), patch)


def gradient_of(lab: Lab, way: tuple[str, ...]) -> tuple[Gradient, float]:
    """The gradient of a step of all rows, and the loss that the step reports."""
    lab.gradients.clear()
    words = (f"data.path={lab.rows(ROWS)}", f"train.batch_size={len(ROWS)}", "train.max_steps=1")
    start = (
        f"lora.init_from={lab.adapter()}",
        "train.max_grad_norm=0",
    )  # both matrices random: no gradient is zero
    result = lab.run(*words, *start, *way, name=" ".join(way))
    return lab.gradients[-1], events(result, "step")[-1]["loss"]


@pytest.fixture(scope="module")
def whole(lab: Lab) -> tuple[Gradient, float]:
    lab.watch()
    return gradient_of(lab, WAYS[0])


def test_there_are_24_ways() -> None:
    assert len(set(WAYS)) == 24


def marks(way: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    """Ways that differ from the first in one thing are tried every time, the others with the slow tests."""
    return [pytest.mark.slow] if sum(map(str.__ne__, way, WAYS[0])) > 1 else []


@pytest.mark.parametrize("way", [pytest.param(way, id=" ".join(way), marks=marks(way)) for way in WAYS[1:]])
def test_every_way_has_the_gradient_of_one_pass(
    lab: Lab, whole: tuple[Gradient, float], way: tuple[str, ...]
) -> None:
    gradient, loss = gradient_of(lab, way)
    assert lab.num_passes[-1] == LAYOUTS[way[0]]
    assert loss == pytest.approx(whole[1], rel=1e-6)
    assert gradient.keys() == whole[0].keys()
    assert len(gradient) == 28
    for name, tensor in whole[0].items():
        distance = float(torch.linalg.vector_norm(gradient[name] - tensor) / torch.linalg.vector_norm(tensor))
        assert distance <= 1e-6, f"{name}: {distance:.2e}"

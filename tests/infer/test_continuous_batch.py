"""A batch that rows join and leave says to each what it would be told alone, with its own adapter, sampling and end."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import FAMILIES, HYBRIDS, random_network, write_adapter

from lorafit.infer.continuous_batch import ContinuousBatch, GeneratedToken, Request, generate_tokens
from lorafit.infer.sampling import Sampling
from lorafit.model import native
from lorafit.model.adapter_file import load_adapter
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.multi_lora import Adapters
from lorafit.model.saved_adapter import read_spec

NONE = frozenset[int]()
SPECS = {
    "one": LoraSpec(4, 8.0, 0.0, ("all-linear",), False),
    "two": LoraSpec(2, 4.0, 0.0, ("q_proj", "v_proj"), False),
}


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
    elif native.kernels() is None:
        pytest.skip(native.missing())
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(home / name, random_network(), spec) for name, spec in SPECS.items()}


def alone(network: Llama, request: Request) -> list[tuple[int, str]]:
    """The answer in a batch of its own, without an adapter."""
    tokens = generate_tokens(network, [dataclasses.replace(request, adapter=None)])
    return [(token.id, token.end) for _, token in tokens]


def run(
    batch: ContinuousBatch[int], requests: Sequence[Request], seed: int = 0
) -> list[list[GeneratedToken]]:
    """The steps of each request when they come at odd times, as slots allow."""
    order = random.Random(seed)
    said: list[list[GeneratedToken]] = [[] for _ in requests]
    coming = list(enumerate(requests))
    while coming or len(batch):
        while coming and len(batch) < batch.num_slots and order.random() < 0.6:
            key, request = coming.pop(0)
            said[key].append(batch.add([(key, request)])[0][1])
        for step_key, step in batch.step():
            said[step_key].append(step)
    return said


def pairs(steps: Sequence[GeneratedToken]) -> list[tuple[int, str]]:
    return [(step.id, step.end) for step in steps]


def requests(count: int, adapters: Sequence[str | None] = (None,), hot: float = 0.0) -> list[Request]:
    order = random.Random(7)
    return [
        Request(
            prompt=[order.randrange(250) for _ in range(order.choice([1, 3, 9, 40]))],
            stop_ids=frozenset(order.sample(range(250), 12)),
            max_tokens=order.randint(1, 30),
            sampling=Sampling(hot, order.choice([0, 20]), order.choice([1.0, 0.9]), seed=number),
            adapter=adapters[number % len(adapters)],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_greedy_answers_are_the_same_tokens_alone_and_among_strangers(family: str, path: str) -> None:
    network = random_network(family)
    wanted = requests(14)
    said = run(ContinuousBatch[int](network, 4), wanted)
    assert [pairs(steps) for steps in said] == [alone(network, request) for request in wanted]
    assert {steps[-1].end for steps in said} == {"stop", "length"}


def test_in_16_bits_too_where_kernels_are_compiled() -> None:
    if native.kernels() is None:
        pytest.skip(native.missing())
    network = random_network(dtype=torch.bfloat16, head_dim=16)
    wanted = requests(30)
    assert [pairs(steps) for steps in run(ContinuousBatch[int](network, 16), wanted)] == [
        alone(network, request) for request in wanted
    ]


def test_samples_are_those_of_the_seed_whoever_else_is_there(path: str) -> None:
    network = random_network()
    wanted = requests(12, hot=1.3)
    expected = [alone(network, request) for request in wanted]
    assert [pairs(steps) for steps in run(ContinuousBatch[int](network, 5), wanted)] == expected
    assert len({tuple(answer) for answer in expected}) == 12


def test_answers_that_share_a_seed_are_drawn_apart() -> None:
    network = random_network()
    wanted = [Request([5, 6], NONE, 9, Sampling(1.5, seed=3), stream=number) for number in range(4)]
    said = run(ContinuousBatch[int](network, 4), wanted)
    rows: list[list[int]] = [[] for _ in wanted]
    for row, token in generate_tokens(network, wanted):
        rows[row].append(token.id)
    assert [[step.id for step in steps] for steps in said] == rows
    assert len({tuple(row) for row in rows}) == 4


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_rows_of_one_batch_take_different_adapters(family: str, path: str, tmp_path: Path) -> None:
    network = random_network(family)
    folders = {
        name: write_adapter(tmp_path / name, random_network(family), spec) for name, spec in SPECS.items()
    }
    adapters = Adapters(network, folders)
    wanted = requests(18, adapters=("one", None, "two", "one"))
    said = run(ContinuousBatch[int](network, 6, adapters=adapters), wanted)
    networks = {None: random_network(family)}
    for name, folder in folders.items():
        networks[name] = random_network(family)
        attach(networks[name], read_spec(folder), seed=0)
        load_adapter(networks[name], folder)
    assert [pairs(steps) for steps in said] == [alone(networks[r.adapter], r) for r in wanted]
    others = [alone(networks["one" if r.adapter is None else None], r) for r in wanted]
    assert sum(a != b for a, b in zip(others, map(pairs, said), strict=True)) > 9


def test_a_row_that_is_dropped_makes_room_and_disturbs_nobody() -> None:
    network = random_network()
    one, two, three, four = (Request([seed, 9, 4], NONE, 20) for seed in (1, 2, 3, 4))
    batch = ContinuousBatch[str](network, 3)
    said = {key: [token] for key, token in batch.add([("a", one), ("b", two), ("c", three)])}
    for _ in range(3):
        for key, step in batch.step():
            said[key].append(step)
    batch.drop("a")
    batch.drop("nobody")
    said["d"] = [batch.add([("d", four)])[0][1]]
    while len(batch):
        for key, step in batch.step():
            said[key].append(step)
    assert len(said["a"]) == 4
    for key, request in (("b", two), ("c", three), ("d", four)):
        assert pairs(said[key]) == alone(network, request)


def test_capacity_grows_with_the_longest_and_the_context_is_the_end(path: str) -> None:
    network = random_network(max_position_embeddings=1024)
    wanted = [Request([7] * 250, NONE, 40), Request([8, 9] * 120, NONE, 1000), Request([1] * 300, NONE, 9)]
    batch = ContinuousBatch[int](network, 3, context=320)
    said = run(batch, wanted)
    assert [len(steps) for steps in said] == [40, 80, 9]
    assert said[1][-1].end == "length"
    expected = [alone(network, Request(r.prompt, NONE, 80)) for r in wanted]
    for steps, whole in zip(said, expected, strict=True):
        assert [step.id for step in steps] == [token for token, _ in whole][: len(steps)]
    assert ContinuousBatch[int](network, 1).context == 1024
    assert ContinuousBatch[int](network, 1, context=10**9).context == 1024


def test_log_probabilities_are_the_networks_whatever_is_drawn(path: str) -> None:
    network = random_network(dtype=torch.float64)
    prompt, sampling = [256, 5, 6, 7], Sampling(1.7, top_k=9, seed=2)
    wanted = [
        Request(prompt, NONE, 6, sampling, top_logprobs=3),
        Request(prompt, NONE, 6, sampling),
        Request(prompt, NONE, 6, sampling, top_logprobs=0),
    ]
    said = run(ContinuousBatch[int](network, 3), wanted)
    prefix = list(prompt)
    for full, bare, few in zip(*said, strict=True):
        with torch.inference_mode():
            hidden = network.hidden(torch.tensor(prefix), PackedDocuments([len(prefix)]))
            expected = network.logits(hidden[-1:])[0].log_softmax(-1)
        assert full.logprob == pytest.approx(float(expected[full.id]), abs=1e-9)
        best = expected.topk(3)
        assert [token for token, _ in full.top] == best.indices.tolist()
        assert [value for _, value in full.top] == pytest.approx(best.values.tolist(), abs=1e-9)
        assert (bare.id, bare.logprob, bare.top) == (full.id, 0.0, ())
        assert (few.id, few.top) == (full.id, ())
        assert few.logprob == full.logprob
        prefix.append(full.id)


def test_after_an_error_the_batch_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network()
    batch = ContinuousBatch[int](network, 3)
    request = Request([4, 5, 6], NONE, 12)
    said = [batch.add([(0, request)])[0][1]]

    def short(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "logits", short)
        with pytest.raises(MemoryError):
            batch.add([(1, request)])
    while len(batch):
        said += [step for _, step in batch.step()]
    assert pairs(said) == alone(network, request)
    batch.add([(2, request)])
    assert batch.clear() == [2]
    assert len(batch) == 0
    assert [pairs(steps) for steps in run(batch, [request])] == [alone(network, request)]


PROMPTS = st.lists(st.integers(0, 255), min_size=1, max_size=30)
NETWORK = random_network()


@settings(max_examples=20)
@given(
    st.lists(st.tuples(PROMPTS, st.integers(1, 12)), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_any_mix_says_what_each_alone_says(
    mix: list[tuple[list[int], int]], num_slots: int, seed: int
) -> None:
    wanted = [Request(prompt, frozenset({3, 77, 130}), most) for prompt, most in mix]
    said = run(ContinuousBatch[int](NETWORK, num_slots), wanted, seed)
    assert [pairs(steps) for steps in said] == [alone(NETWORK, request) for request in wanted]

"""A batch that rows join and leave says to each what it would be told alone, with its own adapter, sampling and end."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import FAMILIES, random_network, write_adapter

from lorafit.infer.continuous_batch import Batch, Request, Step
from lorafit.infer.engine import stream
from lorafit.infer.sampling import Sampling
from lorafit.model import native
from lorafit.model.adapter_file import load_adapter, read_spec
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.multi_lora import Adapters

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
    """What infer/engine.py says to it, as `lorafit generate` asks."""
    assert request.stream == 0
    tokens = stream(
        network,
        [request.prompt],
        stop_ids=request.stop_ids,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
    )
    return [(token.id, token.end) for token in tokens]


def run(batch: Batch, requests: Sequence[Request], seed: int = 0) -> list[list[Step]]:
    """The steps of each request when they come at odd times, as slots allow."""
    order = random.Random(seed)
    said: list[list[Step]] = [[] for _ in requests]
    coming = list(enumerate(requests))
    while coming or len(batch):
        while coming and len(batch) < batch.num_slots and order.random() < 0.6:
            key, request = coming.pop(0)
            said[key].append(batch.add(key, request))
        for step_key, step in batch.step():
            assert isinstance(step_key, int)
            said[step_key].append(step)
    return said


def pairs(steps: Sequence[Step]) -> list[tuple[int, str]]:
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


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_same_tokens_alone_and_among_strangers(family: str, path: str) -> None:
    network = random_network(family)
    wanted = requests(14)
    said = run(Batch(network, 4), wanted)
    assert [pairs(steps) for steps in said] == [alone(network, request) for request in wanted]
    assert {steps[-1].end for steps in said} == {"stop", "length"}


def test_in_16_bits_too_where_kernels_are_compiled() -> None:
    if native.kernels() is None:
        pytest.skip(native.missing())
    network = random_network(dtype=torch.bfloat16, head_dim=16)
    wanted = requests(30)
    assert [pairs(steps) for steps in run(Batch(network, 16), wanted)] == [
        alone(network, request) for request in wanted
    ]


def test_samples_are_those_of_the_seed_whoever_else_is_there(path: str) -> None:
    network = random_network()
    wanted = requests(12, hot=1.3)
    expected = [alone(network, request) for request in wanted]
    assert [pairs(steps) for steps in run(Batch(network, 5), wanted)] == expected
    assert len({tuple(answer) for answer in expected}) == 12


def test_answers_that_share_a_seed_are_drawn_apart() -> None:
    network = random_network()
    wanted = [Request([5, 6], NONE, 9, Sampling(1.5, seed=3), stream=number) for number in range(4)]
    said = run(Batch(network, 4), wanted)
    together = stream(network, [[5, 6]] * 4, stop_ids=NONE, max_tokens=9, sampling=Sampling(1.5, seed=3))
    rows: list[list[int]] = [[] for _ in wanted]
    for token in together:
        rows[token.row].append(token.id)
    assert [[step.id for step in steps] for steps in said] == rows
    assert len({tuple(row) for row in rows}) == 4


def test_rows_of_one_batch_take_different_adapters(path: str, folders: Mapping[str, Path]) -> None:
    network = random_network()
    adapters = Adapters(network, folders)
    wanted = requests(18, adapters=("one", None, "two", "one"))
    said = run(Batch(network, 6, adapters=adapters), wanted)
    networks = {None: random_network()}
    for name, folder in folders.items():
        networks[name] = random_network()
        attach(networks[name], read_spec(folder), seed=0)
        load_adapter(networks[name], folder)
    assert [pairs(steps) for steps in said] == [alone(networks[r.adapter], r) for r in wanted]
    others = [alone(networks["one" if r.adapter is None else None], r) for r in wanted]
    assert sum(a != b for a, b in zip(others, map(pairs, said), strict=True)) > 9


def test_a_row_that_is_dropped_makes_room_and_disturbs_nobody() -> None:
    network = random_network()
    one, two, three, four = (Request([seed, 9, 4], NONE, 20) for seed in (1, 2, 3, 4))
    batch = Batch(network, 3)
    said: dict[object, list[Step]] = {
        key: [batch.add(key, r)] for key, r in (("a", one), ("b", two), ("c", three))
    }
    for _ in range(3):
        for key, step in batch.step():
            said[key].append(step)
    batch.drop("a")
    batch.drop("nobody")
    said["d"] = [batch.add("d", four)]
    while len(batch):
        for key, step in batch.step():
            said[key].append(step)
    assert len(said["a"]) == 4
    for key, request in (("b", two), ("c", three), ("d", four)):
        assert pairs(said[key]) == alone(network, request)


def test_capacity_grows_with_the_longest_and_the_context_is_the_end(path: str) -> None:
    network = random_network(max_position_embeddings=1024)
    wanted = [Request([7] * 250, NONE, 40), Request([8, 9] * 120, NONE, 1000), Request([1] * 300, NONE, 9)]
    batch = Batch(network, 3, context=320)
    said = run(batch, wanted)
    assert [len(steps) for steps in said] == [40, 80, 9]
    assert said[1][-1].end == "length"
    expected = [alone(network, Request(r.prompt, NONE, 80)) for r in wanted]
    for steps, whole in zip(said, expected, strict=True):
        assert [step.id for step in steps] == [token for token, _ in whole][: len(steps)]
    assert Batch(network, 1).context == 1024
    assert Batch(network, 1, context=10**9).context == 1024


def test_log_probabilities_are_the_networks_whatever_is_drawn(path: str) -> None:
    network = random_network(dtype=torch.float64)
    prompt, sampling = [256, 5, 6, 7], Sampling(1.7, top_k=9, seed=2)
    wanted = [
        Request(prompt, NONE, 6, sampling, top_logprobs=3),
        Request(prompt, NONE, 6, sampling),
        Request(prompt, NONE, 6, sampling, top_logprobs=0),
    ]
    said = run(Batch(network, 3), wanted)
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
    batch = Batch(network, 3)
    request = Request([4, 5, 6], NONE, 12)
    said = [batch.add("a", request)]

    def short(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "logits", short)
        with pytest.raises(MemoryError):
            batch.add("b", request)
    while len(batch):
        said += [step for _, step in batch.step()]
    assert pairs(said) == alone(network, request)
    batch.add("c", request)
    assert batch.clear() == ["c"]
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
    said = run(Batch(NETWORK, num_slots), wanted, seed)
    assert [pairs(steps) for steps in said] == [alone(NETWORK, request) for request in wanted]

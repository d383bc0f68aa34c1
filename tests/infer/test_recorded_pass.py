"""A repeated decode pass gives the bits of the pass that Python calls kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import FAMILIES, PUBLISHED, random_network, write_adapter

from lorafit.infer import continuous_batch
from lorafit.infer.continuous_batch import ContinuousBatch, GeneratedToken, Request
from lorafit.infer.recorded_pass import RecordedPass
from lorafit.model.linear import Linear, replace_module
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.multi_lora import Adapters
from lorafit.model.native import kernels, missing
from lorafit.model.native.recording import Recording
from lorafit.model.quant import Int8Linear

pytestmark = pytest.mark.skipif(kernels() is None, reason=missing() or "there are kernels")

# Their layers compute in torch what no kernel does: convolutions, gates, other pairs of a head, a factor of queries.
IN_TORCH = {"lfm2", "qwen3_5", "phi3-longrope", "ministral3", "ernie4_5", "helium", "hunyuan"}


class _Never(RecordedPass):
    def run(self, *inputs: Any) -> torch.Tensor:
        self._recording = None
        return super().run(*inputs)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per pass that was repeated."""
    run, counts = Recording.run, list[int]()

    def counted(record: Recording) -> None:
        counts.append(1)
        run(record)

    monkeypatch.setattr(Recording, "run", counted)
    return counts


def said(
    network: Llama, requests: Sequence[Request], adapters: Adapters | None = None, slots: int = 3
) -> list[list[GeneratedToken]]:
    """All tokens with log-probabilities; a row joins in every third pass."""
    batch = ContinuousBatch[int](network, slots, adapters=adapters)
    tokens: list[list[GeneratedToken]] = [[] for _ in requests]
    coming = list(enumerate(requests))
    passes = 0
    while coming or len(batch):
        if coming and len(batch) < slots and passes % 3 == 0:
            key, token = batch.add([coming.pop(0)])[0]
            tokens[key].append(token)
        for key, token in batch.step():
            tokens[key].append(token)
        passes += 1
    return tokens


def one_by_one(*inputs: Any, **more: Any) -> list[list[GeneratedToken]]:
    """The same without repeated passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous_batch, "RecordedPass", _Never)
        return said(*inputs, **more)


def asked(prompts: Sequence[Sequence[int]], most: int = 12, **more: Any) -> list[Request]:
    return [Request(prompt, frozenset({7}), most, top_logprobs=3, **more) for prompt in prompts]


ALL = [(family, torch.float32) for family in (*FAMILIES, *PUBLISHED)]


@pytest.mark.parametrize(("family", "dtype"), [*ALL, ("llama", torch.bfloat16), ("gemma3", torch.bfloat16)])
def test_every_family_has_the_same_bits(family: str, dtype: torch.dtype, runs: list[int]) -> None:
    network = random_network(family, dtype=dtype)
    requests = asked([[5, 6, 9], [40] * 30])
    assert said(network, requests) == one_by_one(network, requests)
    assert bool(runs) == (family not in IN_TORCH)


NETWORK = random_network(head_dim=16)


@settings(max_examples=8)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 250), min_size=1, max_size=9), st.integers(1, 12)),
        min_size=1,
        max_size=6,
    )
)
def test_rows_that_join_and_leave(mix: list[tuple[list[int], int]]) -> None:
    requests = [Request(prompt, frozenset({3, 77}), most, top_logprobs=1) for prompt, most in mix]
    assert said(NETWORK, requests) == one_by_one(NETWORK, requests)


def test_a_cache_that_grows(runs: list[int]) -> None:
    network = random_network(max_position_embeddings=600)
    requests = asked([[3] * 250], most=20)
    assert said(network, requests) == one_by_one(network, requests)
    assert 10 < len(runs) < 18


def test_int8_and_lora(runs: list[int]) -> None:
    network = random_network(intermediate_size=64, hidden_size=64, dtype=torch.bfloat16)
    for name, linear in list(network.decoder.layers.named_modules()):
        if isinstance(linear, Linear):
            replace_module(network.decoder.layers, name, Int8Linear(linear.weight))
    attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), seed=0)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    requests = asked([[5, 6, 9]])
    assert said(network.eval(), requests) == one_by_one(network, requests)
    assert runs


def test_rows_of_several_adapters(tmp_path: Path, runs: list[int]) -> None:
    network = random_network()
    folders = {
        name: write_adapter(tmp_path / name, random_network(), LoraSpec(4, 8.0, 0.0, (target,), False))
        for name, target in (("one", "all-linear"), ("two", "q_proj"))
    }
    adapters = Adapters(network, folders)
    requests = [
        Request([5, 6, number], frozenset(), 10, adapter=name, top_logprobs=1)
        for number, name in enumerate(("one", None, "two", "one", "two"))
    ]
    assert said(network, requests, adapters) == one_by_one(network, requests, adapters)
    assert runs


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int, runs: list[int]) -> None:
    requests = asked([[5, 6, 9], [40] * 30, [8]])
    before = torch.get_num_threads()
    expected = one_by_one(NETWORK, requests)
    torch.set_num_threads(threads)
    try:
        assert said(NETWORK, requests) == expected
    finally:
        torch.set_num_threads(before)
    assert runs


def test_passes_are_kept_for_rows_that_come_again(runs: list[int]) -> None:
    """Buffers of at most twice as many rows as there are slots are kept."""
    batch = ContinuousBatch[int](NETWORK, 2)
    for key in range(4):  # one row, two rows, one row, ...
        batch.add([(key, Request([5, 6], frozenset(), 9))])
        batch.step()
        batch.step()
        if key % 2:
            batch.drop(key)
            batch.drop(key - 1)
    assert len(runs) == 8 - 2

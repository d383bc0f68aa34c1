"""Beginnings of prompts are read once: the answers have the same bits, and the memory has a limit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import FAMILIES, HYBRIDS, PUBLISHED, random_network, write_adapter

from lorafit.infer.continuous_batch import ContinuousBatch, GeneratedToken, Request
from lorafit.infer.kept_prompts import PIECE, TAIL, KeptPrompts, cuts
from lorafit.model import native
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec
from lorafit.model.multi_lora import Adapters

MB = 10**6
ADAPTERS = (None, "one", "two")
Served = tuple[Llama, Adapters]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    home = tmp_path_factory.mktemp("adapters")
    network = random_network(max_position_embeddings=512, head_dim=16)
    specs = {"one": ("all-linear",), "two": ("q_proj", "v_proj")}
    folders: dict[str, Path] = {}
    for name, targets in specs.items():
        other = random_network(max_position_embeddings=512, head_dim=16)
        folders[name] = write_adapter(home / name, other, LoraSpec(4, 8.0, 0.0, targets, False))
    return network, Adapters(network, folders)


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass."""
    embedded, counts = Llama.embedded, list[int]()

    def counted(network: Llama, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(len(ids))
        return embedded(network, ids, *rest)

    monkeypatch.setattr(Llama, "embedded", counted)
    return counts


def answers(served: Served, kept: KeptPrompts, requests: list[Request]) -> list[list[GeneratedToken]]:
    """All tokens with log-probabilities. Four rows at a time, and a new one in every second pass."""
    network, adapters = served
    batch = ContinuousBatch[int](network, 4, adapters=adapters, kept=kept)
    said: list[list[GeneratedToken]] = [[] for _ in requests]
    coming = list(enumerate(requests))
    while coming or len(batch):
        if coming and len(batch) < 4:
            key, token = batch.add([coming.pop(0)])[0]
            said[key].append(token)
            assert kept.num_bytes <= kept.limit
        for key, token in batch.step():
            said[key].append(token)
    return said


def ids(seed: int, length: int) -> list[int]:
    order = random.Random(seed)
    return [order.randrange(250) for _ in range(length)]


PARTS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([1, 31, 63, 64, 65, 130])), min_size=1, max_size=3
)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(PARTS, st.sampled_from(ADAPTERS)), min_size=2, max_size=7),
    st.sampled_from([0.1, 0.03, 10.0]),
)
def test_any_prompts_get_the_bits_that_they_get_without(
    served: Served, wanted: list[tuple[list[tuple[int, int]], str | None]], limit: float
) -> None:
    requests = [
        Request(
            [token for part in parts for token in ids(*part)], frozenset({7}), 4, adapter=name, top_logprobs=2
        )
        for parts, name in wanted
    ]
    assert answers(served, KeptPrompts(int(limit * MB)), requests) == answers(
        served, KeptPrompts(0), requests
    )


def test_a_shared_beginning_is_read_once_per_adapter(served: Served, num_read: list[int]) -> None:
    system = ids(0, 200)
    requests = [
        Request([*system, *ids(1 + number, 40)], frozenset(), 1, adapter=name)
        for name in ("one", "two", None)
        for number in range(3)
    ]
    answers(served, KeptPrompts(10 * MB), requests)
    assert num_read == 3 * [64, 64, 64, 48, 48, 48]
    num_read.clear()
    answers(served, KeptPrompts(0), requests)
    assert num_read == 9 * [64, 64, 64, 48]


def check_pieces(network: Llama, close: float) -> None:
    """A prompt in pieces has the probabilities of one that is read as a whole, also where its beginning was kept."""
    kept = KeptPrompts(MB)
    whole = ids(3, 180)
    with torch.inference_mode():
        hidden = network.hidden(torch.tensor(whole), PackedDocuments([180]), torch.tensor([179]))
        expected = network.logits(hidden)[0].double().log_softmax(-1)
    for number in range(2):
        batch = ContinuousBatch[int](network, 1, kept=kept)
        ((_, token),) = batch.add([(number, Request(whole, frozenset(), 1, top_logprobs=5))])
        for best, logprob in token.top:
            assert logprob == pytest.approx(float(expected[best]), abs=close)
    assert kept.num_bytes


@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize(
    "family", [family for family in {**FAMILIES, **PUBLISHED} if family not in {*HYBRIDS, "phi3-longrope"}]
)
def test_pieces_are_the_whole_prompt(family: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
        check_pieces(random_network(family, dtype=torch.float64), 1e-9)
    else:
        check_pieces(random_network(family), 1e-4)


@pytest.mark.parametrize("heads", [1, 4])
def test_pieces_with_one_and_with_all_heads_of_keys(heads: int) -> None:
    check_pieces(random_network(num_key_value_heads=heads, head_dim=16), 1e-4)


@pytest.mark.parametrize("family", HYBRIDS)
def test_other_mixers_read_every_prompt_as_a_whole(family: str, num_read: list[int]) -> None:
    network = random_network(family)
    batch = ContinuousBatch[int](network, 2, kept=KeptPrompts(MB))
    for number in range(2):
        batch.add([(number, Request(ids(3, 180), frozenset(), 1))])
    assert num_read == [180, 180]
    assert batch.kept is None


def test_angles_that_depend_on_the_length_are_not_cut(num_read: list[int]) -> None:
    network = random_network(
        "llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=128
    )
    fixed = network.arch.fixed_up_to
    assert fixed is not None
    batch = ContinuousBatch[int](network, 2, kept=KeptPrompts(MB))
    for number in range(2):
        batch.add([(number, Request(ids(3, fixed + 70), frozenset(), 1))])
    assert num_read == [fixed + 70] * 2
    assert (fixed, batch.kept and batch.kept.num_bytes) == (128, 0)


def test_cuts_are_the_same_in_all_prompts() -> None:
    longest = cuts(40_000)
    for length in (0, 1, PIECE, PIECE + TAIL - 1, PIECE + TAIL, 500, 4000, 39_999):
        assert cuts(length) == [cut for cut in longest if cut + TAIL <= length]
    for before, cut in zip([0, *longest], longest, strict=False):
        assert PIECE <= cut - before <= max(PIECE, before / 4)


def test_the_least_recently_used_is_dropped_first(served: Served, num_read: list[int]) -> None:
    network, _ = served
    one, two, three = (Request(ids(seed, 160), frozenset(), 1) for seed in (1, 2, 3))
    bytes_per_token = ContinuousBatch[int](network, 1).bytes_per_slot // 512
    kept = KeptPrompts(2 * 128 * bytes_per_token)  # two of the three

    def read(request: Request) -> int:
        num_read.clear()
        ContinuousBatch[int](network, 1, kept=kept).add([(0, request)])
        return sum(num_read)

    assert [read(one), read(two), read(one)] == [160, 160, 32]
    assert [read(three), read(one), read(two)] == [160, 32, 160]
    assert kept.num_bytes == kept.limit
    small = KeptPrompts(100 * bytes_per_token)  # not even one whole beginning
    ContinuousBatch[int](network, 1, kept=small).add([(0, one)])
    assert small.num_bytes == 64 * bytes_per_token

"""Cached, batched generation says exactly what the network says when it reads everything anew for each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import FAMILIES, HYBRIDS, random_network, write_model
from torch import Tensor

from lorafit.infer import continuous_batch
from lorafit.infer.continuous_batch import GeneratedToken, Request, generate_tokens
from lorafit.infer.sampling import Sampling, next_tokens
from lorafit.model import native
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama

PROMPTS = [[256, 5, 6, 7], [9], [3] * 17, [3, 3, 3, 3, 3, 6, 3, 1, 0]]  # the last two begin alike
GREEDY = Sampling()


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute: with the kernels, and as with LORAFIT_NATIVE=0."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
    elif native.kernels() is None:
        pytest.skip(native.missing())
    return str(request.param)


def generated(
    network: Llama,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    max_tokens: int = 12,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling = GREEDY,
) -> list[list[GeneratedToken]]:
    """Tokens of each row."""
    rows: list[list[GeneratedToken]] = [[] for _ in prompts]
    requests = [
        Request(prompt, stop_ids, max_tokens, sampling, stream=row) for row, prompt in enumerate(prompts)
    ]
    for row, token in generate_tokens(network, requests):
        rows[row].append(token)
    return rows


def ids(rows: list[list[GeneratedToken]]) -> list[list[int]]:
    return [[token.id for token in row] for row in rows]


@torch.inference_mode()
def next_logits(network: Llama, prefix: Sequence[int]) -> Tensor:
    """Without a cache: the whole prefix is read."""
    hidden = network.hidden(torch.tensor(prefix), PackedDocuments([len(prefix)]))
    return network.logits(hidden[-1:])[0]


def uncached(network: Llama, prompt: Sequence[int], max_tokens: int = 12) -> list[int]:
    prefix = list(prompt)
    for _ in range(max_tokens):
        prefix.append(int(next_logits(network, prefix).argmax()))
    return prefix[len(prompt) :]


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_a_cached_batch_equals_each_prompt_alone_without_cache(family: str) -> None:
    network = random_network(family, dtype=torch.float64)
    assert ids(generated(network)) == [uncached(network, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", *HYBRIDS])
def test_what_prompts_begin_alike_with_is_read_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(family)
    passes: list[int] = []
    embedded = network.embedded

    def counted(ids: Tensor, *rest: Any) -> Tensor:
        passes.append(len(ids))
        return embedded(ids, *rest)

    monkeypatch.setattr(network, "embedded", counted)
    system = list(range(40))
    prompts = [[*system, 50, 51], [*system, 60], system, [*system, 50, 51]]
    together = ids(generated(network, prompts, max_tokens=3))
    assert passes == [40 + 2 + 1 + 2, 4, 4]
    assert together == [ids(generated(network, [prompt], max_tokens=3))[0] for prompt in prompts]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_cached_logits_equal_uncached_ones_whatever_is_said(
    family: str, dtype: torch.dtype, close: float, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are forced to say random tokens and to stop at different times; every distribution is compared."""
    network = random_network(family, dtype=dtype)
    said = torch.randint(0, 250, (len(PROMPTS), 14), generator=torch.Generator().manual_seed(3)).tolist()
    for row, length in enumerate([14, 4, 9, 6]):
        said[row][length - 1] = 257
    prefixes = [list(prompt) for prompt in PROMPTS]
    going = list(range(len(PROMPTS)))
    compared = 0

    def forced(logits: Tensor, *_: Any) -> list[int]:
        nonlocal going, compared
        tokens = []
        for at, row in enumerate(going):
            expected = next_logits(network, prefixes[row])
            torch.testing.assert_close(logits[at], expected, rtol=close, atol=close)
            tokens.append(said[row][len(prefixes[row]) - len(PROMPTS[row])])
            prefixes[row].append(tokens[-1])
            compared += 1
        ended = [row for row, token in zip(going, tokens, strict=True) if token == 257]
        for row in ended:  # the last row moves to the slot of one that has ended
            going[going.index(row)] = going[-1]
            going.pop()
        return tokens

    monkeypatch.setattr(continuous_batch, "next_tokens", forced)
    rows = generated(network, max_tokens=14, stop_ids=frozenset({257}))
    assert [len(row) for row in rows] == [14, 4, 9, 6]
    assert compared == 33


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral-window", "qwen2", "qwen3"])
def test_greedy_equals_transformers(family: str, path: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_model(tmp_path, family)
    attention = "eager" if "window" in family else "sdpa"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    network = random_network(family)
    for prompt, ours in zip(PROMPTS, ids(generated(network, max_tokens=16)), strict=True):
        tensor = torch.tensor([prompt])
        said = theirs.generate(
            tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert said[0, len(prompt) :].tolist() == ours


def test_a_stop_token_ends_its_row_and_no_other() -> None:
    network = random_network(dtype=torch.float64)
    free = ids(generated(network))
    stop = free[0][3]
    rows = generated(network, stop_ids=frozenset({stop, 257}))
    for row, said in zip(rows, free, strict=True):
        expected = said[: said.index(stop) + 1] if stop in said else said
        assert [token.id for token in row] == expected
        assert [token.end for token in row[:-1]] == [""] * (len(row) - 1)
        assert row[-1].end == ("stop" if stop in said else "length")
    assert [row[-1].end for row in rows].count("stop") >= 1
    assert len({len(row) for row in rows}) > 1


def test_max_tokens_is_the_most() -> None:
    network = random_network()
    longer = generated(network, max_tokens=7)
    for most in (1, 2, 6):
        rows = generated(network, max_tokens=most)
        assert ids(rows) == [row[:most] for row in ids(longer)]
        assert {row[-1].end for row in rows} == {"length"}


def test_no_row_goes_past_the_longest_position() -> None:
    network = random_network(max_position_embeddings=20)
    rows = generated(network, max_tokens=50)
    assert [len(row) + len(prompt) for row, prompt in zip(rows, PROMPTS, strict=True)] == [20] * 4
    assert {row[-1].end for row in rows} == {"length"}
    assert ids(rows) == [
        row[: len(short)]
        for row, short in zip(ids(generated(random_network(), max_tokens=50)), rows, strict=True)
    ]


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt has no token"):
        generated(random_network(), [[5], []])


def test_in_bfloat16_a_row_says_the_same_whatever_its_neighbours(path: str) -> None:
    network = random_network(dtype=torch.bfloat16, head_dim=16)
    together = ids(generated(network, PROMPTS * 4))
    assert together[:4] * 4 == together
    if path == "compiled":  # torch's products may sum in another order
        assert ids(generated(network)) == together[:4]


LOGITS = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3


def sample(times: int = 1, logits: Tensor = LOGITS, **settings: Any) -> list[list[int]]:
    sampling = Sampling(**settings)
    streams = [sampling.stream(row) for row in range(len(logits))]
    return [next_tokens(logits, sampling, streams) for _ in range(times)]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
        {"temperature": 2.0, "top_p": 0.0},
        {"temperature": 1e-4},
        {"temperature": 5e-324},
        {"temperature": 1e300, "top_k": 1},
    ],
    ids=str,
)
def test_these_are_greedy(settings: dict[str, Any]) -> None:
    assert sample(20, **settings) == [LOGITS.argmax(-1).tolist()] * 20


def test_top_k_and_top_p_keep_the_likeliest_and_reach_all_of_them() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()[:, [3, 0, 4, 1, 2]]  # by rank: 1, 3, 4, 0, 2
    for settings, kept in (
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_p": 0.65}, {1, 3}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.9}, {1, 3, 4, 0}),
        ({"top_k": 3, "top_p": 0.65}, {1, 3}),
        ({"top_k": 50}, {0, 1, 2, 3, 4}),
        ({}, {0, 1, 2, 3, 4}),
    ):
        seen = {tokens[0] for tokens in sample(300, logits, temperature=1.0, **settings)}
        assert seen == kept, settings


def test_top_k_keeps_no_more_where_scores_are_equal() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    seen = {tokens[0] for tokens in sample(300, logits, temperature=1.0, top_k=2)}
    assert len(seen) == 2
    assert 1 in seen


def test_samples_follow_the_temperature() -> None:
    logits = torch.tensor([[2.0, 0.0]])
    for temperature in (0.5, 1.0, 4.0):
        expected = float((logits / temperature).softmax(-1)[0, 0])
        share = sum(tokens[0] == 0 for tokens in sample(4000, logits, temperature=temperature)) / 4000
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)


def test_a_seed_reproduces_and_another_differs() -> None:
    network = random_network()
    hot = [ids(generated(network, sampling=Sampling(1.5, seed=seed))) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_a_rows_sample_does_not_depend_on_its_neighbours() -> None:
    network = random_network(dtype=torch.float64)
    sampling = Sampling(1.5, seed=4)
    one = ids(generated(network, sampling=sampling))
    others = [[1, 2], PROMPTS[1], [3, 4, 5], PROMPTS[3], [7]]
    two = ids(generated(network, others, sampling=sampling))
    assert one[1] == two[1]
    assert one[3] == two[3]
    stopping = ids(generated(network, sampling=sampling, stop_ids=frozenset({one[0][2]})))
    assert stopping[3] == one[3][: len(stopping[3])]
    assert len(stopping[0]) == 3


def test_rows_with_one_prompt_are_sampled_apart() -> None:
    network = random_network()
    rows = ids(generated(network, [[5, 6]] * 4, sampling=Sampling(1.5)))
    assert len({tuple(row) for row in rows}) == 4

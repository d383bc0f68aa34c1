"""Rope of every published kind: logits equal transformers', below and above the original length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny_models import config_of, random_network, weights_of, write_model

from lorafit.errors import LorafitError, ModelError
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.model.architecture import parse_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.rope import ROPE_KINDS

transformers = pytest.importorskip("transformers")

PAIRS = 8
FACTORS = {
    "short_factor": [1 + 0.1 * n for n in range(PAIRS)],
    "long_factor": [1 + 0.7 * n for n in range(PAIRS)],
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3-without-original": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 40,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.3,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
    },
    "yarn-no-factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS},
    "longrope-factor": {
        "type": "longrope",
        "factor": 6.0,
        "original_max_position_embeddings": 32,
        **FACTORS,
    },
}


def config(name: str, layout: str, **changes: Any) -> dict[str, Any]:
    raw = config_of("llama", head_dim=2 * PAIRS, max_position_embeddings=64, **changes)
    if layout == "new":
        theta = raw.pop("rope_theta")
        return {**raw, "rope_parameters": {**ROPES[name], "rope_theta": theta}}
    return {**raw, "rope_scaling": ROPES[name]}


def pair_of(raw: dict[str, Any], folder: Path) -> tuple[Llama, Any]:
    """The same random network here and in transformers."""
    network = random_network("llama", head_dim=2 * PAIRS)
    ours = Llama(parse_architecture(raw, "test")).requires_grad_(False).eval()
    ours.load_state_dict(network.state_dict())
    folder.mkdir(exist_ok=True)
    save_file(weights_of(network), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**raw, "architectures": ["LlamaForCausalLM"]}))
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_every_kind_is_tried() -> None:
    assert {rope.get("rope_type", rope.get("type")) for rope in ROPES.values()} == {*ROPE_KINDS}


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_transformers(name: str, layout: str, tmp_path: Path) -> None:
    ours, theirs = pair_of(config(name, layout), tmp_path / "model")
    lengths = [20, 32, 33, 64, 65, 130]
    ids = [torch.arange(length) * 7 % 250 for length in lengths]
    with torch.no_grad():
        packed = ours.logits(ours.hidden(torch.cat(ids), PackedDocuments(lengths)))
        for part, row in zip(packed.split(lengths), ids, strict=True):
            torch.testing.assert_close(part, theirs(row[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope", "yarn"])
def test_answers_equal_transformers(name: str, tmp_path: Path) -> None:
    """Rows of one pass with a common prefix, on both sides of the original length, and answers that cross it."""
    ours, theirs = pair_of(config(name, "old"), tmp_path / "model")
    prompts = [
        [n * 7 % 250 + 1 for n in range(length)]
        for length in ((20, 30, 70, 75) if name == "dynamic" else (20, 30, 40, 50))
    ]
    requests = [Request(prompt, frozenset(), 6) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    for index, token in generate_tokens(ours, requests):
        made[index].append(token.id)
    for prompt, answer in zip(prompts, made, strict=True):
        whole = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer == whole[0, len(prompt) :].tolist()


def test_the_original_length_beside_the_scaling_counts_as_in_transformers(tmp_path: Path) -> None:
    raw = {**config("longrope", "old"), "original_max_position_embeddings": 48}
    ours, theirs = pair_of(raw, tmp_path / "model")
    for length in (40, 50):
        ids = torch.arange(length)
        with torch.no_grad():
            mine = ours.logits(ours.hidden(ids, PackedDocuments([length])))
            torch.testing.assert_close(mine, theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "readable", "trainable"),
    [("yarn", 128, 128), ("dynamic", 160, 64), ("longrope", 64, 32), ("linear", 64, 64)],
)
def test_how_long_texts_may_be(name: str, readable: int, trainable: int) -> None:
    arch = parse_architecture(config(name, "new"), "test")
    assert (arch.max_position_embeddings, arch.longest_row) == (readable, trainable)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "proportional", "factor": 2.0}, "rope types default, linear"),
        ({"rope_type": "linear"}, "`factor` is None: rope type linear needs a number"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, "expected 8 positive"),
        (
            {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5},
            "`partial_rotary_factor` is 0.5",
        ),
        ({"rope_type": "yarn", "factor": -1}, "`factor` is -1"),
    ],
)
def test_what_cannot_be_computed_is_refused(rope: dict[str, Any], message: str) -> None:
    raw = {**config("default", "old"), "rope_scaling": rope}
    with pytest.raises(ModelError) as caught:
        parse_architecture(raw, "config.json")
    assert message in str(caught.value)


def test_rows_beyond_the_original_length_are_not_trained(tmp_path: Path) -> None:
    from tests.runs import tiny_run, tiny_settings

    model = write_model(tmp_path / "model", rope_scaling=ROPES["dynamic"], max_position_embeddings=40)
    with pytest.raises(LorafitError, match="the model reads at most 40"):
        tiny_run(tiny_settings(tmp_path, "train.max_steps=1", model=model), tmp_path / "run")

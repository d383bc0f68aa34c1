"""A network in a GGUF file is the network that was written: its architecture, its numbers, and llama.cpp's logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_gguf import FAMILIES, network_of, write_gguf_model

from lorafit.errors import ModelError
from lorafit.export.llama_cpp import Server
from lorafit.gguf_file.config import READINGS, shortest
from lorafit.hub.client import model_folder
from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.families import FAMILIES as RECORDS
from lorafit.model.llama import Llama, capped
from lorafit.model.weights import fingerprint, load_network, stored_weights

IDS = [256, 72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]
CPU = torch.device("cpu")


def logits(network: Llama, ids: list[int]) -> torch.Tensor:
    hidden = network.normed(network.hidden(torch.tensor(ids), PackedDocuments([len(ids)])))
    raw = torch.nn.functional.linear(hidden, network.lm_head.weight)
    return capped(raw, network.arch.logits_cap)


def read(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    folder = model_folder(str(path)).path
    return load_network(folder, read_architecture(folder), dtype, CPU)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_back_the_network(name: str, tmp_path: Path) -> None:
    """The number of each parameter, and the same logits, so nothing of the architecture is lost."""
    written, network = network_of(name), read(write_gguf_model(tmp_path / "model.gguf", name))
    for parameter, weight in written.named_parameters():
        assert torch.allclose(network.get_parameter(parameter), weight, atol=1e-6), parameter
    assert torch.allclose(logits(network, IDS), logits(written, IDS), atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_llama_cpps(name: str, tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "model.gguf", name)
    with torch.no_grad():
        own = logits(read(path), IDS)[-1].log_softmax(-1)
    theirs = torch.from_numpy(np.array(Server(path, None, 24, 1).log_probabilities(IDS)))
    known = theirs > -60
    assert float((own - theirs)[known].abs().max()) < 2e-3


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_blocks_are_unpacked_as_the_package_does(kind: str, tmp_path: Path) -> None:
    """Each weight is that of the package's own reader, its rows in the order of Hugging Face; vectors are exact."""
    import gguf

    changes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    path = write_gguf_model(tmp_path / "model.gguf", "llama", kind, **changes)
    folder = model_folder(str(path)).path
    arch = read_architecture(folder)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = stored_weights(folder, arch).network
    for name, stored in weights.items():
        tensor = tensors[stored.name]
        wanted = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            wanted = wanted.unflatten(0, (-1, arch.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(stored.read(), wanted), name
        assert torch.equal(stored.read(torch.bfloat16), wanted.bfloat16()), name
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind


def test_every_architecture_that_exports_write_is_read() -> None:
    written = {
        record.gguf: name
        for name, record in RECORDS.items()
        if record.gguf and name not in ("mistral", "lfm2", "qwen3_5_text")
    }
    assert {name: READINGS[name].model_type for name in written} == written


def test_the_fingerprint_is_that_of_the_file(tmp_path: Path) -> None:
    """It changes with the numbers, and not with the place."""
    one, two = (write_gguf_model(tmp_path / f"{seed}.gguf", seed=seed) for seed in (0, 1))
    moved = tmp_path / "moved.gguf"
    prints = [fingerprint(model_folder(str(path)).path) for path in (one, two)]
    one.rename(moved)
    assert prints[0] != prints[1]
    assert fingerprint(model_folder(str(moved)).path) == prints[0]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "model.gguf")
    first = model_folder(str(path)).path
    assert model_folder(str(path)).path == first
    write_gguf_model(path, "llama-tied")
    assert read_architecture(model_folder(str(path)).path).tie_word_embeddings
    assert not read_architecture(first).tie_word_embeddings


def test_a_float32_is_read_as_it_was_written() -> None:
    for number in (1e-5, 1e-6, 1e6, 0.22, 5e5, 10000.0, 0.0):
        assert shortest(float(np.float32(number))) == number


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "mamba"}, "the architecture `mamba` is not supported"),
        ({"llama.expert_count": 8}, "networks with experts"),
        ({"split.count": 2}, "several files"),
        ({"llama.attention.head_count": [4, 2]}, "one int is expected"),
        ({"llama.block_count": None}, "`llama.block_count` is missing"),
        ({"llama.rope.scaling.type": "spiral"}, "rope of the type `spiral`"),
        ({"llama.rope.freq_base": float("nan")}, "is nan"),
        ({"llama.attention.value_length": 4}, "different widths"),
        ({"llama.attention.sliding_window": 7}, "windows are not supported"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizers of the kind `bert`"),
        ({"tokenizer.ggml.pre": "viking"}, "the split `viking`"),
        ({"tokenizer.ggml.eos_token_id": 999}, "there are 260 tokens"),
    ],
)
def test_what_lorafit_does_not_compute_is_refused(
    change: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.gguf_file import folder, header

    path = write_gguf_model(tmp_path / "model.gguf")
    plain = header.read_header(path)
    metadata = {key: value for key, value in {**plain.metadata, **change}.items() if value is not None}
    monkeypatch.setattr(folder, "read_header", lambda path: dataclasses.replace(plain, metadata=metadata))
    with pytest.raises(ModelError, match=said):
        model_folder(str(path))


def test_the_folder_has_the_files_of_a_model(tmp_path: Path) -> None:
    folder = model_folder(str(write_gguf_model(tmp_path / "model.gguf"))).path
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.gguf", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 257

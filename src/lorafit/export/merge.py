"""Merges the adapter into its 16- or 32-bit base: a Hugging Face model folder, with one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor

from lorafit.export.chat_template import chat_template
from lorafit.export.run_source import RunSource
from lorafit.model.dtypes import dtype_name, dtype_names
from lorafit.model.stored_tensor import StoredTensor
from lorafit.model.weights import INDEX, SINGLE

MAX_SHARD = 5_000_000_000  # bytes, as transformers cuts
_TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")


def base_type(source: RunSource) -> str:
    """The short name of the base's own type, to merge into; of float64 it is f32."""
    return "f32" if source.dtype == torch.float64 else dtype_names(source.dtype).gguf


def write_merged(
    source: RunSource,
    staging: Path,
    dtype: torch.dtype,
    progress: Callable[[int, int], None],
    max_shard: int = MAX_SHARD,
) -> dict[str, str]:
    """Write weights, index, config, generation config and tokenizer; the SHA-256 of each weight file.

    Sums are computed in float32 and rounded once. Raises OSError.
    """
    shards = plan_shards(source, dtype, max_shard)
    done = count(1)
    sums = {
        file: _write_shard(
            source,
            staging / file,
            names,
            dtype,
            lambda: progress(next(done), len(source.weights | source.left_out)),
        )
        for file, names in shards.filename_to_tensors.items()
    }
    if shards.is_sharded:
        weight_map = dict(sorted(shards.tensor_to_filename.items()))
        write_json(staging / INDEX, {"metadata": shards.metadata, "weight_map": weight_map})
    config = _read_json(source.base.path / "config.json")
    config.pop("dtype", None)
    config["torch_dtype"] = dtype_name(dtype)
    if config.get("tie_word_embeddings") and not source.arch.tie_word_embeddings:
        config["tie_word_embeddings"] = False  # the adapter has made two tables of one
    text = config if "vocab_size" in config else config.get("text_config", config)
    text["vocab_size"] = source.arch.vocab_size
    write_json(staging / "config.json", config)
    write_prompting(source, staging)
    return sums


def plan_shards(source: RunSource, dtype: torch.dtype, max_shard: int) -> StateDictSplit:
    """The weight files to write, each at most `max_shard` bytes unless one tensor alone is more."""
    return split_state_dict_into_shards_factory(
        source.weights | source.left_out,
        get_storage_size=lambda stored: _num_bytes(stored, dtype),
        filename_pattern=SINGLE.replace(".", "{suffix}."),
        max_shard_size=max_shard,
    )


def generation_config(source: RunSource) -> dict[str, Any]:
    """The base's generation config, with the stop tokens of the training."""
    config = _read_json(source.base.path / "generation_config.json")
    config.pop("_from_model_config", None)  # else transformers derives it again, with the base's stop token
    stops = list(source.contract.stop_ids)
    if stops:
        config["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        config.setdefault("pad_token_id", stops[0])
    if source.contract.bos_id is not None:
        config["bos_token_id"] = source.contract.bos_id
    return config


def write_prompting(source: RunSource, staging: Path) -> None:
    """The base's tokenizer, with the chat template and the stop tokens of the training. Raises OSError."""
    folder = source.renderer.tokenizer.folder
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            (staging / name).write_bytes((folder / name).read_bytes())
    config = _read_json(folder / "tokenizer_config.json")
    config["chat_template"] = chat_template(source.renderer)
    write_json(staging / "tokenizer_config.json", config)
    write_json(staging / "generation_config.json", generation_config(source))


def _write_shard(
    source: RunSource, path: Path, names: Sequence[str], dtype: torch.dtype, tell: Callable[[], None]
) -> str:
    """A safetensors file (https://github.com/huggingface/safetensors#format), written tensor by tensor; its SHA-256.

    The library's own writers need all tensors of a file in memory.
    """
    tensors = source.weights | source.left_out
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _num_bytes(tensors[name], dtype)
        shape = list(tensors[name].shape)
        header[name] = {"dtype": dtype_names(dtype).safetensors, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in (len(text).to_bytes(8, "little"), text):
            file.write(content)
            digest.update(content)
        for name in names:
            numbers = _bytes(source.tensor(name).to(dtype))
            file.write(numbers)
            digest.update(numbers)
            tell()
    return digest.hexdigest()


def _num_bytes(stored: StoredTensor, dtype: torch.dtype) -> int:
    return torch.Size(stored.shape).numel() * dtype.itemsize


def _bytes(tensor: Tensor) -> memoryview[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file for people and other programs. Raises OSError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode(errors="backslashreplace"))  # a lone surrogate becomes its escape

"""Converts a Hugging Face tokenizer to the vocabulary of a GGUF file, so that every text gets the same ids.

Two kinds: `gpt2`, byte-level BPE, for which llama.cpp names the regular expression that splits a text, and `llama`,
SentencePiece, which merges the two pieces with the highest score first. If the score of a token is minus the rank of
its first merge, the result is that of merges by rank.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from lorafit.data.tokenizer import Tokenizer
from lorafit.data.tokenizer_files import steps_of
from lorafit.errors import ModelError
from lorafit.gguf_file.splits import DIGITS, GPT_2, SPLITS

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER_MERGED = -1e6
_UNREACHABLE = "\u00fe \u00ff"  # bytes that UTF-8 never has, because a list of merges must not be empty


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, size: int) -> None:
    """Write the vocabulary in the tokenizer's folder, padded to the network's `size`. Raises ModelError."""
    path = tokenizer.folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    model = spec["model"]
    if model["type"] != "BPE" or not isinstance(model["vocab"], dict):
        raise ModelError(f"GGUF has no counterpart of a {model['type']} tokenizer", place=str(path))
    tokens, kinds = _tokens(spec, tokenizer, size, path)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in model.get("merges", [])
        if isinstance(merge, str) or " " not in "".join(merge)
    ]
    is_bytes = any(step["type"] == "ByteLevel" for step in steps_of(spec.get("pre_tokenizer")))
    nfc = any(step["type"] == "NFC" for step in steps_of(spec.get("normalizer")))
    writer.add_token_list(tokens)
    if is_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(spec, path, has_merges=bool(merges)))
        writer.add_token_merges(merges or [_UNREACHABLE])
    else:
        kinds = [
            TokenType.BYTE if kind == TokenType.NORMAL and _BYTE.fullmatch(token) else kind
            for token, kind in zip(tokens, kinds, strict=True)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(not is_bytes and tokenizer.blank == "each")
    if nfc:
        writer.add_bool("tokenizer.ggml.normalizer.nfc", True)


def _tokens(spec: dict[str, Any], tokenizer: Tokenizer, size: int, path: Path) -> tuple[list[str], list[int]]:
    """Text and kind of every id; ids of the network that the tokenizer does not have are unused."""
    by_id = {number: text for text, number in spec["model"]["vocab"].items()}
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    controls = {control: text for text, control in tokenizer.control.items()}
    by_id |= added | controls
    if max(by_id) >= size:
        raise ModelError(
            f"the tokenizer has ids up to {max(by_id)}, the network {size} tokens", place=str(path)
        )
    unknown = spec["model"].get("unk_token")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    kinds: list[int] = []
    for number, text in enumerate(tokens):
        if number not in by_id:
            kinds.append(TokenType.UNUSED)
        elif text == unknown:
            kinds.append(TokenType.UNKNOWN)
        elif number in controls:
            kinds.append(TokenType.CONTROL)
        else:
            kinds.append(TokenType.USER_DEFINED if number in added else TokenType.NORMAL)
    return tokens, kinds


def _pre(spec: dict[str, Any], path: Path, *, has_merges: bool) -> str:
    """llama.cpp's name for the split of a byte-level tokenizer. Raises ModelError if it has none."""
    steps = list(steps_of(spec.get("pre_tokenizer")))
    kinds = [step["type"] for step in steps]
    splits = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if not has_merges:  # each byte is a token, whatever the split
        return GPT_2
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return GPT_2
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return DIGITS
    known = {split: name for name, split in SPLITS.items()}
    if kinds == ["Split", "ByteLevel"] and splits[0] in known:
        return known[splits[0]]
    raise ModelError(
        "llama.cpp has no name for the pattern by which this tokenizer splits texts",
        place=str(path),
        hint="`lorafit export RUN merged` works; llama.cpp's own converter may know the model",
    )


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """The score of each token: higher for an earlier merge."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(first[token]) if token in first else _NEVER_MERGED for token in tokens]

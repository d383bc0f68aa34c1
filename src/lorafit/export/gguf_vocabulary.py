"""Converts a Hugging Face tokenizer to the vocabulary of a GGUF file, so that every text gets the same ids.

Two kinds: `gpt2`, byte-level BPE, for which llama.cpp names the regular expression that splits a text, and `llama`,
SentencePiece, which merges the two pieces with the highest score first. If the score of a token is minus the rank of
its first merge, the result is that of merges by rank.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data.tokenizer import Tokenizer, steps_of
from lorafit.errors import ModelError
from lorafit.model.architecture import FAMILIES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER_MERGED = -1e6
_UNREACHABLE = "\u00fe \u00ff"  # bytes that UTF-8 never has, because a list of merges must not be empty


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens` with `kinds` (and for `llama` `scores`) by id; `pre` names the split of a text before its merges."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    add_space_prefix: bool
    nfc: bool


def vocabulary(folder: Path, tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of the model in `folder`, padded to the network's `size`. Raises ModelError."""
    path = folder / "tokenizer.json"
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
    if is_bytes:
        pre = _pre(spec, path, has_merges=bool(merges))
        return Vocabulary("gpt2", pre, tokens, kinds, [], merges or [_UNREACHABLE], False, nfc)
    kinds = [BYTE if kind == NORMAL and _BYTE.fullmatch(tokens[i]) else kind for i, kind in enumerate(kinds)]
    by_score = _scores(tokens, merges)
    return Vocabulary("llama", "default", tokens, kinds, by_score, [], tokenizer.blank == "each", nfc)


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
    kinds = []
    for number, text in enumerate(tokens):
        if number not in by_id:
            kinds.append(UNUSED)
        elif text == unknown:
            kinds.append(UNKNOWN)
        elif number in controls:
            kinds.append(CONTROL)
        else:
            kinds.append(USER_DEFINED if number in added else NORMAL)
    return tokens, kinds


def _pre(spec: dict[str, Any], path: Path, *, has_merges: bool) -> str:
    """llama.cpp's name for the split of a byte-level tokenizer. Raises ModelError if it has none."""
    steps = list(steps_of(spec.get("pre_tokenizer")))
    kinds = [step["type"] for step in steps]
    splits = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if not has_merges:  # each byte is a token, whatever the split
        return "gpt-2"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    known = {
        split: name for family in FAMILIES.values() for split, name in family.gguf_pre_tokenizers.items()
    }
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

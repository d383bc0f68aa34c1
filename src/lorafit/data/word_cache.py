"""Ids of texts word by word from a cache of words, for tokenizers that merge a whole text as one long word.

These are the SentencePiece-like BPE tokenizers of Llama 2 and Mistral. They do not split a text before its merges, so
their own cache of words never has a hit. But if no token has a blank after another character, no merge crosses the
start of a word. Then the ids of a text are the ids of its words, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
MAX_CHARACTERS = 2_000_000  # of all cached words; beyond that the cache is emptied
_AT_START = "\ufdd3"  # before a word without a blank before it; reserved, so no text has it
_WORD = re.compile(f"[ {SPACE_MARK}]+[^ {SPACE_MARK}]*|[^ {SPACE_MARK}]+")


def can_go_by_words(spec: Mapping[str, Any]) -> bool:
    """Whether the tokenizer of a tokenizer.json gives the ids of a text word by word; False where that is not certain.

    None of its special tokens may include the blanks beside it.
    """
    model = spec["model"]
    changed = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or SPACE_MARK not in model["vocab"] or any(model.get(key) for key in changed):
        return False
    greedy = ("lstrip", "rstrip", "single_word", "normalized")
    if any(not token["special"] or any(token[key] for key in greedy) for token in spec["added_tokens"]):
        return False
    if not _only_turns_spaces_into_blanks(spec.get("normalizer"), spec.get("pre_tokenizer")):
        return False
    return not any(SPACE_MARK in token.lstrip(SPACE_MARK) for token in model["vocab"])


def _only_turns_spaces_into_blanks(normalizer: Any, pre_tokenizer: Any) -> bool:
    if normalizer is None:
        metaspace = {
            "type": "Metaspace",
            "replacement": SPACE_MARK,
            "prepend_scheme": "never",
            "split": False,
        }
        return bool(pre_tokenizer == metaspace)
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    kept, turned = (
        {"type": "Replace", "pattern": {"String": c}, "content": SPACE_MARK} for c in (SPACE_MARK, " ")
    )
    return pre_tokenizer is None and turned in steps and all(step in (kept, turned) for step in steps)


class Words:
    """The cache of words; `encode` gives the ids of whole texts."""

    def __init__(self, encode: Callable[[list[str]], Iterable[list[int]]]) -> None:
        self._encode = encode
        self._known: dict[str, tuple[int, ...]] = {}
        self._num_characters = 0

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text, each a new list."""
        words_of = [_words(text) for text in texts]
        if self._num_characters > MAX_CHARACTERS:
            self._known, self._num_characters = {}, 0  # another thread may still read the old one
        known = self._known
        new = list(set().union(*words_of).difference(known))
        whole = [word[1:] if word[:1] == _AT_START else SPACE_MARK + word for word in new]
        # Tuples: the garbage collector does not traverse them.
        known.update(zip(new, map(tuple, self._encode(whole)), strict=True))
        self._num_characters += sum(map(len, new))
        for words in words_of:
            yield list(chain.from_iterable(map(known.__getitem__, words)))


def _words(text: str) -> list[str]:
    """The words of `text`, each without one blank before it, or after _AT_START where there is none."""
    if "  " in text or text.startswith(f"{SPACE_MARK} ") or SPACE_MARK in text[1:]:
        words = _WORD.findall(text)
        return [word[1:] if word[0] in (" ", SPACE_MARK) else _AT_START + word for word in words]
    if text[:1] == SPACE_MARK:
        return text[1:].split(" ")
    words = text.split(" ")
    words[0] = _AT_START + words[0]
    return words

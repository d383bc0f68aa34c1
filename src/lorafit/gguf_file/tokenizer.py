"""Converts the vocabulary of a GGUF file to the tokenizer files of a model folder, so that texts get the same ids.

Two kinds, as in export/gguf_vocabulary.py: `gpt2`, byte-level BPE with a named split, and `llama`, SentencePiece, whose
scores become merges by rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.errors import ModelError
from lorafit.gguf_file.header import Header
from lorafit.gguf_file.splits import BY_NAME

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
_BLANK = "\u2581"
_KEY = "tokenizer.ggml."
_ENDS = ("eos", "eot", "eom")  # each may end an answer
_MAX_PIECE = 512  # characters of a token that is split into pairs
_NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}


def tokenizer_files(header: Header) -> dict[str, dict[str, Any]]:
    """The content of tokenizer.json, tokenizer_config.json and generation_config.json. Raises ModelError."""
    return _Vocabulary(header).files()


class _Vocabulary:
    """The keys `tokenizer.*` of a file, checked as they are read."""

    def __init__(self, header: Header) -> None:
        self._path, self._metadata = header.path, header.metadata
        self._kind = self._get("model", str)
        if self._kind not in ("gpt2", "llama"):
            raise self._fault(f"tokenizers of the kind `{str(self._kind)[:40]}` are not supported")
        texts = self._list("tokens", str)
        self._tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(texts)]
        self._kinds = self._list("token_type", int, len(texts)) or [_NORMAL] * len(texts)
        self._ids = {text: number for number, text in enumerate(self._tokens)}
        if not texts:
            raise self._fault(f"`{_KEY}tokens` is missing: the file has no vocabulary")
        if len(self._ids) < len(texts):
            twice = next(text for number, text in enumerate(self._tokens) if self._ids[text] != number)
            raise self._fault(f"the token {twice[:40]!r} is there twice")

    def files(self) -> dict[str, dict[str, Any]]:
        spec, adds_bos = self._byte_level() if self._kind == "gpt2" else self._sentence_piece()
        adds_bos = bool(self._get("add_bos_token", bool, adds_bos))
        named = {key: self._named(key) for key in _NAMES}
        if self._kind == "llama":  # llama.cpp's own ids where a file names none
            for number, key in enumerate(("unknown", "bos", "eos")):
                named[key] = named[key] or (self._tokens[number] if len(self._tokens) > number else None)
        bos = named["bos"]
        spec["post_processor"] = _begins_with(bos, self._ids) if adds_bos and bos else None
        config: dict[str, Any] = {
            f"{_NAMES[key]}_token": text for key, text in named.items() if text is not None
        }
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"add_bos_token": adds_bos and bos is not None, "legacy": True}
        if template := self._template():
            config["chat_template"] = template
        ends = [number for number in map(self._id, _ENDS) if number is not None]
        if not ends and (eos := named["eos"]):
            ends = [self._ids[eos]]
        ends = list(dict.fromkeys(ends))
        generation: dict[str, Any] = {"eos_token_id": ends if len(ends) != 1 else ends[0]}
        if bos is not None:
            generation["bos_token_id"] = self._ids[bos]
        return {
            "tokenizer.json": spec,
            "tokenizer_config.json": config,
            "generation_config.json": generation if ends else {},
        }

    def _byte_level(self) -> tuple[dict[str, Any], bool]:
        name = self._get("pre", str)
        split = BY_NAME.get(str(name))
        if split is None:
            what = f"the split `{name[:40]}` of" if name else "no name for the split of"
            raise self._fault(f"it has {what} texts, which lorafit does not have (`{_KEY}pre`)")
        merges = []
        for merge in self._list("merges", str):
            cut = merge.find(" ", 1)  # a piece may begin with a blank
            first, second = merge[:cut], merge[cut + 1 :]
            if cut > 0 and {first, second, first + second} <= self._ids.keys():
                merges.append([first, second])
        spec = self._spec(merges, ignore_merges=split.is_whole)
        if self._get("normalizer.nfc", bool, False):
            spec["normalizer"] = {"type": "NFC"}
        spec["pre_tokenizer"] = split.pre_tokenizer()
        spec["decoder"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
        return spec, split.adds_bos

    def _sentence_piece(self) -> tuple[dict[str, Any], bool]:
        scores = self._list("scores", float, len(self._tokens))
        if not scores:
            raise self._fault(f"`{_KEY}scores` is missing")
        pieces = {
            text: score
            for text, kind, score in zip(self._tokens, self._kinds, scores, strict=True)
            if kind in (_NORMAL, _USER_DEFINED)
        }
        has_bytes = _BYTE in self._kinds
        has_prefix = bool(self._get("add_space_prefix", bool, True))
        unknown = next(
            (t for t, kind in zip(self._tokens, self._kinds, strict=True) if kind == _UNKNOWN), None
        )
        spec = self._spec(
            merges_of(pieces, self._ids),
            unk_token=unknown,
            fuse_unk=unknown is not None,
            byte_fallback=has_bytes,
        )
        blanks = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
        prefix = [{"type": "Prepend", "prepend": _BLANK}] if has_prefix else []
        spec["normalizer"] = {"type": "Sequence", "normalizers": [*prefix, blanks]}
        spec["decoder"] = {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []),
            ],
        }
        return spec, True

    def _spec(self, merges: list[list[str]], **model: Any) -> dict[str, Any]:
        added = [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for number, (text, kind) in enumerate(zip(self._tokens, self._kinds, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
        used = {text: number for text, number in self._ids.items() if self._kinds[number] != _UNUSED}
        fixed = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "fuse_unk": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "model": {
                "type": "BPE",
                **fixed,
                "byte_fallback": False,
                **model,
                "vocab": used,
                "merges": merges,
            },
        }

    def _template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise self._fault("`tokenizer.chat_template` is no text")
        return template or None

    def _named(self, key: str) -> str | None:
        number = self._id(key)
        return None if number is None else self._tokens[number]

    def _id(self, key: str) -> int | None:
        number: int | None = self._get(f"{key}_token_id", int)
        if number is not None and not 0 <= number < len(self._tokens):
            raise self._fault(
                f"`{_KEY}{key}_token_id` is {number}, and there are {len(self._tokens):,} tokens"
            )
        return number

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(_KEY + key, default)
        if value is not None and type(value) is not kind:
            raise self._fault(f"`{_KEY}{key}` is {str(value)[:40]!r}: a {kind.__name__} is expected")
        return value

    def _list(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        """A list in which all have one type, [] where it is missing."""
        value = self._get(key, list)
        if value and (type(value[0]) is not kind or (length is not None and len(value) != length)):
            number = f"{length:,} " if length is not None else ""
            kinds = f"{len(value):,} of {type(value[0]).__name__}, and not {number}of {kind.__name__}"
            raise self._fault(f"`{_KEY}{key}` has {kinds}")
        return value or []

    def _fault(self, message: str) -> ModelError:
        hint = "give the safetensors model from which it was made"
        return ModelError(message, place=str(self._path), hint=hint)


def merges_of(pieces: Mapping[str, float], ids: Mapping[str, int]) -> list[list[str]]:
    """The merges by rank that give the pieces with these scores: a piece with a higher score is merged first."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score in pieces.items():
        if 1 < len(piece) <= _MAX_PIECE:
            for cut in range(1, len(piece)):
                first, second = piece[:cut], piece[cut:]
                if first in pieces and second in pieces:
                    found.append((-score, ids[first], ids[second], first, second))
    found.sort(key=lambda merge: merge[:3])
    return [[first, second] for *_, first, second in found]


def _begins_with(bos: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """A post-processor that begins a text with BOS."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    text: Sequence[dict[str, Any]] = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [token, text[0]],
        "pair": [token, *text],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }

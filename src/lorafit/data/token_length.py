"""How much text one token can stand for: the fewest tokens of a text, known before the text is encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafit.data.tokenizer_files import steps_of

_COMPOSED = 4  # bytes, at most, of which a normal form of Unicode makes one
_KEEPING = ("ByteLevel", "Metaspace", "Digits")  # pre-tokenizers that leave out nothing
_ITSELF = (
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
)  # bytes that byte-level vocabularies write as chr(byte)


class TokenLength:
    """The length of the tokens of a tokenizer.json."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._unknown = b""  # bytes that the tokenizer leaves out
        self._longest = _longest(spec)
        if self._longest and _is_byte_level(spec):
            others = [byte for byte in range(256) if byte not in _ITSELF]
            written = {byte: chr(byte) for byte in _ITSELF}
            written |= {byte: chr(256 + index) for index, byte in enumerate(others)}
            self._unknown = bytes(byte for byte in range(256) if written[byte] not in spec["model"]["vocab"])

    def fewest(self, text: str) -> int:
        """A number of tokens that `text` has at least; 0 where one token can stand for a text of any length."""
        if not self._longest:
            return 0
        return len(text.encode("utf-8", "replace").translate(None, self._unknown)) // self._longest


def _longest(spec: Mapping[str, Any]) -> int:
    """The most bytes of a text that one token stands for; 0 where there is no limit."""
    model = spec["model"]
    if model["type"] != "BPE" or any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"]):
        return 0
    for step in steps_of(spec.get("pre_tokenizer")):
        if step["type"] not in _KEEPING and (step["type"] != "Split" or step["behavior"] == "Removed"):
            return 0
    factor = 1
    for step in steps_of(spec.get("normalizer")):
        if step["type"] == "NFC":
            factor = _COMPOSED
        elif step["type"] == "Replace":
            old = step["pattern"].get("String")
            if not old or len(old.encode()) > len(step["content"].encode()):
                return 0
        elif step["type"] != "Prepend":
            return 0
    vocab = model["vocab"]
    if not _is_byte_level(spec) and not (
        model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    ):
        return 0  # unknown characters are left out, or joined
    size = len if _is_byte_level(spec) else _num_bytes
    added = (_num_bytes(token["content"]) for token in spec["added_tokens"])
    return factor * max((*map(size, vocab), *added), default=0)


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether each character of a token is a byte."""
    return any(step["type"] == "ByteLevel" for step in steps_of(spec.get("pre_tokenizer")))


def _num_bytes(token: str) -> int:
    return len(token.encode("utf-8", "replace"))

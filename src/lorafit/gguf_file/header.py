"""Reads the header of a GGUF file: metadata and the list of tensors, with limits, because anybody may have written it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf` has no limits: a
count in a file can keep it busy for ever.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ConfigError, ModelError

MAGIC = b"GGUF"
MAX_KEYS, MAX_TENSORS, MAX_ITEMS = 10_000, 100_000, 2**22
MAX_TEXT, MAX_NAME, MAX_DIMENSIONS = 2**24, 2**16, 4  # bytes of a text, bytes of a name
_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a GGUF file: rows first, its type (`Q4_K`), and where its bytes are in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata by key, and the tensors by name in the file's order."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the network."""
        return str(self.metadata.get("general.architecture"))


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as GGUF files do, or is named as they are."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(4) == MAGIC
    except (OSError, ValueError):
        return False


def read_header(path: Path) -> Header:
    """The header of a GGUF file of version 2 or 3. Raises ModelError, ConfigError without the package `gguf`."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ModelError("it is not a GGUF file", place=str(path), hint=_AGAIN)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header()
    except OSError as error:
        raise ModelError(f"it cannot be read: {error.strerror or error}", place=str(path)) from None


class _Reader:
    """Reads a mapped file from its begin to the end of the list of tensors."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 4

    def header(self) -> Header:
        version = self._number("I")
        if version not in (2, 3):
            raise self._fault(f"GGUF version {version} is not supported", "convert the model again")
        num_tensors = self._count("Q", MAX_TENSORS, "tensors")
        num_keys = self._count("Q", MAX_KEYS, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text(MAX_NAME)
            if key in metadata:
                raise self._fault(f"the key `{key[:80]}` is there twice")
            metadata[key] = self._value(key)
        tensors = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment % 8:
            raise self._fault(f"`general.alignment` is {str(alignment)[:40]}")
        start = -(-self._at // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in tensors:
            info = self._placed(name, shape, kind, start + offset)
            if name in infos:
                raise self._fault(f"the tensor `{name[:80]}` is there twice")
            infos[name] = info
        return Header(self._path, metadata, infos)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(MAX_NAME)
        dimensions = self._count("I", MAX_DIMENSIONS, f"dimensions of `{name[:80]}`")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        sizes = block_sizes()
        if kind not in sizes:
            raise self._fault(
                f"the tensor `{name[:80]}` has the unknown type {kind}", "update the package gguf"
            )
        type_name, (block, size) = sizes[kind]
        if not shape or 0 in shape or shape[-1] % block:
            raise self._fault(
                f"the tensor `{name[:80]}` has shape {list(shape)}, which {type_name} cannot have"
            )
        num_bytes = math.prod(shape) // block * size
        if start + num_bytes > len(self._content):
            raise self._fault(f"the file ends before the end of the tensor `{name[:80]}`", _AGAIN)
        return TensorInfo(name, shape, type_name, start, num_bytes)

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind == _STRING:
            return self._text(MAX_TEXT)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self._fault(f"the key `{key[:80]}` has the unknown type {kind}")
        kind = self._number("I")
        length = self._count("Q", MAX_ITEMS, f"items of `{key[:80]}`")
        if kind == _STRING:
            return [self._text(MAX_TEXT) for _ in range(length)]
        if kind not in _NUMBERS:
            what = "lists in a list" if kind == _ARRAY else f"items of the unknown type {kind}"
            raise self._fault(f"the key `{key[:80]}` has {what}")
        layout = f"<{length}{_NUMBERS[kind]}"
        return list(struct.unpack(layout, self._bytes(struct.calcsize(layout))))

    def _text(self, limit: int) -> str:
        content = self._bytes(self._count("Q", limit, "bytes of a text"))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise self._fault(f"the text {content[:40]!r} is not UTF-8") from None

    def _count(self, layout: str, limit: int, what: str) -> int:
        number: int = self._number(layout)
        if number > limit:
            raise self._fault(f"{number:,} {what}; the limit is {limit:,}")
        return number

    def _number(self, layout: str) -> Any:
        (number,) = struct.unpack(f"<{layout}", self._bytes(struct.calcsize(f"<{layout}")))
        return number

    def _bytes(self, length: int) -> bytes:
        start, self._at = self._at, self._at + length
        if self._at > len(self._content):
            raise self._fault("the file ends in its header", _AGAIN)
        return self._content[start : self._at]

    def _fault(self, message: str, hint: str = "") -> ModelError:
        return ModelError(message, place=str(self._path), hint=hint)


def block_sizes() -> dict[int, tuple[str, tuple[int, int]]]:
    """By the number of each type: its name, and the numbers and bytes of a block. Raises ConfigError."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        hint = "pip install 'lorafit[gguf]'"
        raise ConfigError("the package `gguf` is needed to read GGUF files", hint=hint) from None
    return {int(kind): (kind.name, sizes) for kind, sizes in GGML_QUANT_SIZES.items()}

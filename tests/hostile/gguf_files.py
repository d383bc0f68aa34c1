"""Hostile GGUF files: headers that lie about counts, lengths, types and places, and models that are not whole."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from tests.hostile.case import ESCAPES, Case, Place, cases
from tests.tiny_gguf import write_gguf_model


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def header(
    keys: bytes = b"", tensors: bytes = b"", *, num_keys: int = 1, num_tensors: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors


def tensor(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


HUGE = 2**62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "another file": (b"PK\3\4" + b"\0" * 100, "not a GGUF file"),
    "nothing more": (b"GGUF", "ends in its header"),
    "version 1": (header(version=1), "version 1 is not supported"),
    "the other byte order": (header(version=0x03000000), "is not supported"),
    "many keys": (header(num_keys=HUGE), "the limit is 10,000"),
    "many tensors": (header(num_tensors=HUGE), "the limit is 100,000"),
    "a long name": (header(struct.pack("<Q", HUGE)), "bytes of a text"),
    "a long text": (header(text("a") + struct.pack("<IQ", 8, HUGE)), "bytes of a text"),
    "a long list": (header(key("a", 9, struct.pack("<IQ", 4, HUGE))), "items of `a`"),
    "lists in a list": (header(key("a", 9, struct.pack("<IQ", 9, 1))), "lists in a list"),
    "no such type": (header(key("a", 77, b"")), "the unknown type 77"),
    "a list of no such type": (header(key("a", 9, struct.pack("<IQ", 77, 1))), "unknown type 77"),
    "a key twice": (header(key("a", 4, b"\0" * 4) * 2, num_keys=2), "there twice"),
    "no text": (header(key("a", 8, struct.pack("<Q", 1) + b"\xff")), "is not UTF-8"),
    "an alignment of zero": (header(key("general.alignment", 4, b"\0" * 4)), "alignment"),
    "an alignment that is text": (header(key("general.alignment", 8, text("x"))), "alignment"),
    "many dimensions": (header(b"", tensor(shape=(1,) * 9), num_keys=0, num_tensors=1), "dimensions of"),
    "no numbers": (header(b"", tensor(shape=(0, 4)), num_keys=0, num_tensors=1), "cannot have"),
    "half a block": (header(b"", tensor(shape=(31,), kind=2), num_keys=0, num_tensors=1), "cannot have"),
    "no such type of tensor": (header(b"", tensor(kind=999), num_keys=0, num_tensors=1), "unknown type 999"),
    "beyond the end": (header(b"", tensor(offset=HUGE), num_keys=0, num_tensors=1), "ends before the end"),
    "numbers beyond the end": (
        header(b"", tensor(shape=(HUGE, HUGE)), num_keys=0, num_tensors=1),
        "ends before",
    ),
    "a tensor twice": (header(b"", tensor() * 2 + b"\0" * 256, num_keys=0, num_tensors=2), "there twice"),
}


def file(content: bytes) -> Callable[[Place], Path]:
    return lambda place: place.file("model.gguf", content)


def made(**changes: Any) -> Callable[[Place], Path]:
    """A whole model of which some keys are other ones."""

    def make(place: Place) -> Path:
        path = place.file("model.gguf", b"")
        original = gguf.GGUFWriter.write_kv_data_to_file

        def changed(writer: gguf.GGUFWriter) -> None:
            for key, value in changes.items():
                name = key.replace("__", ".")
                del writer.kv_data[0][name]
                add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
                add[type(value)](name, value)
            original(writer)

        gguf.GGUFWriter.write_kv_data_to_file = changed  # type: ignore[method-assign]
        try:
            return write_gguf_model(path)
        finally:
            gguf.GGUFWriter.write_kv_data_to_file = original  # type: ignore[method-assign]

    return make


def cut(place: Place) -> Path:
    """A model whose last tensor is not whole."""
    path = write_gguf_model(place.file("model.gguf", b""))
    path.write_bytes(path.read_bytes()[:-200])
    return path


CASES = cases(
    {
        **{f"gguf: {name}": Case(file(content)) for name, (content, _) in HOSTILE.items()},
        "gguf: not whole": Case(cut),
        "gguf: an architecture that steers a terminal": Case(
            file(header(key("general.architecture", 8, text(ESCAPES))))
        ),
        "gguf: a billion layers": Case(made(llama__block_count=10**9)),
        "gguf: no heads": Case(made(llama__attention__head_count=0)),
        "gguf: template that escapes": Case(made(tokenizer__chat_template="{{ ''.__class__.__mro__ }}")),
        "gguf: more tokens than rows": Case(made(tokenizer__ggml__tokens=["a"])),
    }
)

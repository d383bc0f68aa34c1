"""Hostile data files: text that nests, never ends or is none, packed files that explode, broken columns."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.hostile.case import ESCAPES, PICKLE, Case, Place, cases

ROW = {"instruction": "Say one.", "input": "", "output": "One."}
MB = 1 << 20


def file(name: str, content: str | bytes | Callable[[], str | bytes]) -> Callable[[Place], Path]:
    """A file of that content, which is made when it is needed where it is large."""
    return lambda place: place.file(name, content() if callable(content) else content)


def row(**changes: Any) -> str:
    return json.dumps(ROW | changes)


def both(name: str, fields: str, many: bool = False) -> dict[str, Case]:
    """A row, given as text, in a JSON array and as a JSON line."""
    return {
        f"json: {name}": Case(file("rows.json", f"[{row()},\n{fields}]"), many),
        f"jsonl: {name}": Case(file("rows.jsonl", f"{row()}\n{fields}\n"), many),
    }


def spoilt(content: bytes, seed: int, count: int = 3) -> bytes:
    """`content` with some bytes changed."""
    chance, spoilt = random.Random(seed), bytearray(content)
    for _ in range(count):
        spoilt[chance.randrange(len(spoilt))] ^= 1 << chance.randrange(8)
    return bytes(spoilt)


def table(count: int = 4, **changes: Any) -> pa.Table:
    return pa.table({key: [value] * count for key, value in (ROW | changes).items()})


def parquet(what: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(what, sink, **options)
    return sink.getvalue()


def arrow(what: pa.Table, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, what.schema, options=options) as writer:
        writer.write_table(what)
    return sink.getvalue()


def outlying_offsets() -> bytes:
    """Arrow texts whose offsets point far outside of the file."""
    right, wrong = (
        struct.pack("<5i", *(step * i for i in range(5))) for step in (len(ROW["instruction"]), 2**28)
    )
    assert right in ARROW
    return ARROW.replace(right, wrong)


def runs_code() -> bytes:
    """A column of the extension type with which old versions of Arrow unpickled what the file said."""
    facts = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": PICKLE}
    fields = [pa.field(name, pa.string(), metadata=facts) for name in ROW]
    return arrow(pa.table([pa.array([value]) for value in ROW.values()], pa.schema(fields)))


def bomb(unpacked: int = 500 * MB) -> bytes:
    """A gzip file a thousandth as large as what it holds: one row that does not end."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(b'[{"instruction": "')]
    parts += [packer.compress(b"a" * MB) for _ in range(unpacked // MB)]
    return b"".join([*parts, packer.flush()])


def pipe(place: Place) -> Path:
    os.mkfifo(place.folder / "rows.json")
    return place.folder / "rows.json"


def listening(place: Place) -> Path:
    path = place.folder / "rows.json"
    before = Path.cwd()
    os.chdir(place.folder)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("rows.json")
    finally:
        os.chdir(before)
    return path


def link(name: str, target: str) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        (place.folder / name).symlink_to(target)
        return place.folder / name

    return make


def in_folder(make: Callable[[Place], Path]) -> Callable[[Place], Path]:
    """The folder that the file lies in."""
    return lambda place: make(place).parent


def sparse(name: str, start: bytes, size: int) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        path = place.file(name, start)
        with path.open("ab") as file:
            file.truncate(size)
        return path

    return make


PARQUET, ARROW = parquet(table()), arrow(table())
TEXTS: dict[str, Case | Callable[[Place], Path]] = {
    **both("nested lists", "[" * 100_000),
    **both("nested objects", '{"a":' * 100_000),
    **both("nested field", '{"instruction": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    **both("huge number", '{"instruction": ' + "9" * 100_000 + ', "output": "b"}'),
    **both("number beyond floats", '{"instruction": 1e999999, "output": "b"}'),
    **both("not a number", '{"instruction": NaN, "output": "b"}'),
    **both("lone surrogate", '{"instruction": "\\ud800", "output": "b"}'),
    **both("null character", '{"instruction": "a\\u0000", "output": "b"}'),
    **both("null byte", '{"instruction": "a\0", "output": "b"}'),
    **both("reserved character", '{"instruction": "a\\ufdd0", "output": "b"}'),
    **both("long key", '{"' + "k" * 1_000_000 + '": 1}', many=True),
    **both("a hundred thousand keys", "{" + ",".join(f'"k{i}":1' for i in range(100_000)) + "}", many=True),
    **both(
        "long role",
        row(messages=[{"role": "x" * 1_000_000, "content": "a"}]).replace("instruction", "i"),
        many=True,
    ),
    **both("steers a terminal", json.dumps({"messages": [{"role": ESCAPES, "content": "a"}]}), many=True),
    **both("cut off", '{"instruction": "a'),
    **both("a class", '{"instruction": {"__class__": "os.system"}, "output": "b"}'),
    **both("fields of other types", '{"instruction": true, "input": {}, "output": []}', many=True),
    **both("a number", "1"),
    **both("a text", '"a"'),
    **both("nothing", "null"),
    "json: empty": file("rows.json", ""),
    "json: blanks": file("rows.json", lambda: " " * 10 * MB),
    "json: no rows": file("rows.json", "[]"),
    "json: two lists": file("rows.json", '{"a": [1], "b": [2]}'),
    "json: more follows": file("rows.json", f"[{row()}] [{row()}]"),
    "json: UTF-16": file("rows.json", f"[{row()}]".encode("utf-16")),
    "json: not UTF-8": file("rows.json", b'[{"instruction": "\xff\xfe", "output": "b"}]'),
    "json: overlong UTF-8": file("rows.json", b'[{"instruction": "\xc0\xaf", "output": "b"}]'),
    "json: zeros": sparse("rows.json", b"", 1 << 28),
    "json: a text without end": sparse("rows.json", b'[{"instruction": "', 200 * MB),
    "jsonl: a line without end": sparse("rows.jsonl", b'{"instruction": "', 200 * MB),
    "jsonl: a pickle": file("rows.jsonl", PICKLE),
    "csv: null bytes": file("rows.csv", b"instruction,output\na\0,b\n"),
    "csv: a quote without end": file("rows.csv", lambda: 'instruction,output\n"a' + "b\n" * 20 * MB),
    "csv: a line without end": sparse("rows.csv", b"instruction,output\n", 200 * MB),
    "csv: a hundred thousand columns": Case(
        file("rows.csv", ",".join(f"c{i}" for i in range(100_000)) + "\n1,2\n"), many=True
    ),
    "csv: repeated columns": file("rows.csv", "output,output\na,b\n"),
    "csv: other fields": file("rows.csv", "instruction,output\na\n"),
    "csv: not UTF-8": file("rows.csv", bytes(range(128, 256))),
    "tsv: quotes within": file("rows.tsv", 'instruction\toutput\na"\t"b"c\n'),
}
PACKED: dict[str, Case | Callable[[Place], Path]] = {
    "gz: bomb": file("rows.json.gz", lambda: bomb()),
    "gz: bomb of lines": file("rows.jsonl.gz", lambda: gzip.compress(b"{}\n" * 100 * MB, 9)),
    "gz: many bombs": file("rows.json.gz", lambda: bomb(20 * MB) * 40),
    "gz: in itself": file("rows.json.gz", gzip.compress(gzip.compress(row().encode()))),
    "gz: cut off": file("rows.json.gz", gzip.compress(f"[{row()}]".encode())[:-9]),
    "gz: spoilt": file("rows.json.gz", spoilt(gzip.compress(f"[{row()}]".encode()), 4, 9)),
    "gz: not packed": file("rows.jsonl.gz", row()),
    "gz: more follows": file("rows.jsonl.gz", gzip.compress(row().encode()) + b"more"),
    "parquet: empty": file("rows.parquet", b""),
    "parquet: its name only": file("rows.parquet", b"PAR1PAR1"),
    "parquet: a pickle": file("rows.parquet", PICKLE),
    "parquet: cut off": file("rows.parquet", PARQUET[:-20]),
    "parquet: no start": file("rows.parquet", PARQUET[50:]),
    "parquet: length of its end": file(
        "rows.parquet", PARQUET[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1"
    ),
    "parquet: negative length": file("rows.parquet", PARQUET[:-8] + struct.pack("<i", -1) + b"PAR1"),
    "parquet: huge list declared": file(
        "rows.parquet", b"PAR1\x15\x02\x19\xfc\xff\xff\xff\xff\x07" + struct.pack("<I", 9) + b"PAR1"
    ),
    "parquet: encrypted": file("rows.parquet", PARQUET[:-4] + b"PARE"),
    "parquet: numbers": Case(file("rows.parquet", parquet(table(instruction=True))), many=True),
    "parquet: bytes": Case(file("rows.parquet", parquet(table(instruction=b"\xff"))), many=True),
    "parquet: nested": Case(
        file("rows.parquet", parquet(table(instruction=[{"a": [{"b": "c"}]}]))), many=True
    ),
    "parquet: a long text a million times": file(
        "rows.parquet", lambda: parquet(table(100_000, output="b" * 3_000))
    ),
    "parquet: ten million rows": file(
        "rows.parquet",
        lambda: parquet(
            pa.table(
                {
                    "text": pa.DictionaryArray.from_arrays(
                        pa.array(np.zeros(10_000_000, np.int8)), pa.array(["a" * 200])
                    )
                }
            )
        ),
    ),
    "parquet: zeros packed": file(
        "rows.parquet",
        lambda: parquet(table(60, output="b" * 3 * MB), use_dictionary=False, compression="zstd"),
    ),
    "arrow: empty": file("rows.arrow", b""),
    "arrow: its name only": file("rows.arrow", b"ARROW1\0\0"),
    "arrow: a pickle": file("rows.arrow", PICKLE),
    "arrow: cut off": file("rows.arrow", ARROW[:-30]),
    "arrow: offsets outside": file("rows.arrow", outlying_offsets),
    "arrow: zeros packed": file("rows.arrow", lambda: arrow(table(60, output="b" * 3 * MB), "zstd")),
    "arrow: numbers": Case(file("rows.arrow", arrow(table(instruction=True))), many=True),
    "arrow: runs code": Case(file("rows.arrow", runs_code()), harmless=frozenset({"train", "plan"})),
    "feather: random": file("rows.feather", random.Random(0).randbytes(10_000)),
}
PLACES: dict[str, Case | Callable[[Place], Path]] = {
    "pipe": pipe,
    "socket": listening,
    "pipe in a folder": in_folder(pipe),
    "folder": lambda place: (place.folder / "rows.json").mkdir() or place.folder / "rows.json",
    "endless device": link("rows.json", "/dev/zero"),
    "random device": link("rows.parquet", "/dev/urandom"),
    "terminal": link("rows.csv", "/dev/tty"),
    "link to itself": link("rows.json", "rows.json"),
    "link to nothing": link("rows.json", "nothing"),
    "link to a device in a folder": in_folder(link("rows.json", "/dev/zero")),
    "a program": file("rows.py", "open('PWNED', 'w')"),
    "a pickle": file("rows.pkl", PICKLE),
    "no name": lambda place: place.folder / ("a" * 300 + ".json"),
}
FLIPS: dict[str, Case | Callable[[Place], Path]] = {
    f"{kind}: flipped {seed}": Case(
        file(f"rows.{kind}", spoilt(content, seed, 8)), True, frozenset({"train", "plan"})
    )
    for kind, content in (("parquet", PARQUET), ("arrow", ARROW))
    for seed in range(12)
}
CASES = cases({**TEXTS, **PACKED, **PLACES, **FLIPS})

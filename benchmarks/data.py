"""Time and peak memory from a file of rows to packs, without and with the token cache.

    python -m benchmarks.data MODEL_FOLDER ROWS.json [--rows 52000] [--template alpaca] [--short] [--json FILE]

Writes the requested number of rows. It repeats those of ROWS.json, puts the row's number in the instruction, and cuts
the answer to 20 to 75 %, so that a row has about as many tokens as a row of Stanford Alpaca. With --short a row has a
few words, for millions of rows. A new process then reads, renders and tokenises the rows, makes the ledger, and packs
one epoch. A second process repeats this from the cache. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with a tokenizer")
    parser.add_argument("source", type=Path, help="Alpaca rows as a JSON list")
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--template", default="alpaca", help="as data.template")
    parser.add_argument("--short", action="store_true", help="rows of a few words")
    parser.add_argument("--json", type=Path, help="also write the figures as JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the file; used in a new process
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.model, arguments.measure, arguments.template)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("rows.jsonl" if arguments.short else "rows.json")
        write_rows(arguments.source, file, arguments.rows, arguments.short)
        words = [sys.executable, "-m", "benchmarks.data", *sys.argv[1:], "--measure", str(file)]
        environment = {**os.environ, "LORAFIT_CACHE": f"{folder}/cache"}
        results = {
            name: json.loads(
                subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE).stdout
            )
            for name in ("cold", "cached")
        }
        size = file.stat().st_size
    record = {"command": " ".join(sys.argv), "rows": arguments.rows, "file_bytes": size, **results}
    print(f"{arguments.rows:,} rows, {size / 1e6:,.1f} MB, {results['cold']['tokens']:,} tokens\n")
    print(table(["", "cold", "cached"], [line(name, results) for name in FIGURES]))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


FIGURES = {
    "import, s": "import_seconds",
    "tokenizer, s": "tokenizer_seconds",
    "read, render, tokenise, s": "encode_seconds",
    "split and ledger, s": "ledger_seconds",
    "order and packs of an epoch, s": "pack_seconds",
    "total, s": "seconds",
    "rows/s, without packing": "rows_per_second",
    "tokens/s, without packing": "tokens_per_second",
    "peak memory before packs, MB": "peak_mb_before_packs",
    "peak memory, MB": "peak_mb",
}


def line(name: str, results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A row of the table, as cells."""
    values = [results[kind][FIGURES[name]] for kind in ("cold", "cached")]
    return [name, *(f"{value:.2f}" if name.endswith(" s") else f"{value:,.0f}" for value in values)]


def write_rows(source: Path, out: Path, count: int, short: bool) -> None:
    """Write `count` rows like those of `source`: JSON lines if `out` ends in .jsonl, else a JSON list."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    generator = random.Random(0)
    lines = out.suffix == ".jsonl"
    with out.open("w", encoding="utf-8") as file:
        for index in range(count):
            row = dict(rows[index % len(rows)])
            if short:
                row = {
                    "instruction": f"Say {index}.",
                    "output": " ".join(row["output"].split(" ")[:3]) or "-",
                }
            else:
                words = row["output"].split(" ")
                row["instruction"] += f" ({index})"
                row["output"] = " ".join(words[: max(1, int(len(words) * generator.uniform(0.2, 0.75)))])
            file.write(("" if lines else "[\n" if index == 0 else ",\n") + json.dumps(row) + "\n" * lines)
        file.write("" if lines else "\n]\n")


def measure(model: Path, file: Path, template: str) -> dict[str, Any]:
    """Seconds of each part in this process, and its peak memory."""
    marks = [time.perf_counter()]
    import numpy as np

    from lorafit.data.ledger import Ledger
    from lorafit.data.packing import Packer
    from lorafit.data.prompt import Renderer, contract
    from lorafit.data.row_order import RowOrder, split_holdout
    from lorafit.data.sources import find_files
    from lorafit.data.token_cache import encode_files
    from lorafit.data.tokenizer import Tokenizer

    marks.append(time.perf_counter())
    tokenizer = Tokenizer.from_folder(model)
    marks.append(time.perf_counter())
    rules: dict[str, Any] = {"train_on": "response", "max_length": 2048, "too_long": "error", "add_eos": True}
    renderer = Renderer(contract(tokenizer, template=template, **rules), tokenizer)
    entry = encode_files(find_files([str(file)]), "auto", renderer)
    marks.append(time.perf_counter())
    training, heldout = map(entry.encoded.take, split_holdout(len(entry.encoded), 100, 0))
    num_rows = entry.facts["files"][0]["num_rows"]
    ledger = Ledger.of(num_rows, training, heldout, entry.encoded.dropped)
    marks.append(time.perf_counter())
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = RowOrder([np.arange(len(training))], [1.0], 16, 0, True)
    for step in range(order.steps_per_epoch):
        Packer(2048).packs([training.row(index) for index in order.rows(step)])
    marks.append(time.perf_counter())
    names = ["import", "tokenizer", "encode", "ledger", "pack"]
    parts = dict(zip((f"{name}_seconds" for name in names), np.diff(marks).tolist(), strict=True))
    seconds = parts["encode_seconds"] + parts["ledger_seconds"]
    tokens = ledger.trained.total + ledger.held_out.total
    return {
        **parts,
        "seconds": sum(parts.values()),
        "tokens": tokens,
        "rows_per_second": num_rows / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mb_before_packs": peak_before / 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()

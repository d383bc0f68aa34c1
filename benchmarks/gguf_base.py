"""A GGUF file as the base in float32, bfloat16 and int8: what each costs, and how far its logits are from the file's.

    python -m benchmarks.gguf_base FILE ROWS.json [--rows 8]

Each type has a process of its own. `step` is a forward and a backward pass over the rows with an adapter. The logits
of float32 are those of the file's exact numbers. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lorafit.data.formats import Instruction
from lorafit.infer.model import load
from lorafit.model.attention import PackedDocuments
from lorafit.model.lora import LoraSpec, attach

TYPES = {"float32": ("float32", "none"), "bfloat16": ("bfloat16", "none"), "int8": ("bfloat16", "int8")}


def measure(file: str, rows: Path, count: int, name: str, out: Path) -> None:
    """Write the numbers of one type, and the logits of the answers, to `out`."""
    dtype, quantize = TYPES[name]
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    model = load(file, device="cpu", dtype=dtype, quantize=quantize, offline=True)
    loaded = time.perf_counter() - started
    memory = psutil.Process().memory_info().rss - before
    network, tokenizer = model.network, model.renderer.tokenizer
    texts = []
    for row in json.loads(rows.read_text(encoding="utf-8"))[:count]:
        prompt = model.renderer.prompt_ids(Instruction(row["instruction"], row.get("input", ""), ""))
        texts.append((prompt, tokenizer.encode(row["output"])))
    found, losses = [], []
    with torch.no_grad():
        for prompt, answer in texts:
            ids = torch.tensor([*prompt, *answer])
            hidden = network.normed(network.hidden(ids[:-1], PackedDocuments([len(ids) - 1])))
            logits = F.linear(hidden[len(prompt) - 1 :], network.lm_head.weight).float()
            found.append(logits.log_softmax(-1).half())
            losses.append(F.cross_entropy(logits, ids[len(prompt) :], reduction="none"))
    attach(network, LoraSpec(8, 16.0, 0.0, ("all-linear",), False), 0)
    started = time.perf_counter()
    for prompt, answer in texts:
        ids = torch.tensor([*prompt, *answer])
        network.normed(network.hidden(ids, PackedDocuments([len(ids)]))).float().sum().backward()
    step = time.perf_counter() - started
    loss = float(torch.cat(losses).mean())
    numbers = torch.tensor([loaded, memory, loss, step], dtype=torch.float64)
    save_file({"logits": torch.cat(found), "numbers": numbers}, out)


def main() -> int:
    """Measure each type and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--type", choices=TYPES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.type:
        measure(args.file, args.data, args.rows, args.type, args.out)
        return 0
    print("| type | load | memory | loss | same tokens | largest difference | step |\n|" + " --- |" * 7)
    with tempfile.TemporaryDirectory() as room:
        for name in TYPES:
            words = [args.file, str(args.data), "--rows", str(args.rows), "--type", name]
            command = [sys.executable, "-m", "benchmarks.gguf_base", *words, "--out", f"{room}/{name}"]
            subprocess.run(command, check=True)
            exact, here = (load_file(f"{room}/{each}") for each in ("float32", name))
            loaded, memory, loss, step = here["numbers"].tolist()
            same = (exact["logits"].argmax(-1) == here["logits"].argmax(-1)).double().mean()
            far = (exact["logits"].float() - here["logits"].float()).clamp(-20, 20).abs().max()
            print(
                f"| {name} | {loaded:.1f} s | {memory / 2**20:.0f} MB | {loss:.4f} | {same:.1%} | {far:.3f} "
                f"| {step:.1f} s |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

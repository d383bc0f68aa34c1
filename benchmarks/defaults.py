"""What each default is worth: the demo with one default at a time put back to the classic script's choice.

    python benchmarks/defaults.py [--out docs/defaults.json]

Trains demo/recipe.yaml once as it is and once a variant, then asks each adapter the questions of
demo/questions.json, whose facts occur in no training row. Prints a Markdown table: right answers (exact), answers
that ended by themselves, and the wall time of the training. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lorafit
from lorafit.config.load import load_config
from lorafit.data.formats import Instruction

DEMO = Path(__file__).parents[1] / "demo"
VARIANTS: dict[str, list[str]] = {
    "as it is": [],
    "q and v only, r=8 (classic)": ["lora.targets=[q_proj, v_proj]", "lora.rank=8", "lora.alpha=16"],
    "loss on the whole text (classic)": ["data.train_on=all"],
    "classic text without a stop token": ["data.template=classic", "data.train_on=all", "data.eos=false"],
    "the same text with the stop token": ["data.template=classic", "data.train_on=all"],
    "linear decay, no warm-up (classic)": ["train.schedule=linear", "train.warmup=0"],
    "4 rows per step (classic), as many rows": ["train.batch_size=4", "train.max_steps=1200"],
    "each row a pass of its own": ["data.packing=false"],
    "bfloat16": ["model.dtype=bfloat16"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    asked = json.loads((DEMO / "questions.json").read_text())
    rows = []
    print("| variant | right of 40 | ended by themselves | seconds |\n| --- | ---: | ---: | ---: |")
    for name, overrides in VARIANTS.items():
        row = {"variant": name, "overrides": overrides, **measure(overrides, asked)}
        rows.append(row)
        print(f"| {name} | {row['right']} | {row['stopped']} | {row['seconds']:.0f} |", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def measure(overrides: list[str], asked: list[dict[str, str]]) -> dict[str, Any]:
    """Train the demo with `overrides` and ask the held-out questions."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            f"model.name={DEMO / 'model'}",
            f"data.path={DEMO / 'rows.json'}",
            f"run.output={folder}/run",
        ]
        config = load_config(DEMO / "recipe.yaml", [*paths, "run.samples=0", *overrides])
        started = time.perf_counter()
        run = lorafit.train(config)
        seconds = time.perf_counter() - started
        questions = [Instruction(row["instruction"], row["input"], "") for row in asked]
        answers = lorafit.generate(lorafit.load(run.path), questions, max_tokens=64)
    right = sum(answer.text == row["answer"] for answer, row in zip(answers, asked, strict=True))
    return {"right": right, "stopped": sum(answer.stopped for answer in answers), "seconds": seconds}


if __name__ == "__main__":
    main()

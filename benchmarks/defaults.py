"""The effect of each default: train the demo with one default at a time changed to the classic script's value.

    python benchmarks/defaults.py [--out docs/defaults.json]

Trains demo/recipe.yaml unchanged and once per variant. Each adapter then answers the questions of
demo/questions.json, whose facts are in no training row. Prints a Markdown table: correct answers (exact match),
answers that ended with a stop token, and the wall time of the training. This takes some minutes on two cores.
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
    "unchanged": [],
    "q and v only, r=8 (classic)": ["lora.targets=[q_proj, v_proj]", "lora.rank=8", "lora.alpha=16"],
    "loss on the whole text (classic)": ["data.train_on=all"],
    "classic text without a stop token": ["data.template=classic", "data.train_on=all", "data.eos=false"],
    "the same text with the stop token": ["data.template=classic", "data.train_on=all"],
    "linear decay, no warm-up (classic)": ["train.schedule=linear", "train.warmup=0"],
    "4 rows per step (classic), the same number of rows": ["train.batch_size=4", "train.max_steps=1200"],
    "one pass per row": ["data.packing=false"],
    "bfloat16": ["model.dtype=bfloat16"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    questions = json.loads((DEMO / "questions.json").read_text())
    rows = []
    print("| variant | correct of 40 | ended with a stop token | seconds |\n| --- | ---: | ---: | ---: |")
    for name, overrides in VARIANTS.items():
        row = {"variant": name, "overrides": overrides, **measure(overrides, questions)}
        rows.append(row)
        print(f"| {name} | {row['right']} | {row['stopped']} | {row['seconds']:.0f} |", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def measure(overrides: list[str], held_out: list[dict[str, str]]) -> dict[str, Any]:
    """Train the demo with `overrides` and generate answers to the held-out questions."""
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
        questions = [Instruction(row["instruction"], row["input"], "") for row in held_out]
        answers = lorafit.generate(lorafit.load(run.path), questions, max_tokens=64)
    num_correct = sum(answer.text == row["answer"] for answer, row in zip(answers, held_out, strict=True))
    return {"right": num_correct, "stopped": sum(answer.stopped for answer in answers), "seconds": seconds}


if __name__ == "__main__":
    main()

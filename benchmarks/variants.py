"""What each variant of LoRA is worth beside plain LoRA: the same rows, order and steps, and the loss on held-out rows.

    python -m benchmarks.variants MODEL ROWS.json [--steps 16] [--num-rows 180] [--heldout 20] [--longest 96]
                                  [--json FILE]

Takes the first rows of about --longest tokens at most. Each variant is one run of the same length, batch of 4, rate
and seed; a start that moves more per step runs with a fifth of the rate too. Prints a Markdown table: the held-out loss
before and after, the loss against plain LoRA, and the processor seconds of the whole run. A variant whose result is in
--json is not run again. One seed: a difference of a few thousandths says nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import table

from lorafit.config.load import load_config
from lorafit.training.run import start_run

VARIANTS: dict[str, list[str]] = {
    "plain LoRA": [],
    "`lora.b_rate=4`": ["lora.b_rate=4"],
    "`lora.dora=true`": ["lora.dora=true"],
    "`lora.init=pissa`": ["lora.init=pissa"],
    "`lora.init=pissa`, a fifth of the rate": ["lora.init=pissa", "train.learning_rate=2e-4"],
    "`lora.init=eva`": ["lora.init=eva"],
    "`lora.init=olora`": ["lora.init=olora"],
    "`lora.init=olora`, a fifth of the rate": ["lora.init=olora", "train.learning_rate=2e-4"],
    "`train.neftune=5`": ["train.neftune=5"],
    "rank 32 for `down_proj`, 8 for the others": [
        "lora.rank=8",
        "lora.alpha=16",
        "lora.ranks={down_proj: 32}",
        "lora.alphas={down_proj: 64}",
    ],
}


def measure(settings: list[str], output: Path) -> dict[str, Any]:
    """Train with these settings; the losses before and after, and the processor's seconds of the whole run."""
    began = time.process_time()
    result = start_run(load_config(None, [*settings, f"run.output={output}"]), quiet=True)
    seconds = time.process_time() - began
    return {"base": result.base_loss, "loss": result.heldout_loss, "processor": seconds}


def main() -> None:
    """Run every variant, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--num-rows", type=int, default=180)
    parser.add_argument("--heldout", type=int, default=20)
    parser.add_argument("--longest", type=int, default=96)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    if given.json and given.json.exists():
        results = json.loads(given.json.read_text())
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for row in json.loads(given.rows.read_text(encoding="utf-8"))
            if len(str(row)) < 3.5 * given.longest
        ]
        chosen = rows[: given.num_rows + given.heldout]
        (Path(folder) / "rows.json").write_text(json.dumps(chosen))
        for number, (name, words) in enumerate(VARIANTS.items()):
            if name in results:
                continue
            settings = [
                f"model.name={given.model}",
                f"data.path={folder}/rows.json",
                f"data.holdout={given.heldout}",
                f"train.max_steps={given.steps}",
                "train.batch_size=4",
                "train.learning_rate=1e-3",
                f"train.eval_every={given.steps}",
                "train.save_every=10000",
                "train.refit=false",
                "train.patience=0",
                "run.samples=0",
                "run.verify=false",
                "run.check=none",
                *words,
            ]
            results[name] = measure(settings, Path(folder) / str(number))
            if given.json:
                given.json.write_text(json.dumps(results, indent=1))
    plain = results["plain LoRA"]
    print(
        table(
            ["variant", "held-out loss", "against plain LoRA", "processor seconds"],
            [
                [
                    name,
                    f"{found['base']:.3f} -> {found['loss']:.4f}",
                    f"{found['loss'] - plain['loss']:+.4f}",
                    f"{found['processor']:.0f} ({found['processor'] / plain['processor']:.2f} times)",
                ]
                for name, found in results.items()
            ],
        )
    )


if __name__ == "__main__":
    main()

"""DPO beside TRL's DPOTrainer on the same pairs in one run: pairs per second, and peak memory.

    python -m benchmarks.preferences --model FOLDER [--rows alpaca.json] [--pairs 64] [--batch 8] [--threads 2]

Each side trains the same adapter (rank 8, all linear layers, float32) for one pass over the pairs in a process of its
own, on as many threads. The prompt of a pair is an instruction, the chosen answer its own, the rejected one that of
another row. The time is that of training with the log-probabilities of the reference, without loading.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LONGEST = 512


def pairs_of(rows: Path, count: int) -> list[dict[str, str]]:
    """Pairs of the first rows of an instruction data set."""
    found = json.loads(rows.read_text(encoding="utf-8"))
    found = [row for row in found if row["output"].strip() and len(row["instruction"] + row["output"]) < 1500]
    chosen = found[:count]
    return [
        {
            "prompt": f"{row['instruction']}\n{row.get('input') or ''}".strip() + "\n\nAnswer:",
            "chosen": " " + row["output"].strip(),
            "rejected": " " + other["output"].strip(),
        }
        for row, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True)
    ]


def ours(model: str, pairs: Path, batch: int, folder: Path) -> float:
    """Seconds of a run of lorafit: the pass over the starting point, and the steps."""
    from lorafit.config.load import load_config
    from lorafit.training import run as running

    spent = []
    real = running.with_reference

    def timed(job: Any) -> Any:
        started = time.perf_counter()
        found = real(job)
        spent.append(time.perf_counter() - started)
        return found

    running.with_reference = timed
    result = running.start_run(
        load_config(
            None,
            [
                *(f"model.name={model}", f"data.path={pairs}", "train.method=dpo", "model.dtype=float32"),
                *(
                    "model.device=cpu",
                    "lora.rank=8",
                    "lora.alpha=16",
                    f"train.batch_size={batch}",
                    "train.epochs=1",
                ),
                *("train.learning_rate=1e-5", f"data.max_length={LONGEST}", "data.too_long=truncate"),
                *(
                    "data.holdout=0",
                    "run.check=none",
                    "run.verify=false",
                    "run.samples=0",
                    "train.max_grad_norm=1",
                ),
                f"run.output={folder / 'run'}",
            ],
        ),
        quiet=True,
    )
    events = map(json.loads, (result.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return sum(spent) + sum(event["seconds"] for event in events if event["event"] == "step")


def theirs(model: str, pairs: Path, batch: int, folder: Path) -> float:
    """Seconds of TRL's training."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], num_train_epochs=1,
            per_device_train_batch_size=batch, learning_rate=1e-5, max_length=LONGEST, gradient_checkpointing=False,
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(json.loads(pairs.read_text(encoding="utf-8"))),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, default=ROOT / "shared/data/alpaca_en_demo.json")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["lorafit", "trl"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.json").write_text(json.dumps(pairs_of(given.rows, given.pairs)), encoding="utf-8")
        if given.side:
            os.environ["LORAFIT_CACHE"] = str(folder / "cache")
            seconds = (ours if given.side == "lorafit" else theirs)(
                given.model, folder / "pairs.json", given.batch, folder
            )
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({"side": given.side, "seconds": seconds, "peak_bytes": peak}))
            return
    found = {}
    for side in ("lorafit", "trl"):
        env = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "PYTHONWARNINGS": "ignore"}
        words = [sys.executable, "-m", "benchmarks.preferences", *sys.argv[1:], "--side", side]
        done = subprocess.run(words, capture_output=True, text=True, env=env, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    print("| | pairs per second | peak memory |\n| --- | ---: | ---: |")
    for side, one in found.items():
        print(f"| {side} | {given.pairs / one['seconds']:.2f} | {one['peak_bytes'] / 1e9:.2f} GB |")
    faster = found["trl"]["seconds"] / found["lorafit"]["seconds"]
    print(f"\n{faster:.1f} times the pairs per second, "
          f"{found['lorafit']['peak_bytes'] / found['trl']['peak_bytes']:.0%} of the memory")  # fmt: skip


if __name__ == "__main__":
    main()

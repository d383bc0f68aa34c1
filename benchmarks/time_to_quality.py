"""Wall time from the start of a process to a held-out loss: lorafit beside TRL on the same rows.

    python -m benchmarks.time_to_quality --model DIR --work DIR [--only NAME ...] [--sets NAME ...] [--seeds 0 1 2]
    python -m benchmarks.time_to_quality --quick --work DIR

Each program saves its adapter every few steps. Afterwards one judge (transformers and peft, float32) computes the loss
of each saved adapter on the same held-out answers, so no program measures itself, and measuring takes none of its time.
The mark of a set is the loss that TRL's packed bfloat16 has after one epoch, at its defaults and at the best of its
grid. The result of each run is a file in DIR/results: an interrupted benchmark goes on with the same command. `--quick`
tries the programs: the small model of shared/models, few rows, few steps of lorafit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# For a start as a file: makes `benchmarks.x` importable, and keeps profile.py from hiding the standard module.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import table
from benchmarks.speed import shared_folder

ADAPTER, SAVED_EVERY = "adapter_model.safetensors", 5
HELD_OUT, MOST_HELD_OUT = 0.1, 64  # of the rows; rows
DEFAULTS, BEST = "TRL", "TRL, best"
GOALS = {
    ("lorafit", DEFAULTS): 5,
    ("lorafit int8", DEFAULTS): 8,
    ("lorafit", BEST): 3,
    ("lorafit int8", BEST): 5,
}


@dataclass(frozen=True, slots=True)
class Program:
    """A program at one setting: overrides of `lorafit train`, or arguments of TRL's trainer and its adapter."""

    name: str
    ours: bool
    settings: Mapping[str, Any]


PROGRAMS = [
    Program("lorafit", True, {}),
    Program("lorafit int8", True, {"model.quantize": "int8"}),
    Program(DEFAULTS, False, {}),
    *(
        Program(f"TRL rate {rate:g} {targets}", False, {"learning_rate": rate, "targets": targets})
        for rate in (2e-4, 1e-3)
        for targets in ("q and v", "all")
    ),
]


@dataclass(frozen=True, slots=True)
class Run:
    """The losses of one process: (seconds since its start, loss) of each saved adapter, and at the end of an epoch."""

    program: str
    rows: str
    seed: int
    losses: Sequence[tuple[float, float]]


def rows_of(shared: Path, name: str) -> list[dict[str, str]]:
    """Prompts and completions in the classic text: the demo rows, or the 175 tasks, an instance of each."""
    if name == "demo":
        found = json.loads((shared / "data/alpaca_en_demo.json").read_text(encoding="utf-8"))
    else:
        lines = (shared / "data/self_instruct_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
        found = [{**task, **task["instances"][0]} for task in map(json.loads, lines)]
    rows = []
    for row in found:
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        prompt = f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
        if row["output"].strip():
            rows.append({"prompt": prompt, "completion": row["output"]})
    return rows


def split(
    rows: Sequence[dict[str, str]], most: int | None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, held-out rows): at most `most` in all, and the same for every program and seed."""
    shuffled = random.Random(0).sample(list(rows), len(rows))[:most]
    number = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(shuffled))))
    return shuffled[number:], shuffled[:number]


def seconds_to(mark: float, losses: Sequence[tuple[float, float]]) -> float:
    """When a run first had a loss of `mark` or less; infinite if it never did."""
    return next((seconds for seconds, loss in sorted(losses) if loss <= mark), math.inf)


def marks(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """(loss, seconds) at the end of an epoch: medians of TRL at its defaults, and at its setting of lowest loss."""
    ends: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if run.program.startswith(DEFAULTS):
            ends.setdefault(run.program, []).append(max(run.losses))
    medians = {
        name: (statistics.median(loss for _, loss in end), statistics.median(seconds for seconds, _ in end))
        for name, end in ends.items()
    }
    found = {DEFAULTS: medians[DEFAULTS]} if DEFAULTS in medians else {}
    return {**found, BEST: min(medians.values())} if len(medians) > 1 else found


def report(runs: Sequence[Run]) -> str:
    """Of each set and mark: the median seconds of each program to it, and how many times faster than TRL that is."""
    lines = []
    for rows in dict.fromkeys(run.rows for run in runs):
        of_set = [run for run in runs if run.rows == rows]
        for name, (mark, theirs) in marks(of_set).items():
            for program in dict.fromkeys(run.program for run in of_set):
                times = [seconds_to(mark, run.losses) for run in of_set if run.program == program]
                seconds, goal = statistics.median(times), GOALS.get((program, name))
                reached = math.isfinite(seconds)
                lines.append(
                    [
                        rows,
                        f"{name}: {mark:.3f} in {theirs:.0f} s",
                        program,
                        f"{seconds:.0f}" if reached else "not reached",
                        f"{theirs / seconds:.1f}x" if reached else "-",
                        "-" if goal is None else f"{goal}x",
                    ]
                )
    return table(["rows", "mark", "program", "seconds", "faster", "goal"], lines)


def longest(model: Path) -> int:
    """Tokens of a row and of a pack: longer rows are truncated."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return min(1024, int(config["max_position_embeddings"]))


def command(program: Program, model: Path, rows: Path, out: Path, seed: int, quick: bool) -> list[str]:
    """The command of a run that saves adapters below `out`."""
    if not program.ours:
        words = ["--worker", json.dumps(dict(program.settings)), str(seed), str(rows), str(out)]
        return [sys.executable, "-m", "benchmarks.time_to_quality", "--model", str(model), *words]
    fixed = {"run.samples": 0, "run.offline": "true", "train.seed": seed, "train.save_every": SAVED_EVERY,
             "train.keep": 100_000, "data.format": "completion", "data.max_length": longest(model),
             "data.too_long": "truncate"}  # fmt: skip
    short = {"train.max_steps": 3 * SAVED_EVERY} if quick else {}
    settings = [f"{key}={value}" for key, value in {**fixed, **program.settings, **short}.items()]
    paths = ["--model", str(model), "--data", str(rows), "--output", str(out)]
    return [sys.executable, "-m", "lorafit", "train", *paths, *settings]


def run_once(program: Program, model: Path, rows: str, seed: int, work: Path, quick: bool) -> Run:
    """Train, then judge each saved adapter."""
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.time()
    words = command(program, model, work / f"{rows}-train.json", out, seed, quick)
    with (work / "output.txt").open("wb") as output:
        done = subprocess.run(words, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise SystemExit(f"error: {program.name} failed, see {work / 'output.txt'}")
    saved = sorted(out.rglob(ADAPTER), key=lambda file: file.stat().st_mtime)
    saved = [file for file in saved if "step" in file.parent.name or "checkpoint" in file.parent.name]
    folders = [str(file.parent) for file in saved]
    judged = subprocess.run(
        [sys.executable, "-m", "benchmarks.time_to_quality", "--model", str(model),
         "--judge", str(work / f"{rows}-heldout.json"), *folders],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if judged.returncode:
        raise SystemExit(f"error: the adapters cannot be judged: {judged.stderr[-2000:]}")
    losses = json.loads(judged.stdout.splitlines()[-1])
    times = [file.stat().st_mtime - started for file in saved]
    return Run(program.name, rows, seed, list(zip(times, losses, strict=True)))


def train_trl(model: str, settings: Mapping[str, Any], seed: int, rows: Path, out: Path) -> None:
    """One epoch of TRL's trainer: packed, bfloat16, loss on the answers; the rest is its default."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = dict(settings)
    names: dict[str, Any] = {"all": "all-linear", "q and v": ["q_proj", "v_proj"]}
    spec = names.get(settings.pop("targets", ""))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(json.loads(rows.read_text(encoding="utf-8"))),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **({"target_modules": spec} if spec else {})),
        args=SFTConfig(
            output_dir=str(out), num_train_epochs=1, per_device_train_batch_size=1, packing=True, padding_free=True,
            max_length=longest(Path(model)), use_cpu=True, bf16=True, seed=seed, save_strategy="steps",
            save_steps=SAVED_EVERY, save_only_model=True, report_to="none", disable_tqdm=True,
            gradient_checkpointing=False, **settings,
        ),
    ).train()  # fmt: skip


def judge(model: str, rows: Path, folders: Sequence[str]) -> list[float]:
    """The mean loss per token of the completions of each adapter, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = []
    for row in json.loads(rows.read_text(encoding="utf-8")):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id][: longest(Path(model))]])
        examples.append((ids, len(prompt)))
    found = []
    for folder in folders:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        network = PeftModel.from_pretrained(base, folder).eval()
        total, tokens = 0.0, 0
        for ids, start in examples:
            with torch.inference_mode():
                logits = network(input_ids=ids).logits[0, start - 1 : -1]
            targets = ids[0, start:]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            tokens += len(targets)
        found.append(total / tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="+", choices=[program.name for program in PROGRAMS], metavar="NAME")
    parser.add_argument("--sets", nargs="+", choices=["demo", "tasks"], default=["demo", "tasks"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--judge", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        settings, seed, rows, out = given.worker
        train_trl(str(given.model), json.loads(settings), int(seed), Path(rows), Path(out))
        return
    if given.judge:
        print(json.dumps(judge(str(given.model), Path(given.judge[0]), given.judge[1:])))
        return
    if given.work is None or not (given.model or given.quick):
        parser.error("--work and --model are needed")
    shared, work = shared_folder(), given.work.resolve()
    model = shared / "models/tinystories-656k" if given.quick else given.model.resolve()
    sets, seeds, most = (["tasks"], [0], 80) if given.quick else (given.sets, given.seeds, None)
    names = given.only or ([program.name for program in PROGRAMS[:3]] if given.quick else None)
    (work / "results").mkdir(parents=True, exist_ok=True)
    runs = []
    for rows in sets:
        for part, content in zip(("train", "heldout"), split(rows_of(shared, rows), most), strict=True):
            (work / f"{rows}-{part}.json").write_text(json.dumps(content), encoding="utf-8")
        for seed in seeds:
            for program in [program for program in PROGRAMS if names is None or program.name in names]:
                file = work / "results" / f"{rows}-{program.name}-{seed}.json".replace(" ", "_")
                if not file.exists():
                    done = run_once(program, model, rows, seed, work, given.quick)
                    file.write_text(json.dumps(asdict(done)), encoding="utf-8")
                runs.append(Run(**json.loads(file.read_text(encoding="utf-8"))))
                print(f"{rows}, {program.name}, seed {seed}: {runs[-1].losses}", file=sys.stderr, flush=True)
    print(report(runs))


if __name__ == "__main__":
    main()

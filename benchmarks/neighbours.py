"""Tokens per second beside other programs on the same machine: lorafit, and transformers with peft.

    python -m benchmarks.neighbours --model DIR [--rows FILE] [--only NAME ...] [--seconds 20] [--json FILE]

A busy program is a loop in one thread that this one starts, binds to one core (`--free`: binds to none), and ends by
its process. A measured program runs all the time: alone, beside one busy program, beside two, and back in reverse
order. The fair share of a core that two programs want is half of it. `--slow N` binds the N busiest threads of the
program, but for its first, to one core for the second half of the parts: cores that are not equally fast.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

# For a start as a file: makes `benchmarks.x` importable, and keeps profile.py from hiding the standard module.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.programs import Step, parse_steps
from benchmarks.report import table

ROOT = Path(__file__).resolve().parents[1]
LOADS = (0, 1, 2, 2, 1, 0)  # busy programs in each part
WARM_UP, LEAST = 2, 2  # steps of a program, and of each part
ROWS_PER_STEP, ANSWER_TOKENS, PROMPTS = 4, 32, 4
SLOW = ", slow threads"
LONGEST_SECONDS = 400.0  # of a part, and of a start
PROGRAMS = ("train", "peft", "answer", "transformers")  # ours and theirs
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Part:
    """What a program did in one part. CPU seconds are its own and those of its neighbours."""

    program: str
    busy: int
    tokens: int
    seconds: float
    cpu_seconds: float
    neighbour_cpu_seconds: float
    wall_seconds: float


def fair_share(busy: int, cores: int) -> float:
    """The part of the machine for a program with a thread per core, beside `busy` programs of one thread."""
    return 1 - min(busy, cores) / (2 * cores) if busy <= cores else cores / (cores + busy)


def command(program: str, model: Path, rows: Path, folder: Path, settings: Sequence[str]) -> list[str]:
    """The command of a measured program; it runs until it is ended."""
    if program != "train":
        words = [
            "-m",
            "benchmarks.neighbours",
            "--worker",
            program,
            "--model",
            str(model),
            "--rows",
            str(rows),
        ]
        return [sys.executable, *words]
    fixed = (
        "data.holdout=0",
        "run.samples=0",
        "run.check=none",
        "run.offline=true",
        "train.max_steps=100000",
    )
    paths = ("--model", str(model), "--data", str(rows), "--output", str(folder / "run"))
    return [sys.executable, "-m", "lorafit", "train", "classic", *paths, *fixed,
            f"train.batch_size={ROWS_PER_STEP}", *settings]  # fmt: skip


@contextmanager
def busy_programs(number: int, cores: Sequence[int]) -> Iterator[list[int]]:
    """The process ids of `number` loops, each bound to the next of `cores`, if there are any."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        for index, loop in enumerate(loops if cores else ()):
            os.sched_setaffinity(loop.pid, {cores[index % len(cores)]})
        yield [loop.pid for loop in loops]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def cpu_seconds(pid: int, task: int | None = None) -> float:
    """The CPU time of a process with all its threads, or of its thread `task`."""
    stat = Path(f"/proc/{pid}/stat" if task is None else f"/proc/{pid}/task/{task}/stat")
    fields = stat.read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def bind_threads(pid: int, number: int, core: int) -> None:
    """Bind the `number` threads of a process that have computed most, but for its first, to one core."""
    others = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir() if int(task.name) != pid]
    for task in sorted(others, key=lambda task: cpu_seconds(pid, task), reverse=True)[:number]:
        os.sched_setaffinity(task, {core})


def measure(
    program: str, words: Sequence[str], record: Path, stdout: Path, settings: argparse.Namespace
) -> list[Part]:
    """The parts of one program, which is ended then."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    found = []
    with tempfile.TemporaryFile() as errors, stdout.open("wb") as out:
        process = subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=errors, env=environment)
        try:
            steps = _Steps(process, record)
            steps.until(WARM_UP)
            for number, busy in enumerate(settings.loads):
                if settings.slow and number == len(settings.loads) // 2:
                    bind_threads(process.pid, settings.slow, cores[0])
                    program += SLOW
                with busy_programs(busy, () if settings.free else cores) as loops:
                    first, started = len(steps.seen), time.monotonic()
                    before, theirs = cpu_seconds(process.pid), sum(map(cpu_seconds, loops))
                    steps.until(first + 1 + LEAST, settings.seconds)
                    wall = time.monotonic() - started
                    after, theirs = cpu_seconds(process.pid), sum(map(cpu_seconds, loops)) - theirs
                inside = steps.seen[first + 1 :]  # the first began before the part
                tokens, seconds = sum(s.tokens or 0 for s in inside), sum(s.seconds for s in inside)
                found.append(Part(program, busy, tokens, seconds, after - before, theirs, wall))
                print(f"{program}, {busy} busy: {tokens / seconds:.1f} tokens/s", file=sys.stderr, flush=True)
        except ChildProcessError:
            errors.seek(0)
            raise SystemExit(
                f"error: {program} ended: {errors.read()[-2000:].decode(errors='replace')}"
            ) from None
        finally:
            process.kill()
            process.wait()
    return found


class _Steps:
    """The steps that a running program reports in a file."""

    def __init__(self, process: subprocess.Popen[bytes], record: Path) -> None:
        self._process, self._record = process, record
        self.seen: list[Step] = []

    def until(self, number: int, seconds: float = 0.0) -> None:
        """Read until `number` steps, `seconds` at least. Raises ChildProcessError where that does not come."""
        started = time.monotonic()
        while (passed := time.monotonic() - started) < seconds or len(self.seen) < number:
            if self._process.poll() is not None or passed > LONGEST_SECONDS:
                raise ChildProcessError
            time.sleep(0.02)
            if self._record.exists():
                self.seen = parse_steps(self._record.read_text(encoding="utf-8"), None)


def report(parts: Sequence[Part], cores: int) -> str:
    """Rates of each program by the number of busy programs, and their part of the fair share."""
    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0] * 5)
    for part in parts:
        numbers = (part.tokens, part.seconds, part.cpu_seconds, part.neighbour_cpu_seconds, part.wall_seconds)
        key = part.program, part.busy
        sums[key] = [a + b for a, b in zip(sums[key], numbers, strict=True)]
    rows = []
    for (program, busy), (tokens, seconds, cpu, theirs, wall) in sums.items():
        tokens_alone, seconds_alone, *_ = sums[program.removesuffix(SLOW), 0]
        share = tokens / seconds / (tokens_alone / seconds_alone)
        fair = share / fair_share(busy, cores)
        figures = (
            f"{tokens / seconds:.1f}",
            f"{share:.2f}",
            f"{fair:.2f}",
            f"{cpu / wall:.2f}",
            f"{theirs / wall:.2f}",
        )
        rows.append([program, str(busy), *figures])
    head = ["program", "busy programs", "tokens/s", "of alone", "of the fair share", "cores used", "theirs"]
    return table(head, rows)


def _print_step(number: int, started: float, tokens: int) -> None:
    print(
        json.dumps({"step": number, "seconds": time.perf_counter() - started, "tokens": tokens}), flush=True
    )


def _texts(rows: Path) -> list[tuple[str, str]]:
    """Questions and answers in the classic text."""
    found = []
    for row in json.loads(rows.read_text(encoding="utf-8")):
        given = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
        found.append((f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n", row["output"]))
    return found


def peft(model: str, rows: Path) -> None:
    """transformers and peft, as the classic script, but rows of a step are padded to the longest of them only."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    spec = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.05)
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), spec).train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-4)
    texts = _texts(rows)
    for number in count():
        started = time.perf_counter()
        chosen = ["".join(texts[(number * ROWS_PER_STEP + i) % len(texts)]) for i in range(ROWS_PER_STEP)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=512)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        network(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _print_step(number, started, int(batch["attention_mask"].sum()))


def answer(model: str, rows: Path) -> None:
    """Greedy answers of lorafit."""
    import lorafit

    loaded = lorafit.load(model)
    questions = [text for text, _ in _texts(rows)]
    for number in count():
        chosen = [questions[(number * PROMPTS + i) % len(questions)] for i in range(PROMPTS)]
        started = time.perf_counter()
        answers = loaded.generate(chosen, max_tokens=ANSWER_TOKENS)
        _print_step(number, started, sum(one.num_tokens for one in answers))


def transformers(model: str, rows: Path) -> None:
    """Greedy answers of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    questions = [text for text, _ in _texts(rows)]
    for number in count():
        chosen = [questions[(number * PROMPTS + i) % len(questions)] for i in range(PROMPTS)]
        started = time.perf_counter()
        batch = tokenizer(chosen, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = network.generate(
                **batch, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS, do_sample=False
            )
        _print_step(number, started, PROMPTS * (out.shape[1] - batch["input_ids"].shape[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=ROOT.parent / "shared/data/alpaca_en_demo.json")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--loads", nargs="+", type=int, default=LOADS, help="busy programs of each part")
    parser.add_argument("--free", action="store_true", help="do not bind the busy programs")
    parser.add_argument(
        "--slow", type=int, default=0, metavar="N", help="threads on one core in the second half"
    )
    parser.add_argument("--set", nargs="*", default=[], help="settings of `lorafit train`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=PROGRAMS[1:], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        workers: Mapping[str, Any] = {"peft": peft, "answer": answer, "transformers": transformers}
        workers[given.worker](str(given.model), given.rows)
        return
    parts = []
    for program in given.only:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            record = folder / ("run/metrics.jsonl" if program == "train" else "stdout")
            words = command(program, given.model.resolve(), given.rows.resolve(), folder, given.set)
            parts += measure(program, words, record, folder / "stdout", given)
    if given.json:
        given.json.write_text(json.dumps([asdict(part) for part in parts], indent=1) + "\n", encoding="utf-8")
    print(report(parts, len(os.sched_getaffinity(0))))


if __name__ == "__main__":
    main()

"""Compares generation with transformers' `generate`: the same model, prompts and number of tokens, in one process.

    python -m benchmarks.generation [--layers 22 | --model DIR] [--work DIR] [--tokens 64] [--json FILE]

Both use greedy decoding in bfloat16 with a key-value cache, on the CPU. transformers pads several prompts on the left
and masks the padding, which is usual, and uses PEFT's adapter. Prompts are random ids, because the weights are random
too. Prefill is the time to the first token (a call that generates one token), decode is the time of the other tokens,
and together is the whole call. The figures are medians over the turns. It needs the same files as speed.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# For a start as a file: makes `benchmarks.x` importable, and keeps profile.py from hiding the standard module.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.programs import THREADS
from benchmarks.report import table
from benchmarks.speed import _without_paths, machine, random_model, shared_folder, versions

if TYPE_CHECKING:
    from lorafit.model.llama import Llama

THEIRS, SIXTEEN, EIGHT = "transformers", "lorafit bfloat16", "lorafit int8"
ONE, MANY = "1 prompt", "16 prompts"
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Timing:
    """One turn of one program: seconds to the first token, and of a call that generates `tokens` per prompt."""

    case: str
    adapter: bool
    program: str
    prompt_tokens: int
    prompts: int
    tokens: int
    first_seconds: float
    whole_seconds: float

    def rate(self, part: str) -> float:
        """Tokens per second: prompt tokens for `prefill`, else new tokens."""
        if part == "prefill":
            return self.prompt_tokens / self.first_seconds
        if part == "decode":
            return self.prompts * (self.tokens - 1) / (self.whole_seconds - self.first_seconds)
        return self.prompts * self.tokens / self.whole_seconds


@dataclass(frozen=True, slots=True)
class Target:
    """The goal for the tokens per second of whole calls, as a multiple of transformers'."""

    case: str
    program: str
    times: float


TARGETS = [Target(ONE, SIXTEEN, 1.0), Target(ONE, EIGHT, 1.5), Target(MANY, SIXTEEN, 2.0)]


def prompts_of(vocab_size: int) -> dict[str, Prompts]:
    """Prompts of random ids: one of 64 tokens, and 16 of 16 to 256 tokens, evenly spaced and shuffled."""
    generator = random.Random(0)
    lengths = [16 + 16 * index for index in range(16)]
    generator.shuffle(lengths)
    ids = [[generator.randrange(3, vocab_size) for _ in range(length)] for length in [64, *lengths]]
    return {ONE: ids[:1], MANY: ids[1:]}


def ours(network: Llama) -> Generate:
    """Generation with lorafit's engine."""
    from lorafit.infer.continuous_batch import Request, generate_tokens

    def generate(prompts: Prompts, tokens: int) -> list[list[int]]:
        said: list[list[int]] = [[] for _ in prompts]
        requests = [Request(prompt, frozenset(), tokens) for prompt in prompts]
        for row, token in generate_tokens(network, requests):
            said[row].append(token.id)
        return said

    return generate


def theirs(model: Any) -> Generate:
    """Generation with transformers' `generate`; prompts of different lengths are padded on the left."""
    import torch

    def generate(prompts: Prompts, tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
        answers: list[list[int]] = out[:, longest:].tolist()
        return answers

    return generate


def take_turns(
    programs: dict[str, Generate], prompts: dict[str, Prompts], tokens: int, turns: int, adapter: bool
) -> list[Timing]:
    """Run every program on every case `turns` times, after a warm-up call; every second turn reverses the order."""
    timings = []
    for case, batch in prompts.items():
        for generate in programs.values():
            generate(batch, 3)
        for turn in range(turns):
            for program in list(programs)[:: -1 if turn % 2 else 1]:
                seconds = []
                for most in (1, tokens):
                    started = time.perf_counter()
                    answers = programs[program](batch, most)
                    seconds.append(time.perf_counter() - started)
                    assert [len(row) for row in answers] == [most] * len(batch)
                size = (sum(map(len, batch)), len(batch), tokens)
                timings.append(Timing(case, adapter, program, *size, *seconds))
                rate = timings[-1].rate("together")
                with_adapter = ", adapter" if adapter else ""
                print(f"{case}{with_adapter}, {program}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    return timings


def measure(model: Path, tokens: int, turns: int) -> list[Timing]:
    """All timings: first of the base model, then with a non-zero adapter on all linear layers (r=16)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lorafit.model.build import build_saved
    from lorafit.model.lora import LoraSpec, adapted, attach

    torch.set_num_threads(THREADS)
    networks = {
        SIXTEEN: build_saved(model, None, "cpu", "bfloat16")[0],
        EIGHT: build_saved(model, None, "cpu", "bfloat16", quantize="int8")[0],
    }
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    reference.generation_config.eos_token_id = reference.generation_config.max_length = None
    prompts = prompts_of(networks[SIXTEEN].arch.vocab_size)
    programs = {THEIRS: theirs(reference), **{name: ours(network) for name, network in networks.items()}}
    timings = take_turns(programs, prompts, tokens, turns, adapter=False)

    spec = LoraSpec(rank=16, alpha=32, dropout=0.0, targets=("all-linear",), rslora=False)
    for network in networks.values():
        attach(network, spec, seed=0)
        for linear in adapted(network).values():
            torch.nn.init.normal_(linear.lora_B, std=0.01)
        network.eval()
    peft = get_peft_model(
        reference, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    )
    programs[THEIRS] = theirs(peft.eval())
    return timings + take_turns(programs, prompts, tokens, turns, adapter=True)


def report(timings: Sequence[Timing], about: str) -> str:
    """The targets and all rates as Markdown."""

    def rate(case: str, adapter: bool, program: str, part: str) -> float:
        key = (case, adapter, program)
        return statistics.median(t.rate(part) for t in timings if (t.case, t.adapter, t.program) == key)

    targets, rates = [], []
    for adapter in (False, True):
        on = ", adapter" if adapter else ""
        for target in TARGETS:
            value = rate(target.case, adapter, target.program, "together")
            value /= rate(target.case, adapter, THEIRS, "together")
            verdict = "pass" if value >= target.times else "miss"
            what = f"{target.program} over {THEIRS}, {target.case}{on}"
            targets.append([what, f">= {target.times:.1f}x", f"{value:.2f}x", verdict])
        for case in (ONE, MANY):
            for part in ("prefill", "decode", "together"):
                base, *others = (rate(case, adapter, program, part) for program in (THEIRS, SIXTEEN, EIGHT))
                rates.append(
                    [
                        f"{case}{on}: {part}",
                        f"{base:.1f}",
                        *(f"{other:.1f} ({other / base:.2f}x)" for other in others),
                    ]
                )
    return "\n\n".join(
        [
            about,
            table(["target", "goal", "measured", ""], targets),
            table(["tokens/s", THEIRS, SIXTEEN, EIGHT], rates),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="model folder (default: TinyLlama's shape, random weights)"
    )
    parser.add_argument("--layers", type=int, default=22, help="layers of the model with random weights")
    parser.add_argument("--work", type=Path, help="folder for that model; it is kept for the next run")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per prompt, at least 2")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all raw figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        model = arguments.model or random_model(shared_folder(), work, arguments.layers)
        config = json.loads((model / "config.json").read_text())
        record = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": shlex.join(["python", "-m", "benchmarks.generation", *_without_paths(sys.argv[1:])]),
            "machine": machine(),
            "versions": versions(),
            "layers": config["num_hidden_layers"],
        }
        timings = measure(model, arguments.tokens, arguments.turns)
    if arguments.json:
        everything = {**record, "timings": [asdict(timing) for timing in timings]}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    about = (
        f"{record['date']}, {record['machine']['cpu']}, {THREADS} threads; {record['layers']} layers; "
        f"transformers {record['versions'].get('transformers')}, torch {record['versions']['torch']}. "
        f"`{record['command']}`"
    )
    print(report(timings, about), end="")


if __name__ == "__main__":
    main()

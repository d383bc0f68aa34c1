"""R6: resumes many kinds of runs from each of their steps, and compares the final bytes and the rows."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.crash.jobs import run_of, write_material
from tests.crash.server import Servers
from tests.crash.trial import Tally

_EVERY_STEP = (
    "train.save_every=1",
    "train.keep=99",
    "train.batch_size=4",  # rows: one pass with packing and enough tokens, four without packing
    "train.max_steps=9",  # an epoch has 6 steps; the last one has 2 rows
)
_TARGETS = ("all-linear", "[q_proj,v_proj]", "re:.*mlp.*", "o_proj")
_SCHEDULES = ("cosine", "linear", "constant")
OVERFLOWS = ("model.dtype=float16", "lora.alpha=65536", "train.learning_rate=1e-9")
_EXTRAS = (
    "lora.rslora=true",
    "train.weight_decay=0.1",
    "train.schedule=constant",
    "data.shuffle=false",
    "data.train_on=all",
    "data.holdout=0",
    "train.eval_every=1",
    "train.keep_best=false",
    "train.max_grad_norm=0",
    "train.seed=7",
    "train.warmup=4",
    "train.batch_size=1",
    "train.batch_size=22",
    "model.dtype=float64",
    "data.weights=[2]",
    "data.system=Be brief.",
)


def configurations() -> Iterator[tuple[str, ...]]:
    """48 combinations of type, base, dropout, packing and accumulation, with varying other keys; then each extra."""
    axes = itertools.product(
        ("float32", "bfloat16", "float16"), ("none", "int8"), ("0", "0.1"), ("true", "false"), ("2048", "90")
    )
    for number, (dtype, quantize, dropout, packing, tokens) in enumerate(axes):
        yield (
            f"model.dtype={dtype}",
            f"model.quantize={quantize}",
            f"lora.dropout={dropout}",
            f"data.packing={packing}",
            f"train.micro_batch_tokens={tokens}",
            f"lora.targets={_TARGETS[number % 4]}",
            f"train.schedule={_SCHEDULES[number % 3]}",
            f"train.recompute={('none', 'layers')[number // 3 % 2]}",
        )
    for extra in _EXTRAS:
        yield (extra,)
    yield OVERFLOWS  # at the initial loss scales


def resume_everywhere(
    work: Path, servers: Servers, chosen: Sequence[tuple[str, ...]], every: int = 1, mutation: str = ""
) -> Tally:
    """R6: resume each configuration from every `every`-th step; `mutation` as in `Bench`."""
    material = write_material(work / "parity")
    tally = Tally()
    servers.learn("start", work / "parity", overrides=[*material, "train.max_steps=1"])

    def trial(item: tuple[int, tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[int, list[str]]]]:
        number, changes = item
        overrides = [*material, *_EVERY_STEP, *changes]
        origin = work / "parity" / f"configuration-{number}"
        whole = servers.run("start", origin, overrides=overrides, mutation=mutation)
        if whole.answer is None or not whole.answer["finished"]:
            return changes, [(0, [f"the run failed: {whole.fault} {whole.answer}"])]
        outcomes = []
        for step in range(number % every, len(whole.answer["rows"]), every):
            root = work / "parity" / f"resumed-{number}-{step}"
            cut(origin, root, step)
            resumed = servers.run("resume", root, overrides=overrides, mutation=mutation)
            problems = []
            if resumed.answer is None or not resumed.answer["finished"]:
                problems.append(f"the resume failed: {resumed.fault} {resumed.answer}")
            else:
                if any(resumed.answer[key] != whole.answer[key] for key in ("adapter", "state")):
                    problems.append("the bytes differ")
                if resumed.answer["rows"] != whole.answer["rows"][step:]:
                    problems.append("the rows differ")
            outcomes.append((step, problems))
            shutil.rmtree(root)
            if mutation and problems:  # detected
                break
        shutil.rmtree(origin)
        return changes, outcomes

    for changes, outcomes in servers.each(trial, list(enumerate(chosen))):
        tally.count("configurations")
        for step, problems in outcomes:
            tally.add(f"from step {step} with {' '.join(changes)}", *problems)
    return tally


def cut(origin: Path, root: Path, step: int) -> None:
    """Copy a finished run in its state after `step`."""
    shutil.copytree(origin, root)
    run = run_of(root)
    shutil.rmtree(run.adapter)
    for later in run.saved_steps():
        if later > step:
            shutil.rmtree(run.checkpoint(later))

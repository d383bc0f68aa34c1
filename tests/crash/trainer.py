"""The kills of R1 for transformers' Trainer with peft, for comparison; it is resumed as in its documentation."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from tests.crash.jobs import write_material
from tests.crash.kills import injections
from tests.crash.server import Servers
from tests.crash.shim import Injection, read_log
from tests.crash.trial import Tally

MODULE = "tests.crash.trainer"


def versions() -> str:
    return f"transformers {version('transformers')}, peft {version('peft')}"


def start(root: Path, model: str) -> dict[str, Any]:
    """Train and save the adapter."""
    return _train(root, model, resume=False)


def resume(root: Path, model: str) -> dict[str, Any]:
    """`trainer.train(resume_from_checkpoint=True)`, or a new start if there is no checkpoint folder."""
    from transformers.trainer_utils import get_last_checkpoint

    output = root / "run"
    return _train(root, model, resume=output.is_dir() and get_last_checkpoint(str(output)) is not None)


def _train(root: Path, model_folder: str, *, resume: bool) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    torch.set_num_threads(1)
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    lora = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (24,), generator=generator) for _ in range(22)]
    trainer = Trainer(
        model=get_peft_model(model, lora),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        args=TrainingArguments(
            output_dir=str(root / "run"),
            per_device_train_batch_size=3,
            max_steps=12,
            learning_rate=0.01,
            save_steps=2,
            save_total_limit=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    try:
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model(str(root / "run/adapter"))
    except Exception as error:
        return {"finished": False, "problems": [f"{type(error).__name__}: {error}"[:300]]}
    adapter = (root / "run/adapter/adapter_model.safetensors").read_bytes()
    return {"finished": True, "adapter": hashlib.sha256(adapter).hexdigest()}


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {"start": start, "resume": resume}


def kill_trainer(work: Path, servers: Servers, most: int) -> Tally:
    """R1 on the Trainer, at no more than `most` injections, evenly spread over the run."""
    write_material(work / "material")
    model = str(work / "material/model")
    whole = servers.learn("start", work / "whole", model=model)
    assert whole.answer is not None
    assert whole.answer["finished"], whole.answer
    log, recorded = work / "trainer.log", work / "recorded"
    recorded.mkdir()
    servers.run("start", recorded, log=log, model=model)
    calls = list(read_log(log, recorded))
    tally = Tally(facts={"calls that change files": len(calls)})
    points = injections(calls)
    points = [points[len(points) * index // most] for index in range(most)] if len(points) > most else points

    def trial(injection: Injection) -> tuple[Injection, str | None]:
        root = work / f"kill-{injection.thread}-{injection.call}-{injection.act}"
        root.mkdir()
        outcome = servers.run("start", root, injection=injection, model=model)
        if not outcome.killed:
            return injection, None
        resumed = servers.run("resume", root, model=model)
        shutil.rmtree(root)
        if resumed.answer is None or not resumed.answer["finished"]:
            return injection, f"not resumed: {resumed.fault} {resumed.answer and resumed.answer['problems']}"
        return injection, "" if resumed.answer["adapter"] == whole.answer["adapter"] else "the bytes differ"

    for injection, problem in servers.each(trial, points):
        if problem is None:
            tally.count("not reached")
        else:
            tally.add(str(injection), *[problem] if problem else [])
            tally.count("not resumed", problem.startswith("not resumed"))
    return tally

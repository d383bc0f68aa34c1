"""Run directories as training leaves them, written without training, with any text in every place that takes one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafit.config.load import dump_config, validate

Say = Callable[[str], str]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://127.0.0.1/x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style></main><iframe src=//x></iframe><!--",
    "]]>\x00\x1b[31m\u202egnp.exe\ud800\ufeff&lt;b&gt;{{7*7}}</mark></pre></div>",
]


def write_run(
    folder: Path, steps: int = 60, say: Say = lambda text: text, *, ended: str = "finished"
) -> Path:
    """A run of `steps` steps; `say` gets every text that may come from rows, models or file names."""
    folder.mkdir(parents=True)
    names = (say(text).replace("\0", "") for text in ("demo/model", "rows.json"))  # a config refuses the rest
    model, rows = (name.encode(errors="replace").decode() for name in names)
    sections = {"model": {"name": model}, "data": {"path": rows}, "train": {"learning_rate": 2e-4}}
    config = validate(sections)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in _events(steps, say, ended))
    )
    tokens = {"rows": 90, "total": 3000, "trained": 1000, "masked": 1990, "truncated": 10}
    held = {"rows": 8, "total": 300, "trained": 100, "masked": 200, "truncated": 0}
    values: dict[str, Any] = {
        "env": {
            "lorafit": "0.1.0",
            "python": "3.12.1",
            "platform": say("Linux"),
            "packages": {"torch": say("2.13.0")},
            "command": say("lorafit train --model demo/model"),
            "threads": 2,
        },
        "prompt": {
            "schema": 1,
            "template": "chat",
            "system": say("Be brief."),
            "eos": say("</s>"),
            "stop_ids": [2],
        },
        "ledger": {
            "num_rows": 100,
            "trained": tokens,
            "held_out": held,
            "dropped": {say("the answer is empty"): {"rows": 2, "first": [3, 17]}},
            "lengths": {"mean": 31.0, "p50": 30, "p90": 44, "max": 61},
        },
        "rows": {
            "lengths": {
                "edges": list(range(0, 70, 5)),
                "training": [0, 2, 9, 20, 25, 14, 9, 5, 3, 2, 1, 0, 0],
                "heldout": [0, 0, 1, 2, 3, 1, 0, 1, 0, 0, 0, 0, 0],
            },
            "rows": [
                {
                    "place": say("rows.json row 1"),
                    "tokens": 30,
                    "trained": 12,
                    "spans": [[say("What is it?\n"), False], [say("A horse.</s>"), True]],
                }
            ],
        },
        "samples": [_sample(index, say) for index in range(3)],
        "row_list": {
            "counts": {"learned": 88, "never learned": 2},
            "rows": [
                {
                    "place": say("rows.json row 17"),
                    "kind": "never learned",
                    "reason": say("its loss stays high"),
                    "tokens": 30,
                    "trained": 12,
                    "spans": [[say("What is it?\n"), False], [say("A horse.</s>"), True]],
                }
            ],
        },
        "why": [
            {
                "prompt": say("Why a horse?"),
                "answer": say("A horse."),
                "loss": 0.25,
                "rows": [
                    {
                        "place": say("rows.json row 17"),
                        "score": 0.83,
                        "question": say("What is it?"),
                        "answer": say("A horse."),
                    }
                ],
                "without": {"answer": say("A cow."), "loss": 4.5, "removed": 1},
            }
        ],
        "proof": {
            "schema": 1,
            "verdict": "warn",
            "step": steps,
            "seconds": 3.2,
            "adapter_sha256": "ab" * 32,
            "checks": [
                _check("changed", "pass", say("28 of 28 adapter tensors changed"), {}),
                _check("reload", "pass", say("it gives the trained model's logits"), {}),
                _check("stop", "warn", say("only 3 of 20 ended"), {"prompts": 20, "ended": 3}),
                _check("heldout", "pass", say("held-out loss 1.200 -> 0.400"), {}),
            ],
        },
        "check": [
            {"name": "ledger", "verdict": "pass", "message": say("the sums close"), "place": "", "hint": ""},
            {
                "name": say("leaks"),
                "verdict": "warn",
                "message": say("2 rows are in both halves"),
                "place": say("rows.json rows 3, 17"),
                "hint": say("remove them"),
            },
        ],
    }
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "adapter").mkdir()
    facts = {"base_model": say("11" * 32), "data": "22" * 32, "prompt_contract": "33" * 32}
    manifest = {"files": {"adapter_model.safetensors": {"sha256": "ab" * 32}}, "facts": facts}
    (folder / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _events(steps: int, say: Say, ended: str) -> list[dict[str, Any]]:
    generator = random.Random(0)
    started = {
        "event": "run_started",
        "model": say("demo/model"),
        "num_rows": 90,
        "num_steps": steps,
        "num_parameters": 902_000,
        "num_trainable": 127_000,
        "device": say("CPU, 2 threads"),
        "dtype": "float32",
        "output": say("runs/demo"),
    }
    events: list[dict[str, Any]] = [
        {"event": "note", "text": say("format alpaca"), "level": "info"},
        {"event": "note", "text": say("two rows were dropped"), "level": "warning"},
        started,
    ]
    every = max(1, steps // 6)
    for step in range(1, steps + 1):
        loss = 0.3 + 1.5 * math.exp(-8 * step / steps) + generator.gauss(0, 0.08)
        seconds = 0.1 + abs(generator.gauss(0, 0.01))
        events.append(
            {
                "event": "step",
                "step": step,
                "epoch": step / 30,
                "loss": loss,
                "learning_rate": 2e-4 * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "grad_norm": math.exp(generator.gauss(0, 0.4)),
                "supervised_tokens": 300,
                "tokens": 900,
                "rows": 16,
                "tokens_per_second": 900 / seconds,
                "seconds": seconds,
                "memory_bytes": 4 * 10**8 + step * 1000,
            }
        )
        if step % every == 0:
            held = {"loss": 0.4 + math.exp(-6 * step / steps), "base_loss": 1.9, "best": True}
            events.append({"event": "heldout", "step": step, **held})
            answers = [say(f"At {step} it says {index}.") for index in range(3)]
            events.append(
                {
                    "event": "answers",
                    "step": step,
                    "prompts": [say(f"Question {index}?") for index in range(3)],
                    "tuned": answers,
                    "stopped": [True, False, True],
                    "base": answers if step == every else None,
                    "seconds": 0.2,
                }
            )
    seen = {
        "step": steps,
        "what": "plateau",
        "text": say("the loss stands still"),
        "hint": say("lower the rate"),
    }
    events.append({"event": "diagnosis", **seen})
    last = {
        "step": steps,
        "reason": ended,
        "seconds": steps / 10,
        "adapter": say("runs/demo/adapter"),
        "loss": 0.3,
    }
    learned = {"step": steps, "level": "partly", "text": say("It learned most of your rows")}
    return [*events, {"event": "learned", **learned}, {"event": "run_ended", **last}]


def _sample(index: int, say: Say) -> dict[str, Any]:
    answer = {"text": say("Base says this. " * 5), "num_tokens": 128, "stopped": False}
    return {
        "place": say(f"rows.json row {index + 1}"),
        "prompt": say(f"Question {index}?"),
        "answer": say("A right answer."),
        "base": answer,
        "tuned": {"text": say("A right answer."), "num_tokens": 5, "stopped": True},
    }


def _check(name: str, verdict: str, text: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "text": text, "values": values}

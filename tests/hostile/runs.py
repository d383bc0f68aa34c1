"""Hostile run directories: files that point outside, forged manifests, state and metrics that are something else."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import ESCAPES, PICKLE, Case, Place, cases, with_changes

from lorafit.storage.atomic import MANIFEST, _manifest_text, sha256_file

CHECKPOINT = "checkpoints/step-000001"
STATE, TENSORS = f"{CHECKPOINT}/state.json", f"{CHECKPOINT}/state.safetensors"
EVERYWHERE = frozenset({"resume", "generate", "runs"})
READ = frozenset({"generate", "runs"})  # what only looks may go on
NO_ANSWER = frozenset({"runs", "resume"})  # a resume makes the prompt contract and the checkpoints anew
LISTED = frozenset({"runs"})  # as a run that cannot be read


def run(change: Callable[[Path, Place], object]) -> Callable[[Place], Path]:
    """A copy of the good run, stopped after its first step of two, changed."""

    def make(place: Place) -> Path:
        folder = place.copy("run", "run")
        shutil.rmtree(folder / "adapter")
        change(folder, place)
        return folder

    return make


def raw(name: str, content: str | bytes) -> Callable[[Place], Path]:
    data = content.encode() if isinstance(content, str) else content
    return run(lambda folder, _: (folder / name).write_bytes(data))


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Place], Path]:
    return run(lambda folder, _: with_changes(folder / name, change))


def replaced(name: str, make: Callable[[Path, Place], object]) -> Callable[[Place], Path]:
    """Something else in the place of a file or folder."""

    def change(folder: Path, place: Place) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path, place)

    return run(change)


def outside(name: str, target: str = "precious.txt") -> Callable[[Place], Path]:
    return replaced(name, lambda path, place: path.symlink_to(place.outside / target))


def pipe(name: str) -> Callable[[Place], Path]:
    return replaced(name, lambda path, _: os.mkfifo(path))


def device(name: str) -> Callable[[Place], Path]:
    return replaced(name, lambda path, _: path.symlink_to("/dev/zero"))


def sign(folder: Path, **changes: Any) -> None:
    """A manifest that vouches for whatever the folder holds, as anybody can write one."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    for name, entry in manifest["files"].items() if isinstance(manifest["files"], dict) else ():
        if (folder / name).is_file():
            entry.update(size=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
    (folder / MANIFEST).write_text(_manifest_text(manifest))


def signed(name: str, change: Callable[[Any], Any]) -> Callable[[Place], Path]:
    """A changed file of the checkpoint, and a manifest that says it is right."""

    def forge(folder: Path, _: Place) -> None:
        with_changes(folder / name, change)
        sign(folder / CHECKPOINT)

    return run(forge)


def signed_bytes(name: str, content: bytes) -> Callable[[Place], Path]:
    def forge(folder: Path, _: Place) -> None:
        (folder / name).write_bytes(content)
        sign(folder / CHECKPOINT)

    return run(forge)


def manifest(**changes: Any) -> Callable[[Place], Path]:
    return run(lambda folder, _: sign(folder / CHECKPOINT, **changes))


def put(**values: Any) -> Callable[[Any], None]:
    return lambda value: value.update(values)


def other_shapes(folder: Path, _: Place) -> None:
    path = folder / TENSORS
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name.endswith("exp_avg"):
            entry["shape"] = entry["shape"][::-1]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    sign(folder / CHECKPOINT)


def orphans(folder: Path, place: Place) -> None:
    """What looks like leftovers of a crash and points outside."""
    for name in (".staging-metrics.jsonl", ".staging-config.yaml", ".old-adapter"):
        (folder / name).symlink_to(place.outside)
    (folder / "checkpoints" / ".staging-step-000002").symlink_to(place.outside)


def config(old: Callable[[Place], str], new: Callable[[Place], str]) -> Callable[[Place], Path]:
    """The run's config with a text in it replaced."""

    def change(folder: Path, place: Place) -> None:
        text = (folder / "config.yaml").read_text()
        assert old(place) in text
        (folder / "config.yaml").write_text(text.replace(old(place), new(place)))

    return run(change)


CASES = cases(
    {
        **{
            f"link: {name}": Case(outside(name), harmless=READ)
            for name in (
                "metrics.jsonl",
                "run.lock",
                "ledger.json",
                "env.json",
                "samples.json",
                "report.html",
                "tensorboard",
            )
        },
        "link: config.yaml": Case(outside("config.yaml"), harmless=LISTED),
        "link: prompt.json": Case(outside("prompt.json"), harmless=LISTED),
        "link: config to nothing": Case(
            replaced("config.yaml", lambda path, _: path.symlink_to("nothing")), harmless=LISTED
        ),
        "link: checkpoints": Case(outside("checkpoints", "."), harmless=LISTED),
        "link: a checkpoint": Case(outside("checkpoints/step-000009", "."), harmless=READ),
        "link: adapter": Case(outside("adapter", "."), harmless=LISTED),
        "link: leftovers": Case(run(orphans), harmless=READ),
        "link: into a log": Case(outside("logs", "."), harmless=READ),
        **{
            f"pipe: {name}": Case(pipe(name), harmless=EVERYWHERE)
            for name in ("ledger.json", "env.json", "samples.json", "run.lock.holder")
        },
        "pipe: metrics.jsonl": Case(pipe("metrics.jsonl"), harmless=READ),
        "pipe: run.lock": Case(pipe("run.lock"), harmless=READ),
        "pipe: config.yaml": Case(pipe("config.yaml"), harmless=LISTED),
        "pipe: prompt.json": Case(pipe("prompt.json"), harmless=NO_ANSWER),
        "pipe: manifest.json": Case(pipe(f"{CHECKPOINT}/{MANIFEST}"), harmless=NO_ANSWER),
        "pipe: state.json": Case(pipe(STATE), harmless=NO_ANSWER),
        "device: metrics.jsonl": Case(device("metrics.jsonl"), harmless=READ),
        "device: prompt.json": Case(device("prompt.json"), harmless=LISTED),
        "device: config.yaml": Case(device("config.yaml"), harmless=LISTED),
        "config: code": Case(
            raw("config.yaml", "model: !!python/object/apply:os.system ['touch PWNED']\n"), harmless=LISTED
        ),
        "config: empty": Case(raw("config.yaml", ""), many=True, harmless=LISTED),
        "config: no text": Case(raw("config.yaml", bytes(range(256))), harmless=LISTED),
        "config: model elsewhere": Case(
            config(lambda place: str(place.model), lambda _: "../../../../../etc"), harmless=LISTED
        ),
        "config: output elsewhere": Case(
            config(lambda _: "output: ", lambda place: f"output: {place.outside}/x # "), harmless=EVERYWHERE
        ),
        "config: rows from a device": Case(
            config(lambda place: str(place.rows), lambda _: "/dev/zero"), harmless=READ
        ),
        "prompt: nested": Case(raw("prompt.json", "[" * 100_000), harmless=NO_ANSWER),
        "prompt: a list": Case(raw("prompt.json", "[]"), harmless=NO_ANSWER),
        "prompt: no text": Case(raw("prompt.json", b"\xff\xfe"), harmless=NO_ANSWER),
        "prompt: other types": Case(changed("prompt.json", put(stop_ids={"a": 1})), harmless=NO_ANSWER),
        "prompt: stop ids of texts": Case(changed("prompt.json", put(stop_ids=["a"])), harmless=NO_ANSWER),
        "prompt: no such template": Case(
            changed("prompt.json", put(template="os.system")), harmless=NO_ANSWER
        ),
        "prompt: chat without a template": Case(
            changed("prompt.json", put(template="chat", chat_template=None)), harmless=NO_ANSWER
        ),
        "prompt: template that escapes": Case(
            changed("prompt.json", put(template="chat", chat_template="{{ ''.__class__.__mro__ }}")),
            harmless=NO_ANSWER,
        ),
        "prompt: template without end": Case(
            changed(
                "prompt.json",
                put(
                    template="chat",
                    chat_template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                ),
            ),
            harmless=NO_ANSWER,
        ),
        "prompt: no such day": Case(
            changed(
                "prompt.json",
                put(template="chat", chat_template="{{ messages[0].content }}", date="yesterday"),
            ),
            harmless=NO_ANSWER,
        ),
        "prompt: an id beyond the model": Case(
            changed(
                "prompt.json",
                put(bos_id=10**9, bos="<s>", add_bos=True, template="alpaca", chat_template=None),
            ),
            harmless=NO_ANSWER,
        ),
        "prompt: a negative id": Case(
            changed(
                "prompt.json", put(bos_id=-5, bos="<s>", add_bos=True, template="alpaca", chat_template=None)
            ),
            harmless=NO_ANSWER,
        ),
        "prompt: other tokenizer": Case(
            changed("prompt.json", put(tokenizer_sha256=ESCAPES)), harmless=NO_ANSWER
        ),
        "metrics: nested": Case(raw("metrics.jsonl", "[" * 100_000 + "\n"), harmless=EVERYWHERE),
        "metrics: no text": Case(raw("metrics.jsonl", bytes(range(256)) * 9), harmless=EVERYWHERE),
        "metrics: steers a terminal": Case(
            raw(
                "metrics.jsonl", json.dumps({"event": "run_ended", "reason": ESCAPES, "step": ESCAPES}) + "\n"
            ),
            harmless=EVERYWHERE,
        ),
        "metrics: huge numbers": Case(
            raw("metrics.jsonl", '{"event": "step", "step": 1e999, "loss": ' + "9" * 4000 + "}\n"),
            harmless=EVERYWHERE,
        ),
        "metrics: other types": Case(
            raw(
                "metrics.jsonl",
                '{"event": ["step"], "step": {}}\n{"event": "heldout", "loss": "x", "base_loss": []}\n'
                '{"event": "run_started", "num_steps": "x"}\n',
            ),
            harmless=EVERYWHERE,
        ),
        "manifest: nested": Case(raw(f"{CHECKPOINT}/{MANIFEST}", "[" * 100_000), harmless=NO_ANSWER),
        "manifest: a list": Case(raw(f"{CHECKPOINT}/{MANIFEST}", "[]"), harmless=NO_ANSWER),
        "manifest: other version": Case(manifest(schema=ESCAPES), harmless=NO_ANSWER),
        "manifest: files outside": Case(
            manifest(files={"../../../../outside/precious.txt": {"size": 1, "sha256": "x"}}),
            harmless=NO_ANSWER,
        ),
        "manifest: absolute files": Case(
            manifest(files={"/etc/passwd": {"size": 1, "sha256": "x"}}), harmless=NO_ANSWER
        ),
        "manifest: files of other types": Case(manifest(files=[1]), harmless=NO_ANSWER),
        "manifest: no facts": Case(manifest(facts=None), harmless=NO_ANSWER),
        "manifest: facts of other types": Case(manifest(facts=["step"]), harmless=NO_ANSWER),
        "manifest: step of another type": Case(manifest(facts={"step": "1"}), harmless=NO_ANSWER),
        "state: a list": Case(signed_bytes(STATE, b"[]"), harmless=READ),
        "state: nested": Case(signed_bytes(STATE, b"[" * 100_000), harmless=READ),
        "state: other keys": Case(signed_bytes(STATE, b"{}"), harmless=READ),
        "state: other types": Case(signed(STATE, put(step="x", scale=[1])), harmless=READ),
        "state: negative step": Case(signed(STATE, put(step=-1)), harmless=READ),
        "state: other step": Case(signed(STATE, put(step=7)), harmless=READ),
        "state: no passes": Case(signed(STATE, put(micro_batch_tokens=-1)), harmless=READ),
        "state: no random numbers": Case(signed(STATE, put(python_random=[3, [1], None])), harmless=READ),
        "state: random numbers of texts": Case(signed(STATE, put(python_random="os.system")), harmless=READ),
        "state: random numbers beyond 32 bits": Case(
            signed(STATE, put(python_random=[3, [2**80] * 625, None])), harmless=READ
        ),
        "tensors: a pickle": Case(signed_bytes(TENSORS, PICKLE), harmless=READ),
        "tensors: none": Case(signed_bytes(TENSORS, struct.pack("<Q", 2) + b"{}"), harmless=READ),
        "tensors: other shapes": Case(run(other_shapes), harmless=READ),
        "adapter: a pickle": Case(
            signed_bytes(f"{CHECKPOINT}/adapter_model.safetensors", PICKLE), harmless=LISTED
        ),
        "adapter: other rank": Case(
            signed(f"{CHECKPOINT}/adapter_config.json", put(r=10**18)), many=True, harmless=NO_ANSWER
        ),
    }
)

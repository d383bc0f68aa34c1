"""Hostile adapter folders: code beside the weights, pickles, configs and tensors that lie."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import IMPORT_BOMB, PICKLE, Case, Place, cases, edited
from tests.hostile.models import HEADERS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EVERYWHERE = frozenset({"generate", "put on", "continue"})


def adapter(change: Callable[[Path], object]) -> Callable[[Place], Path]:
    """A copy of the good run's adapter, changed; without its manifest, as peft writes it."""

    def make(place: Place) -> Path:
        folder = place.copy("run", "whole") / "adapter"
        folder = folder.rename(place.folder / "adapter")
        (folder / "manifest.json").unlink()
        change(folder)
        return folder

    return make


def config(**changes: Any) -> Callable[[Place], Path]:
    return adapter(lambda folder: edited(folder / CONFIG, **changes))


def raw(name: str, content: str | bytes) -> Callable[[Place], Path]:
    data = content.encode() if isinstance(content, str) else content
    return adapter(lambda folder: (folder / name).write_bytes(data))


def only(name: str, content: bytes) -> Callable[[Place], Path]:
    """No safetensors, but a file of another kind."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)

    return adapter(change)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Place], Path]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return adapter(change)


def with_code(folder: Path) -> None:
    edited(
        folder / CONFIG, auto_map={"AutoModel": "modeling.Model"}, auto_mapping={"parent_library": "modeling"}
    )
    for name in ("modeling.py", "__init__.py", "sitecustomize.py", "torch.py", "conftest.py"):
        (folder / name).write_text(IMPORT_BOMB)
    for name in ("adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(PICKLE)


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Place], Path]:
    """Another header before the same numbers."""

    def edit(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return adapter(edit)


def reshaped(header: dict[str, Any]) -> None:
    entry = header[sorted(header)[0] if sorted(header)[0] != "__metadata__" else sorted(header)[1]]
    entry["shape"] = entry["shape"][::-1]


def renamed(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    header["base_model.model.../../x.lora_A.weight"] = header.pop(name)


CASES = cases(
    {
        "code beside it": Case(adapter(with_code), harmless=EVERYWHERE),
        "pickle for weights": only("adapter_model.bin", PICKLE),
        "pickle in a checkpoint": only("adapter_model.pt", PICKLE),
        "pickle called safetensors": raw(WEIGHTS, PICKLE),
        "config: nested": raw(CONFIG, "[" * 100_000),
        "config: a list": raw(CONFIG, "[]"),
        "config: not UTF-8": raw(CONFIG, b"\xff\xfe"),
        "config: huge": raw(CONFIG, '{"r": "' + "a" * 20_000_000 + '"}'),
        "config: huge rank": config(r=10**18),
        "config: rank of a thousand digits": raw(CONFIG, '{"r": ' + "9" * 5000 + "}"),
        "config: negative rank": config(r=-1),
        "config: rank of another type": config(r="2"),
        "config: other rank": Case(config(r=3), many=True),
        "config: alpha beyond floats": Case(
            raw(CONFIG, '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999, "target_modules": ["q_proj"]}'),
            many=True,
        ),
        "config: alpha not a number": config(lora_alpha=float("nan")),
        "config: expression without end": Case(config(target_modules="(\\w+\\.?)+!"), harmless=EVERYWHERE),
        "config: expression in itself": Case(config(target_modules="(" * 100_000), harmless=EVERYWHERE),
        "config: a thousand modules": Case(config(target_modules=[f"m{i}" for i in range(1000)]), many=True),
        "config: modules of another type": config(target_modules={"a": 1}),
        "config: no modules": config(target_modules=[]),
        "config: other method": config(peft_type="__import__('os').system('touch PWNED')"),
        "config: whole modules": config(modules_to_save=["../../x"]),
        "config: no base": Case(
            config(base_model_name_or_path=None), harmless=frozenset({"put on", "continue"})
        ),
        "config: base elsewhere": Case(
            config(base_model_name_or_path="../../../../etc"), harmless=frozenset({"put on", "continue"})
        ),
        "config: base in a URL": Case(
            config(base_model_name_or_path="https://user:password@127.0.0.1/x"),
            harmless=frozenset({"put on", "continue"}),
        ),
        "config: base on a share": Case(
            config(base_model_name_or_path="\\\\host\\share"), harmless=frozenset({"put on", "continue"})
        ),
        "config: a pipe": replaced(CONFIG, os.mkfifo),
        "config: a device": replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")),
        "weights: a pipe": replaced(WEIGHTS, os.mkfifo),
        "weights: a device": replaced(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
        "weights: a folder": replaced(WEIGHTS, Path.mkdir),
        "weights: other shapes": Case(tensors(reshaped), many=True),
        "weights: other names": Case(tensors(renamed), many=True),
        **{f"weights: {name}": Case(raw(WEIGHTS, content), many=True) for name, content in HEADERS.items()},
    }
)

"""One export from beginning to end: written beside its place, read back and compared there, and only then put down."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import ConfigError, LorafitError, Problem, RunError
from lorafit.export import ollama, parity
from lorafit.export.adapter import write_adapter
from lorafit.export.card import FILE as CARD
from lorafit.export.card import card
from lorafit.export.merge import merged_type, write_merged
from lorafit.export.reference import Reference, Rounding, exact, make_reference, unrounded
from lorafit.export.run_source import RunSource, open_source
from lorafit.observe.progress import progress
from lorafit.storage.atomic import commit_folder, read_facts, verify_folder
from lorafit.version import __version__

MERGED_TYPES = ("auto", "f32", "bf16", "f16")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
TYPES: dict[str, tuple[str, ...]] = {  # by kind, the default first
    "adapter": ("f32",),
    "merged": MERGED_TYPES,
    "gguf": ("q8_0", *(name for name in GGUF_TYPES if name != "q8_0")),
    "gguf-lora": ("f32",),
    "ollama": ("q8_0", *(name for name in GGUF_TYPES if name != "q8_0")),
}
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 0.75}
# how much of a weight rounding may change: twice and more of what it does to normally distributed numbers
_MOST_ROUNDED = {"f32": 1e-6, "f16": 1e-3, "bf16": 4e-3, "q8_0": 0.02, "q4_0": 0.25}
_HINT = "free space, or give another --output; the run itself is untouched"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: sizes in bytes by file name, and what comparing it with the live adapter came to."""

    path: Path
    kind: str
    type: str
    files: Mapping[str, int]
    parity: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        fields = {
            "kind": self.kind,
            "type": self.type,
            "files": dict(self.files),
            "parity": dict(self.parity),
        }
        return {"path": str(self.path), **fields}


def export_run(
    run: str | Path,
    kind: str,
    *,
    output: str | Path | None = None,
    type_name: str | None = None,
    verify: bool = True,
    offline: bool = False,
) -> Exported:
    """Write an export of `run`; without `output` into the run's `exports/`. Raises a LorafitError and leaves nothing
    where anything cannot be written, or where what was written does not answer like the live adapter.

    `verify` False leaves the comparison out, and the export says so. An earlier export at the place is replaced.
    """
    if kind not in TYPES:
        raise ConfigError(f"there is no export `{kind}`", hint=f"one of {', '.join(TYPES)}")
    if type_name is not None and type_name not in TYPES[kind]:
        raise ConfigError(
            f"`{type_name}` is no type of a {kind} export",
            place="--type",
            hint=f"one of {', '.join(TYPES[kind])}",
        )
    if kind in ("gguf", "gguf-lora", "ollama") and importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "the package `gguf` is needed to write GGUF files", hint="pip install 'lorafit[gguf]'"
        )
    source = open_source(run, offline=offline)
    type_name = type_name or TYPES[kind][0]
    if type_name == "auto":
        type_name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[
            merged_type(source, "auto")
        ]
    folder = _target(source, kind, type_name, output)
    reference = None
    if verify:
        with progress("asking the adapter") as advance:
            reference = make_reference(source, _rounding(kind, type_name), _longest(source, kind), advance)
    outcome: dict[str, Any] = parity.unverified("--no-verify")

    def write(staging: Path) -> Mapping[str, str]:
        nonlocal outcome
        try:
            sums = _write(source, kind, type_name, staging)
            (staging / "prompt.json").write_text(
                json.dumps(source.contract.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            if reference is not None:
                outcome = _verify(source, reference, kind, staging)
            text = json.dumps(outcome, indent=1) + "\n"
            (staging / parity.FILE).write_text(text, encoding="utf-8")
            names = [path.name for path in staging.iterdir()]
            (staging / CARD).write_text(card(source, kind, type_name, names, outcome), encoding="utf-8")
            return sums
        except OSError:
            raise
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    size = round(_BYTES[type_name] * source.arch.num_parameters) if "adapter" not in kind else None
    facts = {
        "export": kind,
        "type": type_name,
        "lorafit": __version__,
        "prompt_contract": source.contract.hash,
    }
    commit_folder(folder, write, facts, size, hint=_HINT)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(folder, kind, type_name, files, outcome)


def _target(source: RunSource, kind: str, type_name: str, output: str | Path | None) -> Path:
    """Where to write: a place that is free, or holds an earlier export."""
    if output is None:
        name = kind if len(TYPES[kind]) == 1 else f"{kind}-{type_name}"
        return source.run.exports / name
    folder = Path(output).expanduser()
    is_export = (
        folder.is_dir() and not verify_folder(folder, may_have_more=True) and "export" in read_facts(folder)
    )
    if folder.exists() and not is_export and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(
            f"`{output}` is not empty, and no export", hint="give an --output that does not exist yet"
        )
    return folder


def _write(source: RunSource, kind: str, type_name: str, staging: Path) -> Mapping[str, str]:
    """The export's own files; the SHA-256 of those whose bytes were summed as they were made."""
    with progress(f"writing {kind}") as advance:
        if kind == "adapter":
            write_adapter(source, staging)
        elif kind == "merged":
            return write_merged(source, staging, merged_type(source, type_name), advance)
        elif kind == "gguf-lora":
            from lorafit.export.gguf_model import write_lora

            write_lora(source, staging / _file(source, kind, type_name))
        else:
            from lorafit.export.gguf_model import write_gguf

            write_gguf(source, staging / _file(source, kind, type_name), type_name, advance)
            if kind == "ollama":
                ollama.write_modelfile(source, staging)
    return {}


def _file(source: RunSource, kind: str, type_name: str) -> str:
    """The name of the GGUF file of an export."""
    return {
        "gguf": f"{source.name}-{type_name}.gguf",
        "gguf-lora": f"{source.name}-lora.gguf",
        "ollama": ollama.MODEL,
    }[kind]


def _verify(source: RunSource, reference: Reference, kind: str, staging: Path) -> dict[str, Any]:
    with progress("reading the export back"):
        if kind in ("merged", "adapter"):
            return parity.verify(source, reference, kind, staging)
        file = next(staging.glob("*.gguf")).name
        if kind == "ollama" and (faults := ollama.check_modelfile(source, reference.prompts, staging)):
            raise LorafitError.of(Problem(fault, ollama.FILE) for fault in faults)
        if kind != "gguf-lora":
            return parity.verify(source, reference, "gguf", staging, file=file)
        from lorafit.export.gguf_model import write_gguf

        with tempfile.TemporaryDirectory(prefix="lorafit-") as name:
            base = Path(name) / "base.gguf"
            write_gguf(source, base, "f32", lambda done, total: None, merged=False)
            return parity.verify(source, reference, kind, staging, file=file, base=base)


def _longest(source: RunSource, kind: str) -> int:
    """Tokens that an export of `kind` reads as the run's own network does."""
    if kind in ("merged", "adapter"):
        return source.arch.max_position_embeddings
    from lorafit.export.gguf_model import context_length

    return context_length(source.arch)


def _rounding(kind: str, type_name: str) -> Rounding:
    """How the program that reads the export rounds."""
    if kind in ("adapter", "gguf-lora"):
        return Rounding(exact, unrounded, 0.0)
    if kind == "merged":
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[type_name]
        return Rounding(lambda _, weight: weight.to(dtype).float(), unrounded, _MOST_ROUNDED[type_name])
    from lorafit.export.gguf_types import Type, rounded, tensor_type

    def weights(name: str, weight: Tensor) -> Tensor:
        return rounded(weight, tensor_type(type_name, name, tuple(weight.shape)))

    kinds = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16}
    into: Callable[[Tensor], Tensor] = unrounded
    if type_name != "f32":
        # llama.cpp turns what goes into a product into the weight's type; with 4 bits, into 8
        kind_into = kinds.get(type_name, Type.Q8_0)

        def into(x: Tensor) -> Tensor:
            has_blocks = x.shape[-1] % 32 == 0 or kind_into != Type.Q8_0
            return rounded(x, kind_into if has_blocks else Type.F16).to(x.dtype)

    return Rounding(weights, into, _MOST_ROUNDED[type_name])

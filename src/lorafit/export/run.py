"""One export from beginning to end: written to a staging folder, read back and compared there, then committed."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ConfigError, LorafitError, Problem
from lorafit.export import parity
from lorafit.export.card import FILE as CARD
from lorafit.export.card import card
from lorafit.export.kinds import BYTES, EXPORTS, Export
from lorafit.export.merge import base_type, write_json
from lorafit.export.ollama import FILE as MODELFILE
from lorafit.export.readback import READERS
from lorafit.export.reference import Reference, make_reference
from lorafit.export.run_source import RunSource, open_source
from lorafit.export.target import refuse_foreign, target_folder
from lorafit.model.weights import fingerprint
from lorafit.observe.progress import progress
from lorafit.run_dir import PROMPT
from lorafit.storage.atomic import staging_folder
from lorafit.version import __version__

_HINT = "free space, or give another --output; the run itself is unchanged"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: sizes in bytes by file name, and the result of the comparison with the live adapter."""

    path: Path
    kind: str
    type: str
    files: Mapping[str, int]
    parity: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**asdict(self), "path": str(self.path)}


def export_run(
    run: str | Path,
    kind: str,
    *,
    output: str | Path | None = None,
    type_name: str | None = None,
    verify: bool = True,
    offline: bool = False,
) -> Exported:
    """Write an export of `run`; without `output` into the run's `exports/`. An earlier export there is replaced.

    Raises a LorafitError, and leaves nothing, if a file cannot be written, if the folder holds files that lorafit did
    not write, or if the export does not answer as the live adapter does. If `verify` is False there is no comparison,
    and the export records that.
    """
    if kind not in EXPORTS:
        raise ConfigError(f"there is no export `{kind}`", hint=f"one of {', '.join(EXPORTS)}")
    export = EXPORTS[kind]
    if type_name is not None and type_name not in export.types:
        hint = f"one of {', '.join(export.types)}"
        raise ConfigError(f"`{type_name}` is no type of a {kind} export", place="--type", hint=hint)
    if export.library == "gguf" and importlib.util.find_spec("gguf") is None:
        hint = "pip install 'lorafit[gguf]'"
        raise ConfigError("the package `gguf` is needed to write GGUF files", hint=hint)
    source = open_source(run, offline=offline)
    type_name = type_name or export.types[0]
    if type_name == "auto":
        type_name = base_type(source)
    name = kind if len(export.types) == 1 else f"{kind}-{type_name}"
    if output is None and source.config is None:
        raise ConfigError(
            "an adapter outside of a run needs an --output", hint=f"--output {source.name}-{name}"
        )
    folder = target_folder(source.run, name, output)
    reference = None
    if verify:
        with progress("computing the adapter's answers") as advance:
            has_windows = READERS[export.reader].has_windows
            longest = source.arch.max_position_embeddings if has_windows else source.arch.shortest_window
            reference = make_reference(source, export.rounding(type_name), longest, advance)
    outcome: dict[str, Any] = parity.unverified("--no-verify")

    size = None if export.is_adapter else round(BYTES[type_name] * source.arch.num_parameters)
    facts = {
        "export": kind,
        "type": type_name,
        "lorafit": __version__,
        "prompt_contract": source.contract.hash,
        "base_model": fingerprint(source.base.path),
    }
    sums: dict[str, str] = {}
    with staging_folder(folder, facts, sums, size, _HINT) as staging:
        with progress(f"writing {kind}") as advance:
            sums.update(export.write(source, staging, type_name, advance))
        prompt = source.contract
        if not export.is_adapter and (staging / "tokenizer.json").is_file():  # it is its own model now
            prompt = replace(prompt, tokenizer_sha256=Tokenizer.from_folder(staging).sha256)
        write_json(staging / PROMPT, prompt.to_json())
        if reference is not None:
            outcome = _verify(source, reference, export, staging)
        write_json(staging / parity.FILE, outcome)
        (staging / CARD).write_text(card(source, export, type_name, staging, outcome), encoding="utf-8")
        refuse_foreign(folder)  # once more: comparing takes minutes
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(folder, kind, type_name, files, outcome)


def _verify(source: RunSource, reference: Reference, export: Export, staging: Path) -> dict[str, Any]:
    """What parity.json says of the export in `staging`. Raises a LorafitError naming every difference."""
    with progress("reading the export back"), tempfile.TemporaryDirectory(prefix="lorafit-") as scratch:
        if faults := export.faults(source, reference.prompts, staging):
            raise LorafitError.of(Problem(fault, MODELFILE) for fault in faults)
        base = None
        if export.write_base is not None:
            base = Path(scratch) / "base.gguf"
            export.write_base(source, base)
        return parity.verify(source, reference, export, staging, base)

"""One export from beginning to end: written to a staging folder, read back and compared there, then committed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ConfigError, LorafitError, Problem
from lorafit.export import parity
from lorafit.export.card import FILE as CARD
from lorafit.export.card import card
from lorafit.export.gguf_base import base_file, record_of_base, rounding_of_base
from lorafit.export.kinds import EXPORTS, Export
from lorafit.export.merge import base_type, write_json
from lorafit.export.number_types import TYPES
from lorafit.export.ollama import FILE as MODELFILE
from lorafit.export.ollama import MODEL, write_modelfile
from lorafit.export.readback import READERS
from lorafit.export.reference import Reference, importance_of, make_reference, questions_of
from lorafit.export.rows import rows_of
from lorafit.export.run_source import RunSource, open_source
from lorafit.export.several import open_others, usage
from lorafit.export.target import refuse_foreign, target_folder
from lorafit.model.adapter_file import WEIGHTS
from lorafit.model.weights import fingerprint
from lorafit.observe.progress import progress
from lorafit.run_dir import PROMPT
from lorafit.storage.atomic import MANIFEST, read_facts, sha256_file, staging_folder, verify_folder
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
    others: Sequence[str | Path] = (),
) -> Exported:
    """Write an export of `run`; without `output` into the run's `exports/`. An earlier export there is replaced.
    A folder of adapters in GGUF has those of the runs `others` too.

    Raises a LorafitError, and leaves nothing, if a file cannot be written, if the folder holds files that lorafit did
    not write, or if the export does not answer as the live adapter does. If `verify` is False there is no comparison,
    and the export records that.
    """
    export, source = prepare(run, kind, type_name, offline=offline)
    beside = open_others(source, kind, others, offline=offline)
    type_name = type_name or export.types[0]
    if type_name == "auto":
        type_name = base_type(source)
    folder = _target(source, kind, type_name, output)
    facts = _facts(source, kind, type_name)
    if beside:
        facts["others"] = {one.name: sha256_file(one.adapter / WEIGHTS) for one in beside}
    if kind == "ollama" and verify and (made := _made_before(source, type_name, facts)) is not None:
        return commit(source, kind, type_name, output, (made, _outcome_of(made)))
    reference = None
    if verify:
        reference = reference_of(source, export, type_name)
        source = replace(source, importance=reference.importance)
    elif TYPES[type_name].profits:
        source = _calibrated(source, export)
    sums: dict[str, str] = {}
    with _staged(source, export, folder, facts, sums) as staging:
        with progress(f"writing {kind}") as advance:
            for one in (source, *beside):
                sums.update(export.write(one, staging, type_name, advance))
        outcome: dict[str, Any] = parity.unverified("--no-verify")
        if reference is not None:
            outcome = _verify(source, reference, export, type_name, staging)
            for one in beside:
                own = _verify(one, reference_of(one, export, type_name), export, type_name, staging)
                outcome.setdefault("others", {})[one.name] = own
        _describe(source, export, type_name, staging, outcome, usage(source, beside) if beside else "")
        refuse_foreign(folder)  # once more: comparing takes minutes
    return _exported(folder, kind, type_name, outcome)


def prepare(
    run: str | Path, kind: str, type_name: str | None = None, *, offline: bool = False
) -> tuple[Export, RunSource]:
    """The record of a kind, and the run to export. Raises a LorafitError if the kind cannot be written of it."""
    if kind not in EXPORTS:
        raise ConfigError(f"there is no export `{kind}`", hint=f"one of {', '.join(EXPORTS)}")
    export = EXPORTS[kind]
    if type_name is not None and type_name not in export.types:
        hint = f"one of {', '.join(export.types)}"
        raise ConfigError(f"`{type_name}` is no type of a {kind} export", place="--type", hint=hint)
    if export.library == "gguf" and importlib.util.find_spec("gguf") is None:
        hint = "pip install 'lorafit[gguf]'"
        raise ConfigError("the package `gguf` is needed to write GGUF files", hint=hint)
    return export, open_source(run, offline=offline)


def commit(
    source: RunSource, kind: str, type_name: str, output: str | Path | None, made: tuple[Path, dict[str, Any]]
) -> Exported:
    """The export of a GGUF file that is written and compared: `made` are its folder and the result."""
    export, (made_in, outcome) = EXPORTS[kind], made
    folder = _target(source, kind, type_name, output)
    with _staged(source, export, folder, _facts(source, kind, type_name), {}) as staging:
        name = MODEL if kind == "ollama" else f"{source.name}-{type_name}.gguf"
        with progress("copying the GGUF file"):
            shutil.copyfile(next(made_in.glob("*.gguf")), staging / name)
        if kind == "ollama":
            write_modelfile(source, staging)
            questions = questions_of(source, _longest(source, export))
            if faults := export.faults(source, questions, staging):
                raise LorafitError.of(Problem(fault, MODELFILE) for fault in faults)
        _describe(source, export, type_name, staging, outcome)
    return _exported(folder, kind, type_name, outcome)


def _target(source: RunSource, kind: str, type_name: str, output: str | Path | None) -> Path:
    name = kind if len(EXPORTS[kind].types) == 1 else f"{kind}-{type_name}"
    if output is None and source.config is None:
        raise ConfigError(
            "an adapter outside of a run needs an --output", hint=f"--output {source.name}-{name}"
        )
    return target_folder(source.run, name, output)


@contextmanager
def _staged(
    source: RunSource, export: Export, folder: Path, facts: Mapping[str, Any], sums: dict[str, str]
) -> Iterator[Path]:
    bits = TYPES[facts["type"]].bits
    size = None if export.is_adapter else round(bits / 8 * source.arch.num_parameters)
    with ExitStack() as saving, staging_folder(folder, facts, sums, size, _HINT) as staging:
        yield staging
        saving.enter_context(progress("saving the export"))  # it ends after the commit of the folder


def _describe(
    source: RunSource, export: Export, type_name: str, staging: Path, outcome: dict[str, Any], used: str = ""
) -> None:
    """Write the prompt contract, the result of the comparison and the model card, with another usage if `used`."""
    if export.reader == "llama.cpp" and not export.is_adapter:
        from lorafit.export.gguf_types import fallbacks

        if other := fallbacks(source, type_name):
            outcome["other_types"] = other
    prompt = source.contract
    if not export.is_adapter and (staging / "tokenizer.json").is_file():  # it is its own model now
        prompt = replace(prompt, tokenizer_sha256=Tokenizer.from_folder(staging).sha256)
    write_json(staging / PROMPT, prompt.to_json())
    write_json(staging / parity.FILE, outcome)
    (staging / CARD).write_text(card(source, export, type_name, staging, outcome, used), encoding="utf-8")


def _exported(folder: Path, kind: str, type_name: str, outcome: Mapping[str, Any]) -> Exported:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(folder, kind, type_name, files, outcome)


def _facts(source: RunSource, kind: str, type_name: str) -> dict[str, Any]:
    return {
        "export": kind,
        "type": type_name,
        "lorafit": __version__,
        "prompt_contract": source.contract.hash,
        "base_model": fingerprint(source.base.path),
        "adapter": sha256_file(source.adapter / WEIGHTS),
    }


def _longest(source: RunSource, export: Export) -> int:
    """The most tokens that the program which reads the export computes as lorafit does."""
    has_windows = READERS[export.reader].has_windows
    return source.arch.max_position_embeddings if has_windows else source.arch.shortest_window


def reference_of(source: RunSource, export: Export, type_name: str) -> Reference:
    """The live adapter's answers and loss, for an export of this type."""
    longest = _longest(source, export)
    rows, calibration = rows_of(source, longest)
    rounding = rounding_of_base(source) if _is_on_file(source, export) else export.rounding(type_name)
    with progress("computing the adapter's answers") as advance:
        some = calibration if TYPES[type_name].profits else ()
        return make_reference(source, rows, rounding, longest, advance, some)


def _is_on_file(source: RunSource, export: Export) -> bool:
    """Whether the program that reads an adapter puts it on the GGUF file of its training."""
    return export.base_of is not None and base_file(source) is not None


def _calibrated(source: RunSource, export: Export) -> RunSource:
    """The source with the importance of its columns."""
    _, calibration = rows_of(source, _longest(source, export))
    with progress("measuring the importance of columns") as advance:
        return replace(source, importance=importance_of(source, calibration, advance))


def _verify(
    source: RunSource, reference: Reference, export: Export, type_name: str, staging: Path
) -> dict[str, Any]:
    """What parity.json says of the export in `staging`. Raises a LorafitError naming every difference."""
    if faults := export.faults(source, reference.prompts, staging):
        raise LorafitError.of(Problem(fault, MODELFILE) for fault in faults)
    if why := parity.missing(export):
        return parity.unverified(why)
    with (
        progress("reading the export back") as advance,
        tempfile.TemporaryDirectory(prefix="lorafit-") as scratch,
    ):
        base = None if export.base_of is None else export.base_of(source, Path(scratch) / "base.gguf")
        result, scores = parity.read_back(source, reference, export, staging, base, advance)
    record = record_of_base(reference) if _is_on_file(source, export) else TYPES[type_name]
    return parity.outcome(source, reference, export, record, result, scores)


def _made_before(source: RunSource, type_name: str, facts: Mapping[str, Any]) -> Path | None:
    """The verified `gguf` export of this adapter in the run's own folder, whole as it was written; None if none."""
    folder = source.run.exports / f"gguf-{type_name}"
    if source.config is None or not (folder / MANIFEST).is_file():
        return None
    with progress("reading the GGUF file of an earlier export"):
        is_same = not verify_folder(folder) and read_facts(folder) == {**facts, "export": "gguf"}
    return folder if is_same and _outcome_of(folder)["verified"] else None


def _outcome_of(folder: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((folder / parity.FILE).read_text(encoding="utf-8"))
    return outcome

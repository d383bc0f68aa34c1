"""What an export starts from: a run's base model, adapter and prompt contract, checked against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafit.config.schema import Config
from lorafit.data.prompt import PromptContract, Renderer
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ModelError, Problem, RunError
from lorafit.hub.client import ModelFolder, model_folder
from lorafit.model.adapter_file import WEIGHTS, adapted_modules, module_tensors, read_spec
from lorafit.model.architecture import Architecture, read_architecture
from lorafit.model.dtypes import BY_SAFETENSORS_NAME
from lorafit.model.lora import VARIANTS, LoraSpec
from lorafit.model.weights import fingerprint, weight_files
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts

_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the base model: the file that holds it, under which name, and what it is there."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class RunSource:
    """A run with all that its exports are made of. `weights` are by Hugging Face names, in the files' order."""

    run: RunDirectory
    config: Config
    base: ModelFolder
    arch: Architecture
    adapter: Path
    step: int
    spec: LoraSpec
    renderer: Renderer
    weights: dict[str, Stored]
    adapted: frozenset[str]

    @property
    def contract(self) -> PromptContract:
        """How the run renders prompts."""
        return self.renderer.contract

    @property
    def name(self) -> str:
        """A name for files, from the run's folder."""
        return (
            "".join(c if c.isalnum() or c in "._-" else "-" for c in self.run.path.resolve().name) or "model"
        )

    @property
    def base_name(self) -> str:
        """The base model by its hub id or, for a local folder, the folder's name alone: paths are nobody's business."""
        return self.config.model.name if self.base.revision is not None else self.base.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the base's numbers are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for stored in self.weights.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    def tensor(self, name: str, *, merged: bool = True) -> Tensor:
        """A weight: with the adapter merged in float32 if it is adapted and `merged`, else as it is stored.

        The file is open for this tensor only, so no more than one is in memory.
        """
        stored = self.weights[name]
        with safe_open(stored.file, framework="pt", device="cpu") as file:
            weight: Tensor = file.get_tensor(stored.stored_name).clone()
        if not merged or name not in self.adapted:
            return weight
        return VARIANTS[self.spec.variant].merge(weight, self.factors(name), self.spec.scale)

    def factors(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors of a weight by part: `lora_A` (rank, in_features), `lora_B` (out_features, rank)."""
        return module_tensors(self.adapter, name.removesuffix(".weight"))


def open_source(path: str | Path, *, offline: bool = False) -> RunSource:
    """The run at `path` with its newest adapter. Raises a LorafitError where anything is missing, damaged or another.

    The base must be the very one that the adapter was trained on, and not a quantised copy of it.
    """
    run = RunDirectory.open(path)
    config = run.config()
    adapter = run.newest_adapter()
    base = model_folder(
        config.model.name, revision=config.model.revision, offline=offline or config.run.offline
    )
    facts = read_facts(adapter)
    if facts.get("base_model", fingerprint(base.path)) != fingerprint(base.path):
        raise RunError(
            "the base model is not the one that the adapter was trained on: its files have changed",
            place=str(base.path),
            hint="put the model of the run back; an adapter on another base answers anything",
        )
    arch = read_architecture(base.path)
    prompt = PromptContract.from_json(run.read_json(run.prompt_file))
    if (largest := max(prompt.bos_id or 0, prompt.eos_id or 0, *prompt.stop_ids, 0)) >= arch.vocab_size:
        raise RunError(
            f"token {largest} has no embedding: the model has {arch.vocab_size}",
            place=str(run.prompt_file),
            hint="the file was changed by something else; train the run anew",
        )
    weights = _weights(base.path, arch)
    return RunSource(
        run=run,
        config=config,
        base=base,
        arch=arch,
        adapter=adapter,
        step=int(facts.get("step", 0)),
        spec=read_spec(adapter),
        renderer=Renderer(prompt, Tokenizer.from_folder(base.path)),
        weights=weights,
        adapted=_adapted(adapter, weights),
    )


def _weights(folder: Path, arch: Architecture) -> dict[str, Stored]:
    """All tensors of a base model; a tied head is the embedding."""
    found = dict(_stored(folder))
    if arch.tie_word_embeddings and _HEAD in found:
        head = found.pop(_HEAD)
        found.setdefault(_TABLE, head)
    return found


def _stored(folder: Path) -> Iterator[tuple[str, Stored]]:
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118, not a mapping
                    part = file.get_slice(name)
                    dtype = BY_SAFETENSORS_NAME.get(part.get_dtype())
                    if dtype is None:
                        raise ModelError(
                            f"weight `{name}` is {part.get_dtype()}: adapters are merged into 16 or 32 bits only",
                            place=str(path),
                            hint="give the original checkpoint; merging into a quantised copy rounds the adapter away",
                        )
                    if not name.endswith("rotary_emb.inv_freq"):
                        yield name, Stored(path, name, tuple(part.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"weights cannot be read: {error}", place=str(path), hint="download the file again"
            ) from None


def _adapted(adapter: Path, weights: dict[str, Stored]) -> frozenset[str]:
    """The weights that the adapter changes. Raises ModelError naming those that the base does not have."""
    names = {f"{module}.weight" for module in adapted_modules(adapter)}
    if unknown := sorted(names - weights.keys()):
        raise ModelError.of(
            Problem(
                f"the adapter changes `{name}`, which the base model does not have", str(adapter / WEIGHTS)
            )
            for name in unknown
        )
    return frozenset(names)

"""The source of an export: a run's base model, adapter and prompt contract, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorafit.config.schema import Config
from lorafit.data.prompt import PromptContract, Renderer
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ModelError, Problem, RunError
from lorafit.hub.client import ModelFolder
from lorafit.model.adapter_file import WEIGHTS, adapted_modules, module_tensors, read_spec
from lorafit.model.architecture import Architecture, read_architecture
from lorafit.model.build import base_folder
from lorafit.model.dtypes import BY_SAFETENSORS_NAME
from lorafit.model.lora import VARIANTS, LoraSpec
from lorafit.model.weights import StoredTensor, fingerprint, stored_tensors
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts


@dataclass(frozen=True, slots=True)
class RunSource:
    """A run and the parts of its exports. `weights` are by Hugging Face names, in the files' order."""

    run: RunDirectory
    config: Config
    base: ModelFolder
    arch: Architecture
    adapter: Path
    step: int
    spec: LoraSpec
    renderer: Renderer
    weights: dict[str, StoredTensor]
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
        """The base model's hub id, or the name of its folder alone: exports contain no paths of this machine."""
        return self.config.model.name if self.base.revision is not None else self.base.path.resolve().name

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the base's numbers are stored in."""
        sizes: dict[str, int] = {}
        for stored in self.weights.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return BY_SAFETENSORS_NAME[max(sizes, key=lambda name: sizes[name])]

    def tensor(self, name: str, *, merged: bool = True) -> Tensor:
        """A weight: with the adapter merged in float32 if it is adapted and `merged`, else as it is stored."""
        weight = self.weights[name].read()
        if not merged or name not in self.adapted:
            return weight
        return VARIANTS[self.spec.variant].merge(weight, self.factors(name), self.spec.scale)

    def factors(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors of a weight by part: `lora_A` (rank, in_features), `lora_B` (out_features, rank)."""
        return module_tensors(self.adapter, name.removesuffix(".weight"))


def open_source(path: str | Path, *, offline: bool = False) -> RunSource:
    """The run at `path` with its newest adapter. Raises a LorafitError if a part is missing, damaged or changed.

    The base must be the one that the adapter was trained on, and not quantised.
    """
    run = RunDirectory.open(path)
    config = run.config()
    adapter = run.newest_adapter()
    base = base_folder(config, offline=offline)
    facts = read_facts(adapter)
    if facts.get("base_model", fingerprint(base.path)) != fingerprint(base.path):
        raise RunError(
            "the base model is not the one that the adapter was trained on: its files have changed",
            place=str(base.path),
            hint="restore the model of the run; the adapter is of no use on another base",
        )
    arch = read_architecture(base.path)
    prompt = PromptContract.from_json(run.read_json(run.prompt_file))
    if (largest := max(prompt.bos_id or 0, prompt.eos_id or 0, *prompt.stop_ids, 0)) >= arch.vocab_size:
        raise RunError(
            f"token {largest} has no embedding: the model has {arch.vocab_size}",
            place=str(run.prompt_file),
            hint="another program changed the file; train again",
        )
    weights = stored_tensors(base.path, arch)
    for name, stored in weights.items():
        if stored.dtype not in BY_SAFETENSORS_NAME:
            raise ModelError(
                f"weight `{name}` is {stored.dtype}: adapters are merged into 16 or 32 bits only",
                place=str(stored.file),
                hint="give the original checkpoint; a merge into a quantised copy rounds the adapter away",
            )
    adapted = frozenset(f"{module}.weight" for module in adapted_modules(adapter))
    if unknown := sorted(adapted - weights.keys()):
        raise ModelError.of(
            Problem(
                f"the adapter changes `{name}`, which the base model does not have", str(adapter / WEIGHTS)
            )
            for name in unknown
        )
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
        adapted=adapted,
    )

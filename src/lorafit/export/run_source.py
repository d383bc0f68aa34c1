"""The source of an export: a run's base model, adapter and prompt contract, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lorafit.config.schema import Config
from lorafit.data.prompt import PromptContract, Renderer
from lorafit.errors import ModelError, RunError, several
from lorafit.gguf_file.folder import gguf_file_of
from lorafit.hub.client import ModelFolder, model_folder
from lorafit.infer.model import find_source
from lorafit.model.adapter_file import CONFIG, WEIGHTS
from lorafit.model.architecture import Architecture, read_architecture
from lorafit.model.base_check import check_base
from lorafit.model.dtypes import BY_SAFETENSORS_NAME
from lorafit.model.saved_adapter import HEAD, SavedAdapter, read_adapter
from lorafit.model.stored_tensor import StoredTensor
from lorafit.model.tables import grown
from lorafit.model.weights import stored_weights
from lorafit.observe.progress import progress
from lorafit.redact import logger_of
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import MANIFEST, read_facts

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class RunSource:
    """A run or an adapter, and the parts of its exports. `weights` are by Hugging Face names, in the files' order.

    `left_out` are the tensors of towers for images or sound, which a merged model has as the base has them.
    `importance` has, for weights of which it is known, a number (width,) per column: how much its errors count in a
    type that rounds in blocks.
    """

    run: RunDirectory  # or the adapter's folder, where no run of lorafit made it
    config: Config | None
    base: ModelFolder
    arch: Architecture
    adapter: Path
    step: int
    saved: SavedAdapter
    renderer: Renderer
    weights: dict[str, StoredTensor]
    left_out: dict[str, StoredTensor] = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def contract(self) -> PromptContract:
        """How the run renders prompts."""
        return self.renderer.contract

    @property
    def name(self) -> str:
        """A name for files, from the run's folder."""
        name = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.run.path.resolve().name)
        return name.lstrip("-.") or "model"  # `-` would begin an option

    @property
    def base_name(self) -> str:
        """The base model's hub id, or the name of its folder alone: exports contain no paths of this machine."""
        if self.base.revision is not None:
            return self.base.name
        return (gguf_file_of(self.base.path) or self.base.path.resolve()).name

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the base's numbers are stored in."""
        sizes: dict[str, int] = {}
        for stored in self.weights.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return BY_SAFETENSORS_NAME[max(sizes, key=lambda name: sizes[name])]

    def tensor(self, name: str, *, merged: bool = True) -> Tensor:
        """A weight: with the adapter merged in float32 if it is adapted and `merged`, else as it is stored."""
        stored = (self.weights | self.left_out)[name]
        weight = stored.read()
        weight = self.saved.merged(name, weight) if merged and name in self.saved.changes else weight
        return grown(weight, stored.shape[0]) if name in self.tables else weight

    @property
    def tables(self) -> tuple[str, str]:
        """The names of embedding and head."""
        return f"{self.arch.embedding}.weight", f"{HEAD}.weight"


def open_source(path: str | Path, *, offline: bool = False) -> RunSource:
    """The adapter at `path`, or the newest of the run there. Raises a LorafitError if a part is missing or damaged.

    The base must be the one that the adapter was trained on, and not quantised.
    """
    folder = Path(path).expanduser()
    is_run = (folder / "config.yaml").is_file() or not (folder / CONFIG).is_file()
    run = RunDirectory.open(path) if is_run else RunDirectory(folder)
    found = find_source(folder, offline=offline)
    if (adapter := found.adapter) is None:
        raise ModelError("there is no adapter to export", place=str(path))
    config = run.config() if is_run else None
    base = model_folder(found.base, revision=found.revision, offline=found.offline)
    facts = read_facts(adapter) if (adapter / MANIFEST).is_file() else {}
    if note := check_base(adapter, base.path, found.base):
        logger.warning("note: %s", note)
    arch = read_architecture(base.path)
    saved = read_adapter(adapter)
    arch = replace(arch, vocab_size=saved.vocabulary(arch))
    with progress("reading the tokenizer"):
        renderer = found.renderer(base.path)
    prompt = renderer.contract
    if (largest := max(prompt.bos_id or 0, prompt.eos_id or 0, *prompt.stop_ids, 0)) >= arch.vocab_size:
        raise RunError(
            f"token {largest} has no embedding: the model has {arch.vocab_size}",
            place=str(run.prompt_file),
            hint="another program changed the file; train again",
        )
    stored_parts = stored_weights(base.path, arch)
    weights = stored_parts.network
    for name, stored in (weights | stored_parts.left_out).items():
        if stored.dtype not in BY_SAFETENSORS_NAME:
            raise ModelError(
                f"weight `{name}` is {stored.dtype}: adapters are merged into 16 or 32 bits only",
                place=str(stored.file),
                hint="give the original checkpoint; a merge into a quantised copy rounds the adapter away",
            )
    if saved.unties(arch):
        arch = replace(arch, tie_word_embeddings=False)
        weights[f"{HEAD}.weight"] = weights[f"{arch.embedding}.weight"]
    for table in (f"{arch.embedding}.weight", f"{HEAD}.weight"):  # with the rows of new tokens
        if table in weights:
            weights[table] = replace(weights[table], shape=(arch.vocab_size, *weights[table].shape[1:]))
    if unknown := sorted(saved.changes - weights.keys()):
        message = f"the adapter changes {several(unknown)}, which the base model does not have"
        raise ModelError(message, place=str(adapter / WEIGHTS))
    return RunSource(
        run=run,
        config=config,
        base=base,
        arch=arch,
        adapter=adapter,
        step=int(facts.get("step", 0)),
        saved=saved,
        renderer=renderer,
        weights=weights,
        left_out=stored_parts.left_out,
    )

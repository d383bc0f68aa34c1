"""What `lorafit eval` measures: base, adapter and exports of a run on its held-out rows and on tasks with answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit.data.build import build_data
from lorafit.data.packing import Pack, Packer
from lorafit.errors import RunError
from lorafit.evaluate.heldout import heldout_loss
from lorafit.evaluate.tasks import Score, Task, read_tasks, score
from lorafit.hub.client import model_folder
from lorafit.infer.model import Model, load
from lorafit.model.architecture import read_architecture
from lorafit.model.device import DTYPES
from lorafit.model.lora import disable_adapter
from lorafit.model.quant import Quantize
from lorafit.observe.progress import progress
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import MANIFEST, read_facts, verify_folder


@dataclass(frozen=True, slots=True)
class Measured:
    """One model's results. `loss` is None where the run held no rows out; `scores` are by file of tasks."""

    model: str  # base, adapter, or the folder of an export
    loss: float | None
    tokens: int
    scores: Mapping[str, Score]

    @property
    def perplexity(self) -> float | None:
        """e to the loss; None where there is none, or beyond a float."""
        return math.exp(self.loss) if self.loss is not None and self.loss < 700 else None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        scores = {name: asdict(found) for name, found in self.scores.items()}
        numbers = {"heldout_loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}
        return {"model": self.model, **numbers, "tasks": scores}


def evaluate_run(
    path: str | Path,
    *,
    exports: Sequence[str | Path] = (),
    tasks: Sequence[str | Path] = (),
    max_tokens: int = 256,
    quantize: Quantize | None = None,
    offline: bool = False,
) -> list[Measured]:
    """Measure the base, the adapter and merged exports of a run. Raises a LorafitError.

    The held-out rows are those of the training: RunError where the files of the run have others now. The base's
    linears are held as in training unless `quantize` says otherwise; an export is computed in the type it is in.
    """
    read = {str(file): read_tasks(Path(file)) for file in tasks}
    run = RunDirectory.open(path)
    folders = [_merged(Path(folder)) for folder in exports]
    packs = _heldout(run, offline)
    model = load(run.path, quantize=quantize, offline=offline)
    measured = [
        _measure(model, "base", packs, read, max_tokens, base=True),
        _measure(model, "adapter", packs, read, max_tokens),
    ]
    renderer = model.renderer
    del model
    for folder in folders:
        network = load(folder, dtype=_type(folder), offline=True).network
        measured.append(_measure(Model(network, renderer), str(folder), packs, read, max_tokens))
    return measured


def _merged(folder: Path) -> Path:
    """The folder of a merged export; RunError for anything else, or a damaged one."""
    if (folder / MANIFEST).is_file() and (faults := verify_folder(folder, may_have_more=True)):
        raise RunError(f"the export is damaged: {faults[0]}", place=str(folder))
    if not (folder / "config.json").is_file():
        raise RunError(
            f"`{folder}` is no merged model",
            hint="`lorafit export RUN merged` makes one; GGUF files and adapters are compared when they are exported",
        )
    return folder


def _type(folder: Path) -> str:
    """The type that a merged export is in."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("torch_dtype")
    return found if found in DTYPES else "auto"


def _heldout(run: RunDirectory, offline: bool) -> list[Pack]:
    """The packs of the rows that were held out of training."""
    config = run.config()
    base = model_folder(
        config.model.name, revision=config.model.revision, offline=offline or config.run.offline
    )
    training_data = build_data(config, base, read_architecture(base.path), quiet=False)
    adapter = run.newest_adapter()
    if read_facts(adapter).get("data", training_data.digest()) != training_data.digest():
        raise RunError(
            "the rows are not those of the training any more: no loss on them would tell anything",
            place=", ".join(config.data.path),
            hint="put the files back as they were",
        )
    rows = [training_data.heldout.row(index) for index in range(len(training_data.heldout))]
    return Packer(config.train.micro_batch_tokens, config.data.packing).packs(rows)


def _measure(
    model: Model,
    name: str,
    packs: Sequence[Pack],
    tasks: Mapping[str, Sequence[Task]],
    max_tokens: int,
    *,
    base: bool = False,
) -> Measured:
    loss, tokens = None, sum(len(pack.targets) for pack in packs)
    if tokens:
        with disable_adapter(model.network, when=base), progress(f"measuring {name}") as advance:
            loss = heldout_loss(model.network, packs, advance)
    scores = {}
    for file, asked in tasks.items():
        with progress(f"asking {name}"):
            scores[file] = score(model, asked, max_tokens=max_tokens, base=base)
    return Measured(name, loss, tokens, scores)

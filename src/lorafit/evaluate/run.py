"""`lorafit eval`: measures base, adapter and exports of a run, on its held-out rows and on tasks with answers."""

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
from lorafit.infer.model import Model, load
from lorafit.model.architecture import read_architecture
from lorafit.model.build import base_folder
from lorafit.model.dtypes import DTYPES
from lorafit.model.lora import disable_adapter
from lorafit.model.quant import Quantize
from lorafit.observe.console import note
from lorafit.observe.progress import progress
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import check_manifest, read_facts


@dataclass(frozen=True, slots=True)
class ModelResult:
    """The results of one model. `loss` is None for a run without held-out rows, or one that trained them in the end.

    The keys of `scores` are task files.
    """

    model: str  # base, adapter, or the folder of an export
    loss: float | None
    tokens: int
    scores: Mapping[str, Score]

    @property
    def perplexity(self) -> float | None:
        """e to the power of the loss; None without a loss, or where it is too large for a float."""
        return math.exp(self.loss) if self.loss is not None and self.loss < 700 else None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        scores = {name: asdict(score) for name, score in self.scores.items()}
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
    other_base: bool = False,
) -> list[ModelResult]:
    """Measure the base, the adapter and merged exports of a run. Raises a LorafitError.

    The held-out rows are those of the training: RunError where the data files have changed. Without `quantize`, the
    base has the quantization of the training. `other_base` accepts a base that has changed. An export is computed in
    the type of its weights.
    """
    task_files = {str(file): read_tasks(Path(file)) for file in tasks}
    run = RunDirectory.open(path)
    folders = [_merged(Path(folder)) for folder in exports]
    packs = _heldout(run, offline)
    model = load(run.path, quantize=quantize, offline=offline, other_base=other_base)
    measured = [
        _measure(model, "base", packs, task_files, max_tokens, base=True),
        _measure(model, "adapter", packs, task_files, max_tokens),
    ]
    renderer = model.renderer
    del model
    for folder in folders:
        network = load(folder, dtype=_type(folder), offline=True).network
        measured.append(_measure(Model(network, renderer), str(folder), packs, task_files, max_tokens))
    return measured


def table_of(results: Sequence[ModelResult]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table with one row per model."""
    headers = ["model", "held-out loss", "perplexity"]
    for file in results[0].scores:
        headers += [Path(file).name, "ended"]
    rows = []
    for result in results:
        numbers = ("-" if n is None else f"{n:.4f}" for n in (result.loss, result.perplexity))
        row = [result.model, *numbers]
        for task_score in result.scores.values():
            row += [f"{task_score.right} of {task_score.total}", f"{task_score.ended}"]
        rows.append(row)
    return headers, rows


def _merged(folder: Path) -> Path:
    """The folder of a merged export; RunError for anything else, or a damaged one."""
    check_manifest(folder, "the export")
    if not (folder / "config.json").is_file():
        raise RunError(
            f"`{folder}` is not a merged model",
            hint="`lorafit export RUN merged` writes one; other kinds are verified by the export itself",
        )
    return folder


def _type(folder: Path) -> str:
    """The type of the weights of a merged export."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("torch_dtype")
    return name if name in DTYPES else "auto"


def _heldout(run: RunDirectory, offline: bool) -> list[Pack]:
    """The packs of the held-out rows."""
    config = run.config()
    base = base_folder(config, offline=offline)
    training_data = build_data(config, base, read_architecture(base.path), quiet=False)
    adapter = run.newest_adapter()
    if read_facts(adapter).get("data", training_data.digest()) != training_data.digest():
        raise RunError(
            "the rows have changed since the training: a loss on them cannot be compared",
            place=", ".join(config.data.path),
            hint="restore the data files of the training",
        )
    if training_data.was_refit(read_facts(adapter)):
        note("no held-out loss: the run ended by training on all rows (train.refit)")
        return []
    if not len(training_data.heldout):
        note("no held-out loss: no row was held out (data.holdout)")
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
) -> ModelResult:
    loss, tokens = None, sum(len(pack.targets) for pack in packs)
    if tokens:
        with disable_adapter(model.network, when=base), progress(f"measuring {name}") as advance:
            loss = heldout_loss(model.network, packs, advance)
    scores = {}
    for file, tasks_of_file in tasks.items():
        with progress(f"answering the tasks with {name}"):
            scores[file] = score(model, tasks_of_file, max_tokens=max_tokens, base=base)
    return ModelResult(name, loss, tokens, scores)

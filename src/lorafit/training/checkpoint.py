"""Checkpoints: everything that a run needs to resume to the same bytes, in safetensors and JSON, in one folder."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lorafit.config.load import with_absolute_paths
from lorafit.config.schema import with_defaults
from lorafit.data.tokenizer_files import FILES as TOKENIZER
from lorafit.errors import Problem, RunError
from lorafit.model.adamw import AdamW
from lorafit.model.adapter_file import CONFIG, WEIGHTS, adapter_files, adapter_tensors, fill_adapter
from lorafit.model.llama import Llama
from lorafit.model.lora import adapter_parameters
from lorafit.model.weights import is_fingerprint_of
from lorafit.storage.atomic import commit_files, read_facts, run_error, verify_folder
from lorafit.storage.safe_read import MB, parse_json, read_json
from lorafit.training.loss_scale import LossScale
from lorafit.training.pace import Budget
from lorafit.training.setup import Prepared

STATE, TENSORS = "state.json", "state.safetensors"
FILES = (WEIGHTS, TENSORS, STATE)  # what `load_checkpoint` needs
MAX_STATE = MB
# Raised by reading and restoring where files only look like a checkpoint.
_OF_OTHER_VALUES = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError),
    SafetensorError,
)


@dataclass(slots=True)
class TrainState:
    """Everything that changes during training, apart from tensors.

    The row order is a function of the seed and `step`, so `step` is the data cursor too.
    """

    step: int = 0
    last_loss: float | None = None
    base_loss: float | None = None
    best_loss: float | None = None  # at `best_step`
    best_step: int | None = None
    lowest_loss: float | None = None  # at any step; None is `best_loss`
    num_worse: int = 0  # held-out measurements since the best one
    measuring_due: bool = False  # stopped between a step and its held-out measurement
    micro_batch_tokens: int | None = None  # smaller than the config's since memory ran out
    scale: LossScale = field(default_factory=LossScale)
    refit_from: int | None = None  # the last step of the first phase, in the second one (training/refit.py)
    refit_steps: int = 0  # of the second phase
    chosen_step: int | None = None  # of the first phase, which decided `refit_steps`
    too_far: bool = False  # the drift was above `train.max_drift`
    budget: Budget | None = None  # of a run whose length is a time

    def measured(self, loss: float, tolerance: float) -> bool:
        """Count the held-out loss of this step; True where it is less than (1 + `tolerance`) times the lowest one."""
        lowest = self.best_loss if self.lowest_loss is None else self.lowest_loss
        better = lowest is None or loss < lowest * (1 + tolerance)
        self.lowest_loss = loss if lowest is None else min(lowest, loss)
        self.num_worse = 0 if better else self.num_worse + 1
        if better:
            self.best_loss, self.best_step = loss, self.step
        return better

    def early_stopped(self, patience: int) -> bool:
        """Whether the held-out loss has not fallen for `patience` measurements in a row (0 is never), or the drift is
        too large.
        """
        return self.too_far or 0 < patience <= self.num_worse


_STATE = TypeAdapter(TrainState)


def snapshot(prepared: Prepared, optimizer: AdamW, state: TrainState) -> dict[str, bytes]:
    """Copy everything that the next step changes, as the bytes of files, so that training continues meanwhile."""
    network, spec = prepared.built.network, prepared.built.spec
    values = asdict(state) | {"python_random": random.getstate()}
    base, revision = with_absolute_paths(prepared.config).model.name, prepared.data.base.revision
    files = adapter_files(adapter_tensors(network), spec, base, revision)
    files |= prepared.data.training_data.tokenizer.files
    files[TENSORS] = save(_optimizer_tensors(network, optimizer) | _random_tensors())
    files[STATE] = (json.dumps(values) + "\n").encode()
    return files


def adapter_digest(network: Llama) -> bytes:
    """SHA-256 of the adapter's numbers."""
    digest = hashlib.sha256()
    for tensor in adapter_tensors(network).values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def load_checkpoint(files: Mapping[str, bytes], place: Path, network: Llama, optimizer: AdamW) -> TrainState:
    """Restore network, optimizer and random generators from a checkpoint's files, read at `place`; returns the rest.

    Raises RunError where they are not those of a checkpoint.
    """
    try:
        weights, tensors, values = load(files[WEIGHTS]), load(files[TENSORS]), parse_json(files[STATE])
        _restore_optimizer(network, optimizer, tensors)
        version, numbers, gauss = values["python_random"]
        random.setstate((version, tuple(numbers), gauss))
        _restore_random(tensors)
        state = state_of(values)
    except _OF_OTHER_VALUES as error:
        raise _other_values(place) from error
    fill_adapter(network, weights, place)
    return state


def read_state(folder: Path) -> TrainState:
    """The plain values of a verified checkpoint. Raises RunError where they are not those of a checkpoint."""
    try:
        return state_of(read_json(folder / STATE, MAX_STATE))
    except _OF_OTHER_VALUES as error:
        raise _other_values(folder) from error


def state_of(values: Mapping[str, Any]) -> TrainState:
    """The state from JSON values. Raises ValueError or TypeError where they are not valid."""
    state = _STATE.validate_python({key: value for key, value in values.items() if key != "python_random"})
    if state.step < 1 or (state.micro_batch_tokens or 1) < 1:
        raise ValueError
    return state


def _other_values(folder: Path) -> RunError:
    """The error for a checkpoint whose manifest verifies and whose content is not a run's state."""
    hint = "remove it; the one before is taken then, or start a new run"
    return RunError("the checkpoint does not hold what lorafit writes", place=str(folder), hint=hint)


def changes(folder: Path, facts: Mapping[str, Any], base: Path) -> list[str]:
    """What of a run (base model, data, prompt contract, config ...) differs from its checkpoint, one line each.

    `base` is the folder of the base model: checkpoints of version 0.1 have another fingerprint of it. Other steps
    follow from another config or other rows: they are named where nothing else differs.
    """
    stored = read_facts(folder)
    lines: list[str] = []
    for name, value in sorted(facts.items(), key=lambda fact: fact[0] == "steps"):
        was = stored.get(name)
        if isinstance(value, Mapping):
            was = was if isinstance(was, Mapping) else {}
            lines += differences(with_defaults(was) if name == "config" and was else was, value)
        elif was == value or (name == "steps" and lines):
            continue
        elif not (name == "base_model" and is_fingerprint_of(was, base)):
            lines.append(f"the {name.replace('_', ' ')} changed: was {_short(was)}, is {_short(value)}")
    return lines


def differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ, one line each."""
    return [
        f"{prefix}{key} changed: was {_short(was.get(key))}, is {_short(now.get(key))}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def refuse_changes(folder: Path, different: Sequence[str]) -> None:
    """Raise RunError where anything is `different` between a run and its checkpoint in `folder`."""
    if different:
        hint = (
            "restore what the run was started with, accept the changes with --accept-changes, or start a new "
            "run with lora.init_from=.../adapter"
        )
        raise RunError.of([*map(Problem, different[:-1]), Problem(different[-1], str(folder), hint)])


def export_adapter(
    folder: Path, checkpoint: Path, prompt: Path, facts: Mapping[str, Any], check: Callable[[], None]
) -> None:
    """Commit the PEFT folder of a checkpoint as the run's final adapter: verified, copied, compared byte for byte.

    `prompt` is the file of the prompt contract, which it carries. Raises RunError, also where `check` does: see
    `staging_folder`.
    """
    check()
    if faults := verify_folder(checkpoint):
        hint = "`lorafit train --resume` skips it and resumes from one that is whole"
        raise RunError(f"the checkpoint is damaged: {faults[0]}", place=str(checkpoint), hint=hint)
    with run_error("cannot be read", checkpoint):
        tokenizer = [checkpoint / name for name in TOKENIZER if (checkpoint / name).is_file()]
        paths = (checkpoint / CONFIG, checkpoint / WEIGHTS, prompt, *tokenizer)
        files = {path.name: path.read_bytes() for path in paths}
    commit_files(folder, files, facts, check)


def _optimizer_tensors(network: Llama, optimizer: AdamW) -> dict[str, Tensor]:
    return {
        f"optimizer.{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(network).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(network: Llama, optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in adapter_parameters(network).items():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if any(value.ndim and value.shape != parameter.shape for value in state.values()):
            raise ValueError(name)
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}


def seed_random(seed: int) -> None:
    """Seed every generator whose state a checkpoint holds."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _random_tensors() -> dict[str, Tensor]:
    """The state of every generator that training may use; numpy's legacy one is for third-party observers."""
    kind, numbers, *rest = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    tensors = {
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.from_numpy(np.asarray(numbers).astype(np.int64)),
        "random.numpy_rest": torch.tensor([float(value) for value in rest], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _restore_random(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    position, has_gauss, gauss = tensors["random.numpy_rest"].tolist()
    numbers = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numbers, int(position), int(has_gauss), gauss))
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if (state := tensors.get(f"random.cuda.{device}")) is not None:
            torch.cuda.set_rng_state(state, device)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."

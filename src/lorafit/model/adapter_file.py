"""Writes the PEFT adapter folder and fills an attached adapter from it. Checkpoints have the same format.

model/saved_adapter.py reads folders of other programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorafit.errors import ModelError, Problem, several
from lorafit.model.lora import VARIANTS, LoraSpec, adapted
from lorafit.model.tables import HEAD, TOKENS, stored_tables

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters under PEFT's names, detached, on the CPU; they share memory with the network's there."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in _stored(network).items()}


def _stored(network: nn.Module) -> dict[str, Tensor]:
    tables = {f"{PREFIX}{name}": rows for name, rows in stored_tables(network).items()}
    return tables | {
        f"{PREFIX}{name}.{part}.weight": tensor
        for name, module in adapted(network).items()
        for part, tensor in module.stored().items()
    }


def adapter_files(
    tensors: Mapping[str, Tensor], spec: LoraSpec, base: str, revision: str | None
) -> dict[str, bytes]:
    """The files of a folder that `peft.PeftModel.from_pretrained` loads; `base` is the base model in the user's words.

    `spec` is what `attach` returned: its targets name exactly the adapted modules.
    """
    spec = spec.saved()
    ranks = {name: rank for name, (rank, _) in spec.exceptions.items() if rank != spec.rank}
    alphas = {name: alpha for name, (_, alpha) in spec.exceptions.items() if alpha != spec.alpha}
    rows = [name.removesuffix(f".{TOKENS}") for name in tensors if name.endswith(TOKENS)]
    whole = [name.removesuffix(".weight") for name in tensors if ".lora_" not in name and TOKENS not in name]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": list(spec.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": [_last(name) for name in sorted(whole)] or None,
        **({"trainable_token_indices": {_last(name): list(spec.tokens) for name in rows}} if rows else {}),
        **({"rank_pattern": ranks} if ranks else {}),
        **({"alpha_pattern": alphas} if alphas else {}),
        **VARIANTS[spec.variant].peft_keys,
    }
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if own.get(f"{PREFIX}{HEAD}.weight") is not None:  # it may be the embedding, and a tensor is stored once
        own[f"{PREFIX}{HEAD}.weight"] = own[f"{PREFIX}{HEAD}.weight"].clone()
    weights = save(own, {"format": "pt"})
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def load_adapter(network: nn.Module, folder: Path) -> None:
    """Fill the attached adapter of `network` from a PEFT folder.

    Raises ModelError naming every tensor that is missing, unknown, of another shape, or not finite.
    """
    with open_weights(folder) as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    fill_adapter(network, stored, folder / WEIGHTS)


@contextmanager
def open_weights(folder: Path) -> Iterator[safe_open]:
    """The weights of an adapter folder. Raises ModelError if they are missing or cannot be read."""
    path = folder / WEIGHTS
    if not path.is_file():
        is_pickle = (folder / "adapter_model.bin").exists()
        hint = "lorafit reads safetensors only, never pickled adapters" if is_pickle else ""
        raise ModelError(f"there is no {WEIGHTS}", place=str(folder), hint=hint)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the adapter cannot be read: {error}", place=str(path)) from None


def fill_adapter(network: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    """Fill the attached adapter of `network` with tensors read at `path`. Raises ModelError as `load_adapter` does."""
    refuse_faults(stored, {name: list(tensor.shape) for name, tensor in _stored(network).items()}, path)
    with torch.no_grad():
        for name, module in adapted(network).items():
            module.fill({part: stored[f"{PREFIX}{name}.{part}.weight"] for part in module.parts})
        for name, rows in stored_tables(network).items():
            rows.copy_(stored[f"{PREFIX}{name}"])


def refuse_faults(stored: Mapping[str, Tensor], shapes: Mapping[str, list[int]], path: Path) -> None:
    """Raise ModelError if the tensors read at `path` are not those of `shapes`, by name, or not finite.

    A fault of many tensors is one line.
    """
    faults: dict[str, list[str]] = {}
    for name in sorted(shapes.keys() | stored.keys()):
        if name not in stored:
            faults.setdefault("{} is missing", []).append(name)
        elif name not in shapes:
            faults.setdefault("{} fits nothing in this model", []).append(name)
        elif (shape := list(stored[name].shape)) != shapes[name]:
            needed = f"{{}} has shape {shape}, the model needs {shapes[name]}"
            faults.setdefault(needed, []).append(name)
        elif not bool(torch.isfinite(stored[name]).all()):
            faults.setdefault("{} holds numbers that are not finite", []).append(name)
    if faults:
        raise ModelError.of(
            Problem("adapter tensor " + fault.format(several(names)), str(path))
            for fault, names in faults.items()
        )

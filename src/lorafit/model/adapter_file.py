"""Reads and writes the PEFT adapter folder. Checkpoints have the same format, so an export of the adapter is a copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorafit.errors import ModelError, Problem
from lorafit.model.lora import VARIANTS, LoraSpec, adapter_parameters
from lorafit.storage.safe_read import MB, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 16 * MB
PREFIX = "base_model.model."
# keys of a PEFT config that change results in ways that lorafit does not support, with the values that it accepts
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters under PEFT's names, detached, on the CPU; they share memory with the network's there."""
    return {
        f"{PREFIX}{name}.weight": parameter.detach().cpu().contiguous()
        for name, parameter in adapter_parameters(network).items()
    }


def adapter_files(
    tensors: Mapping[str, Tensor], spec: LoraSpec, base: str, revision: str | None
) -> dict[str, bytes]:
    """The files of a folder that `peft.PeftModel.from_pretrained` loads; `base` is the base model in the user's words.

    `spec` is what `attach` returned: its targets name exactly the adapted modules.
    """
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
        "modules_to_save": None,
        **VARIANTS[spec.variant].peft_keys,
    }
    weights = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def read_spec(folder: Path) -> LoraSpec:
    """The spec of a PEFT adapter folder. Raises ModelError naming each key that lorafit does not support."""
    path = folder / CONFIG
    try:
        raw = read_json(path, MAX_CONFIG)
        if not isinstance(raw, dict):
            raise TypeError
    except FileNotFoundError:
        raise ModelError(
            f"there is no {CONFIG}", place=str(folder), hint="give a PEFT adapter folder"
        ) from None
    except (OSError, ValueError, TypeError):
        raise ModelError(f"{CONFIG} cannot be read", place=str(path)) from None
    marked = [name for name, variant in VARIANTS.items() if variant.peft_keys.items() <= raw.items()]
    variant = max(marked, key=lambda name: len(VARIANTS[name].peft_keys))
    problems = [
        Problem(f"`{key}` is {raw[key]!r}, which lorafit does not train", str(path))
        for key, accepted in _UNSUPPORTED.items()
        if key in raw and raw[key] not in accepted and key not in VARIANTS[variant].peft_keys
    ]
    if raw.get("peft_type") != "LORA":
        problems.append(Problem(f"`peft_type` is {raw.get('peft_type')!r}, not LORA", str(path)))
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= 4096:
        problems.append(Problem(f"`r` is {rank!r}, not a rank", str(path)))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        problems.append(Problem(f"`lora_alpha` is {alpha!r}, not a positive number", str(path)))
    if targets == "all-linear":
        targets = [targets]
    elif isinstance(targets, str):
        targets = adapted_modules(folder)  # not by that regular expression: it may never end
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        problems.append(Problem("`target_modules` names no modules", str(path)))
    if problems:
        raise ModelError.of(problems)
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    assert isinstance(targets, list)
    dropout = raw.get("lora_dropout")
    return LoraSpec(
        rank=rank,
        alpha=float(alpha),
        dropout=float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0,
        targets=tuple(sorted(targets)),
        rslora=bool(raw.get("use_rslora")),
        variant=variant,
    )


def adapted_modules(folder: Path) -> list[str]:
    """The full names of the modules that an adapter has tensors for. Raises ModelError."""
    with _open(folder) as file:
        names = {name.removeprefix(PREFIX) for name in file.keys()}  # noqa: SIM118, not a mapping
    return sorted({name.partition(".lora_")[0] for name in names})


def module_tensors(folder: Path, module: str) -> dict[str, Tensor]:
    """The stored tensors of one module by part (`lora_A`), float32."""
    prefix = f"{PREFIX}{module}."
    with _open(folder) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118, not a mapping
        return {name[len(prefix) :].removesuffix(".weight"): file.get_tensor(name).float() for name in names}


def _open(folder: Path) -> safe_open:
    """The weights of an adapter folder. Raises ModelError if they are missing or cannot be read."""
    path = folder / WEIGHTS
    if not path.is_file():
        hint = (
            "lorafit reads safetensors only, never pickled adapters"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise ModelError(f"there is no {WEIGHTS}", place=str(folder), hint=hint)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the adapter cannot be read: {error}", place=str(path)) from None


def load_adapter(network: nn.Module, folder: Path) -> None:
    """Fill the attached adapter of `network` from a PEFT folder.

    Raises ModelError naming every tensor that is missing, unknown, of another shape, or not finite.
    """
    path = folder / WEIGHTS
    try:
        with _open(folder) as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise ModelError(f"the adapter cannot be read: {error}", place=str(path)) from None
    fill_adapter(network, stored, path)


def fill_adapter(network: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    """Fill the attached adapter of `network` with tensors read at `path`. Raises ModelError as `load_adapter` does."""
    parameters = {f"{PREFIX}{name}.weight": value for name, value in adapter_parameters(network).items()}
    faults = [f"`{name}` is missing" for name in parameters.keys() - stored.keys()]
    faults += [f"`{name}` fits nothing in this model" for name in stored.keys() - parameters.keys()]
    for name in parameters.keys() & stored.keys():
        if stored[name].shape != parameters[name].shape:
            shapes = f"{list(stored[name].shape)}, the model needs {list(parameters[name].shape)}"
            faults.append(f"`{name}` has shape {shapes}")
        elif not bool(torch.isfinite(stored[name]).all()):
            faults.append(f"`{name}` holds numbers that are not finite")
    if faults:
        raise ModelError.of(Problem(f"adapter tensor {fault}", str(path)) for fault in sorted(faults))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])

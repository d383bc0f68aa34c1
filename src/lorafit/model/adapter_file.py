"""The PEFT adapter folder, which is also the checkpoint's adapter format: an export is a copy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorafit.errors import ModelError, Problem
from lorafit.model.lora import LoraSpec, adapted
from lorafit.storage.safe_read import MB, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 16 * MB
_PREFIX = "base_model.model."
# keys of a PEFT config that change the mathematics in ways that lorafit does not do, with the values it accepts
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
    """The adapter's masters under PEFT's names, detached, on the CPU; there they share memory with the network's."""
    tensors = {}
    for name, module in adapted(network).items():
        for part in ("lora_A", "lora_B"):
            parameter: Tensor = getattr(module, part)
            tensors[f"{_PREFIX}{name}.{part}.weight"] = parameter.detach().cpu().contiguous()
    return tensors


def adapter_files(
    tensors: Mapping[str, Tensor], spec: LoraSpec, base: str, revision: str | None
) -> dict[str, bytes]:
    """The files of a folder that `peft.PeftModel.from_pretrained` loads; `base` is the base model as the user named it.

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
    }
    weights = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def read_spec(folder: Path) -> LoraSpec:
    """What a PEFT adapter folder holds. Raises ModelError naming each key that lorafit cannot honour."""
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
    problems = [
        Problem(f"`{key}` is {raw[key]!r}, which lorafit does not train", str(path))
        for key, accepted in _UNSUPPORTED.items()
        if key in raw and raw[key] not in accepted
    ]
    if raw.get("peft_type") != "LORA":
        problems.append(Problem(f"`peft_type` is {raw.get('peft_type')!r}, not LORA", str(path)))
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= 4096:
        problems.append(Problem(f"`r` is {rank!r}, not a rank", str(path)))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        problems.append(Problem(f"`lora_alpha` is {alpha!r}, not a positive number", str(path)))
    if isinstance(targets, str) and targets != "all-linear":
        targets = _adapted_modules(folder)  # not by that regular expression: it may take forever
    elif isinstance(targets, str):
        targets = [targets]
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
    )


def _adapted_modules(folder: Path) -> list[str]:
    """The full names of the modules that an adapter has tensors for."""
    with _opened(folder) as file:
        names = {name.removeprefix(_PREFIX) for name in file.keys()}  # noqa: SIM118, not a mapping
    return sorted({name.partition(".lora_")[0] for name in names})


def _opened(folder: Path) -> safe_open:
    """The weights of an adapter folder. Raises ModelError when there are none that can be read."""
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

    Raises ModelError naming every tensor that is missing, left over, of another shape, or not finite: an adapter
    that would load as something else than what was saved does not load.
    """
    path = folder / WEIGHTS
    try:
        with _opened(folder) as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except SafetensorError as error:
        raise ModelError(f"the adapter cannot be read: {error}", place=str(path)) from None
    fill_adapter(network, stored, path)


def fill_adapter(network: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    """Fill the attached adapter of `network` with tensors read at `path`. Raises ModelError as `load_adapter` does."""
    adapter_parameters = {
        f"{_PREFIX}{name}.{part}.weight": getattr(module, part)
        for name, module in adapted(network).items()
        for part in ("lora_A", "lora_B")
    }
    problems = [
        Problem(f"adapter tensor `{name}` is missing", str(path))
        for name in adapter_parameters.keys() - stored.keys()
    ]
    problems += [
        Problem(f"adapter tensor `{name}` fits nothing in this model", str(path))
        for name in stored.keys() - adapter_parameters.keys()
    ]
    for name in adapter_parameters.keys() & stored.keys():
        if stored[name].shape != adapter_parameters[name].shape:
            shapes = f"{list(stored[name].shape)}, the model needs {list(adapter_parameters[name].shape)}"
            problems.append(Problem(f"adapter tensor `{name}` has shape {shapes}", str(path)))
        elif not bool(torch.isfinite(stored[name]).all()):
            problems.append(Problem(f"adapter tensor `{name}` holds numbers that are not finite", str(path)))
    if problems:
        raise ModelError.of(sorted(problems, key=lambda problem: problem.message))
    with torch.no_grad():
        for name, parameter in adapter_parameters.items():
            parameter.copy_(stored[name])

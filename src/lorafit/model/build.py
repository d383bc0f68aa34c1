"""Config -> network with its adapter, in the one order: find, read, attach, fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafit.config.schema import Config, LoraSection
from lorafit.errors import ConfigError, ModelError, Problem
from lorafit.hub.client import ModelFolder, adapter_folder, model_folder
from lorafit.model.adapter_file import load_adapter, read_spec
from lorafit.model.architecture import read_architecture
from lorafit.model.device import pick_device, pick_dtype
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach, detach
from lorafit.model.memory import limit_onednn_cache, use_caching_allocator
from lorafit.model.quant import Quantize, check_quantize
from lorafit.model.weights import fingerprint, load_network
from lorafit.storage.atomic import MANIFEST, verify_folder


def base_folder(config: Config, *, offline: bool = False) -> ModelFolder:
    """The folder of the base model of `config`, as `model_folder`; `offline` in addition to the config's own."""
    model = config.model
    return model_folder(model.name, revision=model.revision, offline=offline or config.run.offline)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network ready to train or to answer, and what was decided on the way."""

    network: Llama
    spec: LoraSpec
    device: torch.device
    dtype: torch.dtype


class BaseModelCache:
    """A base that stays loaded from one run to the next, where it is the same one."""

    def __init__(self) -> None:
        self._what: tuple[object, ...] = ()
        self._network: Llama | None = None

    def get(self, what: tuple[object, ...], load: Callable[[], Llama]) -> Llama:
        """The base that `what` names, without adapter: the one from before, or loaded in its place."""
        gone = self._network is None or self._network.lm_head.weight.is_meta  # a proof gives the memory up
        if gone or self._what != what:
            self._network = None  # never two at a time
            self._network, self._what = load(), what
        assert self._network is not None
        detach(self._network)
        return self._network.eval()


def build(
    config: Config,
    folder: Path,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    on_host: bool = False,
    base: BaseModelCache | None = None,
) -> LoadedModel:
    """The base model in `folder` on `device` with a fresh adapter, or with the one of `lora.init_from` to continue.

    `on_host` leaves the tensors in the host's memory, whatever the device: somebody else shares them out. `base`
    keeps what is loaded for the next call.
    """
    arch = read_architecture(folder)
    dtype = pick_dtype(config.model.dtype, device)
    check_quantize(config.model.quantize, device, dtype)
    spec, initial = wanted_adapter(config)
    limit_onednn_cache()
    where = torch.device("cpu") if on_host else device
    quantize = config.model.quantize
    network = (base or BaseModelCache()).get(
        (folder.resolve(), fingerprint(folder), dtype, where, quantize),
        lambda: load_network(folder, arch, dtype, where, progress, quantize),
    )
    spec = attach(network, spec, config.train.seed)
    if initial is not None:
        load_adapter(network, initial)
    use_caching_allocator()
    return LoadedModel(network, spec, device, dtype)


def build_saved(
    folder: Path,
    adapter: Path | None,
    device: str,
    dtype: str,
    progress: Callable[[int, int], None] | None = None,
    quantize: Quantize = "none",
) -> tuple[Llama, torch.device]:
    """The base model in `folder` with a saved adapter on it (or none), to answer or measure with."""
    arch = read_architecture(folder)
    where = pick_device(device)
    spec = read_spec(adapter) if adapter is not None else None
    number = pick_dtype(dtype, where)
    check_quantize(quantize, where, number)
    limit_onednn_cache()
    network = load_network(folder, arch, number, where, progress, quantize)
    if adapter is not None and spec is not None:
        attach(network, spec, seed=0)
        load_adapter(network, adapter)
    return network.eval(), where


def wanted_adapter(config: Config) -> tuple[LoraSpec, Path | None]:
    """What the adapter will be, and the folder of the one that it continues."""
    if config.lora.init_from is None:
        return _asked_spec(config.lora), None
    initial = adapter_folder(config.lora.init_from, offline=config.run.offline).path
    if (initial / MANIFEST).is_file() and (faults := verify_folder(initial, may_have_more=True)):
        raise ModelError(f"the adapter to continue is damaged: {faults[0]}", place=str(initial))
    return _continued_spec(config.lora, read_spec(initial)), initial


def _asked_spec(lora: LoraSection) -> LoraSpec:
    return LoraSpec(lora.rank, lora.alpha, lora.dropout, lora.targets, lora.rslora)


def _continued_spec(lora: LoraSection, stored: LoraSpec) -> LoraSpec:
    """The stored adapter's spec with this run's dropout; a key that was asked for otherwise is an error."""
    asked = _asked_spec(lora)
    problems = [
        Problem(
            f"`lora.{key}` is {getattr(asked, key)}, but the adapter to continue has {getattr(stored, key)}",
            hint=f"leave `lora.{key}` out: `lora.init_from` decides it",
        )
        for key in ("rank", "alpha", "rslora")
        if key in lora.model_fields_set and getattr(asked, key) != getattr(stored, key)
    ]
    if "targets" in lora.model_fields_set and set(asked.targets) != set(stored.targets):
        problems.append(
            Problem(
                f"`lora.targets` is {', '.join(asked.targets)}, but the adapter to continue has "
                f"{', '.join(stored.targets)}",
                hint="leave `lora.targets` out: `lora.init_from` decides it",
            )
        )
    if problems:
        raise ConfigError.of(problems)
    return LoraSpec(stored.rank, stored.alpha, lora.dropout, stored.targets, stored.rslora)

"""Builds the network with its adapter from a config: find, read, attach, fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorafit.config.schema import Config, Offload
from lorafit.errors import ConfigError, ModelError, Problem
from lorafit.hub.client import ModelFolder, adapter_folder, model_folder
from lorafit.model.adapter_file import load_adapter
from lorafit.model.architecture import read_architecture
from lorafit.model.base_check import check_base
from lorafit.model.device import pick_device, pick_dtype
from lorafit.model.llama import Llama
from lorafit.model.lora import VARIANTS, LoraSpec, attach, detach
from lorafit.model.memory import limit_onednn_cache, use_caching_allocator
from lorafit.model.offload import check_offload
from lorafit.model.quant import Quantize, check_quantize
from lorafit.model.saved_adapter import put_on, read_adapter, read_spec
from lorafit.model.tables import attach_tables, without_gaps
from lorafit.model.weights import fingerprint, load_network
from lorafit.storage.atomic import check_manifest


def base_folder(
    config: Config, *, offline: bool = False, validate: Callable[[Path], object] = read_architecture
) -> ModelFolder:
    """The folder of the base model of `config`, as `model_folder`; `offline` in addition to the config's own."""
    name, revision = config.model.name, config.model.revision
    return model_folder(name, revision=revision, offline=offline or config.run.offline, validate=validate)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network ready to train, with its adapter's spec, device and number type."""

    network: Llama
    spec: LoraSpec
    device: torch.device
    dtype: torch.dtype


class BaseModelCache:
    """Keeps the base of one run loaded for the next one, if it is the same."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._network: Llama | None = None

    def get(self, key: tuple[object, ...], load: Callable[[], Llama]) -> Llama:
        """The base with the key `key`, without adapter: the kept one, or loaded in its place."""
        is_freed = self._network is None or self._network.lm_head.weight.is_meta  # a proof frees the memory
        if is_freed or self._key != key:
            self._network = None  # never two at a time
            self._network, self._key = load(), key
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
    tokens: Mapping[int, Sequence[int]] | None = None,
) -> LoadedModel:
    """The base model in `folder` on `device` with a fresh adapter, or with that of `lora.init_from`.

    `on_host` leaves the tensors in the host's memory, whatever the device, for the caller to shard. `base` keeps the
    loaded base for the next call. `tokens` are those whose rows are trained, with their pieces.
    """
    arch = read_architecture(folder)
    dtype = pick_dtype(config.model.dtype, device, arch.family.fits_float16)
    check_quantize(config.model.quantize, device, dtype)
    check_offload(config.model.offload, device, config.distributed.strategy)
    spec, initial = wanted_adapter(config)
    limit_onednn_cache()
    where = torch.device("cpu") if on_host else device
    quantize, offload = config.model.quantize, config.model.offload == "layers"
    network = (base or BaseModelCache()).get(
        (folder.resolve(), fingerprint(folder), dtype, where, quantize, offload),
        lambda: load_network(folder, arch, dtype, where, progress, quantize, offload=offload),
    )
    spec = attach(network, spec, config.train.seed)
    if initial is not None:
        load_adapter(network, initial)
    if on_host and config.lora.init == "eva":
        message = "`lora.init=eva` needs the whole base on each rank"
        raise ConfigError(message, place="distributed.strategy", hint="distributed.strategy=ddp")
    if tokens or config.lora.save_modules:
        if on_host:
            message = "`lora.tokens` and `lora.save_modules` need whole tables on each rank"
            raise ConfigError(message, place="distributed.strategy", hint="distributed.strategy=ddp")
        whole = without_gaps(tokens or {}, arch.vocab_size)
        attach_tables(network, whole, config.lora.save_modules)
        spec = replace(spec, tokens=tuple(whole))
    if device.type == "cpu":
        use_caching_allocator()
    return LoadedModel(network, spec, device, dtype)


def build_saved(
    folder: Path,
    adapter: Path | None,
    device: str,
    dtype: str,
    progress: Callable[[int, int], None] | None = None,
    quantize: Quantize = "none",
    offload: Offload = "none",
) -> tuple[Llama, torch.device]:
    """The base model in `folder` with a saved adapter (or none), for inference, and its device. `offload` is that of
    the training, for CUDA devices.
    """
    arch = read_architecture(folder)
    there = pick_device(device)
    saved = read_adapter(adapter) if adapter is not None else None
    number = pick_dtype(dtype, there, arch.family.fits_float16)
    check_quantize(quantize, there, number)
    limit_onednn_cache()
    on_host = offload == "layers" and there.type == "cuda"
    network = load_network(folder, arch, number, there, progress, quantize, offload=on_host)
    if saved is not None:
        put_on(network, saved)
    return network.eval(), there


def check_initial(config: Config, base: ModelFolder) -> str:
    """Compare the base model with that of the adapter to continue, as `check_base`; returns its line for the user."""
    if config.lora.init_from is None:
        return ""
    initial = _initial(config.lora.init_from, config.run.offline)
    flag, accepted = "lora.other_base=true", config.lora.other_base
    return check_base(initial, base.path, base.name, accepted=accepted, flag=flag)


def wanted_adapter(config: Config) -> tuple[LoraSpec, Path | None]:
    """The spec of the adapter to train, and the folder of the one that it continues.

    Raises ConfigError if a key of the config contradicts the adapter to continue.
    """
    lora = config.lora
    spec = LoraSpec(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        rslora=lora.rslora,
        variant="dora" if lora.dora else lora.init if lora.init in VARIANTS else "lora",
        ranks=lora.ranks,
        alphas=lora.alphas,
        layers=lora.layers,
    )
    if lora.init_from is None:
        return spec, None
    initial = _initial(lora.init_from, config.run.offline)
    stored = read_spec(initial)
    values: dict[str, tuple[object, object]] = {
        key: (getattr(spec, key), getattr(stored, key))
        for key in ("rank", "alpha", "rslora", "targets")
        if key in lora.model_fields_set
    }
    if "dora" in lora.model_fields_set:
        values["dora"] = (lora.dora, stored.variant == "dora")
    if "targets" in values:
        values["targets"] = (", ".join(sorted(spec.targets)), ", ".join(sorted(stored.targets)))
    problems = [
        Problem(
            f"`lora.{key}` is {ours}, but the adapter to continue has {theirs}",
            hint=f"leave `lora.{key}` out: `lora.init_from` decides it",
        )
        for key, (ours, theirs) in values.items()
        if ours != theirs
    ]
    if problems:
        raise ConfigError.of(problems)
    return replace(stored, dropout=lora.dropout), initial


def _initial(name: str, offline: bool) -> Path:
    """The folder of the adapter to continue. Raises ModelError where it is damaged."""
    folder = adapter_folder(name, offline=offline).path
    check_manifest(folder, "the adapter to continue", ModelError)
    return folder

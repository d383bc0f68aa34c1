"""Loads weights from safetensors files into a network: memory-mapped, cast one tensor at a time, every name checked."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafit.errors import ModelError, Problem, several
from lorafit.gguf_file.folder import gguf_file_of
from lorafit.gguf_file.header import read_header
from lorafit.model.architecture import Architecture
from lorafit.model.dtypes import dtype_names
from lorafit.model.linear import Frozen, replace_module
from lorafit.model.llama import Llama
from lorafit.model.offload import LayerStream, move_to_host
from lorafit.model.quant import QUANTIZERS, Quantize
from lorafit.model.stored_tensor import GgufTensor, StoredTensor
from lorafit.redact import logger_of
from lorafit.storage.digest_cache import cached_sha256
from lorafit.storage.safe_read import MB, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 64 * MB
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
logger = logger_of(__name__)
_ROPE_TENSORS = ("rope_freqs.", "rope_factors_")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All tensors of a model folder, in the files' order: those of the network by parameter, the others by the names
    that transformers gives them now.
    """

    network: dict[str, StoredTensor]
    left_out: dict[str, StoredTensor]


def stored_weights(folder: Path, arch: Architecture) -> StoredWeights:
    """The tensors of a model folder. A tied head is the embedding. Towers for images or sound are left out.

    Raises ModelError if a file cannot be read, or if a tied head and the embedding differ.
    """
    if (gguf := gguf_file_of(folder)) is not None:
        return StoredWeights(_of_gguf(gguf, arch), {})
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118, not a mapping
                    part = file.get_slice(name)
                    plain = plain_name(name)
                    if plain in tensors:
                        raise ModelError(
                            f"`{tensors[plain].name}` and `{name}` are one weight", place=str(path)
                        )
                    tensors[plain] = StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"weights cannot be read: {error}", place=str(path), hint="download the file again"
            ) from None
    left_out = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_MORE_TOKENS)}
    if arch.is_wrapped:
        others = {name: tensor for name, tensor in tensors.items() if not _TEXT.match(name)}
        left_out |= {f"model.{name.removeprefix('model.')}": tensor for name, tensor in others.items()}
        tensors = {_text_name(name): tensor for name, tensor in tensors.items() if _TEXT.match(name)}
    else:
        tensors = _of_the_whole(tensors)
    if arch.tie_word_embeddings and _HEAD in tensors:
        head = tensors.pop(_HEAD)  # it is stored under either name or both
        if not _are_equal(head, tensors.setdefault(f"{arch.embedding}.weight", head)):
            raise ModelError(
                f"config.json ties the head to the embedding, but `{_HEAD}` holds other numbers",
                place=str(folder),
                hint='set "tie_word_embeddings": false in config.json if the head is its own',
            )
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    return StoredWeights(kept, left_out)


def plain_name(name: str) -> str:
    """The name of a tensor without the words that programs of several processes and torch.compile put into it."""
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _of_the_whole(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights by parameter of the whole network, where a part or a wrapper of it was saved."""
    if _EMBEDDING in tensors:  # the decoder without the head
        return {name if name == _HEAD else f"model.{name}": tensor for name, tensor in tensors.items()}
    if f"model.model.{_EMBEDDING}" in tensors:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return tensors


_MORE_TOKENS = "mtp."  # layers of Qwen3.5 that predict the token after the next one; transformers has none
# The text model in a network with other towers: as transformers names it now, and as it did before.
_TEXT = re.compile(r"(model\.language_model|language_model\.model)\.|(language_model\.)?lm_head\.")


def _text_name(name: str) -> str:
    """The name of a parameter of the text model."""
    if name.endswith(_HEAD):
        return _HEAD
    return re.sub(r"^language_model\.model\.", "model.language_model.", name)


@functools.cache  # a folder is loaded several times
def _name_left_out(folder: Path, names: frozenset[str]) -> None:
    """Say once how many tensors of which parts are not used."""
    parts = Counter(name.removeprefix("model.").split(".")[0].replace("_", " ") for name in names)
    for part, count in sorted(parts.items()):
        logger.warning("note: left out: %d tensors of the %s (%s)", count, part, folder)


def _of_gguf(path: Path, arch: Architecture) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file by parameter; one without a parameter has its own name. Raises ModelError."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    header, family = read_header(path), arch.family
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    table = get_tensor_name_map(kind, arch.num_hidden_layers)
    with torch.device("meta"):
        parameters = [name.rpartition(".") for name, _ in Llama(arch).named_parameters()]
    names = {f"{table.get_name(module)}.{part}": f"{module}.{part}" for module, _, part in parameters}
    tensors: dict[str, StoredTensor] = {}
    for info in header.tensors.values():
        name = names.get(info.name, info.name)
        module = name.rpartition(".")[0]
        is_rotated = family.gguf_interleaved_rope and module.endswith((".q_proj", ".k_proj"))
        offset = family.norm_offset if module.endswith("norm") else 0.0
        if not info.name.startswith(_ROPE_TENSORS):  # they are in the config
            tensors[name] = GgufTensor.of(path, info, arch.head_dim * is_rotated, offset)
    return tensors


def load_network(
    folder: Path,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    quantize: Quantize = "none",
    *,
    offload: bool = False,
) -> Llama:
    """The network of a model folder with its weights, frozen; `quantize` applies to all linears but the head. With
    `offload` the layers stay in the host's memory (model/offload.py).

    If type and device match the file, tensors stay mapped to it and need no memory of their own. `progress` receives
    (tensors done, tensors in all). Raises ModelError naming every tensor that is missing, unexpected or of another
    shape.
    """
    with torch.device("meta"):
        network = Llama(arch)
    parameters = dict(network.named_parameters())  # a tied head is listed once, as embed_tokens
    weights = stored_weights(folder, arch)
    stored = weights.network
    _name_left_out(folder, frozenset(weights.left_out))
    faults: dict[str, list[str]] = {}  # a fault of many weights is one line
    for name in sorted(parameters.keys() | stored.keys()):
        if name not in stored:
            faults.setdefault("{} is missing", []).append(name)
        elif name not in parameters:
            fault = f"{{}} has no place in a {arch.model_type} network"
            faults.setdefault(fault, []).append(stored[name].name)
        elif (shape := list(stored[name].shape)) != (right := list(parameters[name].shape)):
            faults.setdefault(f"{{}} has shape {shape}, config.json says {right}", []).append(name)
    if faults:
        raise ModelError.of(
            Problem("weight " + fault.format(several(names)), str(folder)) for fault, names in faults.items()
        )
    kept = dtype_names(dtype).safetensors if device.type == "cpu" and quantize == "none" else None
    mapped = {tensor.file for tensor in stored.values() if tensor.dtype == kept}
    with ExitStack() as stack:
        files = {}
        for path in {tensor.file: None for tensor in stored.values() if not isinstance(tensor, GgufTensor)}:
            # a file is mapped if tensors stay as they are in it; else it is read, as mapped pages stay in memory
            backend = {} if path in mapped else {"backend": "pread"}
            files[path] = stack.enter_context(safe_open(path, framework="pt", device="cpu", **backend))
        for done, name in enumerate(parameters, 1):
            place = stored[name]
            file = files.get(place.file)
            tensor = place.read(dtype) if file is None else file.get_tensor(place.name)
            if not tensor.is_floating_point():
                raise ModelError(f"weight `{name}` is {tensor.dtype}, not floating point", place=str(folder))
            _set_weight(network, name, tensor.to(device=device, dtype=dtype), quantize)
            if offload:
                move_to_host(network.get_submodule(name.rpartition(".")[0]))
            if progress is not None:
                progress(done, len(parameters))
    if arch.tie_word_embeddings:
        network.lm_head.weight = network.decoder.embed_tokens.weight
    if offload:
        network.streamed = LayerStream(list(network.decoder.layers), device)
    return network.requires_grad_(False).eval()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the single one if there is, as in transformers, else the shards.

    Raises ModelError if one is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (gguf := gguf_file_of(folder)) is not None:
        return [gguf]
    if (folder / INDEX).is_file():
        try:
            weight_map = read_json(folder / INDEX, MAX_INDEX)["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"`{INDEX}` cannot be read", place=str(folder)) from None
        if wrong := [name for name in names if Path(name).name != name]:
            raise ModelError(f"`{INDEX}` points outside its folder: `{wrong[0]}`", place=str(folder))
        if missing := [
            Problem(f"weight file `{n}` is missing", str(folder)) for n in names if not (folder / n).is_file()
        ]:
            raise ModelError.of(missing)
        return [folder / name for name in names]
    hint = "download the model again"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        hint = (
            "it holds pickled weights only, which lorafit never opens; save it with safe_serialization first"
        )
    raise ModelError(f"there is no `{SINGLE}`", place=str(folder), hint=hint)


def fingerprint(folder: Path) -> str:
    """A digest of the base model: config.json, and the names and bytes of its weight files, wherever the folder is.
    That of a GGUF file is the digest of its bytes.

    The bytes are read once for each state of a file, see storage/digest_cache.py. Raises ModelError and OSError.
    """
    files = weight_files(folder)
    with ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1))) as pool:
        digests = list(pool.map(cached_sha256, files))
    if gguf_file_of(folder) is not None:
        return digests[0]
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path, of_file in zip(files, digests, strict=True):
        digest.update(f"{path.name} {of_file} ".encode())
    return digest.hexdigest()


def is_fingerprint_of(stored: object, folder: Path) -> bool:
    """Whether `stored` is the fingerprint of the base model in `folder`, by this version or by version 0.1."""
    return stored in (fingerprint(folder), _sampled_fingerprint(folder))


def _sampled_fingerprint(folder: Path) -> str:
    """The fingerprint of version 0.1: of each weight file the size, the header and 64 pieces of its bytes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, 2**24)))
            for part in range(64):
                file.seek(part * max(1, size // 64))
                digest.update(file.read(16384))
    return digest.hexdigest()


def _are_equal(one: StoredTensor, two: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers; the files are mapped, not copied."""
    with (
        safe_open(one.file, framework="pt", device="cpu") as first,
        safe_open(two.file, framework="pt", device="cpu") as second,
    ):
        return torch.equal(first.get_tensor(one.name), second.get_tensor(two.name))


def _set_weight(network: nn.Module, name: str, tensor: Tensor, quantize: Quantize) -> None:
    parent, _, child = name.rpartition(".")
    module = network.get_submodule(parent)
    if quantize != "none" and isinstance(module, Frozen) and child == "weight":
        replace_module(network, parent, QUANTIZERS[quantize](tensor))  # the bias comes after the weight
    else:
        setattr(module, child, nn.Parameter(tensor, requires_grad=False))

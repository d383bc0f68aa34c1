"""Writes GGUF files for llama.cpp and programs built on it: the merged model, or the adapter alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from lorafit.errors import ModelError, several
from lorafit.export.chat_template import chat_template
from lorafit.export.gguf_types import quantized, tensor_types
from lorafit.export.gguf_vocabulary import write_vocabulary
from lorafit.export.run_source import RunSource
from lorafit.gguf_file.folder import gguf_file_of
from lorafit.gguf_file.header import read_header
from lorafit.model.architecture import Architecture
from lorafit.model.families import FAMILIES
from lorafit.model.llama import inverse_frequencies
from lorafit.model.lora import VARIANTS
from lorafit.model.mixer_shapes import DeltaHeads
from lorafit.model.rope import Rope


def write_gguf(
    source: RunSource,
    path: Path,
    kind: str,
    progress: Callable[[int, int], None],
    *,
    merged: bool = True,
) -> None:
    """Write the merged model (or the base, if not `merged`) as one file of type `kind`, a tensor at a time.
    Raises OSError, and ModelError for a network or tokenizer that llama.cpp does not have.
    """
    arch = source.arch
    architecture = _architecture(source)
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type("model")
        writer.add_name(source.name)
        writer.add_file_type(_file_type(kind))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, arch)
        _add_tokenizer(writer, source)
        extra = {"rope_freqs.weight": _rope_factors(arch)} if arch.rope.kind == "llama3" else {}
        for name, factors in extra.items():
            writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
        types = tensor_types(source, kind)
        for name, gguf_name in gguf_names(source, architecture).items():
            shape = gguf.quant_shape_to_byte_shape(_stored_shape(source.weights[name].shape), types[name])
            writer.add_tensor_info(gguf_name, shape, np.dtype(np.uint8), math.prod(shape), types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for factors in extra.values():
            writer.write_tensor_data(factors)
        for done, (name, dtype) in enumerate(types.items(), 1):
            tensor = _as_stored(source.tensor(name, merged=merged), name, arch)
            columns = source.importance.get(name)
            weights = None if columns is None else permuted_columns(columns, name, arch).numpy()
            writer.write_tensor_data(quantized(tensor.float().numpy(), dtype, weights))
            progress(done, len(source.weights))
    finally:
        writer.close()


def write_lora(source: RunSource, path: Path) -> None:
    """Write the adapter alone, float32, for `llama-cli --lora` and the like. Raises OSError."""
    spec = source.saved.spec
    if not VARIANTS[spec.variant].is_plain:
        raise ModelError(f"llama.cpp has no adapters of the variant `{spec.variant}`", hint="export `gguf`")
    if tables := source.saved.tables:
        raise ModelError(f"llama.cpp has no adapters that change {several(tables)}", hint="export `gguf`")
    arch, gguf_file = source.arch, gguf_file_of(source.base.path)
    architecture = _architecture(source) if gguf_file is None else read_header(gguf_file).architecture
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type("adapter")
        writer.add_name(source.name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", spec.scale * spec.rank)
        for name, gguf_name in gguf_names(source, architecture).items():
            if name in source.saved.changes:
                module = name.removesuffix(".weight")
                factors = source.saved.tensors(module)
                a = permuted_columns(factors["lora_A"], name, arch)
                b = permuted(factors["lora_B"], name, arch)
                if (
                    own := spec.of(module)
                ) != spec:  # llama.cpp divides the one alpha by the rank of the module
                    b = b * (own.scale * own.rank / (spec.scale * spec.rank))
                writer.add_tensor(f"{gguf_name}.lora_a", a.contiguous().numpy())
                writer.add_tensor(f"{gguf_name}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: the weight of a convolution has no axis for the one channel that each output reads."""
    return (shape[0], shape[2]) if len(shape) == 3 else shape


def _file_type(kind: str) -> gguf.LlamaFileType:
    """llama.cpp's number of a mixture of types."""
    names = gguf.LlamaFileType.__members__
    return next(names[name] for name in (f"ALL_{kind.upper()}", f"MOSTLY_{kind.upper()}") if name in names)


def _architecture(source: RunSource) -> str:
    """llama.cpp's name of the network. Raises ModelError if it has none."""
    arch, family = source.arch, FAMILIES[source.arch.model_type]
    if family.gguf is None:
        message = f"GGUF files of `{arch.model_type}` networks are not supported"
        raise ModelError(message, place=str(source.base.path), hint="export `merged`")
    if arch.qkv_bias and not family.gguf_qkv_bias:
        raise ModelError(f"llama.cpp's {family.gguf} has no attention biases", place=str(source.base.path))
    if fault := _differing_layers(arch):
        message = f"llama.cpp's {family.gguf} does not compute {fault}"
        raise ModelError(message, place=str(source.base.path), hint="export `merged`")
    return family.gguf


def _differing_layers(arch: Architecture) -> str | None:
    """What of the layers of a network is not in the architecture of llama.cpp; None if all is."""
    period = arch.family.gguf_period
    regular = [bool((layer + 1) % period) for layer in range(arch.num_hidden_layers)] if period else []
    if None in arch.ropes and [rope is not None for rope in arch.ropes] != regular:
        return "the layers without rotary positions"
    if arch.delta is not None and _interval(arch) == 0:
        return "this order of attention and linear attention"
    if arch.delta is not None and arch.delta.key_dim != arch.delta.value_dim:
        return "keys and values of other widths"
    if arch.attention_scale is not None and not _has_scales(arch):
        return "this scale of scores"
    return None


def _interval(arch: Architecture) -> int:
    """The number by which attention is the last of so many layers, and all others are of another kind; 0 if none."""
    layers = arch.num_hidden_layers
    return next(
        (n for n in range(1, layers + 1) if [*arch.attention_layers] == [*range(n - 1, layers, n)]), 0
    )


def _has_scales(arch: Architecture) -> bool:
    """Whether files of the architecture name the multipliers."""
    return arch.family.gguf == "granite"


def gguf_names(source: RunSource, architecture: str) -> dict[str, str]:
    """The name of each weight in llama.cpp's `architecture`."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], source.arch.num_hidden_layers)
    names = {}
    for name in source.weights:
        full = name.replace(source.arch.prefix, "model.", 1).replace(".dt_bias", ".dt_proj.bias")
        module, _, part = full.rpartition(".")
        names[name] = f"{table[module]}.{part}" if part in ("weight", "bias") else table[full]
    return names


def _as_stored(weight: Tensor, name: str, arch: Architecture) -> Tensor:
    """A weight as llama.cpp multiplies by it: rows and columns in its order, norms with their offset, the decay."""
    weight = permuted_columns(permuted(weight, name, arch), name, arch)
    if name.endswith(".A_log"):
        return -weight.float().exp()
    has_offset = name.endswith("norm.weight") and not name.endswith(".linear_attn.norm.weight")
    return weight.float() + arch.family.norm_offset if has_offset and arch.family.norm_offset else weight


def permuted(weight: Tensor, name: str, arch: Architecture) -> Tensor:
    """A weight, bias or B of a q or k projection in the row order of llama.cpp, anything else as it is.

    Hugging Face rotates the halves of a head, llama.cpp neighbouring rows for some architectures (see Family). Rows of
    value heads of a delta rule are in llama.cpp's order too.
    """
    module = name.rpartition(".")[0]
    if ".linear_attn." in name and not module.endswith((".norm", ".out_proj")):
        assert arch.delta is not None
        has_keys = module.endswith((".in_proj_qkv", ".conv1d"))
        start = 2 * arch.delta.keys * arch.delta.key_dim if has_keys else 0
        return torch.cat([weight[:start], _tiled(weight[start:], 0, arch.delta)])
    interleaved = FAMILIES[arch.model_type].gguf_interleaved_rope
    if not interleaved or not module.endswith((".q_proj", ".k_proj")):
        return weight
    heads = arch.num_attention_heads if module.endswith(".q_proj") else arch.num_key_value_heads
    rows = weight.unflatten(0, (heads, 2, arch.head_dim // 2))
    reordered: Tensor = rows.transpose(1, 2).flatten(0, 2)
    return reordered


def permuted_columns(weight: Tensor, name: str, arch: Architecture) -> Tensor:
    """A weight or A (rows, width), or a number per column (width,), with columns in the order of llama.cpp."""
    if not name.endswith(".linear_attn.out_proj.weight"):
        return weight
    assert arch.delta is not None
    return _tiled(weight, -1, arch.delta)


def _tiled(weight: Tensor, axis: int, heads: DeltaHeads) -> Tensor:
    """Value heads in llama.cpp's order: the first one of each key head, then the second ones."""
    axis %= weight.dim()
    shares = weight.unflatten(axis, (heads.keys, heads.values // heads.keys, -1))
    tiled: Tensor = shares.transpose(axis, axis + 1).flatten(axis, axis + 2)
    return tiled


def _add_shape(writer: gguf.GGUFWriter, arch: Architecture) -> None:
    rope = arch.rope
    if rope.kind == "longrope" or not rope.truncate:
        raise ModelError(f"llama.cpp does not compute this rope of type {rope.kind}", hint="export `merged`")
    # llama.cpp has no windows for these networks, and no rope that changes with the length
    writer.add_context_length(min(arch.shortest_window, rope.fixed_up_to or arch.shortest_window))
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.num_hidden_layers)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_attention_heads)
    if (heads := arch.delta) is not None:
        writer.add_full_attention_interval(_interval(arch))
        writer.add_ssm_conv_kernel(arch.conv_width)
        writer.add_ssm_state_size(heads.key_dim)
        writer.add_ssm_group_count(heads.keys)
        writer.add_ssm_time_step_rank(heads.values)
        writer.add_ssm_inner_size(heads.values * heads.value_dim)
        pairs = (arch.rotary_dim or arch.head_dim) // 2  # a text has one position in the place of three
        writer.add_rope_dimension_sections([*((pairs + 2 - part) // 3 for part in range(3)), 0])
    if arch.mixers and arch.delta is None:  # a layer without attention has no heads
        attends, count = arch.attention_layers, arch.num_key_value_heads
        writer.add_head_count_kv([count * (layer in attends) for layer in range(arch.num_hidden_layers)])
        writer.add_shortconv_l_cache(arch.conv_width)
    else:
        writer.add_head_count_kv(arch.num_key_value_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_layer_norm_rms_eps(arch.rms_norm_eps)
    writer.add_rope_dimension_count(arch.rotary_dim or arch.head_dim)
    writer.add_rope_freq_base(arch.rope.theta)
    writer.add_vocab_size(arch.vocab_size)
    if _has_scales(arch):
        writer.add_embedding_scale(arch.embedding_multiplier)
        writer.add_residual_scale(arch.residual_multiplier)
        writer.add_attention_scale(arch.attention_scale or arch.head_dim**-0.5)
        writer.add_logit_scale(arch.logits_divisor)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        # llama.cpp multiplies by the factor of the paper itself
        writer.add_rope_scaling_attn_factors(rope.attention_factor / (1 + 0.1 * math.log(rope.factor)))


def _rope_factors(arch: Architecture) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The divisor of each frequency, float32 (head_dim / 2,)."""
    plain = inverse_frequencies(Rope(theta=arch.rope.theta), arch.head_dim)
    factors = plain.double() / inverse_frequencies(arch.rope, arch.head_dim).double()
    return factors.to(torch.float32).numpy()


def _add_tokenizer(writer: gguf.GGUFWriter, source: RunSource) -> None:
    contract = source.contract
    write_vocabulary(writer, source.renderer.tokenizer, source.arch.vocab_size)
    writer.add_add_bos_token(contract.add_bos)
    writer.add_add_eos_token(False)
    if contract.bos_id is not None:
        writer.add_bos_token_id(contract.bos_id)
    ends = [contract.eos_id, *contract.stop_ids] if contract.eos_id is not None else contract.stop_ids
    ends = list(dict.fromkeys(ends))
    if len(ends) > 3:
        raise ModelError(
            f"the adapter ends on {len(ends)} tokens, a GGUF file names three", place="generation_config.json"
        )
    keys = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(keys, ends, strict=False):
        add(token)
    writer.add_chat_template(chat_template(source.renderer))

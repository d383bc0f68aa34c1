"""Converts the metadata of a GGUF file to a config.json, with transformers' names.

llama.cpp's keys: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp, and what each architecture does
with them: https://github.com/ggml-org/llama.cpp/tree/master/src/models
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError
from lorafit.gguf_file.header import Header
from lorafit.redact import logger_of

logger = logger_of(__name__)
_GENERAL = ("general.", "tokenizer.", "quantize.", "split.", "imatrix.")
_ROPE_FACTORS = "rope_freqs.weight"
_YARN = {"yarn_beta_fast": ("beta_fast", 32.0), "yarn_beta_slow": ("beta_slow", 1.0)}
_LOW, _HIGH = 1.0, 4.0  # `low_freq_factor` and `high_freq_factor` of every Llama 3
_UNUSED = {
    "vocab_size",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
    "causal",
    "attention.causal",
}
_ORIGINAL = (8192, 4096, 16384, 32768)  # lengths before scaling that llama3 is tried with

Numbers = Callable[[str], list[float]]  # the numbers of a small tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """How an architecture of llama.cpp becomes a `model_type`: `more` gives further keys of its config.json.

    Keys in `ignored` have no effect in llama.cpp. `is_tied`: there is never a head of its own.
    """

    model_type: str
    more: Callable[[_Metadata], Mapping[str, Any]] = lambda metadata: {}
    ignored: tuple[str, ...] = ()
    is_tied: bool = False


def config_of(header: Header, numbers: Numbers) -> dict[str, Any]:
    """The config.json of a file. `numbers` reads a small tensor. Raises ModelError for another network."""
    reading = READINGS.get(header.architecture)
    if reading is None:
        hint = f"lorafit trains GGUF files of {', '.join(READINGS)}"
        message = f"the architecture `{header.architecture[:40]}` is not supported in GGUF"
        raise ModelError(message, place=str(header.path), hint=hint)
    metadata = _Metadata(header, numbers)
    if metadata.get("split.count", int, 1, whole=True) > 1:
        hint = "llama-gguf-split --merge FIRST-FILE MERGED.gguf makes one file of them"
        raise ModelError("the model is in several files", place=str(header.path), hint=hint)
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    layers, inner = metadata.count("block_count"), metadata.count("feed_forward_length")
    head_dim = metadata.head_dim
    if metadata.count("attention.value_length", head_dim) != head_dim:
        raise metadata.fault("the heads of keys and values have different widths")
    if metadata.get("expert_count", int, 0):
        raise metadata.fault("networks with experts are not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise metadata.fault("the tensor `token_embd.weight` is missing")
    config: dict[str, Any] = {
        "model_type": reading.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.decimal("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.count("context_length"),
        "rope_theta": metadata.decimal("rope.freq_base", 10000.0),
        "tie_word_embeddings": reading.is_tied or "output.weight" not in header.tensors,
    }
    biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
    config |= {key: True for key, part in biases.items() if f"blk.0.{part}.bias" in header.tensors}
    config |= {**_rope(metadata, head_dim), **reading.more(metadata)}
    metadata.check(reading)
    return config


class _Metadata:
    """The keys of the file's architecture, without its name; those that were not read are named once."""

    def __init__(self, header: Header, numbers: Numbers) -> None:
        self._header, self.numbers = header, numbers
        self._read: set[str] = set()

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self._header.tensors

    def get(self, key: str, kind: type, default: Any = None, *, whole: bool = False) -> Any:
        """The value of a key, if it has this type."""
        name = key if whole else f"{self._header.architecture}.{key}"
        self._read.add(name)
        value = self._header.metadata.get(name, default)
        if kind is int and isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # one for each layer
        if type(value) is not kind and value is not default:
            raise self.fault(f"`{name}` is {str(value)[:60]}: one {kind.__name__} is expected")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number that must be there if there is no default."""
        value = self.get(key, int, default)
        if value is None:
            raise self.fault(f"`{self._header.architecture}.{key}` is missing")
        if not 0 < value < 2**31:
            raise self.fault(f"`{self._header.architecture}.{key}` is {value}")
        return int(value)

    def decimal(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal number that is rounded to it: what its author wrote."""
        value = self.get(key, float, default) or default  # 0 is none in llama.cpp
        if value is None:
            raise self.fault(f"`{self._header.architecture}.{key}` is missing")
        if not 0 < value < math.inf:
            raise self.fault(f"`{self._header.architecture}.{key}` is {value}")
        return shortest(value)

    @property
    def head_dim(self) -> int:
        """The numbers of a head."""
        heads, hidden = self.count("attention.head_count"), self.count("embedding_length")
        return self.count("attention.key_length", max(1, hidden // heads))

    def fault(self, message: str) -> ModelError:
        return ModelError(message, place=str(self._header.path))

    def check(self, reading: Reading) -> None:
        """Name the keys that were not used."""
        prefix = f"{self._header.architecture}."
        known = self._read | {prefix + key for key in (*_UNUSED, *reading.ignored)}
        left = [key for key in self._header.metadata if key not in known and not key.startswith(_GENERAL)]
        if left:
            names = ", ".join(sorted(key[:60] for key in left)[:20])
            logger.warning(
                "note: keys that lorafit does not know are not used: %s (%s)", names, self._header.path
            )


def shortest(value: float) -> float:
    """The shortest decimal number that is rounded to this float32."""
    if not math.isfinite(value):
        return value
    with_digits = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((short for short in with_digits if _float32(short) == _float32(value)), value)


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return b""


def _rope(metadata: _Metadata, head_dim: int) -> dict[str, Any]:
    """The keys of config.json about rotary positions, but for their base."""
    width = metadata.count("rope.dimension_count", head_dim)
    kind = metadata.get("rope.scaling.type", str, "linear")
    factor = metadata.decimal("rope.scaling.factor", metadata.decimal("rope.scale_linear", 1.0))
    original = metadata.get("rope.scaling.original_context_length", int)
    attention = metadata.decimal("rope.scaling.attn_factor", 1.0)
    before = {} if original is None else {"original_max_position_embeddings": original}
    config = {} if width == head_dim else {"partial_rotary_factor": width / head_dim}
    files = {f"{which}_factor": f"rope_factors_{which}.weight" for which in ("short", "long")}
    if all(name in metadata.tensors for name in files.values()):
        factors = {key: metadata.numbers(name) for key, name in files.items()}
        scaling = {"rope_type": "longrope", "attention_factor": attention, **factors, **before}
        return {**config, **before, "rope_scaling": scaling}
    if _ROPE_FACTORS in metadata.tensors:
        return {**config, "rope_scaling": _llama_3(metadata, width)}
    if kind == "yarn":
        betas = {name: metadata.decimal(f"rope.scaling.{key}", value) for key, (name, value) in _YARN.items()}
        attention *= 1 + 0.1 * math.log(max(1.0, factor))  # llama.cpp multiplies by the factor of the paper
        scaling = {"rope_type": "yarn", "factor": factor, "attention_factor": attention, **betas, **before}
        return {**config, "rope_scaling": scaling}
    if kind not in ("none", "linear"):
        raise metadata.fault(f"rope of the type `{kind[:40]}` without its factors is not supported")
    if kind == "linear" and factor != 1.0:
        return {**config, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    return config


def _llama_3(metadata: _Metadata, width: int) -> dict[str, Any]:
    """The parameters of `llama3` (transformers' modeling_rope_utils.py) that give the divisors in the file."""
    given, theta = metadata.numbers(_ROPE_FACTORS), metadata.decimal("rope.freq_base", 10000.0)
    factor = max(1.0, *given)
    for original in _ORIGINAL if len(given) == width // 2 else ():
        wanted = [_llama_3_divisor(theta ** (2 * at / width), factor, original) for at in range(len(given))]
        if all(abs(a - b) < 1e-3 * b for a, b in zip(given, wanted, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise metadata.fault(f"the divisors of frequencies in `{_ROPE_FACTORS}` are not those of Llama 3")


def _llama_3_divisor(per_radian: float, factor: float, original: int) -> float:
    turns = original / (2 * math.pi * per_radian)  # in the original length
    smooth = min(1.0, max(0.0, (turns - _LOW) / (_HIGH - _LOW)))
    return 1 / ((1 - smooth) / factor + smooth)


def _no_windows(metadata: _Metadata) -> Mapping[str, Any]:
    if metadata.get("attention.sliding_window", int, 0):
        raise metadata.fault("windows are not supported for this architecture in GGUF")
    return {}


def _gemma(layers_of_27b: int, pattern: int) -> Callable[[_Metadata], Mapping[str, Any]]:
    """What llama.cpp knows of Gemma by the number of layers: the scale of scores, and which layers have windows."""

    def more(metadata: _Metadata) -> Mapping[str, Any]:
        heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
        is_27b = metadata.count("block_count") == layers_of_27b
        return {
            "query_pre_attn_scalar": hidden // heads if is_27b else metadata.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window_pattern": metadata.count("attention.sliding_window_pattern", pattern),
        }

    return more


def _gemma_2(metadata: _Metadata) -> Mapping[str, Any]:
    return {
        **_gemma(46, 2)(metadata),
        "sliding_window": metadata.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": metadata.decimal("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.decimal("final_logit_softcapping", 30.0),
    }


def _gemma_3(metadata: _Metadata) -> Mapping[str, Any]:
    return {
        **_gemma(62, 6)(metadata),
        "sliding_window": metadata.get("attention.sliding_window", int) or None,
        "rope_local_base_freq": metadata.decimal("rope.freq_base_swa", 10000.0),
    }


def _granite(metadata: _Metadata) -> Mapping[str, Any]:
    return {
        "embedding_multiplier": metadata.decimal("embedding_scale", 1.0),
        "residual_multiplier": metadata.decimal("residual_scale", 1.0),
        "attention_multiplier": metadata.decimal("attention.scale", metadata.head_dim**-0.5),
        "logits_scaling": metadata.decimal("logit_scale", 1.0),
    }


# By llama.cpp's name of the architecture. The names that exports write are in model/families.py.
READINGS: dict[str, Reading] = {
    "llama": Reading("llama", _no_windows),
    "qwen2": Reading("qwen2", _no_windows),
    "qwen3": Reading("qwen3", _no_windows),
    "smollm3": Reading("smollm3", lambda metadata: {"no_rope_layer_interval": 4}),
    "granite": Reading("granite", _granite),
    "olmo2": Reading("olmo2", _no_windows),
    "hunyuan-dense": Reading("hunyuan_v1_dense", _no_windows),
    "gemma2": Reading("gemma2", _gemma_2, is_tied=True),
    "gemma3": Reading("gemma3_text", _gemma_3, ignored=("final_logit_softcapping",)),
    # llama.cpp computes no windows in it
    "phi3": Reading("phi3", ignored=("attention.sliding_window",)),
}

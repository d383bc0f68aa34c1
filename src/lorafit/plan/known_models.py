"""The models that people ask for by name: where they are published, and the sizes in their config.json."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError
from lorafit.model.architecture import Architecture, parse_architecture
from lorafit.model.families import FAMILIES


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published model; `billions` are its parameters."""

    name: str
    owner: str
    model_type: str
    billions: float
    # vocabulary, width, width of the MLP, layers, heads, key-value heads, and head_dim if it is not width / heads
    sizes: tuple[int, ...] = ()
    tied: bool = False
    # the layers of a hybrid, a letter each: f for full attention, c for a convolution, l for linear attention
    layers: str = ""
    value_heads: int = 0  # of linear attention

    @property
    def is_supported(self) -> bool:
        """Whether lorafit trains it."""
        return bool(self.sizes)

    @property
    def has_gguf(self) -> bool:
        """Whether it is exported for llama.cpp."""
        return self.is_supported and FAMILIES[self.model_type].gguf is not None

    def architecture(self) -> Architecture:
        """Its network, by the sizes that memory and time depend on."""
        vocab, hidden, inner, layers, heads, kv_heads, *head_dim = self.sizes
        raw: dict[str, Any] = {
            "model_type": self.model_type,
            "vocab_size": vocab,
            "hidden_size": hidden,
            FAMILIES[self.model_type].inner_size: inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim[0] if head_dim else hidden // heads,
            "tie_word_embeddings": self.tied,
        }
        if self.model_type == "granitemoehybrid":
            raw |= {"num_local_experts": 0, "layer_types": ["attention"] * layers}
        if self.layers:
            pattern = self.layers * (layers // len(self.layers))
            raw["layer_types"] = [_LAYERS[letter] for letter in pattern]
        if self.value_heads:
            raw["linear_num_value_heads"] = self.value_heads
        return parse_architecture(raw, self.name)


_LAYERS = {"f": "full_attention", "c": "conv", "l": "linear_attention"}


def _known(line: str) -> KnownModel:
    words = line.split()
    sizes = tuple(map(int, words[4].split(","))) if len(words) > 4 else ()
    tied = words[5:6] == ["tied"]
    return KnownModel(words[0], words[1], words[2], float(words[3]), sizes, tied, *_hybrid(words[6:]))


def _hybrid(words: list[str]) -> tuple[str, int]:
    """The layers of a hybrid, repeated, and the value heads of its linear attention: `lllf 16`."""
    return (words[0] if words else "", int(words[1]) if len(words) > 1 else 0)


KNOWN = [
    _known(line)
    for line in """
SmolLM2-135M-Instruct HuggingFaceTB llama 0.135 49152,576,1536,30,9,3 tied
SmolLM2-360M-Instruct HuggingFaceTB llama 0.362 49152,960,2560,32,15,5 tied
SmolLM2-1.7B-Instruct HuggingFaceTB llama 1.71 49152,2048,8192,24,32,32 tied
TinyLlama-1.1B-Chat-v1.0 TinyLlama llama 1.1 32000,2048,5632,22,32,4
Llama-3.2-1B-Instruct meta-llama llama 1.24 128256,2048,8192,16,32,8 tied
Llama-3.2-3B-Instruct meta-llama llama 3.21 128256,3072,8192,28,24,8 tied
Llama-3.1-8B-Instruct meta-llama llama 8.03 128256,4096,14336,32,32,8
Mistral-7B-Instruct-v0.3 mistralai mistral 7.25 32768,4096,14336,32,32,8
Qwen2.5-0.5B-Instruct Qwen qwen2 0.494 151936,896,4864,24,14,2 tied
Qwen2.5-1.5B-Instruct Qwen qwen2 1.54 151936,1536,8960,28,12,2 tied
Qwen2.5-3B-Instruct Qwen qwen2 3.09 151936,2048,11008,36,16,2 tied
Qwen2.5-7B-Instruct Qwen qwen2 7.62 152064,3584,18944,28,28,4
Qwen3-0.6B Qwen qwen3 0.596 151936,1024,3072,28,16,8,128 tied
Qwen3-1.7B Qwen qwen3 1.72 151936,2048,6144,28,16,8,128 tied
Qwen3-4B-Instruct-2507 Qwen qwen3 4.02 151936,2560,9728,36,32,8,128 tied
Qwen3-8B Qwen qwen3 8.19 151936,4096,12288,36,32,8,128
SmolLM3-3B HuggingFaceTB smollm3 3.08 128256,2048,11008,36,16,4 tied
gemma-3-270m-it google gemma3_text 0.268 262144,640,2048,18,4,1,256 tied
gemma-3-1b-it google gemma3_text 1.0 262144,1152,6912,26,4,1,256 tied
gemma-3-4b-it google gemma3_text 3.88 262208,2560,10240,34,8,4,256 tied
gemma-2-2b-it google gemma2 2.61 256000,2304,9216,26,8,4,256 tied
Phi-3.5-mini-instruct microsoft phi3 3.82 32064,3072,8192,32,32,32
Phi-4-mini-instruct microsoft phi3 3.84 200064,3072,8192,32,24,8 tied
OLMo-2-0425-1B-Instruct allenai olmo2 1.48 100352,2048,8192,16,16,16
Olmo-3-7B-Instruct allenai olmo3 7.3 100278,4096,11008,32,32,32
granite-3.3-2b-instruct ibm-granite granite 2.53 49159,2048,8192,40,32,8 tied
granite-4.0-350m ibm-granite granitemoehybrid 0.352 100352,1024,2048,28,16,4 tied
granite-4.0-1b ibm-granite granitemoehybrid 1.63 100352,2048,4096,40,16,4 tied
Ministral-3-3B-Instruct-2512-BF16 mistralai ministral3 3.43 131072,3072,9216,26,32,8,128 tied
EXAONE-4.0-1.2B LGAI-EXAONE exaone4 1.28 102400,2048,4096,30,32,8 tied
ERNIE-4.5-0.3B-PT baidu ernie4_5 0.361 103424,1024,3072,18,16,2,128 tied
helium-1-preview-2b kyutai helium 2.17 48000,2560,7040,24,20,20,128
Hunyuan-0.5B-Instruct tencent hunyuan_v1_dense 0.539 120818,1024,3584,24,16,8,128 tied
LFM2-350M LiquidAI lfm2 0.354 65536,1024,6656,16,16,8 tied ccfccfccfcfcfcfc
LFM2-700M LiquidAI lfm2 0.742 65536,1536,10240,16,24,8 tied ccfccfccfcfcfcfc
LFM2-1.2B LiquidAI lfm2 1.17 65536,2048,12288,16,32,8 tied ccfccfccfcfcfcfc
LFM2.5-1.2B-Instruct LiquidAI lfm2 1.17 65536,2048,12288,16,32,8 tied ccfccfccfcfcfcfc
Qwen3.5-0.8B Qwen qwen3_5_text 0.752 248320,1024,3584,24,8,2,256 tied lllf 16
Qwen3.5-2B Qwen qwen3_5_text 1.88 248320,2048,6144,24,8,2,256 tied lllf 16
Qwen3.5-4B Qwen qwen3_5_text 4.2 248320,2560,9216,32,16,4,256 tied lllf 32
Qwen3.5-9B Qwen qwen3_5_text 8.95 248320,4096,12288,32,16,4,256 no lllf 32
Qwen3.5-35B-A3B Qwen qwen3_5_moe 35
gemma-3n-E2B-it google gemma3n 5.4
gemma-4-E2B-it google gemma4 5.1
granite-4.0-h-1b ibm-granite granitemoehybrid 1.5
gpt-oss-20b openai gpt_oss 21
""".strip().splitlines()
]


def find_model(name: str) -> KnownModel:
    """The model of a name as people type it. Raises ModelError where it is not known, or not supported."""
    wanted = _plain(name)
    found = [each for each in KNOWN if wanted in (_plain(each.name), _plain(f"{each.owner}/{each.name}"))]
    found = found or [each for each in KNOWN if wanted and _plain(each.name).startswith(wanted)]
    if not found:
        close = difflib.get_close_matches(wanted, [_plain(each.name) for each in KNOWN], 3, 0.5)
        names = (
            ", ".join(each.name for each in KNOWN if _plain(each.name) in close)
            or "lorafit models lists them"
        )
        hint = f"{names}; for another model of a supported type: lorafit check --model NAME"
        raise ModelError(f"`{name}` is not in the table of models", hint=hint)
    if found[0].is_supported:
        return found[0]
    nearest = min((each for each in KNOWN if each.is_supported), key=lambda each: _distance(each, found[0]))
    message = f"{found[0].name} is not supported: its model type is `{found[0].model_type}`"
    if found[0].model_type in FAMILIES:
        message += ", with layers of another kind"
    raise ModelError(
        message, hint=f"the nearest supported model of that size is {nearest.owner}/{nearest.name}"
    )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == "/")


def _distance(one: KnownModel, other: KnownModel) -> tuple[float, bool]:
    """How far two sizes are apart; of equal ones the same owner is nearer."""
    ratio = max(one.billions, other.billions) / min(one.billions, other.billions)
    return round(ratio, 1) - (0.3 if one.owner == other.owner else 0.0), one.owner != other.owner

"""llama.cpp's names of the ways in which byte-level tokenizers split a text, and the pre-tokenizer of each.

Names and regular expressions: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
# letters with their marks
_QWEN_35 = _QWEN_2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expression of a split, by the name that exports give it. Two more splits have steps of their own.
SPLITS = {"llama-bpe": _LLAMA_3, "qwen2": _QWEN_2, "qwen35": _QWEN_35, "tekken": _TEKKEN}
GPT_2, DIGITS = "gpt-2", "smollm"  # the second has each digit apart


@dataclass(frozen=True, slots=True)
class Split:
    """A split by llama.cpp's name.

    `is_whole`: a piece that is a token stays as it is, before any merge. `adds_bos`: a text begins with BOS if the file
    does not say whether it does.
    """

    name: str
    is_whole: bool = False
    adds_bos: bool = False

    def pre_tokenizer(self) -> dict[str, Any]:
        """The pre-tokenizer of a tokenizer.json."""
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        if self.name == GPT_2:
            return last
        first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
        if self.name != DIGITS:
            pattern = {"Regex": SPLITS[self.name]}
            first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            last["use_regex"] = False
        return {"type": "Sequence", "pretokenizers": [first, last]}


_WHOLE = {"is_whole": True, "adds_bos": True}
BY_NAME = {
    **{
        name: Split(GPT_2)
        for name in ("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "exaone4", "granite-docling")
    },
    **{
        name: Split(DIGITS)
        for name in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
    },
    **{
        name: Split("llama-bpe", **_WHOLE)
        for name in ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2")
    },
    **{name: Split("llama-bpe") for name in ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe")},
    **{
        name: Split("qwen2")
        for name in ("qwen2", "deepseek-r1-qwen", "kormo", "stablelm2", "hunyuan", "megrez", "solar-open")
    },
    "qwen35": Split("qwen35"),
    "tekken": Split("tekken", **_WHOLE),
}

"""The kinds of exports, one record each: what is written, how it rounds, who reads it back, and how people use it.

A new kind is one record of EXPORTS and its name in cli/export.py. Modules that need the package `gguf` are imported
when they are used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorafit.export import merge, ollama
from lorafit.export.number_types import GGUF_TYPES, TYPES
from lorafit.export.reference import Advance, Question, Rounding
from lorafit.export.run_source import RunSource
from lorafit.model.adapter_file import CONFIG, WEIGHTS
from lorafit.model.dtypes import BY_GGUF_NAME


@dataclass(frozen=True, slots=True)
class Export:
    """One kind of export.

    `write(source, folder, type, advance)` writes the files and returns the SHA-256 of those that it summed while it
    wrote them. `usage` is Markdown for the model card, in which {base} is the base model, {name} the run and {file}
    the GGUF file.
    """

    title: str
    library: str  # `library_name` of the model card; `gguf` is also a package that writing needs
    types: tuple[str, ...]  # of the weights, the default first
    reader: str  # a name of export/readback.py's READERS
    write: Callable[[RunSource, Path, str, Advance], Mapping[str, str]]
    usage: str
    rounding: Callable[[str], Rounding | None]  # of the program that reads a type; None for types with blocks
    is_adapter: bool = False
    # the file that the reader puts the adapter on: that of the base, else one that is written to the path
    base_of: Callable[[RunSource, Path], Path] | None = None
    faults: Callable[[RunSource, Sequence[Question], Path], Sequence[str]] = lambda source, prompts, folder: ()


def write_adapter(source: RunSource, staging: Path, type_name: str, advance: Advance) -> Mapping[str, str]:
    """Copy the run's adapter, and add what other programs need to prompt it as in training. Raises OSError.

    The base is named by its hub id, or by its folder's name alone: a path means nothing on another machine.
    """
    (staging / WEIGHTS).write_bytes((source.adapter / WEIGHTS).read_bytes())
    config = json.loads((source.adapter / CONFIG).read_text(encoding="utf-8"))
    base = {"base_model_name_or_path": source.base_name, "revision": source.base.revision}
    merge.write_json(staging / CONFIG, config | base)
    merge.write_prompting(source, staging)
    return {}


def _write_merged(source: RunSource, staging: Path, type_name: str, advance: Advance) -> Mapping[str, str]:
    return merge.write_merged(source, staging, BY_GGUF_NAME[type_name], advance)


def _write_gguf(source: RunSource, staging: Path, type_name: str, advance: Advance) -> Mapping[str, str]:
    from lorafit.export import gguf_model

    gguf_model.write_gguf(source, staging / f"{source.name}-{type_name}.gguf", type_name, advance)
    return {}


def _write_gguf_lora(source: RunSource, staging: Path, type_name: str, advance: Advance) -> Mapping[str, str]:
    from lorafit.export import gguf_base, gguf_model

    gguf_model.write_lora(source, staging / f"{source.name}-lora.gguf")
    if (template := gguf_base.own_template(source)) is not None:
        (staging / gguf_base.TEMPLATE).write_text(template, encoding="utf-8")
    return {}


def _gguf_base(source: RunSource, path: Path) -> Path:
    from lorafit.export import gguf_base, gguf_model

    if (file := gguf_base.base_file(source)) is not None:
        return file
    gguf_model.write_gguf(source, path, "f32", lambda done, total: None, merged=False)
    return path


def _write_ollama(source: RunSource, staging: Path, type_name: str, advance: Advance) -> Mapping[str, str]:
    from lorafit.export import gguf_model

    gguf_model.write_gguf(source, staging / ollama.MODEL, type_name, advance)
    ollama.write_modelfile(source, staging)
    return {}


def _not_rounded(type_name: str) -> Rounding:
    return Rounding()


def _rounding_of_weights(type_name: str) -> Rounding:
    dtype = BY_GGUF_NAME[type_name]
    return Rounding(lambda _, weight: weight.to(dtype).float(), most=TYPES[type_name].most_rounded or 0.0)


def _rounding_of_llama_cpp(type_name: str) -> Rounding | None:
    if TYPES[type_name].has_blocks:
        return None
    dtype, rounding = BY_GGUF_NAME[type_name], _rounding_of_weights(type_name)
    if type_name == "f32":
        return rounding
    # llama.cpp converts the input of a product to the weight's type
    return replace(rounding, inputs=lambda x: x.to(dtype).to(x.dtype))


_ANSWER = """

```python
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256)[0]
print(tokenizer.decode(answer[inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
_ADAPTER_USAGE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = "."
model = AutoModelForCausalLM.from_pretrained({base_literal})
model = PeftModel.from_pretrained(model, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # its stop tokens
tokenizer = AutoTokenizer.from_pretrained(folder)  # its chat template
```"""
_MERGED_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""
_GGUF_LORA_USAGE = """```bash
llama-cli -m BASE.gguf --lora {file} --jinja -cnv
```

`BASE.gguf` is {base} in GGUF."""

EXPORTS: dict[str, Export] = {
    "adapter": Export(
        title="LoRA adapter",
        library="peft",
        types=("f32",),
        reader="peft",
        write=write_adapter,
        usage=_ADAPTER_USAGE + _ANSWER,
        rounding=_not_rounded,
        is_adapter=True,
    ),
    "merged": Export(
        title="merged model",
        library="transformers",
        types=("auto", "f32", "bf16", "f16"),
        reader="transformers",
        write=_write_merged,
        usage=_MERGED_USAGE + _ANSWER,
        rounding=_rounding_of_weights,
    ),
    "gguf": Export(
        title="GGUF",
        library="gguf",
        types=GGUF_TYPES,
        reader="llama.cpp",
        write=_write_gguf,
        usage="```bash\nllama-cli -m {file} --jinja -cnv\n```",
        rounding=_rounding_of_llama_cpp,
    ),
    "gguf-lora": Export(
        title="LoRA adapter in GGUF",
        library="gguf",
        types=("f32",),
        reader="llama.cpp",
        write=_write_gguf_lora,
        usage=_GGUF_LORA_USAGE,
        rounding=_not_rounded,
        is_adapter=True,
        base_of=_gguf_base,
    ),
    "ollama": Export(
        title="model for Ollama",
        library="gguf",
        types=GGUF_TYPES,
        reader="llama.cpp",
        write=_write_ollama,
        usage="```bash\nollama create {name} -f Modelfile\nollama run {name}\n```",
        rounding=_rounding_of_llama_cpp,
        faults=ollama.check_modelfile,
    ),
}

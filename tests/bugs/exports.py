"""Exports: merged models and GGUF files equal the trained model (bugs 7, 21, 22, 25, 26, 27, 28)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.bugs.adapters import LEARN, close, logits_of, peft_logits
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant
from tests.bugs.stopping import chatml_model
from tests.data.toy_tokenizers import qwen_like
from tests.tiny_models import write_model
from torch import Tensor

from lorafit import load
from lorafit.errors import LorafitError
from lorafit.export import run_source
from lorafit.export.run import export_run
from lorafit.model.adapter_file import CONFIG, WEIGHTS
from lorafit.training.run import Result


def _exported(result: Result, kind: str, type_name: str | None = "f32") -> Path:
    """An export without lorafit's own verification, because the probe must detect the bug."""
    return export_run(result.path, kind, type_name=type_name, verify=False, offline=True).path


def _delta(result: Result, name: str) -> Tensor:
    """The update scale * B A of a weight, from the files of the adapter."""
    config = json.loads((result.adapter / CONFIG).read_text())
    tensors = load_file(result.adapter / WEIGHTS)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    divisor = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    return product * (config["lora_alpha"] / divisor)


@probe(
    7,
    Plant("export.merge:generation_config", "list(source.contract.stop_ids)", "[source.contract.eos_id]"),
)
def an_exported_model_has_the_stop_tokens(lab: Lab) -> None:
    """The template ends turns with a token that is not in the base's configs: it is in the exported config."""
    folder = _exported(lab.run(f"model.name={chatml_model(lab)}"), "merged")
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert 261 in (ends if isinstance(ends, list) else [ends])


@probe(
    21,
    Plant(
        "model.lora:LoraLinear.merge",
        'weight.float(), tensors["lora_B"]',
        '(weight.float() * 7 / weight.abs().max()).round() * weight.abs().max() / 7, tensors["lora_B"]',
    ),
    Plant(
        "export.run_source:open_source",
        "if stored.dtype not in BY_SAFETENSORS_NAME:",
        "if not stored.dtype:",
    ),
)
def a_merge_uses_the_original_weights(lab: Lab) -> None:
    """A run on an 8-bit base: the merge is the file's weights plus the adapter; a quantised file is refused."""
    result = lab.run(*LEARN, "model.quantize=int8")
    merged = load_file(_exported(result, "merged") / "model.safetensors")
    base = load_file(lab.model() / "model.safetensors")
    for name, tensor in base.items():
        expected = tensor + _delta(result, name) if name.endswith("_proj.weight") else tensor
        assert torch.allclose(merged[name], expected, rtol=1e-5, atol=1e-6), name

    quantised = {name: t.to(torch.int8) if "q_proj" in name else t for name, t in base.items()}
    save_file(quantised, lab.model() / "model.safetensors", {"format": "pt"})
    # otherwise the changed base is refused first
    lab.patch.setattr(run_source, "check_base", lambda *_: "")
    try:
        _exported(result, "merged", "bf16")
    except LorafitError as error:
        assert "16 or 32 bits only" in str(error)
    else:
        raise AssertionError("an adapter was merged into 8 bits")


@probe(
    22,
    Plant(
        "export.merge:write_merged", 'config.pop("dtype", None)', 'config.pop("tie_word_embeddings", None)'
    ),
)
def a_merged_tied_model_equals_the_live_one(lab: Lab) -> None:
    """Head and embedding are one table: transformers' logits of the merged folder equal the live model's."""
    result = lab.run(f"model.name={lab.model('qwen2', name='tied')}", *LEARN)
    live = logits_of(load(result.path, device="cpu").network)
    assert close(peft_logits(_exported(result, "merged"), None), live)


@probe(
    25,
    Plant("export.merge:write_merged", 'config.pop("dtype", None)', 'config.pop("rope_scaling", None)'),
    Plant(
        "export.gguf_model:write_gguf", 'if arch.rope.kind == "llama3" else {}', "if source is None else {}"
    ),
)
def exports_keep_the_rope_scaling(lab: Lab) -> None:
    """Llama 3's RoPE scaling: logits of the merged folder at far positions, and the factors in the GGUF file."""
    result = lab.run(f"model.name={lab.model('llama3', name='scaled')}", *LEARN)
    ids = torch.arange(200) * 7 % 256
    live = logits_of(load(result.path, device="cpu").network, ids)
    assert close(peft_logits(_exported(result, "merged"), None, ids), live)
    tensors, _ = _read(_exported(result, "gguf"))
    assert "rope_freqs.weight" in tensors, "the GGUF file has no factors"
    assert float(tensors["rope_freqs.weight"].max()) == 8.0


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of the GGUF file in a folder, read by llama.cpp's package."""
    import gguf

    [file] = folder.glob("*.gguf")
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """The rows of a q or k projection in Hugging Face's order, from llama.cpp's order."""
    size = len(weight) // heads
    half = size // 2
    rows = [
        head * size + 2 * (index % half) + index // half for head in range(heads) for index in range(size)
    ]
    return weight[rows]


@probe(
    26,
    Plant("export.gguf_model:permuted", "rows.transpose(1, 2).flatten(0, 2)", "rows.flatten(0, 2)"),
    Plant(
        "export.gguf_model:permuted", 'module.endswith((".q_proj", ".k_proj"))', 'module.endswith(".q_proj")'
    ),
    Plant("export.gguf_model:write_lora", 'permuted(factors["lora_B"], name, arch)', 'factors["lora_B"]'),
)
def gguf_rows_of_q_and_k_equal_the_merged_ones(lab: Lab) -> None:
    """Four heads, two key heads: q and k of the GGUF file, and B of its adapter, equal the merged ones."""
    result = lab.run(*LEARN)
    merged = load_file(_exported(result, "merged") / "model.safetensors")
    tensors, _ = _read(_exported(result, "gguf"))
    factors, _ = _read(_exported(result, "gguf-lora"))
    adapter = load_file(result.adapter / WEIGHTS)
    for letter, heads in (("q", 4), ("k", 2)):
        name = f"model.layers.1.self_attn.{letter}_proj"
        rows = _unpermuted(tensors[f"blk.1.attn_{letter}.weight"], heads)
        assert torch.equal(rows, merged[f"{name}.weight"]), letter
        b = _unpermuted(factors[f"blk.1.attn_{letter}.weight.lora_b"], heads)
        assert torch.equal(b, adapter[f"base_model.model.{name}.lora_B.weight"]), f"B of {letter}"
    assert torch.equal(tensors["blk.1.attn_v.weight"], merged["model.layers.1.self_attn.v_proj.weight"])


@probe(
    27,
    Plant(
        "export.gguf_vocabulary:_pre", "    raise ModelError(", '    return "gpt-2"\n    raise ModelError('
    ),
    Plant(
        "export.gguf_vocabulary:_tokens", "kinds.append(TokenType.CONTROL)", "kinds.append(TokenType.NORMAL)"
    ),
)
def a_tokenizer_is_exported_unchanged_or_refused(lab: Lab) -> None:
    """A split pattern that llama.cpp does not know is refused; control tokens are marked as control tokens."""
    _, values = _read(_exported(lab.run(), "gguf"))
    kinds = values["tokenizer.ggml.token_type"]
    assert [kinds[token] for token in (65, 256, 257)] == [1, 3, 3], "control tokens are not marked"
    assert values["tokenizer.ggml.eos_token_id"] == 257

    model = write_model(lab.folder / "odd", vocab_size=420)
    qwen_like(model)
    spec = json.loads((model / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[^ ]+| +"}
    (model / "tokenizer.json").write_text(json.dumps(spec))
    (model / "generation_config.json").unlink()
    result = lab.run(f"model.name={model}", name="odd-run")
    try:
        _exported(result, "gguf")
    except LorafitError as error:
        assert "no name for the pattern" in str(error)
    else:
        raise AssertionError("an unknown split pattern was exported")


@probe(
    28,
    Plant("export.gguf_model:write_lora", 'alpha", spec.scale * spec.rank', 'alpha", spec.alpha'),
    Plant(
        "model.saved_adapter:SavedAdapter.merged",
        "self.spec.of(module).scale",
        "self.spec.alpha / self.spec.rank",
    ),
)
def exports_have_the_adapters_scale(lab: Lab) -> None:
    """rsLoRA, alpha different from rank: the merged weights, and the scale of llama.cpp."""
    result = lab.run(*LEARN, "lora.rslora=true", "lora.alpha=3")
    merged = load_file(_exported(result, "merged") / "model.safetensors")
    base, name = load_file(lab.model() / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(merged[name], base[name] + _delta(result, name), rtol=1e-5, atol=1e-6)
    _, values = _read(_exported(result, "gguf-lora"))
    assert abs(values["adapter.lora.alpha"] / 4 - 3 / 4**0.5) < 1e-6, "llama.cpp divides by the rank"

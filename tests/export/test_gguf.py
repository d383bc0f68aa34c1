"""GGUF files: every family read by llama.cpp as our engine computes it, and every tensor where it belongs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tests.export.made import source_of
from tests.model.published import write_published
from tests.runs import run_to_export
from tests.tiny_models import FAMILIES, config_of, write_model

from lorafit.errors import ModelError
from lorafit.export.gguf_model import gguf_names, permuted, write_gguf, write_lora
from lorafit.export.gguf_types import rounded, tensor_type
from lorafit.export.run import export_run
from lorafit.model.architecture import parse_architecture
from lorafit.model.attention import rotate
from lorafit.model.llama import rotary_table

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_every_family_as_we_do(family: str, tmp_path: Path) -> None:
    """Float32 throughout: what differs is the order of sums, so a name, norm, bias or angle at fault shows."""
    window = {"sliding_window": 100} if "window" in family else {}
    run = run_to_export(tmp_path, model=write_model(tmp_path / "model", family, **window))
    done = export_run(run, "gguf", output=tmp_path / "gguf", type_name="f32", offline=True)
    assert done.parity["verified"]
    assert done.parity["largest_difference"] < 2e-4
    assert done.parity["same_greedy_answers"] == done.parity["prompts"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
        ("granite", {}),
        ("olmo2", {"hidden_size": 64}),  # llama.cpp has norms of q and k of the width of the network
        ("hunyuan", {}),
        ("lfm2", {"hidden_size": 64}),  # and LFM2 too
        ("qwen3_5", {"linear_value_head_dim": 8}),
    ],
)
def test_llama_cpp_computes_the_published_types_as_we_do(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    run = run_to_export(tmp_path, model=write_published(tmp_path / "model", family, **changes))
    done = export_run(run, "gguf", output=tmp_path / "gguf", type_name="f32", offline=True)
    assert done.parity["verified"]
    assert done.parity["largest_difference"] < 2e-4


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3", "`gemma3_text` networks are not supported"),
        ("smollm3", "the layers without rotary positions"),
        ("qwen3_5", "keys and values of other widths"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, message: str, tmp_path: Path) -> None:
    run = run_to_export(tmp_path, model=write_published(tmp_path / "model", family))
    with pytest.raises(ModelError, match=message):
        export_run(run, "gguf", output=tmp_path / "gguf", type_name="f32", offline=True, verify=False)


@pytest.mark.parametrize("family", ["llama-biases", "qwen3"])
def test_llama_cpp_adds_the_adapter_as_we_do(family: str, tmp_path: Path) -> None:
    run = run_to_export(tmp_path, "lora.rslora=true", family=family)
    done = export_run(run, "gguf-lora", output=tmp_path / "lora", offline=True)
    assert done.parity["largest_difference"] < 2e-4


def test_llama_cpp_adds_the_adapter_of_a_delta_rule_as_we_do(tmp_path: Path) -> None:
    """Columns of A and rows of B are in the order of its value heads."""
    base = write_published(tmp_path / "model", "qwen3_5", linear_value_head_dim=8)
    done = export_run(
        run_to_export(tmp_path, model=base), "gguf-lora", output=tmp_path / "lora", offline=True
    )
    assert done.parity["largest_difference"] < 2e-4


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_tensor_is_the_merged_weight_in_its_type(
    type_name: str, finished_run: Path, tmp_path: Path
) -> None:
    """The reader of the `gguf` package gives back each weight, its rows put back in order, rounded as it says."""
    source = source_of(finished_run)
    write_gguf(source, tmp_path / "model.gguf", type_name, lambda done, total: None)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    names = gguf_names(source, "llama")
    assert written.keys() == set(names.values())
    for name in source.weights:
        wanted = source.tensor(name).float()
        kind = tensor_type(type_name, name, tuple(wanted.shape))
        tensor = written[names[name]]
        assert tensor.tensor_type == kind
        numbers = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = 4 if "q_proj" in name else 2
            numbers = numbers.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        torch.testing.assert_close(numbers, rounded(wanted, kind), rtol=0, atol=0)
        most = {"f32": 0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 0.02, "q4_0": 0.25}[type_name]
        assert (numbers - wanted).norm() <= most * wanted.norm()
    kinds = {tensor.tensor_type for tensor in written.values()}
    wide = {"q8_0": {Type.Q8_0, Type.F16}, "q4_0": {Type.Q4_0, Type.Q8_0, Type.F16}}
    assert kinds == {Type.F32} | wide.get(type_name, {getattr(Type, type_name.upper())})


def test_permuted_rows_turn_neighbours_as_ours_turn_halves() -> None:
    """The property that the order of rows must have, said without llama.cpp: rotating gives the same scores."""
    arch = parse_architecture(config_of("llama"), "test")
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = (x @ weight.t()).unflatten(-1, (4, 8))
    theirs = (x @ permuted(weight, "model.layers.0.self_attn.q_proj.weight", arch).t()).unflatten(
        -1, (4, 4, 2)
    )
    rotary = rotary_table(torch.arange(7), arch.rope, 8)
    cos, sin = (table.double()[:, None] for table in rotary)
    halves = rotate(ours, (rotary[0].double(), rotary[1].double()))
    a, b = theirs.unbind(-1)
    neighbours = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    scores = [torch.einsum("qhd,khd->hqk", turned, turned) for turned in (halves, neighbours)]
    torch.testing.assert_close(*scores)


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    run = run_to_export(tmp_path, family="mistral-window")
    source = source_of(run)
    write_gguf(source, tmp_path / "model.gguf", "q8_0", lambda done, total: None)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    wanted: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "llama.context_length": 5,  # the window: llama.cpp has none for this architecture
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: fields[key] for key in wanted} == wanted
    assert len(fields["tokenizer.ggml.tokens"]) == 260
    assert fields["tokenizer.chat_template"].startswith("{{- bos_token }}")


def test_an_adapter_file_holds_factors_and_alpha_only(tmp_path: Path) -> None:
    run = run_to_export(tmp_path, "lora.targets=[q_proj, v_proj]")
    source = source_of(run)
    write_lora(source, tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    names = [f"blk.{layer}.attn_{part}.weight" for layer in (0, 1) for part in ("q", "v")]
    assert {t.name for t in reader.tensors} == {f"{name}.lora_{half}" for name in names for half in "ab"}
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    assert reader.fields["general.type"].contents() == "adapter"

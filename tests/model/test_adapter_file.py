"""PEFT folders both ways: peft loads ours with equal logits, and we continue theirs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import random_network, write_model

from lorafit.errors import ModelError
from lorafit.model.adapter_file import (
    CONFIG,
    WEIGHTS,
    adapter_files,
    adapter_tensors,
    load_adapter,
)
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.model.saved_adapter import read_spec

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 40)


def tuned(family: str = "llama", *targets: str, rslora: bool = False) -> tuple[Llama, LoraSpec]:
    network = random_network(family)
    spec = attach(network, LoraSpec(4, 6.0, 0.0, targets or ("all-linear",), rslora), seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for module in adapted(network).values():
            module.lora_B.copy_(0.1 * torch.randn(module.lora_B.shape, generator=generator))
    return network, spec


def logits(network: Llama) -> torch.Tensor:
    return network.logits(network.hidden(IDS, PackedDocuments([len(IDS)]))).detach()


def save(folder: Path, network: Llama, spec: LoraSpec) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(adapter_tensors(network), spec, "some/base", None).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("targets", "rslora"),
    [(("all-linear",), False), (("q_proj", "v_proj"), True), (("re:.*layers.1.*(q|up)_proj",), False)],
    ids=["all", "rslora", "partial"],
)
def test_peft_loads_our_folder_with_equal_logits(
    family: str, targets: tuple[str, ...], rslora: bool, tmp_path: Path
) -> None:
    network, spec = tuned(family, *targets, rslora=rslora)
    model = transformers.AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "base", family))
    theirs = peft.PeftModel.from_pretrained(model, save(tmp_path / "adapter", network, spec))
    with torch.no_grad():
        peer = theirs(input_ids=IDS[None]).logits[0]
        base = theirs.unload()(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(network), peer, rtol=1e-5, atol=1e-5)
    assert (peer - base).abs().max() > 0.01


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*mlp\.(up|down)_proj"])
def test_an_adapter_made_by_peft_is_continued(targets: Any, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    theirs.save_pretrained(tmp_path / "theirs")
    network = random_network()
    spec = attach(network, read_spec(tmp_path / "theirs"), seed=0)
    load_adapter(network, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(
            logits(network), theirs(input_ids=IDS[None]).logits[0], rtol=1e-5, atol=1e-5
        )
    ours = load_file(save(tmp_path / "ours", network, spec) / WEIGHTS)
    original = load_file(tmp_path / "theirs" / WEIGHTS)
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in ours)


def test_a_saved_adapter_comes_back_to_the_bit(tmp_path: Path) -> None:
    network, spec = tuned()
    folder = save(tmp_path, network, spec)
    again = random_network()
    assert dataclasses.replace(attach(again, read_spec(folder), seed=1), dropout=0.0) == spec
    load_adapter(again, folder)
    assert torch.equal(logits(network), logits(again))


def test_an_adapter_that_does_not_fit_names_every_tensor(tmp_path: Path) -> None:
    network, spec = tuned()
    folder = save(tmp_path, network, spec)
    stored = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    stored["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = stored.pop(name)
    other = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    stored[other] = torch.zeros(2, 2)
    nan = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    stored[nan] = torch.full_like(stored[nan], float("nan"))
    save_file(stored, folder / WEIGHTS)
    with pytest.raises(ModelError) as caught:
        load_adapter(network, folder)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert f"`{name}` is missing" in text
    assert "layers.7.self_attn.q_proj.lora_A.weight` fits nothing" in text
    assert f"`{other}` has shape [2, 2]" in text
    assert f"`{nan}` holds numbers that are not finite" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"peft_type": "IA3"}, "not LORA"),
        ({"r": 0}, "`r` is 0"),
        ({"lora_alpha": "x"}, "`lora_alpha` is 'x'"),
        ({"target_modules": []}, "names no modules"),
    ],
)
def test_what_lorafit_cannot_honour_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path, *tuned())
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        read_spec(folder)
    assert message in str(caught.value)

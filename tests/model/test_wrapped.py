"""Text models in networks with towers for images: found under their prefix, and their adapters named for the whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.made import source_of
from tests.model.published import theirs, with_adapters
from tests.runs import run_to_export
from tests.tiny_models import config_of, write_prompting

from lorafit.errors import ModelError
from lorafit.export.merge import write_merged
from lorafit.export.run import export_run
from lorafit.model import weights
from lorafit.model.adapter_file import adapter_files, adapter_tensors
from lorafit.model.architecture import parse_architecture, read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.loss import loss_sum
from lorafit.model.saved_adapter import put_on, read_adapter
from lorafit.model.weights import load_network, stored_weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(40) * 7 % 250
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    },
    "mistral3": {
        "model_type": "pixtral",
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "head_dim": 8,
    },
    "qwen3_5": {
        "model_type": "qwen3_5_vision",
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    },
}
TEXT = {"gemma3": "gemma3", "mistral3": "ministral3", "qwen3_5": "qwen3_5"}
WRAPPERS = list(VISION)


def write_wrapped(folder: Path, name: str) -> Path:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **VISION[name]}
    tied = name == "gemma3"
    text = config_of(TEXT[name], tie_word_embeddings=tied)
    ids = (
        {"image_token_index": 255, "mm_tokens_per_image": 4}
        if name == "gemma3"
        else {"image_token_index": 255}
    )
    config = transformers.AutoConfig.for_model(
        name, text_config=text, vision_config=tower, tie_word_embeddings=tied, **ids
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.12 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    if name == "qwen3_5":  # as published, with layers that transformers does not read
        path = folder / "model.safetensors"
        more = {f"mtp.layers.0.{part}.weight": torch.randn(4, 4) for part in ("fc", "norm")}
        save_file({**load_file(path), **more}, path, {"format": "pt"})
    return write_prompting(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_wrapped(tmp_path_factory.mktemp(name), name) for name in WRAPPERS}


def ours(folder: Path) -> Llama:
    return load_network(folder, read_architecture(folder), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", WRAPPERS)
def test_logits_and_gradients_equal_those_of_the_whole(name: str, folders: dict[str, Path]) -> None:
    network, model = ours(folders[name]), theirs(folders[name])
    others = ("vision", "visual", "multi_modal")
    names = {n for n, _ in model.named_parameters() if not any(other in n for other in others)}
    assert {name for name, _ in network.named_parameters()} == names
    model, pairs = with_adapters(network, model)
    hidden = network.hidden(IDS, PackedDocuments([40]))
    loss_sum(network.normed(hidden), network.lm_head.weight, IDS.roll(-1)).backward()
    logits = model(input_ids=IDS[None]).logits[0]
    torch.nn.functional.cross_entropy(logits, IDS.roll(-1), reduction="sum").backward()
    torch.testing.assert_close(network.logits(hidden), logits, rtol=1e-5, atol=1e-5)
    for name, (mine, peers) in pairs.items():
        torch.testing.assert_close(mine.grad, peers.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", WRAPPERS)
def test_other_towers_are_left_out_and_counted(
    name: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    weights._name_left_out.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours(folders[name])
    left_out = stored_weights(folders[name], read_architecture(folders[name])).left_out
    part, other = ("visual", "mtp") if name == "qwen3_5" else ("vision_tower", "multi modal projector")
    tower = sum(part in name for name in left_out)
    assert tower > 5
    assert caplog.text.count(f"left out: {tower} tensors of the {part.replace('_', ' ')}") == 1
    assert f"left out: {len(left_out) - tower} tensors of the {other}" in caplog.text


@pytest.mark.parametrize("name", WRAPPERS)
def test_names_of_before_are_read_too(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Files of 2025: `language_model.model.layers...` and `vision_tower...` without the first `model.`."""
    folder = folders[name]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    now = {n.replace("language_model.model.", "model.language_model."): t for n, t in tensors.items()}
    now = {n.removeprefix("language_model.") if "lm_head" in n else n: t for n, t in now.items()}
    old = {n.replace("model.language_model.", "language_model.model."): t for n, t in now.items()}
    old = {
        f"language_model.{n}" if "lm_head" in n else n.replace("model.vis", "vis"): t for n, t in old.items()
    }
    networks = []
    for stored in (now, old):
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
        networks.append(ours(tmp_path).state_dict())
    assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())


@pytest.mark.parametrize("name", WRAPPERS)
def test_peft_puts_the_adapter_on_the_whole_and_on_no_other_tower(
    name: str, folders: dict[str, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    network = ours(folders[name])
    spec = attach(network, LoraSpec(4, 8.0, 0.0, ("q_proj", "v_proj"), False), seed=0)
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    for file, content in adapter_files(adapter_tensors(network), spec, "base", None).items():
        (tmp_path / file).write_bytes(content)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"][0].startswith("model.language_model.layers.")
    model = peft.PeftModel.from_pretrained(theirs(folders[name]), tmp_path)
    adapted = {n for n, module in model.named_modules() if hasattr(module, "lora_A") and module.lora_A}
    assert len(adapted) == len(config["target_modules"]) == 2 * len(network.arch.attention_layers)
    assert all("language_model" in name for name in adapted)
    assert not [warning for warning in recwarn if "missing" in str(warning.message).lower()]
    again = ours(folders[name])
    put_on(again, read_adapter(tmp_path))
    with torch.no_grad():
        logits = network.logits(network.hidden(IDS, PackedDocuments([40])))
        torch.testing.assert_close(logits, model(input_ids=IDS[None]).logits[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(again.logits(again.hidden(IDS, PackedDocuments([40]))), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_merged_model_has_its_towers_and_is_read_back(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    run = run_to_export(tmp_path, model=folders[name])
    for kind in ("merged", "adapter"):
        done = export_run(run, kind, output=tmp_path / kind, offline=True)
        assert done.parity["verified"]
        assert done.parity["same_greedy_answers"] == done.parity["prompts"]
    source = source_of(run)
    write_merged(source, tmp_path, torch.float32, lambda done, total: None)
    merged = load_file(tmp_path / "model.safetensors")
    assert source.left_out.keys() <= merged.keys()
    assert all(torch.equal(merged[name], stored.read()) for name, stored in source.left_out.items())


def test_a_text_model_of_another_type_is_refused() -> None:
    raw = {"model_type": "mistral3", "text_config": {"model_type": "qwen9"}}
    with pytest.raises(ModelError, match="has the model type `qwen9`"):
        parse_architecture(raw, "config.json")
    with pytest.raises(ModelError, match="`text_config` is no object"):
        parse_architecture({"model_type": "gemma3"}, "config.json")

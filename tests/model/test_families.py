"""A new architecture is one record of FAMILIES: a toy one is read, loads and trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny_models
from tests.tiny_models import random_network, write_model

from lorafit.errors import ModelError
from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.config_fields import Fields
from lorafit.model.families import FAMILIES, Family
from lorafit.model.layer_fields import Windows
from lorafit.model.lora import LoraSpec, adapter_parameters, attach
from lorafit.model.loss import loss_sum
from lorafit.model.weights import load_network

IDS = torch.arange(30) * 7 % 256


def every_second_layer(fields: Fields, num_layers: int) -> Windows:
    window = fields.count("local_window")
    return tuple(window if layer % 2 else None for layer in range(num_layers))


TOY = Family(
    gguf="qwen3",
    qkv_bias="use_bias",
    o_bias=True,
    qk_norm="head",
    tie_word_embeddings=True,
    windows=every_second_layer,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    config = {"model_type": "toy", "use_bias": True, "local_window": 4}
    monkeypatch.setitem(tiny_models.FAMILIES, "toy", config)


@pytest.mark.usefixtures("toy")
def test_a_toy_family_is_read_and_trains(tmp_path: Path) -> None:
    arch = read_architecture(write_model(tmp_path / "model", "toy"))
    assert (arch.qkv_bias, arch.o_bias, arch.mlp_bias) == (True, True, False)
    assert arch.tie_word_embeddings
    assert arch.windows == (None, 4)
    network = load_network(tmp_path / "model", arch, torch.float32, torch.device("cpu"))
    assert arch.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), seed=0)
    hidden = network.hidden(IDS, PackedDocuments([len(IDS)]))
    loss_sum(network.model.norm(hidden), network.lm_head.weight, IDS.roll(-1)).backward()
    gradients = [
        parameter.grad for name, parameter in adapter_parameters(network).items() if "lora_B" in name
    ]
    assert len(gradients) == 14
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.usefixtures("toy")
def test_the_fields_of_a_toy_family_are_checked(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "toy")
    text = (folder / "config.json").read_text().replace('"local_window": 4', '"local_window": "wide"')
    (folder / "config.json").write_text(text.replace('"use_bias": true', '"use_bias": 3'))
    with pytest.raises(ModelError) as caught:
        read_architecture(folder)
    assert "`local_window` is 'wide'" in str(caught.value)
    assert str(caught.value).count("`use_bias` is 3") == 1


def test_weights_of_a_layer_are_those_of_its_linears() -> None:
    arch = random_network("llama-biases").arch
    layer = random_network("llama-biases").model.layers[0]
    shapes = {
        name.rpartition(".")[2]: (module.out_features, module.in_features)
        for name, module in layer.named_modules()
        if name.endswith("_proj")
    }
    assert arch.linears(0) == list(shapes.items())

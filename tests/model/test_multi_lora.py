"""Rows of one pass that take different adapters: each is what it would be with that adapter alone on the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.tiny_models import random_network, write_adapter
from torch import Tensor

from lorafit.errors import ConfigError, ModelError
from lorafit.model import native
from lorafit.model.adapter_file import load_adapter
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.multi_lora import Adapters
from lorafit.model.quant import Int8Linear
from lorafit.model.saved_adapter import read_spec

SPECS = {
    "all": LoraSpec(rank=4, alpha=8.0, dropout=0.1, targets=("all-linear",), rslora=False),
    "qv": LoraSpec(rank=7, alpha=16.0, dropout=0.0, targets=("q_proj", "v_proj"), rslora=False),
    "some": LoraSpec(rank=3, alpha=5.0, dropout=0.0, targets=("re:.*layers.1.*_proj",), rslora=True),
}
NAMES = ["all", None, "qv", "some", "qv", None, "all"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with other targets, ranks and scales, whose B is not zero."""
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(home / name, random_network(head_dim=16), spec, seed=number)
        for number, (name, spec) in enumerate(SPECS.items())
    }


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
    elif native.kernels() is None:
        pytest.skip(native.missing())
    return str(request.param)


@torch.inference_mode()
def logits(network: Llama, num_rows: int) -> Tensor:
    """What rows of one token each say."""
    ids = torch.arange(num_rows) * 7 % 250
    return network.logits(network.hidden(ids, PackedDocuments([1] * num_rows)))


def alone(folder: Path | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    network = random_network(dtype=dtype, head_dim=16)
    if folder is not None:
        attach(network, read_spec(folder), seed=0)
        load_adapter(network, folder)
    return logits(network.eval(), num_rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_row_is_what_its_adapter_makes_of_it(
    dtype: torch.dtype, path: str, folders: dict[str, Path]
) -> None:
    network = random_network(dtype=dtype, head_dim=16)
    adapters = Adapters(network, folders)
    expected = {name: alone(name and folders[name], len(NAMES), dtype) for name in (None, *SPECS)}
    assert len({tensor[0].sum().item() for tensor in expected.values()}) == 4

    def check(names: Sequence[str | None]) -> None:
        adapters.take(names)
        made = logits(network, len(NAMES))
        for row, name in enumerate(names if len(names) > 1 else list(names) * len(NAMES)):
            if path == "compiled" and dtype != torch.float64:
                assert torch.equal(made[row], expected[name][row])
            else:
                close = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(made[row], expected[name][row], rtol=close, atol=close)

    check(NAMES)
    check([None])
    check(["all", *[None] * 6])
    check(["some"])
    check(NAMES[::-1])
    check(["qv"] * 7)


def test_eight_bits_take_adapters_too(path: str, folders: dict[str, Path]) -> None:
    def quantized() -> Llama:
        network = random_network(head_dim=16)
        for layer in network.model.layers:
            layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj.weight.detach())
        return network

    network = quantized()
    Adapters(network, folders).take(NAMES)
    made = logits(network, len(NAMES))
    for name in SPECS:
        other = quantized()
        Adapters(other, {name: folders[name]}).take([name])
        rows = [row for row, taken in enumerate(NAMES) if taken == name]
        # in torch, rows are rounded to 8 bits by a scale that depends on no other row, but outliers do
        torch.testing.assert_close(made[rows], logits(other, len(NAMES))[rows], rtol=2e-2, atol=2e-2)


def test_an_adapter_that_does_not_fit_leaves_the_network_as_it_was(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    network = random_network(head_dim=16)
    before = logits(network, 3)
    foreign = write_adapter(tmp_path / "wide", random_network(hidden_size=64), SPECS["qv"], seed=1)
    with pytest.raises(ModelError, match="has shape"):
        Adapters(network, {**folders, "wide": foreign})
    with pytest.raises(ConfigError, match="matches no linear"):
        config = (foreign / "adapter_config.json").read_text()
        (foreign / "adapter_config.json").write_text(config.replace("q_proj", "nothing"))
        Adapters(network, {"none": foreign})
    assert torch.equal(logits(network, 3), before)

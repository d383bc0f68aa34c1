"""Trained rows of embedding and head: gradients and layout of peft, larger vocabularies, the base as it was."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import random_network, write_model

from lorafit.errors import ModelError
from lorafit.model.adapter_file import WEIGHTS, adapter_files, adapter_tensors, fill_adapter
from lorafit.model.attention import PackedDocuments
from lorafit.model.build import build_saved
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapter_parameters, attach, detach, disable_adapter
from lorafit.model.loss import loss_sum_and_parts
from lorafit.model.tables import attach_tables

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZE = 260
IDS = torch.tensor([4, 261, 9, 260, 4, 77, 261, 30, 9, 260])
TOKENS = {260: (70, 71), 261: (9,), 4: ()}  # two new ones, and one that is there
SPEC = LoraSpec(4, 6.0, 0.0, ("q_proj", "down_proj"), False, tokens=tuple(TOKENS))
KINDS: dict[str, list[str]] = {"tokens": [], "whole": ["embed_tokens", "lm_head"]}
FAMILIES = ("llama", "llama-tied")


def ours(family: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Llama, LoraSpec]:
    network = random_network(family, dtype=dtype)
    spec = attach(network, SPEC, seed=0)
    attach_tables(network, TOKENS, KINDS[kind])
    return network.train(), spec


def changed(network: Llama) -> Llama:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return network


def parts(network: Llama) -> torch.Tensor:
    hidden = network.normed(network.hidden(IDS, PackedDocuments([len(IDS)])))
    head, trained = network.lm_head.weight, network.trained_head
    return loss_sum_and_parts(hidden, head, IDS.roll(-1), None, 0.0, trained)[1]


def logits(network: Llama) -> torch.Tensor:
    with torch.inference_mode():
        return network.logits(network.hidden(IDS, PackedDocuments([len(IDS)])))


def saved(folder: Path, network: Llama, spec: LoraSpec) -> Path:
    folder.mkdir()
    for name, content in adapter_files(adapter_tensors(network), spec, "base", None).items():
        (folder / name).write_bytes(content)
    return folder


def resized(base: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(SIZE + 2)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_folder_on_the_resized_base_and_has_the_same_gradients(
    family: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    network, spec = ours(family, kind)
    folder = saved(tmp_path / "adapter", changed(network), spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(resized(bases[family]), folder, is_trainable=True)
    torch.testing.assert_close(
        logits(network), theirs(input_ids=IDS[None]).logits[0].detach(), rtol=1e-5, atol=1e-5
    )
    if kind == "whole" and family == "llama-tied":
        return  # peft trains two tables there

    wide, _ = ours(family, kind, torch.float64)
    fill_adapter(wide, adapter_tensors(network), folder)
    theirs = theirs.double()
    factors = torch.linspace(0.2, 2, len(IDS), dtype=torch.float64)  # a function of the parts
    (parts(wide) * factors).sum().backward()  # type: ignore[no-untyped-call]
    losses = torch.nn.functional.cross_entropy(
        theirs(input_ids=IDS[None]).logits[0], IDS.roll(-1), reduction="none"
    )
    (losses * factors).sum().backward()
    named = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    named = {name.removesuffix(".weight") if "lora_" in name else name: p for name, p in named.items()}
    for name, parameter in adapter_parameters(wide).items():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-5, atol=1e-5)
    assert named.keys() == adapter_parameters(wide).keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_rows_come_back_and_the_base_stays(
    family: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    before = logits_of_known(random_network(family))
    network, spec = ours(family, kind)
    with disable_adapter(network):
        start = logits(network)
    folder = saved(tmp_path / "adapter", changed(network), spec)
    tuned = logits(network)
    again, _ = build_saved(bases[family], folder, "cpu", "float32")
    assert again.arch.vocab_size == SIZE + 2
    torch.testing.assert_close(logits(again), tuned, rtol=1e-5, atol=1e-5)
    with disable_adapter(network), disable_adapter(again):
        assert torch.equal(logits(network), start)
        torch.testing.assert_close(logits(again), start, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits_of_known(network), before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(again), tuned, rtol=1e-5, atol=1e-5)
    same, _ = ours(family, kind)
    fill_adapter(same, adapter_tensors(network), folder)
    assert torch.equal(logits(same), tuned)
    detach(network)
    assert network.arch.vocab_size == SIZE
    assert torch.equal(logits_of_known(network), before)
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == (family == "llama-tied")


def logits_of_known(network: Llama) -> torch.Tensor:
    known = torch.tensor([4, 9, 77, 30])
    with torch.inference_mode():
        return network.logits(network.hidden(known, PackedDocuments([4])))[:, :SIZE]


def test_new_rows_start_at_the_mean_of_their_pieces_and_only_chosen_rows_change() -> None:
    network, _ = ours("llama", "tokens")
    plain = random_network("llama").model.embed_tokens.weight
    logits(network)
    table = network.model.embed_tokens.weight
    torch.testing.assert_close(table[260], plain[[70, 71]].mean(0))
    assert torch.equal(table[261], plain[9])
    assert torch.equal(table[:SIZE], plain)
    logits(changed(network))
    differ = (table[:SIZE] != plain).any(1).nonzero().flatten().tolist()
    assert differ == [4]
    rows = [name for name in adapter_parameters(network) if "token_adapter" in name]
    assert rows == [f"{m}.token_adapter.trainable_tokens_delta" for m in ("model.embed_tokens", "lm_head")]


def test_rows_that_are_missing_between_base_and_adapter_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    network, spec = ours("llama", "tokens")
    folder = saved(tmp_path / "adapter", network, spec)
    assert load_file(folder / WEIGHTS)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace("261", "262"))
    with pytest.raises(ModelError, match="ids beyond the 260 embeddings"):
        build_saved(bases["llama"], folder, "cpu", "float32")

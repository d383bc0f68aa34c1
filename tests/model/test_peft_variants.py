"""Each variant computes what peft does: gradients, steps and logits, and peft loads the folder on the plain base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import random_network, write_model

from lorafit.errors import ConfigError
from lorafit.model.adamw import AdamW
from lorafit.model.adapter_file import adapter_files, adapter_tensors, fill_adapter, load_adapter
from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import (
    LoraSpec,
    PissaLinear,
    adapted,
    adapter_parameters,
    attach,
    disable_adapter,
)
from lorafit.model.loss import loss_sum
from lorafit.model.quant import QUANTIZERS
from lorafit.model.saved_adapter import read_adapter, read_spec
from lorafit.model.weights import load_network

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
loraplus = pytest.importorskip("peft.optimizers")

FAMILY = "llama-biases"
IDS = torch.arange(40) * 7 % 250
RANKS = {"q_proj": 2, "layers.1.mlp.up_proj": 6}
ALPHAS = {"q_proj": 5.0, "re:.*down_proj": 3.0}
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
    "alpha_pattern": {"q_proj": 5.0, "down_proj": 3.0},
}
# name: (what LoraSpec says, what peft's config says)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ranks": ({"ranks": RANKS, "alphas": ALPHAS}, PATTERNS),
    "dora": ({"variant": "dora"}, {"use_dora": True}),
    "dora-ranks": (
        {"variant": "dora", "ranks": RANKS, "alphas": ALPHAS, "rslora": True},
        {"use_dora": True, "use_rslora": True, **PATTERNS},
    ),
    "pissa": ({"variant": "pissa"}, {"init_lora_weights": "pissa"}),
    "olora": ({"variant": "olora", "rslora": True}, {"init_lora_weights": "olora", "use_rslora": True}),
    "pissa-ranks": (
        {"variant": "pissa", "ranks": RANKS, "alphas": ALPHAS},
        {"init_lora_weights": "pissa", **PATTERNS},
    ),
}


def spec_of(**changes: Any) -> LoraSpec:
    values = {"rank": 4, "alpha": 6.0, "dropout": 0.0, "targets": ("all-linear",), "rslora": False}
    return LoraSpec(**{**values, **changes})


def ours(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Llama, LoraSpec]:
    network = random_network(FAMILY, dtype=dtype)
    return network, attach(network, spec_of(**changes), seed=0)


def loss_of(network: Llama) -> torch.Tensor:
    hidden = network.hidden(IDS, PackedDocuments([len(IDS)]))
    return loss_sum(network.normed(hidden), network.lm_head.weight, IDS.roll(-1)) / len(IDS)


def logits(network: Llama) -> torch.Tensor:
    return network.logits(network.hidden(IDS, PackedDocuments([len(IDS)]))).detach()


def loss_of_theirs(model: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(input_ids=IDS[None]).logits[0], IDS.roll(-1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), FAMILY)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return write_model(tmp_path_factory.mktemp("wide"), "llama", **shape)


def theirs_of(base: Path, **changes: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **changes}))


def trained_parts(model: Any) -> dict[str, Any]:
    """peft's trained parameters by our names."""
    named = {
        name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad
    }
    return {name.replace(".default", "").removesuffix(".weight"): p for name, p in named.items()}


def test_steps_equal_those_of_peft(base: Path) -> None:
    """Also of LoRA+: AdamW with another rate of B, from the same start, ends at the same logits as peft's."""
    for name, (spec, config) in VARIANTS.items():
        network, _ = ours(**spec)
        theirs = theirs_of(base, **config)
        parts = trained_parts(theirs)
        assert parts.keys() == adapter_parameters(network).keys()
        if "init_lora_weights" not in config:  # else each starts by itself, equal up to signs
            with torch.no_grad():
                for part, parameter in adapter_parameters(network).items():
                    parameter.copy_(parts[part])
        network.train()
        ratio = 4.0 if name != "dora" else 1.0
        parameters = adapter_parameters(network)
        factors = {p: ratio for part, p in parameters.items() if part.endswith("lora_B") or p.ndim == 1}
        optimizer = AdamW(parameters.values(), 0.0, factors if ratio != 1 else None)
        peer = loraplus.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=ratio)
        for _ in range(3):
            loss, other = loss_of(network), loss_of_theirs(theirs)
            torch.testing.assert_close(loss, other.detach(), rtol=1e-5, atol=1e-5)
            loss.backward()
            other.backward()
            optimizer.step(2e-3)
            peer.step()
            optimizer.zero_grad()
            peer.zero_grad()
        with torch.no_grad():
            expected = theirs(input_ids=IDS[None]).logits[0]
        torch.testing.assert_close(logits(network.eval()), expected, rtol=1e-5, atol=2e-5, msg=name)
        with disable_adapter(network):
            plain = logits(network)
        torch.testing.assert_close(plain, logits(random_network(FAMILY)), rtol=0, atol=0)
        assert (plain - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_in_float64_equal_those_of_peft(name: str, base: Path) -> None:
    spec, config = VARIANTS[name]
    network, _ = ours(torch.float64, **spec)
    theirs = theirs_of(base, **config).double()
    parts = trained_parts(theirs)
    generator = torch.Generator().manual_seed(1)
    modules = adapted(network)
    with torch.no_grad():
        for part, parameter in adapter_parameters(network).items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            parts[part].copy_(parameter)
        for module_name, module in modules.items():  # the same base: peft rounds its residual to float32
            peer = theirs.get_submodule(f"base_model.model.{module_name}").base_layer
            start = module.scale * module.first_b @ module.first_a if isinstance(module, PissaLinear) else 0
            peer.weight.copy_(module.base.dequantize() - start)
    loss, other = loss_of(network.train()), loss_of_theirs(theirs)
    loss.backward()
    other.backward()
    torch.testing.assert_close(loss, other, rtol=1e-7, atol=0)  # transformers norms in float32
    for part, parameter in adapter_parameters(network).items():
        torch.testing.assert_close(parameter.grad, parts[part].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_loads_the_folder_on_the_plain_base(name: str, base: Path, tmp_path: Path) -> None:
    network, spec = ours(**VARIANTS[name][0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for file, content in adapter_files(adapter_tensors(network), spec, "some/base", None).items():
        (tmp_path / file).write_bytes(content)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(network), expected, rtol=1e-5, atol=1e-5)

    # the same tensors continue: read as any adapter, or as the checkpoint of the variant
    again = random_network(FAMILY)
    attach(again, read_spec(tmp_path), seed=5)
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(network), rtol=1e-5, atol=1e-5)
    same, _ = ours(**VARIANTS[name][0])
    fill_adapter(same, adapter_tensors(network), tmp_path)
    assert all(map(torch.equal, adapter_parameters(same).values(), adapter_parameters(network).values()))
    assert torch.equal(logits(same), logits(network))

    merged, saved = random_network(FAMILY), read_adapter(tmp_path)
    for module_name, module in adapted(network).items():
        weight = merged.get_submodule(module_name).weight
        whole = saved.merged(f"{module_name}.weight", weight.detach())
        torch.testing.assert_close(whole, weight + module.delta(), rtol=1e-4, atol=1e-5)
        weight.data = whole
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("variant", ["pissa", "olora", "dora"])
def test_a_quantised_base_stays_and_training_starts_at_it(variant: str, quantize: Any, wide: Path) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    network = load_network(
        wide, read_architecture(wide), torch.float32, torch.device("cpu"), quantize=quantize
    )
    assert isinstance(network.model.layers[0].mlp.up_proj, QUANTIZERS[quantize])
    plain = logits(network)
    attach(network, spec_of(variant=variant), seed=0)
    torch.testing.assert_close(logits(network.train()), plain, rtol=1e-4, atol=1e-4)
    loss = loss_of(network)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(network).values())


def test_dropout_of_dora_scales_the_product_of_the_dropped_input(base: Path) -> None:
    network, _ = ours(torch.float64, variant="dora", dropout=0.5, targets=("v_proj",))
    theirs = theirs_of(base, use_dora=True, lora_dropout=0.5, target_modules=["v_proj"]).double().train()
    kept = torch.nn.functional.dropout(torch.ones(len(IDS), 32, dtype=torch.float64), 0.5)
    name = "model.layers.1.self_attn.v_proj"
    ours_v, theirs_v = network.get_submodule(name), theirs.get_submodule(f"base_model.model.{name}")
    assert isinstance(ours_v, torch.nn.Module)
    x = torch.randn(len(IDS), 32, dtype=torch.float64)
    with torch.no_grad():
        for part in ("lora_A", "lora_B"):
            own = getattr(ours_v, part)
            own.copy_(torch.randn(own.shape, dtype=torch.float64))
            getattr(theirs_v, part)["default"].weight.copy_(own)
        theirs_v.lora_dropout["default"].forward = lambda y: y * kept
        out = ours_v.train().base(x)
        made = out + ours_v.added(x * kept, out)  # type: ignore[operator]
        torch.testing.assert_close(made, theirs_v(x), rtol=1e-6, atol=1e-6)


def test_names_that_are_not_adapted_and_too_large_ranks_are_refused() -> None:
    network = random_network(FAMILY)
    with pytest.raises(ConfigError, match="`k_proj` is not adapted"):
        attach(network, spec_of(targets=("q_proj",), ranks={"k_proj": 2}), seed=0)
    with pytest.raises(ConfigError, match="matches no linear"):
        attach(network, spec_of(alphas={"x_proj": 2.0}), seed=0)
    for variant in ("pissa", "olora"):
        with pytest.raises(ConfigError, match="rank 33 is too large"):
            attach(random_network(FAMILY), spec_of(rank=33, variant=variant), seed=0)

"""The network against transformers + peft: logits and every LoRA gradient, in float32 and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import FAMILIES, config_of, random_network, weights_of
from torch import Tensor

from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.model.loss import loss_sum

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LENGTHS = [9, 1, 14, 40]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def reference(family: str, dtype: torch.dtype, spec: LoraSpec, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same network in transformers with peft's adapter on it.

    transformers norms in float32 whatever the type; for float64 that is lifted, so that both sides are exact.
    """
    raw = config_of(family)
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager" if any("window" in key and raw[key] for key in raw) else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if dtype == torch.float64:
        norms = {type(module) for module in model.modules() if "RMSNorm" in type(module).__name__}
        for norm in norms:
            monkeypatch.setattr(norm, "forward", exact_norm)
        softmax = torch.nn.functional.softmax
        monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    weights = weights_of(random_network(family, dtype=dtype))
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules="all-linear" if spec.targets == ("all-linear",) else list(spec.targets),
            use_rslora=spec.rslora,
            task_type="CAUSAL_LM",
        ),
    ).to(dtype)


def exact_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers_and_peft(
    family: str, rslora: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LoraSpec(4, 6.0, 0.0, ("all-linear",), rslora)
    network = random_network(family, dtype=dtype)
    attach(network, spec, seed=1)
    theirs = reference(family, dtype, spec, monkeypatch)
    generator = torch.Generator().manual_seed(5)
    pairs = {}
    with torch.no_grad():
        for name, module in adapted(network).items():
            other = theirs.base_model.model.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                mine, peers = getattr(module, part), getattr(other, part)["default"].weight
                mine.copy_(torch.randn(mine.shape, generator=generator) * 0.1)
                peers.copy_(mine)
                pairs[f"{name}.{part}"] = (mine, peers)

    ids = torch.randint(0, 256, (sum(LENGTHS),), generator=generator)
    targets = torch.randint(0, 256, (sum(LENGTHS),), generator=generator)
    hidden = network.hidden(ids, PackedDocuments(LENGTHS))
    logits = network.logits(hidden)
    loss = loss_sum(network.model.norm(hidden), network.lm_head.weight, targets) / len(ids)
    loss.backward()

    peer_logits = torch.cat([theirs(input_ids=part[None]).logits[0] for part in ids.split(LENGTHS)])
    torch.nn.functional.cross_entropy(peer_logits, targets).backward()

    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(logits, peer_logits, rtol=tolerance, atol=tolerance)
    assert len(pairs) == 2 * 7 * 2
    for name, (mine, peers) in pairs.items():
        assert mine.grad is not None
        assert mine.grad.abs().max() > 0, name
        torch.testing.assert_close(mine.grad, peers.grad, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_bfloat16_is_no_further_from_the_truth_than_transformers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LoraSpec(4, 8.0, 0.0, ("all-linear",), False)
    truth, ours = random_network(family, dtype=torch.float64), random_network(family, dtype=torch.bfloat16)
    theirs = reference(family, torch.bfloat16, spec, monkeypatch)
    with torch.no_grad():  # all three start from the same rounded weights
        for parameter, rounded in zip(truth.parameters(), ours.parameters(), strict=True):
            parameter.copy_(rounded)
    generator = torch.Generator().manual_seed(2)
    attach(truth, spec, seed=1)
    attach(ours, spec, seed=1)
    with torch.no_grad():
        for name, module in adapted(truth).items():
            same, other = adapted(ours)[name], theirs.base_model.model.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                numbers = (torch.randn(getattr(module, part).shape, generator=generator) * 0.1).bfloat16()
                for copy in (
                    getattr(module, part),
                    getattr(same, part),
                    getattr(other, part)["default"].weight,
                ):
                    copy.copy_(numbers)
    ids = torch.randint(0, 256, (60,), generator=generator)
    targets = torch.randint(0, 256, (60,), generator=generator)

    def results(network: Llama) -> tuple[Tensor, Tensor]:
        hidden = network.hidden(ids, PackedDocuments([60]))
        loss_sum(network.model.norm(hidden), network.lm_head.weight, targets).backward()
        gradients = [m.grad.flatten() for m in network.parameters() if m.grad is not None]
        return network.logits(hidden).detach().double(), torch.cat(gradients).double()

    exact, mine = results(truth), results(ours)
    logits = theirs(input_ids=ids[None]).logits[0]
    torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").backward()
    modules = [theirs.base_model.model.get_submodule(name) for name in adapted(truth)]
    gradients = [
        getattr(module, part)["default"].weight.grad.flatten()
        for module in modules
        for part in ("lora_A", "lora_B")
    ]
    peers = logits.detach().double(), torch.cat(gradients).double()
    for got, other, right in zip(mine, peers, exact, strict=True):
        assert (got - right).norm() <= 1.1 * (other - right).norm()


def test_parameter_count_is_the_networks() -> None:
    for family in FAMILIES:
        network = random_network(family)
        assert network.arch.num_parameters == sum(parameter.numel() for parameter in network.parameters()), (
            family
        )

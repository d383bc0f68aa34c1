"""Checkpoints of the types in PUBLISHED, made by transformers in its own format, and its network with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import config_of, write_prompting
from torch import Tensor

from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach

SPEC = LoraSpec(4, 6.0, 0.0, ("all-linear",), False)


def write_published(folder: Path, family: str, **changes: Any) -> Path:
    """A model folder; weights are large enough that mistakes show."""
    import transformers

    config = transformers.AutoConfig.for_model(**config_of(family, **changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator, kind = torch.Generator().manual_seed(0), type(model).__name__
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # where the weights of norms are without training
            centre = 0 if "Gemma" in kind or ("Qwen3_5" in kind and "linear_attn" not in name) else 1
            if name.endswith("norm.weight"):
                parameter.copy_(centre + 0.1 * noise)
            else:
                parameter.copy_(
                    (0.5 if parameter.dim() == 3 else 0.12) * noise
                )  # of three axes: a convolution
    model.save_pretrained(folder)
    return write_prompting(folder)


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The network of transformers, without the approximations of its faster attentions."""
    import transformers

    is_wrapped = hasattr(transformers.AutoConfig.from_pretrained(folder), "text_config")
    kind = transformers.AutoModelForImageTextToText if is_wrapped else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def with_adapters(network: Llama, model: Any, seed: int = 5) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
    """(peft's model of `model`, the pairs of adapter parameters by name) with the same random adapter on both."""
    import peft

    attach(network, SPEC, seed=1)
    config = peft.LoraConfig(
        r=SPEC.rank, lora_alpha=SPEC.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    model = model.to(network.lm_head.weight.dtype)
    generator, pairs = torch.Generator().manual_seed(seed), {}
    with torch.no_grad():
        for name, module in adapted(network).items():
            other = model.base_model.model.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                mine, peers = getattr(module, part), getattr(other, part)["default"].weight
                mine.copy_(torch.randn(mine.shape, generator=generator) * 0.1)
                peers.copy_(mine)
                pairs[f"{name}.{part}"] = (mine, peers)
    return model, pairs


def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift what transformers computes in float32 whatever the type: norms, softmax, rotations and linear attention."""
    softmax, narrow, to = torch.nn.functional.softmax, torch.Tensor.float, torch.Tensor.to
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x))

    def wide_to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_narrowed = x.dtype == torch.float64 and args[:1] == (torch.float32,)
        return x if is_narrowed else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", wide_to)

"""Adapters that PEFT writes in any form: the same logits as PEFT, merged and not, or one line that names the key."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.tiny_models import write_model

from lorafit.errors import ConfigError, LorafitError, ModelError
from lorafit.hub import folder_keys
from lorafit.model.adapter_file import CONFIG, WEIGHTS
from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.build import build_saved
from lorafit.model.llama import Llama
from lorafit.model.lora import disable_adapter
from lorafit.model.multi_lora import Adapters
from lorafit.model.saved_adapter import HEAD, read_adapter, read_spec
from lorafit.model.weights import load_network, stored_weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 40)
FAMILIES = ("llama-biases", "llama-tied", "qwen2")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
        "rank_pattern": {"q_proj": 8, "layers.1.*v_proj": 2},
        "alpha_pattern": {"q_proj": 32, "up_proj": 1},
    },
    "layers": {"layers_to_transform": [0]},
    "layers-pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "excluded-by-expression": {"target_modules": "all-linear", "exclude_modules": ".*mlp.*"},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-embedding-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved-linear": {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]},
    "dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "dora-tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "alpha_pattern": {"lm_head": 3}},
    "tables-tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "bias": {"bias": "all"},
    "bias-of-lora": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [4, 9]},
    "tokens-of-module": {"trainable_token_indices": {"embed_tokens": [9, 4, 7]}},
    "fan-in": {"fan_in_fan_out": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
}


def saved(folder: Path, base: Path, **changes: Any) -> Any:
    """An adapter that PEFT saves in `folder` after something like training; PEFT's model of it, loaded again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on these settings
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        theirs = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **changes}))
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        theirs.save_pretrained(folder)
    return theirs.eval()


def logits(network: Llama) -> torch.Tensor:
    return network.logits(network.hidden(IDS, PackedDocuments([len(IDS)]))).detach()


def peer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS[None]).logits[0]
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_peft(kind: str, family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, folder = bases[family], tmp_path / "adapter"
    theirs = peer(saved(folder, base, **KINDS[kind]))
    network, _ = build_saved(base, folder, "cpu", "float32")
    torch.testing.assert_close(logits(network), theirs, rtol=1e-5, atol=1e-5)
    own = peer(transformers.AutoModelForCausalLM.from_pretrained(base))
    assert (theirs - own).abs().max() > 0.01
    with disable_adapter(network):
        torch.testing.assert_close(logits(network), own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(network), theirs, rtol=1e-5, atol=1e-5)

    # served alone, as the only adapter of a process
    network, _ = build_saved(base, None, "cpu", "float32")
    Adapters(network, {"one": folder}).take(["one"] * len(IDS))
    torch.testing.assert_close(logits(network), theirs, rtol=1e-5, atol=1e-5)

    # merged weight by weight, as exports do
    adapter, arch = read_adapter(folder), read_architecture(base)
    stored = stored_weights(base, arch).network
    if adapter.unties(arch):
        arch = dataclasses.replace(arch, tie_word_embeddings=False)
        stored[f"{HEAD}.weight"] = stored["model.embed_tokens.weight"]
    merged = Llama(arch)
    assert adapter.changes <= stored.keys()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            weight = stored[name].read()
            parameter.copy_(adapter.merged(name, weight) if name in adapter.changes else weight)
        torch.testing.assert_close(logits(merged.eval()), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        *(({"init_lora_weights": init}, "init_lora_weights") for init in ("pissa", "pissa_niter_4", "olora")),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(
    changes: dict[str, Any], key: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    saved(tmp_path, bases["llama-biases"], **changes)
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path)
    assert len(caught.value.problems) == 1
    assert f"`{key}` is" in caught.value.problems[0].message
    assert "merge_and_unload" in caught.value.problems[0].hint


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "PiSSA", "pissa_niter_16"])
def test_each_init_that_changes_the_base_is_refused(
    init: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    saved(tmp_path, bases["qwen2"])
    change(tmp_path, init_lora_weights=init)
    with pytest.raises(ModelError, match="a base from which PEFT took"):
        read_adapter(tmp_path)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("key", ["modules_to_save", "bias", "lm_head"])
def test_training_does_not_go_on_with_other_weights(key: str, bases: dict[str, Path], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "modules_to_save": ["lm_head"],
        "bias": "all",
    }
    wanted = {key: values[key]} if key in values else {"target_modules": ["q_proj", key]}
    saved(tmp_path, bases["llama-biases"], **wanted)
    with pytest.raises(ModelError, match="which lorafit does not train") as caught:
        read_spec(tmp_path)
    assert key in str(caught.value)


@pytest.mark.parametrize("settings", [{"layers_to_transform": [1]}, {"exclude_modules": ["v_proj"]}])
def test_training_goes_on_with_the_modules_that_have_tensors(
    settings: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    saved(tmp_path, bases["qwen2"], **settings)
    stored = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / WEIGHTS)}
    assert set(read_spec(tmp_path).targets) == {name.partition(".lora_")[0] for name in stored}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.module."])
def test_names_of_wrapped_models_are_read(prefix: str, bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = peer(saved(tmp_path, bases["qwen2"]))
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {prefix + name.replace("lora_A.", "lora_A.default."): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / WEIGHTS)
    network, _ = build_saved(bases["qwen2"], tmp_path, "cpu", "float32")
    torch.testing.assert_close(logits(network), theirs, rtol=1e-5, atol=1e-5)


def test_a_file_that_is_not_complete_is_refused_in_one_line(bases: dict[str, Path], tmp_path: Path) -> None:
    saved(tmp_path, bases["qwen2"], target_modules="all-linear")
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "layers.1" not in n}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError) as caught:
        build_saved(bases["qwen2"], tmp_path, "cpu", "float32")
    assert len(caught.value.problems) == 1
    assert "and 4 more is missing" in str(caught.value)


def test_one_process_serves_several_adapters_of_linears_only(bases: dict[str, Path], tmp_path: Path) -> None:
    saved(tmp_path / "one", bases["qwen2"])
    saved(tmp_path / "two", bases["qwen2"], modules_to_save=["lm_head"])
    arch = read_architecture(bases["qwen2"])
    network = load_network(bases["qwen2"], arch, torch.float32, torch.device("cpu"))
    with pytest.raises(ModelError, match="`two` changes `lm_head.weight`"):
        Adapters(network, {"one": tmp_path / "one", "two": tmp_path / "two"})


@given(
    st.sampled_from([key for key, rule in folder_keys.ADAPTER.items() if isinstance(rule, tuple)]),
    st.one_of(st.just(True), st.integers(1, 9), st.lists(st.integers(), min_size=1), st.text(min_size=1)),
)
def test_a_value_of_an_unsupported_key_is_never_ignored(key: str, value: Any) -> None:
    (problem,) = folder_keys.refused({key: value}, folder_keys.ADAPTER, "adapter_config.json")
    assert f"`{key}`" in problem.message


@given(
    st.dictionaries(
        st.sampled_from(["rank_pattern", "alpha_pattern"]),
        st.one_of(
            st.text(),
            st.integers(),
            st.dictionaries(st.text(), st.one_of(st.integers(), st.floats(), st.none())),
        ),
    )
)
def test_no_pattern_breaks_the_reader(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("patterns")
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)},
        folder / WEIGHTS,
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **values}
    (folder / CONFIG).write_text(json.dumps(config))
    try:
        read_adapter(folder)
    except (ModelError, ConfigError) as error:
        assert isinstance(error, LorafitError)

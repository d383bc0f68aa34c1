"""Weights are read whole and mapped, or the error names every tensor that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny_models import FAMILIES, config_of, random_network, weights_of, write_model

from lorafit.errors import ModelError
from lorafit.model.architecture import read_architecture
from lorafit.model.quant import Quantize
from lorafit.model.weights import fingerprint, is_fingerprint_of, load_network, weight_files
from lorafit.storage.atomic import MANIFEST
from lorafit.training.checkpoint import changes

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_network(folder, read_architecture(folder), dtype, CPU)


def shard(folder: Path) -> None:
    weights = weights_of(random_network())
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_written_is_what_is_loaded(family: str, tmp_path: Path) -> None:
    network = load(write_model(tmp_path, family))
    expected = random_network(family).state_dict()
    loaded = network.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    if "tied" in family:
        assert network.lm_head.weight is network.model.embed_tokens.weight


def test_shards_equal_the_single_file(tmp_path: Path) -> None:
    write_model(tmp_path)
    single = load(tmp_path).state_dict()
    shard(tmp_path)
    sharded = load(tmp_path).state_dict()
    assert all(torch.equal(sharded[name], single[name]) for name in single)


def test_tensors_stay_mapped_to_the_file_where_the_type_matches(tmp_path: Path) -> None:
    """Weights of the file's own type cost no anonymous memory: they are the file's pages."""
    network = load(write_model(tmp_path))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    addresses = [parameter.data_ptr() for parameter in network.parameters()]
    assert all(any(start <= address < end for start, end in ranges) for address in addresses)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize(("dtype", "quantize"), [(torch.float32, "int8"), (torch.bfloat16, "none")])
def test_the_file_takes_no_memory_while_its_tensors_are_copied(
    tmp_path: Path, dtype: torch.dtype, quantize: Quantize
) -> None:
    write_model(tmp_path)

    def look(done: int, of: int) -> None:
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        seen.append(done)

    seen: list[int] = []
    network = load_network(tmp_path, read_architecture(tmp_path), dtype, CPU, look, quantize)
    assert len(seen) == len(random_network().state_dict())
    assert network.model.norm.weight.dtype == dtype


def test_a_tied_table_under_either_name(tmp_path: Path) -> None:
    write_model(tmp_path, "llama-tied")
    weights = weights_of(random_network("llama-tied"))
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors")
    expected = random_network("llama-tied").model.embed_tokens.weight
    assert torch.equal(load(tmp_path).lm_head.weight, expected)


def test_a_tied_config_with_two_different_tables_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "llama-tied")
    weights = weights_of(random_network("llama-tied"))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="ties the head"):
        load(tmp_path)


def test_every_wrong_tensor_is_named_at_once(tmp_path: Path) -> None:
    write_model(tmp_path)
    weights = weights_of(random_network())
    del weights["model.norm.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old checkpoints carry it
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    messages = " / ".join(problem.message for problem in caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "`model.norm.weight` is missing" in messages
    assert "has shape [3, 3], config.json says [48, 32]" in messages
    assert "q_proj.bias` has no place in a llama network" in messages


def test_missing_and_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"there is no `model\.safetensors`") as caught:
        weight_files(tmp_path)
    assert "pickled" in caught.value.problems[0].hint
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json"):
        load(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    (write_model(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../secret.safetensors"}}'
    )
    with pytest.raises(ModelError, match="outside its folder"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelError, match=r"`gone\.safetensors` is missing"):
        weight_files(tmp_path)


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    first, same = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    other = write_model(tmp_path / "c", seed=1)
    assert fingerprint(first) == fingerprint(same)
    assert fingerprint(first) != fingerprint(other)
    assert is_fingerprint_of(fingerprint(same), first)
    assert not is_fingerprint_of(fingerprint(other), first)


def test_fingerprint_of_version_0_1_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = (8).to_bytes(8, "little") + b"{}      " + bytes(range(256)) * 64
    (tmp_path / "model.safetensors").write_bytes(weights)
    stored = "355ac8ca09818af92ccbc925538470e9a7f3e27d66e18da6cb0823b5c33965d8"  # by version 0.1
    assert is_fingerprint_of(stored, tmp_path)
    facts = {"facts": {"base_model": stored}, "files": {}}
    (tmp_path / MANIFEST).write_text(json.dumps(facts))
    assert not changes(tmp_path, {"base_model": fingerprint(tmp_path)}, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + b"\0")
    assert not is_fingerprint_of(stored, tmp_path)
    assert changes(tmp_path, {"base_model": fingerprint(tmp_path)}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model type `gpt2` is not supported"),
        ({"hidden_act": "gelu"}, "only `silu` is supported"),
        ({"num_key_value_heads": 3}, "must divide num_attention_heads"),
        ({"hidden_size": "big"}, "`hidden_size` is 'big'"),
        ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "rope types default, linear, dynamic, llama3"),
        ({"quantization_config": {"bits": 4}}, "give the 16-bit original"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", **changes)))
    with pytest.raises(ModelError, match=message):
        read_architecture(tmp_path)


def test_both_spellings_of_rope_are_read(tmp_path: Path) -> None:
    raw = config_of("llama")
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    old = raw | {"rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}}
    new = raw | {"rope_parameters": {**scaling, "rope_type": "llama3", "rope_theta": 5e5}}
    new.pop("rope_theta")
    ropes = []
    for config in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(config))
        ropes.append(read_architecture(tmp_path).rope)
    assert ropes[0] == ropes[1]
    assert ropes[0].theta == 5e5
    assert ropes[0].kind == "llama3"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_weights_of_a_wrapped_model_are_read(prefix: str, tmp_path: Path) -> None:
    network = random_network()
    folder = write_model(tmp_path)
    save_file({prefix + n: t for n, t in weights_of(network).items()}, folder / "model.safetensors")
    assert_same_weights(load(folder), network)


def test_a_tied_decoder_without_its_head_is_read_and_another_names_the_head(tmp_path: Path) -> None:
    for family in ("llama-tied", "llama"):
        network = random_network(family)
        folder = write_model(tmp_path / family, family)
        stored = {
            n.removeprefix("model."): t for n, t in weights_of(network).items() if n != "lm_head.weight"
        }
        save_file(stored, folder / "model.safetensors")
        if family == "llama-tied":
            assert_same_weights(load(folder), network)
        else:
            with pytest.raises(ModelError, match="weight `lm_head.weight` is missing"):
                load(folder)


def test_one_fault_of_many_weights_is_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    stored = {f"transformer.{n}": t for n, t in weights_of(random_network()).items()}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert len(caught.value.problems) == 2
    assert "`transformer.lm_head.weight`" in str(caught.value)
    assert "more is missing" in str(caught.value)


def test_one_file_counts_over_shards_as_in_transformers(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    others = dict(two.named_parameters())
    assert all(torch.equal(value, others[name]) for name, value in one.named_parameters())

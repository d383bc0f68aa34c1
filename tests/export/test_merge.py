"""The merged model: the exact sum in every weight, any cut into files, and memory for one tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.made import source_of
from tests.runs import run_to_export
from tests.tiny_models import write_model

from lorafit.errors import ModelError
from lorafit.export.merge import base_type, generation_config, plan_shards, write_merged
from lorafit.infer.model import load
from lorafit.model.dtypes import BY_GGUF_NAME
from lorafit.model.weights import INDEX, fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_to_export(
        tmp_path_factory.mktemp("merge"), "lora.targets=[q_proj, down_proj]", family="llama-tied"
    )


def merged(run: Path, folder: Path, type_name: str = "f32", **settings: int) -> dict[str, torch.Tensor]:
    source = source_of(run)
    folder.mkdir()
    dtype = BY_GGUF_NAME[base_type(source) if type_name == "auto" else type_name]
    sums = write_merged(source, folder, dtype, lambda done, total: None, **settings)
    assert set(sums) == {path.name for path in folder.glob("*.safetensors")}
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("type_name", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_weight_is_the_exact_sum_rounded_once(
    run: Path, tmp_path: Path, type_name: str, dtype: torch.dtype
) -> None:
    base = load_file(run.parent / "model" / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    found = merged(run, tmp_path / "out", type_name)
    assert found.keys() == base.keys() - {"lm_head.weight"}
    changed = 0
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        exact = weight.double()
        if f"{module}.lora_A.weight" in adapter:
            low = adapter[f"{module}.lora_B.weight"].double() @ adapter[f"{module}.lora_A.weight"].double()
            exact = exact + 8 / 4 * low
            changed += 1
        wanted = exact.to(dtype)
        torch.testing.assert_close(
            found[name].double(), wanted.double(), rtol=torch.finfo(dtype).eps, atol=1e-6
        )
        if (
            dtype == torch.bfloat16
        ):  # a sum that was rounded before it is formed is another one far more often
            assert (found[name] != wanted).float().mean() < 0.01
    assert changed == 4


def test_our_own_engine_answers_alike_from_the_merged_folder(run: Path, tmp_path: Path) -> None:
    merged(run, tmp_path / "out")
    questions = ["Say 3.", "라마?"]
    live = load(run, device="cpu").generate(questions, max_tokens=12)
    assert load(tmp_path / "out", device="cpu", dtype="float32").generate(questions, max_tokens=12) == live
    assert load(run, device="cpu").generate(questions, max_tokens=12, base=True) != live


def test_files_are_cut_and_named_as_transformers_does(run: Path, tmp_path: Path) -> None:
    whole = merged(run, tmp_path / "whole")
    parts = merged(run, tmp_path / "parts", max_shard=20_000)
    assert {name: tensor.tolist() for name, tensor in parts.items()} == {
        name: tensor.tolist() for name, tensor in whole.items()
    }
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "parts" / file)
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "parts" / file).values()) for file in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    largest = max(tensor.nbytes for tensor in whole.values())
    assert max(sizes) <= max(20_000, largest)
    assert not (tmp_path / "whole" / INDEX).exists()


MEASURE = """
import resource, sys
from pathlib import Path
from tests.export.made import source_of
from lorafit.export.merge import write_merged
from lorafit.model.dtypes import BY_GGUF_NAME
source = source_of(Path(sys.argv[1]))
write = lambda folder, **cut: write_merged(source, folder, BY_GGUF_NAME["f32"], lambda *_: None, **cut)
out = Path(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out.mkdir()
write(out, max_shard=int(sys.argv[3]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_peak_memory_stays_below_two_files(tmp_path: Path) -> None:
    """Files of 16 MB, from a base in as many; what the process grows by is measured, not computed."""
    run = run_to_export(tmp_path, "lora.targets=q_proj", "data.holdout=0", "train.max_steps=1")
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5, "head_dim": 128}
    model = tmp_path / "large"
    write_model(model, "llama", **large)
    weights = load_file(model / "model.safetensors")
    where, parts, size = {}, [{}], 0
    for name, tensor in weights.items():
        if size + tensor.nbytes > 16_000_000:
            parts, size = [*parts, {}], 0
        parts[-1][name] = tensor
        where[name] = f"model-{len(parts):05}.safetensors"
        size += tensor.nbytes
    for number, part in enumerate(parts, 1):
        save_file(part, model / f"model-{number:05}.safetensors", {"format": "pt"})
    (model / "model.safetensors").unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert len(parts) >= 5
    _point(run, model)
    words = [sys.executable, "-c", MEASURE, str(run), str(tmp_path / "out"), "16000000"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 5
    assert int(done.stdout) < 2 * 16_000_000


def _point(run: Path, model: Path) -> None:
    """Have a finished run's base be another folder, whose weights then have no adapter beside q_proj's names."""
    config = (run / "config.yaml").read_text().replace(str(run.parent / "model"), str(model))
    (run / "config.yaml").write_text(config)
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    manifest["facts"]["base_model"] = fingerprint(model)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(5)]
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(4, 512)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(512, 4)
    (run / "adapter" / "manifest.json").unlink()
    save_file(tensors, run / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    from lorafit.storage.atomic import commit_files

    files = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    commit_files(run / "adapter", files, manifest["facts"])


def test_stop_tokens_of_the_contract_are_the_generation_config_s(run: Path) -> None:
    config = generation_config(source_of(run))
    assert config == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}


def test_another_base_than_the_trained_one_is_refused(run: Path, tmp_path: Path) -> None:
    other = run_to_export(tmp_path)
    write_model(tmp_path / "model", seed=1)
    with pytest.raises(ModelError, match="the adapter was made on another base model"):
        source_of(other)


def test_a_quantised_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = run_to_export(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.model.base_check.is_fingerprint_of", lambda stored, folder: True)
        with pytest.raises(ModelError, match="merged into 16 or 32 bits only"):
            source_of(other)


def test_plan_keeps_every_weight_once(run: Path) -> None:
    source = source_of(run)
    for most in (1, 5_000, 10**9):
        shards = plan_shards(source, torch.float32, most).filename_to_tensors.values()
        assert sorted(name for names in shards for name in names) == sorted(source.weights)
        assert all(shards)

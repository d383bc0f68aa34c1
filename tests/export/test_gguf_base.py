"""Training on a GGUF file: the adapter alone goes back to llama.cpp, which puts it on that very file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.command import TINY, Cli
from tests.runs import run_to_export, tiny_run, tiny_settings
from tests.shared_files import shared_dir, smollm2_gguf
from tests.tiny_gguf import write_gguf_model

from lorafit.errors import RunError
from lorafit.export import gguf_base
from lorafit.export.gguf_base import in_8_bits
from lorafit.export.run import export_run
from lorafit.model.base_check import named_base

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def test_an_adapter_on_a_file_with_blocks_is_compared_on_that_file(tmp_path: Path) -> None:
    """Answers and logits are the trainer's within what llama.cpp's own rounding explains; the base stays as it is."""
    base = write_gguf_model(tmp_path / "base.gguf", "llama", "Q4_0")
    content = base.read_bytes()
    run = run_to_export(tmp_path, model=base)
    done = export_run(run, "gguf-lora", output=tmp_path / "lora", offline=True)
    assert done.parity["verified"]
    assert done.parity["same_greedy_answers"] + done.parity["same_up_to_a_tie"] == done.parity["prompts"]
    assert 0 < done.parity["largest_difference"] < done.parity["most_difference"] < 0.5
    assert base.read_bytes() == content
    assert named_base(run / "adapter")[0] == str(base)
    adapter = export_run(run, "adapter", output=tmp_path / "adapter", offline=True, verify=False)
    assert named_base(adapter.path)[0] == "base.gguf"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("llama", "Q4_K", WIDE),
        ("llama-tied", "Q6_K", WIDE),
        ("qwen2", "Q5_1", {}),
        ("qwen3", "BF16", {}),
        ("gemma2", "Q8_0", {"sliding_window": 256}),
        ("phi3", "F16", {}),
        ("smollm3", "Q4_1", {}),
        ("granite", "Q5_0", {}),
    ],
)
def test_llama_cpp_adds_the_adapter_as_we_do(
    name: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = write_gguf_model(tmp_path / "base.gguf", name, kind, **changes)
    done = export_run(
        run_to_export(tmp_path, model=base), "gguf-lora", output=tmp_path / "lora", offline=True
    )
    assert done.parity["verified"]
    assert done.parity["largest_difference"] < (2e-4 if kind == "F32" else 0.5)


@pytest.mark.slow
def test_an_adapter_that_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of rounding is narrow enough to see rows of B in the wrong order."""
    run = run_to_export(tmp_path, model=write_gguf_model(tmp_path / "base.gguf", "llama", "Q4_0"))
    monkeypatch.setattr("lorafit.export.gguf_model.permuted", lambda weight, name, arch: weight)
    with pytest.raises(RunError, match="log-probabilities differ"):
        export_run(run, "gguf-lora", output=tmp_path / "lora", offline=True)


@pytest.mark.slow
def test_another_template_goes_with_the_adapter(tmp_path: Path) -> None:
    """The file keeps its own template, so the export has the one of the training, and is compared with it."""
    base = write_gguf_model(tmp_path / "base.gguf", "llama")
    run = run_to_export(tmp_path, "data.template=alpaca", "data.system=Be brief.", model=base)
    done = export_run(run, "gguf-lora", output=tmp_path / "lora", offline=True)
    assert done.parity["verified"]
    template = (done.path / gguf_base.TEMPLATE).read_text(encoding="utf-8")
    assert "### Instruction:" in template
    assert "Be brief." in template
    (tmp_path / "plain").mkdir()
    plain = export_run(
        run_to_export(tmp_path / "plain", model=base),
        "gguf-lora",
        output=tmp_path / "2",
        offline=True,
    )
    assert plain.parity["verified"]
    assert not (plain.path / gguf_base.TEMPLATE).exists()


@pytest.mark.slow
def test_a_run_wants_the_same_file(tmp_path: Path, cli: Cli) -> None:
    base = write_gguf_model(tmp_path / "base.gguf", "llama")
    run = tiny_run(tiny_settings(tmp_path, "train.max_steps=2", model=base), tmp_path / "run").path
    assert cli("generate", run, "hi", "--max-tokens", 2).code == 0
    write_gguf_model(base, "llama", seed=1)
    done = cli("generate", run, "hi", "--max-tokens", 2)
    assert done.code == 2
    assert "another base model" in done.err


@pytest.mark.slow
def test_every_command_takes_the_file(tmp_path: Path, cli: Cli) -> None:
    """check, plan, show, train, generate, eval and a merged export: all read the one file."""
    base = write_gguf_model(tmp_path / "base.gguf", "llama", "Q8_0")
    data = tmp_path / "rows.json"
    tiny_settings(tmp_path, model=base)
    start = ("--model", base, "--data", data, *TINY, "train.max_steps=1")
    for words in (
        ("check", *start),
        ("plan", *start),
        ("show", "--model", base, "--data", data, "--row", 1),
        ("train", *start, "--output", tmp_path / "run"),
        ("generate", base, "hi", "--max-tokens", 2),
        ("generate", base, "hi", "--adapter", tmp_path / "run" / "adapter", "--max-tokens", 2),
        ("eval", tmp_path / "run"),
        ("export", tmp_path / "run", "merged", "--no-verify"),
        ("generate", tmp_path / "run" / "exports" / "merged-bf16", "hi", "--max-tokens", 2),
    ):
        done = cli(*words)
        assert done.code == 0, (words, done.err)
    done = cli("generate", base, "hi", "--adapter", base)
    assert done.code == 2
    assert done.err.startswith("error: ")


def test_inputs_are_rounded_as_the_package_rounds_blocks() -> None:
    """Blocks of 32 numbers are those of q8_0."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType.Q8_0
    wanted = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    assert torch.allclose(in_8_bits(x, 32), torch.tensor(wanted), atol=1e-6)
    assert float((in_8_bits(x, 64) - x).abs().max()) <= float(x.abs().max()) / 127


@pytest.mark.slow
def test_the_real_file_is_trained_as_it_is_deployed(tmp_path: Path) -> None:
    """SmolLM2's Q4_1 file: after two steps, llama.cpp with the file and the LoRA answers as the trainer does."""
    rows = shared_dir() / "data" / "alpaca_en_demo.json"
    more = ("train.max_steps=2", "train.batch_size=1", "train.learning_rate=0.001", "data.max_length=64")
    settings = [
        *tiny_settings(tmp_path, *more, "data.too_long=drop", model=smollm2_gguf()),
        f"data.path={rows}",
    ]
    done = export_run(tiny_run(settings, tmp_path / "run").path, "gguf-lora", output=tmp_path / "lora")
    assert done.parity["verified"]
    assert done.parity["same_greedy_answers"] + done.parity["same_up_to_a_tie"] == done.parity["prompts"]

"""Training on a GGUF file: the adapter alone goes back to llama.cpp, which puts it on that very file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.command import TINY, Cli
from tests.gguf_file.test_networks import IDS, logits, read
from tests.runs import run_to_export, tiny_run, tiny_settings
from tests.shared_files import shared_dir, smollm2_gguf
from tests.tiny_gguf import write_gguf_model

from lorafit.errors import RunError
from lorafit.export import gguf_base
from lorafit.export.gguf_base import HalfGeglu, in_8_bits
from lorafit.export.llama_cpp import Server
from lorafit.export.parity import FLOAT_NOISE
from lorafit.export.rows import Text, rows_of
from lorafit.export.run import export_run
from lorafit.export.run_source import open_source
from lorafit.model.attention import PackedDocuments
from lorafit.model.base_check import named_base
from lorafit.model.build import build_saved
from lorafit.model.llama import MLP, Llama

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
        ("gemma3", "F32", {"sliding_window": 256}),
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
    assert done.parity["largest_difference"] < (0.02 if kind == "F32" else 0.5)  # GELU is in float16


def test_gelu_is_computed_as_llama_cpp_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its table of float16, logits of a float32 file are llama.cpp's to the order of sums; without it they are
    not.
    """
    path = write_gguf_model(tmp_path / "model.gguf", "gemma3", sliding_window=256)
    theirs = torch.from_numpy(np.array(Server(path, None, 24, 1).log_probabilities(IDS)))
    known = theirs > -60
    network = read(path)
    differences = []
    for activation in (None, HalfGeglu()):
        for mlp in (module for module in network.modules() if isinstance(module, MLP)):
            mlp.activation = activation or mlp.activation
        with torch.no_grad():
            own = logits(network, IDS)[-1]
        differences.append(float((own.log_softmax(-1) - theirs)[known].abs().max()))
    bound = FLOAT_NOISE * float(own.max() - own.min())
    assert differences[1] < bound / 4
    assert differences[0] > 4 * differences[1]


@pytest.mark.parametrize("size", [0.0, 1e-8, 0.3, 1.0, 9.9, 10.0, 10.1, 1e5])
def test_the_table_of_gelu_ends_at_10(size: float) -> None:
    gate = torch.tensor([size, -size])
    wanted = torch.nn.functional.gelu(gate, approximate="tanh")
    assert torch.allclose(HalfGeglu().make(gate, torch.ones(2)), wanted, rtol=2e-3, atol=1e-7)


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
    """SmolLM2's Q4_1 file after two steps: with the LoRA, llama.cpp is as far from the trainer as it is without it.

    llama.cpp rounds the inputs of products, so it differs from float32 with any adapter. What it does to the file
    alone is the bound, with three standard errors of the difference of two such measurements.
    """
    more = ("train.max_steps=2", "train.batch_size=1", "train.learning_rate=0.001", "data.max_length=64")
    settings = tiny_settings(tmp_path, *more, "data.too_long=drop", model=smollm2_gguf())
    settings.append(f"data.path={shared_dir() / 'data' / 'alpaca_en_demo.json'}")
    run = tiny_run(settings, tmp_path / "run").path
    done = export_run(run, "gguf-lora", output=tmp_path / "lora")
    assert done.parity["verified"]
    assert done.parity["same_greedy_answers"] + done.parity["same_up_to_a_tie"] == done.parity["prompts"]
    source = open_source(run, offline=True)
    texts = [Text(text.ids, text.positions[:10]) for text in rows_of(source, 64)[0].texts[:2]]
    adapted, _ = build_saved(source.base.path, source.adapter, "cpu", "float32")
    squares, same = [], []
    for network, lora in ((read(smollm2_gguf()), None), (adapted, next(done.path.glob("*.gguf")))):
        program = Server(smollm2_gguf(), lora, 64, 2)
        rows = [(row, text.ids, at) for text in texts for row, at in own_rows(network, text)]
        scores = [program.score(ids[:at], ids[at]) for _, ids, at in rows]
        own = torch.stack([row[ids[at]] for row, ids, at in rows])
        squares.append((own - torch.tensor([score for score, _, _ in scores])).double().square())
        same.append(
            torch.tensor(
                [int(row.argmax()) == best for (row, _, _), (_, best, _) in zip(rows, scores, strict=True)]
            )
        )
    error = float((squares[0].var() + squares[1].var()).sqrt()) / len(own) ** 0.5
    assert 0 < float(squares[1].mean()) < float(squares[0].mean()) + 3 * error
    shares = [float(part.double().mean()) for part in same]
    spread = (sum(share * (1 - share) for share in shares) / len(own)) ** 0.5
    assert shares[1] >= shares[0] - 3 * spread


def own_rows(network: Llama, text: Text) -> list[tuple[torch.Tensor, int]]:
    """(log-probabilities, position) of each scored token."""
    with torch.no_grad():
        hidden = network.normed(network.hidden(torch.tensor(text.ids), PackedDocuments([len(text.ids)])))
        rows = torch.nn.functional.linear(hidden, network.lm_head.weight).log_softmax(-1)
    return [(rows[at - 1], at) for at in text.positions]

"""Each way in which exports of the field go wrong, put in on purpose: the parity check refuses every one, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.export.made import read_back_here
from tests.runs import run_to_export
from tests.tiny_models import write_model
from torch import Tensor

from lorafit.errors import LorafitError
from lorafit.export import gguf_model, kinds, merge, ollama
from lorafit.export.chat_template import chat_template
from lorafit.export.run import export_run
from lorafit.export.run_source import RunSource

pytestmark = pytest.mark.slow

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Path:
    """Four heads on two, embeddings not tied, alpha twice the rank."""
    return finished_run


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    read_back_here(monkeypatch)
    return monkeypatch


def refused(run: Path, kind: str, type_name: str, output: Path) -> str:
    with pytest.raises(LorafitError) as caught:
        export_run(run, kind, output=output, type_name=type_name, offline=True)
    assert not output.exists()
    assert list(output.parent.iterdir()) == []
    return str(caught.value)


def other_template(patch: pytest.MonkeyPatch) -> None:
    """One newline too many: what a template loses or gains when it is written down by hand."""

    def wrong(renderer: Any) -> str:
        return chat_template(renderer).replace("eos_token + '\n'", "eos_token + '\n\n'")

    patch.setattr(merge, "chat_template", wrong)
    patch.setattr(gguf_model, "chat_template", wrong)


def template_without_bos(patch: pytest.MonkeyPatch) -> None:
    def wrong(renderer: Any) -> str:
        return chat_template(renderer).replace("{{- bos_token }}", "")

    patch.setattr(merge, "chat_template", wrong)


def no_stop_token(patch: pytest.MonkeyPatch) -> None:
    def wrong(source: RunSource) -> dict[str, Any]:
        return {**right(source), "eos_token_id": 65}

    right = merge.generation_config
    patch.setattr(merge, "generation_config", wrong)


def eight_bit_base(patch: pytest.MonkeyPatch) -> None:
    """W rounded to 127 steps a row before the adapter is added, as a merge into a quantised copy does."""

    def wrong(source: RunSource, name: str, *, merged: bool = True) -> Tensor:
        weight = tensor(source, name, merged=False)
        if name not in source.saved.changes:
            return weight
        step = weight.abs().amax(1, keepdim=True) / 127
        return source.saved.merged(name, (weight / step).round() * step)

    tensor = RunSource.tensor
    patch.setattr(RunSource, "tensor", wrong)


def times_rank(source: RunSource) -> RunSource:
    """The source with alpha in the place of alpha / r."""
    spec = source.saved.spec
    saved = dataclasses.replace(source.saved, spec=dataclasses.replace(spec, alpha=spec.alpha * spec.rank))
    return dataclasses.replace(source, saved=saved)


def alpha_alone(patch: pytest.MonkeyPatch) -> None:
    """The low-rank product times alpha, not alpha / r."""
    right = RunSource.tensor

    def wrong(source: RunSource, name: str, *, merged: bool = True) -> Tensor:
        return right(times_rank(source), name, merged=merged)

    patch.setattr(RunSource, "tensor", wrong)


def alpha_alone_in_peft(patch: pytest.MonkeyPatch) -> None:
    right = kinds.EXPORTS["adapter"]

    def wrong(source: RunSource, staging: Path, *rest: Any) -> dict[str, str]:
        right.write(source, staging, *rest)
        config = json.loads((staging / "adapter_config.json").read_text())
        config["lora_alpha"] *= config["r"]
        (staging / "adapter_config.json").write_text(json.dumps(config))
        return {}

    patch.setitem(kinds.EXPORTS, "adapter", dataclasses.replace(right, write=wrong))


def alpha_alone_in_gguf(patch: pytest.MonkeyPatch) -> None:
    def wrong(source: RunSource, path: Path) -> None:
        right(times_rank(source), path)

    right = gguf_model.write_lora
    patch.setattr(gguf_model, "write_lora", wrong)


def no_permutation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_model, "permuted", lambda weight, name, arch: weight)


def permutation_for_as_many_key_heads(patch: pytest.MonkeyPatch) -> None:
    """Right for multi-head attention, wrong where several heads share keys."""
    right = gguf_model.permuted

    def wrong(weight: Tensor, name: str, arch: Any) -> Tensor:
        if not name.endswith("k_proj.weight"):
            return right(weight, name, arch)
        return weight.unflatten(0, (arch.num_attention_heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    patch.setattr(gguf_model, "permuted", wrong)


def no_permutation_of_b(patch: pytest.MonkeyPatch) -> None:
    right = gguf_model.permuted

    def wrong(weight: Tensor, name: str, arch: Any) -> Tensor:
        return weight if weight.shape[-1] == 4 else right(weight, name, arch)

    patch.setattr(gguf_model, "permuted", wrong)


def head_tied_to_the_embedding(patch: pytest.MonkeyPatch) -> None:
    """The head is taken for a copy of the embedding and left out, though it is its own."""
    right = RunSource.tensor

    def wrong(source: RunSource, name: str, *, merged: bool = True) -> Tensor:
        return right(source, "model.embed_tokens.weight" if name == "lm_head.weight" else name, merged=merged)

    patch.setattr(RunSource, "tensor", wrong)


def stop_left_out_of_the_modelfile(patch: pytest.MonkeyPatch) -> None:
    right = ollama.write_modelfile

    def wrong(source: RunSource, staging: Path) -> None:
        right(source, staging)
        lines = (staging / "Modelfile").read_text().splitlines(keepends=True)
        (staging / "Modelfile").write_text("".join(line for line in lines if "PARAMETER" not in line))

    patch.setattr(ollama, "write_modelfile", wrong)


def template_of_another_model(patch: pytest.MonkeyPatch) -> None:
    other = "{{ range $i, $_ := .Messages }}[INST] {{ .Content }} [/INST]{{ end }}"
    patch.setattr(ollama, "go_template", lambda renderer: other)


def no_end_of_answers(patch: pytest.MonkeyPatch) -> None:
    """The first turn is right, the second one follows the answer without its end."""
    right = ollama.go_template
    patch.setattr(
        ollama, "go_template", lambda renderer: right(renderer).replace("{{ else }}</s>", "{{ else }}")
    )


FAULTS: list[tuple[Plant, str, str, str]] = [
    (other_template, "merged", "f32", "is rendered otherwise"),
    (other_template, "adapter", "f32", "is rendered otherwise"),
    (other_template, "gguf", "f32", "is rendered otherwise"),
    (template_without_bos, "merged", "f32", "is rendered otherwise"),
    (no_stop_token, "merged", "f32", "stop token '</s>' (257) does not end an answer"),
    (no_stop_token, "adapter", "f32", "stop token '</s>' (257) does not end an answer"),
    (eight_bit_base, "merged", "f32", "log-probabilities differ by up to"),
    (eight_bit_base, "merged", "bf16", "log-probabilities differ by up to"),
    (eight_bit_base, "gguf", "f16", "log-probabilities differ by up to"),
    (alpha_alone, "merged", "f32", "log-probabilities differ by up to"),
    (alpha_alone, "gguf", "q8_0", "the loss rises from"),
    (alpha_alone_in_peft, "adapter", "f32", "log-probabilities differ by up to"),
    (alpha_alone_in_gguf, "gguf-lora", "f32", "log-probabilities differ by up to"),
    (no_permutation, "gguf", "f32", "log-probabilities differ by up to"),
    (no_permutation, "gguf", "q8_0", "the most probable token is the adapter's at"),
    (permutation_for_as_many_key_heads, "gguf", "f32", "log-probabilities differ by up to"),
    (no_permutation_of_b, "gguf-lora", "f32", "log-probabilities differ by up to"),
    (head_tied_to_the_embedding, "merged", "f32", "log-probabilities differ by up to"),
    (head_tied_to_the_embedding, "gguf", "q4_0", "the loss rises from"),
    (stop_left_out_of_the_modelfile, "ollama", "f16", "'</s>' is not among the Modelfile's"),
    (template_of_another_model, "ollama", "f16", "is rendered otherwise by the Modelfile"),
    (no_end_of_answers, "ollama", "f16", "turn 2 of a conversation is rendered otherwise"),
]


@pytest.mark.parametrize(
    ("plant", "kind", "type_name", "said"),
    [
        pytest.param(
            *fault,
            id=f"{fault[0].__name__}-{fault[1]}-{fault[2]}",
        )
        for fault in FAULTS
    ],
)
def test_every_planted_fault_is_refused(
    plant: Plant, kind: str, type_name: str, said: str, run: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    plant(patch)
    assert said in refused(run, kind, type_name, tmp_path / "export")


def test_tied_embeddings_with_a_head_of_their_own_are_refused(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """A merge that unties writes two tables; here the second is not the first."""
    run = run_to_export(tmp_path / "tied", family="llama-tied")
    right = merge.write_merged

    def wrong(source: RunSource, staging: Path, *rest: Any) -> dict[str, str]:
        table = source.weights["model.embed_tokens.weight"]
        untied = dataclasses.replace(source, weights={**source.weights, "lm_head.weight": table})
        sums = right(untied, staging, *rest)
        config = json.loads((staging / "config.json").read_text())
        (staging / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        return sums

    def other_head(source: RunSource, name: str, *, merged: bool = True) -> Tensor:
        weight = tensor(source, name, merged=merged)
        return weight.roll(1, 0) if name == "lm_head.weight" else weight

    tensor = RunSource.tensor
    patch.setattr(RunSource, "tensor", other_head)
    patch.setattr(merge, "write_merged", wrong)
    (tmp_path / "out").mkdir()
    assert "log-probabilities differ by up to" in refused(run, "merged", "f32", tmp_path / "out" / "export")


def test_a_second_stop_token_that_is_left_out_of_a_gguf_file_is_missed(
    tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    """What most chat models have: one token that ends a text, another that ends a turn."""
    model = write_model(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    run = run_to_export(tmp_path, model=model)
    (tmp_path / "out").mkdir()
    with pytest.MonkeyPatch.context() as plant:
        plant.setattr("gguf.GGUFWriter.add_eot_token_id", lambda writer, token: None)
        said = refused(run, "gguf", "f16", tmp_path / "out" / "export")
    assert "stop token '<|user|>' (258) does not end an answer" in said
    assert export_run(run, "gguf", output=tmp_path / "out", type_name="f16").parity["verified"]


@pytest.mark.parametrize(
    ("kind", "type_name"),
    [
        ("adapter", "f32"),
        ("merged", "f32"),
        ("gguf", "q8_0"),
        ("gguf-lora", "f32"),
        ("ollama", "f16"),
    ],
)
def test_without_a_fault_nothing_is_refused(
    kind: str, type_name: str, run: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> None:
    done = export_run(run, kind, output=tmp_path / "export", type_name=type_name, offline=True)
    assert done.parity["verified"]
    assert done.parity["loss_rise"] <= done.parity["most_loss_rise"]
    if type_name != "q8_0":  # the answers of a network this small are nearly ties
        assert done.parity["same_greedy_answers"] == done.parity["prompts"]

"""How an adapter folder is asked: by the contract of its training, by its own tokenizer and template, or as told."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.runs import run_to_export
from tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer, random_network, write_adapter, write_model

from lorafit.data.formats import Instruction
from lorafit.errors import ModelError
from lorafit.export.run import export_run
from lorafit.infer.model import Model, find_source, load
from lorafit.infer.multi_adapter import load_many
from lorafit.model.lora import LoraSpec

STORY = Instruction("Tell a story.", "", "")
SYSTEM = "You speak of cats only."
SPEC = LoraSpec(4, 8.0, 0.0, ("q_proj", "v_proj"), False)
TEMPLATE = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}{{ '<|assistant|>' }}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a system prompt."""
    return run_to_export(tmp_path_factory.mktemp("contract"), f"data.system={SYSTEM}")


def asked(model: Model) -> tuple[str, str]:
    return model.renderer.contract.hash, model.renderer.prompt_text(STORY)[1]


def answers(model: Model) -> list[str]:
    return [answer.text for answer in model.generate(["Tell a story.", "Say 7."], max_tokens=8)]


def test_the_contract_travels_with_the_adapter(run: Path, tmp_path: Path) -> None:
    base = run.parent / "model"
    copy, exported = tmp_path / "copy", tmp_path / "exported"
    shutil.copytree(run / "adapter", copy)
    export_run(run, "adapter", output=exported, verify=False)
    found = load(run, device="cpu")
    assert SYSTEM in asked(found)[1]
    for source, adapter in (
        (run / "adapter", None),
        (copy, None),
        (base, run / "adapter"),
        (base, copy),
        (base, exported),
        (run / "checkpoints" / "step-000003", None),
    ):
        model = load(source, adapter=adapter, device="cpu", dtype="float32")
        assert asked(model) == asked(found), (source, adapter)
        assert answers(model) == answers(found)
    served = load_many([f"mine={copy}"], device="cpu")
    assert served.named["mine"].renderer.contract == found.renderer.contract
    assert served.named["model"].renderer.contract.system == ""


def test_a_merged_model_is_asked_by_the_contract_that_it_carries(run: Path, tmp_path: Path) -> None:
    made = export_run(run, "merged", output=tmp_path / "merged", verify=False, type_name="f32")
    model, found = load(made.path, device="cpu", dtype="float32"), load(run, device="cpu", dtype="float32")
    assert asked(model)[1] == asked(found)[1]
    assert answers(model) == answers(found)


def test_an_adapter_that_is_exported_again_keeps_the_contract(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "adapter", copy)
    again = export_run(copy, "adapter", output=tmp_path / "again", verify=False)
    contracts = [json.loads((folder / "prompt.json").read_text()) for folder in (again.path, run)]
    assert contracts[0] == contracts[1]
    assert "not from a run of lorafit" in (again.path / "README.md").read_text()


def test_one_line_says_what_differs_from_the_base(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load(run.parent / "model", adapter=run / "adapter", device="cpu")
        assert len(caplog.records) == 1
        assert f"system prompt '{SYSTEM}'" in caplog.text
        caplog.clear()
        load(run, device="cpu")
        load(run / "adapter", device="cpu")
        load(run, device="cpu", system=SYSTEM)
        assert not caplog.records
        assert load(run, device="cpu", system="Dogs.").renderer.contract.system == "Dogs."
        assert f"the system prompt of the training is replaced: '{SYSTEM}'" in caplog.text


def test_a_damaged_contract_is_an_error(run: Path, tmp_path: Path) -> None:
    for text, message in (("{", "cannot be read"), ('{"schema": 1}', "is not a prompt contract")):
        copy = tmp_path / message
        shutil.copytree(run / "adapter", copy)
        (copy / "manifest.json").unlink()
        (copy / "prompt.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            load(copy, device="cpu")


def foreign(folder: Path, base: Path, *, tokenizer: bool = False, template: str = "") -> Path:
    """An adapter folder as trainers of transformers leave it."""
    write_adapter(folder, random_network(), SPEC, base=str(base))
    if tokenizer:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_template_in_a_foreign_folder_is_used(
    with_tokenizer: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_model(tmp_path / "base", chat=False)
    folder = foreign(tmp_path / "adapter", base, tokenizer=with_tokenizer, template=TEMPLATE)
    expected = "<|user|>Tell a story.</s><|assistant|>"
    with caplog.at_level(logging.WARNING):
        for model in (load(folder, device="cpu"), load(base, adapter=folder, device="cpu")):
            assert asked(model)[1] == expected
            assert model.renderer.contract.stop_ids == (257,)
    assert [record.getMessage() for record in caplog.records] == [
        f"note: asked with the tokenizer and the chat template in {folder}"
    ] * 2
    served = load_many([str(folder)], device="cpu")
    assert served.named["adapter"].renderer.prompt_text(STORY)[1] == expected


@pytest.mark.parametrize(
    ("chat", "words"), [(True, "the base's chat template"), (False, "the alpaca template")]
)
def test_a_folder_without_any_template_says_how_it_is_asked(
    chat: bool, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_model(tmp_path / "base", chat=chat)
    with caplog.at_level(logging.WARNING):
        load(foreign(tmp_path / "adapter", base), device="cpu")
    assert f"has no prompt contract and no template: asked by {words}" in caplog.text


def test_a_foreign_folder_is_exported_with_its_own_tokenizer(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", chat=False)
    folder = foreign(tmp_path / "adapter", base, tokenizer=True, template=TEMPLATE)
    made = export_run(folder, "merged", output=tmp_path / "merged", verify=False)
    written = json.loads((made.path / "tokenizer_config.json").read_text())["chat_template"]
    assert written == "{{- bos_token }}" + TEMPLATE  # as the base's tokenizer begins texts
    assert asked(load(made.path, device="cpu"))[1] == "<|user|>Tell a story.</s><|assistant|>"


def test_config_json_beside_an_adapter_changes_nothing(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    folder = foreign(tmp_path / "adapter", base)
    alone = answers(load(folder, device="cpu", dtype="float32"))
    shutil.copy(base / "config.json", folder)
    assert find_source(folder).adapter == folder
    assert answers(load(folder, device="cpu", dtype="float32")) == alone


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_a_whole_model_with_an_adapter_is_ambiguous(file: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    folder = foreign(tmp_path / "adapter", base)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(ModelError, match="a whole model and an adapter"):
        load(folder, device="cpu")
    assert load(base, adapter=folder, device="cpu").has_adapter  # what the hint says
    (folder / "adapter_config.json").unlink()
    if file == "model.safetensors":
        assert not load(folder, device="cpu").has_adapter


@pytest.mark.parametrize("name", ["unsloth/some-1b-bnb-4bit", "unsloth/some-1b-unsloth-bnb-4bit"])
def test_a_4_bit_base_on_the_hub_is_named_before_any_download(name: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "adapter", Path("base"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    with pytest.raises(ModelError) as caught:
        load(folder, device="cpu")
    assert f"lorafit generate unsloth/some-1b --adapter {folder}" in caught.value.problems[0].hint


def test_a_quantised_base_names_the_way_out(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ModelError) as caught:
        load(foreign(tmp_path / "adapter", base), device="cpu")
    assert "lorafit generate 16-BIT-BASE --adapter FOLDER" in caught.value.problems[0].hint


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_an_adapter_of_another_program_is_exported_and_verified(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.export.made import read_back_here

    pytest.importorskip("peft")
    read_back_here(monkeypatch)
    base = write_model(tmp_path / "base", "llama-tied")
    folder = tmp_path / "adapter"
    write_adapter(folder, random_network("llama-tied"), SPEC, base=str(base))
    config = json.loads((folder / "adapter_config.json").read_text())
    changes: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "alpha_pattern": {"layers.1.*v_proj": 3}}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(folder / "adapter_model.safetensors")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"] * 1.3
    save_file(
        {**tensors, "base_model.model.model.embed_tokens.weight": table}, folder / "adapter_model.safetensors"
    )
    made = export_run(folder, kind, output=tmp_path / "out", type_name="f32")
    assert made.parity["verified"]
    if kind == "merged":
        assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is False
        assert len(load_file(made.path / "model.safetensors")) == 1 + len(
            load_file(base / "model.safetensors")
        )


def test_an_adapter_outside_of_a_run_needs_a_place_for_its_export(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "adapter", write_model(tmp_path / "base"))
    with pytest.raises(Exception, match="needs an --output"):
        export_run(folder, "merged", verify=False)


def test_the_template_of_the_tests_is_another_than_the_models() -> None:
    assert TEMPLATE != CHAT_TEMPLATE

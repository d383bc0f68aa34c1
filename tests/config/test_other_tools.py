"""The settings of other programs are answered with ours: in recipes, as `key=value`, and as options."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
from tests.command import Cli

from lorafit.config.load import load_config
from lorafit.config.other_tools import _TABLE, answer, answers
from lorafit.config.schema import keys
from lorafit.errors import ConfigError

# What these programs call the usual settings, by the answer; from their documentation.
USUAL = {
    "model.name": "base_model model_name_or_path model",
    "data.path": "datasets dataset data",
    "data.max_length": "max_length sequence_len cutoff_len max_seq_length",
    "data.packing": "packing sample_packing neat_packing",
    "data.train_on": "train_on_inputs assistant_only_loss mask_prompt",
    "data.holdout": "val_set_size val_size",
    "lora.rank": "lora_r lora_rank r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "lora_target_modules lora_target target_modules lora_target_linear",
    "lora.layers": "num_layers lora_layers",
    "model.quantize": "load_in_4bit load_in_8bit quantization_bit",
    "train.learning_rate": "lr learning_rate",
    "train.batch_size": "per_device_train_batch_size micro_batch_size gradient_accumulation_steps batch_size",
    "train.epochs": "num_train_epochs num_epochs",
    "train.max_steps": "max_steps iters",
    "train.warmup": "warmup_ratio warmup_steps",
    "train.recompute": "gradient_checkpointing grad_checkpoint use_gradient_checkpointing",
    "train.log_every": "logging_steps steps_per_report",
    "train.eval_every": "eval_steps steps_per_eval",
    "train.save_every": "save_steps",
    "train.keep": "save_total_limit",
    "train.seed": "seed random_state",
    "run.output": "output_dir",
    "run.trackers": "report_to wandb_project",
}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers", "TrainingArguments"),
        ("trl", "SFTConfig"),
        ("trl", "ModelConfig"),
        ("trl", "DPOConfig"),
        ("trl", "KTOConfig"),
        ("peft", "LoraConfig"),
    ],
)
def test_every_field_of_the_installed_programs_is_answered(module: str, name: str) -> None:
    fields = dataclasses.fields(getattr(pytest.importorskip(module), name))
    assert [field.name for field in fields if not answer(field.name)] == []


def test_the_usual_settings_are_answered_with_the_key_that_does_the_same() -> None:
    wrong = [
        (name, answer(name))
        for key, names in USUAL.items()
        for name in names.split()
        if not answer(name).startswith(f"in lorafit: {key}")
    ]
    assert wrong == []


def test_no_setting_is_answered_twice() -> None:
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    names = [name for line in lines if line.startswith(" ") for name in line.split()]
    assert sorted(names) == sorted(answers())


def test_every_answer_names_a_key_that_exists_or_a_reason() -> None:
    for found in set(answers().values()):
        first = found.split(" (")[0].split(",")[0]
        is_command = found.startswith(("lorafit ", "HF_TOKEN", "--"))
        assert first in keys() or is_command or found.startswith(("not needed, ", "not offered")), found


def test_a_recipe_of_another_program_is_answered_key_by_key(tmp_path: Path) -> None:
    recipe = tmp_path / "axolotl.yaml"
    settings = {
        "base_model": "m",
        "sequence_len": 2048,
        "lora_r": 8,
        "optimizer": "adamw",
        "flash_attention": "true",
    }
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    hints = {problem.message: problem.hint for problem in caught.value.problems}
    assert hints["unknown key `base_model`"] == "in lorafit: model.name"
    assert hints["unknown key `sequence_len`"] == "in lorafit: data.max_length"
    assert hints["unknown key `lora_r`"] == "in lorafit: lora.rank"
    assert hints["unknown key `optimizer`"] == "not offered, the optimizer is AdamW"
    assert hints["unknown key `flash_attention`"].startswith("not needed, the fastest attention")


def test_a_model_written_as_other_programs_do_is_answered(tmp_path: Path) -> None:
    recipe = tmp_path / "mlx.yaml"
    recipe.write_text("model: some/model\ndata: rows.jsonl\ntrain: true\n")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe)
    assert [problem.hint for problem in caught.value.problems[:2]] == [
        "in lorafit: model.name",
        "in lorafit: data.path",
    ]


@pytest.mark.parametrize("word", ["lr=1e-4", "train.lr=1e-4", "train.LR=1e-4"])
def test_an_override_of_another_program_is_answered(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["model.name=m", "data.path=d", word])
    assert [problem.hint for problem in caught.value.problems] == ["in lorafit: train.learning_rate"]


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--lr", "in lorafit: train.learning_rate"),
        ("--learning-rate", "in lorafit: train.learning_rate"),
        ("--per_device_train_batch_size", "in lorafit: train.batch_size (rows of an optimizer step"),
        ("--flash-attn", "not needed, the fastest attention"),
        ("--neftune_noise_alpha", "in lorafit: train.neftune"),
        ("--rank", "give it as a setting: lora.rank=VALUE"),
        ("--train.keep", "give it as a setting: train.keep=VALUE"),
        ("--config", "in lorafit: lorafit train FILE.yaml"),
        ("--nothing-like-it", "see `"),
    ],
)
def test_an_option_of_another_program_is_answered(option: str, hint: str, cli: Cli) -> None:
    done = cli("train", option, "1e-4")
    assert (done.code, done.out) == (2, "")
    assert f" hint: {hint}" in done.err
    assert done.err.count("error:") == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "folder"])
def test_rows_in_the_place_of_a_recipe_are_called_so(
    name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file in ("rows.jsonl", "rows.csv", "rows.txt"):
        Path(file).write_text("{}\n")
    done = cli("plan", name)
    assert done.code == 2
    assert f"`{name}` is a f" in done.err
    assert "`--data` stands before each file" in done.err


def test_the_table_is_not_read_before_it_is_needed() -> None:
    importlib.import_module("lorafit.config.load")
    answers.cache_clear()
    load_config(None, ["model.name=m", "data.path=d"])
    assert answers.cache_info().currsize == 0

"""The recipes that ship with lorafit, held against the schema and against the script they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from lorafit.config.load import load_config, recipe_file, recipes_folder
from lorafit.config.reference import sections
from lorafit.config.schema import Config, keys, keys_that_change_results

RECIPES = sorted(recipes_folder().glob("*.yaml"), key=lambda path: path.stem)
NEEDED = {"model": {"name": "base"}, "data": {"path": "rows.json"}}


def raw(path: Path) -> dict[str, dict[str, Any]]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def value_of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def test_there_are_recipes() -> None:
    assert {"classic", "default"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_by_its_name(path: Path) -> None:
    given = raw(path)
    missing = [
        f"{section}.{key}={value}"
        for section, needed in NEEDED.items()
        for key, value in needed.items()
        if key not in given.get(section, {})
    ]
    config = load_config(recipe_file(path.stem), missing)
    assert path.read_text(encoding="utf-8").startswith("# ")
    for section, values in given.items():
        assert {f"{section}.{key}" for key in values} <= set(keys())
        assert getattr(config, section).model_fields_set >= set(values)


def test_the_default_recipe_is_the_schemas_defaults() -> None:
    plain = load_config(None, ["model.name=base", "data.path=rows.json"])
    recipe = load_config(recipe_file("default"), ["model.name=base", "data.path=rows.json"])
    named = [f"{section}.{key}" for section, values in raw(recipe_file("default")).items() for key in values]
    assert len(named) > 20
    for key in named:
        assert value_of(recipe, key) == value_of(plain, key), key
    assert recipe == plain


def test_the_classic_recipe_is_every_choice_of_the_classic_script() -> None:
    config = load_config(recipe_file("classic"))
    choices = {
        "model.name": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "data.path": ("alpaca_data.json",),
        "data.format": "alpaca",
        "data.template": "classic",
        "lora.rank": 8,
        "lora.alpha": 16,
        "lora.dropout": 0.05,
        "lora.targets": ("q_proj", "v_proj"),
        "lora.rslora": False,
        "data.max_length": 512,
        "data.too_long": "truncate",
        "data.train_on": "all",
        "data.eos": False,
        "data.holdout": 0,
        "data.shuffle": True,
        "train.batch_size": 4,
        "train.epochs": 1,
        "train.max_steps": None,
        "train.learning_rate": 2e-4,
        "train.schedule": "linear",
        "train.warmup": 0,
        "train.weight_decay": 0,
        "train.max_grad_norm": 1.0,
        "train.log_every": 10,
        "train.save_every": 0,
        "train.keep_best": False,
        "run.output": "tinyllama-lora",
    }
    assert {key: value_of(config, key) for key in choices} == choices


def test_every_default_is_valid_and_every_key_is_explained() -> None:
    config = Config.model_validate(NEEDED)
    assert Config.model_validate(config.model_dump()) == config
    entries = [entry for _, purpose, listed in sections() for entry in listed if purpose]
    assert [entry.name for entry in entries] == list(keys())
    for entry in entries:
        assert entry.help.endswith("."), entry.name
        assert entry.kind, entry.name


def test_a_config_cannot_be_changed() -> None:
    config = Config.model_validate(NEEDED)
    with pytest.raises(ValidationError, match="frozen"):
        config.lora.rank = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.lora = config.lora  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        ("lora.rank", 0, 1025),
        ("lora.alpha", 0, float("inf")),
        ("lora.dropout", -0.1, 1),
        ("data.max_length", 7, 1_048_577),
        ("train.epochs", 0, 1001),
        ("train.batch_size", 0, 65537),
        ("train.learning_rate", 0, 1),
        ("train.seed", -1, 2**32),
        ("run.samples", -1, 51),
    ],
)
def test_bounds_hold(key: str, low: float, high: float) -> None:
    section, _, name = key.partition(".")
    for value in (low, high):
        with pytest.raises(ValidationError):
            Config.model_validate({**NEEDED, section: {**NEEDED.get(section, {}), name: value}})


def test_a_checkpoint_is_compared_with_every_key_that_is_not_resumable() -> None:
    config = Config.model_validate(NEEDED)
    compared = set(keys_that_change_results(config))
    assert {"lora.rank", "model.quantize", "data.holdout", "train.seed", "train.keep_best"} <= compared
    free = set(keys()) - compared
    assert {"model.device", "data.packing", "train.micro_batch_tokens", "train.recompute"} <= free
    assert {key for key in keys() if key.startswith(("run.", "distributed."))} <= free
    assert len(compared) == 39  # a new key is compared unless its field says otherwise

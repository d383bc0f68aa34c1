"""The settings that matter: each is a key, its text is the page's, and slips lead to near names only."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command import Cli

from lorafit.config.guide import GUIDE
from lorafit.config.load import nearest_key
from lorafit.config.reference import settings_table
from lorafit.config.schema import keys
from lorafit.errors import similar

PAGE = Path(__file__).parents[2] / "docs/settings.md"


def test_ten_keys_are_explained_and_the_page_has_the_same_text() -> None:
    assert len(GUIDE) == 10
    assert set(GUIDE) <= set(keys())
    assert settings_table() in PAGE.read_text(encoding="utf-8")


def test_the_command_shows_what_is_usual_and_when_to_change_it(cli: Cli) -> None:
    for key in ("train.learning_rate", "lora.rank"):
        said = " ".join(cli("config", key).out.split())
        assert f"usual {GUIDE[key].usual}" in said
        assert f"change {GUIDE[key].change}" in said
    assert "usual" not in cli("config", "lora.rslora").out


@pytest.mark.parametrize(
    "name", ["train.qwerty", "data.qqqq", "train.omegas", "train.loss", "lora.zebras", "zzz"]
)
def test_a_name_that_is_far_from_every_key_gets_no_key(name: str) -> None:
    assert nearest_key(name) == "`lorafit config` lists the keys"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nothere.json", []),
        ("koraen.json", ["korean.json"]),
        ("Korean.jsonl", ["korean.json"]),
        ("sharegtp.json", ["sharegpt.json"]),
        ("data.json", []),
    ],
)
def test_only_near_names_are_proposed(name: str, found: list[str]) -> None:
    assert similar(name, ["korean.json", "sharegpt.json", "rows.csv"]) == found

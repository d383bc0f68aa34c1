"""`lorafit models`: every model of the table has its size, and what is not supported is refused with the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit.errors import ModelError
from lorafit.model.families import FAMILIES
from lorafit.plan.known_models import KNOWN, find_model
from lorafit.plan.model_table import HEADERS, here, markdown, table_rows

SUPPORTED = [model for model in KNOWN if model.is_supported]


@pytest.mark.parametrize("model", SUPPORTED, ids=lambda model: model.name)
def test_the_sizes_of_a_model_add_up_to_its_parameters(model) -> None:  # type: ignore[no-untyped-def]
    assert model.architecture().num_parameters == pytest.approx(model.billions * 1e9, rel=0.01)


def test_every_type_has_a_model() -> None:
    assert {model.model_type for model in SUPPORTED} == set(FAMILIES)


def test_a_name_is_found_as_people_type_it() -> None:
    assert find_model("SmolLM3-3B").owner == "HuggingFaceTB"
    assert find_model("huggingfacetb/smollm3-3b").name == "SmolLM3-3B"
    assert find_model("gemma 3 270m").name == "gemma-3-270m-it"


@pytest.mark.parametrize(
    ("name", "model_type", "nearest"),
    [("Qwen3.5-35B-A3B", "qwen3_5_moe", "Qwen/"), ("gemma-3n-E2B", "gemma3n", "google/gemma-3-4b-it")],
)
def test_an_unsupported_one_names_its_type_and_the_nearest(name: str, model_type: str, nearest: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert f"its model type is `{model_type}`" in str(caught.value)
    assert nearest in caught.value.problems[0].hint


def test_a_misspelt_name_gets_close_ones() -> None:
    with pytest.raises(ModelError) as caught:
        find_model("SmolLM4-3B")
    assert "SmolLM3-3B" in caught.value.problems[0].hint


def test_what_this_machine_needs_grows_with_the_model() -> None:
    small, large = here([find_model("gemma-3-270m"), find_model("SmolLM3-3B")])
    assert small[0] == "yes"
    assert small[1].endswith(("MB", "GB"))
    assert large[2].startswith("about ")


def test_the_page_is_that_of_the_command() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text(encoding="utf-8") == markdown()
    assert len(table_rows()) == len(KNOWN)
    assert all(len(row) == len(HEADERS) for row in table_rows())

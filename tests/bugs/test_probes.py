"""Every probe passes on unchanged lorafit and fails with each of its bugs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.bugs import page
from tests.bugs.catalogue import BUGS, Plant, Probe, probes, verdict
from tests.bugs.lab import changed, function_at

IS_LONG = bool(os.environ.get("LORAFIT_LONG"))
ALL = [pytest.param(p, id=p.name) for p in probes()]
# the first plant of each probe; `make bugs` tries all
PLANTED = [
    pytest.param(p, plant, id=f"{p.name}-{number}")
    for p in probes()
    for number, plant in enumerate(p.plants if IS_LONG else p.plants[:1])
]


@pytest.mark.slow
@pytest.mark.parametrize("probe", ALL)
def test_lorafit_passes(probe: Probe, tmp_path: Path) -> None:
    outcome = verdict(probe, None, tmp_path)
    assert outcome.passed, outcome.message


@pytest.mark.slow
@pytest.mark.parametrize(("probe", "plant"), PLANTED)
def test_the_probe_detects_its_bug(probe: Probe, plant: Plant, tmp_path: Path) -> None:
    assert not verdict(probe, plant, tmp_path).passed


@pytest.mark.parametrize("probe", ALL)
def test_every_plant_has_its_text(probe: Probe) -> None:
    for plant in probe.plants:
        if plant.act is None:
            changed(function_at(plant.target), plant.old, plant.new)


def test_every_bug_has_a_probe_and_every_probe_a_bug() -> None:
    assert sorted(BUGS) == list(range(1, 33))
    assert {probe.bug for probe in probes()} == set(BUGS)
    assert all(probe.plants for probe in probes())


def test_the_page_has_the_table_of_today() -> None:
    text = (Path(__file__).parents[2] / "docs" / "correctness.md").read_text(encoding="utf-8")
    assert page.table() in text, "run `python -m tests.bugs.page docs/correctness.md`"


def test_a_plant_without_its_text_is_an_error() -> None:
    function = function_at("training.loop:_gradients")
    with pytest.raises(LookupError, match="0 times"):
        changed(function, "what is not there", "")

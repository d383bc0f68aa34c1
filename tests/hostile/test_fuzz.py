"""Hostile values of every kind, some hundred of each; `make fuzz` tries 200,000."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.hostile import fuzz_targets
from tests.hostile.fuzz import Tally, campaign, example, fuzz, markdown
from tests.hostile.fuzz_targets import TARGETS, Scene, read

from lorafit.data.formats import Completion, Row
from lorafit.data.prompt import Rendered
from lorafit.data.readers import read_file
from lorafit.errors import DataError

SHORT = {"rows": 300, "bytes": 300, "texts": 250, "configs": 150, "recipes": 150, "overrides": 150}
SHORT |= {"templates": 200, "arguments": 50, "runs": 50, "sandbox": 150}
HANGS = 120.0  # processor seconds of one example: here only what never ends fails, `make fuzz` is stricter


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_in_the_short_form() -> None:
    assert SHORT.keys() == TARGETS.keys() == {*PLANTS, "sandbox"}
    assert sum(target.share for target in TARGETS.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.parametrize("name", TARGETS)
def test_no_value_breaks_it(name: str, scene: Scene) -> None:
    fuzz(scene, TARGETS[name], SHORT[name], Tally(), seconds=HANGS)


# Where each target is hit: a function that its every good example calls.
PLANTS = {
    "rows": ("lorafit.data.sources.parse", 60),
    "bytes": ("lorafit.data.sources.place_of", 200),
    "texts": ("lorafit.data.prompt._unusable_in", 20),
    "configs": ("lorafit.config.load._unusable_texts", 20),
    "recipes": ("lorafit.config.load._note_lines", 200),
    "overrides": ("lorafit.config.load._apply", 20),
    "templates": ("lorafit.data.chat_template._kind", 200),
    "arguments": ("lorafit.config.load.config_from_args", 400),
    "runs": ("lorafit.report.run_data._check_lines", 20),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_bug_is_found(name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyError where there should be an error of ours."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("planted")

    place, count = PLANTS[name]
    monkeypatch.setattr(place, broken)
    with pytest.raises((KeyError, AssertionError), match="planted"):
        fuzz(scene, TARGETS[name], count, Tally(), number=1, seconds=HANGS)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("charge", "{{ ('a' * 150000).rfind('a' * 40000 ~ 'b' ~ 'a' * 40000) }}"),
        ("charge", "{{ ('a' * 300000000)|length }}"),
        ("weighed", "{{ ('\\u4e2d' * 3000000)|list }}"),
    ],
)
def test_a_template_that_is_not_billed_is_found(
    place: str, source: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"lorafit.data.jinja_costs.Budget.{place}", lambda _, given: given)
    monkeypatch.setattr("lorafit.data.jinja_costs.Budget.charge", lambda *_: None)
    with pytest.raises(AssertionError, match="units"):
        fuzz_targets.bounded_template(scene, source)


def test_what_never_ends_is_ended(scene: Scene) -> None:
    def never_ends(_: Scene, drawn: int) -> None:
        while drawn:
            with contextlib.suppress(Exception):  # what is fuzzed may catch a lot
                list(range(1000))

    with pytest.raises(AssertionError, match="more than 0.2 s"):
        example(scene, never_ends, 1, Tally(), seconds=0.2)


def test_an_error_without_a_place_or_message_is_a_failure() -> None:
    for error in (
        DataError("it is wrong"),
        DataError(" ", place="x.json row 1"),
        DataError("x", place="y.json"),
    ):
        with pytest.raises(AssertionError):
            fuzz_targets.refused(error, "x.json")
    fuzz_targets.refused(DataError("it is wrong", place="x.json row 1"), "x.json")


def test_another_answer_than_the_one_asked_for_is_a_failure(scene: Scene) -> None:
    renderer = scene.answering[0]
    row = Row(0, "x.json row 1", Completion("two and two", "four"))
    [outcome] = renderer.render_batch([row])
    assert isinstance(outcome, Rendered)
    fuzz_targets.says(renderer, outcome, ["four"])
    with pytest.raises(AssertionError, match="is trained, not"):
        fuzz_targets.says(renderer, outcome, ["five"])


def test_the_campaign_counts_and_goes_on_after_a_failure(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("lorafit.config.load._apply", broken)
    tallies = campaign(scene, ["overrides", "configs"], 40, None, 0)
    assert tallies["overrides"].failures
    assert "planted" in tallies["overrides"].failures[0]
    assert tallies["configs"].failures == []
    assert tallies["configs"].examples >= 20
    assert markdown(tallies).startswith("| fuzzed")


def test_bytes_that_are_no_text_in_a_cut_gzip_file(scene: Scene) -> None:
    """The search for the bad byte met the end of the file, and nobody expected it."""
    cut = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x00j\x00"
    path = scene.file("data.json.gz", cut)
    read(scene, path, "auto", 0)
    with pytest.raises(DataError, match="not a whole gzip file"):
        list(read_file(path, "data.json.gz"))


def test_a_server_without_its_model_lets_go_of_the_port(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, create = [], socket.create_server

    def recorded(*given: Any, **options: Any) -> socket.socket:
        made.append(create(*given, **options))
        return made[-1]

    monkeypatch.setattr(socket, "create_server", recorded)
    fuzz_targets.any_arguments(scene, ["serve", "missing", "--port", "0"])
    assert [one.fileno() for one in made] == [-1]

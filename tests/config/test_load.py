"""Recipes and overrides become a Config, or an error that names every mistake and its place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.effort import num_calls

from lorafit.config.load import (
    config_from_args,
    dump_config,
    flag_overrides,
    load_config,
    nearest_key,
    recipe_file,
    recipes_folder,
    validate,
)
from lorafit.config.schema import Config, keys
from lorafit.errors import ConfigError, Problem

NEEDED = ["model.name=base", "data.path=rows.json"]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(recipe: Path | None = None, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    return caught.value.problems


def test_every_mistake_is_reported_at_once_with_its_line(recipe: Callable[[str], Path]) -> None:
    path = recipe(
        "model:\n  nmae: base\nlora:\n  rank: 0\n  dropuot: 0.1\n\ndata:\n  path: rows.json\n"
        "  max_lenght: 512\ntrian:\n  epochs: 1\n"
    )
    found = {problem.place: problem for problem in problems(path, "train.epochs=-1", "lora.alpha")}
    assert found[f"{path}:2"].message == "unknown key `model.nmae`"
    assert found[f"{path}:2"].hint == "did you mean `model.name`?"
    assert found[f"{path}:4"].message == "`lora.rank`: input should be greater than or equal to 1, not 0"
    assert found[f"{path}:5"].hint == "did you mean `lora.dropout`?"
    assert found[f"{path}:9"].hint == "did you mean `data.max_length`?"
    assert found[f"{path}:10"].hint == "did you mean `train.epochs`?"
    assert found["`train.epochs=-1` on the command line"].message.startswith(
        "`train.epochs`: input should be"
    )
    assert found["`lora.alpha` on the command line"].message == "an override is `section.key=value`"
    missing = [problem for problem in found.values() if problem.message == "`model.name` is missing"]
    assert [problem.hint for problem in missing] == ["give `--model NAME` or set it in the recipe"]
    assert len(found) == 8


def test_what_is_missing_says_the_flag_to_give() -> None:
    assert [(problem.message, problem.hint) for problem in problems()] == [
        ("`model.name` is missing", "give `--model NAME` or set it in the recipe"),
        ("`data.path` is missing", "give `--data FILE` or set it in the recipe"),
    ]


@pytest.mark.parametrize("key", sorted(keys()))
def test_a_slip_in_any_key_is_answered_with_the_key(key: str) -> None:
    section, _, name = key.partition(".")
    slips = [f"{section}.{name[1:]}", f"{section}.{name}s", f"{section}{section[-1]}.{name}"]
    for slip in {slip for slip in slips if slip not in set(keys()) and len(name) > 3}:
        assert nearest_key(slip) == f"did you mean `{key}`?", slip


def test_a_key_in_the_wrong_section_is_found(recipe: Callable[[str], Path]) -> None:
    (problem,) = problems(recipe("train:\n  rank: 8\n"), *NEEDED)
    assert (problem.message, problem.hint) == ("unknown key `train.rank`", "did you mean `lora.rank`?")
    (problem,) = problems(recipe("trainn:\n  epochs: 3\n"), *NEEDED)
    assert (problem.message, problem.hint) == ("unknown key `trainn.epochs`", "did you mean `train.epochs`?")
    (problem,) = problems(recipe("optimizer:\n  name: sgd\n"), *NEEDED)
    assert problem.hint == "not offered, the optimizer is AdamW"
    (problem,) = problems(recipe("learning_rate: 1\n"), *NEEDED)
    assert problem.hint == "did you mean `train.learning_rate`?"


def test_a_hint_to_look_up_a_key_names_a_key(recipe: Callable[[str], Path]) -> None:
    """What stands in a list is explained where the list is."""
    path = recipe("run: {trackers: [wandbb]}\ndata: {path: [1], weights: [-1]}\n")
    for problem in problems(path, "model.name=x"):
        name = problem.hint.removeprefix("`lorafit config ").removesuffix("` explains it")
        assert name in set(keys()), problem


def test_a_key_given_twice_is_a_mistake(recipe: Callable[[str], Path]) -> None:
    path = recipe("lora:\n  rank: 8\n  rank: 16\nmodel: {name: base}\nlora: {}\n")
    found = problems(path, "data.path=rows.json")
    assert [(problem.message, problem.place) for problem in found] == [
        ("`lora.rank` is set twice", f"{path}:3"),
        ("`lora` is set twice", f"{path}:5"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: &a {rank: 8}\ntrain: *a\n", "aliases"),
        ("lora: {rank: [}\n", "not valid YAML"),
        ("lora:\n\trank: 8\n", "not valid YAML"),
        ("lora: !!python/object/apply:os.system [id]\n", "not valid YAML"),
        ("lora: 2001-99-99\n", "not valid YAML"),
        ("{? {a: b} : c}\n", "not valid YAML"),
        ("---\na: 1\n---\nb: 2\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("- model\n- data\n", "a recipe is a mapping of sections"),
        ("just words", "a recipe is a mapping of sections"),
        ("#" * 1_000_001, "at most 100,000 bytes"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, message: str, recipe: Callable[[str], Path]) -> None:
    path = recipe(text)
    (problem,) = problems(path, *NEEDED)
    assert message in problem.message
    assert problem.place.startswith(str(path))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert problems(path)[0].message == "cannot read the recipe: it is not UTF-8 text"
    assert problems(tmp_path)[0].message == "cannot read the recipe: it is not a plain file"


def test_an_empty_recipe_and_an_empty_section_are_the_defaults(recipe: Callable[[str], Path]) -> None:
    assert load_config(recipe("# nothing\n"), NEEDED) == load_config(None, NEEDED)
    assert load_config(recipe("lora:\n  # rank: 8\n"), NEEDED) == load_config(None, NEEDED)


def test_overrides_win_over_the_recipe_and_later_ones_over_earlier(recipe: Callable[[str], Path]) -> None:
    path = recipe("lora: {rank: 8, alpha: 9}\nmodel: {name: base}\ndata: {path: rows.json}\n")
    config = load_config(path, ["lora.rank=4", "data.path=[a.json, b.json]", "lora.rank=2"])
    assert (config.lora.rank, config.lora.alpha, config.data.path) == (2, 9.0, ("a.json", "b.json"))
    flags = flag_overrides(model="owner/name", data=["x: y.json", "[z].json"], output="yes")
    config = load_config(path, ["model.name=[other", "data.path=other.json"], flags)
    assert (config.model.name, config.data.path, config.run.output) == (
        "owner/name",
        ("x: y.json", "[z].json"),
        "yes",
    )


def test_values_are_read_as_people_write_them(recipe: Callable[[str], Path]) -> None:
    path = recipe("train: {learning_rate: 2e-4, save_every: epoch}\nlora: {targets: q_proj}\n")
    config = load_config(path, [*NEEDED, "train.eval_every=epoch", "lora.rslora=true", "data.holdout=1e-1"])
    assert config.train.learning_rate == 2e-4
    assert (config.train.save_every, config.train.eval_every) == (0, 0)
    assert config.lora.targets == ("q_proj",)
    assert config.lora.rslora is True
    assert config.data.holdout == 0.1
    assert load_config(None, [*NEEDED, "train.learning_rate=5e-5"]).train.learning_rate == 5e-5


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-.inf", "1e999", "many", "[1]", "{}", ""])
def test_a_number_is_a_finite_number(value: str) -> None:
    (problem,) = problems(None, *NEEDED, f"train.learning_rate={value}")
    assert problem.message.startswith("`train.learning_rate`: ")
    assert problem.place == f"`train.learning_rate={value}` on the command line"


def test_weights_are_one_a_path() -> None:
    (problem,) = problems(None, *NEEDED, "data.weights=[1, 2]")
    assert problem.message == "`data.weights` has 2 numbers for 1 paths in `data.path`"


def test_recipes_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert recipe_file("classic") == recipes_folder() / "classic.yaml"
    (tmp_path / "mine.yml").write_text("")
    assert recipe_file(str(tmp_path / "mine.yml")) == tmp_path / "mine.yml"
    for name in ("clasic", "clasic.yaml", "somewhere/clasic"):
        with pytest.raises(ConfigError) as caught:
            recipe_file(name)
        assert caught.value.problems[0].hint == "did you mean `classic`?"
    with pytest.raises(ConfigError, match="recipes that ship with lorafit: .*classic, ddp, default"):
        recipe_file("qqqq")


CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXT = st.text(CHARACTERS, max_size=30)
NAMES = st.text(CHARACTERS, min_size=1, max_size=30)
SHARES = st.floats(0, 1, exclude_max=True)
INTERVALS = st.integers(0, 10**6) | st.just("epoch")
AUTO = st.just("auto")
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model.name": NAMES,
    "model.revision": st.none() | TEXT,
    "model.device": st.sampled_from(["auto", "cpu", "mps", "cuda", "cuda:3"]),
    "model.dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16", "float64"]),
    "model.quantize": st.sampled_from(["none", "int8", "nf4", "fp8"]),
    "model.offload": st.sampled_from(["none", "layers"]),
    "lora.rank": st.integers(1, 1024),
    "lora.alpha": st.floats(0, 1e300, exclude_min=True),
    "lora.dropout": SHARES,
    "lora.targets": st.lists(TEXT, min_size=1, max_size=3) | TEXT,
    "lora.rslora": st.booleans(),
    "lora.ranks": st.dictionaries(TEXT, st.integers(1, 1024), max_size=2),
    "lora.alphas": st.dictionaries(TEXT, st.floats(0, 1e300, exclude_min=True), max_size=2),
    "lora.init": st.sampled_from(["default", "pissa", "olora", "eva"]),
    "lora.dora": st.just(False),  # true goes with no lora.init
    "lora.b_rate": st.floats(0, 1000, exclude_min=True),
    "lora.layers": st.none() | st.integers(1, 200),
    "lora.tokens": st.lists(TEXT.map("<{}>".format), max_size=2, unique=True),
    "lora.save_modules": st.lists(st.sampled_from(["embed_tokens", "lm_head"]), max_size=2),
    "lora.init_from": st.none(),  # a folder goes with no lora.ranks
    "lora.other_base": st.booleans(),
    "data.path": st.lists(TEXT, min_size=1, max_size=3, unique=True) | TEXT,
    "data.weights": st.none(),
    "data.revision": st.none() | TEXT,
    "data.split": TEXT,
    "data.config": st.none() | TEXT,
    "data.columns": st.dictionaries(TEXT, TEXT, max_size=3),
    "data.encoding": st.sampled_from(["utf-8", "cp949", "utf-16"]),
    "data.bad_rows": st.sampled_from(["error", "drop"]),
    "data.order": st.sampled_from(["hash", None]),
    "data.drop_rows": st.lists(TEXT, max_size=2),
    "data.eval_path": st.just([]) | TEXT.map("measured-".__add__),
    "data.eval_split": st.none() | TEXT,
    "data.format": st.sampled_from(["auto", "alpaca", "messages", "sharegpt", "completion", "text"]),
    "data.template": TEXT,
    "data.system": TEXT,
    "data.max_length": st.integers(8, 1_048_576),
    "data.too_long": st.sampled_from(["error", "truncate", "drop", "split"]),
    "data.train_on": st.sampled_from(["response", "last", "all"]),
    "data.template_args": st.dictionaries(TEXT, TEXT | st.booleans() | st.integers(-9, 9), max_size=3),
    "data.parse_special": st.booleans(),
    "data.eos": st.booleans(),
    "data.packing": st.booleans(),
    "data.shuffle": st.booleans(),
    "data.holdout": st.floats(0, 1e9),
    # the keys of preferences go with some methods only: tests/training/test_preferences.py
    "train.method": st.just("sft"),
    "train.beta": st.none(),
    "train.loss_type": st.just("sigmoid"),
    "train.label_smoothing": st.just(0.0),
    "train.simpo_gamma": st.just(0.5),
    "train.desirable_weight": st.just(1.0),
    "train.undesirable_weight": st.just(1.0),
    "train.epochs": st.floats(0, 1000, exclude_min=True) | AUTO,
    "train.max_steps": st.none() | st.integers(1),
    "train.budget": st.none(),  # goes with no train.max_steps
    "train.batch_size": st.integers(1, 65536) | AUTO,
    "train.micro_batch_tokens": st.integers(8),
    "train.recompute": st.sampled_from(["none", "layers"]),
    "train.deterministic": st.booleans(),
    "train.learning_rate": st.floats(0, 1, exclude_min=True, exclude_max=True) | AUTO,
    "train.schedule": st.sampled_from(["auto", "cosine", "linear", "constant", "wsd"]),
    "train.warmup": st.floats(0, 1e6),
    "train.weight_decay": SHARES,
    "train.max_grad_norm": st.floats(0, 1e6),
    "train.keep_activations": st.booleans(),
    "train.neftune": st.floats(0, 1e6),
    "train.seed": st.integers(0, 2**32 - 1),
    "train.log_every": st.integers(1),
    "train.eval_every": INTERVALS | AUTO,
    "train.save_every": INTERVALS,
    "train.keep": st.integers(1),
    "train.keep_best": st.booleans(),
    "train.tolerance": st.floats(0, 10) | AUTO,
    "train.refit": st.just(False) | AUTO,  # true goes with no data.eval_path
    "train.anchor": st.floats(0, 10),
    "train.max_drift": st.none() | st.floats(0, 1e6, exclude_min=True),
    "train.patience": st.integers(0) | AUTO,
    "run.output": st.none() | TEXT,
    "distributed.strategy": st.sampled_from(["auto", "single", "ddp", "fsdp"]),
    "distributed.timeout": st.floats(1, 1e6),
    "run.trackers": st.lists(st.sampled_from(["tensorboard", "wandb", "mlflow", "trackio"]), max_size=2),
    "run.offline": st.booleans(),
    "run.too_large": st.sampled_from(["error", "auto", "try"]),
    "run.check": st.sampled_from(["error", "warn", "none"]),
    "run.prompts": st.none() | TEXT,
    "run.samples": st.integers(0, 50),
    "run.samples_every": st.none() | INTERVALS,
    "run.drift": st.booleans(),
    "run.verify": st.booleans(),
}


def test_the_random_configs_below_cover_every_key() -> None:
    assert set(VALUES) == set(keys())


@given(
    st.fixed_dictionaries({}, optional=VALUES), NAMES, st.lists(st.floats(0.01, 100), min_size=2, max_size=2)
)
def test_a_dumped_config_loads_equal(values: dict[str, Any], name: str, weights: list[float]) -> None:
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": name},
        "data": {"path": [name, name + "b"], "weights": weights},
    }
    for key, value in values.items():
        section, _, last = key.partition(".")
        sections.setdefault(section, {})[last] = value
    if "data.path" in values:
        sections["data"]["weights"] = None
    if "data.weights" in values:
        sections["data"]["weights"] = values["data.weights"]
    config = validate(sections)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        again = load_config(path)
    assert again == config
    assert {
        f"{section}.{key}" for section, given in yaml.safe_load(dump_config(config)).items() for key in given
    } == (set(keys()))


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
)
THINGS = ATOMS | st.lists(ATOMS, max_size=3) | st.dictionaries(ATOMS, ATOMS | st.lists(ATOMS), max_size=3)
SECTIONS = st.dictionaries(
    st.sampled_from(["model", "lora", "data", "train", "run", "", "x"]) | st.integers() | st.none(),
    THINGS | st.dictionaries(st.sampled_from([key.partition(".")[2] for key in keys()]), THINGS, max_size=4),
    max_size=4,
)


def config_or_error(load: Callable[[], Config]) -> None:
    try:
        config = load()
    except ConfigError as error:
        assert all(problem.message for problem in error.problems)
        assert "error: " in str(error)
    else:
        assert isinstance(config, Config)


@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode(errors="replace")))
def test_any_bytes_are_a_config_or_an_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        config_or_error(lambda: load_config(path, NEEDED))


@given(SECTIONS)
def test_any_yaml_is_a_config_or_an_error(values: dict[Any, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="replace")
        config_or_error(lambda: load_config(path, NEEDED))
    config_or_error(lambda: validate(values))


@given(
    st.lists(
        st.text(max_size=40)
        | st.builds("{}={}".format, st.sampled_from(sorted(keys())), st.text(max_size=20))
    )
)
def test_any_overrides_are_a_config_or_an_error(overrides: list[str]) -> None:
    config_or_error(lambda: load_config(None, [*NEEDED, *overrides]))


def test_many_unknown_keys_are_all_counted_and_the_first_ones_explained(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    hints: list[str] = []

    def refused(num_keys: int) -> None:
        recipe.write_text("".join(f"modl{index}: 1\n" for index in range(num_keys)))
        with pytest.raises(ConfigError) as caught:
            load_config(recipe, ["model.name=m", "data.path=d.json"])
        hints[:] = [problem.hint for problem in caught.value.problems]

    refused(1)  # what is made once
    few, many = num_calls(lambda: refused(120)), num_calls(lambda: refused(1200))
    assert many < 12 * few  # in proportion to the keys; the square would be 100 times as many
    assert len(hints) == 1200
    assert hints[:50] == ["did you mean `model`?"] * 50
    assert not any(hints[50:])


def test_bytes_in_yaml_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model:\n  name: !!binary AAAA\ndata:\n  path: rows.json\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert problem.message == "`model.name` is bytes and no text"
    assert problem.place == f"{path}:2"


def test_a_problem_that_comes_twice_is_said_once() -> None:
    one, other = Problem("it is wrong", "rows.json", "correct it"), Problem("it is wrong", "more.json")
    error = ConfigError.of([one, other, one, one], num_more=2)
    assert error.problems == (one, other)
    assert str(error).count("error: it is wrong") == 2
    assert str(error).endswith("... and 2 more problems")


def test_a_text_that_is_no_unicode_is_one_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.path=d"], {"model.name": "\udcff"})
    assert [problem.message for problem in caught.value.problems] == [
        "`model.name` holds a character that is no text"
    ]


def test_files_after_data_are_data(tmp_path: Path) -> None:
    """A shell writes `--data *.jsonl` as several words. Recipes and overrides stay what they are."""
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.csv.gz")]
    for name in names:
        Path(name).touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lora: {rank: 3}")
    config = config_from_args(
        [names[1], str(recipe), "train.seed=1", names[2]], None, {"model.name": "m", "data.path": names[:1]}
    )
    assert config.data.path == tuple(names)
    assert (config.lora.rank, config.train.seed) == (3, 1)
    with pytest.raises(ConfigError):
        config_from_args(names[:1], None, {"model.name": "m"})
    with pytest.raises(ConfigError, match="stands where a recipe stands"):
        config_from_args(["none.jsonl"], None, {"model.name": "m", "data.path": names})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is a run") as caught:
        config_from_args([str(tmp_path / "run")], None, {})
    assert str(tmp_path / "run" / "config.yaml") in caught.value.problems[0].hint


@pytest.mark.parametrize("name", ["cp9490", "zlib", "base64", ""])
def test_encodings_are_those_of_text(name: str) -> None:
    with pytest.raises(ConfigError, match="no encoding of text has this name"):
        load_config(None, ["model.name=m", "data.path=a", f"data.encoding={name}"])


@pytest.mark.parametrize("key", ["train.epochs", "train.batch_size", "train.eval_every", "train.refit"])
def test_a_wrong_value_of_a_key_with_auto_names_auto(key: str) -> None:
    with pytest.raises(ConfigError, match="input should be `auto` or "):
        load_config(None, ["model.name=m", "data.path=a", f"{key}=banana"])

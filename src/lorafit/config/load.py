"""Recipe file, `section.key=value` overrides and flags -> Config, with every error reported at once, with its place."""

from __future__ import annotations

import difflib
import errno
import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.composer import ComposerError

from lorafit.config.fields import OrAuto
from lorafit.config.other_tools import answer
from lorafit.config.schema import Config, keys, sections
from lorafit.errors import ConfigError, Problem, similar
from lorafit.redact import redact
from lorafit.storage.safe_read import read_text

KeyPath = tuple[str, ...]
MAX_RECIPE = 100_000  # bytes
_MOST_HINTS = (
    50  # as many as are shown: the search for the nearest key is slow, and a recipe may have 20,000 keys
)
# What PyYAML raises for dates, numbers and keys that Python cannot represent, and for endless nesting.
_OF_VALUES = (ValueError, TypeError, LookupError, RecursionError)
_ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".gz", ".zst")
FLAGS = {
    "model.name": "--model NAME",
    "data.path": "--data FILE",
    "run.output": "--output FOLDER",
    "run.too_large": "--auto",
}


def recipes_folder() -> Path:
    """The folder of the recipes that ship with lorafit: inside the package when installed, else in the checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def recipe_file(name: str) -> Path:
    """The recipe called `name`: a path, or the name of one that ships with lorafit."""
    path = Path(name)
    is_folder = os.path.isdir(path)  # noqa: PTH112  does not raise for a name that is too long
    if is_folder or path.suffix.lower() in _ROWS:
        what = "a folder" if is_folder else "a file of rows"
        hint = "`--data` stands before each file: --data ONE --data TWO; or give the folder, or a pattern in quotes"
        if (settings := path / "config.yaml").is_file():
            what, hint = "a run", f"the recipe with its settings is {settings}"
        raise ConfigError(f"`{name}` is {what}, and stands where a recipe stands", hint=hint)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ConfigError(f"there is no recipe file `{name}`", hint=_shipped_hint(name))
    shipped = recipes_folder() / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise ConfigError(f"there is no recipe `{name}`", hint=_shipped_hint(name))


def load_config(
    recipe: Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, object] | None = None
) -> Config:
    """The Config of a recipe file, then `section.key=value` overrides in order, then `flags` (values by key).

    Raises ConfigError with every unknown key, wrong value and missing key, each with its file and line.
    """
    values: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    problems: list[Problem] = []
    if recipe is not None:
        values = _read_recipe(recipe, places, problems)
    for override in overrides:
        _apply(override, values, places, problems)
    for name, value in (flags or {}).items():
        section, _, key = name.partition(".")
        _set(values, places, (section, key), value, f"`{FLAGS[name]}` on the command line")
    return validate(values, places, problems)


def validate(
    values: Mapping[str, Any], places: Mapping[KeyPath, str] | None = None, problems: Sequence[Problem] = ()
) -> Config:
    """The Config of nested `values`. Raises ConfigError with the earlier `problems` and all new ones; `places` says
    where each key was set.
    """
    everything, config = [*problems, *_unusable_texts(values, (), places or {})], None
    known_bad = {problem.place for problem in problems}
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        details = [
            detail for detail in error.errors(include_url=False) if detail["type"] != "string_unicode"
        ]  # it is among the unusable texts
        fresh = [
            _problem(detail, places or {}, number < _MOST_HINTS) for number, detail in enumerate(details)
        ]
        everything += [problem for problem in fresh if not problem.place or problem.place not in known_bad]
    if everything or config is None:
        raise ConfigError.of(everything)
    return config


def load_form(fields: Mapping[str, str], texts: Mapping[str, object]) -> Config:
    """The Config of `fields` by `section.key`, each as it stands after `=` on a command line, and of `texts`, which are
    taken as they are. Raises ConfigError; the place of each problem is the key, where it has one.
    """
    values: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    problems: list[Problem] = []
    for name, text in fields.items():
        _apply(f"{name}={text}", values, places, problems)
    for name, value in texts.items():
        section, _, key = name.partition(".")
        _set(values, places, (section, key), value, name)
    return validate(values, {key: ".".join(key) for key in places}, problems)


def flag_overrides(
    model: str | None, data: Sequence[str] | None, output: str | None, auto: bool = False
) -> dict[str, object]:
    """The common flags that are set, as values by key."""
    values = {"model.name": model, "data.path": list(data) if data else None, "run.output": output}
    values["run.too_large"] = "auto" if auto else None
    return {key: value for key, value in values.items() if value is not None}


def override_words(flags: Mapping[str, object]) -> list[str]:
    """Flags as `section.key=value` words, for the command line of another process."""
    return [f"{key}={json.dumps(value)}" for key, value in flags.items()]


def config_from_args(words: Sequence[str], recipe: str | None, flags: Mapping[str, object]) -> Config:
    """The Config of a command line: a recipe and overrides in any order, or `recipe` by flag, the other flags last."""
    flags, words = _with_more_data(flags, words)
    recipes = [word for word in words if "=" not in word] + ([recipe] if recipe is not None else [])
    if len(recipes) > 1:
        raise ConfigError(
            f"one recipe per run, not {len(recipes)}: {', '.join(recipes)}",
            hint="give data with --data, and settings as section.key=value",
        )
    overrides = [word for word in words if "=" in word]
    return load_config(recipe_file(recipes[0]) if recipes else None, overrides, flags)


def _with_more_data(
    flags: Mapping[str, object], words: Sequence[str]
) -> tuple[Mapping[str, object], Sequence[str]]:
    """(flags, words) with the files after `--data FILE` as data: a shell writes `--data *.jsonl` as several words."""
    if "data.path" not in flags:
        return flags, words
    more = [word for word in words if Path(word).suffix not in ("", ".yaml", ".yml") and Path(word).is_file()]
    paths = flags["data.path"]
    assert isinstance(paths, list)
    return {**flags, "data.path": [*paths, *more]}, [word for word in words if word not in more]


def nearest_key(name: str) -> str:
    """A hint with the key that is most like `name`."""
    return _nearest(name, keys())


def with_absolute_paths(config: Config) -> Config:
    """`config` with its files and folders as absolute paths: a run can be used from any folder, and be moved.

    What does not exist here (a hub id, the name of a template) stays.
    """

    def absolute(name: str) -> str:
        path = os.path.abspath(os.path.expanduser(name))  # noqa: PTH100, PTH111  they never raise
        return path if os.path.exists(path) or glob.has_magic(path) else name  # noqa: PTH110

    model, lora, data = config.model, config.lora, config.data
    template = absolute(data.template) if data.template.endswith(".jinja") else data.template
    lists = ("path", "eval_path", "drop_rows")
    paths = {name: tuple(map(absolute, getattr(data, name))) for name in lists}
    sections = {
        "model": model.model_copy(update={"name": absolute(model.name)}),
        "lora": lora.model_copy(update={"init_from": lora.init_from and absolute(lora.init_from)}),
        "data": data.model_copy(update={**paths, "template": template}),
        "run": config.run.model_copy(update={"prompts": config.run.prompts and absolute(config.run.prompts)}),
    }
    return config.model_copy(update=sections)


def option_hint(option: str) -> str:
    """What to write in place of an unknown option of the command line, "" if nothing is known."""
    name = option.lstrip("-").replace("-", "_").lower().rpartition(".")[2]
    own = next((key for key in keys() if key.rpartition(".")[2] == name), "")
    return answer(name) or (f"give it as a setting: {own}=VALUE" if own else "")


def dump_config(config: Config) -> str:
    """The whole config as YAML, every key, in the schema's order; `load_config` reads it back equal."""
    return dump_values(config.model_dump(mode="json"))


def dump_values(values: Mapping[str, Any]) -> str:
    """Some values of a config as YAML."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != values:  # PyYAML leaves a few line separators unescaped
        text = yaml.safe_dump(values, sort_keys=False)
    return text


def _read_recipe(path: Path, places: dict[KeyPath, str], problems: list[Problem]) -> dict[str, Any]:
    try:
        text = read_text(path, MAX_RECIPE + 1)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            message = f"a recipe has at most {MAX_RECIPE:,} bytes"
            raise ConfigError(message, place=str(path), hint="is this the data file?") from None
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the recipe: {reason}", place=str(path)) from None
    try:
        node, values = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"the recipe is not valid YAML: {getattr(error, 'problem', None) or 'cannot parse it'}",
            place=place,
            hint="a recipe is sections of `key: value` lines, see `lorafit config`",
        ) from None
    except _OF_VALUES:
        raise ConfigError("the recipe is not valid YAML", place=str(path)) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        hint = "give rows with --data" if path.suffix in (".json", ".jsonl") else "for example `lora:`"
        raise ConfigError("a recipe is a mapping of sections", place=f"{path}:1", hint=hint)
    _note_lines(node, (), path, places, problems)
    # `lora:` alone is an empty section
    return {key: {} if value is None else value for key, value in values.items()}


_TEXT, _NUMBERS = "tag:yaml.org,2002:str", ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases, with which a small file can expand to a huge value."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """The tag of a node. `18:00` is a text: YAML 1.1 reads it as a number of base 60."""
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_sixties = kind is yaml.ScalarNode and tag in _NUMBERS and ":" in value
        return _TEXT if is_sixties else tag

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, "aliases (`*name`) are not allowed in a recipe", mark)
        return super().compose_node(parent, index)


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The one YAML document in `text`, and its value. Raises yaml.YAMLError or one of _OF_VALUES."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return node, None if node is None else loader.construct_document(node)


def _note_lines(
    node: yaml.Node | None, at: KeyPath, path: Path, places: dict[KeyPath, str], problems: list[Problem]
) -> None:
    """Record the line of every key. A key that is set twice in one mapping is a problem."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key = (*at, str(key_node.value))
        place = f"{path}:{key_node.start_mark.line + 1}"
        if key in places:
            problems.append(Problem(f"`{'.'.join(key)}` is set twice", place, "keep one of the two"))
        places[key] = place
        _note_lines(value_node, key, path, places, problems)


def _apply(
    override: str, values: dict[str, Any], places: dict[KeyPath, str], problems: list[Problem]
) -> None:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    place = f"`{override}` on the command line"
    if not equals or len(key) != 2 or not all(key):
        hint = answer(key[-1]) or "for example `lora.rank=8`"
        if key[-1] in Config.model_fields and not hint.startswith("in lorafit"):
            hint = f"`{key[-1]}` is a section: `lorafit config {key[-1]}` lists its keys"
        problems.append(Problem("an override is `section.key=value`", place, hint))
        return
    try:
        value = _parse(text)[1] if text.strip() else ""
    except (yaml.YAMLError, *_OF_VALUES):
        value = text
    _set(values, places, key, value, place)


def _set(values: dict[str, Any], places: dict[KeyPath, str], key: KeyPath, value: object, place: str) -> None:
    section = values.setdefault(key[0], {})
    if isinstance(section, dict):  # else the schema reports that it is no section
        section[key[1]] = value
        places[key] = place


def _unusable_texts(value: object, at: KeyPath, places: Mapping[KeyPath, str]) -> Iterator[Problem]:
    """Problems of the texts in `value`: characters that no file or tokenizer accepts, and secrets."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unusable_texts(item, (*at, str(key)), places)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _unusable_texts(item, at, places)
    elif isinstance(value, str | bytes):
        place = _place(at, places)
        if isinstance(value, bytes):  # YAML's !!binary
            yield Problem(f"`{'.'.join(at)}` is bytes and no text", place, "write it as text")
        elif "\0" in value or not _is_unicode(value):
            yield Problem(f"`{'.'.join(at)}` holds a character that is no text", place, "write it as UTF-8")
        elif redact(value) != value:
            hint = "give it in the environment: HF_TOKEN, or what the tracker asks for"
            yield Problem(f"`{'.'.join(at)}` holds a secret, which would be stored with the run", place, hint)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _problem(detail: Mapping[str, Any], places: Mapping[KeyPath, str], near: bool) -> Problem:
    """One error of pydantic as key, place and hint; with `near` an unknown key gets the nearest one as a hint."""
    where = tuple(str(part) for part in detail["loc"])
    place, name = _place(where, places), ".".join(where)
    if detail["type"] == "extra_forbidden":
        inside = detail.get("input")
        if (
            isinstance(inside, Mapping) and len(inside) == 1 and not answer(where[-1])
        ):  # of a section that is unknown
            name = ".".join((*where, *map(str, inside)))
        known = [*keys(), *Config.model_fields]
        hint = _nearest(name, known) if near else answer(where[-1])
        return Problem(f"unknown key `{name}`", place, hint)
    if detail["type"] == "missing":
        section_missing = where in {("model",), ("data",)}
        key = (*where, "name" if where == ("model",) else "path") if section_missing else where
        flag = FLAGS.get(".".join(key))
        return Problem(
            f"`{'.'.join(key)}` is missing", place, f"give `{flag}` or set it in the recipe" if flag else ""
        )
    message = detail["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    message = message.replace("a valid boolean", "true or false")
    if not where:
        return Problem(message, hint="see `lorafit config`")
    message = message[:1].lower() + message[1:]
    field = sections()[where[0]].model_fields.get(where[1]) if len(where) == 2 else None
    if field is not None and OrAuto in field.metadata:
        message = message.replace("input should be ", "input should be `auto` or ", 1)
    if isinstance(value := detail.get("input"), str | float) or (
        isinstance(value, int) and value.bit_length() < 999  # Python prints no longer ones
    ):
        message += f", not {value!r}"[:80]
    if detail["type"] == "model_type":
        message = "it is a section of `key: value` lines"
        if len(where) == 1 and (hint := answer(where[0])):  # `model: NAME`, as other programs write it
            return Problem(f"`{name}`: {message}", place, hint)
    return Problem(f"`{name}`: {message}", place, f"`lorafit config {'.'.join(where[:2])}` explains it")


def _place(key: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """Where `key`, or what it is a part of, was set."""
    whole = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), "")
    return whole or next((place for other, place in places.items() if other[: len(key)] == key), "")


def _nearest(name: str, known: Sequence[str]) -> str:
    """What lorafit has for a key of another program, else `did you mean ...`: by the whole name first, then by its last
    part in any section.
    """
    last = name.rpartition(".")[2]
    is_ours = any(key.rpartition(".")[2] == last for key in known)
    if not is_ours and (hint := answer(last)):
        return hint
    by_last = {key: key.rpartition(".")[2] for key in known}
    likely = set(similar(last, set(by_last.values()), 3))
    close = difflib.get_close_matches(name, [key for key in known if by_last[key] in likely], n=1, cutoff=0.0)
    return f"did you mean `{close[0]}`?" if close else "`lorafit config` lists the keys"


def _shipped_hint(name: str) -> str:
    shipped = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
    close = similar(Path(name).name, shipped)
    return f"did you mean `{close[0]}`?" if close else f"recipes that ship with lorafit: {', '.join(shipped)}"

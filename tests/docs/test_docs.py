"""The documentation is true: what it names exists, both READMEs agree, the Python example runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from lorafit.cli.main import app
from lorafit.config.load import load_config, recipes_folder, validate
from lorafit.config.reference import markdown
from lorafit.config.schema import Config, keys
from lorafit.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = "|".join(Config.model_fields)
FILE_SUFFIXES = {"lock", "safetensors", "json", "jsonl", "yaml", "jinja", "py"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_readme = pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    """The fenced code blocks of a page in `language`."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def prose(page: Path) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every `lorafit ...` command in a page's bash blocks, without pipes and redirections."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    found = [re.search(r"(?:^|\| )(lorafit [^|>]*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_config_reference_is_generated() -> None:
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert text == markdown(), "run `make config-docs`"


@each_page
def test_keys_exist(page: Path) -> None:
    quoted = re.findall(rf"`((?:{SECTIONS})\.\w+)(?:=[^`]*)?`", prose(page))
    given = re.findall(rf"(?<![\w/.-])((?:{SECTIONS})\.\w+)=", "\n".join(blocks(page)))
    named = {key for key in [*quoted, *given] if key.rpartition(".")[2] not in FILE_SUFFIXES}
    assert named <= set(keys())


@each_page
def test_recipes_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/])((?:recipes|demo)/[\w.-]+\.yaml)", text):
        assert (ROOT / path).is_file(), path
    for words in commands(page):
        if words[1:2] == ["train"] and re.fullmatch(r"\w[\w-]*", "".join(words[2:3])):
            assert (recipes_folder() / f"{words[2]}.yaml").is_file(), words


@each_page
def test_yaml_blocks_are_recipes(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert validate(yaml.safe_load(block))


@each_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?://|mailto:", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_commands_parse(page: Path) -> None:
    verbs = typer.main.get_group(app).commands
    for words in commands(page):
        if words[1:] != ["--version"]:
            verb = words[2] if words[1] == "--debug" else words[1]
            verbs[verb].make_context(verb, words[words.index(verb) + 1 :])


@each_page
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 110 and not line.startswith("|")] == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "config.md"], ids=lambda page: page.name
)
def test_rates_say_per(page: Path) -> None:
    """Plain English: `tokens per second`, not `tokens a second`. Text that programs write is left out."""
    text = re.sub(r"<!-- ([\w-]+): begin -->.*?<!-- \1: end -->", "", prose(page), flags=re.DOTALL)
    things = "bytes|rows|seconds|steps|times|tokens|passes|events|objects|results|lines?|numbers?|files?"
    units = "epoch|file|key|kind|layer|line|node|page|pass|path|question|rank|request|row|run|second|step|token|verb"
    assert re.findall(rf"\b(?:{things}) an? (?:{units})\b", text) == []


@each_page
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"`make ([a-z-]+)[^`]*`", text)
    named += re.findall(r"^make ([a-z-]+)", "\n".join(blocks(page, "bash")), re.MULTILINE)
    assert set(named) <= targets


@each_readme
def test_readmes_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 200


@each_readme
def test_figures_of_speed_are_those_of_the_benchmarks(page: Path) -> None:
    """The first table and the paragraph below it: each figure stands in docs/benchmarks.md, and none is a range."""
    section = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[2]
    figures = re.findall(r"(\d+\.\d+)(?:x|\sGB)", section)
    measured = re.findall(r"[\d.]+", (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"))
    assert len(figures) == 9
    assert set(figures) <= set(measured)
    assert not re.search(r"\d ?(?:to|~|–|-) ?\d+(?:\.\d+)?x", section)


def test_readmes_name_every_model_type_with_an_example() -> None:
    tables = []
    for page in READMES:
        rows = re.findall(
            r"^\| (`\w+`(?:, `\w+`)*) \| .+ \| `([\w.-]+/[\w.-]+)` \|$",
            page.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        tables.append({name: example for names, example in rows for name in re.findall(r"`(\w+)`", names)})
    assert tables[0] == tables[1]
    assert tables[0].keys() == FAMILIES.keys()


def test_readmes_agree() -> None:
    english, korean = READMES
    levels = [re.findall(r"^(#+) ", prose(page), re.MULTILINE) for page in (english, korean)]
    assert levels[0] == levels[1]
    assert blocks(english, "(?:bash|python)") == blocks(korean, "(?:bash|python)")
    assert len(blocks(english)) == len(blocks(korean))


@each_readme
def test_readmes_name_every_shipped_recipe(page: Path) -> None:
    for recipe in recipes_folder().glob("*.yaml"):
        assert f"`{recipe.stem}`" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", sorted(recipes_folder().glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_recipes_page_knows_every_shipped_recipe(recipe: Path) -> None:
    assert load_config(recipe, ["model.name=model", "data.path=rows.json"])
    assert f"## {recipe.stem}" in (ROOT / "docs/recipes.md").read_text(encoding="utf-8")


@pytest.mark.slow
@each_readme
def test_python_example_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(page, "python")
    assert len([line for line in example.splitlines() if line]) <= 10
    names: dict[str, object] = {}
    exec(compile(example, page.name, "exec"), names)
    result = names["result"]
    assert (tmp_path / result.adapter / "adapter_model.safetensors").is_file()
    assert result.heldout_loss < result.base_loss / 2
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_files_that_the_pages_name_exist() -> None:
    """Paths of sources and tests in code spans, such as `src/lorafit/forward.py`."""
    named = {
        (page.name, path)
        for page in [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("README*.md")]
        for path in re.findall(
            r"`((?:src/lorafit|tests|benchmarks|tools)/[\w/.]+)`", page.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 20
    assert [(page, path) for page, path in sorted(named) if not (ROOT / path).exists()] == []

"""The shape of the source: imports point one way, torch stays where it belongs, each file says its purpose."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny_models import write_model, write_rows

import lorafit

SOURCE = Path(lorafit.__file__).parent
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
LOW_TO_HIGH = [
    "version",
    "redact",
    "errors",
    "storage",
    "config",
    "run_dir",
    "observe",
    "gguf_file",
    "hub",
    "data",
    "model",
    "forward",
    "distributed",
    "infer",
    "report",
    "evaluate",
    "verify",
    "export",
    "serve",
    "plan",
    "check",
    "training",
    "sweep",
    "studio",
    "api",
    "cli",
    "__init__",
    "__main__",
]
SIDE_BY_SIDE = [{"data", "model"}]  # neither imports the other
WITH_TORCH = {
    "model",
    "forward",
    "distributed",
    "infer",
    "evaluate",
    "verify",
    "plan",
    "check",
    "training",
    "export",
}


def imports_of(tree: ast.AST, package: str) -> Iterator[str]:
    """Full names of all that is imported anywhere in `tree`, a module of `package`; also by a name in a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                start = ".".join([*base, *([module] if module else [])])
                yield from (f"{start}.{alias.name}" for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function) in ("import_module", "importlib.import_module", "__import__"):
                    yield name


def layer_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


@functools.cache
def tree_of(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text(encoding="utf-8"))


@functools.cache
def imports_in(file: str) -> frozenset[str]:
    return frozenset(imports_of(tree_of(file), ".".join(["lorafit", *Path(file).parent.parts])))


def test_imports_point_to_lower_layers_only() -> None:
    against = []
    for file in FILES:
        layer = layer_of(file)
        assert layer in LOW_TO_HIGH, f"`{layer}` is no layer: say in tests/test_layers.py where it stands"
        for name in sorted(imports_in(file)):
            top, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if top != "lorafit":
                continue
            if (
                other not in LOW_TO_HIGH
                or LOW_TO_HIGH.index(other) > LOW_TO_HIGH.index(layer)
                or (other != layer and any({other, layer} <= pair for pair in SIDE_BY_SIDE))
            ):  # the whole package, or a module of no known layer
                against.append((file, name))
    assert not against


def test_torch_is_imported_where_tensors_are() -> None:
    users = {layer_of(file) for file in FILES if "torch" in {name.split(".")[0] for name in imports_in(file)}}
    assert users == WITH_TORCH


def test_every_file_says_its_purpose_and_is_short() -> None:
    for file, path in FILES.items():
        docstring = ast.get_docstring(tree_of(file))
        assert docstring, file
        assert len(docstring.splitlines()[0]) > 20, file
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, file


def test_these_tests_see_what_is_hidden() -> None:
    """Imports in functions, relative ones and those by string are found."""
    source = """
def f():
    import torch.nn
    from ..training import run
    from . import sampling
    from .engine import stream
    importlib.import_module("pickle")
"""
    found = list(imports_of(ast.parse(source), "lorafit.infer"))
    assert found == [
        "torch.nn",
        "lorafit.training.run",
        "lorafit.infer.sampling",
        "lorafit.infer.engine.stream",
        "pickle",
    ]


def test_the_public_names_are_pinned() -> None:
    assert lorafit.__all__ == [
        "Config",
        "ConfigError",
        "DataError",
        "LorafitError",
        "ModelError",
        "RunError",
        "TrainingError",
        "generate",
        "load",
        "train",
    ]
    assert all(getattr(lorafit, name).__module__.startswith("lorafit.") for name in lorafit.__all__)
    assert set(dir(lorafit)) == {*lorafit.__all__, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lorafit.nothing


@pytest.mark.slow
def test_what_needs_no_tensor_loads_no_torch() -> None:
    """The command line with its help, configuration, data, and listing runs, in one fresh process."""
    modules = [
        "lorafit",
        "lorafit.config.load",
        "lorafit.observe.run_summary",
        "lorafit.report.page",
        *(f"lorafit.data.{path.stem}" for path in (SOURCE / "data").glob("[a-z]*.py")),
        "lorafit.check.preflight",
        "lorafit.check.run",
        "lorafit.studio.server",
        "lorafit.studio.live",
        "lorafit.cli.main",
    ]
    source = f"""
import contextlib, importlib, io, sys
heavy = {{"torch", "transformers", "peft", "datasets"}}
def check(what):
    assert not heavy & set(sys.modules), (what, heavy & set(sys.modules))
for name in {modules!r}:
    importlib.import_module(name)
    check(name)
from lorafit.cli.main import main
verbs = ("train", "plan", "check", "show", "generate", "report", "serve", "chat")
helps = [["--help"], *([verb, "--help"] for verb in verbs)]
for words in (*helps, ["config", "lora.rank"], ["runs", "."]):
    sys.argv = ["lorafit", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
    check(words)
import lorafit
lorafit.load
assert "torch" in sys.modules
"""
    assert len(modules) > 8
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_training_and_answering_on_a_cpu_load_no_compiler_of_torch(tmp_path: Path) -> None:
    """Half a second and 75 MB, which torch loads for an optimizer's step or a random tensor without memory."""
    model, rows, run = (
        write_model(tmp_path / "model"),
        write_rows(tmp_path / "rows.json", 12),
        tmp_path / "run",
    )
    settings = ["model.device=cpu", "train.max_steps=2", "data.holdout=2", "--output", str(run)]
    source = f"""
import contextlib, sys
from lorafit.cli.main import main
for words in (["train", "--model", {str(model)!r}, "--data", {str(rows)!r}, *{settings!r}],
              ["generate", {str(run)!r}, "hello", "--max-tokens", "6"]):
    sys.argv = ["lorafit", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    found = [name for name in ("torch._dynamo", "torch.distributed.fsdp", "sympy") if name in sys.modules]
    assert not found, (words[0], found)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

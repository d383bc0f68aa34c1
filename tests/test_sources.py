"""What no Python file that comes with the project does, in src, demo, benchmarks and examples: run what it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
FOLDERS = ("src", "demo", "benchmarks", "examples")
FILES = sorted(
    path.relative_to(PROJECT).as_posix() for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py")
)
EXECUTES_DATA = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "codeop", "runpy",
}  # fmt: skip
LOADS_PICKLES = {"torch.load", "torch.hub.load", "pandas.read_pickle"}
RUNS_TEXT = {
    "eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
}  # fmt: skip
UNSAFE_YAML = {
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
}  # fmt: skip
FORBIDDEN = LOADS_PICKLES | RUNS_TEXT | UNSAFE_YAML
KEYWORDS = {"allow_pickle", "trust_remote_code"}
SAFE_LOADERS = {"yaml.SafeLoader", "SafeLoader", "yaml.CSafeLoader", "CSafeLoader"}
# The libraries that lorafit is compared with: they open pickles where they find any, so only these files have them.
COMPARED_WITH = {"transformers", "peft", "datasets", "accelerate", "trl"}
MAY_COMPARE = {
    "src/lorafit/export/readback.py": "reads an export back as people will, in a process of its own and offline",
    "benchmarks/gpu_speed.py": "trains with transformers and peft beside lorafit, on random weights of its own",
    "benchmarks/first_tokens.py": "asks transformers for the first tokens of answers, of models that it was given",
    "benchmarks/hybrid_layer.py": "times transformers and peft beside lorafit, on random weights of its own",
    "benchmarks/leak.py": "packs documents with transformers too, on random weights of its own",
    "benchmarks/preferences.py": "trains with TRL beside lorafit, on models that it was given",
    "benchmarks/neighbours.py": "trains and answers with transformers and peft, with a model that it was given",
    "benchmarks/time_to_quality.py": "trains with TRL and judges with transformers and peft, as it was given",
    "benchmarks/generation.py": "measures transformers and peft beside lorafit, on models that it was given",
}


def faults(tree: ast.Module) -> Iterator[str]:
    """What a module does and must not."""
    names = full_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=modules):
                yield from (f"imports {each.name}" for each in modules if top(each.name) in EXECUTES_DATA)
            case ast.ImportFrom(module=str(module), names=given, level=0):
                if top(module) in EXECUTES_DATA:
                    yield f"imports {module}"
                yield from (
                    f"imports {module}.{each.name}" for each in given if f"{module}.{each.name}" in FORBIDDEN
                )
            case ast.Call():
                yield from faults_of_call(node, names)
            case ast.Constant(value="trust_remote_code"):
                yield "names trust_remote_code"


def faults_of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    head, _, rest = dotted(call.func).partition(".")
    name = ".".join(filter(None, [names.get(head, head), rest]))
    if name in FORBIDDEN:
        yield f"calls {name}"
    if name == "numpy.load" and len(call.args) > 2:  # without it, pickles are refused
        yield "may give allow_pickle"
    if name in ("importlib.import_module", "__import__"):
        match call.args:
            case [ast.Constant(value=str(module)), *_]:
                if top(module) in EXECUTES_DATA:
                    yield f"imports {module}"
    for keyword in call.keywords:
        value = keyword.value
        if keyword.arg in KEYWORDS:
            yield f"gives {keyword.arg}"
        if keyword.arg == "shell" and not (isinstance(value, ast.Constant) and value.value is False):
            yield "gives shell"
        if keyword.arg == "Loader" and dotted(value) not in SAFE_LOADERS:
            yield "gives an unsafe Loader"


def dotted(node: ast.expr) -> str:
    """`a.b.c` as it stands in the source; "" for an expression of another kind."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def full_names(tree: ast.AST) -> dict[str, str]:
    """What names in the module stand for, where an import says it."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=modules):
                names |= {each.asname: each.name for each in modules if each.asname}
            case ast.ImportFrom(module=str(module), names=given, level=0):
                names |= {each.asname or each.name: f"{module}.{each.name}" for each in given}
    return names


def compared(tree: ast.Module) -> set[str]:
    """The libraries of COMPARED_WITH that a module imports."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=modules):
                found |= {top(each.name) for each in modules}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(top(module))
    return found & COMPARED_WITH


def top(module: str) -> str:
    return module.split(".")[0]


def test_all_folders_are_looked_at() -> None:
    assert {file.split("/")[0] for file in FILES} == set(FOLDERS)


def test_nothing_runs_what_it_reads() -> None:
    for file in FILES:
        tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
        assert list(faults(tree)) == [], file
        if file not in MAY_COMPARE:
            assert not compared(tree), file


def test_every_exception_is_needed() -> None:
    for file in MAY_COMPARE:
        assert compared(ast.parse((PROJECT / file).read_text(encoding="utf-8"))), f"{file} needs no exception"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import numpy.random, dill as d",
        "importlib.import_module('marshal')",
        "__import__('shelve')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "from torch import load as read\nread('x')",
        "eval('1')",
        "exec('1')",
        "import os\nos.system('ls')",
        "from os import system",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.safe_load_all(text, Loader=yaml.UnsafeLoader)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "import numpy as np\nnp.load('x.npy', None, True)",
        "numpy.load('x.npy', allow_pickle=True)",
    ],
)
def test_this_test_sees_it(source: str) -> None:
    assert list(faults(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "network.eval()",
        "torch.compile(f)",
        "re.compile('x')",
        "subprocess.run(['ls'], shell=False)",
        "json.load(f)",
    ],
)
def test_this_test_lets_the_rest_be(source: str) -> None:
    assert not list(faults(ast.parse(source)))

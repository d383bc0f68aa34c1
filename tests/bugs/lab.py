"""The environment of a probe: small models and rows in an empty folder, and bugs inserted into lorafit's functions.

To insert a bug, the source of a function is compiled with one expression changed, and the code object replaces that of
the function. Thus all callers get the bug, under every name. Undoing the patch restores the old code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import signal
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from tests.tiny_models import random_network, write_model, write_rows

from lorafit.config.load import load_config
from lorafit.config.schema import Config
from lorafit.data.formats import Content, Row
from lorafit.data.prompt import Rendered, Renderer, contract
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import LorafitError
from lorafit.model.adapter_file import adapter_files, adapter_tensors
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.observe.metrics_file import read_metrics
from lorafit.training import loop
from lorafit.training.run import Result, resume_run, start_run


@dataclass(frozen=True)
class Plant:
    """A bug: in `target` (`package.module:function`), `new` replaces `old`; `act` is for other changes."""

    target: str
    old: str = ""
    new: str = ""
    act: Callable[[pytest.MonkeyPatch], None] | None = None

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        """Insert the bug into the running program until `patch` is undone."""
        if self.act is not None:
            self.act(patch)
            return
        function = function_at(self.target)
        patch.setattr(function, "__code__", changed(function, self.old, self.new))


def function_at(target: str) -> FunctionType:
    """The function `package.module:Class.name` of lorafit, without its decorators."""
    module, _, path = target.partition(":")
    item: Any = importlib.import_module(f"lorafit.{module}")
    for name in path.split("."):
        item = inspect.getattr_static(item, name)
    item = getattr(item, "fget", item)  # a property
    item = getattr(item, "__func__", item)  # a static or class method
    item = inspect.unwrap(item)
    assert isinstance(item, FunctionType), target
    return item


def changed(function: FunctionType, old: str, new: str) -> CodeType:
    """The code of `function` with `old` replaced. Raises LookupError unless the source contains it once."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise LookupError(f"{function.__qualname__} has `{old}` {source.count(old)} times, not once")
    tree = ast.parse(source.replace(old, new))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    if function.__code__.co_freevars:  # `super()` needs the class
        definition.body.insert(0, ast.Expr(ast.Name("__class__", ast.Load())))
        enclosing = ast.ClassDef(
            "Enclosing", bases=[], keywords=[], body=[definition], decorator_list=[], type_params=[]
        )
        tree.body = [ast.fix_missing_locations(enclosing)]
    code = compile(tree, inspect.getfile(function), "exec", dont_inherit=True)
    while code.co_name != function.__name__:
        code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return code


@dataclass
class Lab:
    """An empty folder in which a probe trains small models; `patch` is undone after the probe."""

    folder: Path
    patch: pytest.MonkeyPatch
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    rows_seen: list[list[int]] = field(default_factory=list)
    num_passes: list[int] = field(default_factory=list)

    def model(self, family: str = "llama", name: str = "model", **changes: Any) -> Path:
        """A model folder with random weights and the byte tokenizer."""
        path = self.folder / name
        return path if path.exists() else write_model(path, family, **changes)

    def rows(self, rows: Sequence[dict[str, Any]] | int = 40, name: str = "rows.json") -> Path:
        """A file with these rows, or with this number of rows."""
        path = self.folder / name
        if isinstance(rows, int):
            return path if path.exists() else write_rows(path, rows)
        path.write_text(json.dumps(rows))
        return path

    def adapter(self, family: str = "llama", rank: int = 4, alpha: float = 8.0, std: float = 0.1) -> Path:
        """A PEFT folder whose two matrices are random, so that no gradient is zero by construction."""
        path = self.folder / f"adapter-{family}"
        if not path.exists():
            network = random_network(family)
            spec = attach(network, LoraSpec(rank, alpha, 0.0, ("all-linear",), False), seed=1)
            stir(network, std)
            path.mkdir()
            for name, content in adapter_files(adapter_tensors(network), spec, "base", None).items():
                (path / name).write_bytes(content)
        return path

    def config(self, *overrides: str, name: str = "run") -> Config:
        """The config of a small run; later overrides win."""
        words = [
            f"model.name={self.model()}",
            f"data.path={self.rows()}",
            f"run.output={self.folder / name}",
            "model.dtype=float32",
            "model.device=cpu",
            "lora.rank=4",
            "data.holdout=0",
            "train.batch_size=6",
            "train.learning_rate=0.01",
            "train.max_steps=2",
            "train.save_every=1000",
            "run.samples=0",
            "run.verify=false",
        ]
        return load_config(None, [*words, *overrides])

    def run(self, *overrides: str, name: str = "run") -> Result:
        """Train a small model. An error of lorafit becomes an AssertionError: it has detected the bug."""
        try:
            return start_run(self.config(*overrides, name=name), quiet=True)
        except LorafitError as error:
            raise AssertionError(f"lorafit refuses: {error}") from error

    def cut_and_resumed(self, step: int, *overrides: str, name: str = "cut") -> Result:
        """A run that a signal stops in `step`, and that is then resumed."""
        gradients = loop._gradients

        def stopped(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
            if state.step + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
            return gradients(job, state, *rest)

        with self.patch.context() as patch:
            patch.setattr(loop, "_gradients", stopped)
            cut = self.run(*overrides, name=name)
        assert not cut.finished, "the run was not stopped"
        try:
            return resume_run(cut.path, quiet=True)
        except LorafitError as error:
            raise AssertionError(f"lorafit refuses: {error}") from error

    def watch(self) -> None:
        """Record the gradients, the rows and the number of passes of every later step."""
        gradients = loop._gradients

        def recorded(job: loop.TrainContext, state: Any, batch: Any) -> Any:
            self.rows_seen.append(batch.indices.tolist())
            self.num_passes.append(len(batch.packs))
            result = gradients(job, state, batch)
            named = job.network.named_parameters()
            self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            return result

        self.patch.setattr(loop, "_gradients", recorded)


def stir(network: Llama, std: float = 0.1) -> None:
    """Give the matrices B of the adapter random values, so that the adapter has an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in adapted(network).values():
            module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator) * std)


def events(result: Result, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics."""
    return [event for event in read_metrics(result.path / "metrics.jsonl") if event["event"] == kind]


def renderer(folder: Path, template: str = "auto", **changes: Any) -> Renderer:
    """A renderer for the tokenizer in `folder`."""
    options: dict[str, Any] = {
        "train_on": "response",
        "max_length": 512,
        "too_long": "error",
        "add_eos": True,
    }
    tokenizer = Tokenizer.from_folder(folder)
    return Renderer(contract(tokenizer, template=template, **{**options, **changes}), tokenizer)


def rendered(by: Renderer, content: Content) -> Rendered:
    """One row as ids. Raises AssertionError if it is refused or dropped."""
    [outcome] = by.render_batch([Row(0, "row 1", content)])
    assert isinstance(outcome, Rendered), outcome
    return outcome


def trained_texts(by: Renderer, row: Rendered) -> list[str]:
    """The texts of the trained parts of a row, decoded in context."""
    decode, texts, start = by.tokenizer.decode, [], 0
    for end in range(1, len(row.ids) + 1):
        if end == len(row.ids) or row.trained[end] != row.trained[end - 1]:
            if row.trained[start]:
                texts.append(decode(row.ids[:end])[len(decode(row.ids[:start])) :])
            start = end
    return texts


def difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest distance of two sets of tensors, relative to the largest norm of the first."""
    assert one.keys() == two.keys()
    assert one, "there is nothing to compare"
    size = torch.stack([tensor.norm() for tensor in one.values()]).max()
    return max(float((two[name] - tensor).norm() / size) for name, tensor in one.items())

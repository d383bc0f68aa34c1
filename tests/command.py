"""The command line in the process of the test: `lorafit` with some words, and how it ended."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from lorafit.cli.main import main

COMMAND = [sys.executable, "-m", "lorafit"]  # in a process of its own
TINY = ["model.dtype=float32", "model.device=cpu", "train.batch_size=6", "lora.rank=4"]
TINY += ["run.samples=1", "run.verify=false"]


class Done(NamedTuple):
    """Exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Cli = Callable[..., Done]


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """A function that runs `lorafit` with the given words, without a connection to the hub."""

    def run(*words: object, stdin: str | None = None) -> Done:
        monkeypatch.setattr(sys, "argv", ["lorafit", *map(str, words)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as error:
            code = error.code or 0
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LORAFIT_DEBUG", raising=False)
    return run

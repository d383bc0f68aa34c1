"""`lorafit doctor`: prints what this machine has and lacks, for the user and for bug reports."""

from __future__ import annotations

import typer

from lorafit.cli import options
from lorafit.cli.output import put_json


def doctor(as_json: options.JsonOption = False) -> None:
    """Show what this machine has and lacks: Python, torch, device, kernels, memory, disk, caches, hub, proxies.

    No connection is opened and no secret is shown. A bug report needs this text. The exit code is 1 if a line fails.

    lorafit doctor
    """
    from lorafit.check.doctor import examine
    from lorafit.observe.console import print_verdicts

    results = examine()
    if as_json:
        for result in results:
            word = "ok" if result.verdict == "pass" else result.verdict
            texts = result.as_dict()
            line = {"name": result.name, "verdict": word, "message": texts["message"], "hint": texts["hint"]}
            put_json(line)
    else:
        print_verdicts([(result.verdict, result.name, result.text) for result in results], passed="ok")
    if any(result.verdict == "fail" for result in results):
        raise typer.Exit(1)

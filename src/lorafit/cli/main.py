"""The `lorafit` command: its verbs, its error output, and exit codes (0 success, 2 error of the user, 1 bug)."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from lorafit.cli import (
    audit,
    chat,
    check,
    config,
    doctor,
    evaluate,
    export,
    generate,
    models,
    plan,
    report,
    rows,
    runs,
    serve,
    show,
    studio,
    sweep,
    train,
    tune,
    why,
    without,
)
from lorafit.cli.output import put_line
from lorafit.cli.usage import usage_problem
from lorafit.distributed.env import ProcessEnv, command, exit_code_of_previous_attempt, mark_no_restart
from lorafit.errors import LorafitError, Problem
from lorafit.hub import DOWNLOAD
from lorafit.redact import redact, visible
from lorafit.version import __version__

OTHERS_WAIT_SECONDS = 10.0
# Python's thresholds, with a tenth of the full collections: each visits all objects of torch's import, which took a
# fifth of the start time. Short-lived objects are collected as before.
COLLECT = (700, 10, 100)

app = typer.Typer(
    name="lorafit",
    help="Fine-tune Llama-family models with LoRA on instruction data.",
    epilog="To begin: lorafit train --model MODEL --data rows.json, then lorafit chat with the run directory it names.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, dict[str, Callable[..., object]]] = {
    "Train": {"train": train.train, "sweep": sweep.sweep, "tune": tune.tune, "without": without.without},
    "Before a run": {
        "check": check.check,
        "show": show.show,
        "plan": plan.plan,
        "models": models.models,
        "config": config.config,
        "doctor": doctor.doctor,
    },
    "Look at runs": {
        "runs": runs.runs,
        "report": report.report,
        "rows": rows.rows,
        "why": why.why,
        "eval": evaluate.evaluate,
        "audit": audit.audit,
        "studio": studio.studio,
    },
    "Use the result": {
        "generate": generate.generate,
        "chat": chat.chat,
        "serve": serve.serve,
        "export": export.export,
    },
}
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)


def _version(is_set: bool) -> None:
    if is_set:
        put_line(f"lorafit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["LORAFIT_DEBUG"] = "1"


def main() -> None:
    """Run the command line and exit."""
    gc.set_threshold(*COLLECT)
    command["is_one_run"] = sys.argv[1:2] in (["train"], ["plan"])
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 shows the rest as `\ud55c`
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        env = ProcessEnv.read()
    except LorafitError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    if (code := exit_code_of_previous_attempt(env)) is not None:
        sys.exit(code)
    try:
        # not `app()`, which ends by itself, without a message, after Ctrl-C and where a pipe is closed
        with typer.main.get_command(app).make_context("lorafit", sys.argv[1:]) as context:
            code = context.command.invoke(context)
    except typer.Exit as ended:
        code = ended.exit_code
    except KeyboardInterrupt as stop:
        mark_no_restart(env, 130)
        if env.is_main:
            _print_error(str(stop) or "interrupted")
        # a download may wait for the hub for a minute, and an exit waits for its threads
        if any(thread.name == DOWNLOAD for thread in threading.enumerate()):
            sys.stdout.flush()
            os._exit(130)
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        sys.exit(141)
    except Exception as error:
        code, message = _explained(error)
        if code == 2:
            mark_no_restart(env, code)
        if not env.is_main:  # rank 0 prints an error of all ranks; then the agent ends the others
            time.sleep(OTHERS_WAIT_SECONDS)
        _print_error(redact(traceback.format_exc()) if os.environ.get("LORAFIT_DEBUG") else message)
        sys.exit(code)
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and its message."""
    match error:
        case LorafitError():
            return error.exit_code, str(error)
        case OSError():
            return 2, str(Problem(error.strerror or str(error), str(error.filename or "")))
        case RuntimeError() if "home directory" in str(error):  # pathlib, for `~nobody` or without HOME
            hint = "write the whole path, or set HOME"
            return 2, str(Problem("the home folder that `~` stands for is not known", hint=hint))
        case MemoryError():
            return 2, str(Problem("out of memory", hint="`lorafit plan` predicts the memory of a run"))
        case _ if type(error).__name__ == "NoArgsIsHelpError":
            return 2, str(error)
        case _ if hasattr(error, "format_message"):  # click's errors, which typer contains a copy of
            return 2, str(usage_problem(error))
    hint = "this is a bug in lorafit; run it with `lorafit --debug ...` and report it with the text of `lorafit doctor`"
    return 1, str(Problem(f"{type(error).__name__}: {error}", hint=hint))


def _print_error(text: str) -> None:
    """Print to stderr, which may be a closed terminal."""
    with contextlib.suppress(OSError):
        print(visible(text), file=sys.stderr)

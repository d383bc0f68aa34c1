"""A fresh process that loads what is on disk: it receives only paths, and returns logits.

`logits_from_subprocess` starts one for a run and `main` runs in it: it loads as `lorafit generate RUN` does, then
computes one pass. export/parity.py reads an export back in the same way.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit.data.packing import TokenRow
from lorafit.errors import LorafitError, RunError
from lorafit.infer.model import load
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import disable_adapter, evaluating
from lorafit.model.memory import is_out_of_memory
from lorafit.run_dir import RunDirectory

PROBE_ROWS, MOST_TOKENS, MOST_POSITIONS = 4, 256, 16  # rows; tokens and positions per row
_PROGRESS = re.compile(r"progress (\d+) (\d+)")
OUT_OF_MEMORY = "out of memory"  # the reason of a fresh process
TIMEOUT_SECONDS = 1800.0  # to load a model from the slowest disk


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed texts as ids (tokens,), the texts' token counts (texts,), and the positions (positions,) to compare."""

    ids: Tensor
    lengths: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> Probe:
        """The first tokens of every row, compared at the last of them."""
        ids, positions, lengths, start = [], [], [], 0
        for row, _ in rows:
            length = min(len(row), MOST_TOKENS)
            ids.append(torch.from_numpy(row[:length].astype(np.int64)))
            positions.append(torch.arange(start + max(0, length - MOST_POSITIONS), start + length))
            lengths.append(length)
            start += length
        return cls(torch.cat(ids), torch.tensor(lengths), torch.cat(positions))


@torch.inference_mode()
def probe_logits(network: Llama, probe: Probe, *, base: bool) -> Tensor:
    """Logits (positions, vocab_size) on the CPU, at least float32; `base` disables the adapter."""
    device = network.lm_head.weight.device
    with evaluating(network), disable_adapter(network, when=base):
        attend = PackedDocuments(probe.lengths.tolist(), device)
        hidden = network.hidden(probe.ids.to(device), attend, probe.positions.to(device))
        logits = network.logits(hidden)
        return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)).contiguous()


def logits_from_subprocess(run: RunDirectory, probe: Probe) -> tuple[Tensor, Tensor]:
    """(tuned, base) logits of `probe` from a fresh process that loads `run` from disk.

    Raises RunError with the reason that the process gives, MemoryError where it is short of memory.
    """
    with tempfile.TemporaryDirectory(prefix="lorafit-proof-") as folder:
        probe_file, logits_file = Path(folder) / "probe.safetensors", Path(folder) / "logits.safetensors"
        save_file({"ids": probe.ids, "lengths": probe.lengths, "positions": probe.positions}, probe_file)
        # as many threads as here: the results then have the same bits
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        paths = (run.path, probe_file, logits_file)
        if reason := run_module("lorafit.verify.reload", paths, environment, TIMEOUT_SECONDS):
            if reason == OUT_OF_MEMORY:
                raise MemoryError(reason)
            raise RunError(f"a fresh process cannot load the run: {reason}", place=str(run.path))
        logits = load_file(logits_file)
    return logits["tuned"], logits["base"]


def run_module(
    module: str,
    paths: Sequence[Path],
    environment: Mapping[str, str],
    timeout: float | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Run `python -m MODULE PATHS` to its end; returns why it failed, "" if it did not.

    Its lines `progress DONE TOTAL` on stdout are given to `advance`.
    """
    # -P: a file of the working folder is never imported
    command = [sys.executable, "-P", "-m", module, *(str(path.resolve()) for path in paths)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(  # noqa: S603 (our own module and paths)
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=dict(environment)
        ) as child,
    ):
        late = threading.Event()

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, stop)
        timer.daemon = True
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if found := _PROGRESS.fullmatch(line.rstrip()):
                    advance(int(found[1]), int(found[2]))
            exit_code = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            timer.cancel()
        if late.is_set():
            return f"it did not end within {timeout:.0f} s"
        errors.seek(0)
        return reason_of(exit_code, [line.rstrip("\n") for line in errors])


def reason_of(exit_code: int, lines: Sequence[str]) -> str:
    """Why a process failed, by the lines of its stderr: its error, else its last line; "" for exit code 0."""
    if exit_code == 0:
        return ""
    texts = [line for line in lines if line.strip()]
    errors = (line.removeprefix("error: ") for line in texts if line.startswith("error: "))
    return next(errors, ": ".join([f"exit code {exit_code}", *texts[-1:]]))


def main(paths: Sequence[str]) -> int:
    """The fresh process. `paths` are the run, the probe's file, and the file for the logits."""
    run, probe_file, logits_file = map(Path, paths)
    try:
        config = RunDirectory.open(run).config()
        model = load(run, device=config.model.device, offline=True)  # training put the base into the cache
        probe = Probe(**load_file(probe_file))
        logits = {
            "tuned": probe_logits(model.network, probe, base=False),
            "base": probe_logits(model.network, probe, base=True),
        }
        save_file(logits, logits_file)
    except LorafitError as error:
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

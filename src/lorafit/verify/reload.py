"""Logits of a run loaded from its files alone, in a fresh process that is given nothing but paths.

`logits_from_subprocess` starts the process and `main` runs in it: it loads as `lorafit generate RUN` does, then
computes one pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
from lorafit.run_dir import RunDirectory

PROBE_ROWS, MOST_TOKENS, MOST_POSITIONS = 4, 256, 16  # rows, and of each row
TIMEOUT_SECONDS = 1800.0  # of loading a model from the slowest disk


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed texts as ids (tokens,), the texts' token counts (texts,), and positions (positions,) to look at."""

    ids: Tensor
    lengths: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> Probe:
        """The first tokens of every row, looked at where they end."""
        ids, positions, lengths, at = [], [], [], 0
        for row, _ in rows:
            length = min(len(row), MOST_TOKENS)
            ids.append(torch.from_numpy(row[:length].astype(np.int64)))
            positions.append(torch.arange(at + max(0, length - MOST_POSITIONS), at + length))
            lengths.append(length)
            at += length
        return cls(torch.cat(ids), torch.tensor(lengths), torch.cat(positions))


@torch.inference_mode()
def probe_logits(network: Llama, probe: Probe, *, base: bool) -> Tensor:
    """Logits (positions, vocab_size) on the CPU, at least float32; `base` leaves the adapter out."""
    device = network.lm_head.weight.device
    with evaluating(network), disable_adapter(network, when=base):
        attend = PackedDocuments(probe.lengths.tolist(), device)
        hidden = network.hidden(probe.ids.to(device), attend, probe.positions.to(device))
        logits = network.logits(hidden)
        return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)).contiguous()


def logits_from_subprocess(run: RunDirectory, probe: Probe) -> tuple[Tensor, Tensor]:
    """(tuned, base) logits of `probe` from a fresh process that loads `run` from disk.

    Raises RunError with what that process said when it cannot.
    """
    with tempfile.TemporaryDirectory(prefix="lorafit-proof-") as folder:
        asked, answered = Path(folder) / "probe.safetensors", Path(folder) / "logits.safetensors"
        save_file({"ids": probe.ids, "lengths": probe.lengths, "positions": probe.positions}, asked)
        words = [str(path.resolve()) for path in (run.path, asked, answered)]
        # -P: nothing in the working folder is taken for a module; as many threads, for the same bits
        command = [sys.executable, "-P", "-m", "lorafit.verify.reload", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        try:
            done = subprocess.run(  # noqa: S603 (our own module and paths)
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=environment,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"a fresh process did not load the run within {TIMEOUT_SECONDS:.0f} s") from None
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            first = next((line for line in said if line.startswith("error: ")), said[-1] if said else "")
            reason = first.removeprefix("error: ") or f"exit code {done.returncode}"
            raise RunError(f"a fresh process cannot load the run: {reason}", place=str(run.path))
        logits = load_file(answered)
    return logits["tuned"], logits["base"]


def main(words: Sequence[str]) -> int:
    """The fresh process: RUN, the probe's file, and the file for the logits."""
    run, asked, answered = map(Path, words)
    try:
        config = RunDirectory.open(run).config()
        model = load(run, device=config.model.device, offline=True)  # what trained lies in the cache
        probe = Probe(**load_file(asked))
        logits = {
            "tuned": probe_logits(model.network, probe, base=False),
            "base": probe_logits(model.network, probe, base=True),
        }
        save_file(logits, answered)
    except LorafitError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

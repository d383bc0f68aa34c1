"""A process that answers a line of JSON on its stdin with one on its stdout: our end of the two pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Asked:
    """`python -m words` in `environment`, one question at a time; what it says on stderr goes to `log`, if given."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        prefix: Sequence[str] = (),
        log: Path | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._log = log.open("a") if log else None
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", *words],
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request; RuntimeError with its last words where the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            words = Path(self._log.name).read_text()[-2000:] if self._log else "see stderr"
            raise RuntimeError(f"the server ended with status {self._process.wait()}: {words}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        if self._log:
            self._log.close()

"""`lorafit train --nproc N`: torch's elastic agent on this host, with N processes that run the same command."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lorafit.distributed.ranks import num_cores

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # that the agent handles by default
MAX_RESTARTS = 3  # of all workers, where one is lost; torchrun's default for a launch from Python
LAST_SAVE_SECONDS = 120  # for a step and its checkpoint after a signal to stop


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m lorafit ARGUMENTS` in `num_processes`; returns the exit code of the first that failed.

    Their output is passed through. If a worker is lost, all are restarted, and the run resumes from its last
    checkpoint. A signal is forwarded to them, and they are waited for; one that is ignored here stays ignored.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    logging.disable(logging.ERROR)  # the workers report their own errors
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=MAX_RESTARTS,
        shutdown_timeout=LAST_SAVE_SECONDS,
        signals_to_handle=",".join(filter(_is_handled, SIGNALS)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lorafit", *arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _is_handled(name: str) -> bool:
    """Whether this system has the signal `name`, and the process does not ignore it, as below `nohup`."""
    return hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN

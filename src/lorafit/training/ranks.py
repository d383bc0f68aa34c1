"""The processes of a run: what they agree on, and the few numbers that they add up; a process alone just goes on."""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lorafit.errors import ConfigError, LorafitError
from lorafit.model.device import pick_device
from lorafit.place import Place

_POLL_SECONDS = 0.05


class RankError(LorafitError, RuntimeError):
    """Another process of the run is gone or stands still: nothing that this one, or a setting, could mend."""

    exit_code = 1


class Ranks:
    """The ranks of a run. Every rank makes the same calls in the same order.

    `decide` and `gather_at` wait as long as it takes (they look at torch's key-value store, no collective is
    pending); they serve before `connect`, while rows are read and models loaded. `sum`, `any` and `most` are
    collectives on the CPU, after it.
    """

    def __init__(self, here: Place | None = None, store: dist.Store | None = None) -> None:
        self.here = here or Place()
        self.rank, self.world_size = self.here.rank, self.here.world_size
        self.store = store
        self._on_cpu: dist.ProcessGroup | None = None  # None is the default group

    @property
    def alone(self) -> bool:
        return self.here.alone

    @property
    def first(self) -> bool:
        return self.here.first

    def decide(self, what: str, make: Callable[[], str]) -> str:
        """What the first rank makes, a text, on every rank. Its error, if it raises one, is its alone."""
        if self.store is None:
            return make()
        if self.first:
            text = make()
            self.store.set(what, text)
            return text
        _wait(lambda: self.store is None or self.store.check([what]))
        return self.store.get(what).decode()

    def gather_at(self, what: str) -> None:
        """Return when every rank has come here."""
        if self.store is not None:
            store = self.store
            store.add(what, 1)
            _wait(lambda: store.add(what, 0) >= self.world_size)

    def connect(self, device: torch.device, timeout: float) -> None:
        """Make the process group, once every rank is ready: NCCL between GPUs, gloo between CPUs.

        `timeout` is how many seconds one rank may wait for the others in a collective.
        """
        if self.store is None:
            return
        self.gather_at("ready")
        if dist.is_initialized():
            if dist.get_backend() == "nccl":
                self._on_cpu = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
            return
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )

    def sum(self, values: Sequence[float]) -> list[float]:
        """`values` added up over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each of `values` over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any rank."""
        return [bool(value) for value in self.most([float(flag) for flag in flags])]

    def same(self, digest: bytes) -> bool:
        """Whether all ranks gave the same bytes."""
        numbers = [float(byte) for byte in digest]
        return self.most(numbers) == numbers and self.most([-n for n in numbers]) == [-n for n in numbers]

    def hand_over(self, read: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
        """What the first rank reads, files by name, on every rank."""
        if self.alone:
            return read()
        files = read() if self.first else {}
        sizes = json.loads(
            self.decide("files", lambda: json.dumps({name: len(b) for name, b in files.items()}))
        )
        found = {}
        for name, size in sizes.items():
            content = files.get(name, bytes(size))
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(tensor, 0, self._on_cpu)
            found[name] = tensor.numpy().tobytes()
        return found

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how, self._on_cpu)
        found: list[float] = tensor.tolist()
        return found


@contextmanager
def meet(here: Place) -> Iterator[Ranks]:
    """The ranks of the run that this process belongs to, until the end of the block; not yet connected.

    A process group that somebody else has made, as Ray Train does, is used and left as it is.
    """
    if here.alone:
        yield Ranks(here)
        return
    theirs = dist.is_initialized()
    store = dist.distributed_c10d._get_default_store() if theirs else next(dist.rendezvous("env://"))[0]
    try:
        yield Ranks(here, dist.PrefixStore(_assembled(here, store), store))
    except RuntimeError as error:
        if isinstance(error, LorafitError) or not _is_lost_connection(error):
            raise
        raise RankError(
            f"rank {here.rank} lost the connection to another one: {str(error).splitlines()[0]}",
            hint="that one has said why it ended; torchrun --max-restarts=3 and `--nproc` start all of them again",
        ) from None
    finally:
        if not theirs and dist.is_initialized():
            dist.destroy_process_group()


def _assembled(here: Place, store: dist.Store) -> str:
    """A name that these processes share and no others before them, found by the first rank.

    The store of torchrun's agent outlives the workers, so it may hold what lost ones wrote. Each rank therefore says
    hello with a word of its own and waits for the answer to that word; the first one answers until all are there.
    """
    word, name = uuid.uuid4().hex, uuid.uuid4().hex
    store.set(f"hello/{here.rank}", word)
    if not here.first:
        _wait(lambda: store.check([f"welcome/{word}"]))
        name = store.get(f"welcome/{word}").decode()
        store.set(f"{name}/here/{here.rank}", "")
        return name
    missing = set(range(1, here.world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", name)
            if store.check([f"{name}/here/{rank}"]):
                missing.remove(rank)
        time.sleep(_POLL_SECONDS)
    return name


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone."""
    words = (
        "Connection closed by peer",
        "Connection reset",
        "Broken pipe",
        "imed out",
        "NCCL",
        "gloo",
        "Gloo",
    )
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _wait(there: Callable[[], bool]) -> None:
    while not there():
        time.sleep(_POLL_SECONDS)


def check_strategy(strategy: str, quantize: str, here: Place) -> None:
    """Raise ConfigError when `distributed.strategy` does not go with the processes that were started, or the base."""
    if strategy == "fsdp" and quantize not in ("none", "int8"):
        raise ConfigError(
            f"a base in {quantize} cannot be shared out",
            place="distributed.strategy",
            hint="use ddp, or model.quantize=int8 or none",
        )
    if strategy == "single" and not here.alone:
        raise ConfigError(
            f"{here.world_size} processes were started, but distributed.strategy=single is one",
            place="distributed.strategy",
            hint="use ddp or fsdp, or start one process",
        )


def share_cores(here: Place, device: str) -> None:
    """Let the ranks of a host that compute on its processor have equal parts of its cores.

    torchrun sets OMP_NUM_THREADS=1 where it is unset; any other number is the user's and stays.
    """
    if here.local_world_size == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    if pick_device(device).type == "cpu":
        torch.set_num_threads(max(1, num_cores() // here.local_world_size))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

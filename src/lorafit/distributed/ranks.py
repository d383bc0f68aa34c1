"""Collectives and broadcasts between the processes of a run; no-ops for a single process."""

from __future__ import annotations

import datetime
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from lorafit.distributed.env import ProcessEnv
from lorafit.errors import ConfigError, LorafitError
from lorafit.model.quant import QUANTIZERS

_POLL_SECONDS = 0.05
_LOST_CONNECTION = re.compile("Connection closed by peer|Connection reset|Broken pipe|imed out|NCCL|[Gg]loo")
T = TypeVar("T")


class RankError(LorafitError, RuntimeError):
    """Another process of the run is lost or stuck. No setting of this one can correct that."""

    exit_code = 1


class Ranks:
    """The ranks of a run. Every rank makes the same calls in the same order.

    `broadcast_from_rank0` and `barrier` poll torch's key-value store without a time limit and use no collective. Use
    them before `connect`, while rows are read and models loaded. `all_reduce_sum`, `any` and `all_reduce_max` are
    collectives on the CPU, for use after it.
    """

    def __init__(self, env: ProcessEnv | None = None, store: dist.Store | None = None) -> None:
        self.env = env or ProcessEnv()
        self.rank, self.world_size = self.env.rank, self.env.world_size
        self.is_main, self.is_single_process = self.env.is_main, self.env.is_single_process
        self.store = store
        self._on_cpu: dist.ProcessGroup | None = None  # None is the default group

    def broadcast_from_rank0(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """The value of type `kind` that rank 0 makes, on every rank; the others read it from JSON.

        An error is raised on rank 0 only. A single process makes no JSON.
        """
        if (store := self.store) is None:
            return make()
        json_type = TypeAdapter(kind)
        if self.is_main:
            value = make()
            store.set(name, json_type.dump_json(value, exclude_unset=True).decode())
            return value
        _wait(lambda: store.check([name]))
        return json_type.validate_json(store.get(name))

    def barrier(self, name: str) -> None:
        """Return when every rank has called this, or when torchrun's agent, which has the store, has ended."""
        if (store := self.store) is None:
            return
        try:
            store.add(name, 1)
            _wait(lambda: store.add(name, 0) >= self.world_size)
        except dist.DistError:
            if not self.env.has_lost_agent:
                raise

    def connect(self, device: torch.device, timeout: float) -> None:
        """Make the process group when every rank is ready: NCCL between GPUs, gloo between CPUs.

        `timeout` is how many seconds a rank waits for the others in a collective.
        """
        if self.store is None:
            return
        self.barrier("ready")
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
            device_id=device if device.type == "cuda" else None,  # NCCL connects here, not in the first step
        )

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """`values` added up over all ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest of each of `values` over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def add_on_device(self, tensor: torch.Tensor) -> None:
        """Add up `tensor` over all ranks in place, where it is: on a GPU the host does not wait for it."""
        if not self.is_single_process:
            dist.all_reduce(tensor)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        return [bool(value) for value in self.all_reduce_max([float(flag) for flag in flags])]

    def all_equal(self, digest: bytes) -> bool:
        """Whether all ranks have the same bytes."""
        numbers = [float(byte) for byte in (*digest, *(-byte for byte in digest))]
        return self.all_reduce_max(numbers) == numbers

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Set `tensor` to that of rank 0."""
        if not self.is_single_process:
            received = tensor.cpu()
            dist.broadcast(received, 0, self._on_cpu)
            tensor.copy_(received)

    def broadcast_files(self, folder: Path, names: Sequence[str]) -> Mapping[str, bytes]:
        """The content of files that rank 0 reads, by name, on every rank."""
        files = {name: (folder / name).read_bytes() for name in names} if self.is_main else {}
        if self.is_single_process:
            return files
        sizes = self.broadcast_from_rank0(
            "files", dict[str, int], lambda: {name: len(content) for name, content in files.items()}
        )
        received = {}
        for name, size in sizes.items():
            content = files.get(name, bytes(size))
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(tensor, 0, self._on_cpu)
            received[name] = tensor.numpy().tobytes()
        return received

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.is_single_process:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how, self._on_cpu)
        reduced: list[float] = tensor.tolist()
        return reduced


@contextmanager
def init_process_group(env: ProcessEnv) -> Iterator[Ranks]:
    """The ranks of this process's run, for the block; not yet connected.

    A process group that exists, as under Ray Train, is used and not destroyed.
    """
    if env.is_single_process:
        yield Ranks(env)
        return
    exists = dist.is_initialized()
    store = dist.distributed_c10d._get_default_store() if exists else next(dist.rendezvous("env://"))[0]
    try:
        yield Ranks(env, dist.PrefixStore(_assembled(env, store), store))
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or _LOST_CONNECTION.search(str(error))
        if isinstance(error, LorafitError) or not is_lost:
            raise
        raise RankError(
            f"rank {env.rank} lost the connection to another rank: {str(error).splitlines()[0]}",
            hint="the other rank has printed its error; torchrun --max-restarts=3 and `--nproc` restart all ranks",
        ) from None
    finally:
        if not exists and dist.is_initialized():
            dist.destroy_process_group()


def _assembled(env: ProcessEnv, store: dist.Store) -> str:
    """A new name that these processes share, made by the first rank.

    The store of torchrun's agent outlives the workers, so it may hold the keys of lost ones. Each rank therefore sends
    a random token and waits for the answer to it; the first rank answers until all have arrived.
    """
    token, name = uuid.uuid4().hex, uuid.uuid4().hex
    store.set(f"hello/{env.rank}", token)
    if not env.is_main:
        _wait(lambda: store.check([f"welcome/{token}"]))
        name = store.get(f"welcome/{token}").decode()
        store.set(f"{name}/here/{env.rank}", "")
        return name
    missing = set(range(1, env.world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", name)
            if store.check([f"{name}/here/{rank}"]):
                missing.remove(rank)
        time.sleep(_POLL_SECONDS)
    return name


def _wait(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(_POLL_SECONDS)


def check_strategy(strategy: str, quantize: str, env: ProcessEnv) -> None:
    """Raise ConfigError when `distributed.strategy` does not go with the processes that were started, or the base."""
    if strategy == "fsdp" and quantize != "none" and not QUANTIZERS[quantize].shards:
        shards = [name for name, quantizer in QUANTIZERS.items() if quantizer.shards]
        raise ConfigError(
            f"a base in {quantize} cannot be sharded",
            place="distributed.strategy",
            hint=f"use ddp, or model.quantize={', '.join(shards)} or none",
        )
    if strategy == "single" and not env.is_single_process:
        raise ConfigError(
            f"{env.world_size} processes were started, but distributed.strategy=single is one",
            place="distributed.strategy",
            hint="use ddp or fsdp, or start one process",
        )


def share_cores(env: ProcessEnv, device: torch.device) -> None:
    """Give the ranks of a host that compute on its processor equal parts of its cores.

    torchrun sets OMP_NUM_THREADS=1 where it is unset. Any other number is the user's and stays.
    """
    if env.local_world_size == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return
    if device.type == "cpu":
        torch.set_num_threads(max(1, num_cores() // env.local_world_size))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""A CUDA device that knows types, shapes, devices and bytes, and has no numbers.

A tensor that is moved to `cuda` becomes a FakeTensor, and so does everything computed from it. Tensors on the CPU are
real. Torch's own fake implementations check shapes, types and devices; `_refuse` adds what the kernels of CUDA refuse.
A number that is read from the device counts as a wait for it and is 1.

    with fake_cuda(H100) as gpu:
        ...
    gpu.records  # every operation: launches, bytes, floating-point operations, waits
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from tests.gpu.device import GIGABYTES, H100, Memory, present
from tests.gpu.streams import streams, waits_for_host, written_by
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafit.model import compile as compiling

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


class RefusedError(RuntimeError):
    """A kernel of CUDA does not accept such arguments."""


@dataclass
class Record:
    """One operation. `wait` is `read` (from the device) or `upload` (of pageable memory): both wait for the stream."""

    name: str
    launches: int = 0
    num_bytes: int = 0
    flops: int = 0
    wait: str = ""
    phase: str = ""
    shapes: tuple[tuple[int, ...], ...] = ()


# Launches of operations that are more than one kernel, from torch's sources, about
_LAUNCHES = {
    "logsumexp": 6,
    "index_put_": 6,
    "_index_put_impl_": 6,
    "index_put": 7,
    "index_add": 2,
    "nonzero": 4,
    "topk": 3,
    "sort": 5,
    "median": 3,
    "_varlen_attn": 2,
    "_varlen_attn_backward": 5,
    "_flash_attention_backward": 4,
    "scatter_add": 2,
    "constant_pad_nd": 2,
}
_VIEWS = (
    "detach view _unsafe_view t transpose split split_with_sizes slice select unsqueeze squeeze expand alias"
)
_VIEWS += (
    " as_strided permute unbind chunk _reshape_alias unfold diagonal is_same_size reshape narrow lift_fresh"
)
_NEW = "empty empty_like new_empty empty_strided new_empty_strided device prim_device resize_ set_"
_NO_KERNEL = {*_VIEWS.split(), *_NEW.split()}
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
# Kernels for which torch.use_deterministic_algorithms raises (its documentation and sources)
_NOT_DETERMINISTIC = {
    "_embedding_bag_dense_backward",
    "_embedding_bag_backward",
    "bincount",
    "cumsum",
    "histc",
    "kthvalue",
    "nll_loss2d_forward",
    "put_",
}
_TENSORS_PER_LAUNCH = 36  # of a _foreach operation


class _Mode(FakeTensorMode):
    avoid_device_init = True


class FakeCuda(TorchDispatchMode):
    """The device while its block runs. `chosen` counts torch's choices among its attentions."""

    def __init__(self, capability: tuple[int, int], memory: Memory) -> None:
        super().__init__()
        self.capability, self.memory = capability, memory
        self.records: list[Record] = []
        self.chosen: Counter[str] = Counter()
        self.phase = ""
        self.in_kernel = 0  # inside a function that is one kernel once it is compiled
        self._fake = _Mode(allow_non_fake_inputs=False)
        self._storages: set[int] = set()

    def add(self, name: str, launches: int = 0, num_bytes: int = 0, **values: Any) -> None:
        self.records.append(Record(name, launches, num_bytes, phase=self.phase, **values))

    def waits(self) -> Counter[str]:
        return Counter(record.wait for record in self.records if record.wait)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        is_here = any(
            isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves
        )
        if not is_here or func.namespace == "prim":
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such operations are not divided before they come here
                return func.decompose(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if name in ("_local_scalar_dense", "equal"):
            self.add(name, launches=2 * (name == "equal"), wait="read")
            dtype = args[0].dtype
            return True if name == "equal" or dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if name in ("nonzero", "_unique2", "unique_dim", "masked_select"):
            raise RefusedError(f"{name} on the device: its size is known only after a wait")
        if name == "copy_" and args[0].device != args[1].device:
            host = args[0] if args[0].device.type == "cpu" else args[1]
            self._add_copy(args[1], args[0].device, waits_for_host(name, args, kwargs, host))
            if args[0].device.type == "cpu":
                return args[0].fill_(1)
        if name in ("_to_copy", "to"):
            device = kwargs.get("device")
            if device is not None and device.type not in (args[0].device.type, "meta"):
                return self._moved(args[0], device, kwargs)
        return self._computed(name, func, args, kwargs)

    def _computed(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        def fake(x: Any) -> Any:
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                return self._fake.from_tensor(x, static_shapes=True)
            return x

        args, kwargs = torch.utils._pytree.tree_map(fake, (args, kwargs))
        self._refuse(name, args, kwargs)
        with self._fake:
            out = func(*args, **kwargs)
        touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, FakeTensor) and x.is_cuda]
        streams.touch(func, touched, written_by(func, args, kwargs))
        self._allocate(out)
        if not self.in_kernel and name not in _NO_KERNEL:
            self._count(name, args, kwargs, out)
        return out

    def _allocate(self, out: Any) -> None:
        """Count the storages of new tensors until they are freed, in the allocator's blocks of 512 bytes."""
        for x in tree_leaves(out):
            if not isinstance(x, FakeTensor) or not x.is_cuda:
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            num_bytes = -(-storage.nbytes() // 512) * 512
            self.memory.allocate(num_bytes)
            self._storages.add(key)
            weakref.finalize(storage, self._freed, key, num_bytes)

    def _freed(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.memory.free(num_bytes)

    def _add_copy(self, source: Tensor, to: torch.device, waits: bool) -> None:
        wait = "" if not waits else "read" if to.type == "cpu" else "upload"
        num_bytes = source.numel() * source.element_size()
        self.add(f"copy to {to.type}", 1, num_bytes, wait=wait, shapes=(tuple(source.shape),))

    def _moved(self, source: Tensor, device: torch.device, kwargs: Any) -> Tensor:
        dtype = kwargs.get("dtype") or source.dtype
        self._add_copy(source, device, waits_for_host("to", (), kwargs, source))
        if device.type == "cpu":
            return torch.ones(source.shape, dtype=dtype)
        like = torch.empty_like(source, device="meta")
        with self._fake:
            moved = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="cuda")
        self._allocate(moved)
        return moved

    def _refuse(self, name: str, args: Any, kwargs: Any) -> None:
        """Raise RefusedError for arguments that the kernels of CUDA do not accept, though torch's fake ones do."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if not any(x.is_cuda for x in tensors):
            return
        if torch.are_deterministic_algorithms_enabled() and name in _NOT_DETERMINISTIC:
            raise RefusedError(f"{name} has no deterministic kernel")

        def demand(condition: bool, text: str) -> None:
            if not condition:
                raise RefusedError(f"{name}: {text}")

        if name == "_int_mm":
            (rows, depth), columns = args[0].shape, args[1].shape[1]
            demand(
                rows > 16 and depth % 8 == 0 and columns % 8 == 0,
                f"rows {rows} (more than 16), depth {depth} and columns {columns} (multiples of 8)",
            )
            demand(args[0].stride(1) == 1 and args[1].stride(0) == 1, "row-major x column-major only")
        elif name in ("_varlen_attn", "_flash_attention_forward"):
            q, k, v, starts = args[:4]
            demand(self.capability >= (8, 0), "flash attention needs capability 8.0")
            demand(q.dtype in HALF and q.dtype == k.dtype == v.dtype, f"{q.dtype}, {k.dtype}, {v.dtype}")
            demand(starts.dtype == torch.int32 and starts.is_contiguous(), f"cu_seqlens is {starts.dtype}")
            demand(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"head of {q.shape[-1]}")
            demand(all(x.stride(-1) == 1 for x in (q, k, v)), "heads must be contiguous")
        elif name == "_scaled_mm":
            demand(self.capability >= (8, 9), "needs capability 8.9")
            scales = args[2:4]
            if scales[0].numel() > 1:
                demand((*args, None)[6] == torch.bfloat16, "row-wise scales give bfloat16 only")
                demand(all(scale.is_contiguous() for scale in scales), "scales must be contiguous")
        elif name in _PRODUCTS:
            kinds = {x.dtype for x in tensors}
            demand(len(kinds) == 1, f"of {sorted(map(str, kinds))}")
            demand(
                self.capability >= (8, 0) or kinds != {torch.bfloat16}, "bfloat16 is emulated on this chip"
            )

    def _count(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inputs = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor) and x.is_cuda}
        outputs = {id(x): x for x in tree_leaves(out) if isinstance(x, FakeTensor) and x.is_cuda}
        written = sum(map(_bytes, outputs.values()))
        num_bytes = sum(map(_bytes, inputs.values())) + written
        if name in ("embedding", "index", "index_select", "gather"):  # they read only what they write
            num_bytes = 2 * written + sum(_bytes(x) for x in inputs.values() if x.dtype == torch.int64)
        launches = _LAUNCHES.get(name, 1)
        if name.startswith(("_foreach", "_fused_adamw")):
            launches = max(1, -(-len(args[0]) // _TENSORS_PER_LAUNCH))
        shapes = tuple(tuple(x.shape) for x in inputs.values())
        self.add(name, launches, num_bytes, flops=_flops(name, args), shapes=shapes)


def _bytes(x: Tensor) -> int:
    """The bytes that a kernel reads or writes; an expanded axis counts once."""
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride else 1
    return count * x.element_size()


def _flops(name: str, args: Any) -> int:
    if name in ("mm", "_int_mm", "_scaled_mm", "bmm"):
        a, b = args[0], args[1]
    elif name in ("addmm", "addmm_"):
        a, b = args[1], args[2]
    else:
        return 0
    return 2 * a.numel() * b.shape[-1]


@contextmanager
def fake_cuda(capability: tuple[int, int] = H100, memory: int | None = None) -> Iterator[FakeCuda]:
    """A fake CUDA device of this capability while the block runs; `memory` are its bytes."""
    gpu = FakeCuda(capability, Memory(memory or GIGABYTES[capability] * 10**9))
    with ExitStack() as stack:
        stack.enter_context(present(capability, gpu.memory))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        real_attention = torch.nn.functional.scaled_dot_product_attention
        attention = _chosen_attention(gpu, real_attention)
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", _module_to(torch.nn.Module.to)))
        stack.enter_context(gpu)
        yield gpu


_compiling: list[FakeCuda] = []  # the devices whose compiled functions are counted


@contextmanager
def compiled_as_one(gpu: FakeCuda, wanted: bool = True) -> Iterator[None]:
    """Count each compiled function (model/compile.py) as one kernel that reads its inputs and writes its outputs."""

    def compile_as_one(definition: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            here = _compiling[-1]
            here.in_kernel += 1
            try:
                out = definition(*args)
            finally:
                here.in_kernel -= 1
            here._count(f"compiled {definition.__name__}", args, {}, out)
            return out

        return call

    with ExitStack() as stack:
        if wanted:
            _compiling.append(gpu)
            stack.callback(_compiling.pop)
            stack.enter_context(mock.patch.object(compiling, "_compiled", compile_as_one))
            stack.enter_context(mock.patch.dict(compiling._state, {"enabled": True}))
        yield


def _module_to(real: Callable[..., Any]) -> Callable[..., Any]:
    """`module.to("meta")` for FakeTensors, which torch cannot exchange for others in place."""

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if args != ("meta",):
            return real(self, *args, **kwargs)
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="meta")
        return self

    return to


def _chosen_attention(gpu: FakeCuda, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Torch's choice among its attentions (transformers/cuda/sdp_utils.cpp of 2.11 to 2.13)."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not (isinstance(q, FakeTensor) and q.is_cuda):
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        is_new = gpu.capability >= (8, 0)
        if is_new and q.dtype in HALF and attn_mask is None and q.shape[-1] <= 256:
            gpu.chosen["flash"] += 1
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        if q.shape[1] == k.shape[1] and q.dtype in (torch.float16, torch.float32, *HALF[: 1 + is_new]):
            gpu.chosen["efficient"] += 1
            if attn_mask is not None:
                if attn_mask.dtype == torch.bool:
                    attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(
                        ~attn_mask, -torch.inf
                    )
                attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
            has_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
            return aten._scaled_dot_product_efficient_attention(
                q, k, v, attn_mask, has_gradient, dropout_p, is_causal
            )[0]
        gpu.chosen["math"] += 1
        arguments = (q, k, v, attn_mask, dropout_p, is_causal, None)
        return aten._scaled_dot_product_attention_math(*arguments, scale=scale, enable_gqa=enable_gqa)[0]

    return attention

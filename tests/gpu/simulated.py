"""A CUDA device that computes on the processor: tensors say `cuda`, and their numbers can be compared with the CPU's.
Apple's MPS is simulated in the same way.

A program takes the same branches as on a GPU. Mixing devices raises. No build for the CPU has torch's flash attention,
so its definition stands in for it. Import it before lorafit (`-p tests.gpu.simulated`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from tests.gpu import guard
from tests.gpu.device import GIGABYTES, H100, Memory, present
from tests.gpu.streams import streams, waits_for_host, written_by
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

torch.inference_mode = (
    torch.no_grad
)  # before it decorates a function: such tensors have no version counters there
aten = torch.ops.aten
_INDEXING = (
    "index",
    "index_put_",
    "_index_put_impl_",
    "index_put",
    "_unsafe_index",
)  # indices may be on the CPU
_READING = ("nonzero", "_unique2", "masked_select", "equal", "is_nonzero")
memory = Memory(GIGABYTES[H100] * 10**9)  # it counts no bytes; `memory.short()` lets allocations fail
_kind = ["cuda"]  # what tensors say
waits: Counter[str] = Counter()
chosen: Counter[str] = Counter()


class Simulated(torch.Tensor):
    """A tensor of the device; `inner` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Simulated:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{_kind[0]}:0",
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Simulated({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        waits["read"] += 1
        return self.inner.tolist()


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.split("::")[-1]
    leaves = tree_leaves((args, kwargs))
    here = [x for x in leaves if isinstance(x, Simulated)]
    device = kwargs.get("device")
    if func.namespace == "prim":
        return func(*args, **kwargs)
    if name == "_local_scalar_dense":
        waits["read"] += 1
        return _inner(args[0]).item()
    if name in ("_to_copy", "to"):
        return _moved(func, args[0], device or args[0].device, kwargs)
    if name == "copy_":
        if isinstance(args[0], Simulated) != isinstance(args[1], Simulated):
            host = args[1] if isinstance(args[0], Simulated) else args[0]
            kind = "upload" if isinstance(args[0], Simulated) else "read"
            waits[kind] += waits_for_host(name, args, kwargs, host)
        streams.touch(func, [x.inner for x in here], [_inner(args[0])])
        _inner(args[0]).copy_(_inner(args[1]))
        return args[0]
    on_cpu = [
        x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Simulated) and x.device.type == "cpu"
    ]
    if here and name not in _INDEXING and any(x.dim() for x in on_cpu):
        shapes = [(type(x).__name__, tuple(x.shape)) for x in here + on_cpu]
        raise RuntimeError(f"{name}: tensors on cuda and on the CPU: {shapes}")
    if here and name in _READING:
        waits["read"] += 1
    inner_args, inner_kwargs = tree_map_only(Simulated, _inner, (args, kwargs))
    written = written_by(func, inner_args, inner_kwargs)
    if _kind[0] == "mps" and any(x.dtype == torch.float64 for x in here):
        raise TypeError(f"{name}: MPS has no float64")
    out = _computed(name, func, inner_args, inner_kwargs)
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    streams.touch(func, [*(x.inner for x in here), *made], written)
    if not (here or (device is not None and device.type == _kind[0])):
        return out
    if not isinstance(out, Tensor | tuple | list):
        return out
    memory.allocate(0)
    wrapped = tree_map(lambda x: Simulated(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if here else wrapped


def _computed(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    if name == "_flash_attention_forward":
        return _flash_forward(*args, **kwargs)
    if name == "_flash_attention_backward":
        return _flash_backward(*args, **kwargs)
    if name == "_int_mm" and (args[0].shape[0] <= 16 or args[1].stride(0) != 1):
        raise RuntimeError(f"_int_mm on CUDA: {args[0].shape} x {args[1].shape}, strides {args[1].stride()}")
    if name == "_scaled_mm":
        a, b, scale_a, scale_b = args[:4]
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(args[6])
    if name == "mm" and len(args) == 3:  # with the type of the result
        return args[0].to(args[2]) @ args[1].to(args[2])
    return func(*args, **kwargs)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Simulated) else x


def _moved(func: Any, source: Tensor, to: torch.device, kwargs: Any) -> Tensor:
    if to.type == "meta":
        return func(_inner(source), **kwargs)
    rest = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
    out = func(_inner(source), **rest)
    if to.type == _kind[0]:
        waits["upload"] += not isinstance(source, Simulated) and waits_for_host("to", (), kwargs, source)
        return Simulated(out)
    waits["read"] += isinstance(source, Simulated)
    return out.clone() if out is _inner(source) else out


def _documents(starts: Tensor) -> Iterator[slice]:
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield slice(start, end)


def _hidden(length: int, window: int | None) -> Tensor:
    """Which keys each query does not attend to, bool (length, length)."""
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    return (distance < 0) if window is None or window < 0 else (distance < 0) | (distance > window)


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    starts_of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    """aten's op of packed documents: (tokens, heads, head_dim) each."""
    assert dropout == 0
    assert is_causal or window_size_right == 0
    assert starts.dtype == torch.int32
    assert int(starts.diff().max()) == longest
    assert int(starts[-1]) == len(q)
    chosen["flash"] += 1
    group, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    outs, sums = [], torch.zeros(q.shape[1], q.shape[0])
    for part in _documents(starts):
        q_, k_, v_ = (x[part].transpose(0, 1).to(wide) for x in (q, k, v))
        k_, v_ = k_.repeat_interleave(group, 0), v_.repeat_interleave(group, 0)
        scores = (q_ @ k_.mT * q.shape[-1] ** -0.5).masked_fill(
            _hidden(q_.shape[1], window_size_left), -torch.inf
        )
        sums[:, part] = scores.logsumexp(-1).float()
        outs.append((scores.softmax(-1) @ v_).transpose(0, 1).to(q.dtype))
    no_random = torch.zeros(2, dtype=torch.uint64)
    return torch.cat(outs), sums, no_random, no_random[0], torch.empty(0)


def _flash_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    starts: Tensor,
    starts_of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    dropout: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    group, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    factor, gradients = q.shape[-1] ** -0.5, []
    for part in _documents(starts):
        q_, k_, v_, d_out = (x[part].transpose(0, 1).to(wide) for x in (q, k, v, grad_output))
        k_, v_ = k_.repeat_interleave(group, 0), v_.repeat_interleave(group, 0)
        hidden = _hidden(q_.shape[1], window_size_left)
        p = (q_ @ k_.mT * factor).masked_fill(hidden, -torch.inf).softmax(-1)
        d_p = d_out @ v_.mT
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * factor
        of_keys = (x.unflatten(0, (-1, group)).sum(1) for x in (d_scores.mT @ q_, p.mT @ d_out))
        gradients.append([x.transpose(0, 1).to(q.dtype) for x in (d_scores @ k_, *of_keys)])
    return tuple(torch.cat(parts) for parts in zip(*gradients, strict=True))


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(
            isinstance(x, Simulated) or (isinstance(x, torch.device) and x.type == _kind[0]) for x in leaves
        ):
            return func(*args, **kwargs)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if func.namespace != "prim" and composite:
            with self:
                return func.decompose(*args, **kwargs)
        return _run(func, args, kwargs)


def _attention(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
        if not isinstance(q, Simulated):
            return real(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        chosen["efficient" if q.shape[1] == k.shape[1] else "math"] += 1
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as torch does before its kernels
            attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill_(
                ~attn_mask, -torch.inf
            )
        arguments = (q, k, v, attn_mask, dropout_p, is_causal, None)
        return aten._scaled_dot_product_attention_math(*arguments, scale=scale, enable_gqa=enable_gqa)[0]

    return attention


@contextmanager
def simulated_cuda(capability: tuple[int, int] = H100) -> Iterator[None]:
    """A simulated CUDA device of this capability while the block runs."""
    waits.clear()
    chosen.clear()
    with ExitStack() as stack:
        stack.enter_context(present(capability, memory))
        functional = torch.nn.functional
        attention = _attention(functional.scaled_dot_product_attention)
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attention))
        stack.enter_context(_Mode())
        yield


@contextmanager
def simulated_mps() -> Iterator[None]:
    """A simulated MPS device while the block runs: without float64, and with torch's attention of its own choice."""
    waits.clear()
    chosen.clear()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.backends.mps, "is_available", return_value=True))
        attention = _attention(torch.nn.functional.scaled_dot_product_attention)
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        guard.install()
        stack.callback(guard.LIBRARY.simulate_mps, False)
        guard.LIBRARY.simulate_mps(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(_kind.__setitem__, 0, "cuda")
        _kind[0] = "mps"
        stack.enter_context(_Mode())
        yield

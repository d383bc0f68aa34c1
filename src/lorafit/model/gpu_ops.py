"""Starts the Triton kernels of model/triton_kernels.py: whether they run here, and what each computes.

A kernel that cannot be compiled or started here is not tried again: torch computes its definition into the same
tensors. Tensors are (rows, width). `y` and `into` may be columns of a wider tensor, so that a product can read or write
beside them; all others are contiguous.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.model import definitions
from lorafit.model.memory import is_out_of_memory
from lorafit.redact import logger_of, one_line

logger = logger_of(__name__)

_WIDEST = 16384  # columns of a row that one program holds
_BLOCK = 1024  # columns, where several programs share a row
_HEADS = 32  # heads that one program rotates
_state = {"enabled": False}
_failed: dict[str, str] = {}  # the kernels that do not run here, and why


def enable(device: torch.device) -> str:
    """Decide for the rest of the process whether the kernels run. Returns why they do not, although this is CUDA.

    Triton needs a C compiler, which shows at the first kernel only.
    """
    _state["enabled"] = False
    _failed.clear()
    if device.type != "cuda" or torch.version.cuda is None:
        return ""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    rms_norm(torch.zeros(16, 16, device=device), torch.zeros(16, device=device), 1e-5)
    _state["enabled"] = not _failed
    return _failed.get("rms_norm", "")


def enabled() -> bool:
    """Whether the kernels run in this process."""
    return _state["enabled"]


def failed() -> Mapping[str, str]:
    """Why kernels do not run in this process, by their names."""
    return _failed


def ready(x: Tensor) -> bool:
    """Whether the kernels compute the rows of x."""
    return _state["enabled"] and x.is_cuda and x.shape[-1] <= _WIDEST


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run one kernel, a program for each cell of the grid. `wide` is True where sums are float64."""
    if "wide" in constants:
        language = importlib.import_module("triton.language")
        constants["wide"] = language.float64 if constants["wide"] else language.float32
    kernel = getattr(importlib.import_module("lorafit.model.triton_kernels"), name)
    kernel[grid](*arguments, enable_fp_fusion=True, **constants)  # said, as Triton's default changes


def _ran(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> bool:
    """Run one kernel. False where it cannot be compiled, or needs more than the chip has: said once in a process.

    Nothing is written then, as both show before a kernel starts.
    """
    if name in _failed:
        return False
    try:
        launch(name, grid, *arguments, **constants)
    except Exception as error:  # whatever a compiler raises, the definitions compute the same
        if is_out_of_memory(error):
            raise
        _failed[name] = one_line(f"{type(error).__name__}: {error}")
        if _state["enabled"]:
            logger.warning(
                "Triton's kernel %s does not run here, torch computes the same: %s", name, _failed[name]
            )
        return False
    return True


def _row(width: int) -> dict[str, int]:
    """Block and warps of a kernel that holds a whole row: 16 bytes per thread and reading."""
    block = 1 << max(4, (width - 1).bit_length())
    return {"block": block, "num_warps": min(16, max(1, block // 256))}


def _is_wide(x: Tensor) -> bool:
    return x.dtype == torch.float64


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As in model/ops.py; written to `y` if there is one."""
    rows, width = x.shape
    y = torch.empty_like(x) if y is None else y
    rstd = x.new_empty(rows, dtype=torch.float64 if _is_wide(x) else torch.float32)
    constants = {"eps": eps, "offset": offset, "wide": _is_wide(x), **_row(width)}
    if not _ran("rms_norm", (rows,), x, weight, y, rstd, y.stride(0), width=width, **constants):
        for to, found in zip((y, rstd), definitions.rms_norm(x, weight, eps, offset), strict=True):
            to.copy_(found)
    return y, rstd


def rms_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float = 0.0,
    residual: Tensor | None = None,
    into: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """As in model/ops.py, plus `residual` (its rows may be apart); `y` gets the norm of x again."""
    rows, width = x.shape
    into = torch.empty_like(x) if into is None else into
    if residual is not None and residual.stride(1) != 1:  # an expanded gradient
        residual = residual.contiguous()
    strides = 0 if residual is None else residual.stride(0), into.stride(0)
    flags = {"has_residual": residual is not None, "has_y": y is not None}
    constants = {"offset": offset, "wide": _is_wide(x), **flags, **_row(width)}
    tensors = grad_output, x, weight, rstd, residual, y, into
    if not _ran("rms_norm_backward", (rows,), *tensors, *strides, width=width, **constants):
        gradient = definitions.rms_norm_backward(grad_output, x, weight, rstd, offset)
        into.copy_(gradient if residual is None else gradient + residual)
        if y is not None:
            y.copy_(x * rstd[:, None] * definitions.shifted(weight, offset))
    return into


def swiglu(gate: Tensor, up: Tensor, y: Tensor | None = None) -> Tensor:
    """silu(gate) * up; the rows of both have the same distance."""
    rows, width = gate.shape
    y = gate.new_empty(rows, width) if y is None else y
    constants = {"width": width, "wide": _is_wide(gate), "block": _BLOCK, "num_warps": 4}
    grid, strides = (rows, -(-width // _BLOCK)), (gate.stride(0), y.stride(0))
    if not _ran("swiglu", grid, gate, up, y, *strides, **constants):
        y.copy_(definitions.swiglu(gate, up))
    return y


def swiglu_backward(
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
    d_gate: Tensor | None = None,
    d_up: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; `y` (it may be `grad_output`) gets silu(gate) * up again."""
    rows, width = gate.shape
    d_gate = gate.new_empty(rows, width) if d_gate is None else d_gate
    d_up = gate.new_empty(rows, width) if d_up is None else d_up
    tensors = grad_output, gate, up, y, d_gate, d_up
    constants = {"width": width, "has_y": y is not None, "wide": _is_wide(gate)}
    grid = (rows, -(-width // _BLOCK))
    strides = gate.stride(0), d_gate.stride(0)
    if not _ran("swiglu_backward", grid, *tensors, *strides, **constants, block=_BLOCK, num_warps=4):
        found = definitions.swiglu_backward(grad_output, gate, up)
        for to, gradient in zip((d_gate, d_up), found, strict=True):
            to.copy_(gradient)
        if y is not None:
            y.copy_(definitions.swiglu(gate, up))
    return d_gate, d_up


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The norms of queries and keys: of each head, or of all heads as one vector."""

    weights: tuple[Tensor, Tensor]  # (head_dim,) each, or as many numbers as all heads have
    eps: float
    offset: float

    @staticmethod
    def constants(norms: HeadNorms | None) -> dict[str, Any]:
        """What a kernel must know of them when it is compiled."""
        given = (0.0, 0.0) if norms is None else (norms.eps, norms.offset)
        return {"has_norm": norms is not None, **dict(zip(("eps", "offset"), given, strict=True))}


def rotate_apart(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    queries: int,
    keys: int,
    index: Tensor | None,
    norms: HeadNorms | None = None,
    repeats: int = 1,
) -> Tensor:
    """qkv (tokens, (queries + 2 keys) * head_dim) -> the same of each place, queries and keys normed and rotated.

    `index` int64 (places,) is the token of each place, None if each token has one. Each head of keys and values stands
    `repeats` times in the result.
    """
    heads = queries + 2 * keys * repeats
    places = len(qkv) if index is None else len(index)
    half = qkv.shape[1] // (queries + 2 * keys) // 2
    out = qkv.new_empty(places, heads * 2 * half)
    counts = {"queries": queries, "keys": keys, "repeats": repeats}
    counts |= {"half": half, "shared": index is not None}
    grid = (places, -(-heads // _HEADS))
    weights = (None, None) if norms is None else norms.weights
    constants = {**counts, **HeadNorms.constants(norms), **_tile(half, qkv)}
    if not _ran("rotate_apart", grid, qkv, *rotary, index, *weights, out, **constants):
        q, k, v = qkv.unflatten(1, (-1, 2 * half)).split((queries, keys, keys), 1)
        if norms is not None:
            q, k = (
                definitions.rms_norm(part.flatten(0, 1), weight, norms.eps, norms.offset)[0].view(part.shape)
                for part, weight in zip((q, k), norms.weights, strict=True)
            )
        q, k = (definitions.rotated(part, rotary) for part in (q, k))
        whole = torch.cat([q, *(part.repeat_interleave(repeats, 1) for part in (k, v))], 1).flatten(1)
        out.copy_(whole if index is None else whole.index_select(0, index))
    return out


def rotate_together(
    gradients: Sequence[Tensor],
    rotary: tuple[Tensor, Tensor],
    order: tuple[Tensor, Tensor] | None,
    into: Tensor,
    norms: HeadNorms | None = None,
    qkv: Tensor | None = None,
    repeats: int = 1,
) -> None:
    """The gradient of `rotate_apart` (tokens, ...), of those of q, k, v (places, heads, head_dim).

    `order` are the places in the order of their tokens, and where each token's begin, if tokens have several. With
    `norms` it needs `qkv`.
    """
    q, k, _ = gradients
    queries, keys, half = q.shape[1], k.shape[1] // repeats, q.shape[2] // 2
    counts = {"queries": queries, "keys": keys, "repeats": repeats}
    counts |= {"half": half, "shared": order is not None}
    grid = (len(into), -(-(queries + 2 * keys) // _HEADS))
    tables = (None, None) if order is None else order
    weights = (None, None) if norms is None else norms.weights
    arguments = *gradients, *rotary, *tables, qkv, *weights, into, into.stride(0), len(into), len(q)
    if _ran("rotate_together", grid, *arguments, **counts, **HeadNorms.constants(norms), **_tile(half, q)):
        return
    of_type = definitions.wide(q.dtype)
    of_keys = [part.unflatten(1, (keys, repeats)).sum(2, dtype=of_type) for part in gradients[1:]]
    whole = torch.cat([q.to(of_type), *of_keys], 1).flatten(1)
    if order is not None:
        whole = F.embedding_bag(order[0], whole, order[1], mode="sum")
    parts = list(whole.unflatten(1, (-1, 2 * half)).split((queries, keys, keys), 1))
    parts[:2] = [definitions.rotated(part, (rotary[0], -rotary[1])) for part in parts[:2]]
    if norms is not None:
        assert qkv is not None
        heads = qkv.unflatten(1, (-1, 2 * half)).split((queries, keys, keys), 1)
        for place, weight in enumerate(norms.weights):
            x = heads[place].to(of_type).flatten(0, 1)
            _, rstd = definitions.rms_norm(x, weight, norms.eps, norms.offset)
            slope = parts[place].flatten(0, 1)
            gradient = definitions.rms_norm_backward(slope, x, weight, rstd, norms.offset)
            parts[place] = gradient.view(parts[place].shape)
    into.copy_(torch.cat(parts, 1).flatten(1))


def _tile(half: int, like: Tensor) -> dict[str, Any]:
    block = 1 << max(1, (half - 1).bit_length())
    return {"wide": _is_wide(like), "block_heads": _HEADS, "block": block, "num_warps": max(4, block // 8)}


def spread(grad_output: Tensor, index: Tensor, first: Tensor) -> Tensor:
    """The gradient of x[first] for x (places, width): `index` int64 (places,), `first` int64 (tokens,)."""
    width = grad_output.shape[1]
    into = grad_output.new_empty(len(index), width)
    if not _ran("spread", (len(index),), grad_output, index, first, into, width=width, **_row(width)):
        into.zero_().index_copy_(0, first, grad_output)
    return into


def dropout(x: Tensor, probability: float, seed: int, added_to: Tensor | None = None) -> Tensor:
    """As in model/definitions.py, or that added to a tensor in place; the rows of x may be apart."""
    rows, width = x.shape
    into = x.new_empty(rows, width) if added_to is None else added_to
    constants = {"width": width, "scale": 1 / (1 - probability), "adds": added_to is not None}
    constants |= {"threshold": definitions.threshold(probability)}
    grid = (rows, -(-width // _BLOCK))
    more = {"wide": _is_wide(x), "block": _BLOCK, "num_warps": 4}
    if not _ran("dropout", grid, x, into, seed, x.stride(0), **constants, **more):
        found = definitions.dropout(x, probability, seed)
        into.copy_(found if added_to is None else added_to + found)
    return into


def fill(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy each source to its target, which may be a part of a larger matrix, in one launch."""
    block, few = 128, 16
    tiles = 0
    for rows, columns in (source.shape for source in sources):
        high, wide = (few, block) if rows <= columns else (block, few)
        tiles = max(tiles, -(-rows // high) * -(-columns // wide))
    pairs = zip(sources, targets, strict=True)
    shapes = tuple((*source.shape, target.stride(0)) for source, target in pairs)
    constants = {"shapes": shapes, "block": block, "few": few, "num_warps": 4}
    if not _ran("fill", (tiles,), tuple(sources), tuple(targets), **constants):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)


def cross_entropy(logits: Tensor, targets: Tensor, grad_output: bool, weights: Tensor | None) -> Tensor:
    """As in model/ops.py."""
    rows, vocab = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float64 if _is_wide(logits) else torch.float32)
    flags = {"has_weights": weights is not None, "has_slope": grad_output, "wide": _is_wide(logits)}
    tensors, constants = (logits, targets, weights, losses), {"vocab": vocab, "block": 4096, "num_warps": 8}
    if not _ran("cross_entropy", (rows,), *tensors, **constants, **flags):
        found = definitions.cross_entropy(logits, targets, grad_output)
        return definitions.times_weights(found, logits, weights)
    return losses

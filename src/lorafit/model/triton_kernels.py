"""Kernels of a training step on a GPU, in Triton: each reads its inputs once and writes its results once.

model/gpu_ops.py starts them and says what they compute. `wide` is the type of sums. A stride is the distance of two
rows; where there is none, rows are contiguous. Each kernel has the same bits in every run.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x,
    weight,
    y,
    rstd,
    y_stride,
    width: tl.constexpr,
    eps: tl.constexpr,
    offset: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    """RMSNorm of one row, and 1 / rms(x)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(wide)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(wide) + offset
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(rstd + row, scale)
    tl.store(y + row * y_stride + at, (value * scale * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    slope,
    x,
    weight,
    rstd,
    residual,
    y,
    into,
    residual_stride,
    into_stride,
    width: tl.constexpr,
    offset: tl.constexpr,
    has_residual: tl.constexpr,
    has_y: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    """The gradient of x, plus that of the residual stream; and y = RMSNorm(x) again."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    scale = tl.load(rstd + row)
    normed = tl.load(x + row * width + at, mask=inside, other=0.0).to(wide) * scale
    factor = tl.load(weight + at, mask=inside, other=0.0).to(wide) + offset
    weighted = tl.load(slope + row * width + at, mask=inside, other=0.0).to(wide) * factor
    gradient = (weighted - normed * (tl.sum(weighted * normed, 0) / width)) * scale
    if has_residual:
        gradient += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(wide)
    tl.store(into + row * into_stride + at, gradient.to(into.dtype.element_ty), mask=inside)
    if has_y:
        tl.store(y + row * width + at, (normed * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(gate, up, y, stride, y_stride, width: tl.constexpr, wide: tl.constexpr, block: tl.constexpr):
    """y = silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    g = tl.load(gate + row * stride + at, mask=inside, other=0.0).to(wide)
    u = tl.load(up + row * stride + at, mask=inside, other=0.0).to(wide)
    tl.store(y + row * y_stride + at, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(
    slope,
    gate,
    up,
    y,
    d_gate,
    d_up,
    stride,
    d_stride,
    width: tl.constexpr,
    has_y: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    """The gradients of gate and up; and y = silu(gate) * up again, which may lie where the slope was."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    s = tl.load(slope + row * width + at, mask=inside, other=0.0).to(wide)
    g = tl.load(gate + row * stride + at, mask=inside, other=0.0).to(wide)
    u = tl.load(up + row * stride + at, mask=inside, other=0.0).to(wide)
    opened = 1 / (1 + tl.exp(-g))
    of_gate = s * u * opened * (1 + g * (1 - opened))
    tl.store(d_gate + row * d_stride + at, of_gate.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + row * d_stride + at, (s * g * opened).to(d_up.dtype.element_ty), mask=inside)
    if has_y:
        tl.store(y + row * width + at, (g * opened * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rotate_apart(
    qkv,
    cosine,
    sine,
    index,
    q_weight,
    k_weight,
    out,
    queries: tl.constexpr,
    keys: tl.constexpr,
    repeats: tl.constexpr,
    half: tl.constexpr,
    eps: tl.constexpr,
    offset: tl.constexpr,
    shared: tl.constexpr,
    has_norm: tl.constexpr,
    wide: tl.constexpr,
    block_heads: tl.constexpr,
    block: tl.constexpr,
):
    """The heads of one place: those of its token, queries and keys with their norms, if they have some, and rotated;
    each head of keys and values `repeats` times.
    """
    heads: tl.constexpr = queries + 2 * keys * repeats
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(index + place).to(tl.int64) if shared else place
    to_head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    head = tl.where(to_head < queries, to_head, queries + (to_head - queries) // repeats)
    pair = tl.arange(0, block)[None, :]
    inside = (to_head < heads) & (pair < half)
    has_angle = (head < queries + keys) & (pair < half)
    c = tl.load(cosine + token * half + pair, mask=has_angle, other=1.0).to(wide)
    s = tl.load(sine + token * half + pair, mask=has_angle, other=0.0).to(wide)
    source = qkv + token * ((queries + 2 * keys) * 2 * half) + head * (2 * half) + pair
    first = tl.load(source, mask=inside, other=0.0).to(wide)
    second = tl.load(source + half, mask=inside, other=0.0).to(wide)
    if has_norm:
        scale = _head_scale(first, second, half, eps)
        w_first = _head_weight(q_weight, k_weight, head, pair, has_angle, queries, offset, wide)
        w_second = _head_weight(
            q_weight + half, k_weight + half, head, pair, has_angle, queries, offset, wide
        )
        rounded = out.dtype.element_ty
        first = tl.where(has_angle, first * scale * w_first, first).to(rounded).to(wide)
        second = tl.where(has_angle, second * scale * w_second, second).to(rounded).to(wide)
    to = out + place * (heads * 2 * half) + to_head * (2 * half) + pair
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _head_scale(first, second, half: tl.constexpr, eps: tl.constexpr):
    """1 / rms of each head, whose halves are `first` and `second`."""
    return (1 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half) + eps))[:, None]


@triton.jit
def _head_weight(
    q_weight,
    k_weight,
    head,
    pair,
    inside,
    queries: tl.constexpr,
    offset: tl.constexpr,
    wide: tl.constexpr,
):
    """The weights of the norms of queries and keys, for half of each head."""
    of_q = tl.load(q_weight + pair + 0 * head, mask=inside & (head < queries), other=0.0).to(wide)
    of_k = tl.load(k_weight + pair + 0 * head, mask=inside & (head >= queries), other=0.0).to(wide)
    return of_q + of_k + offset


@triton.jit
def rotate_together(
    d_q,
    d_k,
    d_v,
    cosine,
    sine,
    in_order,
    begins,
    qkv,
    q_weight,
    k_weight,
    into,
    into_stride,
    tokens,
    places,
    queries: tl.constexpr,
    keys: tl.constexpr,
    repeats: tl.constexpr,
    half: tl.constexpr,
    eps: tl.constexpr,
    offset: tl.constexpr,
    shared: tl.constexpr,
    has_norm: tl.constexpr,
    wide: tl.constexpr,
    block_heads: tl.constexpr,
    block: tl.constexpr,
):
    """The gradient of `rotate_apart`: the sum over the places of one token, in their order, rotated back and through
    the norms; `qkv` is needed for these alone.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    pair = tl.arange(0, block)[None, :]
    of_pair = pair < half
    is_q = (head < queries) & of_pair
    is_k = (head >= queries) & (head < queries + keys) & of_pair
    is_v = (head >= queries + keys) & (head < queries + 2 * keys) & of_pair
    first = tl.zeros((block_heads, block), wide)
    second = tl.zeros((block_heads, block), wide)
    begin = token
    end = token + 1
    if shared:
        begin = tl.load(begins + token)
        following = tl.load(begins + tl.minimum(token + 1, tokens - 1))
        end = tl.where(token + 1 < tokens, following, places)
    for number in range(begin, end):
        place = tl.load(in_order + number).to(tl.int64) if shared else token
        q = d_q + (place * queries + head) * (2 * half) + pair
        first += tl.load(q, mask=is_q, other=0.0).to(wide)
        second += tl.load(q + half, mask=is_q, other=0.0).to(wide)
        for repeat in range(repeats):
            k = d_k + ((place * keys + head - queries) * repeats + repeat) * (2 * half) + pair
            v = d_v + ((place * keys + head - queries - keys) * repeats + repeat) * (2 * half) + pair
            first += tl.load(k, mask=is_k, other=0.0).to(wide)
            first += tl.load(v, mask=is_v, other=0.0).to(wide)
            second += tl.load(k + half, mask=is_k, other=0.0).to(wide)
            second += tl.load(v + half, mask=is_v, other=0.0).to(wide)
    c = tl.load(cosine + token * half + pair, mask=is_q | is_k, other=1.0).to(wide)
    s = tl.load(sine + token * half + pair, mask=is_q | is_k, other=0.0).to(wide)
    back = second * c - first * s
    first = first * c + second * s
    second = back
    inside = is_q | is_k | is_v
    if has_norm:
        has_angle = is_q | is_k
        source = qkv + token * ((queries + 2 * keys) * 2 * half) + head * (2 * half) + pair
        x_first = tl.load(source, mask=has_angle, other=0.0).to(wide)
        x_second = tl.load(source + half, mask=has_angle, other=0.0).to(wide)
        scale = _head_scale(x_first, x_second, half, eps)
        w_first = _head_weight(q_weight, k_weight, head, pair, has_angle, queries, offset, wide)
        w_second = _head_weight(
            q_weight + half, k_weight + half, head, pair, has_angle, queries, offset, wide
        )
        x_first, x_second = x_first * scale, x_second * scale
        along = tl.sum(first * w_first * x_first, 1) + tl.sum(second * w_second * x_second, 1)
        along = (along / (2 * half))[:, None]
        first = tl.where(has_angle, (first * w_first - x_first * along) * scale, first)
        second = tl.where(has_angle, (second * w_second - x_second * along) * scale, second)
    to = into + token * into_stride + head * (2 * half) + pair
    tl.store(to, first.to(into.dtype.element_ty), mask=inside)
    tl.store(to + half, second.to(into.dtype.element_ty), mask=inside)


@triton.jit
def spread(slope, index, first, into, width: tl.constexpr, block: tl.constexpr):
    """One row of `into`: that of its token in `slope` if it is the token's first place, else zeros."""
    place = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    token = tl.load(index + place).to(tl.int64)
    filled = tl.where(tl.load(first + token) == place, width, 0)
    value = tl.load(slope + token * width + at, mask=at < filled, other=0.0)
    tl.store(into + place * width + at, value, mask=at < width)


@triton.jit(do_not_specialize=["seed"])
def dropout(
    x,
    into,
    seed,
    stride,
    width: tl.constexpr,
    threshold: tl.constexpr,
    scale: tl.constexpr,
    adds: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    """x with some elements zero and the others scaled, or that added to `into`: seed and place decide which, by the
    hash of model/definitions.py.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(wide)
    key = seed.to(tl.uint64) + (row + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    h = (key >> 32).to(tl.uint32) + at.to(tl.uint32) * 0x9E3779B9
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    value = tl.where(h.to(tl.int64) >= threshold, value * scale, 0.0)
    to = into + row * width + at
    if adds:
        value += tl.load(to, mask=inside, other=0.0).to(wide)
    tl.store(to, value.to(into.dtype.element_ty), mask=inside)


@triton.jit
def fill(sources, targets, shapes: tl.constexpr, block: tl.constexpr, few: tl.constexpr):
    """Copy matrices into parts of others; `shapes` are (rows, columns, distance of the target's rows)."""
    for number in tl.static_range(len(shapes)):
        if shapes[number][0] <= shapes[number][1]:
            _copy_tile(sources[number], targets[number], *shapes[number], high=few, wide=block)
        else:
            _copy_tile(sources[number], targets[number], *shapes[number], high=block, wide=few)


@triton.jit
def _copy_tile(
    source,
    target,
    rows: tl.constexpr,
    columns: tl.constexpr,
    stride: tl.constexpr,
    high: tl.constexpr,
    wide: tl.constexpr,
):
    """Copy one tile of (high, wide), if the matrix has so many."""
    tile = tl.program_id(0)
    across: tl.constexpr = (columns + wide - 1) // wide
    row = (tile // across * high + tl.arange(0, high))[:, None]
    column = (tile % across * wide + tl.arange(0, wide))[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(source + row * columns + column, mask=inside, other=0.0)
    tl.store(target + row.to(tl.int64) * stride + column, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy(
    logits,
    targets,
    weights,
    losses,
    vocab: tl.constexpr,
    has_weights: tl.constexpr,
    has_slope: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
):
    """The loss of one row times its weight, and its logits overwritten with their gradients."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    weight = tl.load(weights + row).to(wide) if has_weights else 1.0
    line = logits + row * vocab
    peak = tl.full((), -float("inf"), wide)
    total = tl.full((), 0.0, wide)
    for start in range(0, vocab, block):
        at = start + tl.arange(0, block)
        x = tl.load(line + at, mask=at < vocab, other=-float("inf")).to(wide)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    log_total = tl.log(total)
    loss = log_total - (tl.load(line + target).to(wide) - peak)
    tl.store(losses + row, loss * weight)
    if has_slope:
        tl.debug_barrier()  # a thread overwrites the target's logit
        for start in range(0, vocab, block):
            at = start + tl.arange(0, block)
            x = tl.load(line + at, mask=at < vocab, other=-float("inf")).to(wide)
            slope = tl.exp(x - peak - log_total) - tl.where(at == target, 1.0, 0.0)
            tl.store(line + at, (slope * weight).to(logits.dtype.element_ty), mask=at < vocab)

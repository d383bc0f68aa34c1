"""The compiled attention of one new token a row says what torch says, and reads and writes its own cache only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafit.infer.engine import Decode, KeyValueCache, decode_attention
from lorafit.model.architecture import Architecture
from lorafit.model.llama import rotary_table
from lorafit.model.native import kernels, missing
from lorafit.model.rope import Rope

pytestmark = pytest.mark.skipif(kernels() is None, reason=missing() or "there are kernels")

LENGTHS = [0, 5, 1, 63, 30]


def attention(heads: int, kv_heads: int, size: int, seed: int = 0) -> tuple[KeyValueCache, list[Tensor]]:
    """A float64 cache of five rows with other things beyond their ends, and a new q, k and v."""
    shape = Architecture("llama", 9, 8, 8, 1, heads, kv_heads, size, 1e-5, 64, Rope())
    cache = KeyValueCache(shape, len(LENGTHS), 64, torch.zeros(1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    cache.k, cache.v = {0: random(*cache.k[0].shape)}, {0: random(*cache.v[0].shape)}
    cache.lengths = torch.tensor(LENGTHS)
    return cache, [random(len(LENGTHS), count, size) for count in (heads, kv_heads, kv_heads)]


def compiled(cache: KeyValueCache, new: list[Tensor], window: int | None, dtype: torch.dtype) -> Tensor:
    """The kernel on copies of `dtype`; the caches of `cache` are replaced by them."""
    cache.k, cache.v = {0: cache.k[0].to(dtype)}, {0: cache.v[0].to(dtype)}
    attend = Decode(cache)
    rotary = rotary_table(attend.positions, Rope(), new[0].shape[-1])
    return attend(0, *(each.to(dtype) for each in new), rotary, window)


def in_torch(cache: KeyValueCache, new: list[Tensor], window: int | None, dtype: torch.dtype) -> Tensor:
    k, v = cache.k[0][cache.slots].to(dtype), cache.v[0][cache.slots].to(dtype)
    rotary = rotary_table(cache.lengths, Rope(), new[0].shape[-1])
    return decode_attention(*(each.to(dtype) for each in new), rotary, window, k, v, cache.lengths)


@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 8), (6, 1, 64), (1, 1, 2)])
def test_it_is_the_torch_expression(heads: int, kv_heads: int, size: int, window: int | None) -> None:
    cache, new = attention(heads, kv_heads, size)
    exact = in_torch(cache, new, window, torch.float64)
    torch.testing.assert_close(
        compiled(cache, new, window, torch.float32).double(), exact, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (4, 2, 8), (6, 1, 64)])
def test_in_bfloat16_it_is_as_near_as_torch(heads: int, kv_heads: int, size: int, window: int | None) -> None:
    cache, new = attention(heads, kv_heads, size)
    exact = in_torch(cache, new, window, torch.float64)
    rough = in_torch(cache, new, window, torch.bfloat16)
    ours = compiled(cache, new, window, torch.bfloat16)
    assert (ours - exact).norm() <= 1.05 * (rough - exact).norm()


def test_only_the_slots_of_the_rows_are_read_and_written() -> None:
    cache, new = attention(4, 2, 8)
    before_k, before_v = cache.k[0].float(), cache.v[0].float()
    cache.k, cache.v = {0: before_k.clone()}, {0: before_v.clone()}
    cache.slots, cache.lengths = torch.tensor([1, 4]), cache.lengths[[1, 4]]
    some = [each[:2] for each in new]
    exact = in_torch(cache, some, None, torch.float64)
    torch.testing.assert_close(
        compiled(cache, some, None, torch.float32).double(), exact, rtol=1e-5, atol=1e-5
    )
    assert cache.lengths.tolist() == [6, 31]
    changed = (cache.k[0] != before_k).any(-1) | (cache.v[0] != before_v).any(
        -1
    )  # (slots, kv_heads, capacity)
    assert changed.any(1).nonzero().tolist() == [[1, 5], [4, 30]]
    torch.testing.assert_close(cache.v[0][[1, 4], :, [5, 30]], some[2].float())


def test_it_does_not_depend_on_the_number_of_threads() -> None:
    cache, new = attention(6, 2, 64)
    outs = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs.append(compiled(cache, new, None, torch.float32))
        cache.lengths -= 1
    torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])

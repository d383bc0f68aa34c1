"""The number types of exports, one record each: bits, what an export of the type may cost, and llama.cpp's mixture.

The mixtures are those of llama.cpp's own quantiser: which matrices get more bits than the rest. Nothing here imports
the package `gguf`; export/gguf_types.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

V, O, DOWN = "v_proj", "o_proj", "down_proj"  # noqa: E741 (the projection of the attention's output)


@dataclass(frozen=True, slots=True)
class More:
    """Matrices that are stored as `kind`: those of `modules` in the layers that `where(layer, layers)` selects."""

    modules: tuple[str, ...]
    kind: str
    where: Callable[[int, int], bool] = lambda layer, layers: True


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an export may cost; docs/export.md has the measurements.

    It may raise the loss by the share `loss` of it, and must have the adapter's most probable token at the share
    `agreement` of the tokens.
    """

    loss: float
    agreement: float


@dataclass(frozen=True, slots=True)
class NumberType:
    """A type of an export's weights, of `bits` per weight.

    `most_rounded` is the largest relative change of a weight, in root mean squares, for types without blocks.

    A file of the type stores matrices as `kind` (a name of GGUF), the head and a tied embedding as `table`. `profits`:
    an importance matrix makes it better.
    """

    name: str
    bits: float
    bounds: Bounds
    kind: str
    table: str = ""
    more: Sequence[More] = ()
    profits: bool = False
    most_rounded: float | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether weights are rounded in blocks, with a scale each."""
        return self.most_rounded is None


def _some(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _first(part: int) -> Callable[[int, int], bool]:
    return lambda layer, layers: layer < layers // part


_SAME, _Q8, _Q5 = Bounds(0.005, 0.97), Bounds(0.01, 0.95), Bounds(0.02, 0.9)
_Q4, _Q3 = Bounds(0.04, 0.85), Bounds(0.08, 0.8)
_Q6_IN_SOME = (More((V, DOWN), "Q6_K", _some),)
_Q4_K_S = (More((V,), "Q5_K", lambda layer, layers: layer < 4), More((DOWN,), "Q5_K", _first(8)))
_Q3_K_M = (
    More((V,), "Q5_K", lambda layer, layers: layer < 2),
    More((DOWN,), "Q5_K", _first(16)),
    More((V, O, DOWN), "Q4_K"),
)

TYPES: dict[str, NumberType] = {
    record.name: record
    for record in (
        NumberType("f32", 32, _SAME, "F32", most_rounded=1e-6),
        NumberType("bf16", 16, _SAME, "BF16", most_rounded=4e-3),
        NumberType("f16", 16, _SAME, "F16", most_rounded=1e-3),
        NumberType("q8_0", 8.5, _Q8, "Q8_0"),
        NumberType("q6_k", 6.6, _Q8, "Q6_K", "Q6_K", profits=True),
        NumberType("q5_k_m", 5.7, _Q5, "Q5_K", "Q6_K", _Q6_IN_SOME, profits=True),
        NumberType("q5_0", 5.6, _Q5, "Q5_0", "Q8_0", profits=True),
        NumberType("q4_k_m", 4.9, _Q4, "Q4_K", "Q6_K", _Q6_IN_SOME, profits=True),
        NumberType("q4_k_s", 4.7, _Q4, "Q4_K", "Q6_K", _Q4_K_S, profits=True),
        NumberType("q4_0", 4.6, _Q4, "Q4_0", "Q8_0", profits=True),
        NumberType("iq4_nl", 4.6, _Q4, "IQ4_NL", "Q6_K", profits=True),
        NumberType("iq4_xs", 4.4, _Q4, "IQ4_XS", "Q6_K", profits=True),
        NumberType("q3_k_l", 4.1, _Q3, "Q3_K", "Q6_K", (More((V, O, DOWN), "Q5_K"),), profits=True),
        NumberType("q3_k_m", 3.9, _Q3, "Q3_K", "Q6_K", _Q3_K_M, profits=True),
        NumberType("q2_k", 3.0, _Q3, "Q2_K", "Q6_K", (More((V, O, DOWN), "Q3_K"),), profits=True),
    )
}
GGUF_TYPES = ("q8_0", *(name for name in TYPES if name != "q8_0"))  # the default first

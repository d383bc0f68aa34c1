"""What a `config.json` says about rotary positions (Su et al., 2021): base frequency and scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorafit.hub.folder_keys import ROPE, Rule, refused
from lorafit.model.config_fields import Fields

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_BETA = "llama_4_scaling_beta"
BY_LAYER_TYPE = ("full_attention", "sliding_attention")  # keys of a `rope_parameters` that differs by layer


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: the base frequency and how frequencies are scaled, by one of ROPE_KINDS.

    `attention_factor` multiplies cosine and sine. `short_factor` and `long_factor` divide the frequencies of each pair
    in texts up to the original length and beyond it (`longrope`). `query_beta` makes queries longer with each further
    original length (Ministral 3); 0 does not.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_beta: float = 0.0

    @property
    def fixed_up_to(self) -> int | None:
        """Tokens of the longest text whose angles do not depend on its length; None if they never do."""
        return self.original_max_position_embeddings if self.kind in ("dynamic", "longrope") else None


def scaling_of(raw: Mapping[str, Any]) -> tuple[str, Any]:
    """(the name of the field that scales frequencies, its value): `rope_parameters` (transformers 5) or `rope_scaling`
    (before).
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    return name, raw.get(name) or {}


def read_rope(
    fields: Fields,
    width: int,
    context: int,
    aliases: Mapping[str, str] = {},
    keys: Mapping[str, Rule] = {},
) -> Rope:
    """The one Rope of a network, as transformers reads it.

    `width` are the numbers of a head that are rotated, `context` is `max_position_embeddings`, `aliases` other names of
    kinds, `keys` the rules of further keys.
    """
    name, scaling = scaling_of(fields.raw)
    theta = fields.raw.get("rope_theta", 10000.0)
    return _parsed(fields, name, scaling, theta, width, context, aliases, keys)


def read_ropes_by_type(fields: Fields, width: int, context: int, local_theta: object) -> tuple[Rope, Rope]:
    """(the Rope of layers with full attention, that of layers with a window, which is not scaled in old files)."""
    theta = fields.raw.get("rope_theta", 10000.0)
    name, scaling = scaling_of(fields.raw)
    by_type = scaling if isinstance(scaling, dict) and any(key in scaling for key in BY_LAYER_TYPE) else None
    whole: Any
    local: Any
    if by_type is None:
        whole, local = scaling, {}
    else:
        whole, local = (by_type.get(key) or {} for key in BY_LAYER_TYPE)
    pairs = ((whole, theta), (local, local_theta))
    full, sliding = (_parsed(fields, name, part, base, width, context, {}, {}) for part, base in pairs)
    return full, sliding


def _parsed(
    fields: Fields,
    name: str,
    scaling: Any,
    theta: object,
    width: int,
    context: int,
    aliases: Mapping[str, str],
    keys: Mapping[str, Rule],
) -> Rope:
    if not isinstance(scaling, dict):
        fields.wrong(name, "expected an object")
        return Rope()
    given = {key: value for key, value in scaling.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    kind = aliases.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_KINDS:
        fields.wrong(name, f"rope types {', '.join(ROPE_KINDS)} are supported")
        return Rope()
    original = fields.raw.get("original_max_position_embeddings")
    if original is not None and kind in ("llama3", "yarn", "longrope"):
        given["original_max_position_embeddings"] = original
    if kind == "dynamic":
        given["original_max_position_embeddings"] = context
    inner = Fields({"rope_theta": theta, **given}, fields.place)
    before = inner.count("original_max_position_embeddings", context)
    if kind == "dynamic" and "alpha" in given and keys.get("alpha") == "used":
        if width < 4:
            inner.wrong("alpha", "it needs heads of at least 4 numbers")
        else:  # a fixed base, whatever the length
            base = inner.number("rope_theta", 10000.0) * inner.number("alpha", 1.0) ** (width / (width - 2))
            fields.problems += inner.problems
            return Rope(theta=base, original_max_position_embeddings=before)
    if kind in ("linear", "dynamic", "llama3") and "factor" not in given:
        inner.wrong("factor", f"rope type {kind} needs a number")
    rope = Rope(
        theta=inner.number("rope_theta", 10000.0),
        kind=kind,
        factor=inner.number("factor", context / before if kind in ("yarn", "longrope") else 1.0),
        low_freq_factor=inner.number("low_freq_factor", 1.0),
        high_freq_factor=inner.number("high_freq_factor", 4.0),
        original_max_position_embeddings=before,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        truncate=inner.flag("truncate") if "truncate" in given else True,
        short_factor=_factors(inner, "short_factor", width) if kind == "longrope" else (),
        long_factor=_factors(inner, "long_factor", width) if kind == "longrope" else (),
        query_beta=inner.number(_BETA, 1.0) if given.keys() & keys.keys() & {_BETA} else 0.0,
    )
    if kind == "dynamic" and width < 4:
        inner.wrong("rope_type", "rope type dynamic needs heads of at least 4 numbers")
    inner.problems += refused(scaling, {**ROPE, **keys}, f"{fields.place} {name}")
    fields.problems += inner.problems
    return replace(rope, attention_factor=inner.number("attention_factor", _attention_factor(rope, inner)))


def _factors(fields: Fields, name: str, width: int) -> tuple[float, ...]:
    """A positive number for each pair of a head."""
    value = fields.raw.get(name)
    numbers = value if isinstance(value, list) else []
    if len(numbers) != width // 2 or not all(type(n) in (int, float) and 0 < n < 1e12 for n in numbers):
        fields.wrong(name, f"expected {width // 2} positive numbers")
    return tuple(map(float, numbers)) if not fields.problems else ()


def _attention_factor(rope: Rope, fields: Fields) -> float:
    """The factor of cosine and sine where config.json does not name it (Peng et al., 2023; Ding et al., 2024)."""
    if rope.factor <= 1:
        return 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(max(2, rope.original_max_position_embeddings)))
    if rope.kind != "yarn":
        return 1.0
    above, below = (fields.raw.get(key) for key in ("mscale", "mscale_all_dim"))
    if above and below:
        above, below = fields.number("mscale", 1.0), fields.number("mscale_all_dim", 1.0)
        return (0.1 * above * math.log(rope.factor) + 1) / (0.1 * below * math.log(rope.factor) + 1)
    return 0.1 * math.log(rope.factor) + 1

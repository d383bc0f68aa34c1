"""A text that is too long as several rows, of which each begins with the end of the one before."""

from __future__ import annotations

from lorafit.data.prompt import Rendered


def split(row: Rendered, longest: int, bos_id: int | None) -> list[Rendered]:
    """A row as pieces of at most `longest` tokens. Each token is trained in one of them.

    Each piece repeats the BOS of the row, and as context an eighth of `longest` tokens of the piece before.
    """
    if len(row.ids) <= longest:
        return [row]
    start = int(row.ids[0] == bos_id)
    bos, pieces, repeated = row.ids[:start], list[Rendered](), 0
    while start + repeated < len(row.ids):
        stop = start + longest - len(bos)
        trained = [False] * (len(bos) + repeated) + row.trained[start + repeated : stop]
        weights = row.weights and [0.0] * (len(bos) + repeated) + row.weights[start + repeated : stop]
        pieces.append(Rendered(bos + row.ids[start:stop], trained, weights))
        repeated = longest // 8
        start = stop - repeated
    return pieces

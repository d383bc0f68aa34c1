"""The gradients of the adapted linears for each document of a pass by itself, though the pass computes many.

The gradient of a linear is a sum over tokens. Here each document has its own view of the trained tensors, so that
autograd sums over its tokens alone. A gradient goes to its reader as soon as it is there, and is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorafit.model.linear import replace_module
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraLinear, adapted

See = Callable[[int, str, Tensor], None]


@contextmanager
def each_document(network: Llama, lengths: Sequence[int], counts: Sequence[int], see: See) -> Iterator[None]:
    """Inside the block, the backward pass of a pass of these documents calls `see` with (document, name of the tensor,
    gradient) for each trained tensor of each adapted linear.

    `lengths` are the tokens of the documents, which share no prefix, `counts` those of them whose next token is
    supervised: the last layer computes these alone. Tokens after the last document are of none.
    """
    linears = adapted(network)
    for name, linear in linears.items():
        replace_module(network, name, _Divided(linear, name, lengths, counts, see))
    try:
        yield
    finally:
        for name, linear in linears.items():
            replace_module(network, name, linear)


class _Divided(nn.Module):
    """An adapted linear as model/lora_linear.py reads it; what the adapter adds is computed per document."""

    is_plain: ClassVar = False

    def __init__(
        self, linear: LoraLinear, name: str, lengths: Sequence[int], counts: Sequence[int], see: See
    ) -> None:
        super().__init__()
        self.linear, self.base, self.enabled, self.dropout = linear, linear.base, linear.enabled, 0.0
        self._name, self._lengths, self._counts, self._see = name, lengths, counts, see

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        """As LoraLinear.added, for x (tokens, in_features) of the whole pass, or of its supervised positions."""
        sizes = [*(self._counts if len(x) == sum(self._counts) else self._lengths)]
        sizes.append(len(x) - sum(sizes))
        parts = zip(x.split(sizes), out.split(sizes), strict=True)
        return torch.cat([self._of(document, *part) for document, part in enumerate(parts)])

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """What `functional_call` calls, with the tensors of one document."""
        return self.linear.added(x, out)

    def _of(self, document: int, x: Tensor, out: Tensor) -> Tensor:
        own = {f"linear.{part}": self._view(document, part) for part in self.linear.parts}
        added: Tensor = functional_call(self, own, (x, out))
        return added

    def _view(self, document: int, part: str) -> Tensor:
        view: Tensor = getattr(self.linear, part).detach()
        if document < len(self._lengths):
            view.requires_grad_().register_post_accumulate_grad_hook(self._reader(document, part))
        return view

    def _reader(self, document: int, part: str) -> Callable[[Any], None]:
        def read(view: Tensor) -> None:
            assert view.grad is not None
            self._see(document, f"{self._name}.{part}", view.grad)
            view.grad = None

        return read

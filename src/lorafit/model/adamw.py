"""AdamW over the parameters of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8  # what transformers, peft and the papers on LoRA use


class AdamW:
    """Adam with decoupled decay (Loshchilov and Hutter, 2019), to the bits of torch's with `foreach`, on CUDA of that
    with `fused`.

    `state` holds for each parameter that ever had a gradient `step`, `exp_avg` and `exp_avg_sq`, as torch names them.
    The first step of any optimizer of torch loads its compiler: half a second and 75 MB that a run does not need.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        weight_decay: float,
        factors: Mapping[Tensor, float] | None = None,
    ) -> None:
        """`factors` multiply the learning rate of some parameters."""
        self.parameters, self.weight_decay = list(parameters), weight_decay
        self.factors = factors or {}
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, rate: float, is_stopped: Tensor | None = None) -> None:
        """One step at a learning rate of `rate`; nothing where `is_stopped`, on CUDA, is 1."""
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        for parameter in self.parameters:
            if parameter.grad is not None:
                weights.append(parameter)
                gradients.append(parameter.grad)
        if not weights:
            return
        for weight in weights:
            if weight not in self.state:
                self.state[weight] = {
                    "step": torch.zeros((), device=weight.device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        steps, means, squares = (
            [self.state[weight][name] for weight in weights] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        torch._foreach_add_(steps, 1)
        rates = [rate * self.factors.get(weight, 1.0) for weight in weights]
        if weights[0].is_cuda:
            self._fused(weights, gradients, rates, is_stopped)
            return
        counts = list(map(float, steps))
        if self.weight_decay:
            torch._foreach_mul_(weights, [1 - own * self.weight_decay for own in rates])
        torch._foreach_lerp_(means, gradients, 1 - BETAS[0])
        torch._foreach_mul_(squares, BETAS[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - BETAS[1])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - BETAS[1] ** step) ** 0.5 for step in counts])
        torch._foreach_add_(roots, EPS)
        sizes = [-own / (1 - BETAS[0] ** step) for own, step in zip(rates, counts, strict=True)]
        torch._foreach_addcdiv_(weights, means, roots, sizes)

    def _fused(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rates: Sequence[float],
        is_stopped: Tensor | None,
    ) -> None:
        """One kernel for the weights of each rate."""
        for rate in dict.fromkeys(rates):
            own = [place for place, other in enumerate(rates) if other == rate]
            here = [weights[place] for place in own]
            steps, means, squares = (
                [self.state[weight][name] for weight in here] for name in ("step", "exp_avg", "exp_avg_sq")
            )
            torch._fused_adamw_(
                here,
                [gradients[place] for place in own],
                means,
                squares,
                [],
                steps,
                lr=rate,
                beta1=BETAS[0],
                beta2=BETAS[1],
                weight_decay=self.weight_decay,
                eps=EPS,
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=is_stopped,
            )
            if is_stopped is not None:
                torch._foreach_sub_(steps, [is_stopped] * len(steps))

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

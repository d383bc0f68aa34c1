"""The forward pass: the loss of a pack, for training, held-out loss, plan and check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lorafit.data.packing import Pack
from lorafit.model.attention import PackedDocuments
from lorafit.model.definitions import wide
from lorafit.model.device import uploaded
from lorafit.model.llama import Llama, capped
from lorafit.model.lora import disable_adapter, evaluating
from lorafit.model.loss import loss_sum_and_parts
from lorafit.model.ops import uniform

FILL = 16


AT_ONCE = 128  # positions whose logits are alive at a time


@dataclass(frozen=True, slots=True)
class Below:
    """Where the stream (tokens, hidden_size) of a pack's documents before layer `layer` is kept, below which nothing is
    trained. `read` gives None where it is not there.
    """

    layer: int
    read: Callable[[Pack], Tensor | None]
    write: Callable[[Pack, Tensor], None]


def pack_loss(network: Llama, pack: Pack, below: Below | None = None) -> Tensor:
    """Sum of the weighted cross-entropy over a pack's supervised tokens, a scalar on the network's device."""
    return pack_losses(network, pack, below)[0]


def pack_losses(network: Llama, pack: Pack, below: Below | None = None) -> tuple[Tensor, Tensor]:
    """`pack_loss`, and its parts (targets,), the weighted cross-entropy of each target; both have a gradient."""
    supervised, targets = _supervised(network, pack, below)
    weights = None if pack.weights is None else uploaded(pack.weights, supervised.device)
    hidden, cap = network.normed(supervised), network.arch.logits_cap
    return loss_sum_and_parts(hidden, network.lm_head.weight, targets, weights, cap, network.trained_head)


def document_sums(values: Tensor, pack: Pack) -> Tensor:
    """The sum of `values` (targets,) over each document of a pack, (documents,), in float64 where the device has it.

    `pack.rows` are the rows of the documents.
    """
    wide = values if values.device.type == "mps" else values.double()
    return torch.stack([part.sum() for part in wide.split(pack.counts.tolist())])


def answer_logps(network: Llama, pack: Pack) -> tuple[Tensor, Tensor]:
    """(log-probability of each answer, negative log-probability of all that is supervised), both (documents,)."""
    _, parts = pack_losses(network, pack)
    everything = document_sums(parts, pack)
    if pack.in_answer is None or pack.in_answer.all():
        return -everything, everything
    in_answer = uploaded(pack.in_answer, parts.device)
    return -document_sums(parts * in_answer, pack), everything


def answer_tokens(pack: Pack) -> NDArray[np.int64]:
    """The supervised tokens of each answer, (documents,)."""
    in_answer = np.ones(len(pack.targets), np.bool_) if pack.in_answer is None else pack.in_answer
    ends = np.cumsum(pack.counts)
    return np.array([in_answer[end - size : end].sum() for end, size in zip(ends, pack.counts, strict=True)])


def pack_predictions(network: Llama, pack: Pack) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(cross-entropy of each target, whether it is the most probable token), both (targets,), without weights."""
    losses, is_first = [], []
    for hidden, targets in zip(
        _supervised(network, pack)[0].split(AT_ONCE),
        torch.from_numpy(pack.targets).split(AT_ONCE),
        strict=True,
    ):
        logits = network.logits(hidden).to("cpu", torch.float64)
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        is_first.append(logits.argmax(-1) == targets)
    return torch.cat(losses).numpy(), torch.cat(is_first).numpy()


def divergences(network: Llama, pack: Pack) -> tuple[Tensor, Tensor]:
    """Sum of KL(base || tuned) of the next token at a pack's targets, in nats, and its parts (targets,). The sum has a
    gradient. Only for passes of few targets: their logits are alive at the same time.
    """
    base, tuned = _log_probabilities(network, pack)
    each = _divergence(base, tuned)
    return each.sum(), each


def pack_drift(network: Llama, pack: Pack) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(KL(base || tuned) of each target in nats, whether the most probable token is another one), both (targets,)."""
    base, tuned = _log_probabilities(network, pack)
    each = _divergence(base, tuned)
    return each.double().cpu().numpy(), (base.argmax(-1) != tuned.argmax(-1)).cpu().numpy()


def _log_probabilities(network: Llama, pack: Pack) -> tuple[Tensor, Tensor]:
    """Those of the base and of the tuned model, each (targets, vocab_size)."""
    with disable_adapter(network), evaluating(network), torch.no_grad():
        base = _log_softmax(network, _supervised(network, pack)[0])
    return base, _log_softmax(network, _supervised(network, pack)[0])


def _divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned) of log-probabilities (targets, vocab_size), in nats (targets,)."""
    return F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)


def _log_softmax(network: Llama, supervised: Tensor) -> Tensor:
    logits = F.linear(network.normed(supervised), network.differentiable_head())
    return F.log_softmax(capped(logits.to(wide(logits.dtype)), network.arch.logits_cap), -1)


def next_logps(network: Llama, pack: Pack, most: int) -> Tensor:
    """Log-probabilities of all tokens, (positions, vocab_size), at the first `most` positions with a target."""
    return _log_softmax(network, _supervised(network, pack)[0][:most])


def _supervised(network: Llama, pack: Pack, below: Below | None = None) -> tuple[Tensor, Tensor]:
    """The stream (targets, hidden_size) at the positions of a pack whose next tokens are supervised, and these tokens,
    int64 (targets,), on the network's device.

    A last document without targets pads the pass to a multiple of FILL tokens: passes of the same size reuse freed
    memory, and products that are compiled for a size are compiled less often.
    """
    device = network.lm_head.weight.device
    ids, index, lengths = torch.from_numpy(pack.ids), torch.from_numpy(pack.index), pack.lengths
    if filler := -len(ids) % FILL:
        index = torch.cat([index, torch.arange(len(ids), len(ids) + filler)])
        ids, lengths = F.pad(ids, (0, filler)), (*lengths, filler)
    keys = noise = None
    if network.training and (device.type == "cpu" or network.neftune):
        keys = torch.empty_like(ids)
        keys[index] = torch.from_numpy(prefix_keys(ids[index].numpy(), lengths))
        if network.neftune:
            noise = _noise(network, keys.to(device), index.to(device), lengths)
        keys = keys if device.type == "cpu" else None
    also = ids, torch.from_numpy(pack.predict), torch.from_numpy(pack.targets)
    attend = PackedDocuments(lengths, device, index, also)
    ids, predict, targets = attend.also
    if below is None or len(pack.rows) != len(pack.lengths):  # an empty pack has no rows
        return network.hidden(ids, attend, predict, keys, noise), targets
    real, stream = index[: sum(pack.lengths)], below.read(pack)
    if stream is None:
        with torch.no_grad():
            whole = network.through(network.embedded(ids), attend, 0, below.layer)
        below.write(pack, whole[real])
    else:
        whole = stream.new_zeros(len(ids), stream.shape[1])
        whole[real] = stream
    last = len(network.decoder.layers)
    return network.through(whole, attend, below.layer, last, predict, keys), targets


def _noise(network: Llama, keys: Tensor, index: Tensor, lengths: Sequence[int]) -> Tensor:
    """NEFTune's noise (tokens, hidden_size) (Jain et al., 2023): uniform up to neftune / sqrt(L * hidden_size), where L
    is a row's tokens up to its last supervised one. The step's random state and the row's own tokens decide it.

    No document shares a prefix with another: their noise differs with their length.
    """
    width = network.arch.hidden_size
    seed = int(torch.randint(2**62, ()))  # from torch's generator, whose state a checkpoint holds
    sizes = torch.tensor([network.neftune / ((length + 1) * width) ** 0.5 for length in lengths])
    size = torch.empty(len(keys), device=keys.device)
    size[index] = sizes.repeat_interleave(torch.tensor(lengths)).to(keys.device)
    return uniform(seed, keys, width).mul_(size[:, None])


_ODD, _MIX = 0xD1342543DE82EF95, 0x9E3779B97F4A7C15  # multipliers with bits all over


def prefix_keys(ids: NDArray[np.int64], lengths: Sequence[int]) -> NDArray[np.int64]:
    """The dropout key of each token of concatenated documents: a hash of the token and all before it in its document.
    It is the sum over these of a mixed id times a power of an odd number, modulo 2**64.
    """
    powers = np.full(max(lengths), _ODD, np.uint64).cumprod()
    mixed = (ids.view(np.uint64) + np.uint64(1)) * np.uint64(_MIX)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.concatenate([powers[:length] for length in lengths])
    sums = mixed.cumsum()
    ends = np.cumsum(lengths)
    sums -= np.repeat(np.concatenate([[np.uint64(0)], sums[ends[:-1] - 1]]), lengths)
    return sums.view(np.int64)

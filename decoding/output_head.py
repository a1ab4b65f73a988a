"""Compute the output head's logits only where they are read, and sums over a vocabulary in parts.

A forward pass computes logits at every position, which with a vocabulary of 262,144 is most of the work and
the memory, though few are read. And the CPU's matrix product of a large vocabulary and few rows is up to
twice as fast with the vocabulary first.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TILE = 2**19  # logits of all rows together


@contextmanager
def narrowed_head(model: PreTrainedModel, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make the output head see `select(hidden states)` while the body runs.

    select: (rows, positions, d) -> (rows', positions', d), the shape of the model's logits then. A model
        without an output head of its own gives all logits: callers compare shapes.
    On the CPU the logits have contiguous columns and live in a buffer that the next pass overwrites.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    forward, had_own = head.forward, "forward" in vars(head)
    # Weights that are loaded on demand have a hook.
    is_plain = type(head) is nn.Linear and not hasattr(head, "_hf_hook")
    product = _TransposedProduct(head) if is_plain and head.weight.device.type == "cpu" else forward
    head.forward = lambda hidden: product(select(hidden))
    try:
        yield
    finally:
        if had_own:
            head.forward = forward
        else:
            del head.forward


class _TransposedProduct:
    """(weight @ hidden.T).T in a buffer that is kept: fresh memory costs as much as half a product."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.buffer = torch.empty(0, dtype=head.weight.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        shape = (len(self.head.weight), len(rows))
        if self.buffer.numel() < math.prod(shape):
            self.buffer = self.buffer.new_empty(0)  # frees the old memory first
            self.buffer = self.buffer.new_empty(math.prod(shape))
        out = self.buffer[: math.prod(shape)].view(shape)
        torch.mm(self.head.weight, rows.T, out=out)
        if self.head.bias is not None:
            out += self.head.bias[:, None]
        return out.T.unflatten(0, hidden.shape[:-1])


def total_weight(logits: Tensor, highest: Tensor, temperature: float = 1.0) -> Tensor:
    """Return exp((logit - highest) / temperature) summed over the vocabulary, (rows,) float64.

    logits: (rows, vocabulary); highest: (rows,) the largest of each row.
    """
    total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for tile in _tiles(logits):
        total += (tile.float() - highest[:, None]).div_(temperature).exp_().sum(1)
    return total


def token_log_likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log p(token) for each row, (rows,) float64, from logits (rows, vocabulary)."""
    chosen = logits.gather(1, tokens[:, None])[:, 0].double()
    totals, tiles = [], _tiles(logits)
    buffer = torch.empty_like(tiles[0], dtype=torch.float32)  # one for all tiles: fresh memory is slow
    for tile in tiles:
        weights = buffer[:, : tile.shape[1]].copy_(tile)
        highest = weights.amax(1).clamp(min=torch.finfo(weights.dtype).min)  # where all are -inf
        totals.append(highest + weights.sub_(highest[:, None]).exp_().sum(1).double().log())
    return chosen - torch.stack(totals, 1).logsumexp(1)


def _tiles(logits: Tensor) -> tuple[Tensor, ...]:
    """Return the logits in parts of the vocabulary, small enough for the CPU's cache."""
    size = TILE if logits.device.type == "cpu" else 2**7 * TILE
    return logits.split(max(1, size // max(1, len(logits))), dim=1)

"""Ask a model's output head for the logits that are read and no others.

A forward pass computes logits at every position, though generation reads the last one and
perplexity those of the continuation: with a vocabulary of 262,144 that is most of the work and of
the memory. And of the two ways to multiply a large vocabulary by few rows, the CPU's matrix
product is up to twice as fast with the vocabulary first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_models import ARCHITECTURES, tiny_model

PART = 8192


@contextmanager
def narrowed_head(model: PreTrainedModel, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make the output head see `select(hidden states)` while the body runs.

    select: (rows, positions, d) -> (rows', positions', d); the model's logits are then
        (rows', positions', vocabulary). A model without an output head of its own is left alone and
        gives all logits: callers compare shapes.
    On the CPU the logits have contiguous columns (of one token over all places) and live in a
    buffer that the next forward pass writes over.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    forward, had_own = head.forward, "forward" in vars(head)
    product = _TransposedProduct(head) if _is_plain_on_cpu(head) else forward
    head.forward = lambda hidden: product(select(hidden))
    try:
        yield
    finally:
        if had_own:
            head.forward = forward
        else:
            del head.forward


def _is_plain_on_cpu(head: nn.Module) -> bool:
    """Tell whether the head is a matrix in memory; one that is loaded on demand has a hook."""
    return type(head) is nn.Linear and head.weight.device.type == "cpu" and not hasattr(head, "_hf_hook")


class _TransposedProduct:
    """(weight @ hidden.T).T, in a kept buffer: fresh memory costs as much as half the product."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.buffer = torch.empty(0, dtype=head.weight.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        size = len(self.head.weight)
        if self.buffer.numel() < size * len(rows):
            self.buffer = torch.empty(size * len(rows), dtype=self.head.weight.dtype)
        out = self.buffer[: size * len(rows)].view(size, len(rows))
        torch.mm(self.head.weight, rows.T, out=out)
        if self.head.bias is not None:
            out += self.head.bias[:, None]
        return out.T.unflatten(0, hidden.shape[:-1])


def total_weight(logits: Tensor, highest: Tensor, temperature: float = 1.0) -> Tensor:
    """Return exp((logit - highest) / temperature) summed over the vocabulary, (rows,) float64.

    logits: (rows, vocabulary); highest: (rows,) the largest of each row. Goes through the
    vocabulary in parts, since temporaries as large as the logits cost more than the sum.
    """
    total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for part in logits.split(PART, dim=1):
        total += ((part.float() - highest[:, None]) / temperature).exp_().sum(1)
    return total


def token_log_likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log p(token) for each row, (rows,) float64, from logits (rows, vocabulary)."""
    highest = logits.amax(1).float()
    chosen = logits.gather(1, tokens[:, None])[:, 0].double()
    return chosen - highest - total_weight(logits, highest).log()


@torch.inference_mode()
def main() -> None:
    """Check on every tiny architecture that the last position's logits are those of a whole pass."""
    tokens = torch.arange(12).view(2, 6)
    for name in ARCHITECTURES:
        model = tiny_model(name)
        whole = model(tokens).logits
        with narrowed_head(model, lambda hidden: hidden[:, -1:]):
            last = model(tokens).logits
            assert last.shape[1] == 1, name
            assert torch.allclose(last, whole[:, -1:], atol=1e-5), name
        assert torch.equal(model(tokens).logits, whole), name
    print(f"output_head OK: one position has the same logits in {len(ARCHITECTURES)} architectures")


if __name__ == "__main__":
    main()

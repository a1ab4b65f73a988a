"""Ask a model's output head for the logits that are read and no others.

A forward pass computes logits at every position, though generation reads the last one and
perplexity those of the continuation: with a vocabulary of 262,144 that is most of the work and of
the memory. And of the two ways to multiply a large vocabulary by few rows, the CPU's matrix
product is up to twice as fast with the vocabulary first. Where only the largest logits are read, a
product in bfloat16 finds the tokens that may have them, and only those are computed as they should be.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PART = 8192
TILE = 2**19  # logits, of all rows together
BLOCK = 32
WHOLE_FROM = 4  # a share of the vocabulary, 1 / this, from which all of it is as fast
SCREENED_VOCABULARY = 2**16  # in a smaller one the product in bfloat16 saves little


@contextmanager
def narrowed_head(
    model: PreTrainedModel, select: Callable[[Tensor], Tensor]
) -> Iterator["NarrowedHead | None"]:
    """Make the output head see `select(hidden states)` while the body runs.

    select: (rows, positions, d) -> (rows', positions', d); the model's logits are then
        (rows', positions', vocabulary). A model without an output head of its own is left alone and
        gives all logits: callers compare shapes, and get None.
    On the CPU the logits have contiguous columns (of one token over all places) and live in a
    buffer that the next forward pass writes over.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield None
        return
    forward, had_own = head.forward, "forward" in vars(head)
    head.forward = narrowed = NarrowedHead(head, select)
    try:
        yield narrowed
    finally:
        if isinstance(narrowed.product, ScreenedProduct):
            narrowed.product.forget()
        if had_own:
            head.forward = forward
        else:
            del head.forward


class NarrowedHead:
    """What a model calls instead of its output head."""

    def __init__(self, head: nn.Module, select: Callable[[Tensor], Tensor]) -> None:
        self.head = head
        self.select = select
        # Weights that are loaded on demand have a hook.
        is_plain = type(head) is nn.Linear and not hasattr(head, "_hf_hook")
        on_cpu = is_plain and head.weight.device.type == "cpu"
        self.product = TransposedProduct(head) if on_cpu else head.forward
        self.selected = torch.empty(0)

    def __call__(self, hidden: Tensor) -> Tensor:
        self.selected = self.select(hidden)
        return self.product(self.selected)

    @property
    def tokens(self) -> Tensor | None:
        """The tokens, ascending, whose logits the last forward pass gave; None means the whole vocabulary."""
        return self.product.tokens if isinstance(self.product, ScreenedProduct) else None

    def screen(self, n_largest: int, first_logits: Tensor) -> bool:
        """Let later passes give the logits of fewer tokens, and tell whether they will.

        The n_largest largest of each place, and what ties with them, are among those; they are the
        same tokens for all places. Done where it saves time and the model hands on the head's
        product as it is; one that changes logits by their place in the vocabulary would change the
        wrong ones. That is checked on the logits of the last pass's first place, (vocabulary,).
        """
        if not isinstance(self.product, TransposedProduct) or not _screening_pays(self.head, n_largest):
            return False
        weight = self.head.weight
        if not self.selected.numel() or first_logits.shape != weight.shape[:1]:
            return False
        first = weight @ self.selected[0, 0]
        if not torch.allclose(first_logits, first, rtol=1e-4, atol=1e-4 * first.abs().max().item()):
            return False
        self.product = _screens.setdefault(self.head, ScreenedProduct())
        self.product.prepare(weight, n_largest)
        return True


def _screening_pays(head: nn.Linear, n_largest: int) -> bool:
    """Tell whether this CPU multiplies bfloat16 faster than the head's float32, and much can be left out."""
    capabilities = torch.cpu.get_capabilities()
    is_fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    is_large = len(head.weight) >= max(SCREENED_VOCABULARY, n_largest * BLOCK)
    return bool(is_fast) and is_large and head.weight.dtype == torch.float32 and head.bias is None


class _Memory:
    """Memory that is used again: fresh memory costs as much as half a product."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.flat = torch.empty(0, dtype=dtype)

    def view(self, *shape: int) -> Tensor:
        if self.flat.numel() < math.prod(shape):
            self.flat = self.flat.new_empty(0)  # gives the old memory back first
            self.flat = torch.empty(math.prod(shape), dtype=self.flat.dtype)
        return self.flat[: math.prod(shape)].view(shape)


class TransposedProduct:
    """(weight @ hidden.T).T, in kept memory."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.out = _Memory(head.weight.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = self.out.view(len(self.head.weight), len(rows))
        torch.mm(self.head.weight, rows.T, out=out)
        if self.head.bias is not None:
            out += self.head.bias[:, None]
        return out.T.unflatten(0, hidden.shape[:-1])


class ScreenedProduct:
    """The product of `TransposedProduct`, for those tokens only that may be among some place's n largest.

    With w' and h' the bfloat16 values of weights w and of a hidden state h, both of length d, the
    product in bfloat16 is off by at most (Cauchy-Schwarz)
        e = |w - w'| |h| + |w'| |h - h'| + d 2^-23 |w| |h|,
    whose last term is for the sums in float32, here and in the exact product, and by 2^-8 of itself
    once it is rounded. The n-th largest of the maxima of blocks of tokens, less that, is a lower bound
    for the n-th largest logit. A token that even with that added stays below it, for every place, is
    left out. The others, mostly a few thousand, get their float32 logit for all places.

    tokens: (chosen,) of the last product, ascending; None where they were all.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.rounded, self.rough, self.near = (_Memory(torch.bfloat16) for _ in range(3))
        self.is_below = _Memory(torch.bool)
        self.chosen, self.out = (_Memory(torch.float32) for _ in range(2))

    def prepare(self, weight: Tensor, n: int) -> None:
        """Round the weights, (vocabulary, d) float32, as they are now. n: no more than vocabulary / BLOCK."""
        self.weight = weight.detach()
        self.n = n
        self.tokens = None
        rounded = self.rounded.view(*weight.shape).copy_(self.weight)
        parts = list(zip(self.weight.split(PART), rounded.split(PART), strict=True))
        self.rounding = max((part - rounded_part).norm(dim=1).max() for part, rounded_part in parts)
        self.longest = max(part.norm(dim=1).max() for part, _ in parts)

    def forget(self) -> None:
        """Let go of the weights, which their model may replace; the memory stays."""
        self.weight = self.tokens = None

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        tokens = self._possible(rows)
        weight, self.tokens = self.weight, None
        if len(tokens) * WHOLE_FROM < len(weight):
            chosen = self.chosen.view(len(tokens), weight.shape[1])
            weight, self.tokens = torch.index_select(weight, 0, tokens, out=chosen), tokens
        out = torch.mm(weight, rows.T, out=self.out.view(len(weight), len(rows)))
        return out.T.unflatten(0, hidden.shape[:-1])

    def _possible(self, rows: Tensor) -> Tensor:
        """Return the tokens that may be among the n largest of one of the rows (rows, d), ascending."""
        (size, d), n_rows = self.weight.shape, len(rows)
        n_blocks = size // BLOCK
        rounded = rows.bfloat16()
        rough = self.rough.view(size, n_rows)
        torch.mm(self.rounded.view(*self.weight.shape), rounded.T, out=rough)
        blocks = rough[: n_blocks * BLOCK].unflatten(0, (n_blocks, BLOCK))
        maxima = blocks.amax(1)
        n_th = maxima.T.contiguous().topk(self.n).values[:, -1].float()
        lengths = rows.norm(dim=1)
        error = (self.rounding + d * 2**-23 * self.longest) * lengths
        error += (self.longest + self.rounding) * (rows - rounded).norm(dim=1)
        # One error is for the n-th largest, one for the token that is compared with it.
        bound = n_th - n_th.abs() * 2**-8 - 2 * error
        # Its own rounding keeps the order, but what is compared with it was rounded, too.
        bound = (bound - bound.abs() * 2**-7).bfloat16()
        # "Not below" keeps what is not a number, for the sampler to refuse.
        near = (~(maxima < bound)).any(1).nonzero()[:, 0]
        shape = (len(near), BLOCK, n_rows)
        values = torch.index_select(blocks, 0, near, out=self.near.view(*shape))
        is_below = torch.lt(values, bound, out=self.is_below.view(*shape))
        block, offset = (~is_below.all(2)).nonzero().unbind(1)
        return torch.cat([near[block] * BLOCK + offset, torch.arange(n_blocks * BLOCK, size)])


# Each head's screen stays as long as the head, since its memory is large and fresh memory slow.
_screens: WeakKeyDictionary[nn.Module, ScreenedProduct] = WeakKeyDictionary()


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
    room = torch.empty_like(tiles[0], dtype=torch.float32)  # one for all tiles, since fresh memory is slow
    for tile in tiles:
        weights = room[:, : tile.shape[1]].copy_(tile)
        highest = weights.amax(1).clamp(min=torch.finfo(weights.dtype).min)  # where all are -inf
        totals.append(highest + weights.sub_(highest[:, None]).exp_().sum(1).double().log())
    return chosen - torch.stack(totals, 1).logsumexp(1)


def _tiles(logits: Tensor) -> tuple[Tensor, ...]:
    """Return the logits in parts of the vocabulary, so small that what is made of one stays in the cache."""
    size = TILE if logits.device.type == "cpu" else 2**7 * TILE
    return logits.split(max(1, size // max(1, len(logits))), dim=1)


@torch.inference_mode()
def main() -> None:
    """Check that the last position has a whole pass's logits, and that screening keeps the largest."""
    from support.tiny_models import tiny_model

    model, tokens = tiny_model(), torch.arange(12).view(2, 6)
    with narrowed_head(model, lambda hidden: hidden[:, -1:]):
        last = model(tokens).logits
    assert torch.allclose(last, model(tokens).logits[:, -1:], atol=1e-5)
    weight, state, product = torch.randn(50_000, 64), torch.randn(1, 1, 64), ScreenedProduct()
    product.prepare(weight, 50)
    assert torch.allclose(product(state).topk(50).values, (state @ weight.T).topk(50).values, rtol=1e-5)
    print(f"output_head OK: {len(product.tokens):,} of 50,000 tokens are left, the 50 largest among them")


if __name__ == "__main__":
    main()

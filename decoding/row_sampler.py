"""Choose each row's next token from its logits and a random number of its own (phase 4).

Temperature, top-k and top-p apply in this order, as in transformers. The choice inverts the cumulative
distribution over tokens in descending order of probability (equal ones in ascending order of their id). The
largest few hundred logits decide for most rows, and a row that they leave undecided gets more.
"""

import hashlib

import torch
from torch import Tensor

from decoding.output_head import total_weight
from support.errors import InputError
from support.vocabulary import LOWEST_TEMPERATURE

BLOCK = 64
FIRST_SIZES = (256, 4096)
MARGIN = 14  # for ties with the k-th logit, which transformers keeps all


class RowSampler:
    """Sampling settings; `choose` draws a token for each row.

    temperature: 0 means the most probable token. top_k: 0 means no limit. top_p: 1 means no limit.
    """

    def __init__(self, temperature: float = 1.0, top_k: int = 50, top_p: float = 1.0) -> None:
        """Raises InputError for an option out of range."""
        if temperature != 0 and not LOWEST_TEMPERATURE <= temperature < float("inf"):
            raise InputError(
                f"temperature is {temperature}, expected 0 (greedy) or {LOWEST_TEMPERATURE} or more"
            )
        if top_k < 0:
            raise InputError(f"top_k is {top_k}, expected 0 (no limit) or more")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}, expected above 0 and at most 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    @torch.inference_mode()
    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Return the chosen token of each row, (rows,) int64.

        logits: (rows, vocabulary), any float dtype; with contiguous rows or contiguous columns.
        uniform: (rows,) numbers in [0, 1), on any device.
        Raises InputError: logits that are not finite.
        """
        n_rows, size = logits.shape
        uniform = uniform.to(logits.device)
        sizes = [self.top_k + MARGIN] if self.top_k else FIRST_SIZES
        sizes = [1] if self.temperature == 0 else [*(n for n in sizes if n < size), size]
        values, tokens = largest(logits, sizes[0])
        if not values[:, 0].isfinite().all():
            raise InputError("the logits are not finite; lower alpha, or use bfloat16 or float32")
        chosen = tokens[:, 0]
        if self.temperature == 0:
            return chosen
        total = None if self.top_k else total_weight(logits, values[:, 0], self.temperature)
        undecided = torch.arange(n_rows, device=logits.device)
        for n in sizes:
            if n > sizes[0]:
                values, tokens = largest(logits[undecided], n)
            rank, is_certain = self._draw(
                values.double(), uniform[undecided], None if total is None else total[undecided], n == size
            )
            chosen = chosen.index_copy(0, undecided, tokens.gather(1, rank)[:, 0])
            undecided = undecided[~is_certain]
            if not len(undecided):
                break
        return chosen

    def _draw(
        self, values: Tensor, uniform: Tensor, total: Tensor | None, is_whole: bool
    ) -> tuple[Tensor, Tensor]:
        """Return each choice's rank among its row's descending values, (rows, 1), and whether it is certain.

        total: (rows,) the weight of the whole vocabulary, exp((logit - highest) / temperature) summed.
        """
        # The largest becomes 0 first, so that a tiny temperature cannot overflow.
        weights = ((values - values[:, :1]) / self.temperature).exp()
        lowest = values[:, -1]
        is_certain = torch.ones_like(lowest, dtype=torch.bool)
        if total is None:
            k_th = values[:, self.top_k - 1]
            weights = weights.where(values >= k_th[:, None], 0.0)
            is_certain = lowest < k_th
            total = weights.sum(-1)
        cumulative = weights.cumsum(-1)
        if self.top_p < 1:
            # A token stays while those before it hold less than top_p: the first always does.
            nucleus = cumulative - weights < self.top_p * total[:, None]
            is_certain = is_certain & (~nucleus[:, -1] | (weights[:, -1] == 0))
            weights = weights.where(nucleus, 0.0)
            cumulative = weights.cumsum(-1)
            total = cumulative[:, -1]
        elif is_whole:
            total = cumulative[:, -1]
        rank = torch.searchsorted(cumulative, (uniform.double() * total)[:, None], right=True)
        last_possible = (weights > 0).sum(-1, keepdim=True) - 1
        is_inside = rank[:, 0] <= last_possible[:, 0]
        rank = rank.minimum(last_possible)
        # Of values that tie with the lowest one, some may not be here.
        is_certain = is_certain & is_inside & (values.gather(1, rank)[:, 0] > lowest)
        return rank, is_certain | is_whole


def largest(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n largest values of each row and their tokens, each (rows, n).

    Values descend; equal ones are in ascending order of token. Of several that tie with the n-th, any may be
    among the n; n = 1 takes the first. With contiguous columns, as `output_head.narrowed_head` makes them,
    the n blocks of the vocabulary with the largest maxima are searched, where the n largest lie.
    """
    size = logits.shape[1]
    if n == size:
        return logits.float().sort(dim=-1, descending=True, stable=True)
    n_blocks = size // BLOCK
    if logits.stride(0) >= logits.stride(1) or n * 8 > n_blocks:
        values, tokens = _top(logits, n)
    else:
        values, tokens = _largest_of_blocks(logits, n, n_blocks)
    tokens, order = tokens.sort(dim=-1)
    values, order = values.gather(1, order).float().sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def _top(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the n largest of each row and their indices; max takes the first of equal ones, topk any."""
    return values.max(dim=-1, keepdim=True) if n == 1 else values.topk(n, dim=-1)


def _largest_of_blocks(logits: Tensor, n: int, n_blocks: int) -> tuple[Tensor, Tensor]:
    size, device = logits.shape[1], logits.device
    in_blocks = n_blocks * BLOCK
    maxima = logits.T[:in_blocks].unflatten(0, (n_blocks, BLOCK)).amax(1).T.contiguous()
    _, blocks = _top(maxima, n)
    tokens = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=device)).flatten(1)
    rest = torch.arange(in_blocks, size, device=device).expand(len(tokens), -1)
    tokens = torch.cat([tokens, rest], dim=1)
    values, indices = _top(logits.gather(1, tokens), n)
    return values, tokens.gather(1, indices)


def row_uniforms(seed: int, prompt: str, n_steps: int) -> Tensor:
    """Return (n_steps,) float32 numbers in [0, 1) that depend on the seed and the prompt alone."""
    key = hashlib.sha256(f"{seed}\x00{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.rand(n_steps, generator=generator)

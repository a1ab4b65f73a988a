"""Choose each row's next token from its logits and a random number of its own (phase 4).

Temperature, top-k and top-p apply in this order, as in transformers. The choice inverts the cumulative
distribution over tokens in descending order of probability (equal ones in ascending order of their id). The
largest few hundred logits decide for most rows, and a row that they leave undecided gets more.

The host would have to wait for an accelerator to learn which rows are undecided. There, a limit of k is
decided for all rows by their k largest logits and a count of those that tie with the k-th; only without such
a limit is one value read at each step.
"""

import hashlib

import torch
from torch import Tensor

from decoding.output_head import total_weight
from support.errors import InputError
from support.vocabulary import LOWEST_TEMPERATURE

NOT_FINITE = -1  # stands for the token of a row whose logits are not finite
BLOCK = 64
FIRST_SIZES = (256, 4096)
MARGIN = 14  # on the CPU, for ties with the k-th logit, which transformers keeps all


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
        """Return the chosen token of each row, (rows,) int64; NOT_FINITE where its logits are not.

        logits: (rows, vocabulary), any float dtype; with contiguous rows or contiguous columns.
        uniform: (rows,) numbers in [0, 1), on any device.
        """
        if logits.dtype == torch.float64:
            logits = logits.float()
        uniform = uniform.to(logits.device)
        if self.temperature == 0:
            values, tokens = largest(logits, 1)
            chosen = tokens[:, 0]
        elif self.top_k and logits.device.type != "cpu":
            values, chosen = self._choose_among_ties(logits, uniform)
        elif self.top_k:
            values, chosen = self._choose_among_few(logits, uniform)
        else:
            values, chosen = self._choose_by_parts(logits, uniform)
        return chosen.where(values[:, 0].isfinite(), NOT_FINITE)

    def _choose_by_parts(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's largest logits, descending, and its token; undecided rows get more logits."""
        size = logits.shape[1]
        sizes = [*(n for n in FIRST_SIZES if n < size), size]
        values, tokens = largest(logits, sizes[0])
        highest = values
        total = total_weight(logits, values[:, 0], self.temperature)
        chosen, undecided = tokens[:, 0], torch.arange(len(logits), device=logits.device)
        for n in sizes:
            if n > sizes[0]:
                values, tokens = largest(logits[undecided], n)
            rank, is_certain = self._draw(values, uniform[undecided], total[undecided], n == size)
            chosen = chosen.index_copy(0, undecided, tokens.gather(1, rank)[:, 0])
            undecided = undecided[~is_certain]
            if not len(undecided):
                break
        return highest, chosen

    def _choose_among_few(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's largest logits, descending, and its token, for most within a margin."""
        size = logits.shape[1]
        values, tokens = largest(logits, min(size, self.top_k + MARGIN))
        rank, is_certain = self._draw(values, uniform, None, values.shape[1] == size)
        chosen = tokens.gather(1, rank)[:, 0]
        if not is_certain.all():
            undecided = (~is_certain).nonzero()[:, 0]
            _, rest = self._choose_among_ties(logits[undecided], uniform[undecided])
            chosen = chosen.index_copy(0, undecided, rest)
        return values, chosen

    def _choose_among_ties(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's k largest logits, descending, and its token, however many tie with the k-th.

        The weight of those above the k-th is summed, that of those that tie with it is a multiple. No shape
        depends on a value, so that nothing has to be read from the device.
        """
        values, tokens = largest(logits, self.top_k)
        k_th = values[:, -1:]
        is_tied = logits == k_th
        weights = self._weights(values)
        above, tied_weight = weights.where(values > k_th, 0.0), weights[:, -1:]
        cumulative, n_tied = above.cumsum(-1), is_tied.sum(-1, keepdim=True).double()
        total = cumulative[:, -1:] + n_tied * tied_weight
        if self.top_p < 1:
            # A token stays while those before it hold less than top_p: the first always does.
            limit = self.top_p * total
            n_tied = ((limit - cumulative[:, -1:]) / tied_weight).ceil().clamp(min=0.0).minimum(n_tied)
            above = above.where(cumulative - above < limit, 0.0)
            cumulative = above.cumsum(-1)
            total = cumulative[:, -1:] + n_tied * tied_weight
        place = uniform.double()[:, None] * total
        rank = torch.searchsorted(cumulative, place, right=True)
        nth = ((place - cumulative[:, -1:]) / tied_weight).floor().minimum(n_tied - 1).clamp(min=0.0)
        counted = is_tied.cumsum(-1, dtype=torch.int32).contiguous()
        tied = torch.searchsorted(counted, (nth + 1).int()).clamp(max=logits.shape[1] - 1)
        ranked = tokens.gather(1, rank.clamp(max=self.top_k - 1))
        return values, ranked.where(rank < self.top_k, tied)[:, 0]

    def _weights(self, values: Tensor) -> Tensor:
        """Return the weights of descending logits, float64. The first is 1: no temperature overflows."""
        return ((values.double() - values[:, :1]) / self.temperature).exp()

    def _draw(
        self, values: Tensor, uniform: Tensor, total: Tensor | None, is_whole: bool
    ) -> tuple[Tensor, Tensor]:
        """Return each choice's rank among its row's descending values, (rows, 1), and whether it is certain.

        total: (rows,) the weight of the whole vocabulary, exp((logit - highest) / temperature) summed.
        """
        weights = self._weights(values)
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
        rank = rank.minimum(last_possible).clamp(min=0)  # below 0 where logits are not finite
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
    maxima = logits.T[:in_blocks].unflatten(0, (n_blocks, BLOCK))
    while maxima.shape[1] > 1:  # by halves: amax takes ten times as long in bfloat16
        maxima = torch.maximum(*maxima.chunk(2, dim=1))
    _, blocks = _top(maxima[:, 0].T.contiguous(), n)
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

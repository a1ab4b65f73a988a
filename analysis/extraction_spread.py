"""Say how far another sample of the extraction texts would move persona vectors, and their effects.

The texts are resampled with replacement (the bootstrap, Efron 1979), as activations that are read once.
Activations here are (n, blocks, d): of n texts, at the blocks of all layer pairs.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

N_RESAMPLES = 200
FEWEST_TEXTS = 4  # of a part; resamples of fewer are hardly ever different from each other
# What `resampled_vectors.pt` says of itself.
ABOUT_RESAMPLED = (
    "Persona vectors from resampled extraction texts. vectors: persona -> `oracle` or `ridge_mapped` -> "
    "(resamples, blocks, d_target) float32, rows of unit norm at the target's decoder blocks of layer_pairs: "
    "those that steer on development questions. personas: over all n_resamples, median and middle 95 % (low, "
    "high) of the cosine of mapped and native vector, also without massive dimensions, and of the vectors of "
    "source and target to those of all texts; means over layer_pairs. not_resampled: why not."
)
Transform = Callable[[Tensor], Tensor]  # of directions, (n, d_source) to (n, d_target)
Spread = dict[str, float]


def resampled_vectors(
    positive: Tensor, negative: Tensor, are_pairs: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the vectors of all texts, (1, blocks, d), and of N_RESAMPLES samples of as many, of unit norm.

    positive, negative: activations. With `are_pairs`, text i of both is drawn together. Those of two models
    of equal sizes are resampled alike under one seed.
    """
    generator = torch.Generator().manual_seed(seed)
    whole, found = torch.zeros(1, 1), torch.zeros(1, 1)
    for part in [positive - negative] if are_pairs else [positive, -negative]:
        drawn = torch.randint(len(part), (N_RESAMPLES, len(part)), generator=generator)
        counts = torch.zeros(drawn.shape).scatter_add_(1, drawn, torch.ones(drawn.shape))
        # Deviations from the mean are resampled, since activations may be large where differences are small.
        mean = part.mean(0, keepdim=True)
        whole = whole + mean
        found = found + mean + torch.einsum("rn,nbd->rbd", counts / len(part), part - mean)
    return normalize(whole, dim=-1), normalize(found, dim=-1)


def cosine_spread(found: Tensor, other: Tensor) -> Spread:
    """Return median, low and high (middle 95 %) over resamples of a cosine, its mean over blocks.

    found, other: (N_RESAMPLES, blocks, d), or (1, blocks, d) of all texts.
    """
    cosines = cosine_similarity(found, other, dim=-1).mean(1).numpy()
    low, median, high = map(float, np.percentile(cosines, (2.5, 50, 97.5)))
    return {"median": median, "low": low, "high": high}


def mapped_spread(
    source: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    transforms: Sequence[Transform],
    massive_dimensions: Sequence[Sequence[int]],
) -> tuple[Tensor, dict[str, Spread]]:
    """Return the mapped vectors of the resamples, of unit norm, and the spread of cosines to native ones.

    source, target: vectors of all texts, (1, blocks, d), and of the resamples. transforms,
    massive_dimensions: at each block. all_texts: the cosine without resampling.
    """
    all_texts, resampled = (
        normalize(torch.stack([of(vectors[:, at]) for at, of in enumerate(transforms)], 1), dim=-1)
        for vectors in source
    )
    kept = torch.ones_like(target[0])
    for block, left_out in enumerate(massive_dimensions):
        kept[0, block, list(left_out)] = 0.0
    spread = {}
    for name, dimensions in (("cosine_to_oracle", 1.0), ("cosine_without_massive", kept)):
        whole, found = (
            cosine_spread(mapped * dimensions, native * dimensions)
            for mapped, native in zip((all_texts, resampled), target, strict=True)
        )
        spread[name] = {"all_texts": whole["median"], **found}
    return resampled, spread


def effect_spread(scores: Sequence[Sequence[float | None]]) -> dict[str, float | int] | None:
    """Return the standard deviation over resampled vectors of the mean score, and what sampling explains.

    scores: of the texts that each vector steered, on the same prompts; a prompt that lacks one is left out.
    std_sampling: what the deviation would be if vectors differed by the chance of their texts alone, from the
    interaction of vectors and prompts (two-way analysis of variance). None: fewer than two of either.
    """
    table = np.array(scores, dtype=float)
    table = table[:, np.isfinite(table).all(axis=0)]
    n_vectors, n_prompts = table.shape
    if min(n_vectors, n_prompts) < 2:
        return None
    means = table.mean(axis=1)
    residual = table - means[:, None] - table.mean(axis=0) + table.mean()
    variance = float((residual**2).sum()) / ((n_vectors - 1) * (n_prompts - 1))
    sampling = math.sqrt(variance / n_prompts)
    return {"std": float(means.std(ddof=1)), "std_sampling": sampling, "n_prompts": n_prompts}

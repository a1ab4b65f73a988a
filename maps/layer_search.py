"""Search every source layer against every target layer for the best layer pair (phase 1).

One pass over neutral text keeps the activations of all layers of both models in memory, in the dtype in
which the model has computed them; then each pair of layers gets a ridge map, its held-out R2, and the
agreement of mapped with native persona vectors. No test prompt is used.

Products are float32 around the training mean, which is enough to rank pairs (R2 to about 1e-4); the chosen
pair is fitted again in float64. Memory grows with the text: 60 layers of 4,096 in bfloat16 take 0.5 MB a
pair, 23 GiB for the default amount of text. On CUDA products and algebra are on the target's device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from activation_extractor import ActivationExtractor, massive_by_scale, paired_activations
from maps.layer_bands import LayerPair
from maps.pair_collection import counted
from ridge_mapping import HeldOutFold, algebra_device, assign_folds, target_weights
from support.errors import InputError
from support.pair_statistics import Moments
from support.progress import Bar, each
from texts.neutral_text import NeutralText
from texts.personas import Persona

SEARCH_LAMBDAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
N_RANDOM = 2000  # random directions; enough for their 99.9th percentile
CHANCE_QUANTILE = 0.999
MAX_KEPT_BYTES = 24 * 2**30  # of memory for the activations
N_PARTS = 5  # of the documents; one part is held out
KeptLayers = dict[int, list[Tensor]]  # layer_idx -> activations of all pairs, a batch after the other


@dataclass(frozen=True)
class LayerSearch:
    """Hold the scores of every layer pair; arrays are (n_source, n_target).

    r2, r2_standardised: held-out, at the lambda that is best for the pair.
    agreement: persona -> cosine of its mapped to its native vector, after massive dimensions
        and the personas' common mean vector are removed from both.
    other_persona: persona -> the highest such cosine to the native vector of another persona.
    chance: 99.9th percentile of such cosines of random source directions, which have the covariance
        of the source's activations.
    score: mean over the scored personas of agreement minus the larger of other_persona and chance.
    best: the layer pair with the highest score.
    """

    source_layers: list[int]
    target_layers: list[int]
    r2: Tensor
    r2_standardised: Tensor
    agreement: dict[str, Tensor]
    other_persona: dict[str, Tensor]
    chance: Tensor
    score: Tensor
    best: LayerPair
    n_pairs: int
    n_tokens: dict[str, int]

    def content(self) -> dict[str, Any]:
        """Return everything as numbers and lists."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return value.tolist() if isinstance(value, Tensor) else value

        return plain(vars(self))


@dataclass(frozen=True)
class CentredLayer:
    """A layer's activations around their mean over the training pairs.

    mean, scale: (d,) float64, the mean and the root mean square of each dimension over the training pairs.
    parts: those of the training and of the held-out pairs, (n, d) float32.
    """

    mean: Tensor
    scale: Tensor
    parts: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, rows: Tensor, is_held_out: Tensor) -> "CentredLayer":
        """Take rows (n, d) of any float dtype and for each whether it is held out, on one device."""
        train, test = rows[~is_held_out].float(), rows[is_held_out].float()
        mean = train.mean(0, dtype=torch.float64)
        scale = train.square().mean(0, dtype=torch.float64).sqrt()
        return cls(mean, scale, (train - mean.float(), test - mean.float()))

    def products(self, other: "CentredLayer") -> list[Tensor]:
        """Return X'Y of the training and of the held-out pairs, (d, other d) float64."""
        return [(x.T @ y).double() for x, y in zip(self.parts, other.parts, strict=True)]


def pair_moments(
    source: CentredLayer, target: CentredLayer, gram: Sequence[Tensor]
) -> tuple[Moments, Moments]:
    """Return the moments of the training and the held-out pairs; gram: the source's products with itself.

    Only the diagonal of the target's Gram matrix is known; the rest is 0.
    """
    squares = [y.square().sum(0, dtype=torch.float64).diag() for y in target.parts]
    train, test = (
        Moments(len(y), source.mean, target.mean, *products)
        for y, *products in zip(target.parts, gram, source.products(target), squares, strict=True)
    )
    return train, test


def check_memory(row_bytes: int, n_tokens: int) -> None:
    """Raise InputError: activations of all searched layers, row_bytes a token, need over 24 GiB."""
    needed = row_bytes * n_tokens
    if needed > MAX_KEPT_BYTES:
        raise InputError(
            f"the layer search keeps {row_bytes / 1e3:.0f} kB a token, {needed / 2**30:.0f} GiB for "
            f"{n_tokens} tokens, expected {MAX_KEPT_BYTES / 2**30:.0f} GiB at most; lower search_tokens, "
            "or name fewer layers in search_source_layers and search_target_layers"
        )


def search_layers(
    source: ActivationExtractor,
    target: ActivationExtractor,
    texts: Sequence[NeutralText],
    personas: Sequence[Persona],
    scored: Sequence[str],
    lambda_values: Sequence[float] = SEARCH_LAMBDAS,
    position: str = "mean",
    positions: str = "aligned",
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    seed: int = 0,
) -> LayerSearch:
    """Return R2 and agreement for every pair of layers, and the best pair.

    texts: neutral passages; a fifth of their documents is held out.
    personas: at least 2; each is another persona for the others. scored: names over which the score is
        averaged. position: token of a persona text, see `ActivationExtractor`. positions: tokens of neutral
        text, see `paired_activations`. lambda_values: relative, see `RidgeMapping`.
    source_layers, target_layers: layers to search, by default all.
    Raises InputError: too few documents or pairs.
    """
    n_documents = len({item.document for item in texts})
    if n_documents < N_PARTS:
        raise InputError(
            f"the layer search got {len(texts)} texts of {n_documents} documents, expected {N_PARTS} "
            "documents or more; raise search_tokens or n_training_samples, or give more documents"
        )
    source_layers = source.check_layers(source_layers or range(len(source.blocks)))
    target_layers = target.check_layers(target_layers or range(len(target.blocks)))
    kept: tuple[KeptLayers, KeptLayers] = tuple(
        {layer: [] for layer in layers} for layers in (source_layers, target_layers)
    )
    is_held_out = assign_folds(len(texts), N_PARTS, [item.document for item in texts], seed) == 0
    text_idx = []
    n_tokens = {"source": 0, "target": 0}
    with Bar(len(texts), "reading all layers", "text", leave=False) as progress:
        passages = counted(texts, progress)
        for batch in paired_activations(source, target, passages, positions, source_layers, target_layers):
            text_idx.append(batch.text_idx)
            for side, of_side, H in zip(
                (source, target), kept, (batch.H_source, batch.H_target), strict=True
            ):
                for layer, rows in H.items():
                    of_side[layer].append(rows.to(side.model.dtype))
            n_tokens["source"] += batch.n_source_tokens
            n_tokens["target"] += batch.n_target_tokens
    is_held_out = is_held_out[torch.cat(text_idx)]
    n_train, n_test = int((~is_held_out).sum()), int(is_held_out.sum())
    if min(n_train, n_test) < 2:
        raise InputError(
            f"{len(texts)} texts give {n_train} training and {n_test} held-out pairs, expected "
            "2 or more of each; give more text, or use mapping_positions 'last'"
        )
    vectors = [
        _differences(extractor, personas, layers, position)
        for extractor, layers in ((source, source_layers), (target, target_layers))
    ]
    names = [persona.name for persona in personas]
    is_held_out = is_held_out.to(algebra_device(target.model.device))
    return _compare_layers(*kept, is_held_out, *vectors, names, scored, lambda_values, n_tokens, seed)


def _differences(
    extractor: ActivationExtractor, personas: Sequence[Persona], layers: Sequence[int], position: str
) -> dict[int, Tensor]:
    """Return layer_idx -> the personas' differences of means, (personas, d) float64."""
    differences: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for persona in personas:
        texts, n_positive = [*persona.positive_texts, *persona.negative_texts], len(persona.positive_texts)
        for layer, rows in extractor.extract_layers(texts, layers, position).items():
            rows = rows.double()
            differences[layer].append(rows[:n_positive].mean(0) - rows[n_positive:].mean(0))
    return {layer: torch.stack(rows) for layer, rows in differences.items()}


def _compare_layers(
    source: KeptLayers,
    target: KeptLayers,
    is_held_out: Tensor,
    source_vectors: Mapping[int, Tensor],
    target_vectors: Mapping[int, Tensor],
    names: Sequence[str],
    scored: Sequence[str],
    lambda_values: Sequence[float],
    n_tokens: dict[str, int],
    seed: int,
) -> LayerSearch:
    """Fit a map for every pair of layers, and compare the mapped vectors with the native ones.

    is_held_out: for each pair, on the device of the algebra.
    """
    source_layers, target_layers, device = list(source), list(target), is_held_out.device
    shape = len(source_layers), len(target_layers)
    r2, r2_standardised, chance = torch.empty(3, *shape, dtype=torch.float64)
    agreement, other_persona = torch.empty(2, len(names), *shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def centred(side: KeptLayers, layer: int) -> CentredLayer:
        return CentredLayer.of(torch.cat(side[layer]).to(device), is_held_out)

    for row, source_layer in enumerate(each(source_layers, "fitting", "layer", leave=False)):
        read = centred(source, source_layer)
        gram = read.products(read)
        decomposed: HeldOutFold | None = None
        for column, target_layer in enumerate(target_layers):
            at, predicted = (row, column), centred(target, target_layer)
            fold = HeldOutFold(*pair_moments(read, predicted, gram), decomposed)
            if decomposed is None:
                decomposed = fold
                noise = torch.randn(N_RANDOM, len(fold.basis), generator=generator, dtype=torch.float64)
                # Both in the basis of the source's covariance, which maps are in.
                random = noise.to(device) * fold.eigenvalues.sqrt()
                personas = source_vectors[source_layer].to(device) @ fold.basis
            W, r2[at], r2_standardised[at] = fit_pair(fold, lambda_values)
            cosines, chance[at] = compare_directions(
                personas @ W,
                random @ W,
                target_vectors[target_layer].to(device),
                massive_by_scale(predicted.scale),
            )
            agreement[:, row, column] = cosines.diagonal()
            other_persona[:, row, column] = cosines.fill_diagonal_(-torch.inf).max(1).values
    margins = agreement - torch.maximum(other_persona, chance)
    score = margins[[names.index(name) for name in scored]].mean(0)
    row, column = divmod(int(score.argmax()), shape[1])
    return LayerSearch(
        source_layers,
        target_layers,
        r2,
        r2_standardised,
        agreement=dict(zip(names, agreement, strict=True)),
        other_persona=dict(zip(names, other_persona, strict=True)),
        chance=chance,
        score=score,
        best=(source_layers[row], target_layers[column]),
        n_pairs=len(is_held_out),
        n_tokens=n_tokens,
    )


def fit_pair(fold: HeldOutFold, lambda_values: Sequence[float]) -> tuple[Tensor, float, float]:
    """Return the map at the best lambda, in the basis, and its held-out R2, pooled and standardised."""
    lambdas = [value * fold.unit for value in lambda_values]
    squares = fold.test.target_gram.diagonal()
    weights = target_weights(fold.test)
    pooled = fold.error_path(lambdas, torch.ones_like(squares)) / squares.sum()
    best = pooled.argmin().item()
    standardised = fold.error_path([lambdas[best]], weights) / (squares * weights).sum()
    return fold.ridge(lambdas[best]), 1 - pooled[best].item(), 1 - standardised.item()


def compare_directions(
    mapped: Tensor, random: Tensor, native: Tensor, massive: Sequence[int]
) -> tuple[Tensor, float]:
    """Return cosines (mapped persona, native persona) and the 99.9th percentile for random directions.

    mapped, native: (personas, d_target). random: (n, d_target). Massive dimensions are set to 0, each
    vector gets unit length, and the mean of its side's personas is subtracted.
    """
    mapped, random, native = (_unit_without(vectors, massive) for vectors in (mapped, random, native))
    common = mapped.mean(0)
    mapped, random = normalize(mapped - common, dim=1), normalize(random - common, dim=1)
    native = normalize(native - native.mean(0), dim=1)
    chance = torch.quantile((random @ native.T).flatten(), CHANCE_QUANTILE).item()
    return (mapped @ native.T).cpu(), chance


def _unit_without(vectors: Tensor, dimensions: Sequence[int]) -> Tensor:
    kept = vectors.clone()
    kept[:, list(dimensions)] = 0.0
    return normalize(kept, dim=1)

"""Search every source layer against every target layer for the best layer pair (phase 1).

One pass over neutral text sums up all layers of both models; then each pair of layers
gets a ridge map, its held-out R2, and the agreement of mapped with native persona
vectors. No test prompt is used.

Sums are float32 around a pilot mean, which is enough to rank pairs (R2 to about 1e-4); the
chosen pair is fitted again in float64. Memory: 8 * (sum of source widths) * (sum of target
widths) bytes over the layers searched, 1.6 GB for 30 layers of 576 and 18 of 640.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from activation_extractor import ActivationExtractor, PairedBatch, massive_by_scale, paired_activations
from maps.layer_bands import LayerPair
from maps.pair_collection import counted
from ridge_mapping import HeldOutFold, assign_folds, target_weights
from support.errors import InputError
from support.pair_statistics import Moments
from support.progress import Bar, each
from texts.neutral_text import NeutralText
from texts.personas import Persona

SEARCH_LAMBDAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
N_RANDOM = 2000  # random directions; enough for their 99.9th percentile
CHANCE_QUANTILE = 0.999
MAX_SUMS_BYTES = 8e9  # of memory for the sums
TRAIN, TEST = 0, 1
N_PARTS = 5  # of the documents; one part is held out


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


class LayerSums:
    """Sum up pairs for every pair of layers in float32, apart for training and held-out documents."""

    def __init__(self, source_widths: Mapping[int, int], target_widths: Mapping[int, int]) -> None:
        """Take layer_idx -> width of both sides. Raises InputError: the sums need over 8 GB."""
        check_memory(source_widths, target_widths)
        n_source, n_target = sum(source_widths.values()), sum(target_widths.values())
        self.source, self.target = _slices(source_widths), _slices(target_widths)
        self.n = [0, 0]
        self.source_pilot: Tensor | None = None
        self.target_pilot: Tensor | None = None
        self.sum_source = torch.zeros(2, n_source, dtype=torch.float64)
        self.sum_target = torch.zeros(2, n_target, dtype=torch.float64)
        self.target_squares = torch.zeros(2, n_target, dtype=torch.float64)
        self.gram = {layer: torch.zeros(2, d, d) for layer, d in source_widths.items()}
        self.cross = torch.zeros(2, n_source, n_target)

    def add(self, batch: PairedBatch, parts: Tensor) -> None:
        """Add a batch; parts: (n,), TRAIN or TEST for each pair."""
        if not len(parts):
            return
        source = torch.cat([batch.H_source[layer] for layer in self.source], dim=1)
        target = torch.cat([batch.H_target[layer] for layer in self.target], dim=1)
        if self.source_pilot is None:
            self.source_pilot, self.target_pilot = source.mean(0), target.mean(0)
        source -= self.source_pilot
        target -= self.target_pilot
        for part in (TRAIN, TEST):
            x, y = source[parts == part], target[parts == part]
            self.n[part] += len(x)
            self.sum_source[part] += x.sum(0, dtype=torch.float64)
            self.sum_target[part] += y.sum(0, dtype=torch.float64)
            self.target_squares[part] += y.square().sum(0, dtype=torch.float64)
            self.cross[part].addmm_(x.T, y)
            for layer, columns in self.source.items():
                self.gram[layer][part].addmm_(x[:, columns].T, x[:, columns])

    def moments(self, source_layer: int, target_layer: int) -> tuple[Moments, Moments]:
        """Return the float64 moments of the training and the held-out pairs, around the training mean.

        Only the diagonal of the target's Gram matrix is known; the rest is 0.
        """
        rows, columns = self.source[source_layer], self.target[target_layer]
        p, q = self.sum_source[:, rows], self.sum_target[:, columns]
        a, b = p[TRAIN] / self.n[TRAIN], q[TRAIN] / self.n[TRAIN]
        parts = []
        for part, n in enumerate(self.n):
            gram = self.gram[source_layer][part].double()
            cross = self.cross[part, rows, columns].double()
            gram += n * torch.outer(a, a) - torch.outer(p[part], a) - torch.outer(a, p[part])
            cross += n * torch.outer(a, b) - torch.outer(p[part], b) - torch.outer(a, q[part])
            squares = self.target_squares[part, columns] + n * b.square() - 2 * q[part] * b
            parts.append(Moments(n, a, b, gram, cross, torch.diag(squares)))
        return parts[TRAIN], parts[TEST]

    def target_scale(self, target_layer: int) -> Tensor:
        """Return the root mean square of each target dimension over the training pairs, (d_target,)."""
        columns = self.target[target_layer]
        pilot, n = self.target_pilot[columns].double(), self.n[TRAIN]
        squares = self.target_squares[TRAIN, columns] + 2 * pilot * self.sum_target[TRAIN, columns]
        return (squares / n + pilot.square()).clamp(min=0).sqrt()


def check_memory(source_widths: Mapping[int, int], target_widths: Mapping[int, int]) -> None:
    """Raise InputError: the sums for these layers (layer_idx -> width) need over 8 GB."""
    n_source, n_target = sum(source_widths.values()), sum(target_widths.values())
    needed = 8 * (n_source * n_target + sum(width**2 for width in source_widths.values()))
    if needed > MAX_SUMS_BYTES:
        raise InputError(
            f"a search over {len(source_widths)} x {len(target_widths)} layer pairs needs "
            f"{needed / 1e9:.0f} GB, expected {MAX_SUMS_BYTES / 1e9:.0f} GB at most; name fewer layers in "
            "search_source_layers and search_target_layers"
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
    Raises InputError: too few documents or pairs, or too much memory needed.
    """
    n_documents = len({item.document for item in texts})
    if n_documents < N_PARTS:
        raise InputError(
            f"the layer search got {len(texts)} texts of {n_documents} documents, expected {N_PARTS} "
            "documents or more; raise search_tokens or n_training_samples, or give more documents"
        )
    source_layers = source.check_layers(source_layers or range(len(source.blocks)))
    target_layers = target.check_layers(target_layers or range(len(target.blocks)))
    sums = LayerSums(
        dict.fromkeys(source_layers, source.d_model), dict.fromkeys(target_layers, target.d_model)
    )
    parts = (assign_folds(len(texts), N_PARTS, [item.document for item in texts], seed) == 0).long()
    n_tokens = {"source": 0, "target": 0}
    with Bar(len(texts), "reading all layers", "text", leave=False) as progress:
        passages = counted(texts, progress)
        for batch in paired_activations(source, target, passages, positions, source_layers, target_layers):
            sums.add(batch, parts[batch.text_idx])
            n_tokens["source"] += batch.n_source_tokens
            n_tokens["target"] += batch.n_target_tokens
    if min(sums.n) < 2:
        raise InputError(
            f"{len(texts)} texts give {sums.n[TRAIN]} training and {sums.n[TEST]} held-out pairs, expected "
            "2 or more of each; give more text, or use mapping_positions 'last'"
        )
    vectors = [
        _differences(extractor, personas, layers, position)
        for extractor, layers in ((source, source_layers), (target, target_layers))
    ]
    names = [persona.name for persona in personas]
    return _compare_layers(sums, *vectors, names, scored, lambda_values, n_tokens, seed)


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
    sums: LayerSums,
    source_vectors: Mapping[int, Tensor],
    target_vectors: Mapping[int, Tensor],
    names: Sequence[str],
    scored: Sequence[str],
    lambda_values: Sequence[float],
    n_tokens: dict[str, int],
    seed: int,
) -> LayerSearch:
    """Fit a map for every pair of layers, and compare the mapped vectors with the native ones."""
    source_layers, target_layers = list(sums.source), list(sums.target)
    shape = len(source_layers), len(target_layers)
    r2, r2_standardised, chance = torch.empty(3, *shape, dtype=torch.float64)
    agreement, other_persona = torch.empty(2, len(names), *shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    massive = {layer: massive_by_scale(sums.target_scale(layer)) for layer in target_layers}
    for row, source_layer in enumerate(each(source_layers, "fitting", "layer", leave=False)):
        decomposed: HeldOutFold | None = None
        for column, target_layer in enumerate(target_layers):
            at = row, column
            fold = HeldOutFold(*sums.moments(source_layer, target_layer), decomposed)
            if decomposed is None:
                decomposed = fold
                noise = torch.randn(N_RANDOM, len(fold.basis), generator=generator, dtype=torch.float64)
                random = noise * fold.eigenvalues.sqrt() @ fold.basis.T
            W, r2[at], r2_standardised[at] = fit_pair(fold, lambda_values)
            cosines, chance[at] = compare_directions(
                source_vectors[source_layer] @ W,
                random @ W,
                target_vectors[target_layer],
                massive[target_layer],
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
        n_pairs=sum(sums.n),
        n_tokens=n_tokens,
    )


def fit_pair(fold: HeldOutFold, lambda_values: Sequence[float]) -> tuple[Tensor, float, float]:
    """Return W at the best lambda and its held-out R2, pooled and over standardised dimensions."""
    unit = fold.train.gram.diagonal().mean().item()
    lambdas = [value * unit for value in lambda_values]
    squares = fold.test.target_gram.diagonal()
    weights = target_weights(fold.test)
    pooled = fold.error_path(lambdas, torch.ones_like(squares)) / squares.sum()
    best = int(pooled.argmin())
    standardised = fold.error_path([lambdas[best]], weights) / (squares * weights).sum()
    return fold.solution(lambdas[best]), 1 - pooled[best].item(), 1 - standardised.item()


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
    return mapped @ native.T, chance


def _unit_without(vectors: Tensor, dimensions: Sequence[int]) -> Tensor:
    kept = vectors.clone()
    kept[:, list(dimensions)] = 0.0
    return normalize(kept, dim=1)


def _slices(widths: Mapping[int, int]) -> dict[int, slice]:
    slices, start = {}, 0
    for layer, width in widths.items():
        slices[layer] = slice(start, start + width)
        start += width
    return slices

"""Sum up paired activations, by fold of documents (phase 2).

A ridge regression and its held-out error depend on the pairs only through counts, means and products of
centred activations. These are summed in float64 around a pilot mean, so memory does not grow with the
number of pairs and a mean far from zero costs no precision. Sums of disjoint pairs add up: `merge` joins
those of several workers.

Beside the sums, a uniform random sample of the pairs is kept for the measures that sums cannot give.

Layers of several pairs are summed side by side, as columns of one accumulation: the products of a layer with
itself are computed and kept once for all layer pairs that share it.
"""

import zlib
from collections.abc import Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.errors import InputError

DEFAULT_SAMPLE = 5000  # pairs, enough for retrieval among thousands and for the norms of activations
CHUNK = 4096  # pairs that are summed at once, so that the float64 copy of a large batch stays small
MAX_COPY = 2**26  # numbers in this copy, half a gigabyte; a band of wide layers takes fewer pairs at once
DEAL_BLOCK = 1024  # rounds of folds for which random numbers are drawn at once
_ARGUMENTS = ("d_source", "d_target", "n_folds", "seed", "fold_of", "n_sample")
_STATE = ("n", "sums", "pilot", "n_ungrouped", "_entropy", "_n_drawn")

Columns = tuple[int, int]  # the first, and the one behind the last


@dataclass(frozen=True)
class Moments:
    """Products of centred activations over n pairs, float64.

    source_mean (d_source,), target_mean (d_target,): what the activations are centred on.
    gram: (d_source, d_source), X'X. cross: (d_source, d_target), X'Y. target_gram: (d_target, d_target), Y'Y.
    """

    n: int
    source_mean: Tensor
    target_mean: Tensor
    gram: Tensor
    cross: Tensor
    target_gram: Tensor

    def to(self, device: torch.device | str) -> "Moments":
        """Return the same on a device."""
        tensors = [field.name for field in fields(self) if field.name != "n"]
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True)
class PairSample:
    """Pairs drawn uniformly from all that were added, in the order in which they came.

    H_source (n, d_source), H_target (n, d_target) float32. folds (n,) int64. rows (n,) int64: the pair's
    number in the order of `add`. priorities (n,) float64: random numbers; the pairs with the lowest are kept.
    """

    H_source: Tensor
    H_target: Tensor
    folds: Tensor
    rows: Tensor
    priorities: Tensor


class PairStatistics:
    """Sums over pairs of one source layer and one target layer; or of several, to be taken out by `of_pair`.

    joined: the columns of H_source and those of H_target of each layer pair; by default all are of one.
    device: where the products are summed and kept.
    n_folds: folds for cross-validation; a document is in one of them.
    fold_of: document -> fold. A document that it lacks goes to the fold with the fewest pairs when it first
        appears. Workers whose sums are to be merged need the same table.
    n_sample: pairs that are kept as they are.
    stream: names the random numbers that draw them; parts that are to be merged need different names. Without
        one, the first pair's values are the name.
    Memory: 8 * n_folds bytes for each entry of the products (d, d) of every layer and (d_source, d_target) of
    every layer pair, and the sample.
    """

    def __init__(
        self,
        d_source: int,
        d_target: int,
        n_folds: int = 5,
        seed: int = 0,
        fold_of: Mapping[Hashable, int] | None = None,
        n_sample: int = DEFAULT_SAMPLE,
        stream: str | None = None,
        joined: Sequence[tuple[Columns, Columns]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.d_source, self.d_target = d_source, d_target
        self.n_folds, self.seed, self.n_sample = n_folds, seed, n_sample
        self.fold_of: dict[Hashable, int] = dict(fold_of or {})
        self.groups: set[Hashable] = set()
        self.n_ungrouped = 0
        self.pilot: Tensor | None = None
        self._entropy: list[int] = []
        self._n_drawn = 0
        if stream is not None:
            self.begin(stream)
        width = d_source + d_target
        self.joined = [((0, d_source), (0, d_target))] if joined is None else list(joined)
        self.device = torch.device(device)
        self.n = torch.zeros(n_folds, dtype=torch.int64)
        self.sums = torch.zeros(n_folds, width, dtype=torch.float64)
        # (columns, columns) -> (n_folds, d, d), counted over both sides; on and below the diagonal only where
        # both are the same.
        self.products: dict[tuple[Columns, Columns], Tensor] = {}
        for rows, columns in dict.fromkeys(block for pair in self.joined for block in self._blocks(*pair)):
            size = n_folds, rows[1] - rows[0], columns[1] - columns[0]
            self.products[rows, columns] = torch.zeros(size, dtype=torch.float64, device=device)
        self._buffers: Tensor | None = None
        self._worst_kept = torch.inf if n_sample else 0.0
        empty = torch.empty(0, d_source), torch.empty(0, d_target)
        integers = torch.empty(0, dtype=torch.int64)
        self._pending = [PairSample(*empty, integers, integers, torch.empty(0, dtype=torch.float64))]

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything but working memory, for a process that may lack the device."""
        products = {block: values.cpu() for block, values in self.products.items()}
        return {**vars(self), "_buffers": None, "products": products, "device": torch.device("cpu")}

    def begin(self, stream: str) -> None:
        """Draw from other random numbers from now on, those that the name stands for."""
        self._entropy, self._n_drawn = [self.seed, zlib.crc32(stream.encode())], 0

    @property
    def n_pairs(self) -> int:
        """Pairs added so far."""
        return int(self.n.sum())

    @property
    def n_groups(self) -> int:
        """Documents added so far; a pair without one counts as its own."""
        return len(self.groups) + self.n_ungrouped

    def add(
        self,
        H_source: Tensor,
        H_target: Tensor,
        groups: Sequence[Hashable] | Tensor | None = None,
        folds: Tensor | None = None,
    ) -> "PairStatistics":
        """Add pairs: H_source (n, d_source), H_target (n, d_target), any float dtype; returns self.

        groups: the document of each pair. Without it each pair is a document of its own.
        folds: (n,) the fold of each pair, if the caller chooses it.
        Raises InputError, and adds nothing: shapes that don't match, or rows that are not
        finite (counted, with the document or row of the first).
        """
        labels = group_labels(groups, len(H_source))
        self._check_pairs(H_source, H_target, labels)
        if not len(H_source):
            return self
        if self.pilot is None:
            self.pilot = torch.cat([_double(H_source).mean(0), _double(H_target).mean(0)])
        if not self._entropy:  # differs between accumulations, so that workers' samples are independent
            self._entropy = [self.seed, zlib.crc32(_double(H_source[0]).numpy().tobytes())]
        folds = self._assign(len(H_source), labels, folds)
        self._keep_sample(H_source, H_target, folds)
        size = self._chunk_size()
        for start in range(0, len(folds), size):
            rows = slice(start, start + size)
            self._add_sums(H_source[rows], H_target[rows], folds[rows])
        return self

    def merge(self, other: "PairStatistics") -> "PairStatistics":
        """Add the pairs of another accumulation with the same arguments; returns self."""
        if not other.n_pairs:
            return self
        if self.pilot is None:
            self.pilot = other.pilot.clone()
        self._pending.append(replace(other.sample, rows=other.sample.rows + self.n_pairs))
        self._settle_sample()
        shift = other.pilot - self.pilot
        for fold, n in enumerate(other.n.tolist()):
            for block, products in self.products.items():
                products[fold] += other.products[block][fold].to(self.device)
                _shift(products[fold], n, other.sums[fold], shift, block)
            self.sums[fold] += other.sums[fold] + n * shift
        self.n += other.n
        self.fold_of = {**other.fold_of, **self.fold_of}
        self.groups |= other.groups
        self.n_ungrouped += other.n_ungrouped
        return self

    def of_pair(self, source: Columns, target: Columns) -> "PairStatistics":
        """Return the sums of one layer pair of `joined`, to be read; they are shared."""
        one, sample = copy(self), self.sample
        one.d_source, one.d_target = source[1] - source[0], target[1] - target[0]
        one.joined, one._buffers = [((0, one.d_source), (0, one.d_target))], None
        of_source, _, of_target = shared = self._blocks(source, target)
        one.products = {
            own: self.products[block] for own, block in zip(one._blocks(*one.joined[0]), shared, strict=True)
        }
        both = [*range(*of_source[0]), *range(*of_target[0])]
        one.sums, one.pilot = self.sums[:, both], None if self.pilot is None else self.pilot[both]
        own_rows = sample.H_source[:, slice(*source)], sample.H_target[:, slice(*target)]
        one._pending = [replace(sample, H_source=own_rows[0], H_target=own_rows[1])]
        return one

    def total(self) -> Moments:
        """Return the moments of all pairs, centred on their mean. Raises InputError for fewer than 2."""
        if self.n_pairs < 2:
            raise InputError(f"got {self.n_pairs} pairs, expected 2 or more")
        return self._moments(list(range(self.n_folds)))

    def around(self, source_mean: Tensor, target_mean: Tensor) -> Moments:
        """Return the moments of all pairs, centred on given means; for pairs held out of a fit."""
        return self._moments(list(range(self.n_folds)), (source_mean, target_mean))

    def split(self, fold: int) -> tuple[Moments, Moments]:
        """Return the moments of all other folds and of this one, both centred on the mean of the others.

        Raises InputError: a fold has no pairs.
        """
        if not self.n.all():
            raise InputError(
                f"{self.n_folds} folds over {self.n_groups} groups: the folds have {self.n.tolist()} pairs; "
                "need at least as many groups as folds; lower n_folds or give more documents"
            )
        train = self._moments([other for other in range(self.n_folds) if other != fold])
        return train, self._moments([fold], (train.source_mean, train.target_mean))

    @property
    def sample(self) -> PairSample:
        """At most `n_sample` of the pairs, drawn uniformly; the same whatever the sizes of the batches."""
        return self._settle_sample()

    def content(self) -> dict[str, Any]:
        """Return everything of a single layer pair as tensors, numbers and lists, for `from_content`."""
        state = {name: getattr(self, name) for name in (*_ARGUMENTS, *_STATE)}
        sample = {
            name: values.clone() for name, values in vars(self.sample).items()
        }  # without what is shared
        products = torch.zeros(self.n_folds, *[self.d_source + self.d_target] * 2, dtype=torch.float64)
        for place, values in zip(_places(products, self.d_source), self.products.values(), strict=True):
            place.copy_(values)
        return {**state, "products": products, "groups": sorted(self.groups, key=str), "sample": sample}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "PairStatistics":
        """Make an accumulation from what `content` returned; `add` may go on."""
        statistics = cls(**{key: content[key] for key in _ARGUMENTS})
        for key in _STATE:
            setattr(statistics, key, content[key])
        places = _places(content["products"], statistics.d_source)
        statistics.products = dict(zip(statistics.products, places, strict=True))
        statistics.groups = set(content["groups"])
        statistics._pending = [PairSample(**content["sample"])]
        statistics._settle_sample()
        return statistics

    def _check_pairs(self, H_source: Tensor, H_target: Tensor, labels: list[Hashable] | None) -> None:
        both = ("H_source", H_source, self.d_source), ("H_target", H_target, self.d_target)
        for name, values, width in both:
            if values.ndim != 2 or values.shape[1] != width:
                raise InputError(f"{name} has shape {tuple(values.shape)}, expected (n, {width})")
        if len(H_source) != len(H_target):
            raise InputError(
                f"H_source has {len(H_source)} rows and H_target {len(H_target)}; they must be "
                "matrices with one row for each pair"
            )
        for name, values, _ in both:
            if values.sum().isfinite():  # a cheap look first
                continue
            bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                where = f", of text {labels[bad[0]]!r}" if labels else ""
                raise InputError(
                    f"{name} has {len(bad)} rows that are not finite, first row {bad[0]}{where}; "
                    "load the model in bfloat16 or float32, or leave the text out"
                )

    def _assign(self, n: int, labels: list[Hashable] | None, folds: Tensor | None) -> Tensor:
        """Return the fold of each new pair, and remember the documents' folds."""
        if labels is None:
            self.n_ungrouped += n
            return self._deal(n) if folds is None else folds
        self.groups.update(labels)
        if folds is not None:
            self.fold_of.update(zip(labels, folds.tolist(), strict=True))
            return folds
        sizes = self.n.tolist()
        assigned = []
        for label in labels:
            fold = self.fold_of.setdefault(label, sizes.index(min(sizes)))
            sizes[fold] += 1
            assigned.append(fold)
        return torch.tensor(assigned)

    def _deal(self, n: int) -> Tensor:
        """Return the folds of pairs without documents: of n_folds successive pairs each fold gets one."""
        turn, offset = np.divmod(self.n_pairs + np.arange(n), self.n_folds)
        block, within = np.divmod(turn, DEAL_BLOCK)
        dealt = [
            np.random.default_rng((self.seed, number)).integers(self.n_folds, size=DEAL_BLOCK)
            for number in range(block[0], block[-1] + 1)
        ]
        first = np.stack(dealt)[block - block[0], within]
        return torch.from_numpy((first + offset) % self.n_folds)

    def _blocks(self, source: Columns, target: Columns) -> tuple[tuple[Columns, Columns], ...]:
        """Return whose products a layer pair needs: the source's, those of both, and the target's."""
        target = self.d_source + target[0], self.d_source + target[1]
        return (source, source), (source, target), (target, target)

    def _chunk_size(self) -> int:
        return min(CHUNK, max(1, MAX_COPY // (self.d_source + self.d_target)))

    def _add_sums(self, H_source: Tensor, H_target: Tensor, folds: Tensor) -> None:
        """Add at most a chunk of pairs to n, sums and products."""
        n, width = len(folds), self.d_source + self.d_target
        if self._buffers is None:  # kept, since fresh memory of this size costs as much as the sums
            size = 2, self._chunk_size(), width
            self._buffers = torch.empty(size, dtype=torch.float64, device=self.device)
        pairs, of_fold = self._buffers[0, :n], self._buffers[1]
        pairs[:, : self.d_source] = H_source.detach().to(self.device)
        pairs[:, self.d_source :] = H_target.detach().to(self.device)
        pairs -= self.pilot.to(self.device)
        for fold in folds.unique().tolist():
            rows = (folds == fold).nonzero().flatten().to(self.device)
            chosen = torch.index_select(pairs, 0, rows, out=of_fold[: len(rows)])
            self.n[fold] += len(rows)
            self.sums[fold] += (chosen.T @ torch.ones_like(chosen[:, 0])).cpu()
            for (left, right), products in self.products.items():
                if left == right:
                    _add_products(products[fold], chosen[:, slice(*left)])
                else:
                    products[fold].addmm_(chosen[:, slice(*left)].T, chosen[:, slice(*right)])

    def _keep_sample(self, H_source: Tensor, H_target: Tensor, folds: Tensor) -> None:
        """Draw a random number for each pair, and keep the pairs with the smallest numbers."""
        random = np.random.Generator(np.random.PCG64(self._entropy).advance(self._n_drawn))
        priorities = torch.from_numpy(random.random(len(folds)))
        self._n_drawn += len(folds)
        chosen = (priorities < self._worst_kept).nonzero().flatten()
        self._pending.append(
            PairSample(
                H_source.detach()[chosen.to(H_source.device)].float().cpu(),
                H_target.detach()[chosen.to(H_target.device)].float().cpu(),
                folds[chosen],
                chosen + self.n_pairs,
                priorities[chosen],
            )
        )
        if sum(len(piece.rows) for piece in self._pending) > 2 * self.n_sample:
            self._settle_sample()

    def _settle_sample(self) -> PairSample:
        """Return the sample so far, and keep nothing else of what is pending."""
        if len(self._pending) > 1:
            pieces = [vars(piece) for piece in self._pending]
            joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            kept = joined["priorities"].argsort(stable=True)[: self.n_sample].sort().values
            self._pending = [PairSample(**{name: values[kept] for name, values in joined.items()})]
        (sample,) = self._pending
        if 0 < len(sample.rows) == self.n_sample:
            self._worst_kept = sample.priorities.max().item()
        return sample

    def _moments(self, folds: list[int], centre: tuple[Tensor, Tensor] | None = None) -> Moments:
        """Return the moments of some folds around `centre`, or around their own mean."""
        n = int(self.n[folds].sum())
        sums = self.sums[folds].sum(0)
        middle = self.pilot + sums / n if centre is None else torch.cat(centre).cpu()
        shift, found = self.pilot - middle, []
        for block in self._blocks(*self.joined[0]):
            products = self.products[block][folds[0]].clone()
            for fold in folds[1:]:
                products += self.products[block][fold]
            _shift(products, n, sums, shift, block)
            if block[0] == block[1]:  # the sums are kept on and below the diagonal only
                products.tril_().add_(products.tril(-1).T)
            found.append(products)
        means = middle.to(self.device)
        return Moments(n, means[: self.d_source], means[self.d_source :], *found)


def _add_products(products: Tensor, rows: Tensor, n_strips: int = 4) -> None:
    """Add rows' @ rows to `products`, (d, d), on and below the diagonal.

    Strips that end at the diagonal save most of the other half; torch has no rank-k update.
    """
    bounds = [len(products) * strip // n_strips for strip in range(n_strips + 1)]
    for start, end in pairwise(bounds):
        products[start:end, :end].addmm_(rows[:, start:end].T, rows[:, :end])


def _shift(products: Tensor, n: int, sums: Tensor, shift: Tensor, block: tuple[Columns, Columns]) -> None:
    """Turn the sum of xy' over n rows into that of (x + a)(y + b)'.

    sums, shift: of all columns; block: those of x and of y.
    """
    sums, shift = sums.to(products.device), shift.to(products.device)
    (x, a), (y, b) = ((sums[slice(*columns)], shift[slice(*columns)]) for columns in block)
    products.addr_(x, b).addr_(a, y).addr_(a, b, alpha=n)


def _places(products: Tensor, d_source: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of a layer pair's three products in those of both sides, (folds, d, d)."""
    left, right = slice(None, d_source), slice(d_source, None)
    return products[:, left, left], products[:, right, left].mT, products[:, right, right]


def _double(values: Tensor) -> Tensor:
    return values.detach().double().cpu()


def group_labels(groups: Sequence[Hashable] | Tensor | np.ndarray | None, n: int) -> list[Hashable] | None:
    """Return the documents of n rows as plain values, or None. Raises InputError unless there are n."""
    if groups is None:
        return None
    if len(groups) != n:
        raise InputError(f"got {len(groups)} groups for {n} rows; give one for each row")
    # As dictionary keys, two elements of a tensor always differ; elements of an array cannot be saved.
    return groups.tolist() if isinstance(groups, Tensor | np.ndarray) else list(groups)

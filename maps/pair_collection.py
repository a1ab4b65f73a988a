"""Read neutral text with both models and sum up the paired activations (phase 2).

Parts of the texts can be read by different workers: `merge_pairs` adds up their sums. Memory depends on the
number of layers and layer pairs and not on the number of texts. Sums are kept on the target's GPU, if it has
room for them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from activation_extractor import ActivationExtractor, PairedText, paired_activations
from maps.layer_bands import LayerPair
from ridge_mapping import algebra_device, assign_folds
from support.errors import InputError
from support.pair_statistics import DEFAULT_SAMPLE, Columns, PairStatistics
from support.progress import Bar
from texts.neutral_text import NeutralText

_COUNTS = ("n_texts", "n_texts_without_pairs", "n_source_tokens", "n_target_tokens")
FREE_SHARE = 0.5  # of a GPU's free memory that sums may take; maps are fitted and texts read beside them
ROWS = 1024  # pairs that are put side by side at once for all layers
ABOUT_SUMS = (
    "Sums over pairs of activations: the outputs of the decoder blocks in layer_pairs (source, target), "
    "counted from 0, at the same place of the same text. statistics: by fold, n pairs, their sums (folds, "
    "d_source + d_target) and products (folds, d_source + d_target, the same, on and below the diagonal), "
    "float64, of activations minus `pilot`, the source's dimensions first; fold_of: document -> fold; "
    "sample: pairs drawn at random. sample_text_idx, sample_end: for each of these, the number of its text "
    "and how many characters of it had been read. report: counts."
)
ABOUT_PAIRS = (
    "Pairs of activations, drawn at random from the n_pairs that the maps are fitted on. Row i of H_source "
    "(n, d_source) and H_target (n, d_target), float32: the outputs of the decoder blocks in layer_pairs, "
    "counted from 0, after both models have read texts[i]. documents[i]: where this text is from; if it is "
    "a response, the question, which they have read before it; an empty text is a response not yet begun."
)


@dataclass(frozen=True)
class PairSettings:
    """Choose which paired activations are summed up, and in which folds.

    layer_pairs: all are read in the same passes. positions: tokens of a text that give pairs, `aligned` or
        `last`; see `paired_activations`. seed: decides the folds, and which pairs are kept as a sample.
    untrained: the seed of random weights for the source, None for the source itself. batch_size: texts that a
        model reads at a time.
    """

    layer_pairs: tuple[LayerPair, ...]
    positions: str = "aligned"
    n_folds: int = 5
    seed: int = 0
    untrained: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class CollectedPairs:
    """Hold the sums over the pairs of some texts, for one or more layer pairs.

    sums: of all layers. places: layer pair -> its columns in them.
    text_idx, end: (n,) int64, for each pair its text and the number of its characters that were read.
    n_texts_without_pairs: texts in which the two tokenizers nowhere end on the same character.
    n_truncated: side -> number of texts that were cut to the model's context.
    """

    sums: PairStatistics
    places: dict[LayerPair, tuple[Columns, Columns]]
    text_idx: Tensor
    end: Tensor
    n_texts: int
    n_texts_without_pairs: int
    n_source_tokens: int
    n_target_tokens: int
    n_truncated: dict[str, int]

    @property
    def statistics(self) -> dict[LayerPair, PairStatistics]:
        """The sums of each layer pair."""
        return {pair: self.sums.of_pair(*place) for pair, place in self.places.items()}

    @property
    def fraction_aligned(self) -> float:
        """Pairs as a fraction of the tokens of whichever model has fewer."""
        return len(self.text_idx) / min(self.n_source_tokens, self.n_target_tokens)

    def report(self) -> dict[str, Any]:
        """Return the counts, for artifacts."""
        counts = {name: getattr(self, name) for name in (*_COUNTS, "n_truncated")}
        return {"n_pairs": len(self.text_idx), "fraction_aligned": self.fraction_aligned, **counts}


def document_folds(texts: Sequence[NeutralText], settings: PairSettings) -> dict[str, int]:
    """Return document -> fold. Raises InputError: fewer documents than folds."""
    documents = [item.document for item in texts]
    folds = assign_folds(len(texts), settings.n_folds, documents, settings.seed)
    return dict(zip(documents, folds.tolist(), strict=True))


def read_pairs(
    source: ActivationExtractor,
    target: ActivationExtractor,
    texts: Sequence[NeutralText],
    settings: PairSettings,
    fold_of: Mapping[str, int],
    whole: CollectedPairs | None = None,
) -> CollectedPairs:
    """Return the sums of one part of the texts, for `merge_pairs`; a part may give no pair.

    fold_of: document -> fold, the same for all parts; see `document_folds`.
    whole: the parts before; its sums are added to and part of what is returned, so that memory does not hold
        them twice.
    Raises InputError: as `paired_activations`.
    """
    layers = [list(dict.fromkeys(pair[side] for pair in settings.layer_pairs)) for side in (0, 1)]
    if whole is None:
        sums, places = _empty_sums(source, target, layers, settings, fold_of)
    else:
        sums, places = whole.sums, whole.places
    sums.begin("\n".join(item.text for item in texts[:1]))
    text_idx, ends, n_source_tokens, n_target_tokens = [], [], 0, 0
    extractors = {"source": source, "target": target}
    cut_before = {side: extractor.n_truncated for side, extractor in extractors.items()}
    with Bar(len(texts), "reading pairs", "text", leave=False) as progress:
        passages = counted(texts, progress)
        for batch in paired_activations(source, target, passages, settings.positions, *layers):
            groups = [texts[index].document for index in batch.text_idx.tolist()]
            for start in range(0, len(groups), ROWS):
                part = slice(start, start + ROWS)
                both = (
                    torch.cat([H[layer][part] for layer in of_side], dim=1)
                    for H, of_side in zip((batch.H_source, batch.H_target), layers, strict=True)
                )
                sums.add(*both, groups[part])
            text_idx.append(batch.text_idx)
            ends.append(batch.end)
            n_source_tokens += batch.n_source_tokens
            n_target_tokens += batch.n_target_tokens
    rows = torch.cat(text_idx)
    part = CollectedPairs(
        sums=sums,
        places=places,
        text_idx=rows,
        end=torch.cat(ends),
        n_texts=len(texts),
        n_texts_without_pairs=len(texts) - len(rows.unique()),
        n_source_tokens=n_source_tokens,
        n_target_tokens=n_target_tokens,
        n_truncated={
            side: extractor.n_truncated - cut_before[side] for side, extractor in extractors.items()
        },
    )
    return part if whole is None else _joined(whole, part)


def _empty_sums(
    source: ActivationExtractor,
    target: ActivationExtractor,
    layers: Sequence[Sequence[int]],
    settings: PairSettings,
    fold_of: Mapping[str, int],
) -> tuple[PairStatistics, dict[LayerPair, tuple[Columns, Columns]]]:
    """Return sums without pairs for all layers of both sides, and the columns of each layer pair."""
    columns = [
        {layer: (place * side.d_model, (place + 1) * side.d_model) for place, layer in enumerate(of_side)}
        for side, of_side in zip((source, target), layers, strict=True)
    ]
    places = {pair: (columns[0][pair[0]], columns[1][pair[1]]) for pair in settings.layer_pairs}
    widths = [side.d_model * len(of_side) for side, of_side in zip((source, target), layers, strict=True)]
    size = sums_bytes(settings.layer_pairs, source.d_model, target.d_model, settings.n_folds)
    device = algebra_device(target.model.device)
    if device.type == "cuda" and size > FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    folds = settings.n_folds, settings.seed, fold_of
    return PairStatistics(*widths, *folds, joined=list(places.values()), device=device), places


def sums_bytes(layer_pairs: Iterable[LayerPair], d_source: int, d_target: int, n_folds: int) -> int:
    """Return the memory that the sums of layer pairs and the sample of their pairs take."""
    pairs = set(layer_pairs)
    n_source, n_target = (len({pair[side] for pair in pairs}) for side in (0, 1))
    products = n_source * d_source**2 + n_target * d_target**2 + len(pairs) * d_source * d_target
    return 8 * n_folds * products + 4 * DEFAULT_SAMPLE * (n_source * d_source + n_target * d_target)


def merge_pairs(parts: Iterable[CollectedPairs]) -> CollectedPairs:
    """Return the sums over all texts from consecutive parts of them; the first part is changed.

    Raises InputError: no pair at all.
    """
    whole = reduce(_joined, parts)
    if not len(whole.text_idx):
        raise InputError(
            f"the two tokenizers never end a token on the same character in {whole.n_texts} texts; "
            "use mapping_positions 'last'"
        )
    return whole


def _joined(whole: CollectedPairs, part: CollectedPairs) -> CollectedPairs:
    if part.sums is not whole.sums:
        whole.sums.merge(part.sums)
    return CollectedPairs(
        sums=whole.sums,
        places=whole.places,
        text_idx=torch.cat([whole.text_idx, part.text_idx + whole.n_texts]),
        end=torch.cat([whole.end, part.end]),
        n_truncated={side: n + part.n_truncated[side] for side, n in whole.n_truncated.items()},
        **{name: getattr(whole, name) + getattr(part, name) for name in _COUNTS},
    )


def statistics_content(pairs: CollectedPairs, layer_pair: LayerPair) -> dict[str, Any]:
    """Return the sums of a layer pair, a `PairStatistics`, and the places of their sample."""
    statistics = pairs.sums.of_pair(*pairs.places[layer_pair])
    rows = statistics.sample.rows
    return {
        "about": ABOUT_SUMS,
        "statistics": statistics,
        "report": pairs.report(),
        "sample_text_idx": pairs.text_idx[rows],
        "sample_end": pairs.end[rows],
    }


def training_data(texts: Sequence[NeutralText], sums: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `training_data.pt`: a sample of the pairs, and the text before each.

    texts: all that were read. sums: what `statistics_content` returned.
    """
    statistics = sums["statistics"]
    ends = list(zip(sums["sample_text_idx"].tolist(), sums["sample_end"].tolist(), strict=True))
    return {
        "about": ABOUT_PAIRS,
        "n_pairs": statistics.n_pairs,
        "H_source": statistics.sample.H_source.clone(),
        "H_target": statistics.sample.H_target.clone(),
        "texts": [texts[index].text[:end] for index, end in ends],
        "documents": [texts[index].document for index, _ in ends],
    }


def collection_notes(report: dict[str, Any]) -> list[str]:
    """Return sentences about the texts that were cut or gave no pair."""
    notes = [
        f"{n_truncated} neutral texts were cut to the {name}'s context"
        for name, n_truncated in report["n_truncated"].items()
        if n_truncated
    ]
    if report["n_texts_without_pairs"]:
        notes.append(f"{report['n_texts_without_pairs']} neutral texts gave no pair")
    return notes


def counted(texts: Sequence[NeutralText], progress: Bar) -> Iterator[PairedText]:
    """Yield the texts with their prompts, and advance a progress bar."""
    for item in texts:
        yield (*item.prompts, item.text)
        progress.update()

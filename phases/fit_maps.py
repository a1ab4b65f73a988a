"""The ridge map and those to compare it with, as phase 2 fits and keeps them."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from activation_extractor import ResidualNorm, measure_residual_norm
from experiment.executor import collect_in_chunks
from experiment.inputs import Inputs, LayerPair
from experiment.plan import mapping_fingerprint, pairs_fingerprint
from experiment.structures import expected
from maps.comparison_maps import KINDS, ComparisonMap, maps_table
from maps.pair_collection import CollectedPairs, PairSettings, collection_notes, statistics_content
from ridge_mapping import RidgeMapping
from support.pair_statistics import PairStatistics
from support.run_folder import RunFolder
from support.vocabulary import vector_names

RIDGE, OTHERS, RESULTS = "ridge_mapping.pt", "comparison_maps.pt", "cv_results.json"


@dataclass(frozen=True, repr=False)
class LearnedMaps:
    """What phase 2 hands to phase 3. results: what `cv_results.json` holds."""

    ridge: RidgeMapping
    others: dict[str, ComparisonMap]
    results: dict[str, Any]

    @property
    def residual_norm(self) -> ResidualNorm:
        """Of the target's activations that the map was fitted on."""
        return ResidualNorm(**self.results["target_residual_norm"])

    @property
    def transforms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """How each comparison map carries a direction over."""
        return {name: other.transform for name, other in self.others.items()}


def learn_maps(
    inputs: Inputs, folder: RunFolder, executor: Any, sums: dict[str, Any] | None = None
) -> tuple[LearnedMaps, ...]:
    """Return the maps of every layer pair: those of an earlier run, or made from one pass over the texts.

    sums: what `pair_statistics.pt` holds of the only pair, if it was collected elsewhere.
    """
    if inputs.band:
        return _learn_band(inputs, folder, executor)
    return (_learn_pair(inputs, folder, executor, sums),)


def _learn_pair(inputs: Inputs, folder: RunFolder, executor: Any, sums: dict[str, Any] | None) -> LearnedMaps:
    cache_key = pairs_fingerprint(inputs)
    name = "pair_statistics.pt"
    sums = sums or folder.current(name, cache_key, expected(name, inputs))
    if sums is None:
        pairs = _collect(inputs, executor, [inputs.layers])
        sums = folder.save(name, cache_key, statistics_content(pairs, inputs.layers))
    statistics = PairStatistics.from_content(sums["statistics"], name)
    folder.notes += collection_notes(sums["report"])
    save_training_data(inputs, folder, sums, statistics)
    return current_maps(inputs, folder) or fit_maps(inputs, folder, statistics, sums["report"])


def _learn_band(inputs: Inputs, folder: RunFolder, executor: Any) -> tuple[LearnedMaps, ...]:
    """Keep the maps of each pair in a folder of its own; the sums of many pairs would fill a disk."""
    parts = _pair_folders(inputs, folder)
    learned = [current_maps(*part) for part in parts]
    missing = [pair for pair, maps in zip(inputs.band, learned, strict=True) if maps is None]
    if missing:
        pairs = _collect(inputs, executor, missing)
        report = pairs.report()
        folder.notes += collection_notes(report)
        for index, (at_pair, own) in enumerate(parts):
            if learned[index] is None:
                with closing(own):
                    learned[index] = fit_maps(at_pair, own, pairs.statistics.pop(at_pair.layers), report)
    return tuple(learned)


def _collect(inputs: Inputs, executor: Any, layer_pairs: Sequence[LayerPair]) -> CollectedPairs:
    config = inputs.config
    settings = PairSettings(tuple(layer_pairs), config.mapping_positions, config.n_folds, config.seed)
    return collect_in_chunks(executor, inputs.map_texts, settings)


def save_training_data(
    inputs: Inputs, folder: RunFolder, sums: dict[str, Any], statistics: PairStatistics
) -> None:
    """Write a sample of the pairs with what both models had read; later phases don't need it.

    sums: what `pair_statistics.pt` holds.
    """
    name, cache_key = "training_data.pt", pairs_fingerprint(inputs)
    if folder.current(name, cache_key, expected(name, inputs)) is not None:
        return
    texts, sample = inputs.map_texts, statistics.sample
    ends = list(zip(sums["sample_text_idx"].tolist(), sums["sample_end"].tolist(), strict=True))
    data = {
        "n_pairs": statistics.n_pairs,
        "H_source": sample.H_source,
        "H_target": sample.H_target,
        "texts": [texts[index].text[:end] for index, end in ends],
        "documents": [texts[index].document for index, _ in ends],
    }
    folder.save(name, cache_key, data)


def fit_maps(
    inputs: Inputs, folder: RunFolder, statistics: PairStatistics, report: dict[str, Any]
) -> LearnedMaps:
    """Choose lambda, fit all maps on the summed pairs, and write them; `cv_results.json` last."""
    config, cache_key = inputs.config, mapping_fingerprint(inputs)
    ridge = RidgeMapping.from_statistics(statistics, config.lambda_unit)
    ridge.cross_validate(lambda_values=config.lambda_values, criterion=config.lambda_criterion)
    others = [
        ComparisonMap.from_statistics(kind, statistics, draw).cross_validate_from(ridge)
        for kind in KINDS
        for draw in range(len(vector_names(kind)))
    ]
    folder.save(OTHERS, cache_key, {"maps": {other.name: other.content() for other in others}})
    ridge.save(folder.path / RIDGE, cache_key)
    results = {
        **ridge.cv,
        "pairs": report,
        "analysis": ridge.analyze(),
        "maps": maps_table(ridge, others),
        "target_residual_norm": asdict(measure_residual_norm(statistics.sample.H_target)),
    }
    folder.save(RESULTS, cache_key, results)
    return _load_pair(inputs, folder)


def current_maps(inputs: Inputs, folder: RunFolder) -> LearnedMaps | None:
    """Return the maps of an earlier run; None if one of the three files is not current."""
    cache_key = mapping_fingerprint(inputs)
    files = [folder.current(name, cache_key, expected(name, inputs)) for name in (RESULTS, RIDGE, OTHERS)]
    return None if any(content is None for content in files) else _read(folder, *files)


def load_maps(inputs: Inputs, folder: RunFolder) -> tuple[LearnedMaps, ...]:
    """Return what phase 2 left of every layer pair. Raises InputError that names the phase to run first."""
    return tuple(_load_pair(*part) for part in _pair_folders(inputs, folder))


def _pair_folders(inputs: Inputs, folder: RunFolder) -> list[tuple[Inputs, RunFolder]]:
    """Return the inputs at each layer pair with the folder of its maps: of a band, one for each."""
    if not inputs.band:
        return [(inputs, folder)]
    names = {pair: "{}_{}".format(*pair) for pair in inputs.band}
    return [
        (inputs.at_layers(*pair), RunFolder(folder.path / "layers" / name, folder.fresh))
        for pair, name in names.items()
    ]


def _load_pair(inputs: Inputs, folder: RunFolder) -> LearnedMaps:
    cache_key = mapping_fingerprint(inputs)
    files = [folder.required(name, cache_key, 2, expected(name, inputs)) for name in (RESULTS, RIDGE, OTHERS)]
    return _read(folder, *files)


def _read(
    folder: RunFolder, results: dict[str, Any], ridge: dict[str, Any], others: dict[str, Any]
) -> LearnedMaps:
    path = str(folder.path / OTHERS)
    maps = {name: ComparisonMap.from_content(entry, path) for name, entry in others["maps"].items()}
    return LearnedMaps(RidgeMapping.from_content(ridge, str(folder.path / RIDGE)), maps, results)

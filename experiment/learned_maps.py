"""The ridge map and those to compare it with, as phase 2 fits and keeps them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from activation_extractor import ResidualNorm, measure_residual_norm
from experiment.comparison_maps import KINDS, ComparisonMap, maps_table
from experiment.grid import mapping_fingerprint, pairs_fingerprint
from experiment.inputs import Inputs
from ridge_mapping import RidgeMapping
from support.pair_statistics import PairStatistics
from support.run_folder import RunFolder

RIDGE, OTHERS, RESULTS = "ridge_mapping.pt", "comparison_maps.pt", "cv_results.json"


@dataclass(frozen=True)
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
        return {kind: other.transform for kind, other in self.others.items()}


def save_training_data(
    inputs: Inputs, folder: RunFolder, sums: dict[str, Any], statistics: PairStatistics
) -> None:
    """Write a sample of the pairs with what both models had read; later phases don't need it.

    sums: what `pair_statistics.pt` holds.
    """
    name, made_from = "training_data.pt", pairs_fingerprint(inputs)
    if folder.current(name, made_from) is not None:
        return
    texts, sample = inputs.neutral_texts, statistics.sample
    ends = list(zip(sums["sample_text_idx"].tolist(), sums["sample_end"].tolist(), strict=True))
    data = {
        "n_pairs": statistics.n_pairs,
        "H_source": sample.H_source,
        "H_target": sample.H_target,
        "texts": [texts[index].text[:end] for index, end in ends],
        "documents": [texts[index].document for index, _ in ends],
    }
    folder.save(name, made_from, data)


def fit_maps(
    inputs: Inputs, folder: RunFolder, statistics: PairStatistics, report: dict[str, Any]
) -> LearnedMaps:
    """Choose lambda, fit all maps on the summed pairs, and write them; `cv_results.json` last."""
    config, made_from = inputs.config, mapping_fingerprint(inputs)
    ridge = RidgeMapping.from_statistics(statistics, config.lambda_unit)
    ridge.cross_validate(lambda_values=config.lambda_values, criterion=config.lambda_criterion)
    others = {
        kind: ComparisonMap.from_statistics(kind, statistics).cross_validate_from(ridge) for kind in KINDS
    }
    folder.save(OTHERS, made_from, {"maps": {kind: other.content() for kind, other in others.items()}})
    ridge.save(folder.path / RIDGE, made_from)
    results = {
        **ridge.cv,
        "pairs": report,
        "analysis": ridge.analyze(),
        "maps": maps_table(ridge, others.values()),
        "target_residual_norm": asdict(measure_residual_norm(statistics.sample.H_target)),
    }
    folder.save(RESULTS, made_from, results)
    return load_maps(inputs, folder)


def current_maps(inputs: Inputs, folder: RunFolder) -> LearnedMaps | None:
    """Return the maps of an earlier run; None if one of the three files is not current."""
    made_from = mapping_fingerprint(inputs)
    files = [folder.current(name, made_from) for name in (RESULTS, RIDGE, OTHERS)]
    return None if any(content is None for content in files) else _read(folder, *files)


def load_maps(inputs: Inputs, folder: RunFolder) -> LearnedMaps:
    """Return what phase 2 left. Raises InputError that names the phase to run first."""
    made_from = mapping_fingerprint(inputs)
    return _read(folder, *(folder.required(name, made_from, 2) for name in (RESULTS, RIDGE, OTHERS)))


def _read(
    folder: RunFolder, results: dict[str, Any], ridge: dict[str, Any], others: dict[str, Any]
) -> LearnedMaps:
    path = str(folder.path / OTHERS)
    maps = {kind: ComparisonMap.from_content(entry, path) for kind, entry in others["maps"].items()}
    return LearnedMaps(RidgeMapping.from_content(ridge, str(folder.path / RIDGE)), maps, results)

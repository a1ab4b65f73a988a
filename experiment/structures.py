"""What each artifact has to hold for the phases that read it back; see `support.structure`.

Only what is read is asked for, so that runs of earlier versions stay finished.
"""

from collections.abc import Sequence
from typing import Any

from experiment.inputs import Inputs
from support.structure import NUMBER, Each, Shape
from support.vocabulary import MAP_KINDS, vector_names

CHECK = {"name": str, "technical": bool, "status": str, "detail": str, "remedy": str}
NORM = {"median": float, "median_with_massive": float, "massive_dimensions": [int]}
TEXT = (str, type(None))
ROW = {"key": str, "condition": str, "persona": TEXT, "alpha": NUMBER, "prompt": str, "output": str}
ROW |= {"prompt_idx": int, "seed": int}
ANSWER = {
    **dict.fromkeys(("writer", "persona", "prompt", "output"), str),
    "is_positive": bool,
    "is_kept": bool,
}
POINT = {"positions": str, "n_texts": int, "n_pairs": int, "held_out": Each({"r2": float})}
COUNTS = ("n_pairs", "n_texts", "n_texts_without_pairs", "n_source_tokens", "n_target_tokens")
MAP_ROW = {"map": str, "n": int, "lambda": NUMBER, "rank": (int, type(None)), "r2": float}
MAP_ROW |= {"r2_standardised": float, "r2_median_dimension": float, "retrieval_n": int}
MAP_ROW |= {"retrieval_accuracy": NUMBER}
CHOSEN = {"best_lambda": float, "best_r2": float, "best_at_edge": bool, "shuffled_r2": NUMBER}
CV = {
    **CHOSEN,
    "lambda_unit": str,
    "lambda_values": [float],
    **dict.fromkeys(("r2", "r2_standardised", "df"), Each(float)),
    **dict.fromkeys(("n_rows", "n_groups"), int),
    **dict.fromkeys(("best_r2_standardised", "best_r2_median_dimension"), float),
    "retrieval_accuracy": NUMBER,
    **{key: [float] for key in ("best_r2_per_dimension", "best_r2_per_component", "component_variance")},
}
CURVE = {key: [float] for key in ("r2", "vector", "activations")}
DOSE = {"persona": str, "method": str, "alpha": float}
SEARCH = {"source_layers": [int], "target_layers": [int], "best": [int, int]}
SEARCH |= {"agreement": Each([[float]]), "r2_standardised": [[float]], "score": [[float]]}


def _vector_names(methods: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for method in methods for name in vector_names(method))


def expected(name: str, inputs: Inputs) -> Any:
    """Return the structure of the artifact of this name. Raises KeyError for one that nobody reads."""
    source, target = (side.extractor.d_model for side in inputs.sides)
    n_folds = inputs.config.n_folds
    sums = _statistics(source, target, n_folds)
    means = {"source_mean": Shape((source,)), "target_mean": Shape((target,))}
    fitted = {"d_source": int, "d_target": int, "W": Shape((source, target)), **means}
    of_source, of_target, of_band = Shape((source,)), Shape((target,)), {}
    if inputs.band:
        source_layers, target_layers = zip(*inputs.band, strict=True)
        of_source, of_target = Each(of_source, source_layers), Each(of_target, target_layers)
        of_band = {"residual_norms": Each(NORM, target_layers)}
    names, methods = tuple(inputs.config.persona_names), _vector_names(inputs.config.steering_methods)
    structures = {
        "layer_search.json": SEARCH,
        "scorer_validation.json": {"personas": Each(dict)},
        "preflight.json": {"checks": [CHECK, ...]},
        "pair_statistics.pt": {
            "statistics": sums,
            "report": {**dict.fromkeys(COUNTS, int), "fraction_aligned": float, "n_truncated": Each(int)},
            **dict.fromkeys(("sample_text_idx", "sample_end"), Shape((None,))),
        },
        "training_data.pt": {
            "n_pairs": int,
            "H_source": Shape((None, source)),
            "H_target": Shape((None, target)),
            "texts": [str],
            "documents": [str],
        },
        "ridge_mapping.pt": {
            **fitted,
            **dict.fromkeys(("lambda_", "lambda_absolute"), float),
            "lambda_unit": str,
            "target_components": Shape((target, target)),
            "gram_eigenvalues": Shape((source,)),
            "n": int,
            "cv": CV,
        },
        "comparison_maps.pt": {
            "maps": Each({"kind": str, "draw": int, "cv": dict, **fitted}, _vector_names(MAP_KINDS))
        },
        "cv_results.json": {
            **CHOSEN,
            "maps": [MAP_ROW, ...],
            "target_residual_norm": NORM,
            "pairs": {"fraction_aligned": float},
        },
        "persona_vectors.pt": {
            "source_vectors": Each(of_source, names),
            "vectors": Each(Each(of_target, methods), names),
            "personas": Each(_cosines(), names),
            "energy_curves": Each(CURVE, names),
            "residual_norm": NORM,
            **of_band,
        },
        "extraction_responses.json": {"n": int, "rows": [{**ANSWER, "trait": NUMBER, "failure": TEXT}, ...]},
        "neutral_responses.json": {"writer": str, "n": int, "rows": [{"prompt": str, "output": str}]},
        "generation_results.json": {"n": int, "rows": [ROW, ...]},
        "alpha_search.json": {"bound": Each(float), "alphas": [DOSE, ...]},
        "ablation_samples.pt": {
            "n_texts": int,
            "points": [POINT],
            "training": Each(sums, ("last", "aligned")),
            "held_out": Each(_statistics(source, target, 2), ("last", "aligned")),
        },
    }
    return structures[name]


def _statistics(source: int, target: int, n_folds: int) -> dict[str, Any]:
    """Of what `PairStatistics.content` returns."""
    width = source + target
    return {
        **dict.fromkeys(("d_source", "d_target", "n_folds", "seed", "n_sample", "n_ungrouped"), int),
        "fold_of": Each(int),
        "n": Shape((n_folds,)),
        "sums": Shape((n_folds, width)),
        "products": Shape((n_folds, width, width)),
        "pilot": Shape((width,)),
        "_entropy": [int],
        "_n_drawn": int,
        "groups": list,
        "sample": {
            "H_source": Shape((None, source)),
            "H_target": Shape((None, target)),
            **dict.fromkeys(("folds", "rows", "priorities"), Shape((None,))),
        },
    }


def _cosines() -> dict[str, Any]:
    """Of a persona in what `transfer_personas` reports."""
    return {
        **dict.fromkeys(("cosine_to_oracle", "cosine_without_massive"), Each(float)),
        "highest_cosine_to_other_oracles": NUMBER,
        "oracle_energy": {"mean_r2": float},
    }

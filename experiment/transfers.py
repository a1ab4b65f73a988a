"""Carry every persona from source to target in every way, and compare with the oracle (phase 3)."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from activation_extractor import PersonaVector
from baseline_methods import BaselineTransfer
from experiment.inputs import NativeVectors
from experiment.learned_maps import LearnedMaps


def transfer_personas(natives: NativeVectors, maps: LearnedMaps, seed: int) -> dict[str, Any]:
    """Return what `persona_vectors.pt` holds.

    source_vectors: persona -> (d_source,). vectors: persona -> method -> (d_target,), of unit norm.
    personas: cosines to the oracle, with and without the target's massive dimensions, and how stable the
    vectors are. energy_curves: what of each oracle the map can reach. residual_norm: the target's.
    """
    norm, ridge = maps.residual_norm, maps.ridge
    source, target = natives["source"], natives["target"]
    baseline = BaselineTransfer(ridge.d_source, ridge.d_target, seed)
    vectors, report = {}, {}
    for name in source:
        arguments = (source[name].vector, target[name].vector, ridge)
        vectors[name] = baseline.apply_all_baselines(*arguments, other_maps=maps.transforms)
        report[name] = {
            "cosine_to_oracle": baseline.compare_to_oracle(*arguments, other_maps=maps.transforms),
            "cosine_without_massive": baseline.compare_to_oracle(
                *arguments, other_maps=maps.transforms, left_out=norm.massive_dimensions
            ),
        }
    for name, by_method in vectors.items():
        oracle = by_method["oracle"]
        others = [vectors[other]["oracle"] for other in vectors if other != name]
        report[name] |= {
            "highest_cosine_to_other_oracles": _highest_cosine(
                by_method["ridge_mapped"], others, norm.massive_dimensions
            ),
            "oracle_energy": ridge.predicted_energy(oracle),
            "source": _numbers(source[name]),
            "target": _numbers(target[name]),
        }
    return {
        "source_vectors": {name: native.vector for name, native in source.items()},
        "vectors": vectors,
        "personas": report,
        "energy_curves": {name: ridge.energy_curve(found["oracle"]) for name, found in vectors.items()},
        "residual_norm": asdict(norm),
    }


def _highest_cosine(vector: Tensor, others: Sequence[Tensor], left_out: Sequence[int]) -> float | None:
    kept = torch.ones(len(vector))
    kept[list(left_out)] = 0.0
    cosines = [torch.cosine_similarity(vector * kept, other * kept, dim=0).item() for other in others]
    return max(cosines, default=None)


def _numbers(persona: PersonaVector) -> dict[str, Any]:
    return {key: value for key, value in vars(persona).items() if key != "vector"}

"""Carry persona vectors from source to target at one layer pair, with their controls (phase 3).

A control that needs more than one persona's vector and a map has a function in `CONTROL_MAKERS`, one that is
made for all blocks at once in `OVER_BLOCKS`; one that is read from another source comes carried over by a map
of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from activation_extractor import PersonaVector
from baseline_methods import BaselineTransfer
from experiment.conditions import MAPPED, ORACLE, other_personas, vector_names
from ridge_mapping import RidgeMapping

# What the files of vectors say of themselves.
ABOUT_NATIVE = (
    "Both models' own persona vectors: the mean activation of positive texts minus that of negative ones, "
    "divided by its norm. vectors: side -> persona -> (blocks, d) float32; row i is of the output of the "
    "decoder block of layer_pairs[i] (source, target), counted from 0. measures: side -> persona -> for "
    "each row the norm before the division, the cosine between halves of the texts, and the numbers of "
    "texts. ceilings: persona -> the target's vectors of the texts that the source has read, where its own "
    "are of others."
)
ABOUT_VECTORS = (
    "Persona vectors for the target. kinds: persona -> what its vectors are made from. "
    "vectors: persona -> name -> (blocks, d_target) float32, rows of unit "
    "norm; row i is added to the output of the target's decoder block layer_pairs[i][1], counted from 0. "
    "`oracle` is the target's own vector, `ridge_mapped` the source's under the map; the others are naive "
    "transfers and controls. A control whose source tells the texts apart by nothing has rows of zeros. "
    "source_vectors: persona -> (blocks, d_source). residual_norms: for each row, "
    "`median` is what alpha 1 adds if alpha_unit is residual_norm. by_layer, personas: cosines and measures "
    "at each layer pair, and at the middle one; ceiling: the cosine of the oracle to the target's vector of "
    "the texts that the source has read, where the oracle is of other texts. control_maps: how well the maps "
    "of controls with a source of their own predict, and energy_curves: how much of the oracle the map "
    "predicts, at the middle pair."
)

Transform = Callable[[Tensor], Tensor]
Vectors = Mapping[str, Mapping[str, Tensor]]  # persona -> vector name -> (d_target,)


def measures(vector: PersonaVector) -> dict[str, Any]:
    """Return what is known of a vector beside itself."""
    return {key: value for key, value in vars(vector).items() if key != "vector"}


@dataclass(frozen=True, repr=False)
class PairTransfer:
    """Persona -> vector name -> (d_target,), and persona -> cosines and measures."""

    vectors: dict[str, dict[str, Tensor]]
    report: dict[str, dict[str, Any]]


def transfer_pair(
    source: Mapping[str, PersonaVector],
    target: Mapping[str, PersonaVector],
    ridge: RidgeMapping,
    other_maps: Mapping[str, Transform],
    massive_dimensions: Sequence[int],
    seed: int,
    of_controls: Mapping[str, Mapping[str, Tensor]] | None = None,
    ceilings: Mapping[str, Tensor] | None = None,
) -> PairTransfer:
    """Carry every persona from source to target in every way, and compare with the oracle.

    source, target: persona -> native vector in this layer pair; a persona of the source alone is a control of
        the others. ridge: names the layers that it maps.
    other_maps: vector name -> what carries a direction over. massive_dimensions: of the target.
    of_controls: vector name -> persona -> direction in the target, carried over from a control's own source;
        one of zeros stays so. ceilings: persona -> the target's vector of the texts that the source has read.
    """
    baseline = BaselineTransfer(ridge.d_source, ridge.d_target, seed)
    vectors, report = {}, {}
    left_out = {"cosine_to_oracle": (), "cosine_without_massive": massive_dimensions}
    for name in target:
        arguments = (source[name].vector, target[name].vector, ridge)
        vectors[name] = baseline.apply_all_baselines(*arguments, other_maps=other_maps)
        compare = partial(baseline.compare_to_oracle, *arguments, other_maps=other_maps)
        carried = {control: normalize(found[name], dim=0) for control, found in (of_controls or {}).items()}
        oracle, ceiling = vectors[name][ORACLE], (ceilings or {}).get(name)
        report[name] = {"ceiling": None if ceiling is None else {}}
        for measure, dimensions in left_out.items():
            cosines = {control: _cosine(each, oracle, dimensions) for control, each in carried.items()}
            report[name][measure] = compare(left_out=dimensions) | cosines
            if ceiling is not None:
                report[name]["ceiling"][measure] = _cosine(ceiling, oracle, dimensions)
        vectors[name] |= carried
    mapped = {name: ridge.transform(each.vector) for name, each in source.items() if name not in target}
    known = {**vectors, **{name: {MAPPED: vector / vector.norm()} for name, vector in mapped.items()}}
    for condition, make in CONTROL_MAKERS.items():
        for name, made in make(known).items():
            known[name] |= zip(vector_names(condition), made, strict=True)
    for name, by_name in vectors.items():
        others = [vectors[other][ORACLE] for other in vectors if other != name]
        report[name] |= {
            "highest_cosine_to_other_oracles": _highest_cosine(by_name[MAPPED], others, massive_dimensions),
            "oracle_energy": ridge.predicted_energy(by_name[ORACLE]),
            "source": measures(source[name]),
            "target": measures(target[name]),
        }
    return PairTransfer(vectors, report)


def _of_other_personas(vectors: Vectors) -> dict[str, list[Tensor]]:
    """Return persona -> the mapped vectors of other personas."""
    return {
        name: [vectors[other][MAPPED] for other in others]
        for name, others in other_personas(list(vectors)).items()
    }


Drawn = dict[str, list[Tensor]]  # persona -> a vector for each draw
# control -> makes its vectors of those at a layer pair
CONTROL_MAKERS: dict[str, Callable[[Vectors], Drawn]] = {"other_persona": _of_other_personas}


def _random_directions(oracle: Tensor, seed: int) -> list[Tensor]:
    """Return the native vectors of all blocks, each time under another random rotation.

    So a random direction keeps the native cosines between blocks. Directions that are drawn for each block
    alone add up to less in the residual stream: n of them to the square root of n, instead of nearly n.
    """
    axes, sizes, _ = torch.linalg.svd(oracle.double(), full_matrices=False)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in vector_names("random_direction"):
        drawn = torch.randn(oracle.shape[1], len(sizes), generator=generator, dtype=torch.float64)
        frame, _ = torch.linalg.qr(drawn)
        found.append((axes * sizes @ frame.T).to(oracle.dtype))
    return found


# control -> makes a vector for each draw of the native ones of all blocks, (blocks, d_target), and a seed
OVER_BLOCKS: dict[str, Callable[[Tensor, int], list[Tensor]]] = {"random_direction": _random_directions}


def _highest_cosine(vector: Tensor, others: Sequence[Tensor], left_out: Sequence[int]) -> float | None:
    return max((_cosine(other, vector, left_out) for other in others), default=None)


def _cosine(vector: Tensor, other: Tensor, left_out: Sequence[int]) -> float:
    """Return a cosine without some dimensions; that of a vector of zeros is 0."""
    kept = torch.ones(len(other))
    kept[list(left_out)] = 0.0
    return torch.cosine_similarity(vector * kept, other * kept, dim=0).item()

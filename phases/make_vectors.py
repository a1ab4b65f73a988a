"""Carry every persona from source to target in every way, and compare with the oracle (phase 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from activation_extractor import PersonaVector, ResidualNorm
from baseline_methods import BaselineTransfer
from experiment.inputs import LayerPair, NativeVectors
from experiment.plan import other_personas
from phases.fit_maps import LearnedMaps
from support.vocabulary import vector_names

MOST_BLOCKS = 10_000  # so that each block has random directions of its own under each seed


@dataclass(frozen=True, repr=False)
class SteeringVectors:
    """What is added at each block that is steered, and in what unit.

    vectors: persona -> method -> (blocks, d_target), each row of unit norm. norms: of these blocks' outputs.
    """

    vectors: dict[str, dict[str, Tensor]]
    norms: tuple[ResidualNorm, ...]

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "SteeringVectors":
        """Read what `persona_vectors.pt` holds, of one block or of a band."""
        norms = content.get("residual_norms", {"": content["residual_norm"]})
        vectors = {
            name: {method: _rows(found) for method, found in by_method.items()}
            for name, by_method in content["vectors"].items()
        }
        return cls(vectors, tuple(ResidualNorm(**norm) for norm in norms.values()))

    @property
    def middle_norm(self) -> ResidualNorm:
        """Of the block in the middle of the band; where alpha has no unit, alphas are sought around it."""
        return self.norms[len(self.norms) // 2]

    @property
    def medians(self) -> list[float]:
        """The unit of alpha at each block, if it has one."""
        return [norm.median for norm in self.norms]


def _rows(found: Tensor | Mapping[int, Tensor]) -> Tensor:
    return torch.stack(list(found.values())) if isinstance(found, Mapping) else found[None]


def transfer_all(
    pairs: Sequence[LayerPair], natives: Sequence[NativeVectors], maps: Sequence[LearnedMaps], seed: int
) -> dict[str, Any]:
    """Return what `persona_vectors.pt` holds, given natives and maps of every layer pair."""
    contents = [transfer_personas(*of_pair, seed) for of_pair in zip(pairs, natives, maps, strict=True)]
    content = contents[0] if len(contents) == 1 else _combine_band(pairs, contents)
    return {**content, "layer_pairs": [list(pair) for pair in pairs]}


def _combine_band(pairs: Sequence[LayerPair], contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `persona_vectors.pt` holds of a band, given what `transfer_personas` returned of each pair.

    Vectors are then layer -> (d,). What describes one pair is the middle one's; `by_layer` has all of them.
    """
    middle = contents[len(contents) // 2]
    names, methods = list(middle["vectors"]), list(next(iter(middle["vectors"].values())))
    by_layer = list(zip(pairs, contents, strict=True))
    return {
        **middle,
        "source_vectors": {
            name: {source: content["source_vectors"][name] for (source, _), content in by_layer}
            for name in names
        },
        "vectors": {
            name: {
                method: {target: content["vectors"][name][method] for (_, target), content in by_layer}
                for method in methods
            }
            for name in names
        },
        "residual_norms": {target: content["residual_norm"] for (_, target), content in by_layer},
        "by_layer": {target: content["personas"] for (_, target), content in by_layer},
    }


def transfer_personas(
    pair: LayerPair, natives: NativeVectors, maps: LearnedMaps, seed: int
) -> dict[str, Any]:
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
    for name, others in other_personas(list(vectors)).items():
        of_others = [vectors[other]["ridge_mapped"] for other in others]
        vectors[name] |= zip(vector_names("other_persona"), of_others, strict=True)
    generator = torch.Generator().manual_seed(seed * MOST_BLOCKS + pair[1])
    for drawn in vector_names("random_direction"):
        direction = torch.randn(ridge.d_target, generator=generator)
        for by_method in vectors.values():
            by_method[drawn] = direction / direction.norm()
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

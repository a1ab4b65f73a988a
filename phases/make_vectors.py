"""Make each persona's vectors: both models' own, and those carried from source to target (phase 3).

The vectors of a condition are made here: by `BaselineTransfer` and the comparison maps, or by a function in
`CONTROL_MAKERS` for controls that need more than one persona's vector and a map.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from activation_extractor import PersonaVector, ReadText
from baseline_methods import BaselineTransfer
from experiment.conditions import CONDITIONS, MAPPED, ORACLE, STEERED, vector_names
from experiment.executor import GenerationSettings
from experiment.models import SIDES, Side
from experiment.plan import Alphas, Cell, Row, SteeringVectors, grid, other_personas, text_rows
from experiment.run import FORMAT_VERSION, Artifact, Run
from maps.layer_bands import LayerPair
from phases.collect_responses import persona_responses_key
from phases.fit_maps import LearnedMaps, load_maps, mapping_data_key, maps_key
from reporting.tables import format_cosines
from support.artifacts import file_sha256, fingerprint
from texts.personas import Persona

logger = logging.getLogger(__name__)

MOST_BLOCKS = 10_000  # so that each block has random directions of its own under each seed
NativeVectors = dict[str, dict[str, list[PersonaVector]]]  # side -> persona -> a vector for each layer pair


def persona_key(run: Run, persona: Persona, sides: Sequence[str] = SIDES) -> str:
    """Return what a persona's native vectors in these sides depend on beside models and layers."""
    given = {side: run.inputs.given.get((side, persona.name)) for side in sides}
    parts: list[Any] = [[side, file_sha256(file.path)] for side, file in given.items() if file]
    measured = [side for side in sides if given[side] is None]
    if measured and persona in run.inputs.responding_personas:
        parts.append(persona_responses_key(run, persona, measured))
    elif measured:
        parts += [persona.positive_texts, persona.negative_texts, run.config.persona_position]
    return fingerprint(parts)


def _native_key(run: Run) -> str:
    inputs = run.inputs
    models = [[side.fingerprint for side in inputs.sides], inputs.layer_pairs]
    return fingerprint(
        FORMAT_VERSION, models, [[each.name, persona_key(run, each)] for each in inputs.personas]
    )


def vectors_key(run: Run) -> str:
    """Return what all vectors of a run depend on."""
    made = [vector_names(name) for name in STEERED]
    return fingerprint(_native_key(run), maps_key(run), run.config.seed, made)


def vector_key(run: Run, persona: str, condition: str) -> str:
    """Return what one persona's vectors of a condition and their unit depend on.

    Only what the condition needs counts, so that new lambda values touch mapped vectors alone.
    """
    inputs, config, needs = run.inputs, run.config, CONDITIONS[condition].needs
    source_layers = [source for source, _ in inputs.layer_pairs]
    by_name = {each.name: each for each in inputs.personas}
    parts: dict[str, Callable[[], Any]] = {
        "source_vector": lambda: [
            inputs.source.fingerprint,
            source_layers,
            persona_key(run, by_name[persona], ["source"]),
        ],
        "target_vector": lambda: persona_key(run, by_name[persona], ["target"]),
        "other_personas": lambda: [
            [inputs.source.fingerprint, source_layers, persona_key(run, by_name[other], ["source"])]
            for other in other_personas(config.persona_names)[persona]
        ],
        "map": lambda: maps_key(run),
        "seed": lambda: config.seed,
    }
    unit = mapping_data_key(run) if config.alpha_unit == "residual_norm" else "absolute"
    found = [parts[need]() for need in needs]
    return fingerprint(condition, CONDITIONS[condition].draws, found, inputs.target_layers, unit)


NATIVE_VECTORS = Artifact("native_vectors.pt", 3, _native_key)
PERSONA_VECTORS = Artifact("persona_vectors.pt", 3, vectors_key)
SIMILARITIES = Artifact("persona_similarities.json", 3, vectors_key)


def grid_cells(run: Run, alphas: Alphas) -> list[Cell]:
    """Return the cells of the run's grid, each with what its vectors depend on."""
    return grid(run.inputs, alphas, partial(vector_key, run))


def grid_rows(run: Run, alphas: Alphas) -> list[Row]:
    """Return a row for each text of phase 4."""
    return text_rows(run.inputs, grid_cells(run, alphas), run.inputs.prompts, run.config.seeds)


def native_vectors(run: Run) -> NativeVectors:
    """Return both models' own vectors at every layer pair, measured unless an earlier run has."""
    content = NATIVE_VECTORS.current_or_make(run, _measure)
    return {
        side: {
            name: [
                PersonaVector(vector, **measures)
                for vector, measures in zip(rows, content["measures"][side][name], strict=True)
            ]
            for name, rows in by_persona.items()
        }
        for side, by_persona in content["vectors"].items()
    }


def _measure(run: Run) -> dict[str, Any]:
    """Return what `native_vectors.pt` holds: vectors (blocks, d) by side and persona, and how stable they
    are.
    """
    vectors: dict[str, dict[str, Tensor]] = {side: {} for side in SIDES}
    measures: dict[str, dict[str, list[dict[str, Any]]]] = {side: {} for side in SIDES}
    for number, side in enumerate(run.inputs.sides):
        layers = [pair[number] for pair in run.inputs.layer_pairs]
        for persona in run.inputs.personas:
            found = _native(run, side, persona, layers)
            vectors[side.name][persona.name] = torch.stack([each.vector for each in found])
            measures[side.name][persona.name] = list(map(_numbers, found))
    return {"layer_pairs": _listed(run), "models": _models(run), "vectors": vectors, "measures": measures}


def _native(run: Run, side: Side, persona: Persona, layers: Sequence[int]) -> list[PersonaVector]:
    inputs = run.inputs
    if file := inputs.given.get((side.name, persona.name)):
        return [inputs.given_vector(side, file, layer) for layer in layers]
    texts, position = _read_texts(run, side.name, persona)
    by_layer = side.extractor.measure_persona_vectors(*texts, layers, position)
    return [by_layer[layer] for layer in layers]


def _read_texts(run: Run, side: str, persona: Persona) -> tuple[Sequence[Sequence[ReadText]], str]:
    """Return a persona's positive and negative texts or responses, and where they are read."""
    if persona not in run.inputs.responding_personas:
        return (persona.positive_texts, persona.negative_texts), run.config.persona_position
    by_sign = run.inputs.responses[side][persona.name]
    ask = run.inputs.prompting.question
    return [[(ask(side, asked), response) for asked, response in found] for found in by_sign], "response"


def _numbers(persona: PersonaVector) -> dict[str, Any]:
    return {key: value for key, value in vars(persona).items() if key != "vector"}


def _listed(run: Run) -> list[list[int]]:
    return [list(pair) for pair in run.inputs.layer_pairs]


def _models(run: Run) -> dict[str, dict[str, Any]]:
    return {side.name: side.description for side in run.inputs.sides}


def make_vectors(run: Run, maps: Sequence[LearnedMaps] | None = None) -> dict[str, Any]:
    """Return what `persona_vectors.pt` holds: all vectors of all personas, and their cosines to the oracle.

    maps: of phase 2; else those that an earlier run left.

    layer_pairs: [[source, target], ...]. source_vectors: persona -> (blocks, d_source). vectors: persona ->
    vector name -> (blocks, d_target), rows of unit norm in the order of layer_pairs. residual_norms: the
    target's, in the same order. by_layer: for each layer pair, persona -> cosines and measures; personas: the
    middle pair's.
    """
    content = PERSONA_VECTORS.current_or_make(run, lambda run: _transfer(run, maps or load_maps(run)))
    SIMILARITIES.save(run, {key: content[key] for key in ("layer_pairs", "personas", "residual_norms")})
    steering = SteeringVectors.from_content(content)
    norm = steering.middle_norm
    generator = GenerationSettings.of(run.inputs, steering.medians).generator(run.inputs.target)
    logger.info("cosines to the oracle\n\n%s\n", format_cosines(content["personas"]))
    logger.info(
        "median block-output norm of the target %.4g, %.4g without the massive dimensions %s; "
        "alpha 1 (%s) adds a norm of %.4g",
        norm.median_with_massive,
        norm.median,
        norm.massive_dimensions,
        run.config.alpha_unit,
        generator.alpha_scale(run.inputs.middle_pair[1]),
    )
    logger.info("%d personas, %s", len(content["personas"]), PERSONA_VECTORS.path(run))
    return content


def _transfer(run: Run, maps: Sequence[LearnedMaps]) -> dict[str, Any]:
    natives, pairs = native_vectors(run), run.inputs.layer_pairs
    found = [
        transfer_pair(
            pair,
            {side: {name: rows[index] for name, rows in natives[side].items()} for side in SIDES},
            of_pair,
            run.config.seed,
        )
        for index, (pair, of_pair) in enumerate(zip(pairs, maps, strict=True))
    ]
    middle = found[len(found) // 2]
    return {
        "layer_pairs": _listed(run),
        "models": _models(run),
        "source_vectors": {
            name: torch.stack([each.vector for each in rows]) for name, rows in natives["source"].items()
        },
        "vectors": {
            name: {key: torch.stack([each.vectors[name][key] for each in found]) for key in by_name}
            for name, by_name in middle.vectors.items()
        },
        "residual_norms": [asdict(each.residual_norm) for each in maps],
        "personas": middle.report,
        "by_layer": [each.report for each in found],
        "energy_curves": {
            name: maps[len(maps) // 2].ridge.energy_curve(by_name[ORACLE])
            for name, by_name in middle.vectors.items()
        },
    }


@dataclass(frozen=True, repr=False)
class PairTransfer:
    """The vectors of one layer pair: persona -> vector name -> (d_target,), and persona -> cosines and
    measures.
    """

    vectors: dict[str, dict[str, Tensor]]
    report: dict[str, dict[str, Any]]


def transfer_pair(
    pair: LayerPair, natives: Mapping[str, Mapping[str, PersonaVector]], maps: LearnedMaps, seed: int
) -> PairTransfer:
    """Carry every persona from source to target in every way, and compare with the oracle.

    natives: side -> persona -> its own vector at this layer pair.
    """
    norm, ridge = maps.residual_norm, maps.ridge
    source, target = natives["source"], natives["target"]
    baseline = BaselineTransfer(ridge.d_source, ridge.d_target, seed)
    vectors, report = {}, {}
    for name in source:
        arguments = (source[name].vector, target[name].vector, ridge)
        vectors[name] = baseline.apply_all_baselines(*arguments, other_maps=maps.transforms)
        compare = partial(baseline.compare_to_oracle, *arguments, other_maps=maps.transforms)
        report[name] = {
            "cosine_to_oracle": compare(),
            "cosine_without_massive": compare(left_out=norm.massive_dimensions),
        }
    for condition, make in CONTROL_MAKERS.items():
        for name, made in make(vectors, pair, seed).items():
            vectors[name] |= zip(vector_names(condition), made, strict=True)
    for name, by_name in vectors.items():
        others = [vectors[other][ORACLE] for other in vectors if other != name]
        report[name] |= {
            "highest_cosine_to_other_oracles": _highest_cosine(
                by_name[MAPPED], others, norm.massive_dimensions
            ),
            "oracle_energy": ridge.predicted_energy(by_name[ORACLE]),
            "source": _numbers(source[name]),
            "target": _numbers(target[name]),
        }
    return PairTransfer(vectors, report)


Vectors = Mapping[str, Mapping[str, Tensor]]  # persona -> vector name -> (d_target,)


def _of_other_personas(vectors: Vectors, pair: LayerPair, seed: int) -> dict[str, list[Tensor]]:
    """Return persona -> the mapped vectors of other personas."""
    return {
        name: [vectors[other][MAPPED] for other in others]
        for name, others in other_personas(list(vectors)).items()
    }


def _random_directions(vectors: Vectors, pair: LayerPair, seed: int) -> dict[str, list[Tensor]]:
    """Return persona -> directions of unit norm: the same for all, others for each block and seed."""
    d_target = len(next(iter(vectors.values()))[ORACLE])
    generator = torch.Generator().manual_seed(seed * MOST_BLOCKS + pair[1])
    drawn = [torch.randn(d_target, generator=generator) for _ in vector_names("random_direction")]
    return {name: [direction / direction.norm() for direction in drawn] for name in vectors}


# control -> makes its vectors: (vectors so far, layer pair, seed) -> persona -> a vector for each draw
CONTROL_MAKERS: dict[str, Callable[[Vectors, LayerPair, int], dict[str, list[Tensor]]]] = {
    "other_persona": _of_other_personas,
    "random_direction": _random_directions,
}


def _highest_cosine(vector: Tensor, others: Sequence[Tensor], left_out: Sequence[int]) -> float | None:
    kept = torch.ones(len(vector))
    kept[list(left_out)] = 0.0
    cosines = [torch.cosine_similarity(vector * kept, other * kept, dim=0).item() for other in others]
    return max(cosines, default=None)

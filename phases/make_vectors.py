"""Make each persona's vectors: both models' own, and those carried from source to target (phase 3).

`analysis.vector_transfer` carries the vectors over at one layer pair; here every layer pair has its turn, and
the keys say what each condition's vectors depend on. The same is done with resampled extraction texts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from activation_extractor import PersonaVector, ReadText
from analysis.extraction_spread import (
    ABOUT_RESAMPLED,
    FEWEST_TEXTS,
    N_RESAMPLES,
    cosine_spread,
    mapped_spread,
    resampled_vectors,
)
from analysis.vector_transfer import (
    ABOUT_NATIVE,
    ABOUT_VECTORS,
    measures,
    transfer_pair,
)
from experiment.conditions import CONDITIONS, MAPPED, ORACLE, STEERED, other_personas, vector_names
from experiment.executor import GenerationSettings
from experiment.models import SIDES, Side
from experiment.plan import Alphas, Cell, Row, SteeringVectors, grid, text_rows
from experiment.run import FORMAT_VERSION, Artifact, Run
from phases.collect_responses import persona_responses_key
from phases.fit_maps import LearnedMaps, load_maps, mapping_data_key, maps_key
from reporting.tables import format_cosines, format_spread
from support.artifacts import file_sha256, fingerprint
from texts.personas import Persona

logger = logging.getLogger(__name__)

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
        FORMAT_VERSION,
        models,
        [[each.name, persona_key(run, each)] for each in (*inputs.personas, *inputs.control_personas)],
    )


def vectors_key(run: Run) -> str:
    """Return what all vectors of a run depend on."""
    made = [vector_names(name) for name in STEERED]
    return fingerprint(_native_key(run), maps_key(run), run.config.seed, made)


def _resampled_key(run: Run) -> str:
    return fingerprint(_native_key(run), maps_key(run), run.config.seed, run.config.extraction_resamples)


def vector_key(run: Run, persona: str, condition: str) -> str:
    """Return what one persona's vectors of a condition and their unit depend on.

    Only what the condition needs counts, so that new lambda values touch mapped vectors alone.
    """
    inputs, config, needs = run.inputs, run.config, CONDITIONS[condition].needs
    source_layers = [source for source, _ in inputs.layer_pairs]
    by_name = {each.name: each for each in (*inputs.personas, *inputs.control_personas)}

    def in_source(*names: str) -> list[Any]:
        keys = [persona_key(run, by_name[name], ["source"]) for name in names]
        return [inputs.source.fingerprint, source_layers, keys]

    parts: dict[str, Callable[[], Any]] = {
        "source_vector": lambda: in_source(persona),
        "target_vector": lambda: persona_key(run, by_name[persona], ["target"]),
        "other_personas": lambda: in_source(*other_personas(list(by_name))[persona]),
        "map": lambda: maps_key(run),
        "seed": lambda: config.seed,
    }
    unit = mapping_data_key(run) if config.alpha_unit == "residual_norm" else "absolute"
    found = [parts[need]() for need in needs]
    return fingerprint(condition, CONDITIONS[condition].draws, found, inputs.target_layers, unit)


NATIVE_VECTORS = Artifact("native_vectors.pt", 3, _native_key)
PERSONA_VECTORS = Artifact("persona_vectors.pt", 3, vectors_key)
SIMILARITIES = Artifact("persona_similarities.json", 3, vectors_key)
RESAMPLED_VECTORS = Artifact("resampled_vectors.pt", 3, _resampled_key)
EXTRACTION_SPREAD = Artifact("extraction_spread.json", 3, _resampled_key)


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
                PersonaVector(vector, **known)
                for vector, known in zip(rows, content["measures"][side][name], strict=True)
            ]
            for name, rows in by_persona.items()
        }
        for side, by_persona in content["vectors"].items()
    }


def _measure(run: Run) -> dict[str, Any]:
    """Return what `native_vectors.pt` holds: vectors (blocks, d) and measures by side and persona."""
    vectors: dict[str, dict[str, Tensor]] = {side: {} for side in SIDES}
    known: dict[str, dict[str, list[dict[str, Any]]]] = {side: {} for side in SIDES}
    for number, side in enumerate(run.inputs.sides):
        layers = [pair[number] for pair in run.inputs.layer_pairs]
        controls = run.inputs.control_personas if side.name == "source" else ()
        for persona in (*run.inputs.personas, *controls):
            found = _native(run, side, persona, layers)
            vectors[side.name][persona.name] = torch.stack([each.vector for each in found])
            known[side.name][persona.name] = list(map(measures, found))
    return {"about": ABOUT_NATIVE, "vectors": vectors, "measures": known}


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
    unit = generator.alpha_scale(run.inputs.middle_pair[1])
    logger.info(
        f"median block-output norm of the target {norm.median_with_massive:.4g}, {norm.median:.4g} without "
        f"the massive dimensions {norm.massive_dimensions}; alpha 1 ({run.config.alpha_unit}) adds {unit:.4g}"
    )
    logger.info("%d personas, %s", len(content["personas"]), PERSONA_VECTORS.path(run))
    return content


def _transfer(run: Run, maps: Sequence[LearnedMaps]) -> dict[str, Any]:
    natives = native_vectors(run)
    found = [
        transfer_pair(
            *({name: rows[index] for name, rows in natives[side].items()} for side in SIDES),
            learned.ridge,
            learned.transforms,
            learned.residual_norm.massive_dimensions,
            run.config.seed,
        )
        for index, learned in enumerate(maps)
    ]
    middle = found[len(found) // 2]
    return {
        "about": ABOUT_VECTORS,
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


def resample_vectors(run: Run, maps: Sequence[LearnedMaps] | None = None) -> None:
    """Make vectors from resampled extraction texts, and write and log how far they spread.

    maps: of phase 2; else those that an earlier run left. Without `extraction_resamples`, nothing is made.
    """
    if not run.config.extraction_resamples:
        return
    content = RESAMPLED_VECTORS.current_or_make(run, lambda run: _resample(run, maps or load_maps(run)))
    EXTRACTION_SPREAD.save(run, {key: content[key] for key in ("n_resamples", "layer_pairs", "personas")})
    table = format_spread(content["personas"])
    logger.info("spread over %d resamples of the extraction texts\n\n%s\n", content["n_resamples"], table)


def _resample(run: Run, maps: Sequence[LearnedMaps]) -> dict[str, Any]:
    vectors, spreads = {}, {}
    for persona in run.inputs.personas:
        why_not = _why_not(run, persona)
        spreads[persona.name] = {"not_resampled": why_not}
        if why_not is None:
            vectors[persona.name], spread = _resample_persona(run, persona, maps)
            spreads[persona.name] |= spread
    return {"about": ABOUT_RESAMPLED, "n_resamples": N_RESAMPLES, "vectors": vectors, "personas": spreads}


def _why_not(run: Run, persona: Persona) -> str | None:
    """Return why a persona's texts cannot be resampled, None if they can."""
    measured = [side for side in SIDES if (side, persona.name) not in run.inputs.given]
    if not measured:
        return "its vectors are given"
    fewest = min(len(texts) for side in measured for texts in _read_texts(run, side, persona)[0])
    return f"it has {fewest} texts on a side, fewer than {FEWEST_TEXTS}" if fewest < FEWEST_TEXTS else None


def _resample_persona(
    run: Run, persona: Persona, maps: Sequence[LearnedMaps]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return condition -> the first resampled vectors, and the spread of cosines over all of them.

    A vector that is given stays what it is.
    """
    made, spread = {}, {}
    for number, side in enumerate(run.inputs.sides):
        layers = [pair[number] for pair in run.inputs.layer_pairs]
        if file := run.inputs.given.get((side.name, persona.name)):
            given = [run.inputs.given_vector(side, file, layer).vector for layer in layers]
            whole = torch.stack(given)[None]
            made[side.name], spread[side.name] = (whole, whole.expand(N_RESAMPLES, -1, -1)), None
        else:
            made[side.name] = _resample_side(run, side, persona, layers)
            spread[side.name] = cosine_spread(*made[side.name])
    massive = [learned.residual_norm.massive_dimensions for learned in maps]
    mapped, of_mapped = mapped_spread(
        made["source"], made["target"], [learned.ridge.transform for learned in maps], massive
    )
    resampled = {MAPPED: ("source", mapped), ORACLE: ("target", made["target"][1])}
    n = run.config.extraction_resamples
    first = {name: found[:n].clone() for name, (side, found) in resampled.items() if spread[side]}
    return first, spread | of_mapped


def _resample_side(run: Run, side: Side, persona: Persona, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a model's vectors of all texts and of the resamples; see `resampled_vectors`."""
    texts, position = _read_texts(run, side.name, persona)
    by_layer = side.extractor.extract_sides(*texts, layers, position)
    positive, negative = (torch.stack([by_layer[layer][sign] for layer in layers], 1) for sign in (0, 1))
    responds = persona in run.inputs.responding_personas
    # Sides that read the same texts share their draws, and a persona's do not depend on its name.
    drawn_from = run.inputs.prompting.responders[side.name] if responds else "texts"
    seed = int(fingerprint(run.config.seed, drawn_from)[:15], 16)
    are_pairs = not responds and len(positive) == len(negative)
    return resampled_vectors(positive, negative, are_pairs, seed)

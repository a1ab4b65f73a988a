"""Make each persona's vectors: both models' own, and those carried from source to target (phase 3).

`analysis.vector_transfer` carries the vectors over at one layer pair; here every layer pair has its turn, and
the keys say what each condition's vectors depend on. The same is done with resampled extraction texts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
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
    OVER_BLOCKS,
    PairTransfer,
    measures,
    transfer_pair,
)
from experiment.conditions import (
    CONDITIONS,
    MAPPED,
    ORACLE,
    STEERED,
    condition_of,
    other_personas,
    vector_names,
)
from experiment.config import ASKED_KINDS
from experiment.executor import GenerationSettings
from experiment.models import SIDES, Side
from experiment.plan import Alphas, Cell, Row, SteeringVectors, grid, text_rows
from experiment.run import FORMAT_VERSION, Artifact, Run
from maps.comparison_maps import maps_table
from phases.collect_responses import persona_responses_key
from phases.fit_maps import (
    LearnedMaps,
    at_kind,
    control_key,
    left_out,
    load_maps,
    map_runs,
    mapping_data_key,
    maps_key,
    source_seeds,
)
from reporting.tables import format_cosines, format_spread
from support.artifacts import file_sha256, fingerprint
from support.errors import InputError
from texts.personas import Persona, half_of

logger = logging.getLogger(__name__)

NativeVectors = dict[str, dict[str, list[PersonaVector]]]  # side -> persona -> a vector for each layer pair


def persona_key(run: Run, persona: Persona, sides: Sequence[str] = SIDES) -> str:
    """Return what a persona's native vectors in these sides depend on beside models and layers."""
    given = {side: run.inputs.given.get((side, persona.name)) for side in sides}
    parts: list[Any] = [[side, file_sha256(file.path)] for side, file in given.items() if file]
    measured = [side for side in sides if given[side] is None]
    kind = vector_kind(run, persona)
    if measured and kind == "responses":
        parts.append(persona_responses_key(run, persona, measured))
    elif measured and kind == "prompt":
        asked = persona.questions[: run.config.extraction.n_questions]
        shown = [run.inputs.prompting.instructed(side, "?", "!") for side in measured]
        parts += [kind, persona.instructions, asked, shown]
    elif measured:
        parts += [persona.positive_texts, persona.negative_texts, kind]
    if run.config.halves_texts:
        parts.append(["halves", measured])
    return fingerprint(parts)


def _native_key(run: Run) -> str:
    inputs = run.inputs
    models = [[side.fingerprint for side in inputs.sides], inputs.layer_pairs, run.config.halves_texts]
    return fingerprint(
        FORMAT_VERSION,
        models,
        [[each.name, persona_key(run, each)] for each in (*inputs.personas, *inputs.control_personas)],
    )


def vectors_key(run: Run) -> str:
    """Return what all vectors of a run depend on."""
    made = [vector_names(name) for name in STEERED]
    made += [f"without {kind}" for kind in left_out(run)]
    made += [control_key(each, name) for each in map_runs(run) for name in run.config.source_controls]
    return fingerprint(_carried_key(run), made)


def _carried_key(run: Run) -> str:
    kinds = [vector_kind(run, persona) for persona in run.inputs.personas]
    maps = [maps_key(each) for each in map_runs(run)]
    return fingerprint(_native_key(run), kinds, maps, run.config.seed)


def _resampled_key(run: Run) -> str:
    return fingerprint(_carried_key(run), run.config.extraction_resamples)


def vector_key(run: Run, persona: str, condition: str) -> str:
    """Return what one persona's vectors of a condition and their unit depend on.

    Only what the condition needs counts, so that new lambda values touch mapped vectors alone.
    """
    inputs, config, needs = run.inputs, run.config, CONDITIONS[condition].needs
    source_layers = [source for source, _ in inputs.layer_pairs]
    by_name = {each.name: each for each in (*inputs.personas, *inputs.control_personas)}
    mapped = at_kind(run, vector_kind(run, by_name[persona]))

    def in_source(*names: str) -> list[Any]:
        keys = [persona_key(run, by_name[name], ["source"]) for name in names]
        return [inputs.source.fingerprint, source_layers, keys]

    parts: dict[str, Callable[[], Any]] = {
        "source_vector": lambda: in_source(persona),
        "target_vector": lambda: persona_key(run, by_name[persona], ["target"]),
        "other_personas": lambda: in_source(*other_personas(list(by_name))[persona]),
        "map": lambda: maps_key(mapped),
        "seed": lambda: config.seed,
        "control_source": lambda: [
            inputs.source.fingerprint,
            persona_key(run, by_name[persona], ["source"]),
            control_key(mapped, condition),
        ],
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
    return {"about": ABOUT_NATIVE, "vectors": vectors, "measures": known, "ceilings": _ceilings(run)}


def _ceilings(run: Run) -> dict[str, Tensor]:
    """Return persona -> the target's vectors of the texts that the source reads, where it reads others."""
    inputs = run.inputs
    measured = [each for each in inputs.personas if ("target", each.name) not in inputs.given]
    return {
        persona.name: torch.stack(
            [each.vector for each in _native(run, inputs.target, persona, inputs.target_layers, half=0)]
        )
        for persona in (measured if run.config.halves_texts else ())
    }


def _native(
    run: Run, side: Side, persona: Persona, layers: Sequence[int], half: int | None = None
) -> list[PersonaVector]:
    inputs = run.inputs
    if file := inputs.given.get((side.name, persona.name)):
        return [inputs.given_vector(side, file, layer) for layer in layers]
    texts, position = _read_texts(run, side.name, persona, half)
    by_layer = side.extractor.measure_persona_vectors(*texts, layers, position)
    return [by_layer[layer] for layer in layers]


def vector_kind(run: Run, persona: Persona) -> str:
    """Return the kind of a persona's vectors, one of VECTOR_KINDS; a control's is that of the run's persona.

    No responses are collected for a control, nor where both vectors are given: texts are read instead.
    """
    config, is_control = run.config, persona in run.inputs.control_personas
    kind = config.vector_kind(config.persona_names[0] if is_control else persona.name)
    is_missing = kind == "responses" and persona not in run.inputs.responding_personas
    return config.persona_position if is_missing else kind


def check_readable(run: Run, persona: Persona) -> None:
    """Raise InputError: nothing is left on a side of what a persona's vectors are made from."""
    for side in SIDES:
        _read_texts(run, side, persona)


def _read_texts(
    run: Run, side: str, persona: Persona, half: int | None = None
) -> tuple[Sequence[Sequence[ReadText]], str]:
    """Return a persona's positive and negative texts, responses or prompts, and where they are read.

    half: which half of them, where they are halved; by default 0 for the source, 1 for the target.
    Raises InputError: nothing is left on a side, or a prompt is longer than the model's context.
    """
    inputs, kind = run.inputs, vector_kind(run, persona)
    texts: Sequence[Sequence[Any]] = persona.positive_texts, persona.negative_texts
    if kind == "responses":
        texts = inputs.responses[side][persona.name]
    elif kind == "prompt":
        texts = inputs.persona_prompts(side, persona)
    if run.config.halves_texts:
        half = SIDES.index(side) if half is None else half
        texts = [half_of(found, half, persona.questions if kind in ASKED_KINDS else ()) for found in texts]
    if not all(texts):
        raise InputError(
            f"persona {persona.name!r} has no text, response or prompt left on a side for the {side}; give "
            'more texts, or questions, set "disjoint_texts": false, or leave out the controls that read them'
        )
    if kind == "responses":
        ask = inputs.prompting.question
        return [[(ask(side, asked), response) for asked, response in found] for found in texts], "response"
    if kind == "prompt":
        return [[prompt for _, prompt in found] for found in texts], "last"
    return texts, kind


def make_vectors(run: Run, maps: Sequence[LearnedMaps] | None = None) -> dict[str, Any]:
    """Return what `persona_vectors.pt` holds: all vectors of all personas, and their cosines to the oracle.

    maps: of phase 2; else those that an earlier run left.

    layer_pairs: [[source, target], ...]. kinds: persona -> one of VECTOR_KINDS. source_vectors: persona ->
    (blocks, d_source). vectors: persona -> vector name -> (blocks, d_target), rows of unit norm in the order
    of layer_pairs. residual_norms: the target's, in the same order. by_layer: for each layer pair, persona ->
    cosines and measures; personas: the middle pair's.
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
    for name, by_name in content["vectors"].items():
        if empty := [
            CONDITIONS[condition_of(vector)].label for vector, rows in by_name.items() if not rows.any()
        ]:
            run.folder.notes.append(
                f"{name}: both sides of its texts are the same to {', '.join(empty)} where they are read: no "
                "vector is added, its cosine counts as 0, and what it writes is the unsteered text"
            )
    return content


def _transfer(run: Run, maps: Sequence[LearnedMaps]) -> dict[str, Any]:
    natives, of_controls = native_vectors(run), _control_vectors(run)
    ceilings = NATIVE_VECTORS.require(run)["ceilings"]
    kinds = {persona.name: vector_kind(run, persona) for persona in run.inputs.personas}
    are_prompts = {name: kind == "prompt" for name, kind in kinds.items()}

    def carried(index: int, learned: LearnedMaps) -> PairTransfer:
        return transfer_pair(
            *({name: rows[index] for name, rows in natives[side].items()} for side in SIDES),
            learned.ridge,
            learned.transforms,
            maps[index].residual_norm.massive_dimensions,
            run.config.seed,
            {
                vector: {
                    name: learned.controls[vector].transform(rows[index]) for name, rows in by_persona.items()
                }
                for vector, by_persona in of_controls.items()
            },
            {name: rows[index] for name, rows in ceilings.items()},
        )

    found = []
    for index, learned in enumerate(maps):
        # Other personas' vectors, a control, are carried over by the map of the persona that has it.
        by_map = {
            is_prompt: carried(index, learned.of_prompts if is_prompt else learned)
            for is_prompt in set(are_prompts.values())
        }
        vectors = {name: by_map[is_prompt].vectors[name] for name, is_prompt in are_prompts.items()}
        report = {name: by_map[is_prompt].report[name] for name, is_prompt in are_prompts.items()}
        found.append(PairTransfer(vectors, report))
    middle = found[len(found) // 2]
    vectors = {
        name: {key: torch.stack([each.vectors[name][key] for each in found]) for key in by_name}
        for name, by_name in middle.vectors.items()
    }
    for by_name in vectors.values():
        for control, make in OVER_BLOCKS.items():
            made = make(by_name[ORACLE], run.config.seed)
            by_name |= zip(vector_names(control), made, strict=True)
    return {
        "about": ABOUT_VECTORS,
        "source_vectors": {
            name: torch.stack([each.vector for each in rows]) for name, rows in natives["source"].items()
        },
        "vectors": vectors,
        "residual_norms": [asdict(each.residual_norm) for each in maps],
        "kinds": kinds,
        "personas": middle.report,
        "by_layer": [each.report for each in found],
        "control_maps": maps_table(maps[len(maps) // 2].ridge, maps[len(maps) // 2].controls)[1:],
        "energy_curves": {
            name: maps[len(maps) // 2].for_kind(kinds[name]).ridge.energy_curve(by_name[ORACLE])
            for name, by_name in middle.vectors.items()
        },
    }


def _control_vectors(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return vector name -> persona -> (blocks, d_source): what controls read in the place of the source.

    Layers of the same weights are read in one pass.
    """
    wanted: dict[int | None, dict[str, list[int]]] = {}  # seed of random weights -> vector name -> layers
    for condition in run.config.source_controls:
        read = CONDITIONS[condition].source
        for vector, seed in source_seeds(run, condition).items():
            layers = [read.layer_pair(pair)[0] for pair in run.inputs.layer_pairs]
            wanted.setdefault(seed, {})[vector] = layers
    found: dict[str, dict[str, Tensor]] = {}
    for seed, by_vector in wanted.items():
        side = run.inputs.source if seed is None else run.inputs.source.untrained(seed)
        for persona in run.inputs.personas:
            texts, position = _read_texts(run, "source", persona)
            layers = list(chain.from_iterable(by_vector.values()))
            by_layer = side.extractor.measure_persona_vectors(*texts, layers, position, may_vanish=True)
            for vector, own in by_vector.items():
                rows = torch.stack([by_layer[layer].vector for layer in own])
                found.setdefault(vector, {})[persona.name] = rows
    return found


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
    transforms = [learned.for_kind(vector_kind(run, persona)).ridge.transform for learned in maps]
    mapped, of_mapped = mapped_spread(made["source"], made["target"], transforms, massive)
    resampled = {MAPPED: ("source", mapped), ORACLE: ("target", made["target"][1])}
    n = run.config.extraction_resamples
    first = {name: found[:n].clone() for name, (side, found) in resampled.items() if spread[side]}
    return first, spread | of_mapped


def _resample_side(run: Run, side: Side, persona: Persona, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a model's vectors of all texts and of the resamples; see `resampled_vectors`."""
    texts, position = _read_texts(run, side.name, persona)
    by_layer = side.extractor.extract_sides(*texts, layers, position)
    positive, negative = (torch.stack([by_layer[layer][sign] for layer in layers], 1) for sign in (0, 1))
    responds = vector_kind(run, persona) == "responses"
    # Sides that read the same texts share their draws, and a persona's do not depend on its name.
    drawn_from = run.inputs.prompting.responders[side.name] if responds else "texts"
    seed = int(fingerprint(run.config.seed, drawn_from)[:15], 16)
    are_pairs = not responds and len(positive) == len(negative)
    return resampled_vectors(positive, negative, are_pairs, seed)

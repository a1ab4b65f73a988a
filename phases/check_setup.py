"""Check the set-up before the experiment, by the checklist of `analysis.checklist` (phase 1).

A technical check that fails stops the run, since every later number would be wrong. A check of the
experiment's premises (stable vectors, fluent unsteered text, vectors that work in their own model) that fails
is repeated in the summary: what follows may be true, and a negative result is one.
"""

import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from activation_extractor import ResidualNorm, measure_residual_norm
from analysis.checklist import (
    Check,
    check_baseline,
    check_effects,
    check_extraction,
    check_steering,
    check_vectors,
    failures,
)
from experiment.conditions import ORACLE
from experiment.config import ExperimentConfig
from experiment.executor import Worker
from experiment.inputs import load_judge
from experiment.models import SIDES
from experiment.plan import UNSTEERED_CELL, Cell, SteeringVectors, sampling
from experiment.run import FORMAT_VERSION, Artifact, Run
from maps.layer_bands import LayerPair
from phases.choose_alphas import alpha_bracket
from phases.fit_maps import mapping_data_key
from phases.generate_texts import generate_development
from phases.make_vectors import NATIVE_VECTORS, NativeVectors, native_vectors, persona_key
from phases.score_texts import cached_judge, judge_key, judged_description, judged_trait, scorers_key
from steered_generation import SteeredGenerator
from support.artifacts import fingerprint
from support.journal import rows_of
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)

N_NORM_TEXTS = 256  # on which the unit of alpha is measured, before the map has measured it on all
SEARCH_DEPTHS = (0.25, 0.5, 0.75)  # of the bracket, where alphas are yet to be searched for


class PreflightError(RuntimeError):
    """A technical check failed: numbers made now would be wrong."""


def check_judge(config: ExperimentConfig, folder: RunFolder) -> None:
    """Ask a judge on a server one question, unless it has judged texts of this folder before.

    Raises InputError: it does not answer.
    """
    if not config.use_gpt4 or config.judge.kind != "server":
        return
    known = {} if folder.fresh else rows_of(folder.path / "judgements_journal.jsonl")
    key = fingerprint(judge_key(config))
    if all(row["judge"] != key for row in known.values()):
        load_judge(config).check()


def environment() -> dict[str, str]:
    """Return the versions that numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def report(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return the checks as dictionaries for JSON, and log one line each."""
    for check in checks:
        level = logging.WARNING if check.status == "fail" else logging.INFO
        remedy = f" Try: {check.remedy}" if check.status == "fail" else ""
        logger.log(level, "preflight %-7s %s: %s.%s", check.status, check.name, check.detail, remedy)
    return [asdict(check) for check in checks]


def _key(run: Run) -> str:
    inputs, config = run.inputs, run.config
    planned = [[name, _planned(run, name)] for name in config.persona_names]
    bracket = config.alpha_search.bracket if config.alpha_values == "auto" else None
    prompting = [inputs.prompting.prompt(side, "?") for side in ("target", inputs.fluency_side.name)]
    judged = [judge_key(config), list(map(judged_description, inputs.personas))] if inputs.judge else None
    scored = [inputs.fluency_side.fingerprint, scorers_key(run, ["classifier"]), judged]
    generated = [sampling(inputs), config.steer_positions, config.seed, inputs.development_prompts, prompting]
    # The norm that alpha is a multiple of is measured on texts of the map.
    unit = [config.alpha_unit, mapping_data_key(run)]
    vectors = [NATIVE_VECTORS.key(run), planned, bracket, config.check_source_vectors]
    return fingerprint(FORMAT_VERSION, vectors, scored, generated, unit)


PREFLIGHT = Artifact("preflight.json", 1, _key)


def check_setup(run: Run) -> dict[str, Any]:
    """Return what `preflight.json` holds: the checklist and the versions. Checks that failed are made again.

    Raises PreflightError: a technical check failed.
    """
    done = PREFLIGHT.current(run)
    if done is None or failures(done["checks"], technical_only=True):
        checks = report(_run_checks(run))
        done = PREFLIGHT.save(run, {"environment": environment(), "checks": checks})
    if failed := failures(done["checks"], technical_only=True):
        raise PreflightError(f"preflight: {'; '.join(failed)}")
    passed = sum(check["status"] == "pass" for check in done["checks"])
    logger.info("%d of %d preflight checks passed, %s", passed, len(done["checks"]), PREFLIGHT.path(run))
    return done


def _run_checks(run: Run) -> list[Check]:
    """Return the technical checks, and if they pass, those of the experiment's premises."""
    inputs = run.inputs
    natives, middle = native_vectors(run), len(inputs.layer_pairs) // 2
    at_middle = {
        side: {name: rows[middle] for name, rows in by_persona.items()}
        for side, by_persona in natives.items()
    }
    first = next(iter(at_middle["target"].values())).vector
    ((_, checks),) = run.executor.run("call", [(_check_models, inputs.middle_pair, first)])
    checks += [check for side in at_middle for check in check_vectors(side, at_middle[side])]
    if any(check.technical and check.status == "fail" for check in checks):
        return checks
    unsteered, steered = _own_texts(run, run, natives)
    scorer = inputs.fluency_side
    shown = [inputs.prompting.prompt(scorer.name, prompt) for prompt in inputs.development_prompts]
    checks.append(check_baseline((scorer.model, scorer.tokenizer), shown, unsteered))
    checks += check_effects("target", _scores(run), unsteered, steered)
    if run.config.check_source_vectors:
        mirrored = run.with_inputs(inputs.of_source())
        checks += check_effects("source", _scores(mirrored), *_own_texts(run, mirrored, natives))
    return checks


def _check_models(worker: Worker, pair: LayerPair, vector: Tensor) -> list[Check]:
    """Return the checks of reading and steering where texts are read and written; vector: the target's."""
    sides = [worker.side(name).at_layer(layer) for name, layer in zip(SIDES, pair, strict=True)]
    checks = [check for side in sides for check in check_extraction(side.name, side.extractor)]
    target = sides[1]
    generator = SteeredGenerator(target.model, target.tokenizer, block_path=target.extractor.block_path)
    return checks + check_steering(generator, target.extractor, vector)


def _scores(run: Run) -> dict[str, Callable[[Sequence[str]], Sequence[float | None]]]:
    """Return persona -> what scores a text of each development prompt: its classifier, else the judge."""
    judge, classifiers, prompts = cached_judge(run), run.inputs.classifiers, run.inputs.development_prompts
    scores = {}
    for persona in run.inputs.personas:
        if persona.name in classifiers:
            scores[persona.name] = classifiers[persona.name].score
        elif judge:
            scores[persona.name] = partial(judged_trait, judge, persona, prompts)
    return scores


def _own_texts(
    run: Run, steered_run: Run, natives: NativeVectors
) -> tuple[list[str], dict[str, dict[float, list[str]]]]:
    """Return unsteered texts, and persona -> alpha -> texts that a model's own vectors steered.

    steered_run: the run itself, or one with the source in the target's place.
    """
    side, layers = steered_run.inputs.target.name, steered_run.inputs.target_layers
    of_pairs = [pair[SIDES.index(side)] for pair in run.inputs.layer_pairs]
    chosen = [of_pairs.index(layer) for layer in layers]  # a source layer may have several target layers
    vectors = {
        name: {ORACLE: torch.stack([rows[index].vector for index in chosen])}
        for name, rows in natives[side].items()
    }
    norms = tuple(map(measure_residual_norm, _neutral_activations(run, side, layers)))
    steering = SteeringVectors(vectors, norms)
    cells = [UNSTEERED_CELL]
    for persona in run.inputs.personas:
        # The unit of alpha here is not yet the one that the map measures: no other phase shares these texts.
        of_vector = side, layers, persona_key(run, persona, [side])
        key = fingerprint("preflight", of_vector, run.config.alpha_unit, steering.medians)
        alphas = _alphas(run, steering.middle_norm, persona.name)
        cells += [Cell(ORACLE, persona.name, alpha, key) for alpha in alphas]
    by_cell = generate_development(steered_run, cells, steering)
    texts = [[row["output"] for row in rows] for rows in by_cell]
    steered: dict[str, dict[float, list[str]]] = {name: {} for name in run.config.persona_names}
    for cell, outputs in zip(cells[1:], texts[1:], strict=True):
        steered[cell.persona][cell.alpha] = outputs
    return texts[0], steered


def _neutral_activations(run: Run, side: str, layers: Sequence[int]) -> list[Tensor]:
    """Return a side's activations where the map learns, (n, d) for each layer."""
    read = run.inputs.mapping_texts[:N_NORM_TEXTS]
    texts, prompts = [item.text for item in read], [item.prompts[SIDES.index(side)] for item in read]
    extractor = run.inputs.side(side).extractor
    tokens, ends = extractor.token_ends(texts, run.inputs.mapping_positions, prompts=prompts)
    positions = [list(by_character.values()) for by_character in ends]
    by_layer = extractor.extract_tokens(tokens, positions, layers)
    return [by_layer[layer] for layer in layers]


def _alphas(run: Run, norm: ResidualNorm, persona: str) -> list[float]:
    """Return the alphas that the preflight tries."""
    planned = _planned(run, persona)
    if run.config.alpha_values != "auto":
        return planned
    low, high = alpha_bracket(run, norm)
    return [low * (high / low) ** depth for depth in planned]


def _planned(run: Run, persona: str) -> list[float]:
    """Return three of the listed alphas, or the depths of the bracket to be searched."""
    if run.config.alpha_values == "auto":
        return list(SEARCH_DEPTHS)
    ordered = sorted(run.config.alphas_of(persona))
    return sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})


def n_preflight_cells(run: Run) -> int:
    """Return how many cells of development texts the preflight generates, with either model."""
    of_model = 1 + sum(len(_planned(run, name)) for name in run.config.persona_names)
    return of_model * (1 + run.config.check_source_vectors)

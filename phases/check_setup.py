"""Check the set-up before the experiment: the debugging checklist as code (phase 1).

A technical check that fails stops the run, since every later number would be wrong. A check of the
experiment's premises (stable vectors, fluent unsteered text, an oracle that works) that fails is repeated in
the summary: what follows may be true, and a negative result is one.
"""

import logging
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from activation_extractor import (
    ActivationExtractor,
    PersonaVector,
    ResidualNorm,
    block_output,
    measure_residual_norm,
)
from evaluation import continuation_perplexities, repetition_metrics
from experiment.conditions import ORACLE
from experiment.plan import UNSTEERED_CELL, Cell, SteeringVectors, sampling
from experiment.run import FORMAT_VERSION, Artifact, Run
from phases.choose_alphas import alpha_bracket
from phases.fit_maps import mapping_data_key
from phases.generate_texts import generate_development
from phases.make_vectors import NATIVE_VECTORS, native_vectors, vector_key
from phases.score_texts import scorers_key
from steered_generation import SteeredGenerator, steering_error
from support.artifacts import fingerprint
from support.errors import InputError
from texts.encoding import encode

logger = logging.getLogger(__name__)

EXACT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
MIN_SPLIT_HALF_COSINE = 0.5
MIN_ORACLE_EFFECT = 0.05
MAX_FLUENT_RATIO = 0.5
MAX_COLLAPSE_RATE = 0.2
N_NORM_TEXTS = 256  # on which the unit of alpha is measured, before the map has measured it on all
SEARCH_DEPTHS = (0.25, 0.5, 0.75)  # of the bracket, where alphas are yet to be searched for
PROBE = "The committee met on Tuesday to discuss the new bridge over the river."
LONGER_PROBE = f"{PROBE} Nobody could say how long the work would take or what it would cost."


@dataclass(frozen=True)
class Check:
    """One item of the checklist. status: `pass`, `fail` or `pending`."""

    name: str
    technical: bool
    status: str
    detail: str
    remedy: str


class PreflightError(RuntimeError):
    """A technical check failed: numbers made now would be wrong."""


def _check(name: str, passed: bool, detail: str, remedy: str, technical: bool = False) -> Check:
    return Check(name, technical, "pass" if passed else "fail", detail, "" if passed else remedy)


def failures(checks: Sequence[Mapping[str, Any]], technical_only: bool = False) -> list[str]:
    """Return a phrase for each check that failed, with what to try."""
    failed = [
        each for each in checks if each["status"] == "fail" and (each["technical"] or not technical_only)
    ]
    return [f"{each['name']} failed: {each['detail']}. Try: {each['remedy']}" for each in failed]


def check_extraction(side: str, extractor: ActivationExtractor) -> list[Check]:
    """Check width, and that extraction equals the block's output in a plain forward pass.

    The plain pass has no padding, does not stop early, and records with a hook of its own.
    """
    recorded: list[Tensor] = []
    block = extractor.blocks[extractor.layer_idx]
    with (
        block.register_forward_hook(lambda module, args, output: recorded.append(block_output(output))),
        torch.inference_mode(),
    ):
        tokens = torch.tensor(encode(extractor.tokenizer, [PROBE]), device=extractor.model.device)
        extractor.model(tokens, use_cache=False)
    plain = recorded[0][0, -1].float().cpu()
    extracted = extractor.extract_batch([PROBE, LONGER_PROBE], "last")[0]
    width = len(plain)
    difference = ((extracted - plain).abs().max() / plain.abs().max()).item()
    tolerance = EXACT_TOLERANCE[extractor.model.dtype]
    return [
        _check(
            f"{side}_width",
            width == extractor.d_model,
            f"block {extractor.layer_idx} of {len(extractor.blocks)} writes {width} dimensions, the "
            f"configuration says {extractor.d_model}",
            f"name the decoder blocks with {side}_block_path",
            technical=True,
        ),
        _check(
            f"{side}_extraction",
            difference < tolerance,
            f"extraction differs from a plain forward pass at the last token by {difference:.1e} (relative)",
            "load the model in float32, or report this architecture",
            technical=True,
        ),
    ]


def check_steering(
    generator: SteeredGenerator, extractor: ActivationExtractor, vector: Tensor
) -> list[Check]:
    """Check that steering adds exactly alpha * v where extraction reads, reaches the logits, and ends.

    generator: with alpha_unit `absolute`.
    """
    model, layer_idx = generator.model, extractor.layer_idx
    tokens = torch.tensor(encode(generator.tokenizer, [PROBE]), device=model.device)
    reader = copy(extractor)
    reader.read_steered = True
    with torch.inference_mode():
        before = model(tokens).logits
        # As long as the block's own output, so that rounding does not hide the vector.
        alpha = extractor.extract(PROBE).norm().item() / generator.alpha_scale(layer_idx)
        generator.register_steering(layer_idx, vector, alpha)
        error = steering_error(generator, layer_idx, PROBE, reader.extract)
        steered = model(tokens).logits
        generator.clear_steering()
        after = model(tokens).logits
    return [
        _check(
            "steering_hook",
            error < EXACT_TOLERANCE[model.dtype] and not torch.equal(steered, before),
            f"steered minus unsteered output of block {layer_idx} differs from alpha * v by {error:.1e} "
            "(relative)",
            "check that the hook is on the right module: set target_block_path",
            technical=True,
        ),
        _check(
            "steering_removed",
            torch.equal(after, before),
            "logits after clear_steering equal those before",
            "another hook is on the model; load it afresh",
            technical=True,
        ),
    ]


def check_vectors(side: str, vectors: Mapping[str, PersonaVector]) -> list[Check]:
    """Check unit norm and that two halves of the texts give similar vectors."""
    norms = {name: vector.vector.norm().item() for name, vector in vectors.items()}
    cosines = {name: vector.split_half_cosine for name, vector in vectors.items()}
    # A vector from a file has no texts to be halved.
    measured = [cosines[name] for name, vector in vectors.items() if vector.n_positive]
    shown = ", ".join(
        f"{name} n/a" if value is None else f"{name} {value:.2f}" for name, value in cosines.items()
    )
    return [
        _check(
            f"{side}_vector_norm",
            all(abs(norm - 1) < 1e-4 for norm in norms.values()),
            f"norms between {min(norms.values()):.5f} and {max(norms.values()):.5f}",
            "extract the persona vectors again",
            technical=True,
        ),
        _check(
            f"{side}_vector_stability",
            None not in measured and min(measured, default=1) >= MIN_SPLIT_HALF_COSINE,
            f"split-half cosines: {shown}",
            f"give more extraction texts (8 or more a side; wanted {MIN_SPLIT_HALF_COSINE}), another "
            "layer, or persona_position 'mean'",
        ),
    ]


def check_baseline(scorer: tuple[Any, Any], prompts: Sequence[str], outputs: Sequence[str]) -> Check:
    """Check that unsteered text is fluent: few loops, and far likelier than its own words shuffled.

    scorer: (model, tokenizer) that gives the perplexity.
    """
    rng = random.Random(0)
    shuffled = [" " + " ".join(rng.sample(words := output.split(), len(words))) for output in outputs]
    plain = _average(statistics.median, continuation_perplexities(*scorer, prompts, outputs))
    mixed = _average(statistics.median, continuation_perplexities(*scorer, prompts, shuffled))
    collapsed = [repetition_metrics(output)["is_collapsed"] for output in outputs]
    rate = sum(value is not False for value in collapsed) / len(collapsed)
    ratio = plain / mixed if plain is not None and mixed else float("inf")
    return _check(
        "baseline_fluent",
        ratio < MAX_FLUENT_RATIO and rate <= MAX_COLLAPSE_RATE,
        f"median perplexity is {ratio:.2f} of that of the same words shuffled; {rate:.0%} collapsed or empty",
        "check the model and its dtype (Gemma-3 overflows in float16), or lower the temperature",
    )


def check_oracle(
    classifiers: Mapping[str, Any],
    unsteered: Sequence[str],
    steered: Mapping[str, Mapping[float, Sequence[str]]],
) -> list[Check]:
    """Check for each persona that the native vector raises the trait at some alpha.

    unsteered: texts. steered: persona -> alpha -> texts of the same prompts.
    """
    checks = []
    for persona, by_alpha in steered.items():
        name = f"oracle_moves_{persona}"
        if persona not in classifiers:
            remedy = "give the persona labelled texts"
            checks.append(Check(name, False, "pending", "no classifier: not checked", remedy))
            continue
        score = classifiers[persona].score
        before = _average(statistics.fmean, score(unsteered))
        if before is None:
            raise InputError("every unsteered text is empty; check the target model and max_new_tokens")
        after = {alpha: _average(statistics.fmean, score(texts)) for alpha, texts in by_alpha.items()}
        effects = {alpha: mean - before for alpha, mean in after.items() if mean is not None}
        shown = ", ".join(
            f"{format(effects[alpha], '+.2f') if alpha in effects else 'no text'} at alpha {alpha:g}"
            for alpha in after
        )
        checks.append(
            _check(
                name,
                max(effects.values(), default=0.0) >= MIN_ORACLE_EFFECT,
                f"trait probability unsteered {before:.2f}, change {shown} ({len(unsteered)} texts)",
                f"other alpha_values (wanted {MIN_ORACLE_EFFECT:+.2f}), another target layer, or a model "
                "that can show this trait: without a working oracle there is nothing to recover",
            )
        )
    return checks


def check_lambda(lambda_values: Sequence[float], cv: Mapping[str, Any] | None) -> Check:
    """Check that lambda is chosen by cross-validation; pending until phase 2 has run.

    cv: `RidgeMapping.cv`, or None before phase 2.
    """
    name, grid = "lambda_by_cross_validation", f"{len(lambda_values)} values"
    widen = "widen lambda_values beyond the best one"
    if len(lambda_values) < 2:
        return _check(name, False, "lambda_values has a single value", "give several values")
    if cv is None:
        return Check(name, False, "pending", f"{grid}, to be chosen in phase 2", "")
    detail = (
        f"{cv['best_lambda']:g} of {grid}, held-out R2 {cv['best_r2']:.3f}, shuffled {cv['shuffled_r2']:.3f}"
    )
    if cv["best_at_edge"]:
        return _check(name, False, f"{detail}: at the edge of the grid", widen)
    better = cv["best_r2"] > max(0.0, cv["shuffled_r2"])
    return _check(name, better, detail, "check that both models read the same texts; try more samples")


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


def _average(of: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return of(present) if present else None


def _key(run: Run) -> str:
    inputs, config = run.inputs, run.config
    oracles = [[name, vector_key(run, name, ORACLE), _planned(run, name)] for name in config.persona_names]
    bracket = config.alpha_search.bracket if config.alpha_values == "auto" else None
    prompting = [inputs.prompting.prompt(side, "?") for side in ("target", inputs.fluency_side.name)]
    scored = [inputs.fluency_side.fingerprint, scorers_key(run, ["classifier"])]
    generated = [sampling(inputs), config.steer_positions, config.seed, inputs.development_prompts, prompting]
    # The norm that alpha is a multiple of is measured on texts of the map.
    unit = [config.alpha_unit, mapping_data_key(run)]
    return fingerprint(FORMAT_VERSION, NATIVE_VECTORS.key(run), oracles, bracket, scored, generated, unit)


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
    inputs, target = run.inputs, run.inputs.target
    natives, middle = native_vectors(run), len(inputs.layer_pairs) // 2
    at_middle = {
        side: {name: rows[middle] for name, rows in by_persona.items()}
        for side, by_persona in natives.items()
    }
    checks = [check for side in inputs.sides for check in check_extraction(side.name, side.extractor)]
    generator = SteeredGenerator(target.model, target.tokenizer, block_path=run.config.target_block_path)
    first = next(iter(at_middle["target"].values())).vector
    checks += check_steering(generator, target.extractor, first)
    checks += [check for side in at_middle for check in check_vectors(side, at_middle[side])]
    if any(check.technical and check.status == "fail" for check in checks):
        return checks
    oracles = {name: torch.stack([each.vector for each in rows]) for name, rows in natives["target"].items()}
    unsteered, steered = _oracle_texts(run, oracles)
    scorer = inputs.fluency_side
    shown = [inputs.prompting.prompt(scorer.name, prompt) for prompt in inputs.development_prompts]
    checks.append(check_baseline((scorer.model, scorer.tokenizer), shown, unsteered))
    return [*checks, *check_oracle(inputs.classifiers, unsteered, steered)]


def _oracle_texts(
    run: Run, oracles: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, dict[float, list[str]]]]:
    """Return unsteered texts, and persona -> alpha -> texts that the native vectors steered.

    oracles: persona -> (blocks, d_target), each row of unit norm.
    """
    norms = tuple(map(measure_residual_norm, _neutral_activations(run)))
    steering = SteeringVectors({name: {ORACLE: rows} for name, rows in oracles.items()}, norms)
    cells = [UNSTEERED_CELL]
    for name in run.config.persona_names:
        # The unit of alpha here is not yet the one that the map measures: no other phase shares these texts.
        key = fingerprint(vector_key(run, name, ORACLE), "preflight", steering.medians)
        cells += [Cell(ORACLE, name, alpha, key) for alpha in _alphas(run, steering.middle_norm, name)]
    by_cell = generate_development(run, cells, steering)
    texts = [[row["output"] for row in rows] for rows in by_cell]
    steered: dict[str, dict[float, list[str]]] = {name: {} for name in run.config.persona_names}
    for cell, outputs in zip(cells[1:], texts[1:], strict=True):
        steered[cell.persona][cell.alpha] = outputs
    return texts[0], steered


def _neutral_activations(run: Run) -> list[Tensor]:
    """Return the target's activations where the map learns, (n, d_target) for each layer pair."""
    inputs = run.inputs
    read = inputs.mapping_texts[:N_NORM_TEXTS]
    texts, prompts = [item.text for item in read], [item.prompts[1] for item in read]
    extractor = inputs.target.extractor
    tokens, ends = extractor.token_ends(texts, run.inputs.mapping_positions, prompts=prompts)
    positions = [list(by_character.values()) for by_character in ends]
    by_layer = extractor.extract_tokens(tokens, positions, inputs.target_layers)
    return [by_layer[layer] for layer in inputs.target_layers]


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
    ordered = sorted(run.config.alphas_of(persona, ORACLE))
    return sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})


def n_preflight_cells(run: Run) -> int:
    """Return how many cells of development texts the preflight generates."""
    return 1 + sum(len(_planned(run, name)) for name in run.config.persona_names)

"""The debugging checklist as code: what a check of the set-up measures, and what it should be.

A technical check that fails means that every later number would be wrong. The others are premises of the
experiment: stable vectors, fluent unsteered text, native vectors that move the trait.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from activation_extractor import ActivationExtractor, PersonaVector, block_output
from evaluation import continuation_perplexities, repetition_metrics
from model_loading import evaluation_mode
from steered_generation import SteeredGenerator, steering_error
from texts.encoding import encode

EXACT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
MIN_SPLIT_HALF_COSINE = 0.5
MIN_ORACLE_EFFECT = 0.05
MAX_FLUENT_RATIO = 0.5
MAX_COLLAPSE_RATE = 0.2
REMEDIES = {
    "target": "without a working oracle there is nothing to recover",
    "source": "where it has no effect here, nothing says that the source model has found the trait",
}
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
    extracted = extractor.extract_batch([PROBE, LONGER_PROBE], "last")[0]
    with (
        block.register_forward_hook(lambda module, args, output: recorded.append(block_output(output))),
        evaluation_mode(extractor.model),
        torch.inference_mode(),
    ):
        tokens = torch.tensor(encode(extractor.tokenizer, [PROBE]), device=extractor.model.device)
        extractor.model(tokens, use_cache=False)
    plain = recorded[0][0, -1].float().cpu()
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
    with evaluation_mode(model), torch.inference_mode():
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


def effect_check_name(side: str, persona: str) -> str:
    """Return the name of the check that a side's own vector moves a persona's trait in that side's model."""
    return f"oracle_moves_{persona}" if side == "target" else f"source_vector_moves_{persona}"


def check_effects(
    side: str,
    scores: Mapping[str, Callable[[Sequence[str]], Sequence[float | None]]],
    unsteered: Sequence[str],
    steered: Mapping[str, Mapping[float, Sequence[str]]],
) -> list[Check]:
    """Check for each persona that a model's own vector raises the trait in that model at some alpha.

    side: `target`, whose own vector is the oracle, or `source`. scores: persona -> scores texts, 0 to 1.
    unsteered: texts. steered: persona -> alpha -> texts of the same prompts.
    """
    checks = []
    for persona, by_alpha in steered.items():
        name = effect_check_name(side, persona)
        if persona not in scores:
            remedy = "give the persona labelled texts, or set use_gpt4"
            checks.append(Check(name, False, "pending", "nothing scores it: not checked", remedy))
            continue
        score = scores[persona]
        before = _average(statistics.fmean, score(unsteered))
        if before is None:
            remedy = f"check the {side} model, max_new_tokens and the judge"
            checks.append(_check(name, False, "no unsteered text has a score", remedy))
            continue
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
                f"trait unsteered {before:.2f}, change {shown} ({len(unsteered)} texts)",
                f"other alpha_values (wanted {MIN_ORACLE_EFFECT:+.2f}), another {side} layer, or a model "
                f"that can show this trait: {REMEDIES[side]}",
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


def _average(of: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return of(present) if present else None

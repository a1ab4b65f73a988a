"""Decide whether each persona transferred: a table of scores in, typed verdicts out (phase 5).

Each validated scorer decides for itself, by the tests of `significance`; where scorers differ, the more
cautious verdict stands. Why a verdict stands is data here; `reporting.tables` makes sentences of it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.results_table import Alphas, at_alphas, prompt_means
from analysis.significance import (
    Interval,
    corrected_rate,
    equivalence_p,
    fieller,
    holm,
    mean_interval,
    prompts_needed,
    recovery,
    sign_flip_p,
)
from experiment.conditions import CONTROLS, DECIDING_CONTROLS, MAPPED, ORACLE, SCORERS, UNSTEERED

FEWEST_PROMPTS = 8
SIGNIFICANT = 0.05
NATIVE_WORKS = 0.05  # the oracle has an effect if the lower bound of it is above this
NATIVE_FAILS = 0.15  # the oracle has no effect to speak of if the upper bound of it is below this
TRANSFERRED, NOT_TRANSFERRED = 0.5, 0.25  # bounds of the recovery, as shares of the native effect
ALL_COLLAPSE = 0.5  # share of collapsed texts under every vector from which steering itself is at fault
NO_BETTER = 0.15  # share of the native effect; mapped surely exceeds the best control by less than this
# From the most to the least that is claimed; of two scorers' verdicts, the later stands.
VERDICTS = (
    "equivalent to native",
    "transferred",
    "partial",
    "inconclusive",
    "not transferred",
    "native steering ineffective",
)
CLAIMS, DENIALS = set(VERDICTS[:3]), set(VERDICTS[4:])

# What a scorer's verdict follows from. In the first three cases nothing could be tested.
Reason = Literal[
    "no scores",  # a condition in `missing` has no scored text
    "few prompts",
    "equal scores",
    "native effect",  # whether the oracle has an effect is decided or open
    "recovery",
    "control missing",  # the recovery is large enough, and controls in `missing` were not run
    "best control",  # recovery and best control together
]
Scores = Mapping[str, np.ndarray]  # condition -> difference to unsteered at each prompt
Key = tuple[str, str]  # (persona, scorer)


@dataclass(frozen=True)
class Effect(Interval):
    """A condition's effect over prompts.

    anti_steered: share of prompts whose score falls. p_mapped_over_it: of mapped doing no more, adjusted by
        `holm`; None where it is not a control.
    """

    anti_steered: float
    p_mapped_over_it: float | None


@dataclass(frozen=True)
class ScorerVerdict:
    """The verdict of one scorer on one persona, with the numbers that decided it; None is not known.

    problems: why the scorer is not validated. validated_on: which texts a judge is validated on.
    n_left_out: prompts that lack a score under a condition.
    missing: conditions that the reason is about. native, mapped, over_best_control: effects. fieller: another
    interval of the recovery. highest_p: of mapped over the controls. prompts_needed: to settle an open case.
    rates: condition -> share of texts over the scorer's threshold, {raw, corrected}.
    """

    verdict: str
    reason: Reason
    n_prompts: int
    missing: tuple[str, ...] = ()
    native: Interval | None = None
    mapped: Interval | None = None
    recovery: Interval | None = None
    fieller: Interval | None = None
    equivalence_p: float | None = None
    best_control: str | None = None
    over_best_control: Interval | None = None
    highest_p: float | None = None
    prompts_needed: int | None = None
    is_validated: bool = False
    problems: tuple[str, ...] = ()
    validated_on: str = ""
    n_left_out: int = 0
    effects: Mapping[str, Effect] = field(default_factory=dict)
    rates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one persona.

    rests_on: the validated scorers. decided_by: the one whose verdict stands, None if no scorer is validated.
    alphas: condition -> the alpha at which it was compared. collapse_rates: condition with a vector -> share
    of its texts that collapse.
    """

    verdict: str
    reason: Literal["no scorer validated", "scorers disagree", "decided by scorer", "all collapse"]
    decided_by: str | None
    rests_on: tuple[str, ...]
    scorers: Mapping[str, ScorerVerdict]
    alphas: Mapping[str, float | None]
    collapse_rates: Mapping[str, float] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return the verdict as JSON holds it; the ends of an unbounded interval are None."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decide_verdicts(
    table: pd.DataFrame, alphas: Alphas, validation: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, Verdict]:
    """Return persona -> its verdict at these alphas.

    table: from `results_table`. validation: persona -> scorer -> what `scoring.validation.validate` returned;
    a score that needs no validation says that it is validated.
    """
    texts = {persona: at_alphas(table, persona, of_persona) for persona, of_persona in alphas.items()}
    columns = {
        (persona, scorer): SCORERS[scorer].column for persona in alphas for scorer in validation[persona]
    }
    found = {key: effects(texts[key[0]], column) for key, column in columns.items()}
    adjusted = adjusted_p({key: differences for key, (differences, _) in found.items()})
    verdicts = {}
    for persona, of_persona in alphas.items():
        scorers = {}
        for scorer, validated in validation[persona].items():
            differences, n_left_out = found[persona, scorer]
            scorers[scorer] = decide(
                differences,
                adjusted[persona, scorer],
                is_validated=validated["is_validated"],
                problems=tuple(validated["problems"]),
                validated_on=validated.get("validated_on", ""),
                n_left_out=n_left_out,
                rates=_rates(texts[persona], columns[persona, scorer], validated),
            )
        collapse_rates = _collapse_rates(texts[persona])
        combined = _combined(scorers)
        if min(collapse_rates.values(), default=0.0) > ALL_COLLAPSE:
            combined = ("native steering ineffective", "all collapse", *combined[2:])
        verdicts[persona] = Verdict(*combined, scorers, of_persona, collapse_rates)
    return verdicts


def effects(texts: pd.DataFrame, column: str) -> tuple[dict[str, np.ndarray], int]:
    """Return condition -> difference to unsteered at each prompt, and how many prompts were left out.

    texts: from `at_alphas`. Prompts that lack a score under one of the conditions are left out under all, so
    that conditions stay paired; a condition without any score is left out.
    """
    means = prompt_means(texts, column).dropna(how="all")
    steered = [name for name in means if name != UNSTEERED]
    paired = means.dropna() if steered and UNSTEERED in means else means.iloc[:0]
    unsteered = paired.get(UNSTEERED, 0.0)
    return {name: (paired[name] - unsteered).to_numpy() for name in steered}, len(means) - len(paired)


def adjusted_p(found: Mapping[Key, Scores]) -> dict[Key, dict[str, float]]:
    """Return (persona, scorer) -> control -> p of mapped over it, by Holm over personas and controls."""
    p_values = {}
    for key, differences in found.items():
        mapped = differences.get(MAPPED, np.array([]))
        if len(mapped) >= FEWEST_PROMPTS:
            others = {UNSTEERED: 0.0, **{name: differences[name] for name in CONTROLS if name in differences}}
            p_values |= {(key, name): sign_flip_p(mapped - other) for name, other in others.items()}
    adjusted: dict[Key, dict[str, float]] = {key: {} for key in found}
    for scorer in {scorer for _, scorer in found}:
        tests = [test for test in p_values if test[0][1] == scorer]
        for (key, name), p in zip(tests, holm([p_values[test] for test in tests]), strict=True):
            adjusted[key][name] = p
    return adjusted


def decide(differences: Scores, p_values: Mapping[str, float], **known: Any) -> ScorerVerdict:
    """Return the verdict of one scorer on one persona.

    differences: from `effects`. p_values: control -> p of mapped over it, from `adjusted_p`. known: fields of
    the verdict that decide nothing.
    """
    native, mapped = differences.get(ORACLE), differences.get(MAPPED)
    n_prompts = len(next(iter(differences.values()), []))
    known["n_prompts"] = n_prompts
    if n_prompts >= FEWEST_PROMPTS:
        known["effects"] = {
            name: Effect(*astuple(mean_interval(values)), float(np.mean(values < 0)), p_values.get(name))
            for name, values in differences.items()
        }
    if missing := tuple(name for name in (ORACLE, MAPPED) if name not in differences):
        return ScorerVerdict("inconclusive", "no scores", missing=missing, **known)
    if n_prompts < FEWEST_PROMPTS:
        return ScorerVerdict("inconclusive", "few prompts", **known)
    if not native.any() and not mapped.any():
        return ScorerVerdict("inconclusive", "equal scores", **known)
    known["native"] = of_native = mean_interval(native)
    if of_native.low <= NATIVE_WORKS:
        if of_native.high < NATIVE_FAILS:
            return ScorerVerdict("native steering ineffective", "native effect", **known)
        needed = _fewest_needed(native - NATIVE_WORKS, native - NATIVE_FAILS)
        return ScorerVerdict("inconclusive", "native effect", prompts_needed=needed, **known)
    known |= {
        "mapped": mean_interval(mapped),
        "recovery": recovery(mapped, native),
        "fieller": fieller(mapped, native),
        "equivalence_p": equivalence_p(mapped, native),
    }
    return _decide_by_recovery(differences, p_values, known)


def _decide_by_recovery(
    differences: Scores, p_values: Mapping[str, float], known: Mapping[str, Any]
) -> ScorerVerdict:
    """Return the verdict where the oracle has an effect. known: fields of the verdict so far."""
    native, mapped, ratio = differences[ORACLE], differences[MAPPED], known["recovery"]
    if ratio.high < NOT_TRANSFERRED:
        return ScorerVerdict("not transferred", "recovery", **known)
    if missing := tuple(name for name in DECIDING_CONTROLS if name not in differences):
        return ScorerVerdict("inconclusive", "control missing", missing=missing, **known)
    controls = [name for name in CONTROLS if name in differences]
    best = max(controls, key=lambda name: differences[name].mean())
    over, least = mapped - differences[best], NO_BETTER * known["native"].estimate
    over_best = mean_interval(over)
    highest_p = max(p_values[name] for name in (*controls, UNSTEERED))
    beats, needed = highest_p < SIGNIFICANT, None
    if beats and ratio.low > TRANSFERRED:
        verdict = "equivalent to native" if known["equivalence_p"] < SIGNIFICANT else "transferred"
    elif beats and ratio.high < 1:
        verdict = "partial"
    elif not beats and over_best.high < least:
        verdict = "not transferred"
    else:
        verdict = "inconclusive"
        needed = _fewest_needed(*([mapped - TRANSFERRED * native] if beats else [over, over - least]))
    known = {**known, "over_best_control": over_best, "highest_p": highest_p, "prompts_needed": needed}
    return ScorerVerdict(verdict, "best control", best_control=best, **known)


def _fewest_needed(*contrasts: np.ndarray) -> int | None:
    """Return the prompts that settle the first of these, each of which would decide the case in its way."""
    return min(filter(None, map(prompts_needed, contrasts)), default=None)


def _rates(texts: pd.DataFrame, column: str, validated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return condition -> the share of texts over the threshold, raw and corrected for the scorer's errors.

    A prompt counts as one text, whatever its seeds; empty for a scorer whose errors are not known.
    """
    known = [validated.get(kind) for kind in ("sensitivity", "specificity")]
    if None in known:
        return {}
    errors = [(rate["n_right"], rate["n"]) for rate in known]
    is_over = (texts[column] > validated["threshold"]).where(texts[column].notna()).astype(float)
    shares = prompt_means(texts.assign(is_over=is_over), "is_over")
    rates = {}
    for condition, raw in shares.mean().items():
        corrected = corrected_rate(float(raw), int(shares[condition].count()), *errors)
        rates[condition] = {"raw": float(raw), "corrected": corrected}
    return rates


def _collapse_rates(texts: pd.DataFrame) -> dict[str, float]:
    """Return condition -> share of collapsed texts; one too short to repeat itself has not collapsed."""
    steered = texts[texts["alpha"].notna()]
    return steered["is_collapsed"].eq(True).groupby(steered["condition"]).mean().to_dict()


def _combined(scorers: Mapping[str, ScorerVerdict]) -> tuple[str, str, str | None, tuple[str, ...]]:
    """Return the verdict that stands, its reason, who decided it, and the scorers it rests on."""
    validated = {name: found.verdict for name, found in scorers.items() if found.is_validated}
    if not validated:
        return "inconclusive", "no scorer validated", None, ()
    decided_by = max(validated, key=lambda name: VERDICTS.index(validated[name]))
    said = set(validated.values())
    if said & CLAIMS and said & DENIALS:
        return "inconclusive", "scorers disagree", decided_by, tuple(validated)
    return validated[decided_by], "decided by scorer", decided_by, tuple(validated)

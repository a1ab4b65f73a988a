"""Decide whether each persona transferred: a table of scores in, typed verdicts out (phase 5).

Each validated scorer decides for itself, by the tests of `significance`; where scorers differ, the more
cautious verdict stands. Mapped has to beat every draw of every control: an intersection-union test (Berger
1982), whose p is the largest of theirs, so that only personas are many. It has to exceed the lexical
controls, which know the source's words alone, by a share of the native effect besides; else what it does is
text-borne. Why a verdict stands is data here; `reporting.tables` makes sentences of it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.results_table import Alphas, at_alphas, prompt_means
from analysis.significance import (
    MARGIN,
    Interval,
    corrected_rate,
    equivalence_p,
    holm,
    mean_interval,
    plain,
    prompts_needed,
    recovery,
    sign_flip_p,
)
from experiment.conditions import (
    CONTROLS,
    DECIDING_CONTROLS,
    LEXICAL_CONTROLS,
    MAPPED,
    ORACLE,
    SCORERS,
    UNSTEERED,
    condition_of,
)

FEWEST_PROMPTS = 8
SIGNIFICANT = 0.025  # one-sided, as the ends of a 95 % interval are; at 0.05, 5 to 6 % of nulls are claimed
EQUIVALENT = 0.05  # for each of two one-sided tests
NATIVE_WORKS = 0.05  # the oracle has an effect if the lower bound of it is above this
NATIVE_FAILS = 0.15  # the oracle has no effect to speak of if the upper bound of it is below this
TRANSFERRED, NOT_TRANSFERRED = 0.5, 0.25  # bounds of the recovery, as shares of the native effect
ALL_COLLAPSE = 0.5  # share of collapsed texts under every vector from which steering itself is at fault
NO_BETTER = 0.15  # share of the native effect; mapped surely exceeds the best control by less than this
BEYOND_WORDS = 0.15  # share of the native effect by which mapped has to exceed the lexical controls
# What a protocol states before anything is compared.
VERDICT_BOUNDS = {
    "fewest_prompts": FEWEST_PROMPTS,
    "significant": SIGNIFICANT,
    "equivalent_margin": MARGIN,
    "native_works": NATIVE_WORKS,
    "transferred": TRANSFERRED,
    "not_transferred": NOT_TRANSFERRED,
    "beyond_words": BEYOND_WORDS,
}
HIGH_SCORE, CEILING = 0.9, 0.3  # a share of native texts with higher scores above this is a ceiling
LOWEST_SCORE = 0.001  # scores are clipped to it, and to 1 less it, before they become log-odds
# From the most to the least that is claimed; of two scorers' verdicts, the later stands.
VERDICTS = (
    "equivalent to native",
    "transferred",
    "partial",
    "text-borne",
    "inconclusive",
    "not transferred",
    "native steering ineffective",
)
CLAIMS, DENIALS = set(VERDICTS[:3]), set(VERDICTS[5:])

# What a scorer's verdict follows from. In the first three cases nothing could be tested.
Reason = Literal[
    "no scores",  # a condition in `missing` has no scored text
    "few prompts",
    "equal scores",
    "native effect",  # whether the oracle has an effect is decided or open
    "recovery",
    "control missing",  # the recovery is large enough, and controls or draws in `missing` have no score
    "best control",  # recovery and best control together
    "lexical control",  # both would do, but mapped does not surely exceed the stronger lexical control
]
Scores = Mapping[str, np.ndarray]  # compared name -> difference to unsteered at each prompt
Key = tuple[str, str]  # (persona, scorer)


@dataclass(frozen=True)
class Effect(Interval):
    """A condition's effect over prompts.

    anti_steered: share of prompts whose score falls. p_mapped_over_it: of mapped doing no more, not adjusted;
        None where it is not a control.
    """

    anti_steered: float
    p_mapped_over_it: float | None


@dataclass(frozen=True)
class ScorerVerdict:
    """The verdict of one scorer on one persona, with the numbers that decided it; None is not known.

    problems: why the scorer is not validated. validated_on: which texts a judge is validated on.
    n_left_out: prompts that lack a score under a condition.
    missing: conditions, or draws of them, that the reason is about. native, mapped, over_best_control:
    effects. best_control: the draw with the largest effect. share_near_one: of native texts; where it is a
    ceiling, log_odds_p is of equivalence in log-odds. adjusted_p: of mapped over the control that it beats
    least surely, by Holm over n_personas. lexical_control: the one with the larger effect; over_lexical:
    mapped's effect beyond it; lexical_p: of mapped exceeding all lexical controls by BEYOND_WORDS of the
    native effect, and the other controls, by Holm; beyond_lexical: over_lexical as a share of the native
    effect beyond it, None where that is not surely above 0. prompts_needed: to settle an open case. effects,
    rates: compared name -> its effect, and share of texts over the scorer's threshold, {raw, corrected}.
    """

    verdict: str
    reason: Reason
    n_prompts: int
    missing: tuple[str, ...] = ()
    native: Interval | None = None
    mapped: Interval | None = None
    recovery: Interval | None = None
    equivalence_p: float | None = None
    share_near_one: float | None = None
    log_odds_p: float | None = None
    best_control: str | None = None
    over_best_control: Interval | None = None
    adjusted_p: float | None = None
    lexical_control: str | None = None
    over_lexical: Interval | None = None
    lexical_p: float | None = None
    beyond_lexical: Interval | None = None
    n_personas: int = 1
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
    of its texts that collapse. unreadable: the bounds that native steering breaks at every alpha, if it does.
    """

    verdict: str
    reason: Literal[
        "no scorer validated", "scorers disagree", "decided by scorer", "all collapse", "unreadable"
    ]
    decided_by: str | None
    rests_on: tuple[str, ...]
    scorers: Mapping[str, ScorerVerdict]
    alphas: Mapping[str, float | None]
    collapse_rates: Mapping[str, float] = field(default_factory=dict)
    unreadable: str | None = None

    def content(self) -> dict[str, Any]:
        """Return the verdict as JSON holds it; the ends of an unbounded interval are None."""
        return plain(asdict(self))


def decide_verdicts(
    table: pd.DataFrame,
    alphas: Alphas,
    validation: Mapping[str, Mapping[str, Mapping[str, Any]]],
    unreadable: Mapping[str, str] = MappingProxyType({}),
    not_controls: Collection[str] = (),
) -> dict[str, Verdict]:
    """Return persona -> its verdict at these alphas.

    table: from `results_table`. validation: persona -> scorer -> what `scoring.validation.validate` returned;
    a score that needs no validation says that it is validated. unreadable: persona -> the bounds that its
    native vector breaks at every alpha, so that there was nothing to carry over. not_controls: conditions
    that mapped need not beat here, such as naive transfers that leave the vector as it is.
    """
    texts = {persona: at_alphas(table, persona, of_persona) for persona, of_persona in alphas.items()}
    columns = {
        (persona, scorer): SCORERS[scorer].column for persona in alphas for scorer in validation[persona]
    }
    found = {key: effects(texts[key[0]], column) for key, column in columns.items()}
    p_values = {key: control_p(differences, not_controls) for key, (differences, _) in found.items()}
    adjusted = adjusted_p(p_values)
    beyond_words = adjusted_p(
        p_values, {key: lexical_p(differences) for key, (differences, _) in found.items()}
    )
    verdicts = {}
    for persona, of_persona in alphas.items():
        scorers = {}
        for scorer, validated in validation[persona].items():
            key = persona, scorer
            differences, n_left_out = found[key]
            scorers[scorer] = decide(
                differences,
                p_values[key],
                adjusted.get(key),
                beyond_words.get(key),
                unscored=[
                    name
                    for name in _controls(texts[persona]["compared"], not_controls)
                    if name not in differences
                ],
                not_controls=not_controls,
                log_odds=effects(log_odds(texts[persona], columns[key]), columns[key])[0],
                share_near_one=_share_near_one(texts[persona], columns[key]),
                n_personas=max(1, sum(other == scorer for _, other in adjusted)),
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
        if persona in unreadable:
            combined = ("native steering ineffective", "unreadable", *combined[2:])
        verdicts[persona] = Verdict(*combined, scorers, of_persona, collapse_rates, unreadable.get(persona))
    return verdicts


def effects(texts: pd.DataFrame, column: str) -> tuple[dict[str, np.ndarray], int]:
    """Return compared name -> difference to unsteered at each prompt, and how many prompts were left out.

    texts: from `at_alphas`. Prompts that lack a score under one of the conditions are left out under all, so
    that conditions stay paired; a condition without any score is left out.
    """
    means = prompt_means(texts, column).dropna(how="all")
    steered = [name for name in means if name != UNSTEERED]
    paired = means.dropna() if steered and UNSTEERED in means else means.iloc[:0]
    unsteered = paired.get(UNSTEERED, 0.0)
    return {name: (paired[name] - unsteered).to_numpy() for name in steered}, len(means) - len(paired)


def log_odds(texts: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the texts with log-odds in the place of their scores."""
    clipped = texts[column].clip(LOWEST_SCORE, 1 - LOWEST_SCORE)
    return texts.assign(**{column: np.log(clipped / (1 - clipped))})


def _share_near_one(texts: pd.DataFrame, column: str) -> float | None:
    """Return the share of native texts that have nearly the highest score, None without any.

    A measure that is 0 or 1 has no ceiling, and its log-odds say nothing: its share is 0.
    """
    scores = texts[column][texts["condition"] == ORACLE].dropna()
    if not len(scores):
        return None
    return 0.0 if scores.isin((0.0, 1.0)).all() else float((scores > HIGH_SCORE).mean())


def control_p(differences: Scores, not_controls: Collection[str] = ()) -> dict[str, float]:
    """Return draw of a control, or unsteered -> p of mapped doing no more; empty for too few prompts.

    not_controls: conditions that do not count.
    """
    mapped = differences.get(MAPPED, np.array([]))
    if len(mapped) < FEWEST_PROMPTS:
        return {}
    others = {UNSTEERED: 0.0, **{name: differences[name] for name in _controls(differences, not_controls)}}
    return {name: sign_flip_p(mapped - other) for name, other in others.items()}


def lexical_p(differences: Scores) -> dict[str, float]:
    """Return lexical control -> p of mapped exceeding it by no more than BEYOND_WORDS of the native effect.

    The margin is paired by prompt, so that it needs no estimate of the native effect; empty for too few
    prompts, or without a native score.
    """
    mapped, native = (differences.get(name, np.array([])) for name in (MAPPED, ORACLE))
    if min(len(mapped), len(native)) < FEWEST_PROMPTS:
        return {}
    least = BEYOND_WORDS * native
    return {
        name: sign_flip_p(mapped - differences[name] - least)
        for name in LEXICAL_CONTROLS
        if name in differences
    }


def _controls(names: Iterable[str], not_controls: Collection[str]) -> list[str]:
    """Return the compared names of every draw of every control that counts, each once."""
    counting = set(CONTROLS).difference(not_controls)
    return [name for name in dict.fromkeys(names) if condition_of(name) in counting]


def adjusted_p(
    p_values: Mapping[Key, Mapping[str, float]],
    beyond_words: Mapping[Key, Mapping[str, float]] | None = None,
) -> dict[Key, float]:
    """Return (persona, scorer) -> p of mapped over all its controls, by Holm over the scorer's personas.

    p_values: from `control_p`; where they are empty there is no test. Lexical controls count with
    `beyond_words`, from `lexical_p`, alone.
    """
    highest = {
        key: max(
            [
                *(p for name, p in found.items() if name not in LEXICAL_CONTROLS),
                *(beyond_words or {}).get(key, {}).values(),
            ],
            default=0.0,
        )
        for key, found in p_values.items()
        if found
    }
    adjusted: dict[Key, float] = {}
    for scorer in {scorer for _, scorer in highest}:
        keys = [key for key in highest if key[1] == scorer]
        adjusted |= zip(keys, holm([highest[key] for key in keys]), strict=True)
    return adjusted


def decide(
    differences: Scores,
    p_values: Mapping[str, float],
    adjusted: float | None,
    beyond_words: float | None,
    log_odds: Scores,
    unscored: Sequence[str] = (),
    n_personas: int = 1,
    not_controls: Collection[str] = (),
    **known: Any,
) -> ScorerVerdict:
    """Return the verdict of one scorer on one persona.

    differences, log_odds: from `effects`, of scores and of their log-odds. p_values, adjusted, beyond_words:
    from `control_p` and `adjusted_p`, without and with what `lexical_p` gives. unscored: draws of controls
    that were run, no text of which has a score. not_controls: as in `decide_verdicts`.
    known: further fields of the verdict.
    """
    native, mapped = differences.get(ORACLE), differences.get(MAPPED)
    n_prompts = len(next(iter(differences.values()), []))
    known |= {"n_prompts": n_prompts, "n_personas": n_personas}
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
        needed = _fewest(*map(prompts_needed, (native - NATIVE_WORKS, native - NATIVE_FAILS)))
        return ScorerVerdict("inconclusive", "native effect", prompts_needed=needed, **known)
    known |= {
        "mapped": mean_interval(mapped),
        "recovery": recovery(mapped, native),
        "equivalence_p": equivalence_p(mapped, native),
        "adjusted_p": adjusted,
        **_beyond_lexical(differences),
        "lexical_p": beyond_words,
    }
    if known["share_near_one"] > CEILING:
        known["log_odds_p"] = equivalence_p(log_odds[MAPPED], log_odds[ORACLE])
    return _decide_by_recovery(differences, unscored, not_controls, known)


def _beyond_lexical(differences: Scores) -> dict[str, Any]:
    """Return what mapped does beyond the stronger lexical control; nothing without one."""
    ran = [name for name in LEXICAL_CONTROLS if name in differences]
    if not ran:
        return {}
    strongest = max(ran, key=lambda name: differences[name].mean())
    over, room = (differences[name] - differences[strongest] for name in (MAPPED, ORACLE))
    return {
        "lexical_control": strongest,
        "over_lexical": mean_interval(over),
        "beyond_lexical": recovery(over, room) if mean_interval(room).low > 0 else None,
    }


def _decide_by_recovery(
    differences: Scores, unscored: Sequence[str], not_controls: Collection[str], known: Mapping[str, Any]
) -> ScorerVerdict:
    """Return the verdict where the oracle has an effect. known: fields of the verdict so far."""
    native, mapped, ratio = differences[ORACLE], differences[MAPPED], known["recovery"]
    if ratio.high < NOT_TRANSFERRED:
        return ScorerVerdict("not transferred", "recovery", **known)
    controls = _controls(differences, not_controls)
    known_of = set(map(condition_of, [*controls, *unscored]))
    if missing := (*(name for name in DECIDING_CONTROLS if name not in known_of), *unscored):
        return ScorerVerdict("inconclusive", "control missing", missing=missing, **known)
    best = max(
        (name for name in controls if name not in LEXICAL_CONTROLS), key=lambda name: differences[name].mean()
    )
    over, least = mapped - differences[best], NO_BETTER * known["native"].estimate
    over_best = mean_interval(over)
    beats, needed = known["adjusted_p"] < SIGNIFICANT, None
    if beats and ratio.low > TRANSFERRED:
        is_equivalent = max(known["equivalence_p"], known.get("log_odds_p", 0.0)) < EQUIVALENT
        verdict = "equivalent to native" if is_equivalent else "transferred"
    elif beats and ratio.low > NOT_TRANSFERRED and ratio.high < 1:
        verdict = "partial"
    elif not beats and over_best.high < least:
        verdict = "not transferred"
    else:
        verdict = "inconclusive"
        to_beat = prompts_needed(over, known["n_personas"]), prompts_needed(over - least)
        needed = _needed_by_recovery(mapped, native) if beats else _fewest(*to_beat)
    reason: Reason = "best control"
    if verdict in CLAIMS and known["lexical_p"] >= SIGNIFICANT:
        verdict, reason = "text-borne", "lexical control"
        beyond = mapped - differences[known["lexical_control"]] - BEYOND_WORDS * native
        needed = prompts_needed(beyond, known["n_personas"]) if beyond.mean() > 0 else None
    known = {**known, "over_best_control": over_best, "prompts_needed": needed}
    return ScorerVerdict(verdict, reason, best_control=best, **known)


def _needed_by_recovery(mapped: np.ndarray, native: np.ndarray) -> int | None:
    """Return the prompts that show on which side of the bounds a recovery lies that is open now."""
    share, quarter = mapped.mean() / native.mean(), prompts_needed(mapped - NOT_TRANSFERRED * native)
    if share < NOT_TRANSFERRED:
        return quarter
    as_partial = [quarter, prompts_needed(native - mapped)] if share < 1 else [None]
    half = prompts_needed(mapped - TRANSFERRED * native) if share > TRANSFERRED else None
    return _fewest(half, None if None in as_partial else max(as_partial))


def _fewest(*needed: int | None) -> int | None:
    """Return the smallest number that is known, each of which would decide the case in its way."""
    return min(filter(None, needed), default=None)


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

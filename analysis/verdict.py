"""Decide whether each persona transferred, and say by which numbers (phase 5).

Each scorer that has its licence decides for itself, by the tests of `significance`; where they differ, the
more cautious word stands. What cannot be decided is said, with the reason or the number of prompts that
would settle it.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.significance import (
    Interval,
    corrected_share,
    equivalence_p,
    fieller,
    holm,
    mean_interval,
    prompts_needed,
    recovery,
    sign_flip_p,
)
from evaluation import prompt_means
from scoring.brevity import brevity

MAPPED, ORACLE, UNSTEERED = "ridge_mapped", "oracle", "baseline"
CONTROLS = ("random_direction", "shuffled_pairs", "other_persona", "zero_pad", "interpolate", "random_proj")
WANTED_CONTROLS = (
    "random_direction",
    "shuffled_pairs",
    "other_persona",
)  # without which nothing is said to have transferred
FEWEST_PROMPTS = 8
SIGNIFICANT = 0.05
NATIVE_WORKS = 0.05  # lower bound of the oracle's effect
NATIVE_FAILS = 0.15  # upper bound below which the oracle does not move the trait to speak of
TRANSFERRED, NOT_TRANSFERRED = 0.5, 0.25  # of the native effect: bounds of the recovery
NO_BETTER = 0.15  # of the native effect: what mapped is surely not above the best control by
# From the most to the least that is claimed; of two scorers' words, the later stands.
VERDICTS = (
    "equivalent to native",
    "transferred",
    "partial",
    "inconclusive",
    "not transferred",
    "native steering ineffective",
)
# scorer -> what it is called in a row. The last two are computed here.
SCORES = {
    "classifier": "trait_probability",
    "likelihood_ratio": "likelihood_probability",
    "judge": "judged_trait",
    "brevity": "brevity",
}

Row = Mapping[str, Any]


def with_computed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows with `judged_trait`, a judge's 1 to 5 as 0 to 1, and `brevity` (`scoring.brevity`)."""
    texts, have_ended = [row["output"] for row in rows], [row.get("has_ended") for row in rows]
    ordinary = [row["output"] for row in rows if row["condition"] == UNSTEERED]
    return [
        {
            **row,
            "judged_trait": None if (judged := row.get("gpt4_trait_score")) is None else (judged - 1) / 4,
            "brevity": is_brief,
        }
        for row, is_brief in zip(rows, brevity(texts, have_ended, ordinary), strict=True)
    ]


def _cell_means(
    rows: Sequence[Row], persona: str, condition: str, alpha: float | None, score: str
) -> dict[int, float]:
    """Return prompt -> mean score over its seeds; prompts without a score are left out."""
    cell = (persona, condition, alpha)
    return prompt_means(
        [row for row in rows if (row["persona"], row["condition"], row["alpha"]) == cell], score
    )


def effects(
    rows: Sequence[Row], persona: str, score: str, alphas: Mapping[str, float | None]
) -> tuple[dict[str, np.ndarray], int]:
    """Return condition -> difference to unsteered at each prompt, and the prompts that were left out.

    alphas: condition -> its alpha. Prompts that lack a score under one of the conditions are left out under
    all, so that conditions stay paired; a condition without any score is left out.
    """
    unsteered = _cell_means(rows, persona, UNSTEERED, None, score)
    means = {
        condition: _cell_means(rows, persona, condition, alpha, score) for condition, alpha in alphas.items()
    }
    means = {condition: found for condition, found in means.items() if found}
    shared = set(unsteered).intersection(*means.values()) if means else set()
    every = set(unsteered).union(*means.values())
    prompts = sorted(shared)
    return (
        {name: np.array([found[p] - unsteered[p] for p in prompts]) for name, found in means.items()},
        len(every) - len(prompts),
    )


def decide(differences: Mapping[str, np.ndarray], p_values: Mapping[str, float]) -> dict[str, Any]:
    """Return the verdict of one scorer on one persona, with its numbers and a sentence.

    differences: what `effects` returns. p_values: control -> p of mapped over it, adjusted by `holm`.
    """
    native, mapped = differences.get(ORACLE), differences.get(MAPPED)
    if native is None or mapped is None:
        missing = ORACLE if native is None else MAPPED
        return _said("inconclusive", f"no text of {missing} has a score")
    n = len(native)
    if n < FEWEST_PROMPTS:
        return _said("inconclusive", f"{n} prompts have scores, an interval needs {FEWEST_PROMPTS}")
    if all(np.ptp(values) == 0 and values[0] == 0 for values in (native, mapped)):
        return _said("inconclusive", "all scores are equal: the scorer says the same of every text")
    of_native = mean_interval(native)
    moved = f"the target's own vector moves the trait by {_shown(of_native, '+.2f')}"
    if of_native.low <= NATIVE_WORKS:
        if of_native.high < NATIVE_FAILS:
            return _said("native steering ineffective", moved, native=of_native)
        needed = _fewest_needed(native - NATIVE_WORKS, native - NATIVE_FAILS)
        return _said("inconclusive", moved, needed, native=of_native)
    ratio = recovery(mapped, native)
    check = fieller(mapped, native)
    numbers = {
        "native": of_native,
        "mapped": mean_interval(mapped),
        "recovery": ratio,
        "fieller": check,
        "equivalence_p": equivalence_p(mapped, native),
    }
    controls = {name: differences[name] for name in CONTROLS if name in differences}
    recovers = f"mapped does {_shown(ratio, '.2f')} of what the target's own vector does"
    if ratio.high < NOT_TRANSFERRED:
        return _said("not transferred", recovers, **numbers)
    if missing := [name for name in WANTED_CONTROLS if name not in controls]:
        return _said("inconclusive", f"{recovers}, but no control {', '.join(missing)} was run", **numbers)
    best = max(controls, key=lambda name: controls[name].mean())
    over = mapped - controls[best]
    beats = all(p_values[name] < SIGNIFICANT for name in (*controls, UNSTEERED))
    highest_p = max(p_values[name] for name in (*controls, UNSTEERED))
    than = f"{_shown(mean_interval(over), '+.2f')} against the best control, {best} (Holm p {highest_p:.3f})"
    numbers |= {"best_control": best, "over_best_control": mean_interval(over)}
    why = f"{recovers}, and {than}"
    if beats and ratio.low > TRANSFERRED:
        is_equal = numbers["equivalence_p"] < SIGNIFICANT
        return _said("equivalent to native" if is_equal else "transferred", why, **numbers)
    if beats and ratio.high < 1:
        return _said("partial", why, **numbers)
    if not beats and mean_interval(over).high < NO_BETTER * of_native.estimate:
        return _said("not transferred", why, **numbers)
    if beats:
        needed = prompts_needed(mapped - TRANSFERRED * native)
    else:
        needed = _fewest_needed(over, over - NO_BETTER * of_native.estimate)
    return _said("inconclusive", why, needed, **numbers)


def _fewest_needed(*contrasts: np.ndarray) -> int | None:
    """Return the prompts that settle the first of these, each of which would decide the case in its way."""
    return min(filter(None, map(prompts_needed, contrasts)), default=None)


def _said(verdict: str, why: str, n_needed: int | None = None, **numbers: Any) -> dict[str, Any]:
    more = f"; about {n_needed} prompts would settle it" if n_needed else ""
    plain = {key: vars(value) if isinstance(value, Interval) else value for key, value in numbers.items()}
    return {"verdict": verdict, "why": why + more, "prompts_needed": n_needed, **plain}


def _shown(interval: Interval, form: str) -> str:
    ends = [format(end, form) if np.isfinite(end) else "unbounded" for end in (interval.low, interval.high)]
    return f"{interval.estimate:{form}} [{ends[0]}, {ends[1]}]"


def verdicts(
    rows: Sequence[Row],
    alphas: Mapping[str, Mapping[str, float | None]],
    validation: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return persona -> its verdict, the scorers' own, and the effects of all conditions.

    rows: of `eval_results.json`. alphas: persona -> condition -> the alpha at which it is judged.
    validation: persona -> scorer -> what `validation.validate` returned; `brevity` needs none.
    """
    rows = with_computed(rows)
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    left_out: dict[tuple[str, str], int] = {}
    for persona, of_persona in alphas.items():
        for scorer in validation.get(persona, {}):
            key = (persona, scorer)
            found[key], left_out[key] = effects(rows, persona, SCORES[scorer], of_persona)
    adjusted = adjusted_p(found)
    content = {}
    for persona in alphas:
        by_scorer = {}
        for scorer, licence in validation.get(persona, {}).items():
            key = (persona, scorer)
            by_scorer[scorer] = {
                "is_validated": licence["is_validated"],
                "problems": licence["problems"],
                "n_prompts": len(next(iter(found[key].values()), [])),
                "n_left_out": left_out[key],
                **decide(found[key], adjusted[key]),
                "effects": _effects_table(found[key], adjusted[key]),
                "shares": _shares(rows, persona, SCORES[scorer], alphas[persona], licence),
            }
        content[persona] = {**_combined(persona, by_scorer), "scorers": by_scorer, "alphas": alphas[persona]}
    return content


def adjusted_p(
    found: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
) -> dict[tuple[str, str], dict[str, float]]:
    """Return (persona, scorer) -> control -> p of mapped over it, by Holm over personas x controls."""
    p_values = {}
    for key, differences in found.items():
        mapped = differences.get(MAPPED, np.array([]))
        if len(mapped) >= FEWEST_PROMPTS:
            p_values[(*key, UNSTEERED)] = sign_flip_p(mapped)
            for name in CONTROLS:
                if name in differences:
                    p_values[(*key, name)] = sign_flip_p(mapped - differences[name])
    adjusted: dict[tuple[str, str], dict[str, float]] = {key: {} for key in found}
    for scorer in {scorer for _, scorer in found}:
        keys = [key for key in p_values if key[1] == scorer]
        for key, p in zip(keys, holm([p_values[key] for key in keys]), strict=True):
            adjusted[key[:2]][key[2]] = p
    return adjusted


def _effects_table(differences: Mapping[str, np.ndarray], adjusted: Mapping[str, float]) -> dict[str, Any]:
    table = {}
    for name, values in differences.items():
        if len(values) >= FEWEST_PROMPTS:
            wrong = float(np.mean(values < 0))
            table[name] = {
                **vars(mean_interval(values)),
                "anti_steered": wrong,
                "p_mapped_over_it": adjusted.get(name),
            }
    return table


def _shares(
    rows: Sequence[Row],
    persona: str,
    score: str,
    alphas: Mapping[str, float | None],
    licence: Mapping[str, Any],
) -> dict[str, Any]:
    """Return condition -> the share of texts over the decision point, as seen and corrected for errors.

    A prompt counts as one text, whatever its seeds; empty for a scorer that no validation knows.
    """
    known = [licence.get(kind) for kind in ("sensitivity", "specificity")]
    if None in known:
        return {}
    rates = [(rate["n_right"], rate["n"]) for rate in known]
    shown = [
        {**row, score: None if row[score] is None else float(row[score] > licence["threshold"])}
        for row in rows
        if row["persona"] == persona
    ]
    table = {}
    for condition, alpha in {UNSTEERED: None, **alphas}.items():
        means = _cell_means(shown, persona, condition, alpha, score)
        if means:
            share = statistics.fmean(means.values())
            corrected = corrected_share(share, len(means), *rates)
            table[condition] = {"seen": share, "corrected": vars(corrected) if corrected else None}
    return table


def _combined(persona: str, by_scorer: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the word that stands: the most cautious of the licensed scorers', and who said it."""
    licensed = {name: found for name, found in by_scorer.items() if found["is_validated"]}
    if not licensed:
        problems = [f"{name}: {', '.join(found['problems'])}" for name, found in by_scorer.items()]
        why = "no scorer has its licence" + (f" ({'; '.join(problems)})" if problems else "")
        return {"verdict": "inconclusive", "why": why, "rests_on": []}
    words = {found["verdict"] for found in licensed.values()}
    decided = max(licensed, key=lambda name: VERDICTS.index(licensed[name]["verdict"]))
    verdict, why = licensed[decided]["verdict"], f"by {decided}, {licensed[decided]['why']}"
    claims = words & set(VERDICTS[:3])
    denials = words & set(VERDICTS[4:])
    if claims and denials:
        said = ", ".join(f"{name} says {found['verdict']}" for name, found in licensed.items())
        return {
            "verdict": "inconclusive",
            "why": f"the scorers disagree: {said}; {why}",
            "rests_on": list(licensed),
        }
    return {"verdict": verdict, "why": why, "rests_on": list(licensed)}


def format_verdicts(content: Mapping[str, Any]) -> str:
    """Return a line a persona: the verdict, the numbers that decided it, and the scorers it rests on."""
    lines = []
    for persona, found in content.items():
        rests = found["rests_on"]
        alone = f" (on {rests[0]} alone)" if len(rests) == 1 else ""
        lines.append(f"{persona}: {found['verdict'].upper()}{alone}: {found['why']}")
    counts = {word: sum(found["verdict"] == word for found in content.values()) for word in VERDICTS}
    over_all = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return "\n".join([*lines, f"over all, of {len(content)} personas: {over_all}"])


def main() -> None:
    """Check the words for made-up scores of twenty prompts."""
    generator = np.random.default_rng(0)

    def noisy(mean: float) -> np.ndarray:
        return generator.normal(mean, 0.15, 20)

    nothing = {name: noisy(0) for name in WANTED_CONTROLS}
    for mapped, oracle, word in (
        (0.58, 0.6, ("equivalent to native", "transferred")),
        (0.0, 0.6, ("not transferred",)),
        (0.0, 0.0, ("native steering ineffective",)),
    ):
        given = {MAPPED: noisy(mapped), ORACLE: noisy(oracle), **nothing}
        found = decide(given, adjusted_p({("check", "classifier"): given})["check", "classifier"])
        assert found["verdict"] in word, found
    print("verdict OK:", found["why"])


if __name__ == "__main__":
    main()

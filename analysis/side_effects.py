"""Measure what a vector does beside the effect that is judged (phase 5).

On other traits, and over the turns of conversations. Of these, all conditions have the same
conversations in the same order, and a turn is compared with the same turn of the unsteered conversation.
Conversations are what varies independently, so that intervals are over them. Nothing is decided here.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from analysis.results_table import (
    Alphas,
    at_alphas,
    perplexity_ratio,
)
from analysis.significance import mean_interval, plain
from analysis.verdict import FEWEST_PROMPTS
from experiment.conditions import MAPPED, ORACLE, UNSTEERED

EVERY_PERSONAS = "classifier"  # the scorer that scores every text for every persona
Numbers = Mapping[
    str, np.ndarray
]  # compared name -> (conversations, turns) float64, NaN where there is no number


def off_target(
    table: pd.DataFrame, alphas: Alphas, validation: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return method -> persona steered for -> persona scored as -> mean change against unsteered.

    For `ridge_mapped` and `oracle`, by the scorer that scores every text for every persona; a persona for
    which it is not validated is not scored. validation: persona -> scorer -> what
    `scoring.validation.validate` returned.
    """
    valid = {name for name, found in validation.items() if found.get(EVERY_PERSONAS, {}).get("is_validated")}
    found: dict[str, dict[str, dict[str, float]]] = {MAPPED: {}, ORACLE: {}}
    columns = {f"scored_as_{name}": name for name in alphas if name in valid and f"scored_as_{name}" in table}
    for persona, of_persona in alphas.items():
        texts = at_alphas(table, persona, of_persona)
        means = texts.groupby("condition")[list(columns)].mean().rename(columns=columns)
        for method, by_persona in found.items():
            if {method, UNSTEERED} <= set(means.index):
                by_persona[persona] = (means.loc[method] - means.loc[UNSTEERED]).dropna().to_dict()
    rows = {method: {name: row for name, row in found[method].items() if row} for method in found}
    return {method: by_persona for method, by_persona in rows.items() if by_persona}


def largest_off_target(
    matrix: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, Any]]:
    """Return persona -> {persona, mapped, native}: what else its mapped vector changes most, and native does.

    matrix: from `off_target`.
    """
    largest = {}
    for persona, changes in matrix.get(MAPPED, {}).items():
        others = {name: change for name, change in changes.items() if name != persona}
        if others:
            other = max(others, key=lambda name: abs(others[name]))
            native = matrix.get(ORACLE, {}).get(persona, {}).get(other)
            largest[persona] = {"persona": other, "mapped": others[other], "native": native}
    return largest


def by_turn(traits: Numbers, perplexities: Numbers) -> dict[str, dict[str, Any]]:
    """Return compared name -> `turns`, a list, and `drift`, as JSON holds it.

    traits, perplexities: UNSTEERED is among their names. Of a turn: `turn`, from 1; `trait`, the mean over
    conversations that are scored under both; `effect` against unsteered, with Student's interval;
    `perplexity_ratio`, the geometric mean over pairs. drift: the effect at the last turn less that at the
    first. An effect has its number of conversations, `n`; its interval is None with fewer than
    FEWEST_PROMPTS. What there is nothing for is None; so are effect, ratio and drift of unsteered text.
    """
    found = {}
    for name, trait in traits.items():
        effects, is_steered = trait - traits[UNSTEERED], name != UNSTEERED
        turns = []
        for place in range(trait.shape[1]):
            effect = effects[:, place]
            scored = trait[np.isfinite(effect), place]
            pair = perplexities[name][:, place], perplexities[UNSTEERED][:, place]
            turns.append(
                {
                    "turn": place + 1,
                    "trait": float(scored.mean()) if len(scored) else None,
                    "effect": _effect(effect) if is_steered else None,
                    "perplexity_ratio": perplexity_ratio(*pair) if is_steered else None,
                }
            )
        drift = _effect(effects[:, -1] - effects[:, 0]) if is_steered else None
        found[name] = {"turns": turns, "drift": drift}
    return plain(found)


def _effect(differences: np.ndarray) -> dict[str, float | None] | None:
    """Return the mean of those that are known, with its interval where they are enough."""
    known = differences[np.isfinite(differences)]
    if not len(known):
        return None
    if len(known) < FEWEST_PROMPTS:
        return {"estimate": float(known.mean()), "low": None, "high": None, "n": len(known)}
    return {**asdict(mean_interval(known)), "n": len(known)}

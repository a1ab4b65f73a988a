"""Follow a persona over the turns of conversations: trait, effect, perplexity ratio, and drift (phase 5).

Arrays are (conversations, turns) float64, NaN where there is no number; all conditions have the same
conversations in the same order. A turn is compared with the same turn of the unsteered conversation.
Conversations are what varies independently, so that intervals are over them. Nothing is decided here.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from analysis.results_table import perplexity_ratio
from analysis.significance import mean_interval, plain
from analysis.verdict import FEWEST_PROMPTS
from experiment.conditions import UNSTEERED

Numbers = Mapping[str, np.ndarray]  # compared name -> (conversations, turns)


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

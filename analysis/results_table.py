"""Hold the scored texts of a run as one pandas table, and read cells and perplexity ratios from it (phase 5).

A cell is a persona, a compared name and an alpha. The table has a row for each text and persona: the columns
of `eval_results.json`, `scored_as_<persona>` for the scores of every persona, two scores that are computed
here from the row, `judged_trait` and `brevity`, and `compared`: the name under which the text is compared,
which tells the draws of a control apart. A missing number is NaN, also the alpha of unsteered text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd

from experiment.conditions import DRAWN, MAPPED, UNSTEERED, condition_of, drawn_name
from scoring.brevity import brevity

Alphas = Mapping[str, Mapping[str, float | None]]  # persona -> condition -> the alpha of the cell


def results_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the rows of `eval_results.json` as a table; see the module."""
    table = pd.DataFrame(rows).drop(columns="trait_probabilities")
    by_persona = pd.DataFrame([row["trait_probabilities"] for row in rows], index=table.index)
    table = table.join(by_persona.add_prefix("scored_as_"))
    # A column without any value would hold None, which is no number.
    table = table.astype(dict.fromkeys(table.columns[table.isna().all()], float))
    unsteered = table["output"][table["condition"] == UNSTEERED]
    have_ended = [row["has_ended"] for row in rows]
    return table.assign(
        compared=[drawn_name(row["condition"], row.get("draw")) for row in rows],
        judged_trait=(table["gpt4_trait_score"] - 1) / 4,
        brevity=np.array(brevity(table["output"], have_ended, unsteered), dtype=float),
    )


def cell(table: pd.DataFrame, persona: str, name: str, alpha: float | None) -> pd.DataFrame:
    """Return the rows of one cell, in the order of the table."""
    has_alpha = table["alpha"].isna() if alpha is None else table["alpha"] == alpha
    return table[has_alpha & (table["compared"] == name) & (table["persona"] == persona)]


def at_alphas(table: pd.DataFrame, persona: str, alphas: Mapping[str, float | None]) -> pd.DataFrame:
    """Return a persona's unsteered rows and those of each condition at its alpha."""
    own = table[table["persona"] == persona]
    wanted = {UNSTEERED: None, **alphas}
    alpha = own["condition"].map(wanted).astype(float)
    has_alpha = (own["alpha"] == alpha) | (own["alpha"].isna() & alpha.isna())
    return own[has_alpha & own["condition"].isin(list(wanted))]


def prompt_means(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the mean over seeds, with a row for each prompt and a column for each compared name.

    Names without any value are left out.
    """
    means = rows.groupby(["prompt_idx", "compared"])[column].mean().unstack()
    return means.reindex(columns=rows["compared"].unique()).dropna(axis="columns", how="all")


def worst_draws(effects: Mapping[str, float]) -> dict[str, str]:
    """Return condition -> the compared name of its draw with the largest effect.

    effects: compared name -> mean effect.
    """
    worst: dict[str, str] = {}
    for name, effect in effects.items():
        if effect > effects[worst.setdefault(condition_of(name), name)]:
            worst[condition_of(name)] = name
    return worst


def worst_cells(table: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the table with one draw of each condition: the one with the largest change of the trait.

    table: what `evaluation.aggregate` returns. A persona's draw may differ from alpha to alpha.
    """
    worst: dict[tuple, Mapping[str, Any]] = {}
    for entry in table:
        place = entry["condition"], entry["persona"], entry["alpha"]
        if _change(entry) > _change(worst.setdefault(place, entry)):
            worst[place] = entry
    return list(worst.values())


def _change(entry: Mapping[str, Any]) -> float:
    change = entry["trait_change"]["mean"]
    return -math.inf if change is None else change


def paired_with_unsteered(
    table: pd.DataFrame, persona: str, name: str, alpha: float | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the texts of a cell and the unsteered text of the same prompt and seed beside each."""
    place = ["prompt_idx", "seed"]
    steered, unsteered = (
        cell(table, *each).set_index(place) for each in ((persona, name, alpha), (persona, UNSTEERED, None))
    )
    shared = steered.index.intersection(unsteered.index)
    return steered.loc[shared], unsteered.loc[shared]


def perplexity_ratio(steered: Iterable[float | None], unsteered: Iterable[float | None]) -> float | None:
    """Return how many times as perplexing steered texts are: the geometric mean over pairs of texts.

    Pairs whose perplexities are not both finite are left out; None if there is no other.
    Raises ValueError: two sequences of different lengths.
    """
    pairs = np.array(list(zip(steered, unsteered, strict=True)), dtype=np.float64).reshape(-1, 2)
    pairs = np.log(pairs[np.isfinite(pairs).all(axis=1)])
    return math.exp(float(np.mean(pairs[:, 0] - pairs[:, 1]))) if len(pairs) else None


def cell_perplexity_ratio(table: pd.DataFrame, persona: str, name: str, alpha: float | None) -> float | None:
    """Return the perplexity ratio of a cell by the independent model, or None without perplexities."""
    pairs = paired_with_unsteered(table, persona, name, alpha)
    return perplexity_ratio(*(texts["independent_perplexity"] for texts in pairs))


def effects_table(verdict: Mapping[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each persona, scorer and condition, as `effects.csv` holds it.

    draw: of a control of several vectors the one with the largest effect, whose numbers the row has.
    verdict: what `verdict.json` holds. perplexity_ratio: of the written texts; plain_text_perplexity_ratio:
    of neutral passages that are read under the steering. recovery, beyond_lexical: of the mapped vector, of
    the native effect and of what it is beyond the lexical control's. rate_raw: share of texts in which the
    scorer sees the trait; rate, rate_low, rate_high: the same corrected for the scorer's errors.
    """
    ratio = cache(partial(cell_perplexity_ratio, table))
    rows = []
    plain = verdict["plain_text_perplexity_ratios"]
    for persona, found in verdict["personas"].items():
        for scorer, decided in found["scorers"].items():
            shown = worst_draws({name: each["estimate"] for name, each in decided["effects"].items()})
            for condition, name in shown.items():
                effect, alpha = decided["effects"][name], found["alphas"][condition]
                of_mapped = decided if condition == MAPPED else {}
                rates = decided["rates"].get(name) or {}
                rows.append(
                    {
                        "persona": persona,
                        "scorer": scorer,
                        "is_validated": decided["is_validated"],
                        "condition": condition,
                        "draw": name.partition(DRAWN)[2] or None,
                        "alpha": alpha,
                        "n_prompts": decided["n_prompts"],
                        "effect": effect["estimate"],
                        **{name: effect[name] for name in ("low", "high", "anti_steered")},
                        "p_mapped_over_it": effect["p_mapped_over_it"],
                        **_columns("recovery", of_mapped.get("recovery")),
                        "lexical_control": of_mapped.get("lexical_control"),
                        **_columns("beyond_lexical", of_mapped.get("beyond_lexical")),
                        "rate_raw": rates.get("raw"),
                        **_columns("rate", rates.get("corrected")),
                        "perplexity_ratio": ratio(persona, name, alpha),
                        "verdict": found["verdict"],
                        "plain_text_perplexity_ratio": plain.get(persona, {}).get(condition),
                    }
                )
    return pd.DataFrame(rows)


def _columns(name: str, interval: Mapping[str, float | None] | None) -> dict[str, float | None]:
    """Return an interval's numbers under the names of their columns."""
    ends = {"estimate": name, "low": f"{name}_low", "high": f"{name}_high"}
    return {column: (interval or {}).get(end) for end, column in ends.items()}

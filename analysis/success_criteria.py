"""Compare a run with the specification's success criteria, which are stated for a judge's scores (phase 5).

The specification says what a minimum viable and a strong result of the mapped vector look like, on a judge's
scale of 1 to 5. Its figures for the other conditions are expectations, to be shown beside what was measured.
"""

from typing import Any

import pandas as pd

from analysis.results_table import Alphas, at_alphas
from experiment.conditions import MAPPED

# condition -> coherence, trait strength, collapse rate that the specification expects.
EXPECTED = {
    "baseline": (4.5, 1.2, 0.0),
    "zero_pad": (2.0, 2.0, 0.6),
    "interpolate": (2.5, 2.2, 0.4),
    "random_proj": (1.3, 1.0, 0.9),
    "ridge_mapped": (3.5, 2.5, 0.3),
    "oracle": (4.4, 4.0, 0.05),
}
# The mapped vector needs at least this coherence and trait strength, and less than this collapse rate.
CRITERIA = {"minimum": (3.5, 2.5, 0.30), "strong": (4.0, 3.5, 0.15)}
SCORES = ["gpt4_coherence_score", "gpt4_trait_score"]
MEASURES = {
    "coherence": ("gpt4_coherence_score", "mean"),
    "trait": ("gpt4_trait_score", "mean"),
    "collapse_rate": ("is_collapsed", "mean"),
    "n": ("is_collapsed", "size"),
}


def success(table: pd.DataFrame, alphas: Alphas) -> dict[str, Any]:
    """Return persona -> {conditions, minimum, strong}, for personas with judged texts of the mapped vector.

    table: from `results_table`. conditions: name -> mean coherence and trait (1 to 5), collapse rate (0 to 1)
    and number of texts. minimum, strong: whether the mapped vector's numbers reach it.
    """
    found = {}
    for persona, of_persona in alphas.items():
        judged = at_alphas(table, persona, of_persona).dropna(subset=SCORES)
        # A text too short to repeat itself, whose `is_collapsed` is missing, has not collapsed.
        judged = judged.assign(is_collapsed=judged["is_collapsed"].eq(True))
        by_condition = judged.groupby("condition").agg(**MEASURES).to_dict("index")
        if mapped := by_condition.get(MAPPED):
            reached = {
                name: mapped["coherence"] >= coherence
                and mapped["trait"] >= trait
                and mapped["collapse_rate"] < collapse_rate
                for name, (coherence, trait, collapse_rate) in CRITERIA.items()
            }
            conditions = {name: by_condition[name] for name in EXPECTED if name in by_condition}
            found[persona] = {"conditions": conditions, **reached}
    return found

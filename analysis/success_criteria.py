"""Hold a run against the specification's tables of success, which are of a judge's scores (phase 5).

Spec, "Success Criteria": what a minimum viable and a strong result of the mapped vector look like, on a
judge's scale of 1 to 5. The other conditions' figures there are expectations, shown beside what was measured.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from experiment.plan import Row
from reporting.tables import markdown_table

# condition -> coherence, trait strength, collapse rate that the specification expects.
EXPECTED = {
    "baseline": (4.5, 1.2, 0.0),
    "zero_pad": (2.0, 2.0, 0.6),
    "interpolate": (2.5, 2.2, 0.4),
    "random_proj": (1.3, 1.0, 0.9),
    "ridge_mapped": (3.5, 2.5, 0.3),
    "oracle": (4.4, 4.0, 0.05),
}
# Of the mapped vector: at least this coherence and trait strength, and less than this collapse rate.
CRITERIA = {"minimum": (3.5, 2.5, 0.30), "strong": (4.0, 3.5, 0.15)}


def success(rows: Sequence[Row], alphas: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """Return persona -> {conditions, minimum, strong}, for personas with judged texts of the mapped vector.

    rows: of `eval_results.json`. alphas: persona -> condition -> alpha. conditions: name -> mean coherence and
    trait (1 to 5), collapse rate (0 to 1) and texts. minimum, strong: whether the mapped vector's reach it.
    """
    found = {}
    for persona, of_persona in alphas.items():
        conditions = {}
        for condition, alpha in {"baseline": None, **of_persona}.items():
            cell = (persona, condition, alpha)
            measured = _measured(
                [row for row in rows if cell == (row["persona"], row["condition"], row["alpha"])]
            )
            if condition in EXPECTED and measured:
                conditions[condition] = measured
        if mapped := conditions.get("ridge_mapped"):
            reached = {name: _reaches(mapped, bounds) for name, bounds in CRITERIA.items()}
            found[persona] = {"conditions": conditions, **reached}
    return found


def _measured(rows: Sequence[Row]) -> dict[str, float] | None:
    judged = [row for row in rows if None not in (row["gpt4_coherence_score"], row["gpt4_trait_score"])]
    if not judged:
        return None
    return {
        "coherence": fmean(row["gpt4_coherence_score"] for row in judged),
        "trait": fmean(row["gpt4_trait_score"] for row in judged),
        # A text too short to repeat itself has not collapsed.
        "collapse_rate": fmean(bool(row["is_collapsed"]) for row in judged),
        "n": len(judged),
    }


def _reaches(measured: Mapping[str, float], bounds: tuple[float, float, float]) -> bool:
    coherence, trait, collapse = bounds
    return (
        measured["coherence"] >= coherence
        and measured["trait"] >= trait
        and measured["collapse_rate"] < collapse
    )


def format_success(found: Mapping[str, Any]) -> str:
    """Return a Markdown table a persona: what was measured, and in brackets what the specification has."""
    blocks = []
    for persona, of_persona in found.items():
        said = [f"{name}: {'reached' if of_persona[name] else 'not reached'}" for name in CRITERIA]
        rows = []
        for condition, measured in of_persona["conditions"].items():
            coherence, trait, collapse = EXPECTED[condition]
            rows.append(
                (
                    condition,
                    f"{measured['coherence']:.1f} ({coherence})",
                    f"{measured['trait']:.1f} ({trait})",
                    f"{measured['collapse_rate']:.0%} ({collapse:.0%})",
                    str(measured["n"]),
                )
            )
        table = markdown_table(("condition", "coherence", "trait", "collapsed", "n"), rows)
        blocks.append(f"{persona}, the specification's result, {', '.join(said)}\n\n{table}")
    return "\n\n".join(blocks)


def main() -> None:
    """Check a result that is viable and not strong."""
    row = {"persona": "check", "condition": "ridge_mapped", "alpha": 1.0, "is_collapsed": False}
    row |= {"gpt4_coherence_score": 4.0, "gpt4_trait_score": 3.0}
    found = success([row], {"check": {"ridge_mapped": 1.0}})
    assert [found["check"][name] for name in CRITERIA] == [True, False]
    print("success OK:", format_success(found).splitlines()[0])


if __name__ == "__main__":
    main()

"""Measure the trait scorers on external test sets, which neither training nor validation knows.

    python benchmarks/bench_scorers.py --texts benchmarks/labelled_elsewhere.json
    python benchmarks/bench_scorers.py --validation
    python benchmarks/bench_scorers.py --external [--filters FOLDER] [--at-most 1000]

The file holds kind -> texts. A kind with the name of a persona shows that trait; no other kind shows any.
Each scorer is tested against every kind but its own: area under the ROC curve, and share of texts above its
threshold. `--external` does so with the texts of `external_texts.py`, which it fetches. `--validation` prints
what the validation of each scorer says without a run.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.external_texts import (
    DIALECTS,
    EDITORIALS,
    PIRATE,
    TWEETS,
    external_sets,
    find_filters,
    rated_texts,
)
from reporting.tables import markdown_table
from scoring.encoders import ENCODERS
from scoring.trait_scorer import TraitScorer, load_scorers, scorer_key
from scoring.validation import remembered, shared_validation_texts, texts_of, validate, validation_sets
from support.artifacts import load_json
from texts.personas import load_persona, shipped_personas

HEADER = ("persona", "sensitivity", "mean AUC", "lowest AUC", "false positives", "most false positives")
VALIDATION_HEADER = (
    "persona",
    "encoder",
    "sensitivity",
    "lowest AUC",
    "highest apparent score",
    "most false positives",
    "verdict",
)
EXTERNAL_HEADER = ("persona", "scorer", "set", "texts", "AUC [95 %]", "above threshold", "others above")


def line(name: str, threshold: float, scores: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return one scorer's line of the table. scores: kind -> scores of its texts."""
    own = scores[name]
    others = {kind: values for kind, values in scores.items() if kind != name}
    auc = {
        kind: roc_auc_score(np.repeat([1, 0], [len(own), len(values)]), np.concatenate([own, values]))
        for kind, values in others.items()
    }
    wrong = {kind: np.mean(values > threshold) for kind, values in others.items()}
    lowest, worst = min(auc, key=auc.get), max(wrong, key=wrong.get)
    return (
        name,
        f"{np.mean(own > threshold):.0%}",
        f"{np.mean(list(auc.values())):.2f}",
        f"{auc[lowest]:.2f} ({lowest})",
        f"{np.mean(list(wrong.values())):.1%}",
        f"{wrong[worst]:.0%} ({worst})" if wrong[worst] else "0%",
    )


def auc_interval(shows: np.ndarray, lacks: np.ndarray) -> tuple[float, float, float]:
    """Return the area under the ROC curve and its 95 % interval (DeLong, DeLong & Clarke-Pearson, 1988).

    shows, lacks: (n,), (m,) scores of texts that show a trait and of texts that do not, 2 or more each. Where
    both sides say the same in other words, the interval is too wide, since it takes them as independent.
    """
    n, m = len(shows), len(lacks)
    ranks = rankdata(np.concatenate([shows, lacks]))
    won = (ranks[:n] - rankdata(shows)) / m  # share of the other side that a text stands above
    lost = 1 - (ranks[n:] - rankdata(lacks)) / n
    half = norm.ppf(0.975) * np.sqrt(won.var(ddof=1) / n + lost.var(ddof=1) / m)
    return won.mean(), max(0.0, won.mean() - half), min(1.0, won.mean() + half)


def external_line(shows: np.ndarray, lacks: np.ndarray, threshold: float) -> tuple[str, ...]:
    """Return a set's line of the table after its name. shows may be empty: all texts lack the trait then."""
    wrong = f"{np.mean(lacks > threshold):.1%}"
    if not len(shows):
        return str(len(lacks)), "–", "–", wrong
    area = "{:.2f} [{:.2f}, {:.2f}]".format(*auc_interval(shows, lacks))
    return f"{len(shows)} + {len(lacks)}", area, f"{np.mean(shows > threshold):.0%}", wrong


def external_table(filters: dict[str, str], at_most: int) -> str:
    """Return a line for each scorer and external set of a persona, and for ordinary texts.

    at_most: texts of a side that are scored, drawn at random.
    """
    rated = rated_texts()
    ordinary = {f"all {kind}": ([], [text for _, text in rated[kind]]) for kind in (EDITORIALS, TWEETS)}
    sets, table = external_sets(rated, filters), []
    for label, persona, scorer in trained_scorers(shipped_personas()):
        for name, sides in (sets.get(persona, {}) | ordinary).items():
            drawn = [random.Random(0).sample(side, min(at_most, len(side))) for side in sides]
            scores = (np.array(scorer.score(side), dtype=float) for side in drawn)
            table.append((persona, label, name, *external_line(*scores, scorer.threshold)))
    return markdown_table(EXTERNAL_HEADER, sorted(table, key=itemgetter(0)))


def labelled_tables(texts: dict[str, list[str]]) -> str:
    """Return a table for each kind of scorer. texts: kind -> texts."""
    tables = defaultdict(list)
    for label, persona, scorer in trained_scorers([name for name in shipped_personas() if name in texts]):
        scores = {kind: np.array(scorer.score(each), dtype=float) for kind, each in texts.items()}
        tables[label].append(line(persona, scorer.threshold, scores))
    return "\n\n".join(f"{label}\n\n{markdown_table(HEADER, table)}" for label, table in tables.items())


def validation_table() -> str:
    """Return a line for each scorer: what its validation says on every set that does not depend on a run."""
    table = []
    for encoder_name, name, scorer in trained_scorers(shipped_personas()):
        persona = load_persona(name)
        sets = validation_sets(persona, *shared_validation_texts(persona))
        score = remembered(scorer.score, scorer_key(persona, encoder_name), texts_of(sets))
        found = validate(score, sets, scorer.threshold)
        worst = {key: max(found[key], key=found[key].get) for key in ("apparent", "false_positives")}
        lowest = min(found["auc"], key=found["auc"].get)
        sensitivity = found["sensitivity"]
        table.append(
            (
                name,
                encoder_name,
                f"{sensitivity['n_right']}/{sensitivity['n']}",
                f"{found['auc'][lowest]:.2f} ({lowest})",
                *(f"{found[key][where]:.0%} ({where})" for key, where in worst.items()),
                "; ".join(found["problems"]) or "validated",
            )
        )
    return markdown_table(VALIDATION_HEADER, sorted(table, key=itemgetter(0)))


def trained_scorers(names: Sequence[str]) -> Iterator[tuple[str, str, TraitScorer]]:
    """Yield encoder, persona and scorer of each trained scorer of the named personas."""
    personas = list(map(load_persona, shipped_personas()))
    for encoder_name in ENCODERS:
        for persona, scorer in load_scorers(names, personas, encoder_name).items():
            yield encoder_name, persona, scorer


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, help="JSON file of kind -> texts")
    parser.add_argument("--validation", action="store_true", help="sets that validate the scorers")
    parser.add_argument("--external", action="store_true", help="fetch texts with public labels")
    parser.add_argument("--filters", type=Path, help="folder of the programs of Debian's package filters")
    parser.add_argument("--at-most", type=int, default=500, help="texts of a side of an external set (500)")
    arguments = parser.parse_args()
    if not (arguments.texts or arguments.external or arguments.validation):
        parser.error("give --texts, --validation, --external or several of them")
    if arguments.validation:
        print(validation_table(), end="\n\n")
    if arguments.texts:
        texts = load_json(arguments.texts)
        if not set(shipped_personas()) & set(texts):
            parser.error(f"no kind of text has the name of a persona: {', '.join(shipped_personas())}")
        print(labelled_tables(texts), end="\n\n")
    if arguments.external:
        filters = find_filters(arguments.filters)
        print(external_table(filters, arguments.at_most), end="\n\n")
        if missing := [name for name in (PIRATE, *DIALECTS) if name not in filters]:
            print(
                f"Not measured, since Debian's package `filters` is not installed: {', '.join(missing)}. "
                "Install it or unpack it, and name its folder by --filters."
            )


if __name__ == "__main__":
    main()

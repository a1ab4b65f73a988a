"""Measure the trait scorers on an external test set, which neither training nor validation knows.

    python benchmarks/bench_scorers.py --texts benchmarks/labelled_elsewhere.json

The file holds kind -> texts. A kind with the name of a persona shows that trait; no other kind shows any.
Each scorer is tested against every kind but its own: area under the ROC curve, and share of texts above its
threshold.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiment.conditions import SCORERS, TRAINED_SCORERS
from reporting.tables import markdown_table
from support.artifacts import load_json
from texts.personas import load_persona, shipped_personas

HEADER = ("persona", "sensitivity", "mean AUC", "lowest AUC", "false positives", "most false positives")


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


def main() -> None:
    """Print a table for each trained scorer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="JSON file of kind -> texts")
    texts = load_json(parser.parse_args().texts)
    names = [name for name in shipped_personas() if name in texts]
    if not names:
        parser.error(f"no kind of text has the name of a persona: {', '.join(shipped_personas())}")
    personas = list(map(load_persona, shipped_personas()))
    for kind_of_scorer in (SCORERS[name] for name in TRAINED_SCORERS):
        table = []
        for name, scorer in kind_of_scorer.load(names, personas).items():
            scores = {kind: np.array(scorer.score(each), dtype=float) for kind, each in texts.items()}
            table.append(line(name, scorer.threshold, scores))
        print(f"{kind_of_scorer.label}\n\n{markdown_table(HEADER, table)}\n")


if __name__ == "__main__":
    main()

"""Calibrate the verdict: what it says where the truth is known, on scores of a real run.

    python benchmarks/bench_verdict.py --run results/gemma_to_smol_chat

Experiments are made by resampling the prompts of a finished run, the conditions of a prompt together.
Null: the texts of the shuffled-pair map stand in the place of the mapped vector's, and those of the random
directions in the place of the shuffled map's. True recovery of r: the mapped vector's differences are moved
to r times the mean of the oracle's, and keep how they vary. Personas whose native vector does not work are
left out.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.results_table import at_alphas, results_table
from analysis.significance import mean_interval
from analysis.verdict import NATIVE_WORKS, VERDICTS, adjusted_p, decide, effects
from experiment.conditions import CONTROLS, DECIDING_CONTROLS, MAPPED, ORACLE, SCORERS
from reporting.tables import markdown_table
from support.artifacts import load_json

SIZES = (30, 60, 120)
# (true recovery, None for a null experiment; whether controls are moved to do nothing)
TRUTHS = ((None, False), *((truth, is_moved) for truth in (1.0, 0.6, 0.3) for is_moved in (False, True)))


def pool(folder: Path) -> list[dict[str, np.ndarray]]:
    """Return the differences of every persona and scorer whose native effect is there."""
    table = results_table(load_json(folder / "eval_results.json")["rows"])
    verdict = load_json(folder / "verdict.json")["personas"]
    found = []
    for persona, of_persona in verdict.items():
        texts = at_alphas(table, persona, of_persona["alphas"])
        for scorer in of_persona["scorers"]:
            differences, _ = effects(texts, SCORERS[scorer].column)
            is_whole = {ORACLE, MAPPED, *DECIDING_CONTROLS} <= differences.keys()
            if is_whole and mean_interval(differences[ORACLE]).low > NATIVE_WORKS:
                found.append(differences)
    return found


def experiment(
    real: dict[str, np.ndarray], truth: float | None, is_moved: bool, n: int, generator: np.random.Generator
) -> str:
    """Return the verdict on one resampled experiment; is_moved: whether controls do nothing."""
    chosen = generator.integers(0, len(real[ORACLE]), n)
    made = {name: values[chosen] for name, values in real.items()}
    if truth is None:
        made[MAPPED], made["shuffled_pairs"] = made["shuffled_pairs"], made["random_direction"]
    else:
        made[MAPPED] = made[MAPPED] - real[MAPPED].mean() + truth * real[ORACLE].mean()
        if is_moved:
            made |= {name: made[name] - real[name].mean() for name in CONTROLS if name in made}
    key = ("resampled", "scorer")
    return decide(made, adjusted_p({key: made})[key]).verdict


def main() -> None:
    """Print the confusion table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run with all controls")
    parser.add_argument("--n", type=int, default=1000, help="experiments of each kind")
    options = parser.parse_args()
    real = pool(options.run)
    if not real:
        parser.error(f"{options.run}: no persona has a native effect and all controls")
    generator = np.random.default_rng(0)
    table = []
    for truth, is_moved in TRUTHS:
        for n in SIZES:
            words = Counter(
                experiment(real[index % len(real)], truth, is_moved, n, generator)
                for index in range(options.n)
            )
            shares = [f"{words[word] / options.n:.1%}" for word in VERDICTS]
            kind = "null" if truth is None else f"{truth:.0%}"
            table.append((kind, "do nothing" if is_moved else "as found", str(n), *shares))
    print(f"{len(real)} pairs of persona and scorer, {options.n} experiments a line\n")
    print(markdown_table(("truth", "controls", "prompts", *VERDICTS), table))


if __name__ == "__main__":
    main()

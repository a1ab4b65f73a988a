"""Measure what the evaluation of a text costs, by metric, without a judge.

    python benchmarks/bench_evaluation.py --run results/gemma_to_smol [--texts 60] [--tokens 40]

Every metric scores the same texts of a finished run, evenly from all its conditions. The metrics alternate,
because other work on the machine changes each number, and the shortest time counts. Loading and training are
left out.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_mapping import best_of

from evaluation import repetition_metrics
from experiment.conditions import SCORERS
from experiment.config import load_config
from experiment.executor import Worker
from experiment.inputs import Inputs, load_inputs
from phases.score_texts import EVALUATION_CHUNK
from reporting.tables import markdown_table
from support.artifacts import load_json

GRID = 6840  # texts of the specification's grid, with three personas
TURNS = 3


def chosen(inputs: Inputs, folder: Path, n_texts: int, n_tokens: int) -> list[dict[str, Any]]:
    """Return steered texts of a run, evenly from all, cut to n_tokens of the target."""
    rows = [row for row in load_json(folder / "generation_results.json")["rows"] if row["persona"]]
    rows = rows[:: max(1, len(rows) // n_texts)][:n_texts]
    tokenizer = inputs.target.tokenizer
    read = tokenizer([row["output"] for row in rows], add_special_tokens=False)["input_ids"]
    return [{**row, "output": tokenizer.decode(ids[:n_tokens])} for row, ids in zip(rows, read, strict=True)]


def metrics(inputs: Inputs, rows: list[dict[str, Any]]) -> Mapping[str, Callable[[], Any]]:
    """Return what computes each metric of all rows."""
    outputs = [row["output"] for row in rows]
    worker = Worker({side.name: side for side in inputs.sides})
    turns = itertools.count()

    def perplexity(side: str) -> Any:
        shown = {side: [inputs.prompting.prompt(side, row["prompt"]) for row in rows]}
        return worker.perplexities(
            shown, outputs, inputs.config.evaluation_batch_size, inputs.evaluation_dtype
        )

    def scores(name: str) -> list[list[float | None]]:
        scorers = list(inputs.scorers[name].values())
        turn = next(turns)  # makes the texts new, because the encoder remembers the last ones
        return [scorer.score([f"{text} {turn}" for text in outputs]) for scorer in scorers]

    return {
        **{f"perplexity, {side}": lambda side=side: perplexity(side) for side in inputs.perplexity_sides},
        **{SCORERS[name].label: lambda name=name: scores(name) for name in inputs.scorers},
        "repetition, distinct n-grams": lambda: [repetition_metrics(text) for text in outputs],
    }


def main() -> None:
    """Print a line for each metric, and what the specification's grid would take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of a finished run")
    parser.add_argument("--texts", type=int, default=EVALUATION_CHUNK)
    parser.add_argument("--tokens", type=int, default=40, help="of each text; longer ones are cut")
    arguments = parser.parse_args()
    inputs = load_inputs(load_config(arguments.run / "config.json"))
    rows = chosen(inputs, arguments.run, arguments.texts, arguments.tokens)
    work = metrics(inputs, rows)
    seconds = dict.fromkeys(work, float("inf"))
    for turn in range(TURNS + 1):
        for name, run in work.items():
            taken, _ = best_of(1, run)
            if turn:  # the first turn reads weights and prefixes
                seconds[name] = min(seconds[name], taken / len(rows))
    seconds["all"] = sum(seconds.values())
    table = [(name, f"{each * 1000:.1f}", f"{each * GRID / 60:.1f}") for name, each in seconds.items()]
    print(markdown_table((f"{len(rows)} texts", "ms a text", f"minutes, {GRID:,} texts"), table))


if __name__ == "__main__":
    main()

"""Read a finished run for the tools: its artifacts, and the numbers that decide each persona's verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from analysis.results_table import cell_perplexity_ratio, results_table
from experiment.conditions import condition_of
from reporting.figures_headline import DecidedPersona
from support.run_folder import load_finished


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. config, protocol, verdict: of the JSON artifacts. table: its scored texts."""

    folder: Path
    config: Mapping[str, Any]
    protocol: Mapping[str, Any]
    verdict: Mapping[str, Any]
    table: pd.DataFrame

    @classmethod
    def load(cls, folder: Path, others: Sequence[str] = ()) -> "FinishedRun":
        """Return the run. others: files that must be there. Raises InputError: no finished run."""
        names = ("config.json", "protocol.json", "verdict.json", "eval_results.json")
        *found, results = load_finished(folder, *names, others=others)
        return cls(folder, *found, results_table(results["rows"]))

    @cached_property
    def decided(self) -> list[DecidedPersona]:
        """The verdict on each persona."""
        return [DecidedPersona.from_verdict(*each) for each in self.verdict["personas"].items()]

    def perplexity_ratio(self, decided: DecidedPersona, name: str | None) -> float | None:
        """Return the perplexity ratio of a compared name to unsteered text, None if it was not run."""
        alphas = decided.found["alphas"]
        if name is None or condition_of(name) not in alphas:
            return None
        return cell_perplexity_ratio(self.table, decided.persona, name, alphas[condition_of(name)])


def short_name(model: str) -> str:
    """Return a model's name, of a path its last part."""
    path = PurePath(model)
    return path.name if path.is_absolute() or model.startswith((".", "~")) else model

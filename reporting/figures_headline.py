"""Draw what a run comes to in one figure, `headline.png`: texts of one question, and every persona's effects.

`DecidedPersona` is a verdict with the numbers of the scorer that decides it, of which pages of results are
made, too.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.results_table import cell, worst_draws
from experiment.conditions import (
    CONDITIONS,
    CONTROLS,
    LEXICAL_CONTROLS,
    MAPPED,
    ORACLE,
    PROMPTED,
    SCORERS,
    UNSTEERED,
    condition_of,
    label_of,
)
from reporting.style import as_label, hide_frame, without_formulas

LEXICAL, OTHER_CONTROLS = "lexical control", "strongest other control"
# Row -> the conditions of which the one with the largest effect is drawn, in its look.
ROWS = {
    label_of(PROMPTED): (PROMPTED,),
    OTHER_CONTROLS: tuple(name for name in CONTROLS if name not in LEXICAL_CONTROLS),
    LEXICAL: LEXICAL_CONTROLS,
    label_of(MAPPED): (MAPPED,),
    label_of(ORACLE): (ORACLE,),
}
COLUMNS, LINES = 66, 5  # of a text in its box
SIZE = 12  # points, so that it can be read at half the figure's size


@dataclass(frozen=True)
class DecidedPersona:
    """A persona's verdict with the numbers of the scorer that decides it, or of the first that has any.

    found: of `verdict.json`. scorer: its name, None without any. shown: condition -> compared name of its
    draw with the largest effect.
    """

    persona: str
    found: Mapping[str, Any]
    scorer: str | None
    shown: Mapping[str, str]

    @classmethod
    def from_verdict(cls, persona: str, found: Mapping[str, Any]) -> "DecidedPersona":
        """Return it. found: what `verdict.json` holds on the persona."""
        with_effects = (name for name, of_scorer in found["scorers"].items() if of_scorer["effects"])
        scorer = found["decided_by"] or next(with_effects, next(iter(found["scorers"]), None))
        known = found["scorers"][scorer]["effects"] if scorer else {}
        return cls(
            persona, found, scorer, worst_draws({name: each["estimate"] for name, each in known.items()})
        )

    @property
    def numbers(self) -> Mapping[str, Any]:
        """What the scorer found; empty without one."""
        return self.found["scorers"][self.scorer] if self.scorer else {}

    @property
    def label(self) -> str:
        """The scorer's name, with a star if it is not validated."""
        if self.scorer is None:
            return "–"
        return SCORERS[self.scorer].label + ("" if self.numbers["is_validated"] else " *")

    def largest(self, conditions: Sequence[str]) -> str | None:
        """Return the compared name with the largest effect of these conditions, None without any."""
        names = [self.shown[name] for name in conditions if name in self.shown]
        return max(names, key=lambda name: self.numbers["effects"][name]["estimate"], default=None)

    def boxes(self, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Return compared name -> texts of the first seed by prompt: unsteered, lexical, mapped and native.

        table: from `results_table`.
        """
        alphas = {UNSTEERED: None, **self.found["alphas"]}
        known = next(filter(alphas.__contains__, LEXICAL_CONTROLS), None)
        names = (UNSTEERED, self.largest(LEXICAL_CONTROLS) or known, MAPPED, ORACLE)
        found = {}
        for name in filter(None, names):
            if condition_of(name) in alphas:
                texts = cell(table, self.persona, name, alphas[condition_of(name)])
                found[name] = texts[texts["seed"] == table["seed"].min()].set_index("prompt_idx")
        return found


def headline_figure(
    verdicts: Mapping[str, Any], table: pd.DataFrame, not_controls: Sequence[str] = ()
) -> Figure:
    """Draw one question under four conditions, and the effects of all personas with their verdicts.

    verdicts: persona -> `Verdict.content()`. table: from `results_table`. The texts are of the persona with
    the largest native effect by a validated scorer, if there is one, at the first test prompt and seed.
    Effects are by the scorer that decides, hollow if it is not validated. not_controls: conditions that
    mapped need not beat, which are not drawn.
    """
    decided = [DecidedPersona.from_verdict(*each) for each in verdicts.items()]
    n_rows = len(decided) * (len(ROWS) + 1)
    figure = Figure(figsize=(15, max(6.5, 0.3 * n_rows + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _write_texts(left, max(decided, key=_native_effect), table)
    _draw_effects(right, decided, not_controls)
    return figure


def _native_effect(decided: DecidedPersona) -> tuple[bool, float]:
    effect = decided.numbers.get("effects", {}).get(ORACLE)
    return decided.found["decided_by"] is not None, effect["estimate"] if effect else 0.0


def _write_texts(panel: Axes, decided: DecidedPersona, table: pd.DataFrame) -> None:
    boxes, first = decided.boxes(table), table["prompt_idx"].min()
    prompt = table.loc[table["prompt_idx"] == first, "prompt"].iloc[0]
    panel.set_title(_lines(f"{decided.persona}: “{prompt}”", 2), fontsize=SIZE + 1, loc="left")
    panel.set(xlim=(0, 1), ylim=(len(boxes), 0))
    panel.axis("off")
    for row, (name, texts) in enumerate(boxes.items()):
        look = {"color": CONDITIONS[condition_of(name)].colour, "fontsize": SIZE, "va": "top"}
        panel.text(0, row + 0.02, label_of(name), weight="bold", **look)
        written = texts["output"].get(first, "")
        shown = _lines(written, LINES) if written.strip() else "(empty)"
        panel.text(0, row + 0.2, shown, fontsize=SIZE - 1, va="top", linespacing=1.3)


def _lines(text: str, most: int) -> str:
    """Return a text in at most so many lines; one that is longer ends with an ellipsis."""
    return without_formulas("\n".join(textwrap.wrap(text, COLUMNS, max_lines=most, placeholder=" …")))


def _draw_effects(panel: Axes, decided: Sequence[DecidedPersona], not_controls: Sequence[str]) -> None:
    panel.axvline(0, color="grey", linewidth=0.8)
    ticks, labels, row = [], [], 0
    for each in decided:
        verdict = f"{each.persona}: {each.found['verdict']}"
        panel.text(
            0,
            row,
            as_label(verdict),
            fontsize=SIZE + 1,
            weight="bold",
            va="center",
            transform=panel.get_yaxis_transform(),
        )
        for label, conditions in ROWS.items():
            counting = [name for name in conditions if name not in not_controls]
            if (name := each.largest(counting)) is None:
                continue
            row += 1
            effect, condition = each.numbers["effects"][name], CONDITIONS[condition_of(name)]
            ends = [[abs(effect[end] - effect["estimate"])] for end in ("low", "high")]
            fill = condition.colour if each.numbers["is_validated"] else "white"
            panel.errorbar(
                effect["estimate"],
                row,
                xerr=ends,
                fmt=condition.marker,
                color=condition.colour,
                markerfacecolor=fill,
                markersize=8,
                capsize=3,
            )
            ticks.append(row)
            labels.append(label)
        row += 1.4
    panel.set_ylim(row - 0.6, -0.8)
    panel.set_yticks(ticks, labels, fontsize=SIZE)
    panel.tick_params(axis="x", labelsize=SIZE)
    panel.set_xlabel("change of the trait's score against unsteered text (95 %)", fontsize=SIZE)
    hide_frame(panel)

"""Draw what the texts show (phases 4 and 5).

`figure1.png` shows coherence against trait strength (specification, "Figure 1"), `strength_curve.png` what
vectors do to trait and perplexity at more strengths, `off_target.png` what else a vector moves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.results_table import worst_cells
from analysis.strength_curve import MULTIPLES
from experiment.conditions import LEXICAL_CONTROLS, MAPPED, ORACLE, UNSTEERED, label_of
from reporting.style import add_legend, as_label, look_of, number_plainly, persona_panels, signed, titled

CIRCLE = {"color": "black", "marker": "o", "fillstyle": "none", "markersize": 14, "linestyle": ""}
JUDGED_AXIS = (0.9, 5.1)  # a judge's scores, and room for the points at the ends
# Metric -> what an axis calls it.
AXES = {
    "gpt4_coherence_score": "coherence, judged 1 to 5",
    "gpt4_trait_score": "trait strength, judged 1 to 5",
    "independent_perplexity": "perplexity by the independent model",
    "perplexity": "perplexity by the target itself",
    "trait_probability": "trait's score by the classifier",
}
DARK = 0.6  # change from which a cell of the matrix is so dark that its letters are white


def strength_curve_figure(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw effect against perplexity ratio over strengths: native, mapped and the stronger lexical control.

    found: `strength_curve` of `verdict.json`. Lines begin at the unsteered text, the strongest point is the
    largest, and the points at alpha are circled.
    """
    xlabel = "perplexity ratio to the unsteered text (fluent ←)"
    figure, panels = persona_panels(list(found), xlabel, "change of the trait's score (95 %)")
    unsteered = {"perplexity_ratio": 1.0, "effect": 0.0, "low": 0.0, "high": 0.0}
    drawn, compared = {}, MULTIPLES.index(1.0)
    for persona, panel in panels.items():
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.axvline(1, color="grey", linewidth=0.8)
        points = {name: vector["points"] for name, vector in found[persona]["vectors"].items()}
        lexical = set(LEXICAL_CONTROLS) & set(points)
        stronger = sorted(lexical, key=lambda name: points[name][compared]["effect"])[-1:]
        for name in (ORACLE, MAPPED, *stronger):
            curve = [unsteered, *points[name]]
            x, y = ([point[key] for point in curve] for key in ("perplexity_ratio", "effect"))
            error = [[abs(point[end] - point["effect"]) for point in curve] for end in ("low", "high")]
            drawn[name] = _draw_strengths(panel, name, x, y, error)
            panel.plot(points[name][compared]["perplexity_ratio"], points[name][compared]["effect"], **CIRCLE)
        panel.set_xscale("log")
    number_plainly(panel.xaxis)
    add_legend(figure, drawn, [Line2D([], [], **CIRCLE, label="at the verdict's α")])
    title = "What a vector adds to the trait and to perplexity, from no steering to the strongest (large)"
    return titled(figure, title)


def _draw_strengths(
    panel: Axes, condition: str, x: Sequence[float], y: Sequence[float], error: Sequence[Sequence[float]]
) -> Any:
    """Draw a condition's points with error bars, joined, the last one largest."""
    look = look_of(condition)
    bars = panel.errorbar(x, y, yerr=error, **look, markersize=6, linewidth=1, capsize=2, label=condition)
    panel.plot(x[-1], y[-1], **look, markersize=11)
    return bars


def off_target_figure(matrix: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Draw what the vectors for a persona do to the scores of all: native, mapped, and their difference.

    matrix: what `side_effects.off_target` returns. Without one of the two there is no difference.
    """
    personas = list(dict.fromkeys(name for by_persona in matrix.values() for name in by_persona))
    scored = list(dict.fromkeys(name for by in matrix.values() for row in by.values() for name in row))
    tables = {
        label_of(method): pd.DataFrame.from_dict(by_persona, orient="index").reindex(personas, columns=scored)
        for method, by_persona in matrix.items()
    }
    if len(tables) == 2:
        tables["mapped − native"] = tables[label_of(MAPPED)] - tables[label_of(ORACLE)]
    size = (1.5 * len(scored) * len(tables) + 4, 0.8 * len(personas) + 2.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for panel, (title, values) in zip(axes, tables.items(), strict=True):
        image = panel.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            look = {"ha": "center", "va": "center", "color": "white" if abs(value) > DARK else "black"}
            panel.text(column, row, "–" if np.isnan(value) else signed(value), **look)
        panel.set_xticks(range(len(scored)), list(map(as_label, scored)), rotation=40, ha="right")
        panel.set_yticks(range(len(personas)), list(map(as_label, personas)))
        panel.set(title=title, xlabel="scored as")
    axes[0].set_ylabel("steered for")
    figure.colorbar(image, ax=axes, label="change of the score")
    return titled(figure, "What each vector moves, its own trait and others, by the validated classifiers")


def choose_axes(table: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the metrics for coherence and trait: the judge's if there are any, else our own."""
    if any(entry["gpt4_coherence_score"]["n"] for entry in table):
        return "gpt4_coherence_score", "gpt4_trait_score"
    independent = any(entry["independent_perplexity"]["n"] for entry in table)
    return "independent_perplexity" if independent else "perplexity", "trait_probability"


def coherence_trait_figure(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel a persona: coherence (better to the right) against trait strength (up).

    table: what `evaluation.aggregate` returns; of a condition's draws, the worst is drawn. A line joins a
    condition's alphas, the largest drawn largest. Bars are 95 % intervals over prompts; dotted lines go
    through the unsteered text. Without a judge, coherence is the perplexity on a reversed logarithmic axis;
    a judge's axes go from 1 to 5.
    """
    table = worst_cells(table)
    coherence, trait = choose_axes(table)
    judged = coherence == "gpt4_coherence_score"
    figure, panels = persona_panels(
        list(dict.fromkeys(entry["persona"] for entry in table)),
        AXES[coherence] + (" (coherent →)" if judged else ", geometric mean (fluent →)"),
        f"{AXES[trait]} (95 %)",
    )
    drawn = {}
    for persona, panel in panels.items():
        entries = [entry for entry in table if entry["persona"] == persona]
        drawn |= _draw_persona(panel, entries, coherence, trait)
        panel.set_title(panel.get_title() + _alphas(entries))
    if judged:
        panel.set(xlim=JUDGED_AXIS, ylim=JUDGED_AXIS)
    else:
        # Last, since beside the first point alone a logarithmic axis can have no width at all.
        panel.set_xscale("log")
        panel.invert_xaxis()
        for panel in panels.values():
            number_plainly(panel.xaxis)
    if drawn:
        add_legend(figure, drawn)
    return titled(figure, "Trait against coherence under every condition")


def _draw_persona(
    panel: Axes, entries: Sequence[Mapping[str, Any]], coherence: str, trait: str
) -> dict[str, Any]:
    """Draw every condition that has both numbers, and return what the legend shows of it."""
    drawn = {}
    for condition in dict.fromkeys(entry["condition"] for entry in entries):
        points = [entry for entry in entries if entry["condition"] == condition]
        points = [entry for entry in points if entry[coherence]["n"] and entry[trait]["n"]]
        if not points:
            continue
        points.sort(key=lambda entry: entry["alpha"] or 0)
        x, y = ([entry[metric]["mean"] for entry in points] for metric in (coherence, trait))
        error = [[_distance(entry[trait], end) for entry in points] for end in ("low", "high")]
        drawn[condition] = _draw_strengths(panel, condition, x, y, error)
        if condition == UNSTEERED:
            panel.axvline(x[0], color="black", linestyle=":", linewidth=0.8)
            panel.axhline(y[0], color="black", linestyle=":", linewidth=0.8)
    return drawn


def _distance(summary: Mapping[str, Any], end: str) -> float:
    """Return how far an end of the interval lies from the mean, 0 where it has none."""
    return 0.0 if summary.get(end) is None else abs(summary[end] - summary["mean"])


def _alphas(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return at which alphas a persona was steered, for its title."""
    shown = [f"{alpha:.3g}" for alpha in sorted({entry["alpha"] for entry in entries} - {None})]
    listed = ", ".join(shown) if len(shown) < 5 else f"{shown[0]} to {shown[-1]}"
    return f" (α {listed})" if shown else ""

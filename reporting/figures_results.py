"""Draw what the texts show (phases 4 and 5).

`alpha_search.png` shows the alphas that were tried, `figure1.png` coherence against trait strength
(specification, "Figure 1"),
`effect_perplexity.png` what each condition does to trait and perplexity, `strength_curve.png` the same of the
vectors that write at more strengths, `off_target.png` what else a vector moves.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from analysis.results_table import worst_cells
from analysis.strength_curve import MULTIPLES
from experiment.conditions import CONDITIONS, LEXICAL_CONTROLS, MAPPED, ORACLE, UNSTEERED
from reporting.style import add_legend, as_label, look_of, number_plainly, persona_panels

CIRCLE = {"color": "black", "marker": "o", "fillstyle": "none", "markersize": 11, "linestyle": ""}
FONT_SIZE = 13  # points; 12 pixels where a figure is shown at half its size
JUDGED_AXIS = (0.9, 5.1)  # a judge's scores, and room for the points at the ends


def strength_curve_figure(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw effect against perplexity ratio over strengths: native, mapped and the stronger lexical control.

    found: `strength_curve` of `verdict.json`. Lines begin at the unsteered text.
    """
    unsteered = {"alpha": 0.0, "perplexity_ratio": 1.0, "effect": 0.0, "low": 0.0, "high": 0.0}
    curves = {}
    for persona, of_persona in found.items():
        points = {name: vector["points"] for name, vector in of_persona["vectors"].items()}
        at_alpha = {name: each[MULTIPLES.index(1.0)]["effect"] for name, each in points.items()}
        lexical = sorted(set(LEXICAL_CONTROLS) & set(points), key=at_alpha.__getitem__)[-1:]
        curves[persona] = {name: [unsteered, *points[name]] for name in (ORACLE, MAPPED, *lexical)}
    figure = effect_perplexity_figure(curves, {name: each["alpha"] for name, each in found.items()})
    for panel in figure.axes:
        panel.tick_params(labelsize=FONT_SIZE)
    for text in figure.findobj(Text):
        text.set_fontsize(FONT_SIZE)
    return figure


def effect_perplexity_figure(
    curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    compared: Mapping[str, float] = MappingProxyType({}),
) -> Figure:
    """Draw a panel a persona: what each condition does to the trait against what it does to perplexity.

    curves: what `side_effects.curves_by_alpha` returns. A line joins a condition's alphas, the strongest
    drawn largest. compared: persona -> the alpha at which its points are circled.
    """
    xlabel = "perplexity ratio to the unsteered text (fluent ←)"
    figure, panels = persona_panels(list(curves), xlabel, "change of the trait's score (95 %)")
    drawn = {}
    for persona, panel in panels.items():
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.axvline(1, color="grey", linewidth=0.8)
        for condition, points in curves[persona].items():
            x, y = [point["perplexity_ratio"] for point in points], [point["effect"] for point in points]
            error = [[abs(point[end] - point["effect"]) for point in points] for end in ("low", "high")]
            drawn[condition] = _draw_strengths(panel, condition, x, y, error)
            for point in points:
                if point["alpha"] == compared.get(persona):
                    panel.plot(point["perplexity_ratio"], point["effect"], **CIRCLE)
        panel.set_xscale("log")
    number_plainly(panel.xaxis)
    add_legend(figure, drawn, [Line2D([], [], **CIRCLE, label="compared")] if compared else [])
    return figure


def _draw_strengths(
    panel: Axes, condition: str, x: Sequence[float], y: Sequence[float], error: Sequence[Sequence[float]]
) -> Any:
    """Draw a condition's points with error bars, joined, the last one largest."""
    look = look_of(condition)
    bars = panel.errorbar(x, y, yerr=error, **look, markersize=4, linewidth=1, capsize=2, label=condition)
    panel.plot(x[-1], y[-1], **look, markersize=9)
    return bars


def off_target_figure(matrix: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Draw, for each method, the change of each persona's score (columns) under each one's vector (rows).

    matrix: what `side_effects.off_target` returns.
    """
    size = max(len(rows) for rows in matrix.values())
    shape = ((0.7 * size + 2.2) * len(matrix) + 1, 0.6 * size + 2)
    figure = Figure(figsize=shape, layout="constrained")
    panels = figure.subplots(1, len(matrix), squeeze=False)[0]
    for panel, (method, by_persona) in zip(panels, matrix.items(), strict=True):
        scored = list(dict.fromkeys(name for changes in by_persona.values() for name in changes))
        values = [[changes.get(name, math.nan) for name in scored] for changes in by_persona.values()]
        image = panel.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for row, changes in enumerate(values):
            for column, value in enumerate(changes):
                panel.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(scored)), list(map(as_label, scored)), rotation=40, ha="right")
        panel.set_yticks(range(len(by_persona)), list(map(as_label, by_persona)))
        panel.set(title=CONDITIONS[method].label, xlabel="scored as", ylabel="steered for")
    figure.colorbar(image, ax=panels, label="change of trait probability")
    return figure


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
    measured = f"{coherence.replace('_', ' ')}, geometric mean (fluent →)"
    xlabel = "coherence, judged 1 to 5" if judged else measured
    ylabel = "trait strength, judged 1 to 5" if judged else "trait probability, mean (95 %)"
    aucs = {entry["persona"]: entry["classifier_auc"] for entry in table}
    figure, panels = persona_panels(list(aucs), xlabel, ylabel)
    drawn = {}
    for persona, panel in panels.items():
        entries = [entry for entry in table if entry["persona"] == persona]
        drawn |= _draw_persona(panel, entries, coherence, trait)
        if not judged and aucs[persona] is not None:
            panel.set_title(f"{panel.get_title()} (classifier AUC {aucs[persona]:.3f})", fontsize=10)
    if judged:
        panel.set(xlim=JUDGED_AXIS, ylim=JUDGED_AXIS)
    else:
        # Last, since beside the first point alone a logarithmic axis can have no width at all.
        panel.set_xscale("log")
        panel.invert_xaxis()
        for panel in panels.values():
            number_plainly(panel.xaxis)
    if drawn:
        add_legend(figure, drawn).set_title("\n".join(_alphas_by_persona(table)), {"size": 8})
    return figure


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


def _alphas_by_persona(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines that say at which alphas each persona was steered; personas of the same share one."""
    alphas = {
        persona: {entry["alpha"] for entry in table if entry["persona"] == persona} - {None}
        for persona in dict.fromkeys(entry["persona"] for entry in table)
    }
    shown: dict[str, list[str]] = {}
    for persona, found in alphas.items():
        few = [f"{alpha:.3g}" for alpha in sorted(found)]
        shown.setdefault(", ".join(few) if len(few) < 5 else f"{few[0]} to {few[-1]}", []).append(persona)
    if len(shown) == 1:
        return [f"α {text}" for text in shown if text]
    return ["α", *(f"{as_label(name)} {text}" for text, names in shown.items() for name in names)]


def alpha_search_figure(content: Mapping[str, Any]) -> Figure:
    """Draw a panel a persona: each method's perplexity ratio over alpha, and the bound.

    content: what `alpha_search.alphas_content` returns. The chosen alpha is drawn largest; a point that
    exceeds any bound is faint, so a faint one under the line fails another. One without ratio is not drawn.
    """
    plain, costs = content["bound"]["max_perplexity_ratio"], content["trait_costs"]
    personas = list(dict.fromkeys(entry["persona"] for entry in content["alphas"]))
    xlabel, ylabel = "alpha (large: chosen; faint: over a bound)", "perplexity ratio (fluent ↓)"
    figure, panels = persona_panels(personas, xlabel, ylabel)
    drawn = {}
    panels[personas[0]].set(xscale="log", yscale="log")
    for persona, panel in panels.items():
        panel.axhline(1, color="grey", linewidth=0.8)
        bound = plain * max(1.0, costs.get(persona, 1.0))
        label = "bound" if costs else f"bound: {plain:g}"
        line = panel.axhline(bound, color="black", linestyle=":", label=label)
        for entry in content["alphas"]:
            if entry["persona"] == persona:
                drawn |= _draw_search(panel, entry)
        if costs:
            panel.set_title(f"{panel.get_title()} (bound: {bound:.2g})", fontsize=10)
    for panel in panels.values():
        number_plainly(panel.xaxis)
        number_plainly(panel.yaxis)
    add_legend(figure, drawn, [line])
    return figure


def _draw_search(panel: Axes, entry: Mapping[str, Any]) -> dict[str, Line2D]:
    """Draw one curve and return method -> its legend entry, or nothing if no point has a ratio."""
    points = [point for point in entry["curve"] if point["perplexity_ratio"] is not None]
    if not points:
        return {}
    method, look = entry["method"], look_of(entry["method"])
    curve = [abs(point["alpha"]) for point in points], [point["perplexity_ratio"] for point in points]
    panel.plot(*curve, color=look["color"], linewidth=1, alpha=0.5, label=method)
    for point in points:
        # The last points lie close to the chosen one, which stays in front of them.
        chosen = point["alpha"] == entry["alpha"]
        size = {"markersize": 10 if chosen else 5, "alpha": 1 if point["is_coherent"] else 0.35}
        panel.plot(abs(point["alpha"]), point["perplexity_ratio"], **look, **size, zorder=4 if chosen else 3)
    return {method: Line2D([], [], **look, markersize=5, linewidth=1)}

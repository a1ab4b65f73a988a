"""Draw the ablations: `figure2.png` of layer pairs, `figure3.png` of texts, `figure4.png` of blocks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiment.conditions import CONDITIONS, MAPPED, ORACLE
from reporting.figures_results import choose_axes, statistic_of
from reporting.style import add_legend, hide_frame, look_of, number_plainly, persona_columns

LOWEST_R2 = -0.6  # at which the panels of R2 are cut


def layer_ablation_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw coherence and trait strength of every method over the layer pairs (specification, "Figure 2").

    results: what `ablate_layers` collects; a column of panels for each persona.
    """
    tables = [
        {(entry["persona"], entry["condition"]): entry for entry in result["conditions"]}
        for result in results
    ]
    metrics = choose_axes([entry for table in tables for entry in table.values()])
    pairs = [f"{result['source_layer']}→{result['target_layer']}" for result in results]
    personas = list(dict.fromkeys(persona for persona, _ in tables[0]))
    ylabels = (f"{metrics[0].replace('_', ' ')} (coherent ↑)", metrics[1].replace("_", " "))
    figure, columns = persona_columns(personas, (3.6, 6.4), ylabels)
    drawn = {}
    for persona, panels in columns.items():
        for panel, metric in zip(panels, metrics, strict=True):
            for condition in CONDITIONS:
                found = [table.get((persona, condition), {}).get(metric, {}) for table in tables]
                values = [each.get(statistic_of(metric)) for each in found]
                if any(value is not None for value in values):
                    y = [math.nan if value is None else value for value in values]
                    (drawn[condition],) = panel.plot(pairs, y, markersize=5, **look_of(condition))
            if metric.endswith("perplexity"):
                panel.set_yscale("log")
                panel.invert_yaxis()
                number_plainly(panel.yaxis)
        panels[1].set_xlabel("layer pair, source → target")
    add_legend(figure, drawn)
    return figure


def block_ablation_figure(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how far the trait moves, and at what perplexity, over the number of blocks that are steered.

    points: what `ablate_blocks` collects; a column of panels for each persona. Hollow points were coherent
    at no alpha.
    """
    personas = list(dict.fromkeys(point["persona"] for point in points))
    methods = list(dict.fromkeys(point["method"] for point in points))
    sizes = sorted({len(point["target_layers"]) for point in points})
    ylabels = ("trait probability, change", "perplexity ratio (fluent ↓)")
    figure, columns = persona_columns(personas, (2.9, 5.2), ylabels, sharex=True, sharey="row")
    drawn = {}
    for persona, panels in columns.items():
        of_persona = [point for point in points if point["persona"] == persona]
        for panel, metric, unsteered in zip(
            panels, ("trait_change", "perplexity_ratio"), (0, 1), strict=True
        ):
            panel.axhline(unsteered, color="grey", linewidth=0.8)
            for method in methods:
                own = [point for point in of_persona if point["method"] == method]
                own = [point for point in own if point[metric] is not None]
                x = [sizes.index(len(point["target_layers"])) for point in own]
                look = {**look_of(method), "markersize": 5}
                (drawn[method],) = panel.plot(x, [point[metric] for point in own], linewidth=1, **look)
                for place, point in zip(x, own, strict=True):
                    if not point["is_coherent"]:
                        panel.plot(place, point[metric], **look, markerfacecolor="white")
        panels[1].set_xticks(range(len(sizes)), [*map(str, sizes[:-1]), f"all {sizes[-1]}"])
        panels[1].set_yscale("log")
    for panels in columns.values():
        number_plainly(panels[1].yaxis)
    figure.supxlabel("blocks of the target that are steered", fontsize=10)
    add_legend(figure, drawn)
    return figure


def sample_ablation_figure(content: Mapping[str, Any]) -> Figure:
    """Draw held-out error over pairs (specification, "Figure 3"), and R2 over texts read.

    content: what `ablate_samples` writes.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    by_pairs, *by_texts = figure.subplots(1, 3)
    labels = {"last": "map of last tokens", "aligned": "map of every aligned position"}
    for positions, condition in (("last", ORACLE), ("aligned", MAPPED)):
        points = [point for point in content["points"] if point["positions"] == positions]
        colour = CONDITIONS[condition].colour
        style = {"label": labels[positions], "marker": "o", "markersize": 4, "color": colour}
        errors = [1 - point["held_out"]["last"]["r2"] for point in points]
        by_pairs.loglog([point["n_pairs"] for point in points], errors, **style)
        texts = [point["n_texts"] for point in points]
        for panel, tested in zip(by_texts, labels, strict=True):
            held_out = [point["held_out"][tested] for point in points]
            panel.semilogx(texts, [each["r2"] for each in held_out], **style)
            standardised = [each["r2_standardised"] for each in held_out]
            panel.semilogx(texts, standardised, linestyle=":", marker=".", color=colour)
    by_pairs.set(xlabel="pairs", ylabel="error on held-out last tokens (1 − R²)", title="Error against pairs")
    number_plainly(by_pairs.yaxis)
    for panel, tested in zip(by_texts, ("last tokens", "all positions"), strict=True):
        lowest = min(min(line.get_ydata()) for line in panel.lines)
        panel.set(
            xlabel="texts read by both models (forward passes)",
            ylabel="R² (dotted: standardised dimensions)",
            title=f"R² on held-out {tested}{', cut at −0.6' if lowest < LOWEST_R2 else ''}",
            ylim=(max(LOWEST_R2, min(0.0, lowest)), 1),
        )
        panel.axhline(0, color="grey", linewidth=0.8)
    for panel in (by_pairs, *by_texts):
        panel.title.set_size(10)
        panel.legend(fontsize=8)
        hide_frame(panel)
    return figure

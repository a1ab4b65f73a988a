"""Draw the ablations: `figure2.png` of layer pairs, `figure3.png` of texts, `figure4.png` of blocks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from analysis.results_table import worst_cells
from experiment.conditions import CONDITIONS, MAPPED, ORACLE
from reporting.figures_results import JUDGED_AXIS, choose_axes
from reporting.style import add_legend, hide_frame, look_of, number_plainly, persona_columns

# Of the ablation of samples: held-out pairs, and the pairs that a map is learnt from.
TESTED = {"last": "the last tokens", "aligned": "all positions"}
LEARNT_FROM = {"last": "map of last tokens", "aligned": "map of every aligned position"}


def layer_ablation_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw coherence and trait strength of every method over the layer pairs (specification, "Figure 2").

    results: what `ablate_layers` collects; a column of panels for each persona.
    """
    tables = [
        {(entry["persona"], entry["condition"]): entry for entry in worst_cells(result["conditions"])}
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
                values = [each.get("mean") for each in found]
                if any(value is not None for value in values):
                    y = [math.nan if value is None else value for value in values]
                    (drawn[condition],) = panel.plot(pairs, y, markersize=5, **look_of(condition))
            if metric.endswith("perplexity"):
                panel.set_yscale("log")
                panel.invert_yaxis()
                number_plainly(panel.yaxis)
            elif metric.startswith("gpt4"):
                panel.set_ylim(JUDGED_AXIS)
        panels[1].set_xlabel("layer pair, source → target")
    add_legend(figure, drawn)
    return figure


def block_ablation_figure(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how far the trait moves, and at what perplexity, over the number of blocks that are steered.

    points: what `ablate_blocks` collects; a column of panels for each persona. Hollow points are not
    coherent.
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
    """Draw the error on held-out pairs against training samples (specification, "Figure 3").

    content: what `ablate_samples` writes. A panel for held-out last tokens, and one for all positions.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (tested, where) in zip(panels, TESTED.items(), strict=True):
        for positions, condition in (("last", ORACLE), ("aligned", MAPPED)):
            points = [point for point in content["points"] if point["positions"] == positions]
            samples = [point["n_texts"] for point in points]
            look = {"color": CONDITIONS[condition].colour}
            for r2, style in (
                ("r2", {"marker": "o"}),
                ("r2_standardised", {"marker": ".", "linestyle": ":"}),
            ):
                errors = [1 - point["held_out"][tested][r2] for point in points]
                label = LEARNT_FROM[positions] + (", standardised dimensions" if r2 != "r2" else "")
                panel.loglog(samples, errors, **look, **style, markersize=5, label=label)
        panel.axhline(1, color="grey", linewidth=0.8)  # to predict the mean
        panel.set_xticks(samples, [f"{n:,}" for n in samples], rotation=40, ha="right")
        panel.set_xticks([], minor=True)
        panel.set_xlabel("training samples (texts that both models have read)")
        panel.set_title(f"tested on {where} of held-out texts", fontsize=10)
        hide_frame(panel)
    panels[0].set_ylabel("reconstruction error (1 − R²)")
    number_plainly(panels[0].yaxis)
    panels[0].legend(fontsize=8)
    return figure

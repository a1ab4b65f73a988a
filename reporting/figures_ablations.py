"""Draw the ablations: `figure2.png` of layer pairs, `figure3.png` of texts, `figure4.png` of blocks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from analysis.results_table import worst_cells
from experiment.conditions import CONDITIONS
from reporting.figures_results import AXES, JUDGED_AXIS, choose_axes
from reporting.style import add_legend, hide_frame, look_of, number_plainly, persona_columns, titled

# Of the ablation of samples: held-out pairs, and the pairs that a map is learnt from.
TESTED = {"last": "the last tokens", "aligned": "all positions"}
LEARNT_FROM = {"last": ("last tokens", "#0072b2"), "aligned": ("every position", "#d55e00")}
R2_LOOKS = {"r2": ("", "o-"), "r2_standardised": (", each dimension counts alike", "o:")}


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
    ylabels = (f"{AXES[metrics[0]]}\n(coherent ↑)", AXES[metrics[1]])
    figure, columns = persona_columns(personas, (4.4, 8), ylabels)
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
    return titled(figure, "Coherence and trait by the layer pair that is steered")


def block_ablation_figure(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how far the trait moves, and at what perplexity, over the number of blocks that are steered.

    points: what `ablate_blocks` collects; a column of panels for each persona. Hollow points are not
    coherent.
    """
    personas = list(dict.fromkeys(point["persona"] for point in points))
    methods = list(dict.fromkeys(point["method"] for point in points))
    sizes = sorted({len(point["target_layers"]) for point in points})
    ylabels = ("change of the trait's score", "perplexity ratio (fluent ↓)")
    figure, columns = persona_columns(personas, (3.8, 7), ylabels, sharex=True, sharey="row")
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
    figure.supxlabel("blocks of the target that are steered (hollow: not coherent)")
    add_legend(figure, drawn)
    return titled(figure, "Trait and perplexity by the number of blocks that are steered")


def sample_ablation_figure(content: Mapping[str, Any]) -> Figure:
    """Draw the error on held-out pairs against training samples (specification, "Figure 3").

    content: what `ablate_samples` writes. A panel for held-out last tokens, and one for all positions.
    """
    figure = Figure(figsize=(15, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (tested, where) in zip(panels, TESTED.items(), strict=True):
        for positions, (learnt_from, colour) in LEARNT_FROM.items():
            points = [point for point in content["points"] if point["positions"] == positions]
            samples = [point["n_texts"] for point in points]
            for r2, (counted, style) in R2_LOOKS.items():
                errors = [1 - point["held_out"][tested][r2] for point in points]
                panel.loglog(samples, errors, style, color=colour, label=f"map of {learnt_from}{counted}")
        panel.axhline(1, color="grey", linewidth=0.8, label="no map: the mean")
        panel.set_xticks(samples, [f"{n:,}" for n in samples], rotation=40, ha="right")
        panel.set_xticks([], minor=True)
        panel.set_xlabel("training samples (texts that both models have read)")
        panel.set_title(f"tested on {where} of held-out texts")
        hide_frame(panel)
    panels[0].set_ylabel("reconstruction error (1 − R²)")
    number_plainly(panels[0].yaxis)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return titled(figure, "How much text the map needs: its error by the number of training samples")

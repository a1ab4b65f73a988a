"""Draw the maps of a run: `layer_search.png` of all layer pairs, `mapping_analysis.png` of the fitted map."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiment.conditions import CONDITIONS, MAPPED
from reporting.style import hide_frame

COLOUR = CONDITIONS[MAPPED].colour
LOWEST_R2 = -0.5  # at which a panel is cut, so that one useless map does not hide how the others differ
HEAT_MAPS = (
    ("r2_standardised", "Held-out R² (standardised dimensions)"),
    ("agreement", "Cosine of mapped to native vectors, mean"),
    ("score", "Agreement above chance and other personas"),
)
MEASURES = {"r2": "R², pooled", "r2_standardised": "R², standardised", "retrieval_accuracy": "retrieval"}


def mapping_figure(
    analysis: Mapping[str, Any], cv: Mapping[str, Any], maps: Sequence[Mapping[str, Any]]
) -> Figure:
    """Draw R2 and degrees of freedom over lambda, R2 by dimension and axis, spectrum, and maps compared.

    analysis, cv: of `RidgeMapping`. maps: what `comparison_maps.maps_table` returns.
    """
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    _draw_lambdas(panels[0], panels[1], cv)
    _draw_dimensions(panels[2], cv)
    _draw_components(panels[3], cv)
    _draw_spectrum(panels[4], analysis)
    _draw_maps(panels[5], maps)
    for panel in panels:
        hide_frame(panel)
        panel.title.set_size(10)
    return figure


def _draw_lambdas(r2: Axes, df: Axes, cv: Mapping[str, Any]) -> None:
    values, best = cv["lambda_values"], cv["best_lambda"]
    for key, label, style in (("r2", "pooled", "o-"), ("r2_standardised", "standardised dimensions", "s--")):
        r2.semilogx(values, [cv[key][value] for value in values], style, markersize=4, label=label)
    r2.axvline(best, color="black", linestyle=":", label=f"best: {best:g}")
    r2.axhline(cv["shuffled_r2"], color="grey", linestyle="--", label="shuffled pairs, best case")
    unit = "in units of the mean Gram diagonal" if cv["lambda_unit"] == "relative" else "absolute"
    r2.set(xlabel=f"λ ({unit})", ylabel="held-out R²", title=f"Cross-validation, {cv['n_rows']} pairs")
    r2.legend(fontsize=8)
    df.semilogx(values, [cv["df"][value] for value in values], "o-", color=COLOUR)
    df.axvline(best, color="black", linestyle=":")
    title = f"Degrees of freedom: {cv['df'][best]:.0f}"
    df.set(xlabel=f"λ ({unit})", ylabel="df(λ)", ylim=(0, None), title=title)


def _draw_dimensions(panel: Axes, cv: Mapping[str, Any]) -> None:
    r2 = sorted(cv["best_r2_per_dimension"], reverse=True)
    panel.plot(r2, color=COLOUR)
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set(
        xlabel="target dimensions, best predicted first",
        ylabel="held-out R²",
        ylim=(max(LOWEST_R2, min(0, *r2)), 1),
        title=f"By dimension: pooled {cv['best_r2']:.2f}, median {cv['best_r2_median_dimension']:.2f}",
    )


def _draw_components(panel: Axes, cv: Mapping[str, Any]) -> None:
    r2, explained = cv["best_r2_per_component"], list(accumulate(cv["component_variance"]))
    components = range(1, len(r2) + 1)
    panel.semilogx(components, r2, ".", markersize=3, color=COLOUR, label="held-out R²")
    panel.semilogx(components, explained, color="black", linewidth=1, label="variance up to here")
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set(
        xlabel="principal axis of the target, largest variance first",
        ylim=(max(LOWEST_R2, min(0, *r2)), 1.02),
        title="By principal axis",
    )
    panel.legend(fontsize=8)


def _draw_spectrum(panel: Axes, analysis: Mapping[str, Any]) -> None:
    panel.semilogy(analysis["singular_values"], color=COLOUR)
    panel.axvline(analysis["effective_rank"], color="black", linestyle=":")
    title = f"Spectrum: {analysis['effective_rank']} singular values over 1 % of the largest"
    panel.set(xlabel="index", ylabel="singular value of W", title=title)


def _draw_maps(panel: Axes, maps: Sequence[Mapping[str, Any]]) -> None:
    names = [row["map"] if row["rank"] is None else f"{row['map']}\n(rank {row['rank']})" for row in maps]
    for number, (key, label) in enumerate(MEASURES.items()):
        heights = [row[key] or 0.0 for row in maps]
        panel.bar([index + 0.27 * (number - 1) for index in range(len(maps))], heights, 0.25, label=label)
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_xticks(range(len(maps)), names, fontsize=8, rotation=30, ha="right")
    lowest = min(-0.05, *(min(row["r2"], row["r2_standardised"]) for row in maps))
    cut = f", bars cut at {LOWEST_R2:g}".replace("-", "−") if lowest < LOWEST_R2 else ""
    panel.set(ylim=(max(LOWEST_R2, lowest), 1.15), title=f"Maps compared{cut}")
    panel.legend(fontsize=8, ncols=3, loc="upper center")


def layer_search_figure(search: Mapping[str, Any]) -> Figure:
    """Draw held-out R2 and the agreement of every layer pair as heat maps, the best pair marked.

    search: what `layer_search.LayerSearch.content` returns.
    """
    figure = Figure(figsize=(15, 5.6), layout="constrained")
    agreement = [
        [fmean(values) for values in zip(*rows, strict=True)]
        for rows in zip(*search["agreement"].values(), strict=True)
    ]
    tables = {**search, "agreement": agreement}
    sides = ("source", "target")
    row, column = (
        search[f"{side}_layers"].index(layer) for side, layer in zip(sides, search["best"], strict=True)
    )
    for panel, (key, title) in zip(figure.subplots(1, 3), HEAT_MAPS, strict=True):
        image = panel.imshow(tables[key], origin="lower", aspect="auto", cmap="viridis", vmin=0)
        panel.plot(column, row, "o", markersize=11, markerfacecolor="none", markeredgecolor="red")
        for axis, side in zip((panel.yaxis, panel.xaxis), sides, strict=True):
            layers = search[f"{side}_layers"]
            step = max(1, len(layers) // 10)
            axis.set_ticks(range(0, len(layers), step), list(map(str, layers[::step])))
            axis.set_label_text(f"{side} layer")
        best = f"{tables[key][row][column]:.2f} at {search['best'][0]} → {search['best'][1]}"
        panel.set_title(f"{title}: {best}", fontsize=10)
        figure.colorbar(image, ax=panel)
    return figure

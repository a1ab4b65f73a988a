"""Draw the maps of a run: `layer_search.png` of all layer pairs, `mapping_analysis.png` of the fitted map."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiment.conditions import CONDITIONS, MAPPED
from reporting.style import hide_frame, signed, titled

COLOUR = CONDITIONS[MAPPED].colour
HEAT_MAPS = (
    ("r2_standardised", "Held-out R², standardised"),
    ("agreement", "Cosine of mapped to native vectors"),
    ("score", "Agreement above chance and others"),
)


def mapping_figure(analysis: Mapping[str, Any], cv: Mapping[str, Any]) -> Figure:
    """Draw held-out R2 over lambda beside that of shuffled pairs, and the singular values of the map.

    analysis, cv: of `RidgeMapping`.
    """
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    r2, spectrum = figure.subplots(1, 2)
    _draw_lambdas(r2, cv)
    _draw_spectrum(spectrum, analysis)
    for panel in (r2, spectrum):
        hide_frame(panel)
    return titled(figure, "How well the map predicts activations of held-out documents, and what it keeps")


def _draw_lambdas(panel: Axes, cv: Mapping[str, Any]) -> None:
    values, best = cv["lambda_values"], cv["best_lambda"]
    looks = {"r2": ("all dimensions pooled", "o-"), "r2_standardised": ("each dimension counts alike", "s--")}
    for key, (label, style) in looks.items():
        panel.semilogx(values, [cv[key][value] for value in values], style, color=COLOUR, label=label)
    panel.axhline(cv["shuffled_r2"], color="grey", linestyle="--", label="shuffled pairs, pooled")
    panel.axvline(best, color="black", linestyle=":", label=f"chosen λ: {best:g}")
    unit = "in units of the mean Gram diagonal" if cv["lambda_unit"] == "relative" else "absolute"
    shuffled = signed(cv["shuffled_r2"], ".2f")
    title = f"R² {signed(cv['best_r2'], '.2f')} with {cv['n_rows']:,} pairs, {shuffled} with shuffled ones"
    panel.set(xlabel=f"λ ({unit})", ylabel="held-out R²", title=title, ylim=(None, 1))
    panel.legend(loc="best")


def _draw_spectrum(panel: Axes, analysis: Mapping[str, Any]) -> None:
    values, rank = analysis["singular_values"], analysis["effective_rank"]
    panel.semilogy(range(1, len(values) + 1), values, color=COLOUR)
    panel.axvline(rank, color="black", linestyle=":")
    title = f"{rank} of {len(values)} singular values over 1 % of the largest"
    panel.set(xlabel="number of the singular value", ylabel="singular value of the map", title=title)


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
        panel.plot(
            column, row, "o", markersize=13, markerfacecolor="none", markeredgecolor="red", markeredgewidth=2
        )
        for axis, side in zip((panel.yaxis, panel.xaxis), sides, strict=True):
            layers = search[f"{side}_layers"]
            step = max(1, len(layers) // 10)
            axis.set_ticks(range(0, len(layers), step), list(map(str, layers[::step])))
            axis.set_label_text(f"{side} layer")
        best = f"{tables[key][row][column]:.2f} at {search['best'][0]} → {search['best'][1]}"
        panel.set_title(f"{title}:\n{best}")
        figure.colorbar(image, ax=panel)
    return titled(figure, "How well each pair of layers fits; the best is circled")

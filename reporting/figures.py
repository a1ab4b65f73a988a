"""Draw the figures of a run.

`layer_search.png` shows R2 and agreement of all layer pairs, `mapping_analysis.png` the fitted map (phase
2), `alpha_search.png` the alphas that were tried (phase 4), `figure1.png` coherence against trait strength
(specification, "Figure 1"), `recovery.png` how much of the native effect the mapped vectors recover, and
`off_target.png` what else a vector moves (phase 5).
PNG files carry the fingerprint of their data.
"""

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from support.artifacts import replacing
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)

NAME_WIDTH = 40  # characters of a persona's name in a line of a title or legend
COLOURS = {
    "baseline": "#000000",
    "zero_pad": "#999999",
    "interpolate": "#56b4e9",
    "random_proj": "#e69f00",
    "ridge_mapped": "#d55e00",
    "oracle": "#009e73",
    "procrustes": "#0072b2",
    "reduced_rank": "#cc79a7",
    "shuffled_pairs": "#666666",
    "other_persona": "#8c564b",
    "random_direction": "#bcbd22",
    "prompted": "#17becf",
}
MARKERS = {
    "baseline": "*",
    "zero_pad": "s",
    "interpolate": "^",
    "random_proj": "x",
    "ridge_mapped": "o",
    "oracle": "D",
    "procrustes": "P",
    "reduced_rank": "v",
    "shuffled_pairs": "+",
    "other_persona": "1",
    "random_direction": "2",
    "prompted": "p",
}

SCORER_COLOURS = {"classifier": "#0072b2", "likelihood_ratio": "#d55e00", "brevity": "#009e73"}


def save_figure(figure: Figure, path: Path, fingerprint: str) -> None:
    """Write a PNG in one step, with its fingerprint in the metadata.

    Characters that the font lacks are drawn as boxes, and warned of in one line a figure.
    """
    with replacing(path) as file, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph .* missing")
        figure.savefig(file, format="png", dpi=130, metadata={"Fingerprint": fingerprint})
    lacking = {str(warning.message) for warning in caught if str(warning.message).startswith("Glyph ")}
    if lacking:
        logger.warning("%s: the font lacks %d characters, drawn as boxes", path.name, len(lacking))
    for warning in caught:
        if str(warning.message) not in lacking:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def as_label(name: str) -> str:
    """Return a name as text of a figure: in lines of 40 characters, and `$` begins no formula."""
    return "\n".join(textwrap.wrap(name, NAME_WIDTH) or [""]).replace("$", r"\$")


def figure_fingerprint(path: Path) -> str | None:
    """Return the fingerprint that `save_figure` wrote, or None for no readable figure."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get("Fingerprint")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged PNG files
        return None


def draw_once(
    folder: RunFolder, name: str, cache_key: str, draw: Callable[..., Figure], *arguments: Any
) -> None:
    """Draw a figure of a run unless it is there, made from the same."""
    path = folder.path / name
    if folder.fresh or figure_fingerprint(path) != cache_key:
        folder.lock()
        save_figure(draw(*arguments), path, cache_key)


def mapping_figure(
    analysis: Mapping[str, Any], cv: Mapping[str, Any], maps: Sequence[Mapping[str, Any]]
) -> Figure:
    """Draw what the map knows: R2 and df over lambda, R2 by dimension and principal axis, spectrum, rivals.

    analysis, cv: of `RidgeMapping`. maps: what `comparison_maps.maps_table` returns.
    """
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    _draw_cross_validation(panels[0], cv)
    _draw_degrees_of_freedom(panels[1], cv)
    _draw_dimensions(panels[2], cv)
    _draw_components(panels[3], cv)
    spectrum = panels[4]
    spectrum.semilogy(analysis["singular_values"], color=COLOURS["ridge_mapped"])
    spectrum.axvline(analysis["effective_rank"], color="black", linestyle=":")
    spectrum.set(
        xlabel="index",
        ylabel="singular value of W",
        title=f"Spectrum: {analysis['effective_rank']} singular values over 1 % of the largest",
    )
    _draw_maps(panels[5], maps)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(10)
    return figure


def _draw_cross_validation(panel: Axes, cv: Mapping[str, Any]) -> None:
    values = cv["lambda_values"]
    for key, label, style in (("r2", "pooled", "o-"), ("r2_standardised", "standardised dimensions", "s--")):
        panel.semilogx(values, [cv[key][value] for value in values], style, markersize=4, label=label)
    panel.axvline(cv["best_lambda"], color="black", linestyle=":", label=f"best: {cv['best_lambda']:g}")
    panel.axhline(cv["shuffled_r2"], color="grey", linestyle="--", label="shuffled pairs, best case")
    panel.set(xlabel=_lambda_label(cv), ylabel="held-out R²", title=f"Cross-validation, {cv['n_rows']} pairs")
    panel.legend(fontsize=8)


def _draw_degrees_of_freedom(panel: Axes, cv: Mapping[str, Any]) -> None:
    values = cv["lambda_values"]
    panel.semilogx(values, [cv["df"][value] for value in values], "o-", color=COLOURS["ridge_mapped"])
    best = cv["df"][cv["best_lambda"]]
    panel.axvline(cv["best_lambda"], color="black", linestyle=":")
    panel.set(
        xlabel=_lambda_label(cv), ylabel="df(λ)", ylim=(0, None), title=f"Degrees of freedom: {best:.0f}"
    )


def _lambda_label(cv: Mapping[str, Any]) -> str:
    return f"λ ({'in units of the mean Gram diagonal' if cv['lambda_unit'] == 'relative' else 'absolute'})"


def _draw_dimensions(panel: Axes, cv: Mapping[str, Any]) -> None:
    r2 = sorted(cv["best_r2_per_dimension"], reverse=True)
    panel.plot(r2, color=COLOURS["ridge_mapped"])
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set(
        xlabel="target dimensions, best predicted first",
        ylabel="held-out R²",
        ylim=(max(-0.5, min(0, *r2)), 1),
        title=f"By dimension: pooled {cv['best_r2']:.2f}, median {cv['best_r2_median_dimension']:.2f}",
    )


def _draw_components(panel: Axes, cv: Mapping[str, Any]) -> None:
    r2, variance = cv["best_r2_per_component"], cv["component_variance"]
    components = range(1, len(r2) + 1)
    panel.semilogx(components, r2, ".", markersize=3, color=COLOURS["ridge_mapped"], label="held-out R²")
    panel.semilogx(
        components, list(accumulate(variance)), color="black", linewidth=1, label="variance up to here"
    )
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set(
        xlabel="principal axis of the target, largest variance first",
        ylim=(max(-0.5, min(0, *r2)), 1.02),
        title="By principal axis",
    )
    panel.legend(fontsize=8)


def _draw_maps(panel: Axes, maps: Sequence[Mapping[str, Any]]) -> None:
    names = [row["map"] if row["rank"] is None else f"{row['map']}\n(rank {row['rank']})" for row in maps]
    measures = (
        ("r2", "R², pooled"),
        ("r2_standardised", "R², standardised"),
        ("retrieval_accuracy", "retrieval"),
    )
    for number, (key, label) in enumerate(measures):
        heights = [row[key] or 0.0 for row in maps]
        panel.bar([index + 0.27 * (number - 1) for index in range(len(maps))], heights, 0.25, label=label)
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_xticks(range(len(maps)), names, fontsize=8)
    lowest = min(-0.05, *(min(row["r2"], row["r2_standardised"]) for row in maps))
    cut = ", bars cut at −0.5" if lowest < -0.5 else ""
    panel.set(ylim=(max(-0.5, lowest), 1.15), title=f"Maps compared{cut}")
    panel.legend(fontsize=8, ncols=3, loc="upper center")


def layer_search_figure(search: Mapping[str, Any]) -> Figure:
    """Draw held-out R2 and the agreement score of every layer pair as heat maps, the best pair marked.

    search: what `layer_search.LayerSearch.content` returns.
    """
    figure = Figure(figsize=(15, 5.6), layout="constrained")
    panels = figure.subplots(1, 3)
    agreement = [
        [fmean(cell) for cell in zip(*rows, strict=True)]
        for rows in zip(*search["agreement"].values(), strict=True)
    ]
    tables = (
        ("Held-out R² (standardised dimensions)", search["r2_standardised"]),
        ("Cosine of mapped to native vectors, mean", agreement),
        ("Agreement over chance and wrong personas", search["score"]),
    )
    best = (
        search["source_layers"].index(search["best"][0]),
        search["target_layers"].index(search["best"][1]),
    )
    for panel, (title, table) in zip(panels, tables, strict=True):
        image = panel.imshow(table, origin="lower", aspect="auto", cmap="viridis", vmin=0)
        panel.plot(best[1], best[0], "o", markersize=11, markerfacecolor="none", markeredgecolor="red")
        for axis, layers in ((panel.xaxis, search["target_layers"]), (panel.yaxis, search["source_layers"])):
            step = max(1, len(layers) // 10)
            axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        panel.set(xlabel="target layer", ylabel="source layer")
        panel.set_title(
            f"{title}: {table[best[0]][best[1]]:.2f} at {search['best'][0]} → {search['best'][1]}",
            fontsize=10,
        )
        figure.colorbar(image, ax=panel)
    return figure


def layer_ablation_figure(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw coherence and trait strength of every method over the layer pairs (specification, "Figure 2").

    results: what `ablations.ablate_layers` collects; a column of panels for each persona.
    """
    tables = [entry["conditions"] for entry in results]
    coherence, trait = choose_axes([entry for table in tables for entry in table])
    labels = [f"{entry['source_layer']}→{entry['target_layer']}" for entry in results]
    personas = list(dict.fromkeys(entry["persona"] for entry in tables[0]))
    figure = Figure(figsize=(3.6 * len(personas) + 1.6, 6.4), layout="constrained")
    panels = figure.subplots(2, len(personas), squeeze=False)
    statistic = {coherence: "mean" if coherence.startswith("gpt4") else "median", trait: "mean"}
    for column, persona in enumerate(personas):
        for row, metric in enumerate((coherence, trait)):
            panel = panels[row][column]
            for condition in COLOURS:
                values = [
                    next(
                        (
                            entry[metric][statistic[metric]]
                            for entry in table
                            if (entry["persona"], entry["condition"]) == (persona, condition)
                        ),
                        None,
                    )
                    for table in tables
                ]
                if any(value is not None for value in values):
                    drawn = [float("nan") if value is None else value for value in values]
                    style = {"color": COLOURS[condition], "marker": MARKERS[condition], "markersize": 5}
                    panel.plot(labels, drawn, label=condition, **style)
            panel.spines[["top", "right"]].set_visible(False)
            if metric.endswith("perplexity"):
                panel.set_yscale("log")
                panel.invert_yaxis()
                _number_plainly(panel.yaxis)
        panels[0][column].set_title(as_label(persona), fontsize=10)
        panels[1][column].set_xlabel("layer pair, source → target")
    panels[0][0].set_ylabel(f"{coherence.replace('_', ' ')} (coherent ↑)")
    panels[1][0].set_ylabel(trait.replace("_", " "))
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    return figure


def block_ablation_figure(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw how far the trait moves, and at what perplexity, over the number of blocks that are steered.

    points: what `block_ablation.ablate_blocks` collects; a column of panels for each persona. Hollow points
    were coherent at no dose.
    """
    personas = list(dict.fromkeys(point["persona"] for point in points))
    sizes = sorted({len(point["target_layers"]) for point in points})
    figure = Figure(figsize=(2.9 * len(personas) + 1.6, 5.2), layout="constrained")
    panels = figure.subplots(2, len(personas), squeeze=False, sharex=True, sharey="row")
    drawn = {}
    for column, persona in enumerate(personas):
        for row, metric in enumerate(("trait_change", "perplexity_ratio")):
            panel = panels[row][column]
            panel.axhline(row, color="grey", linewidth=0.8)
            for method in dict.fromkeys(point["method"] for point in points):
                own = [p for p in points if (p["persona"], p["method"]) == (persona, method)]
                own = [point for point in own if point[metric] is not None]
                x = [sizes.index(len(point["target_layers"])) for point in own]
                y = [point[metric] for point in own]
                style = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5}
                (drawn[method],) = panel.plot(x, y, label=method, linewidth=1, **style)
                for place, point in zip(x, own, strict=True):
                    if not point["is_coherent"]:
                        panel.plot(place, point[metric], **style, markerfacecolor="white")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0][column].set_title(as_label(persona), fontsize=10)
        panels[1][column].set_xticks(range(len(sizes)), [*map(str, sizes[:-1]), f"all {sizes[-1]}"])
        panels[1][column].set_yscale("log")
        _number_plainly(panels[1][column].yaxis)
    figure.supxlabel("blocks of the target that are steered", fontsize=10)
    panels[0][0].set_ylabel("trait probability, change")
    panels[1][0].set_ylabel("perplexity ratio (fluent ↓)")
    figure.legend(handles=list(drawn.values()), loc="outside right upper", fontsize=8)
    return figure


def sample_ablation_figure(content: Mapping[str, Any]) -> Figure:
    """Draw held-out error over pairs (specification, "Figure 3"), and R2 over texts read.

    content: what `ablations.ablate_samples` writes.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    by_pairs, last, everywhere = panels
    for positions, label, colour in (
        ("last", "map of last tokens", COLOURS["oracle"]),
        ("aligned", "map of every aligned position", COLOURS["ridge_mapped"]),
    ):
        points = [point for point in content["points"] if point["positions"] == positions]
        style = {"marker": "o", "markersize": 4, "color": colour}
        errors = [1 - point["held_out"]["last"]["r2"] for point in points]
        by_pairs.loglog([point["n_pairs"] for point in points], errors, label=label, **style)
        for panel, tested in ((last, "last"), (everywhere, "aligned")):
            texts = [point["n_texts"] for point in points]
            panel.semilogx(texts, [point["held_out"][tested]["r2"] for point in points], label=label, **style)
            standardised = [point["held_out"][tested]["r2_standardised"] for point in points]
            panel.semilogx(texts, standardised, linestyle=":", marker=".", color=colour)
    by_pairs.set(xlabel="pairs", ylabel="error on held-out last tokens (1 − R²)", title="Error against pairs")
    _number_plainly(by_pairs.yaxis)
    for panel, tested in ((last, "last tokens"), (everywhere, "all positions")):
        lowest = min(min(line.get_ydata()) for line in panel.lines)
        panel.set(
            xlabel="texts read by both models (forward passes)",
            ylabel="R² (dotted: standardised dimensions)",
            title=f"R² on held-out {tested}{', cut at −0.6' if lowest < -0.6 else ''}",
            ylim=(max(-0.6, min(0.0, lowest)), 1),
        )
        panel.axhline(0, color="grey", linewidth=0.8)
    for panel in panels:
        panel.title.set_size(10)
        panel.legend(fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def recovery_figure(found: Mapping[str, Any]) -> Figure:
    """Draw how much of the native effect each persona's mapped vector recovers, by scorer, with intervals.

    found: what `verdict.verdicts` returns. Hollow: a scorer without licence. Who has no native effect to
    recover, or no bound, has no bar.
    """
    names = list(found)
    figure = Figure(figsize=(6.5, 0.7 * len(names) + 1.5), layout="constrained")
    panel = figure.subplots()
    for value, style in ((0, "-"), (0.5, ":"), (1, "--")):
        panel.axvline(value, color="grey", linewidth=0.8, linestyle=style)
    drawn = {}
    for row, name in enumerate(names):
        for number, (scorer, decided) in enumerate(found[name]["scorers"].items()):
            ratio = decided.get("recovery")
            if not ratio or not all(map(math.isfinite, (ratio["low"], ratio["high"]))):
                continue
            colour = SCORER_COLOURS[scorer]
            ends = [[ratio["estimate"] - ratio["low"]], [ratio["high"] - ratio["estimate"]]]
            drawn[scorer] = panel.errorbar(
                [ratio["estimate"]],
                [row + 0.2 * number],
                xerr=ends,
                fmt="o",
                color=colour,
                markerfacecolor=colour if decided["is_validated"] else "white",
                capsize=3,
            )
    labels = [f"{as_label(name)}: {found[name]['verdict']}" for name in names]
    panel.set_yticks(range(len(names)), labels)
    panel.set_ylim(len(names) - 0.4, -0.6)  # the first above
    panel.set_xlabel("recovery: effect of the mapped vector / of the target's own (95 %)")
    panel.spines[["top", "right"]].set_visible(False)
    if drawn:
        panel.legend(drawn.values(), [name.replace("_", " ") for name in drawn], fontsize=8)
    return figure


def _shared_panels(n: int) -> tuple[Figure, Sequence[Axes], Sequence[Axes]]:
    """Return a figure, n panels of the same axes, three in a row, and the leftmost of each row."""
    n_columns = min(3, n)
    n_rows = math.ceil(n / n_columns)
    figure = Figure(figsize=(4.4 * n_columns + 1.4, 3.6 * n_rows + 0.6), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flatten()[n:]:
        panel.remove()
    return figure, list(panels.flatten()[:n]), list(panels[:, 0])


def effect_perplexity_figure(curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Draw a panel a persona: what each condition does to the trait against what it does to perplexity.

    curves: what `outcome.strength_curves` returns. A line joins a condition's alphas, the strongest drawn largest.
    """
    figure, panels, left = _shared_panels(len(curves))
    drawn = {}
    for panel, (persona, by_condition) in zip(panels, curves.items(), strict=True):
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.axvline(1, color="grey", linewidth=0.8)
        for condition, points in by_condition.items():
            x, y = [point["perplexity_ratio"] for point in points], [point["effect"] for point in points]
            style = {"color": COLOURS[condition], "marker": MARKERS[condition]}
            ends = [
                [point["effect"] if point[end] is None else point[end] for point in points]
                for end in ("low", "high")
            ]
            error = [[abs(value - of) for value, of in zip(end, y, strict=True)] for end in ends]
            drawn[condition] = panel.errorbar(x, y, yerr=error, **style, markersize=4, linewidth=1, capsize=2)
            panel.plot(x[-1], y[-1], **style, markersize=9)
        panel.set_xscale("log")
        panel.set_title(as_label(persona), fontsize=10)
        panel.tick_params(labelbottom=True)
        panel.spines[["top", "right"]].set_visible(False)
    _number_by_width(panels[0].xaxis)
    figure.supxlabel("perplexity ratio to the unsteered text (perplexity_ratio →)", fontsize=10)
    for panel in left:
        panel.set_ylabel("change of trait probability (95 %)")
    order = [condition for condition in COLOURS if condition in drawn]
    figure.legend([drawn[name] for name in order], order, loc="outside right upper", fontsize=8)
    return figure


def off_target_figure(matrix: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Draw, for each method, the change of each persona's score (columns) under each one's vector (rows).

    matrix: what `outcome.off_target` returns.
    """
    size = max(len(rows) for rows in matrix.values())
    shape = ((0.7 * size + 2.2) * len(matrix) + 1, 0.6 * size + 2)
    figure = Figure(figsize=shape, layout="constrained")
    panels = figure.subplots(1, len(matrix), squeeze=False)[0]
    for panel, (method, by_persona) in zip(panels, matrix.items(), strict=True):
        names = list(by_persona)
        scored = list(dict.fromkeys(name for row in by_persona.values() for name in row))
        values = [[by_persona[name].get(other, math.nan) for other in scored] for name in names]
        image = panel.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for row, of_row in enumerate(values):
            for column, value in enumerate(of_row):
                panel.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(scored)), list(map(as_label, scored)), rotation=40, ha="right")
        panel.set_yticks(range(len(names)), list(map(as_label, names)))
        panel.set(title=method, xlabel="scored as", ylabel="steered for")
    figure.colorbar(image, ax=panels, label="change of trait probability")
    return figure


def choose_axes(table: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the metrics for coherence and trait: the judge's if there are any, else our own."""
    judged = any(entry["gpt4_coherence_score"]["n"] for entry in table)
    if judged:
        return "gpt4_coherence_score", "gpt4_trait_score"
    independent = any(entry["independent_perplexity"]["n"] for entry in table)
    return "independent_perplexity" if independent else "perplexity", "trait_probability"


def coherence_trait_figure(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel a persona, three in a row: coherence (better to the right) against trait strength (up).

    table: what `evaluation.aggregate` returns. A line joins a condition's alphas, the largest drawn largest.
    Bars are 95 % intervals over prompts; dotted lines go through the unsteered text, and all panels have the
    same axes. Without a judge, coherence is the median perplexity on a reversed logarithmic axis.
    """
    coherence, trait = choose_axes(table)
    personas = list(dict.fromkeys(entry["persona"] for entry in table))
    figure, panels, left = _shared_panels(len(personas))
    for panel, persona in zip(panels, personas, strict=True):
        entries = [entry for entry in table if entry["persona"] == persona]
        _draw_persona(panel, entries, coherence, trait)
        auc = entries[0]["classifier_auc"]
        note = f" (classifier AUC {auc:.3f})" if trait == "trait_probability" and auc is not None else ""
        panel.set_title(f"{as_label(persona)}{note}", fontsize=10)
        panel.tick_params(labelbottom=True)
    if coherence.endswith("perplexity"):
        # Last, since beside the first point alone a logarithmic axis can have no width at all.
        panels[0].set_xscale("log")
        panels[0].invert_xaxis()
        for panel in panels:
            _number_by_width(panel.xaxis)
    judged = coherence == "gpt4_coherence_score"
    label = "coherence, judged 1 to 5" if judged else f"median {coherence.replace('_', ' ')} (fluent →)"
    figure.supxlabel(label, fontsize=10)
    for panel in left:
        panel.set_ylabel("trait strength, judged 1 to 5" if judged else "trait probability, mean (95 %)")
    drawn = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        drawn = dict(zip(labels, handles, strict=True)) | drawn
    if drawn:
        order = [condition for condition in COLOURS if condition in drawn]
        legend = figure.legend([drawn[name] for name in order], order, loc="outside right upper", fontsize=8)
        legend.set_title("\n".join(_alphas_by_persona(table)), {"size": 8})
    return figure


def _alphas_by_persona(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines that say at which alphas each persona was steered; personas of the same share one."""
    alphas: dict[str, list[float]] = {}
    for entry in table:
        found = alphas.setdefault(entry["persona"], [])
        if entry["alpha"] is not None and entry["alpha"] not in found:
            found.append(entry["alpha"])
    shown: dict[str, list[str]] = {}
    for persona, found in alphas.items():
        found = sorted(found)
        few = [f"{alpha:.3g}" for alpha in found]
        text = ", ".join(few) if len(few) < 5 else f"{few[0]} to {few[-1]}"
        shown.setdefault(text, []).append(persona)
    if len(shown) == 1:
        return [f"α {text}" for text in shown if text]
    return ["α", *(f"{as_label(name)} {text}" for text, names in shown.items() for name in names)]


def alpha_search_figure(content: Mapping[str, Any]) -> Figure:
    """Draw a panel a persona: each method's perplexity ratio over alpha, and the bound.

    content: what `alpha_search.alphas_content` returns. The chosen dose is drawn largest; a point that
    exceeds any bound is faint, so a faint one under the line fails another. One without ratio is not drawn.
    """
    plain, costs = content["bound"]["max_perplexity_ratio"], content.get("trait_costs", {})
    personas = list(dict.fromkeys(entry["persona"] for entry in content["alphas"]))
    figure = Figure(figsize=(4.4 * len(personas) + 1.8, 4.4), layout="constrained")
    panels = figure.subplots(1, len(personas), squeeze=False)[0]
    drawn = {}
    for panel, persona in zip(panels, personas, strict=True):
        panel.set(xscale="log", yscale="log")
        panel.axhline(1, color="grey", linewidth=0.8)
        bound = plain * max(1.0, costs.get(persona, 1.0))
        label = "bound" if costs else f"bound: {plain:g}"
        drawn["bound"] = panel.axhline(bound, color="black", linestyle=":", label=label)
        for entry in content["alphas"]:
            if entry["persona"] == persona:
                drawn |= _draw_dose(panel, entry)
        suffix = f" (bound: {bound:.2g})" if costs else ""
        panel.set_title(as_label(persona) + suffix, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        _number_by_width(panel.xaxis)
        _number_by_width(panel.yaxis)
    figure.supxlabel("alpha (large: the chosen dose; faint: over a bound)", fontsize=10)
    panels[0].set_ylabel("perplexity ratio to the unsteered text (fluent ↓)")
    handles = [drawn[name] for name in (*COLOURS, "bound") if name in drawn]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure


def _draw_dose(panel: Axes, entry: Mapping[str, Any]) -> dict[str, Line2D]:
    """Draw one curve and return method -> its legend entry, or nothing if no point has a ratio."""
    points = [point for point in entry["curve"] if point["perplexity_ratio"] is not None]
    if not points:
        return {}
    method = entry["method"]
    style = {"color": COLOURS[method], "marker": MARKERS[method]}
    x, y = [point["alpha"] for point in points], [point["perplexity_ratio"] for point in points]
    panel.plot(x, y, color=COLOURS[method], linewidth=1, alpha=0.5, label=method)
    for point in points:
        # The last points lie close to the chosen one, which stays in front of them.
        chosen = point["alpha"] == entry["alpha"]
        look = {"markersize": 10 if chosen else 5, "alpha": 1 if point["is_coherent"] else 0.35}
        panel.plot(point["alpha"], point["perplexity_ratio"], **style, **look, zorder=4 if chosen else 3)
    return {method: Line2D([], [], **style, markersize=5, linewidth=1, label=method)}


def _number_by_width(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, the fewer the wider it is."""
    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 15 else (1, 2, 5) if high / low < 200 else (1,)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _number_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with 20, 30, 50 and the like instead of powers."""
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.ScalarFormatter())
    axis.set_minor_formatter(ticker.NullFormatter())


def _draw_persona(panel: Axes, entries: list[Mapping[str, Any]], coherence: str, trait: str) -> None:
    statistic = "median" if coherence.endswith("perplexity") else "mean"
    for condition in dict.fromkeys(entry["condition"] for entry in entries):
        points = sorted(
            (entry for entry in entries if entry["condition"] == condition),
            key=lambda entry: entry["alpha"] or 0,
        )
        points = [entry for entry in points if entry[coherence]["n"] and entry[trait]["n"]]
        if not points:
            continue
        x = [entry[coherence][statistic] for entry in points]
        y = [entry[trait]["mean"] for entry in points]
        style = {"color": COLOURS[condition], "marker": MARKERS[condition]}
        error = [[_distance(entry[trait], end) for entry in points] for end in ("low", "high")]
        panel.errorbar(x, y, yerr=error, **style, markersize=5, linewidth=1, capsize=2, label=condition)
        panel.plot(x[-1], y[-1], color=COLOURS[condition], marker=MARKERS[condition], markersize=10)
        if condition == "baseline":
            panel.axvline(x[0], color="black", linestyle=":", linewidth=0.8)
            panel.axhline(y[0], color="black", linestyle=":", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)


def _distance(summary: Mapping[str, Any], end: str) -> float:
    """Return how far an end of the interval lies from the mean, 0 where it has none."""
    return 0.0 if summary.get(end) is None else abs(summary[end] - summary["mean"])


def main() -> None:
    """Check that a figure of made-up numbers is drawn and keeps its fingerprint."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "off_target.png"
        save_figure(off_target_figure({"oracle": {"check": {"check": 0.5}}}), path, "check")
        assert figure_fingerprint(path) == "check"
        assert path.stat().st_size > 10_000
    print("figures OK: a figure is drawn and carries its fingerprint")


if __name__ == "__main__":
    main()

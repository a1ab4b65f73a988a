"""Draw the figures of a run.

`mapping_analysis.png` shows the fitted map (phase 2), `figure1.png` coherence against trait
strength (phase 5; specification, "Figure 1"). PNG files carry the fingerprint of their data.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from artifacts import replacing

COLOURS = {
    "baseline": "#000000",
    "zero_pad": "#999999",
    "interpolate": "#56b4e9",
    "random_proj": "#e69f00",
    "ridge_mapped": "#d55e00",
    "oracle": "#009e73",
}
MARKERS = {
    "baseline": "*",
    "zero_pad": "s",
    "interpolate": "^",
    "random_proj": "x",
    "ridge_mapped": "o",
    "oracle": "D",
}


def save_figure(figure: Figure, path: Path, fingerprint: str) -> None:
    """Write a PNG in one step, with its fingerprint in the metadata."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130, metadata={"Fingerprint": fingerprint})


def figure_fingerprint(path: Path) -> str | None:
    """Return the fingerprint that `save_figure` wrote, or None for no readable figure."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get("Fingerprint")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged PNG files
        return None


def mapping_figure(analysis: Mapping[str, Any], cv: Mapping[str, Any]) -> Figure:
    """Draw the held-out R2 over lambda, R2 by target dimension, and the singular values of W."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    by_lambda, by_dimension, spectrum = figure.subplots(1, 3)
    values = cv["lambda_values"]
    by_lambda.semilogx(values, [cv["r2"][value] for value in values], "o-", color=COLOURS["ridge_mapped"])
    by_lambda.axvline(cv["best_lambda"], color="black", linestyle=":", label=f"best: {cv['best_lambda']:g}")
    by_lambda.axhline(cv["shuffled_r2"], color="grey", linestyle="--", label="shuffled pairs, best case")
    unit = "in units of the mean Gram diagonal" if cv["lambda_unit"] == "relative" else "absolute"
    by_lambda.set(xlabel=f"lambda ({unit})", ylabel="held-out R²", title="Cross-validation")
    by_lambda.legend(fontsize=8)

    r2 = sorted(cv["best_r2_per_dimension"], reverse=True)
    by_dimension.plot(r2, color=COLOURS["ridge_mapped"])
    by_dimension.axhline(0, color="grey", linewidth=0.8)
    pooled, median = cv["best_r2"], cv["best_r2_median_dimension"]
    by_dimension.set(
        xlabel="target dimensions, best predicted first",
        ylabel="held-out R²",
        ylim=(max(-0.5, min(0, min(r2))), 1),
        title=f"By dimension: pooled {pooled:.2f}, median {median:.2f}",
    )

    spectrum.semilogy(analysis["singular_values"], color=COLOURS["ridge_mapped"])
    spectrum.axvline(analysis["effective_rank"], color="black", linestyle=":")
    spectrum.set(
        xlabel="index",
        ylabel="singular value of W",
        title=f"Spectrum: rank {analysis['effective_rank']} over 1 % of the largest, df {analysis['df']:.0f}",
    )
    for axes in (by_lambda, by_dimension, spectrum):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(10)
    return figure


def choose_axes(table: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the metrics for coherence and trait: the judge's if there are any, else our own."""
    judged = any(entry["gpt4_coherence_score"]["n"] for entry in table)
    if judged:
        return "gpt4_coherence_score", "gpt4_trait_score"
    independent = any(entry["independent_perplexity"]["n"] for entry in table)
    return "independent_perplexity" if independent else "perplexity", "trait_probability"


def coherence_trait_figure(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel a persona: coherence (better to the right) against trait strength (stronger up).

    table: what `evaluation.aggregate` returns. A line joins a condition's alphas, the largest
    drawn largest. Bars are one standard error of the mean. Without a judge, coherence is the
    median perplexity on a reversed logarithmic axis.
    """
    coherence, trait = choose_axes(table)
    personas = list(dict.fromkeys(entry["persona"] for entry in table))
    figure = Figure(figsize=(4.4 * len(personas) + 1.2, 4.2), layout="constrained")
    panels = figure.subplots(1, len(personas), squeeze=False)[0]
    for panel, persona in zip(panels, personas, strict=True):
        entries = [entry for entry in table if entry["persona"] == persona]
        _draw_persona(panel, entries, coherence, trait)
        auc = entries[0]["classifier_auc"]
        note = f" (classifier AUC {auc:.3f})" if trait == "trait_probability" and auc is not None else ""
        panel.set_title(f"{persona}{note}", fontsize=10)
    judged = coherence == "gpt4_coherence_score"
    label = "coherence, judged 1 to 5" if judged else f"median {coherence.replace('_', ' ')} (fluent →)"
    figure.supxlabel(label, fontsize=10)
    panels[0].set_ylabel("trait strength, judged 1 to 5" if judged else "trait probability, mean ± s.e.")
    drawn = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        drawn = dict(zip(labels, handles, strict=True)) | drawn
    if drawn:
        order = [condition for condition in COLOURS if condition in drawn]
        figure.legend([drawn[name] for name in order], order, loc="outside right upper", fontsize=8)
    return figure


def _draw_persona(panel: Axes, entries: list[Mapping[str, Any]], coherence: str, trait: str) -> None:
    perplexity = coherence.endswith("perplexity")
    if perplexity:
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.xaxis.set_major_formatter(ticker.ScalarFormatter())
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    for condition in dict.fromkeys(entry["condition"] for entry in entries):
        points = sorted(
            (entry for entry in entries if entry["condition"] == condition),
            key=lambda entry: entry["alpha"] or 0,
        )
        points = [entry for entry in points if entry[coherence]["n"] and entry[trait]["n"]]
        if not points:
            continue
        x = [entry[coherence]["median" if perplexity else "mean"] for entry in points]
        y = [entry[trait]["mean"] for entry in points]
        error = [(entry[trait]["std"] or 0) / entry[trait]["n"] ** 0.5 for entry in points]
        style = {"color": COLOURS[condition], "marker": MARKERS[condition]}
        panel.errorbar(x, y, yerr=error, **style, markersize=5, linewidth=1, capsize=2, label=condition)
        panel.plot(x[-1], y[-1], color=COLOURS[condition], marker=MARKERS[condition], markersize=10)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Check that both figures are drawn from made-up numbers and keep their fingerprint."""
    cv = {
        "lambda_values": [0.1, 1.0],
        "r2": {0.1: 0.4, 1.0: 0.5},
        "best_lambda": 1.0,
        "lambda_unit": "relative",
        "shuffled_r2": -0.01,
        "best_r2": 0.5,
        "best_r2_median_dimension": 0.45,
        "best_r2_per_dimension": [0.1, 0.5, 0.7],
    }
    analysis = {"singular_values": [3.0, 2.0, 0.1], "effective_rank": 3, "df": 2.5}
    number = {"mean": 0.5, "median": 20.0, "std": 0.1, "n": 10, "missing": 0}
    absent = {"mean": None, "median": None, "std": None, "n": 0, "missing": 10}
    metrics = {"independent_perplexity": number, "perplexity": number, "trait_probability": number}
    judged = {"gpt4_coherence_score": absent, "gpt4_trait_score": absent, "classifier_auc": 0.97}
    table = [
        {"condition": condition, "persona": "check", "alpha": 1.0, **metrics, **judged}
        for condition in COLOURS
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in (("a", mapping_figure(analysis, cv)), ("b", coherence_trait_figure(table))):
            path = Path(folder) / f"{name}.png"
            save_figure(figure, path, "check")
            assert figure_fingerprint(path) == "check"
            assert path.stat().st_size > 10_000
    print("figures OK: both figures are drawn and carry their fingerprint")


if __name__ == "__main__":
    main()

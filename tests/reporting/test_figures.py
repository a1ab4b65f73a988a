import math
import warnings
from typing import get_args

import matplotlib.figure
import numpy as np
import pytest
import torch
from scipy import stats

from analysis.alpha_search import CoherenceBound, DevelopmentText, alphas_content, search_alphas
from baseline_methods import METHODS
from evaluation import METRICS, aggregate
from maps.comparison_maps import ComparisonMap, maps_table
from reporting.figures import (
    COLOURS,
    MARKERS,
    alpha_search_figure,
    choose_axes,
    coherence_trait_figure,
    effect_perplexity_figure,
    figure_fingerprint,
    layer_search_figure,
    mapping_figure,
    off_target_figure,
    recovery_figure,
    save_figure,
)
from ridge_mapping import RidgeMapping
from support.vocabulary import Method

ALPHAS = (0.5, 2.0)


def rows(persona, auc=0.97, **fixed):
    """Three texts a condition and alpha; every number differs between conditions and alphas."""
    generator = np.random.default_rng(0)
    cells = [("baseline", None), *((method, alpha) for method in METHODS for alpha in reversed(ALPHAS))]
    made = []
    for condition, alpha in cells:
        for _ in range(3):
            values = {metric: float(generator.uniform(0.1, 0.9)) for metric in METRICS}
            values |= {"perplexity": values["perplexity"] * 100, **fixed}
            values |= {"gpt4_coherence_score": None, "gpt4_trait_score": None, **fixed}
            made.append(
                {"condition": condition, "persona": persona, "alpha": alpha, "classifier_auc": auc, **values}
            )
    return made


def points(panel):
    """Return label -> (x, y) of the lines of a panel."""
    return {
        container.get_label(): container.lines[0].get_data()
        for container in panel.containers
        if container.get_label()
    }


@pytest.fixture(scope="module")
def mapping():
    source = torch.randn(120, 10, generator=torch.Generator().manual_seed(0))
    target = source @ torch.randn(10, 14, generator=torch.Generator().manual_seed(1))
    fitted = RidgeMapping(10, 14, "relative")
    fitted.cross_validate(source, target + 0.1, [0.01, 0.1, 1.0])
    return fitted


@pytest.fixture(scope="module")
def maps(mapping):
    return maps_table(
        mapping,
        [ComparisonMap.from_statistics("reduced_rank", mapping.statistics).cross_validate_from(mapping)],
    )


def test_every_condition_has_its_own_colour_and_marker():
    assert set(COLOURS) == set(MARKERS) == set(get_args(Method)) | {"baseline"}
    assert len(set(COLOURS.values())) == len(set(MARKERS.values())) == len(COLOURS)


def test_points_are_the_aggregated_numbers_with_the_largest_alpha_last():
    table = aggregate(rows("loud", independent_perplexity=None))
    (panel,) = coherence_trait_figure(table).axes
    drawn = points(panel)
    assert set(drawn) == {"baseline", *METHODS}
    entries = {(entry["condition"], entry["alpha"]): entry for entry in table}
    for condition, (x, y) in drawn.items():
        alphas = [None] if condition == "baseline" else ALPHAS
        wanted = [entries[condition, alpha] for alpha in alphas]
        assert list(x) == [entry["perplexity"]["median"] for entry in wanted]
        assert list(y) == [entry["trait_probability"]["mean"] for entry in wanted]


def test_fluent_text_is_to_the_right():
    (panel,) = coherence_trait_figure(aggregate(rows("loud"))).axes
    left, right = panel.get_xlim()
    assert left > right
    assert panel.get_xscale() == "log"


def test_error_bars_are_the_interval_of_the_mean():
    table = aggregate(rows("loud"))
    (panel,) = coherence_trait_figure(table).axes
    entry = next(entry for entry in table if entry["condition"] == "baseline")
    (container,) = (item for item in panel.containers if item.get_label() == "baseline")
    (segment,) = container.lines[2][0].get_segments()
    half = (segment[1][1] - segment[0][1]) / 2
    assert half == pytest.approx(entry["trait_probability"]["std"] / 3**0.5 * stats.t.ppf(0.975, 2))
    assert segment[0][1] == pytest.approx(entry["trait_probability"]["low"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_rows", [3, None])
def test_a_logarithmic_axis_around_one_point_is_drawn_without_a_warning(n_rows, tmp_path):
    table = aggregate(rows("loud", independent_perplexity=15.485344491674127)[:n_rows])
    save_figure(coherence_trait_figure(table), tmp_path / "figure1.png", "x")
    assert figure_fingerprint(tmp_path / "figure1.png") == "x"


def test_panels_share_their_axes_and_mark_the_unsteered_text():
    table = aggregate(rows("loud") + rows("calm", perplexity=7.0))
    panels = coherence_trait_figure(table).axes
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert panels[0].get_ylim() == panels[1].get_ylim()
    for panel in panels:
        x, y = points(panel)["baseline"]
        dotted = [line for line in panel.lines if line.get_linestyle() == ":"]
        assert [list(dotted[0].get_xdata()), list(dotted[1].get_ydata())] == [[x[0]] * 2, [y[0]] * 2]


@pytest.mark.parametrize(
    ("alphas", "title"), [((0.5, 2.0), "α 0.5, 2"), ((0.5, 3.0), "α\nloud 0.5, 2\ncalm 0.5, 3")]
)
def test_legend_says_the_strengths(alphas, title):
    calm = [{**row, "alpha": alphas[1] if row["alpha"] == 2.0 else row["alpha"]} for row in rows("calm")]
    figure = coherence_trait_figure(aggregate(rows("loud") + calm))
    assert figure.legends[0].get_title().get_text() == title


def test_each_persona_has_a_panel_with_its_auc():
    figure = coherence_trait_figure(aggregate(rows("loud") + rows("calm", auc=0.912)))
    assert [panel.get_title() for panel in figure.axes] == [
        "loud (classifier AUC 0.970)",
        "calm (classifier AUC 0.912)",
    ]


@pytest.mark.parametrize(
    ("fixed", "axes"),
    [
        ({}, ("independent_perplexity", "trait_probability")),
        ({"independent_perplexity": None}, ("perplexity", "trait_probability")),
        (
            {"gpt4_coherence_score": 4.0, "gpt4_trait_score": 2.0},
            ("gpt4_coherence_score", "gpt4_trait_score"),
        ),
    ],
    ids=["independent", "own", "judged"],
)
def test_axes_are_the_best_metrics_that_exist(fixed, axes):
    table = aggregate(rows("loud", **fixed))
    assert choose_axes(table) == axes
    (panel,) = coherence_trait_figure(table).axes
    x, y = points(panel)["baseline"]
    entry = table[0]
    statistic = "median" if axes[0].endswith("perplexity") else "mean"
    assert (x[0], y[0]) == (entry[axes[0]][statistic], entry[axes[1]]["mean"])


@pytest.mark.parametrize("order", [("loud", "bare"), ("bare", "loud")])
def test_legend_names_every_condition_that_is_drawn(order):
    made = {"loud": rows("loud"), "bare": rows("bare", auc=None, trait_probability=None)}
    figure = coherence_trait_figure(aggregate(made[order[0]] + made[order[1]]))
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"baseline", *METHODS}


def test_figure_without_any_score_can_still_be_saved(tmp_path):
    table = aggregate(rows("bare", auc=None, trait_probability=None))
    save_figure(coherence_trait_figure(table), tmp_path / "figure.png", "made")
    assert figure_fingerprint(tmp_path / "figure.png") == "made"


def test_harm_figure_joins_a_conditions_doses_and_draws_the_strongest_largest():
    def point(alpha, perplexity_ratio, effect):
        return {
            "alpha": alpha,
            "perplexity_ratio": perplexity_ratio,
            "effect": effect,
            "low": effect - 0.1,
            "high": effect + 0.1,
        }

    curves = {
        "loud": {"oracle": [point(1, 1.2, 0.3), point(2, 3.0, 0.5)]},
        "calm": {"oracle": [point(1, 1.1, 0.0), point(2, 2.0, -0.2)]},
    }
    panels = effect_perplexity_figure(curves).axes
    assert [panel.get_title() for panel in panels] == ["loud", "calm"]
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert panels[0].get_xscale() == "log"
    (joined,) = [line for line in panels[0].lines if len(line.get_xdata()) == 2 and line.get_marker() == "D"]
    assert list(zip(joined.get_xdata(), joined.get_ydata(), strict=True)) == [(1.2, 0.3), (3.0, 0.5)]
    (largest,) = [line for line in panels[0].lines if line.get_markersize() == 9]
    assert (largest.get_xdata()[0], largest.get_ydata()[0]) == (3.0, 0.5)


def test_mapping_figure_draws_what_was_cross_validated(mapping, maps):
    cv, analysis = mapping.cv, mapping.analyze()
    by_lambda, df, by_dimension, by_component, spectrum, compared = mapping_figure(analysis, cv, maps).axes
    assert list(by_lambda.lines[0].get_ydata()) == list(cv["r2"].values())
    assert list(by_lambda.lines[1].get_ydata()) == list(cv["r2_standardised"].values())
    assert list(df.lines[0].get_ydata()) == list(cv["df"].values())
    assert list(by_dimension.lines[0].get_ydata()) == sorted(cv["best_r2_per_dimension"], reverse=True)
    assert list(by_component.lines[0].get_ydata()) == cv["best_r2_per_component"]
    assert by_component.lines[1].get_ydata()[-1] == pytest.approx(1)
    assert list(spectrum.lines[0].get_ydata()) == analysis["singular_values"]
    assert [bar.get_height() for bar in compared.containers[0]] == [row["r2"] for row in maps]


def test_layer_search_figure_marks_the_best_pair():
    table = [[0.1, 0.2, 0.3], [0.4, 0.9, 0.5]]
    search = {"source_layers": [3, 5], "target_layers": [2, 4, 6], "best": [5, 4], "score": table}
    search |= {"r2_standardised": table, "agreement": {"a": table, "b": [[0.3] * 3, [0.5] * 3]}}
    panels = layer_search_figure(search).axes[:3]
    assert [panel.lines[0].get_xydata().tolist() for panel in panels] == [[[1, 1]]] * 3
    assert panels[1].images[0].get_array()[1, 1] == pytest.approx(0.7)
    assert "0.90 at 5 → 4" in panels[2].get_title()


def decided(verdict, estimate, low, high, is_validated=True):
    ratio = {"estimate": estimate, "low": low, "high": high}
    return {"verdict": verdict, "scorers": {"classifier": {"is_validated": is_validated, "recovery": ratio}}}


def test_recovery_figure_draws_an_interval_for_each_persona_that_has_one():
    found = {
        "loud": decided("transferred", 0.8, 0.6, 1.1),
        "calm": decided("inconclusive", 0.8, -math.inf, math.inf),
        "shy": {"verdict": "native steering ineffective", "scorers": {"classifier": {"is_validated": True}}},
    }
    (panel,) = recovery_figure(found).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "loud: transferred",
        "calm: can't tell",
        "shy: steering itself failed",
    ]
    (bar,) = panel.containers
    assert bar[0].get_xydata().tolist() == [[0.8, 0.0]]
    (segment,) = bar[2][0].get_segments()
    assert segment[:, 0].tolist() == pytest.approx([0.6, 1.1])


def test_off_target_figure_shows_who_is_steered_for_and_scored_as():
    matrix = {"oracle": {"loud": {"loud": 0.5, "calm": -0.25}, "calm": {"loud": 0.0, "calm": 0.75}}}
    panel = off_target_figure(matrix).axes[0]
    assert panel.images[0].get_array().tolist() == [[0.5, -0.25], [0.0, 0.75]]
    assert [text.get_text() for text in panel.texts] == ["+0.50", "-0.25", "+0.00", "+0.75"]


NAMES = [
    "$x_1$ costs $5",
    "_hidden",
    r"\alpha|",
    r"\$",
    "快乐的人 \U0001f3f4",
    "W" * 100,
    "two words " * 10,
    "{0} %s",
]


def texts(artists):
    """Return the texts as they are drawn, which are no formulas."""
    assert not any(artist._preprocess_math(artist.get_text())[1] for artist in artists)
    return [artist._preprocess_math(artist.get_text())[0] for artist in artists]


def test_any_name_is_drawn_as_it_is(tmp_path, caplog):
    made = [row for name in NAMES for row in rows(name)]
    figures = [
        coherence_trait_figure(aggregate(made)),
        recovery_figure({name: decided("transferred", 0.8, 0.6, 1.1) for name in NAMES}),
        off_target_figure({"oracle": {name: dict.fromkeys(NAMES, 0.5) for name in NAMES}}),
        alpha_search_figure(searched_alphas(lambda method, alpha: 1 + alpha / 9, personas=NAMES)),
    ]
    recovered, matrix = figures[1].axes[0], figures[2].axes[0]
    for found in (
        [text.partition(" (")[0] for text in texts([panel.title for panel in figures[0].axes])],
        [text.rpartition(":")[0] for text in texts(recovered.get_yticklabels())],
        texts(matrix.get_xticklabels()),
        texts(matrix.get_yticklabels()),
        texts([panel.title for panel in figures[3].axes]),
    ):
        joined = ["".join(text.split()) for text in found]
        assert joined == ["".join(name.split()) for name in NAMES]
        assert max(len(line) for text in found for line in text.split("\n")) <= 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, figure in enumerate(figures):
            save_figure(figure, tmp_path / f"{number}.png", "made")
    assert [record.message for record in caplog.records] == [
        f"{number}.png: the font lacks 5 characters, drawn as boxes" for number in range(4)
    ]


def searched_alphas(ratio, personas=("loud", "calm"), methods=("oracle", "zero_pad"), bracket=(0.5, 10.0)):
    """What a search gives where perplexity is `ratio(method, alpha)` times the unsteered; None is missing."""

    def measure(asked):
        found = [(ratio(method, alpha), alpha) for (_, method), alpha in asked]
        return [[DevelopmentText(value and 20 * value, 0.1 if alpha < 6 else 0.9)] for value, alpha in found]

    conditions = [(persona, method) for persona in personas for method in methods]
    bound = CoherenceBound(max_perplexity_ratio=1.75)
    return alphas_content(
        search_alphas(conditions, measure, [DevelopmentText(20.0, 0.1)], bracket, bound), bound
    )


def curves(panel):
    """Return method -> (x, y) of the lines of a panel of alphas."""
    return {line.get_label(): line.get_data() for line in panel.lines if line.get_label() in COLOURS}


def markers(panel):
    """Return (colour, alpha) -> the marker's size and opacity in a panel of alphas."""
    found = [line for line in panel.lines if line.get_marker() != "None"]
    return {
        (line.get_color(), line.get_xdata()[0]): (line.get_markersize(), line.get_alpha()) for line in found
    }


def test_dose_figure_draws_every_measured_point_and_the_bound():
    content = searched_alphas(lambda method, alpha: 1 + alpha / (4 if method == "oracle" else 2))
    panels = alpha_search_figure(content).axes
    assert [panel.get_title() for panel in panels] == ["loud", "calm"]
    for panel in panels:
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        (line,) = (line for line in panel.lines if line.get_label() == "bound: 1.75")
        assert set(line.get_ydata()) == {1.75}
        entries = [entry for entry in content["alphas"] if entry["persona"] == panel.get_title()]
        drawn = curves(panel)
        assert set(drawn) == {"oracle", "zero_pad"}
        for entry in entries:
            x, y = drawn[entry["method"]]
            assert list(x) == [point["alpha"] for point in entry["curve"]]
            assert list(y) == [point["perplexity_ratio"] for point in entry["curve"]]


def test_dose_figure_marks_the_chosen_dose_and_fades_what_is_over_a_bound():
    content = searched_alphas(lambda method, alpha: 1.1 if method == "oracle" else 1 + alpha / 2)
    for panel in alpha_search_figure(content).axes:
        found = markers(panel)
        for entry in content["alphas"][:2]:
            for point in entry["curve"]:
                size, opacity = found[COLOURS[entry["method"]], point["alpha"]]
                assert (size > 5) == (point["alpha"] == entry["alpha"])
                assert (opacity == 1) == point["is_coherent"]
    repetitive = [point for point in content["alphas"][0]["curve"] if not point["is_coherent"]]
    assert repetitive
    assert all(point["perplexity_ratio"] < 1.75 for point in repetitive)


def test_dose_figure_leaves_out_points_without_a_ratio():
    content = searched_alphas(lambda method, alpha: None if method == "zero_pad" or alpha > 4 else 1.2)
    figure = alpha_search_figure(content)
    for panel in figure.axes:
        ((x, _),) = curves(panel).values()
        assert len(x) < len(content["alphas"][0]["curve"])
        assert max(x) <= 4
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["oracle", "bound: 1.75"]


def test_dose_figure_names_every_method_once_in_the_order_of_the_colours():
    methods = [name for name in reversed(COLOURS) if name != "baseline"]
    (legend,) = alpha_search_figure(
        searched_alphas(lambda method, alpha: 1 + alpha / 9, methods=methods)
    ).legends
    assert [text.get_text() for text in legend.get_texts()] == [*reversed(methods), "bound: 1.75"]


@pytest.mark.parametrize(
    ("ratio", "bracket"),
    [
        (lambda method, alpha: 1 + alpha / 9, (1.0, 1.2)),
        (lambda method, alpha: 1 + alpha / 9, (0.5, 10.0)),
        (lambda method, alpha: 1 + alpha**3, (1e-3, 1e3)),
        (lambda method, alpha: 1 + alpha**9, (0.5, 1000.0)),
        (lambda method, alpha: 0.01, (0.5, 5.0)),
        (lambda method, alpha: None, (0.5, 10.0)),
    ],
    ids=["narrow", "usual", "wide", "far over the bound", "far below", "nothing to draw"],
)
def test_dose_figure_has_a_few_plain_numbers_on_its_axes(ratio, bracket, tmp_path):
    figure = alpha_search_figure(searched_alphas(ratio, bracket=bracket))
    save_figure(figure, tmp_path / "figure.png", "made")
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [value for value in axis.get_majorticklocs() if low <= value <= high]
            assert 2 <= len(ticks) <= 12
            labels = [axis.get_major_formatter()(value) for value in ticks]
            assert [float(label) for label in labels] == pytest.approx(ticks, rel=1e-5)
            assert max(len(label) for label in labels) <= 6


def test_saved_figure_carries_its_fingerprint_and_leaves_nothing_beside_it(mapping, maps, tmp_path):
    path = tmp_path / "figure.png"
    for fingerprint in ("first", "second"):
        save_figure(mapping_figure(mapping.analyze(), mapping.cv, maps), path, fingerprint)
        assert figure_fingerprint(path) == fingerprint
    assert [item.name for item in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.95])
def test_damaged_figure_has_no_fingerprint(kept, mapping, maps, tmp_path):
    path = tmp_path / "figure.png"
    assert figure_fingerprint(path) is None
    save_figure(mapping_figure(mapping.analyze(), mapping.cv, maps), path, "made")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    assert figure_fingerprint(path) is None


def test_figure_without_fingerprint_has_none(tmp_path):
    matplotlib.figure.Figure().savefig(tmp_path / "other.png")
    assert figure_fingerprint(tmp_path / "other.png") is None

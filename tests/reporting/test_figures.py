"""Figures draw the numbers that they are given, under any name, and a saved one keeps its fingerprint."""

import matplotlib.figure
import numpy as np
import pytest
import torch
from made_up_scores import COMPARED, VALIDATED, scored_run

from analysis.results_table import results_table
from analysis.strength_curve import MULTIPLES
from analysis.verdict import decide_verdicts
from evaluation import METRICS, aggregate
from experiment.conditions import CONDITIONS, LEXICAL_CONTROLS, label_of
from reporting.figures_ablations import block_ablation_figure, sample_ablation_figure
from reporting.figures_headline import headline_figure
from reporting.figures_mapping import layer_search_figure, mapping_figure
from reporting.figures_results import (
    choose_axes,
    coherence_trait_figure,
    off_target_figure,
    strength_curve_figure,
)
from reporting.style import figure_fingerprint, save_figure
from ridge_mapping import RidgeMapping

ALPHAS = (0.5, 2.0)
STEERED = ("zero_pad", "ridge_mapped", "oracle")
JUDGED = {"gpt4_coherence_score": 4.0, "gpt4_trait_score": 2.0}


def rows(persona, auc=0.97, alphas=ALPHAS, **fixed):
    """Three texts a condition and alpha; every number differs between conditions and alphas."""
    generator, made = np.random.default_rng(0), []
    for condition, alpha in [("baseline", None), *((name, a) for name in STEERED for a in reversed(alphas))]:
        for _ in range(3):
            row = {name: float(generator.uniform(0.1, 0.9)) for name in (*METRICS, "trait_probability")}
            row |= {"perplexity": 100 * row["perplexity"], **dict.fromkeys(JUDGED), **fixed}
            row |= {"condition": condition, "persona": persona, "alpha": alpha, "classifier_auc": auc}
            made.append(row)
    return made


def points(panel):
    """Return label -> (x, y) of the lines with error bars of a panel."""
    return {container.get_label(): container.lines[0].get_data() for container in panel.containers}


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def labels(conditions):
    return [CONDITIONS[name].label for name in CONDITIONS if name in conditions]


@pytest.mark.parametrize(
    ("fixed", "axes"),
    [
        ({}, ("independent_perplexity", "trait_probability")),
        ({"independent_perplexity": None}, ("perplexity", "trait_probability")),
        (JUDGED, tuple(JUDGED)),
    ],
    ids=["independent", "own", "judged"],
)
def test_points_are_the_aggregated_numbers_on_the_best_axes_that_exist(fixed, axes):
    table = aggregate(rows("loud", **fixed))
    assert choose_axes(table) == axes
    (panel,) = coherence_trait_figure(table).axes
    drawn = points(panel)
    assert set(drawn) == {"baseline", *STEERED}
    for condition, (x, y) in drawn.items():
        entries = [entry for entry in table if entry["condition"] == condition]
        entries.sort(key=lambda entry: entry["alpha"] or 0)
        assert list(x) == [entry[axes[0]]["mean"] for entry in entries]
        assert list(y) == [entry[axes[1]]["mean"] for entry in entries]
    left, right = panel.get_xlim()
    assert (left > right) == axes[0].endswith("perplexity")  # fluent text is to the right
    if fixed is JUDGED:
        assert panel.get_xlim() == panel.get_ylim() == pytest.approx((1, 5), abs=0.1)
    unsteered, entry = panel.containers[0].lines[2][0].get_segments()[0], table[0][axes[1]]
    assert unsteered[:, 1].tolist() == pytest.approx([entry["low"], entry["high"]])


EQUAL = {"independent_perplexity": 15.485344491674127}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("n_rows", "fixed"),
    [(3, EQUAL), (None, EQUAL), (None, {"auc": None, "trait_probability": None})],
    ids=["one point", "equal perplexities", "no score"],
)
def test_a_figure_of_little_is_drawn_without_a_warning(n_rows, fixed, tmp_path):
    figure = coherence_trait_figure(aggregate(rows("loud", **fixed)[:n_rows]))
    save_figure(figure, tmp_path / "figure1.png", "x")
    assert figure_fingerprint(tmp_path / "figure1.png") == "x"


def test_panels_share_their_axes_and_mark_the_unsteered_text():
    figure = coherence_trait_figure(aggregate(rows("loud") + rows("calm", auc=0.912, perplexity=7.0)))
    assert [panel.get_title() for panel in figure.axes] == ["loud (α 0.5, 2)", "calm (α 0.5, 2)"]
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in figure.axes}) == 1
    for panel in figure.axes:
        x, y = points(panel)["baseline"]
        dotted = [line for line in panel.lines if line.get_linestyle() == ":"]
        assert [list(dotted[0].get_xdata()), list(dotted[1].get_ydata())] == [[x[0]] * 2, [y[0]] * 2]


def test_legend_names_what_is_drawn_and_titles_the_strengths():
    calm = rows("calm", alphas=(1, 2, 3, 4, 5.25), trait_probability=None)
    figure = coherence_trait_figure(aggregate(rows("loud") + calm))
    assert legend_of(figure) == labels({"baseline", *STEERED})
    assert [panel.get_title() for panel in figure.axes] == ["loud (α 0.5, 2)", "calm (α 1 to 5.25)"]


EFFECTS = {"oracle": 0.5, "ridge_mapped": 0.4, "first_block": 0.2, "embedding_source": 0.3}


def strengths(ratio, effects=EFFECTS):
    """What vectors do over strengths, of which perplexity is `ratio(alpha)` times the unsteered."""

    def points(effect):
        ends = {"low": 0.0, "high": 1.0}
        return [{**ends, "perplexity_ratio": ratio(2 * each), "effect": effect * each} for each in MULTIPLES]

    return {"vectors": {name: {"points": points(effect)} for name, effect in effects.items()}}


def test_strengths_are_drawn_from_the_unsteered_text_with_the_compared_ones_circled():
    effects = EFFECTS
    figure = strength_curve_figure({"loud": strengths(lambda alpha: 1.5)})
    drawn = ["oracle", "ridge_mapped", "embedding_source"]  # of the lexical controls, the stronger
    assert legend_of(figure) == [*labels(drawn), "at the verdict's α"]
    (panel,) = figure.axes
    for container, name in zip(panel.containers, drawn, strict=True):
        lines = container.lines[0].get_xydata().tolist()
        assert lines[0] == [1, 0]
        assert [y for _, y in lines[1:]] == [effects[name] * each for each in MULTIPLES]
    circles = [line for line in panel.lines if line.get_fillstyle() == "none"]
    assert [line.get_xydata().tolist() for line in circles] == [[[1.5, effects[name]]] for name in drawn]


def test_mapping_figure_draws_what_was_cross_validated():
    source = torch.randn(120, 10, generator=torch.Generator().manual_seed(0))
    target = source @ torch.randn(10, 14, generator=torch.Generator().manual_seed(1))
    mapping = RidgeMapping(10, 14, "relative")
    mapping.cross_validate(source, target + 0.1, [0.01, 0.1, 1.0])
    cv, analysis = mapping.cv, mapping.analyze()
    r2, spectrum = mapping_figure(analysis, cv).axes
    lines = [list(line.get_ydata()) for line in r2.lines[:3]]
    shuffled = [cv["shuffled_r2"]] * 2
    assert lines == [list(cv["r2"].values()), list(cv["r2_standardised"].values()), shuffled]
    assert set(r2.lines[3].get_xdata()) == {cv["best_lambda"]}
    assert list(spectrum.lines[0].get_ydata()) == analysis["singular_values"]
    assert spectrum.get_title() == "10 of 10 singular values over 1 % of the largest"


def test_layer_search_figure_marks_the_best_pair():
    table = [[0.1, 0.2, 0.3], [0.4, 0.9, 0.5]]
    search = {"source_layers": [3, 5], "target_layers": [2, 4, 6], "best": [5, 4], "score": table}
    search |= {"r2_standardised": table, "agreement": {"a": table, "b": [[0.3] * 3, [0.5] * 3]}}
    panels = layer_search_figure(search).axes[:3]
    assert [panel.lines[0].get_xydata().tolist() for panel in panels] == [[[1, 1]]] * 3
    assert panels[1].images[0].get_array()[1, 1] == pytest.approx(0.7)
    assert "0.90 at 5 → 4" in panels[2].get_title()


def test_block_figure_leaves_incoherent_points_hollow():
    found = [
        {"persona": "loud", "method": "oracle", "target_layers": [0] * size, "trait_change": size / 10}
        | {"perplexity_ratio": 1.0 + size, "is_coherent": size < 3}
        for size in (1, 2, 3)
    ]
    trait, perplexity = block_ablation_figure(found).axes
    assert [list(line.get_ydata()) for line in trait.lines[1:]] == [[0.1, 0.2, 0.3], [0.3]]
    assert trait.lines[2].get_markerfacecolor() == "white"
    assert [label.get_text() for label in perplexity.get_xticklabels()] == ["1", "2", "all 3"]


def test_sample_figure_has_the_error_over_training_samples_for_both_kinds_of_maps():
    r2 = {("last", 30): 0.2, ("last", 90): 0.5, ("aligned", 30): 0.6, ("aligned", 90): 0.7}
    found = [
        {"positions": positions, "n_texts": n_texts, "n_pairs": 7 * n_texts}
        | {
            "held_out": {
                tested: {"r2": value, "r2_standardised": value / 2} for tested in ("last", "aligned")
            }
        }
        for (positions, n_texts), value in r2.items()
    ]
    for panel in sample_ablation_figure({"points": found}).axes:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["30", "90"]
        drawn = [line.get_xydata().tolist() for line in panel.lines[:4]]
        for points, errors in zip(drawn, ([0.8, 0.5], [0.9, 0.75], [0.4, 0.3], [0.7, 0.65]), strict=True):
            assert points == [pytest.approx(point) for point in zip((30, 90), errors, strict=True)]


def decided(names=("loud",), **validation):
    """Contents of verdicts that rest on a classifier, and their table. validation: of other scorers."""
    table = results_table([row for name in names for row in scored_run(0.5, 0.6, persona=name, judged=True)])
    found = {name: {"classifier": VALIDATED, **validation} for name in names}
    verdicts = decide_verdicts(table, dict.fromkeys(names, COMPARED), found)
    return {name: verdict.content() for name, verdict in verdicts.items()}, table


def test_headline_shows_the_first_texts_and_every_effect_of_the_deciding_scorer():
    found, table = decided(("loud", "calm"))
    found["calm"] = {**found["calm"], "decided_by": None}
    found["calm"]["scorers"]["classifier"]["is_validated"] = False
    left, right = headline_figure(found, table).axes
    written = [text.get_text() for text in left.texts]
    first = table[(table["prompt_idx"] == 0) & (table["persona"] == "loud")]
    assert [written[0], *written[4::2]] == list(map(label_of, ("baseline", "ridge_mapped", "oracle")))
    assert written[2] in map(label_of, LEXICAL_CONTROLS)
    assert written[1] in first.loc[first["condition"] == "baseline", "output"].tolist()
    said = [text.get_text() for text in right.texts]
    assert said == [f"{name}: {verdict['verdict']}" for name, verdict in found.items()]
    assert len(right.containers) == 4 * len(found)  # another control, a lexical one, mapped, native
    for row, verdict in enumerate(found.values()):
        scorer = verdict["scorers"]["classifier"]
        bars = right.containers[4 * row + 2 : 4 * row + 4]
        for bar, name in zip(bars, ("ridge_mapped", "oracle"), strict=True):
            effect, (ends,) = scorer["effects"][name], bar[2][0].get_segments()
            assert bar[0].get_xdata().tolist() == [effect["estimate"]]
            assert ends[:, 0].tolist() == pytest.approx([effect["low"], effect["high"]])
            assert (bar[0].get_markerfacecolor() == "white") is not scorer["is_validated"]


def test_headline_leaves_out_what_mapped_need_not_beat():
    found, table = decided()
    counted, fewer = (
        headline_figure(found, table, names).axes[1].containers
        for names in ((), ("shuffled_pairs", "other_persona", "random_direction"))
    )
    assert len(counted) == len(fewer) + 1


def test_off_target_figure_shows_who_is_steered_for_scored_as_and_the_difference():
    native = {"loud": {"loud": 0.5, "calm": -0.25}, "calm": {"loud": 0.0, "calm": 0.75}}
    figure = off_target_figure({"ridge_mapped": {"loud": {"loud": 0.25, "calm": -0.001}}, "oracle": native})
    mapped, oracle, difference, _ = figure.axes
    assert oracle.images[0].get_array().tolist() == [[0.5, -0.25], [0.0, 0.75]]
    shown = [[text.get_text() for text in panel.texts] for panel in (mapped, oracle, difference)]
    assert shown[0] == ["+0.25", "+0.00", "–", "–"]
    assert shown[1] == ["+0.50", "−0.25", "+0.00", "+0.75"]
    assert shown[2] == ["−0.25", "+0.25", "–", "–"]
    assert len(off_target_figure({"oracle": native}).axes) == 2  # the matrix and its colours


NAMES = ["$x_1$ costs $5", "_hidden", r"\alpha|", "快乐 \U0001f3f4", "W" * 100, "two words " * 10, "{0} %s"]


def texts(artists):
    """Return the texts as they are drawn, which are no formulas."""
    assert not any(artist._preprocess_math(artist.get_text())[1] for artist in artists)
    return [artist._preprocess_math(artist.get_text())[0] for artist in artists]


@pytest.mark.filterwarnings("error")
def test_any_name_is_drawn_as_it_is(tmp_path, caplog):
    figures = [
        coherence_trait_figure(aggregate([row for name in NAMES for row in rows(name)])),
        headline_figure(*decided(NAMES)),
        off_target_figure({"oracle": {name: dict.fromkeys(NAMES, 0.5) for name in NAMES}}),
        strength_curve_figure(dict.fromkeys(NAMES, strengths(lambda alpha: 1 + alpha / 9))),
    ]
    first, (_, effects), (matrix, _), last = (figure.axes for figure in figures)
    for found in (
        [text.partition(" (")[0] for text in texts([panel.title for panel in first])],
        [text.rpartition(":")[0] for text in texts(effects.texts)],
        texts(matrix.get_xticklabels()),
        texts(matrix.get_yticklabels()),
        texts([panel.title for panel in last]),
    ):
        assert ["".join(text.split()) for text in found] == ["".join(name.split()) for name in NAMES]
        assert max(len(line) for text in found for line in text.split("\n")) <= 40
    for number, figure in enumerate(figures):
        save_figure(figure, tmp_path / f"{number}.png", "made")
    assert len(caplog.records) == len(figures)  # one warning each, of the characters that the font lacks


@pytest.mark.parametrize(
    "ratio",
    [
        lambda alpha: 1 + alpha / 9,
        lambda alpha: 1.7 + alpha / 99,
        lambda alpha: 1 + alpha**9,
        lambda alpha: 0.01,
        lambda alpha: 1.0,
    ],
)
def test_logarithmic_axes_have_a_few_plain_numbers(ratio, tmp_path):
    figure = strength_curve_figure({"loud": strengths(ratio)})
    save_figure(figure, tmp_path / "figure.png", "made")
    for panel in figure.axes:
        low, high = sorted(panel.get_xlim())
        ticks = [value for value in panel.xaxis.get_majorticklocs() if low <= value <= high]
        assert 2 <= len(ticks) <= 12
        shown = [panel.xaxis.get_major_formatter()(value) for value in ticks]
        assert [float(label) for label in shown] == pytest.approx(ticks, rel=1e-5)
        assert max(len(label) for label in shown) <= 6


def test_a_saved_figure_carries_its_fingerprint_until_it_is_damaged(tmp_path):
    path = tmp_path / "figure.png"
    assert figure_fingerprint(path) is None
    for fingerprint in ("first", "second"):
        save_figure(off_target_figure({"oracle": {"loud": {"loud": 0.5}}}), path, fingerprint)
        assert figure_fingerprint(path) == fingerprint
    assert [item.name for item in tmp_path.iterdir()] == ["figure.png"]
    content = path.read_bytes()
    for kept in (0, 5, len(content) // 2, len(content) * 95 // 100):
        path.write_bytes(content[:kept])
        assert figure_fingerprint(path) is None
    matplotlib.figure.Figure().savefig(path)
    assert figure_fingerprint(path) is None

"""The dose is the strongest coherent alpha that was measured, and every reason against it is reported."""

import json
import math

import pytest

from analysis.alpha_search import (
    DEFAULT_BOUND,
    AlphaPoint,
    ChosenAlpha,
    CoherenceBound,
    DevelopmentText,
    alphas_content,
    alphas_from_content,
    format_alphas,
    search_alphas,
)
from support.artifacts import load_json, save_json
from support.errors import InputError

LOW, HIGH = BRACKET = (0.5, 10.0)
CONDITION = ("loud", "oracle")
UNSTEERED = [DevelopmentText(perplexity, 0.1) for perplexity in (8.0, 20.0, 45.0, 30.0)]


def times(ratio, repetition=0.1):
    """The unsteered texts at another perplexity."""
    return [DevelopmentText(text.perplexity * ratio, repetition) for text in UNSTEERED]


class Measure:
    """Texts by a rule (condition, alpha) -> texts; remembers what was asked in each round."""

    def __init__(self, rule):
        self.rule = rule
        self.rounds = []

    def __call__(self, asked):
        self.rounds.append(list(asked))
        return [self.rule(condition, alpha) for condition, alpha in asked]

    def alphas(self, condition):
        return [alpha for asked in self.rounds for name, alpha in asked if name == condition]


def coherent_where(rule):
    return Measure(lambda _, alpha: times(1.2 if rule(alpha) else 3.0))


def search(measure, unsteered=UNSTEERED, **settings):
    return search_alphas([CONDITION], measure, unsteered, BRACKET, **settings)[CONDITION]


def point_of(steered, unsteered=UNSTEERED, bound=DEFAULT_BOUND):
    """The point that these texts give at an alpha."""
    return search(lambda asked: [steered for _ in asked], unsteered, bound=bound, n_evaluations=2).curve[0]


def texts(perplexities, repetition=0.1):
    return [DevelopmentText(perplexity, repetition) for perplexity in perplexities]


@pytest.mark.parametrize("n_evaluations", [2, 3, 7, 8])
@pytest.mark.parametrize("place", [0.0, 0.001, 0.03, 0.2, 1 / 3, 0.5, 0.6, 0.77, 0.93, 0.99, 0.9999])
def test_dose_is_within_the_resolution_of_a_threshold_anywhere_in_the_bracket(place, n_evaluations):
    threshold = LOW * (HIGH / LOW) ** place
    dose = search(coherent_where(lambda alpha: alpha <= threshold), n_evaluations=n_evaluations)
    resolution = (HIGH / LOW) ** (1 / 2 ** (n_evaluations - 1))
    assert dose.is_coherent
    assert dose.alpha <= threshold < dose.alpha * resolution * (1 + 1e-9)
    assert dose.at == ("lowest" if dose.alpha == LOW else "inside")


@pytest.mark.parametrize("n_evaluations", [2, 5, 8])
def test_each_round_is_one_call_for_all_conditions_and_no_alpha_is_measured_twice(n_evaluations):
    thresholds = {("loud", "oracle"): 3.0, ("loud", "zero_pad"): 0.1, ("calm", "oracle"): 99.0}
    measure = Measure(lambda condition, alpha: times(1.0 if alpha <= thresholds[condition] else 2.0))
    alphas = search_alphas(list(thresholds), measure, UNSTEERED, BRACKET, n_evaluations=n_evaluations)
    assert [[condition for condition, _ in asked] for asked in measure.rounds] == (
        [list(thresholds)] * n_evaluations
    )
    for condition, dose in alphas.items():
        alphas = measure.alphas(condition)
        assert len(set(alphas)) == n_evaluations
        assert [point.alpha for point in dose.curve] == sorted(alphas)
        assert all(LOW <= alpha <= HIGH for alpha in alphas)


def test_a_condition_gets_the_dose_that_it_gets_alone():
    thresholds = {("loud", "oracle"): 3.0, ("loud", "zero_pad"): 0.1, ("calm", "oracle"): 99.0}
    measure = Measure(lambda condition, alpha: times(1.0 if alpha <= thresholds[condition] else 2.0))
    together = search_alphas(list(thresholds), measure, UNSTEERED, BRACKET)
    for condition in thresholds:
        assert search_alphas([condition], measure, UNSTEERED, BRACKET) == {condition: together[condition]}


def test_first_alpha_is_the_geometric_middle():
    measure = coherent_where(lambda alpha: True)
    search(measure)
    assert measure.alphas(CONDITION)[0] == pytest.approx(math.sqrt(LOW * HIGH))


@pytest.mark.parametrize("threshold", [HIGH, 11.0, 1e6])
def test_threshold_from_the_top_up_gives_the_top_itself(threshold):
    dose = search(coherent_where(lambda alpha: alpha <= threshold))
    assert (dose.alpha, dose.is_coherent, dose.at) == (HIGH, True, "highest")


@pytest.mark.parametrize("threshold", [0.499, 0.01, 0])
def test_threshold_below_the_bottom_gives_the_bottom_as_incoherent(threshold):
    dose = search(coherent_where(lambda alpha: alpha <= threshold))
    assert (dose.alpha, dose.is_coherent, dose.at) == (LOW, False, "lowest")
    assert not any(point.is_coherent for point in dose.curve)
    assert dose.point.reason == "perplexity"


@pytest.mark.parametrize("frequency", [3, 7, 20, 45])
@pytest.mark.parametrize("phase", [0.0, 1.5, 3.0, 4.5])
def test_dose_is_coherent_and_the_next_alpha_measured_is_not_where_coherence_comes_and_goes(frequency, phase):
    dose = search(coherent_where(lambda alpha: math.sin(frequency * math.log(alpha) + phase) > -0.5))
    alphas = [point.alpha for point in dose.curve]
    if dose.is_coherent:
        assert dose.point.is_coherent
        assert not any(point.is_coherent for point in dose.curve[alphas.index(dose.alpha) + 1 :])
        assert (dose.at == "highest") == (dose.alpha == alphas[-1])
    else:
        assert dose.alpha == LOW == alphas[0]


def test_alpha_incoherent_below_the_dose_does_not_lower_it():
    dose = search(coherent_where(lambda alpha: alpha <= 4.0 and not 0.6 < alpha < 1.0))
    assert dose.alpha == pytest.approx(4.0, rel=0.05)


def test_ratio_is_the_geometric_mean_of_pairs_where_medians_would_decide_otherwise():
    unsteered, steered = texts([4.0, 10.0, 100.0]), texts([16.0, 10.0, 100.0])
    point = point_of(steered, unsteered)
    assert point.perplexity_ratio == pytest.approx(4 ** (1 / 3))  # 1.587; the medians are equal
    assert (point.is_coherent, point.reason, point.n_pairs) == (False, "perplexity", 3)


def test_one_extreme_pair_does_not_decide_as_a_mean_of_ratios_would():
    point = point_of(texts([40.0, 5.0, 10.0]), texts([10.0] * 3))
    assert point.perplexity_ratio == pytest.approx(2 ** (1 / 3))  # the mean of ratios is 1.83
    assert point.is_coherent


def test_texts_are_compared_on_the_same_prompt_and_incomplete_pairs_are_left_out():
    unsteered = texts([10.0, 1000.0, None, *[10.0] * 9])
    point = point_of(texts([12.0, None, 5000.0, *[12.0] * 9]), unsteered)
    assert point.perplexity_ratio == pytest.approx(1.2)
    assert (point.n_pairs, point.n_missing, point.is_coherent) == (10, 1, True)


@pytest.mark.parametrize(
    ("n_missing_before", "n_missing", "is_coherent"),
    [(0, 0, True), (0, 3, True), (0, 4, False), (2, 5, True), (2, 6, False), (15, 0, True)],
)
def test_more_missing_texts_than_the_bound_are_incoherent(n_missing_before, n_missing, is_coherent):
    unsteered = texts([None] * n_missing_before + [10.0] * (30 - n_missing_before))
    point = point_of(texts([None] * n_missing + [10.0] * (30 - n_missing)), unsteered)
    assert point.n_missing == n_missing
    assert point.is_coherent is is_coherent
    assert point.reason == (None if is_coherent else "texts missing")


def test_empty_texts_are_incoherent_and_have_no_ratio():
    point = point_of([DevelopmentText(None, None)] * 4)
    assert (point.perplexity_ratio, point.repetition_increase, point.n_pairs) == (None, None, 0)
    assert point.reason == "texts missing, no perplexity to compare, no repetition to compare"


def test_pairs_that_never_meet_are_incoherent_although_no_more_texts_are_missing():
    point = point_of(texts([None, 10.0]), texts([10.0, None]))
    assert (point.perplexity_ratio, point.reason) == (None, "no perplexity to compare")


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("before", [10.0, None])
def test_one_text_of_no_finite_perplexity_is_incoherent_however_fluent_the_others(value, before):
    point = point_of(texts([value, *[10.0] * 99]), texts([before, *[10.0] * 99]))
    assert (point.perplexity_ratio, point.n_pairs, point.n_missing) == (pytest.approx(1), 99, 1)
    assert (point.is_coherent, point.reason) == (False, "perplexity not finite")


def test_prompt_whose_unsteered_text_is_not_finite_either_is_not_held_against_the_dose():
    point = point_of(texts([math.inf, 10.0, 10.0]), texts([math.inf, 10.0, 10.0]))
    assert (point.is_coherent, point.n_pairs, point.n_missing) == (True, 2, 1)


@pytest.mark.parametrize(
    ("increase", "is_coherent"), [(0.0, True), (0.04, True), (0.06, False), (-0.1, True)]
)
def test_repetition_alone_decides_where_perplexity_falls(increase, is_coherent):
    point = point_of(times(0.5, 0.1 + increase))
    assert point.repetition_increase == pytest.approx(increase)
    assert point.is_coherent is is_coherent
    assert point.reason == (None if is_coherent else "repetition")


def test_dose_is_found_by_repetition_alone():
    dose = search(Measure(lambda _, alpha: times(0.9, 0.1 if alpha <= 2.0 else 0.6)))
    assert dose.alpha == pytest.approx(2.0, rel=0.05)
    assert {point.reason for point in dose.curve if not point.is_coherent} == {"repetition"}


def test_repetition_is_compared_over_texts_that_have_both_rates():
    unsteered = [DevelopmentText(10.0, rate) for rate in (0.1, None, 0.9)]
    point = point_of([DevelopmentText(10.0, rate) for rate in (0.12, 0.8, None)], unsteered)
    assert point.repetition_increase == pytest.approx(0.02)
    assert point.is_coherent


def test_texts_too_short_for_repetition_are_incoherent():
    point = point_of(texts([10.0] * 4, None))
    assert (point.repetition_increase, point.reason) == (None, "no repetition to compare")


def test_every_bound_that_failed_is_named():
    assert point_of(times(2.0, 0.5)).reason == "perplexity, repetition"


@pytest.mark.parametrize(
    ("bound", "is_coherent"),
    [
        (CoherenceBound(), False),
        (CoherenceBound(max_perplexity_ratio=2.5, max_repetition_increase=0.3), True),
        (CoherenceBound(max_perplexity_ratio=2.5), False),
        (CoherenceBound(max_repetition_increase=0.3), False),
    ],
)
def test_bounds_are_those_given(bound, is_coherent):
    assert point_of(times(2.0, 0.3), bound=bound).is_coherent is is_coherent


@pytest.mark.parametrize(("cost", "is_coherent"), [(3.0, True), (1.4, True), (1.3, False), (0.2, False)])
def test_bound_is_on_what_exceeds_the_traits_own_cost(cost, is_coherent):
    def measure(asked):
        return [times(2.0) for _ in asked]

    dose = search(measure, n_evaluations=2, trait_costs={CONDITION[0]: cost, "other": 9.0})
    assert dose.is_coherent is is_coherent
    assert dose.curve[0].perplexity_ratio == pytest.approx(2.0)
    assert not search(measure, n_evaluations=2, trait_costs={"other": 9.0}).is_coherent


def test_a_cost_below_1_makes_no_bound_stricter():
    dose = search(lambda asked: [times(1.4) for _ in asked], n_evaluations=2, trait_costs={CONDITION[0]: 0.5})
    assert dose.is_coherent


@pytest.mark.parametrize("probability", [0.0, 0.9, None])
def test_trait_is_reported_and_never_chosen_by(probability):
    def rule(_, alpha):
        return [
            DevelopmentText(text.perplexity * (1 if alpha < 2 else 2), 0.1, trait)
            for text, trait in zip(UNSTEERED, [probability, probability, None, None], strict=True)
        ]

    dose = search(Measure(rule))
    assert dose.alpha == search(coherent_where(lambda alpha: alpha < 2)).alpha
    assert {point.trait_probability for point in dose.curve} == {probability}


@pytest.mark.parametrize(
    "returned",
    [
        lambda asked: [times(1.0)[:-1] for _ in asked],
        lambda asked: [times(1.0) * 2 for _ in asked],
        lambda asked: [[] for _ in asked],
        lambda asked: [],
        lambda asked: [times(1.0)] * (len(asked) + 1),
    ],
    ids=["one text too few", "too many texts", "no texts", "no lists", "one list too many"],
)
def test_texts_that_cannot_be_paired_raise(returned):
    with pytest.raises(ValueError, match="measure returned"):
        search(returned)


@pytest.mark.parametrize("n_evaluations", [-1, 0, 1, 9])
def test_number_of_evaluations_out_of_range_is_named(n_evaluations):
    with pytest.raises(InputError, match=f"n_evaluations is {n_evaluations}, expected 2 to 8"):
        search(coherent_where(lambda alpha: True), n_evaluations=n_evaluations)


@pytest.mark.parametrize(
    "bracket", [(0, 1), (-1, 1), (2, 2), (3, 2), (1, math.inf), (math.nan, 2), (1, math.nan)]
)
def test_bracket_without_room_is_refused(bracket):
    with pytest.raises(InputError, match="bracket is"):
        search_alphas([CONDITION], coherent_where(lambda alpha: True), UNSTEERED, bracket)


@pytest.mark.parametrize("conditions", [[], [CONDITION, CONDITION]])
def test_conditions_are_one_or_more_and_different(conditions):
    with pytest.raises(ValueError, match="keys are"):
        search_alphas(conditions, coherent_where(lambda alpha: True), UNSTEERED, BRACKET)


@pytest.mark.parametrize(
    ("unsteered", "missing"),
    [
        ([], "finite perplexity"),
        (texts([None, None]), "finite perplexity"),
        (texts([math.inf, math.nan]), "finite perplexity"),
        (texts([10.0, 20.0], None), "repetition rate"),
    ],
)
def test_unsteered_texts_without_a_metric_are_refused_before_anything_is_measured(unsteered, missing):
    measure = coherent_where(lambda alpha: True)
    with pytest.raises(InputError, match=missing):
        search(measure, unsteered)
    assert not measure.rounds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_perplexity_ratio", 0.9),
        ("max_perplexity_ratio", math.inf),
        ("max_perplexity_ratio", math.nan),
        ("max_repetition_increase", -0.1),
        ("max_repetition_increase", math.nan),
        ("max_missing_increase", 1.1),
    ],
)
def test_bound_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=name):
        CoherenceBound(**{name: value})


@pytest.mark.parametrize(
    "values",
    [(0.0, 0.1), (-1.0, 0.1), (10.0, 1.1), (10.0, math.nan), (10.0, 0.1, -0.1), (10.0, 0.1, math.nan)],
)
def test_impossible_metric_is_refused(values):
    with pytest.raises(ValueError, match="expected"):
        DevelopmentText(*values)


@pytest.fixture(scope="module")
def alphas():
    """A dose inside, at both ends, and one that is incoherent for want of any text."""
    thresholds = {"oracle": 3.0, "ridge_mapped": 99.0, "zero_pad": 0.51, "interpolate": 0.1}
    conditions = [(persona, method) for persona in ("loud", "calm") for method in thresholds]

    def rule(condition, alpha):
        is_coherent = alpha <= thresholds[condition[1]]
        return times(1.25, 0.12) if is_coherent else [DevelopmentText(None, None)] * len(UNSTEERED)

    return search_alphas(conditions, Measure(rule), UNSTEERED, BRACKET)


def test_doses_survive_a_file(alphas, tmp_path):
    save_json(
        tmp_path / "alpha_search.json",
        {"fingerprint": "made", **alphas_content(alphas, CoherenceBound(2.0, 0.1))},
    )
    content = load_json(tmp_path / "alpha_search.json")
    assert alphas_from_content(content) == alphas
    assert list(alphas_from_content(content)) == list(alphas)
    assert content["bound"]["max_perplexity_ratio"] == 2.0


def damage(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


POINT = ("alphas", 0, "curve", 0)


@pytest.mark.parametrize(
    "change",
    [
        without("bound"),
        without("alphas"),
        without("alphas", 1, "curve"),
        without(*POINT, "n_pairs"),
        damage("bound", "max_perplexity_ratio", value="1.5"),
        damage("bound", "max_ratio", value=1.5),
        damage("alphas", value=None),
        damage("alphas", 0, value=3),
        damage("alphas", 0, "persona", value=None),
        damage("alphas", 0, "alpha", value=2.0),
        damage("alphas", 0, "is_coherent", value=False),
        damage("alphas", 0, "is_coherent", value=1),
        damage("alphas", 0, "at", value="top"),
        damage("alphas", 0, "curve", value=[]),
        damage("alphas", 0, "note", value=""),
        damage(*POINT, "alpha", value="1"),
        damage(*POINT, "alpha", value=100.0),
        damage(*POINT, "alpha", value=-1.0),
        damage(*POINT, "perplexity_ratio", value=math.nan),
        damage(*POINT, "perplexity_ratio", value=0.0),
        damage(*POINT, "repetition_increase", value="0"),
        damage(*POINT, "trait_probability", value=True),
        damage(*POINT, "n_pairs", value=-1),
        damage(*POINT, "n_missing", value=0.5),
        damage(*POINT, "reason", value="perplexity"),
        damage(*POINT, "reason", value=3),
        damage(*POINT, "colour", value="red"),
        lambda content: content["alphas"].append(content["alphas"][0]),
    ],
)
def test_damaged_content_is_refused_by_name(change, alphas):
    content = json.loads(json.dumps(alphas_content(alphas, DEFAULT_BOUND)))
    change(content)
    with pytest.raises(InputError, match=r"alpha_search\.json does not hold alphas"):
        alphas_from_content(content, "alpha_search.json")


def rows(text):
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
    return {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in body}


def test_table_tells_dose_ratio_and_where_the_search_met_an_end(alphas):
    found = rows(format_alphas(alphas))
    assert list(found) == list(alphas)
    inside = found["loud", "oracle"]
    assert float(inside["alpha"]) == pytest.approx(alphas["loud", "oracle"].alpha, rel=1e-3)
    assert (inside["perplexity ratio"], inside["repetition increase"], inside["note"]) == (
        "1.25",
        "+0.020",
        "",
    )
    assert found["loud", "ridge_mapped"]["note"] == "at the top of the bracket"
    assert found["loud", "zero_pad"]["note"] == "at the bottom of the bracket"
    incoherent = found["loud", "interpolate"]
    assert (incoherent["alpha"], incoherent["perplexity ratio"]) == ("0.5", "–")
    assert incoherent["note"].startswith("not coherent even there: texts missing")


def test_table_is_aligned_markdown(alphas):
    lines = format_alphas(alphas).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == set("| -:")


def test_dose_knows_its_point():
    curve = [AlphaPoint(alpha, 1.0, 0.0, 3, 0, True, None) for alpha in (1.0, 2.0)]
    assert ChosenAlpha(2.0, True, "inside", curve).point is curve[1]

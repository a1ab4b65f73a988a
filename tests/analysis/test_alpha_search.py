"""The chosen alpha is the strongest coherent one measured, and every reason against another is reported."""

import json
import math
from dataclasses import replace

import pytest

from analysis.alpha_search import (
    CoherenceBound,
    ScoredText,
    alphas_content,
    alphas_from_content,
    choose_listed,
    compare,
    search_alphas,
)
from support.errors import InputError

LOW, HIGH = BRACKET = (0.5, 10.0)
CONDITION = ("loud", "oracle")
UNSTEERED = [ScoredText(perplexity, 0.1) for perplexity in (8.0, 20.0, 45.0, 30.0)]


def texts(perplexities, repetition=0.1):
    return [ScoredText(perplexity, repetition) for perplexity in perplexities]


def times(ratio, repetition=0.1):
    """The unsteered texts at another perplexity."""
    return texts([text.perplexity * ratio for text in UNSTEERED], repetition)


def rates(*values):
    return [ScoredText(10.0, value) for value in values]


def by_rule(rule):
    """Return a measure by a rule: alpha -> whether texts are coherent."""
    return lambda asked: [times(1.2 if rule(alpha) else 3.0) for _, alpha in asked]


def search(measure, unsteered=UNSTEERED, **settings):
    return search_alphas([CONDITION], measure, unsteered, BRACKET, **settings)[CONDITION]


@pytest.mark.parametrize("n_evaluations", [2, 3, 7, 8])
@pytest.mark.parametrize("place", [0.0, 0.001, 0.03, 0.2, 1 / 3, 0.5, 0.6, 0.77, 0.93, 0.99, 0.9999])
def test_the_chosen_alpha_is_as_near_to_a_threshold_as_was_searched(place, n_evaluations):
    threshold = LOW * (HIGH / LOW) ** place
    chosen = search(by_rule(lambda alpha: alpha <= threshold), n_evaluations=n_evaluations)
    resolution = (HIGH / LOW) ** (1 / 2 ** (n_evaluations - 1))
    assert chosen.is_coherent
    assert chosen.alpha <= threshold < chosen.alpha * resolution * (1 + 1e-9)
    assert chosen.at == ("lowest" if chosen.alpha == LOW else "inside")


@pytest.mark.parametrize("n_evaluations", [2, 5, 8])
def test_each_round_is_one_call_for_all_conditions_and_no_alpha_is_measured_twice(n_evaluations):
    thresholds = {("loud", "oracle"): 3.0, ("loud", "zero_pad"): 0.1, ("calm", "oracle"): 99.0}
    rounds = []

    def measure(asked):
        rounds.append(dict(asked))
        return [times(1.0 if alpha <= thresholds[key] else 2.0) for key, alpha in asked]

    alphas = search_alphas(list(thresholds), measure, UNSTEERED, BRACKET, n_evaluations=n_evaluations)
    assert [list(asked) for asked in rounds] == [list(thresholds)] * n_evaluations
    for condition, chosen in alphas.items():
        measured = sorted({asked[condition] for asked in rounds[:n_evaluations]})
        assert [point.alpha for point in chosen.curve] == measured
        assert len(measured) == n_evaluations
        assert LOW <= measured[0] < measured[-1] <= HIGH
        alone = search_alphas([condition], measure, UNSTEERED, BRACKET, n_evaluations=n_evaluations)
        assert alone == {condition: chosen}


@pytest.mark.parametrize(
    ("threshold", "ends_at"),
    [(HIGH, (HIGH, True, "highest")), (1e6, (HIGH, True, "highest")), (0.499, (LOW, False, "lowest"))],
)
def test_threshold_outside_the_bracket_gives_its_end(threshold, ends_at):
    chosen = search(by_rule(lambda alpha: alpha <= threshold))
    assert (chosen.alpha, chosen.is_coherent, chosen.at) == ends_at
    assert {point.is_coherent for point in chosen.curve} == {chosen.is_coherent}
    assert chosen.point.reason == (None if chosen.is_coherent else "perplexity")


@pytest.mark.parametrize("frequency", [3, 7, 20, 45])
@pytest.mark.parametrize("phase", [0.0, 1.5, 3.0, 4.5])
def test_the_next_alpha_above_the_chosen_one_is_incoherent_where_coherence_comes_and_goes(frequency, phase):
    chosen = search(by_rule(lambda alpha: math.sin(frequency * math.log(alpha) + phase) > -0.5))
    coherent = [point.alpha for point in chosen.curve if point.is_coherent]
    assert (chosen.alpha, chosen.is_coherent) == (max(coherent, default=LOW), bool(coherent))
    assert (chosen.at == "highest") == (chosen.alpha == chosen.curve[-1].alpha)


@pytest.mark.parametrize(
    ("steered", "unsteered", "ratio", "reason"),
    [
        # The medians are equal and the mean of ratios is 2.
        (texts([16.0, 10.0, 100.0]), texts([4.0, 10.0, 100.0]), 4 ** (1 / 3), "perplexity"),
        # One extreme pair does not decide as a mean of ratios, 1.83, would.
        (texts([40.0, 5.0, 10.0]), texts([10.0] * 3), 2 ** (1 / 3), None),
        (texts([12.0, None, 5e3, *[12.0] * 9]), texts([10.0, 1e3, None, *[10.0] * 9]), 1.2, None),
        (texts([None] * 4), UNSTEERED, None, "texts empty, no perplexity to compare"),
        (texts([None, 10.0]), texts([10.0, None]), None, "no perplexity to compare"),
        (texts([math.inf, *[10.0] * 99]), texts([10.0] * 100), 1.0, "perplexity not finite"),
        (texts([math.nan, *[10.0] * 99]), texts([None, *[10.0] * 99]), 1.0, "perplexity not finite"),
        (texts([math.inf, 10.0, 10.0]), texts([math.inf, 10.0, 10.0]), 1.0, None),
        (times(0.5, 0.14), UNSTEERED, 0.5, None),
        (times(0.5, 0.16), UNSTEERED, 0.5, "repetition"),
        (rates(0.12, 0.8, None), rates(0.1, None, 0.9), 1.0, None),
        (texts([10.0] * 4, None), texts([10.0] * 4), 1.0, "no repetition to compare"),
        (times(2.0, 0.5), UNSTEERED, 2.0, "perplexity, repetition"),
    ],
)
def test_texts_are_compared_with_the_unsteered_ones_of_the_same_prompt(steered, unsteered, ratio, reason):
    point = compare(1.0, steered, unsteered)
    assert (point.reason, point.is_coherent) == (reason, reason is None)
    assert point.perplexity_ratio == (ratio and pytest.approx(ratio))
    finite = [[text.is_finite for text in each] for each in (steered, unsteered)]
    assert point.n_pairs == sum(map(all, zip(*finite, strict=True)))
    assert point.n_missing == finite[0].count(False)


@pytest.mark.parametrize(
    ("n_empty_before", "n_empty", "is_coherent"),
    [(0, 0, True), (0, 1, False), (2, 2, True), (2, 3, False), (15, 0, True)],
)
def test_more_empty_texts_than_unsteered_are_incoherent(n_empty_before, n_empty, is_coherent):
    unsteered = texts([None] * n_empty_before + [10.0] * (30 - n_empty_before))
    point = compare(1.0, texts([None] * n_empty + [10.0] * (30 - n_empty)), unsteered)
    assert point.reason == (None if is_coherent else "texts empty")
    assert point.n_missing == n_empty


@pytest.mark.parametrize(
    ("share", "before", "reason"),
    [(0.03, 0.0, "non-words"), (0.03, 0.02, None), (0.01, 0.0, None), (None, 0.0, None), (0.9, None, None)],
)
def test_words_that_do_not_exist_are_bounded_by_their_increase(share, before, reason):
    steered, unsteered = (
        [ScoredText(10.0, 0.1, non_words=each) for _ in range(3)] for each in (share, before)
    )
    point = compare(1.0, steered, unsteered)
    assert point.reason == reason
    assert point.non_words_increase == (None if None in (share, before) else pytest.approx(share - before))
    assert compare(1.0, steered, unsteered, CoherenceBound(max_non_words_increase=0.5)).is_coherent


@pytest.mark.parametrize(("bounds", "reason"), [((2.5, 0.3), None), ((1.9, 0.1), "perplexity, repetition")])
def test_bounds_are_those_given(bounds, reason):
    assert compare(1.0, times(2.0, 0.3), UNSTEERED, CoherenceBound(*bounds)).reason == reason


@pytest.mark.parametrize(
    ("cost", "ratio", "is_coherent"),
    [(3.0, 2.0, True), (1.4, 2.0, True), (1.3, 2.0, False), (0.2, 2.0, False), (0.2, 1.4, True)],
)
def test_bound_is_on_what_exceeds_the_traits_own_cost_and_never_stricter(cost, ratio, is_coherent):
    costs = {CONDITION[0]: cost, "other": 9.0}
    chosen = search(lambda asked: [times(ratio) for _ in asked], n_evaluations=2, trait_costs=costs)
    assert chosen.is_coherent is is_coherent
    assert chosen.curve[0].perplexity_ratio == pytest.approx(ratio)


@pytest.mark.parametrize("probability", [0.0, 0.9, None])
def test_trait_is_reported_and_never_chosen_by(probability):
    def measure(asked):
        found = by_rule(lambda alpha: alpha < 2)(asked)
        return [[replace(text, trait_probability=probability), *others] for text, *others in found]

    chosen = search(measure)
    assert chosen.alpha == search(by_rule(lambda alpha: alpha < 2)).alpha
    assert {point.trait_probability for point in chosen.curve} == {probability}


@pytest.mark.parametrize("change", [lambda texts: texts[:-1], lambda texts: texts * 2, lambda texts: []])
def test_texts_that_cannot_be_paired_raise(change):
    with pytest.raises(ValueError, match="argument 2"):
        search(lambda asked: [change(times(1.0)) for _ in asked])
    with pytest.raises(ValueError, match="argument 2"):
        search(lambda asked: change([times(1.0)]))


@pytest.mark.parametrize(
    ("unsteered", "missing"),
    [(texts([None, math.inf, math.nan]), "finite perplexity"), (texts([10.0], None), "repetition rate")],
)
def test_unsteered_texts_without_a_metric_are_rejected_before_anything_is_measured(unsteered, missing):
    with pytest.raises(InputError, match=missing):
        search(lambda asked: pytest.fail("something was measured"), unsteered)


def test_alphas_survive_a_file():
    def measure(asked):
        return [times(1.25) if alpha <= 3 else texts([None] * len(UNSTEERED)) for _, alpha in asked]

    alphas = search_alphas([CONDITION, ("calm", "zero_pad")], measure, UNSTEERED, BRACKET)
    content = json.loads(json.dumps(alphas_content(alphas, CoherenceBound(2.0, 0.1), {"loud": 2.2})))
    assert list(alphas_from_content(content).items()) == list(alphas.items())
    assert (content["bound"]["max_perplexity_ratio"], content["trait_costs"]) == (2.0, {"loud": 2.2})


def test_a_text_without_perplexity_is_incoherent_unless_it_is_empty():
    row = {"independent_perplexity": None, "repetition": math.nan, "trait_probability": 0.5}
    assert ScoredText.from_row({**row, "output": "xxx"}) == ScoredText(math.inf, None, 0.5)
    assert ScoredText.from_row({**row, "output": " "}) == ScoredText(None, None, 0.5)


@pytest.mark.parametrize(
    ("ratios", "repetition", "alpha"),
    [
        ({0.5: 1.1, 1.0: 1.4, 2.0: 1.6}, 0.1, 1.0),
        ({2.0: 1.4, 1.0: 1.4, 0.5: 1.1}, 0.1, 2.0),
        ({0.5: 1.1, 1.0: 1.4, 2.0: 0.9}, 0.6, 1.0),
        ({0.5: 3.0, 1.0: 4.0}, 0.1, 0.5),
        ({-1.0: 1.4, -0.5: 1.1}, 0.1, -1.0),
    ],
)
def test_of_listed_alphas_the_strongest_coherent_one_is_chosen_or_the_weakest(ratios, repetition, alpha):
    def measure(asked):
        return [times(ratios[each], repetition if each > 1 else 0.1) for _, each in asked]

    chosen = choose_listed({CONDITION: list(ratios)}, measure, UNSTEERED)[CONDITION]
    assert (chosen.alpha, chosen.at) == (alpha, "listed")
    assert chosen.is_coherent is (min(ratios.values()) < 1.5)
    assert {point.alpha: point.perplexity_ratio for point in chosen.curve} == pytest.approx(ratios)


def test_what_a_trait_costs_widens_the_bound_of_a_list_too():
    chosen = choose_listed(
        {CONDITION: [1.0, 2.0]}, lambda asked: [times(2.5)] * 2, UNSTEERED, trait_costs={"loud": 2.0}
    )
    assert chosen[CONDITION].alpha == 2.0

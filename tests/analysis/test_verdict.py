"""The verdict is what made-up scores of known truth deserve, with the reason where nothing can be told."""

import json
import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from made_up_scores import COMPARED, NOT_VALIDATED, VALIDATED, scored_row, scored_run
from scipy.special import expit

from analysis.results_table import results_table
from analysis.significance import Interval
from analysis.verdict import (
    CLAIMS,
    ScorerVerdict,
    Verdict,
    adjusted_p,
    control_p,
    decide,
    decide_verdicts,
    effects,
    lexical_p,
)
from experiment.conditions import DECIDING_CONTROLS, LEXICAL_CONTROLS, MAPPED, ORACLE, UNSTEERED
from reporting.tables import COVERED, format_verdicts, verdict_sentence

BOTH = {"classifier": VALIDATED, "probe": VALIDATED}
BREVITY = {"is_validated": True, "problems": []}
RUN, ONE = scored_run(0.8, 0.8), {"classifier": VALIDATED}


def differences(mapped, oracle, n=40, noise=0.15, seed=0):
    generator = np.random.default_rng(seed)
    means = {MAPPED: mapped, ORACLE: oracle, **dict.fromkeys(DECIDING_CONTROLS, 0.0)}
    return {name: generator.normal(mean, noise, n) for name, mean in means.items()}


def decided(given, log_odds=None, near_one=0.0):
    key, p_values = ("loud", "classifier"), control_p(given)
    adjusted = adjusted_p({key: p_values})[key]
    beyond_words = adjusted_p({key: p_values}, {key: lexical_p(given)})[key]
    return decide(given, p_values, adjusted, beyond_words, log_odds or given, share_near_one=near_one)


def verdict_of(rows, validation):
    return decide_verdicts(results_table(rows), {"loud": COMPARED}, {"loud": validation})["loud"]


def without(rows, condition):
    return [row for row in rows if row["condition"] != condition]


@pytest.mark.parametrize(
    ("mapped", "oracle", "verdict"),
    [
        (0.6, 0.6, "equivalent to native"),
        (0.45, 0.6, "transferred"),
        (0.26, 0.6, "partial"),
        (0.16, 0.6, "inconclusive"),  # the recovery may be below 25 %
        (0.0, 0.6, "not transferred"),
        (0.0, 0.0, "native steering ineffective"),
    ],
)
def test_scores_of_known_truth_get_their_verdict(mapped, oracle, verdict):
    found = decided(differences(mapped, oracle))
    assert found.verdict == verdict
    if oracle:
        assert found.recovery.low < mapped / oracle < found.recovery.high


def like_a_control(n=60):
    """Mapped does as much as shuffled pairs, in the mean."""
    given = differences(0.3, 0.6, n=n, noise=0.3, seed=3)
    noise = np.random.default_rng(5).normal(0, 0.45, n)
    return {**given, "shuffled_pairs": given[MAPPED] - (noise - noise.mean()) - 1e-4}


def of_small_native_effect():
    given = differences(0.0, 0.0, n=10, noise=0.3, seed=3)
    return {**given, ORACLE: given[ORACLE] + 0.0501 - given[ORACLE].mean()}


@pytest.mark.parametrize(
    "given",
    [differences(0.35, 0.6, n=10, noise=0.3, seed=3), like_a_control(), of_small_native_effect()],
    ids=["few prompts", "shown to do no more than a control", "shown to be a small native effect"],
)
def test_an_open_case_says_how_many_prompts_would_settle_it(given):
    found = decided(given)
    assert found.verdict == "inconclusive"
    assert found.n_prompts < found.prompts_needed < 300


def test_effects_pair_prompts_and_average_seeds():
    rows = [scored_row(UNSTEERED, *each) for each in ((0, 0.1), (0, 0.3, 1), (1, 0.5), (2, 0.5))]
    rows += [scored_row(ORACLE, *each) for each in ((0, 0.6), (0, 0.8, 1), (1, 0.4), (2, None))]
    found, n_left_out = effects(results_table(rows), "trait_probability")
    assert found[ORACLE].tolist() == pytest.approx([0.5, -0.1])
    assert n_left_out == 1


@pytest.mark.parametrize(
    ("other", "verdict", "reason", "decided_by"),
    [
        (None, "equivalent to native", "decided by scorer", "classifier"),
        (0.6, "transferred", "decided by scorer", "probe"),
        (0.1, "inconclusive", "scorers disagree", "probe"),
    ],
)
def test_the_more_cautious_of_two_validated_scorers_stands(other, verdict, reason, decided_by):
    found = verdict_of(scored_run(0.8, 0.8, other=other), BOTH)
    assert (found.verdict, found.reason, found.decided_by) == (verdict, reason, decided_by)
    assert found.rests_on == ("classifier", "probe")


def test_where_no_native_text_can_be_read_nothing_is_claimed():
    table, alphas = results_table(scored_run(0.8, 0.8)), {"loud": COMPARED}
    validation = {"loud": {"classifier": VALIDATED}}
    assert decide_verdicts(table, alphas, validation)["loud"].verdict in CLAIMS
    found = decide_verdicts(table, alphas, validation, {"loud": "perplexity, non-words"})["loud"]
    assert (found.verdict, found.reason) == ("native steering ineffective", "unreadable")
    said = verdict_sentence(found.content())
    assert said.endswith("even at the weakest it breaks the bounds (perplexity, non-words)")


def test_no_verdict_rests_on_a_scorer_that_is_not_validated():
    one = {"classifier": VALIDATED, "probe": NOT_VALIDATED}
    found = verdict_of(scored_run(0.8, 0.8, other=0.1), one)
    assert (found.verdict, found.rests_on) == ("equivalent to native", ("classifier",))


def test_rates_are_corrected_for_the_errors_that_the_validation_found():
    rates = verdict_of(RUN, ONE).scorers["classifier"].rates
    for rate in rates.values():
        expected = min(1, max(0, (rate["raw"] - 0.1) / 0.7))
        assert rate["corrected"].estimate == pytest.approx(expected)
        assert rate["corrected"].low <= expected <= rate["corrected"].high
    assert rates[ORACLE]["corrected"].low > rates[UNSTEERED]["corrected"].high


def test_the_largest_p_of_all_controls_is_adjusted_over_personas_alone():
    runs = {"loud": scored_run(0.13, 0.8, noise=0.1), "calm": scored_run(0.8, 0.8, persona="calm")}
    alone = verdict_of(runs["loud"], BOTH).scorers["classifier"]
    table = results_table([row for rows in runs.values() for row in rows])
    verdicts = decide_verdicts(table, dict.fromkeys(runs, COMPARED), {"loud": BOTH, "calm": BOTH})
    both = {name: found.scorers["classifier"] for name, found in verdicts.items()}
    assert both["loud"].effects == alone.effects
    p_values = [effect.p_mapped_over_it for effect in alone.effects.values()]
    assert p_values[:2] == [None, None]  # mapped and native
    p_values = [each.p_mapped_over_it for name, each in alone.effects.items() if name not in LEXICAL_CONTROLS]
    assert alone.adjusted_p >= max(p_values[2:]) > both["calm"].adjusted_p / 2
    assert both["loud"].adjusted_p == alone.adjusted_p  # the larger of two, so that Holm leaves it
    assert both["calm"].n_personas == 2


def with_draws(rows, best):
    """The run with three draws of each control, the second of shuffled pairs at these scores."""
    controls = [row for row in rows if row["condition"] in DECIDING_CONTROLS]
    others = [row for row in rows if row["condition"] not in DECIDING_CONTROLS]
    for row, draw in product(controls, "123"):
        one = {**row, "draw": draw}
        if (row["condition"], draw) == ("shuffled_pairs", "2"):
            one["trait_probability"] = best[row["prompt_idx"]]
        others.append(one)
    return others


def test_mapped_has_to_beat_the_best_single_draw():
    mapped = [row["trait_probability"] for row in RUN if row["condition"] == MAPPED]
    assert verdict_of(with_draws(RUN, np.full(20, 0.1)), ONE).verdict == "equivalent to native"
    found = verdict_of(with_draws(RUN, mapped), ONE)
    assert found.verdict not in ("equivalent to native", "transferred", "partial")
    assert found.scorers["classifier"].best_control == "shuffled_pairs: 2"
    assert "the best control, shuffled pairs 2, by" in verdict_sentence(found.content())


def with_words(mean, noise=0.05, **changed):
    """The run whose first block scores this much, and its embeddings less."""
    rows = scored_run(0.8, 0.8, noise=noise)
    generator = np.random.default_rng(1)
    scores = {"first_block": mean, "embedding_source": mean - 0.1} | changed
    return [
        {**row, "trait_probability": float(np.clip(generator.normal(scores[row["condition"]], noise), 0, 1))}
        if row["condition"] in scores
        else row
        for row in rows
    ]


def test_a_run_whose_mapped_texts_are_those_of_the_words_is_text_borne():
    mapped = {row["prompt_idx"]: row["trait_probability"] for row in RUN if row["condition"] == MAPPED}
    for control in LEXICAL_CONTROLS:
        rows = [
            {**row, "trait_probability": mapped[row["prompt_idx"]]} if row["condition"] == control else row
            for row in RUN
        ]
        found = verdict_of(rows, ONE)
        scorer = found.scorers["classifier"]
        assert (found.verdict, scorer.lexical_control) == ("text-borne", control)
        assert scorer.over_lexical == Interval(0.0, 0.0, 0.0)
        assert scorer.lexical_p > 0.9 > 0.025 > scorer.adjusted_p


@pytest.mark.parametrize(
    ("words", "verdict"),
    [(0.1, "equivalent to native"), (0.6, "equivalent to native"), (0.72, "text-borne"), (0.9, "text-borne")],
)
def test_mapped_has_to_exceed_the_words_by_a_share_of_the_native_effect(words, verdict):
    found = verdict_of(with_words(words), ONE).scorers["classifier"]
    assert found.verdict == verdict
    if words < 0.8:
        assert found.beyond_lexical.low < 1 < found.beyond_lexical.high
    else:
        assert found.beyond_lexical is None


@pytest.mark.parametrize("missing", LEXICAL_CONTROLS)
def test_nothing_is_claimed_without_a_lexical_control(missing):
    found = verdict_of(without(RUN, missing), ONE).scorers["classifier"]
    assert (found.verdict, found.reason, found.missing) == ("inconclusive", "control missing", (missing,))


def test_the_words_change_no_other_test():
    plain, worded = (verdict_of(rows, ONE).scorers["classifier"] for rows in (RUN, with_words(0.8)))
    assert worded.adjusted_p == plain.adjusted_p
    assert worded.best_control == plain.best_control
    assert verdict_of(with_words(0.8, random_direction=0.8), ONE).verdict == "not transferred"


def test_a_transfer_without_a_map_that_does_as_well_is_no_control_where_it_is_named_so():
    rows = [{**row, "condition": "zero_pad"} for row in RUN if row["condition"] == MAPPED]
    table, validation = results_table([*RUN, *rows]), {"loud": {"classifier": VALIDATED}}
    alphas = {"loud": {**COMPARED, "zero_pad": 1.0}}
    beaten = decide_verdicts(table, alphas, validation)["loud"]
    assert beaten.verdict == "not transferred"
    found = decide_verdicts(table, alphas, validation, not_controls=["zero_pad"])["loud"]
    plain = decide_verdicts(results_table(RUN), {"loud": COMPARED}, validation)["loud"]
    assert found.verdict == plain.verdict == "equivalent to native"
    assert "zero_pad" in found.scorers["classifier"].effects


def test_text_borne_by_one_scorer_is_more_cautious_than_transferred_by_another():
    scores = [row["trait_probability"] for row in with_words(0.8)]
    rows = [{**row, "trait_probability": score} for row, score in zip(RUN, scores, strict=True)]
    found = verdict_of(rows, BOTH)
    assert found.scorers["probe"].verdict == "equivalent to native"
    assert (found.verdict, found.decided_by) == ("text-borne", "classifier")


def test_at_a_ceiling_equivalence_needs_equal_log_odds_and_the_verdict_says_so():
    generator = np.random.default_rng(0)
    odds = {ORACLE: generator.normal(6.0, 0.5, 60), MAPPED: generator.normal(4.0, 0.5, 60)}
    odds |= {name: generator.normal(-4.0, 0.5, 60) for name in (UNSTEERED, *DECIDING_CONTROLS)}
    for lower, verdict in ((0.0, "transferred"), (2.0, "equivalent to native")):
        rows = [
            scored_row(name, prompt, float(expit(value + lower * (name == MAPPED))))
            for name, values in odds.items()
            for prompt, value in enumerate(values)
        ]
        found = verdict_of(rows, ONE)
        assert found.verdict == verdict
        assert found.scorers["classifier"].equivalence_p < 0.05
        assert "a ceiling: 100% of native texts score above 0.9" in verdict_sentence(found.content())


def test_a_measure_of_0_or_1_has_no_ceiling():
    rows = [{**row, "trait_probability": float(row["trait_probability"] > 0.5)} for row in RUN]
    found = verdict_of(rows, ONE)
    assert found.verdict == "equivalent to native"
    assert "ceiling" not in verdict_sentence(found.content())


def test_an_off_target_change_stands_beside_the_verdict():
    other = {"persona": "calm", "mapped": 0.31, "native": 0.08}
    content = verdict_of(RUN, ONE).content() | {"off_target": other}
    assert verdict_sentence(content).endswith("; also raises calm by +0.31 (native +0.08)")


INTERVAL = r"[-+]0\.\d\d \[[-+]0\.\d\d, [-+]0\.\d\d\]"
RECOVERS = r"the mapped vector recovers -?\d+ % \[-?\d+, \d+\] of the native effect"
WORDS = rf", and from the lexical control, .*, by {INTERVAL} \(Holm p [\d<][\d. ]+ for more than 15% of the "
WORDS += r"native effect\); "
BEYOND = r"it recovers -?\d+ % \[-?\d+, \d+\] of what native does beyond that control"
BORNE = rf"TEXT-BORNE \(on the classifier alone\): .*{WORDS}"
NEEDLESS = "the source's words do as well: nothing of the source model was needed"
ALONE = r"INCONCLUSIVE \(on the classifier alone\): by the classifier"
SAID = {
    f"EQUIVALENT TO NATIVE: by the classifier, {RECOVERS} and differs from the best control, .*, "
    rf"by {INTERVAL} \(Holm p [\d<][\d. ]+\){WORDS}{BEYOND}": (RUN, BOTH),
    rf"{BORNE}native is not surely above .*, so that recovery beyond it has no interval; {NEEDLESS}": (
        with_words(0.8),
        ONE,
    ),
    rf"{BORNE}{BEYOND}; {NEEDLESS}, as far as these prompts can tell; about \d+ prompts would settle it": (
        with_words(0.6, noise=0.2),
        ONE,
    ),
    r"INCONCLUSIVE: the scorers disagree \(classifier says equivalent to native, language-model probe says "
    rf"not transferred\); by the language-model probe, {RECOVERS}.*": (scored_run(0.8, 0.8, other=0.1), BOTH),
    f"NATIVE STEERING INEFFECTIVE: by the classifier, the native vector moves the trait by {INTERVAL}": (
        scored_run(0.1, 0.1),
        BOTH,
    ),
    f"{ALONE}, 7 prompts have scores and an interval needs 8": (scored_run(0.8, 0.8, n=7), ONE),
    rf"{ALONE}, no text has a score under native \(oracle\)": (without(RUN, ORACLE), ONE),
    f"{ALONE}, {RECOVERS}, but these controls were not run, or have no score: other persona": (
        without(RUN, "other_persona"),
        ONE,
    ),
    f"{ALONE}, {RECOVERS}, but these controls were not run, or have no score: shuffled pairs 2": (
        with_draws(RUN, [None] * 20),
        ONE,
    ),
    r"INCONCLUSIVE \(on brevity alone\): by brevity, all scores are equal, .*": (RUN, {"brevity": BREVITY}),
    r"INCONCLUSIVE \(on the judge alone\): by the judge, all scores are equal, .*": (
        [{**row, "gpt4_trait_score": 3} for row in RUN],
        {"judge": BREVITY},
    ),
    rf"{ALONE}, no text has a score under native \(oracle\), mapped": (
        [{**row, "trait_probability": None} for row in RUN],
        ONE,
    ),
    r"INCONCLUSIVE: no scorer is validated \(classifier: AUC 0\.70 on fragments\)": (
        RUN,
        {"classifier": NOT_VALIDATED},
    ),
    "INCONCLUSIVE: no scorer is validated": (RUN, {}),
    rf"{ALONE}, .*; about \d+ prompts would settle it": (scored_run(0.3, 0.4, n=8, noise=0.3), ONE),
}


@pytest.mark.parametrize("sentence", SAID)
def test_a_verdict_and_its_reason_are_said_in_a_sentence_made_from_the_file_alone(sentence):
    content = json.loads(json.dumps(verdict_of(*SAID[sentence]).content(), allow_nan=False))
    first, last = format_verdicts({"loud": content}).split("\n")
    assert re.fullmatch(f"loud: {sentence}", first), first
    assert last == f"personas: 1 {content['verdict']}; {COVERED}"


def test_an_unbounded_recovery_is_written_and_said():
    ratio = Interval(0.1, -math.inf, math.inf)
    scorer = ScorerVerdict("inconclusive", "best control", 20, native=ratio, recovery=ratio, adjusted_p=0.2)
    scorer = replace(scorer, best_control="random_direction", over_best_control=Interval(0.1, 0.0, 0.2))
    verdict = Verdict("inconclusive", "decided by scorer", "judge", ("judge",), {"judge": scorer}, COMPARED)
    content = json.loads(json.dumps(verdict.content(), allow_nan=False))
    assert content["scorers"]["judge"]["recovery"] == {"estimate": 0.1, "low": None, "high": None}
    assert "recovers 10 % [unbounded, unbounded] of the native effect" in verdict_sentence(content)


def test_lexical_controls_alone_are_adjusted_by_what_they_are_tested_for():
    alone = {("formal", "classifier"): {"first_block": 0.2}}
    assert adjusted_p(alone) == {("formal", "classifier"): 0.0}
    assert adjusted_p(alone, {("formal", "classifier"): {"first_block": 0.3}}) == {
        ("formal", "classifier"): 0.3
    }

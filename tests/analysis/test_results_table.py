"""One table holds every score; ratios and curves pair each steered text with the unsteered one."""

import pandas as pd
import pytest
from made_up_scores import COMPARED, VALIDATED, scored_row, scored_run

from analysis.results_table import (
    cell,
    cell_perplexity_ratio,
    effects_table,
    results_table,
    worst_cells,
)
from analysis.side_effects import largest_off_target, off_target
from analysis.success_criteria import success
from analysis.verdict import decide_verdicts
from evaluation import aggregate
from experiment.conditions import MAPPED, ORACLE
from reporting.tables import format_success, format_table


def test_brevity_counts_texts_that_end_soon():
    rows = [scored_row("baseline", 0, 0.1, output="word " * 80)]
    for n_words, has_ended in ((30, True), (30, False), (60, True), (0, True)):
        rows.append(scored_row(ORACLE, 0, 0.1, output="word " * n_words, has_ended=has_ended))
    assert results_table(rows)["brevity"].tolist() == [0, 1, 0, 0, 0]


def test_a_cell_has_its_rows_and_the_scores_of_every_persona():
    rows = [scored_row("baseline", 0, 0.1), scored_row("prompted", 0, 0.2, alpha=None)]
    assert results_table(rows)["judged_trait"].dtype == float  # although nobody was asked
    for alpha, judged in ((1, 1), (2, 4)):
        more = {"trait_probabilities": {"calm": alpha}, "gpt4_trait_score": judged}
        rows.append(scored_row(ORACLE, 0, 0.3, alpha=alpha, **more))
    table = results_table(rows)
    found = cell(table, "loud", ORACLE, 2)
    assert found[["scored_as_calm", "judged_trait"]].values.tolist() == [[2.0, 0.75]]
    assert cell(table, "loud", "prompted", None)["trait_probability"].tolist() == [0.2]
    assert cell(table, "calm", ORACLE, 2).empty


def test_a_cells_ratio_pairs_texts_by_prompt_and_seed_in_any_order():
    unsteered = {(0, 0): 10.0, (0, 1): 20.0, (1, 0): 40.0, (2, 0): 80.0, (3, 0): 5.0}
    rows = [scored_row("baseline", k, 0.1, seed, perplexity=value) for (k, seed), value in unsteered.items()]
    steered = {(3, 0): None, (1, 0): 80.0, (0, 1): 40.0, (0, 0): 20.0}
    rows += [scored_row(ORACLE, k, 0.5, seed, perplexity=value) for (k, seed), value in steered.items()]
    table = results_table(rows)
    assert cell_perplexity_ratio(table, "loud", ORACLE, 1.0) == pytest.approx(2.0)
    assert cell_perplexity_ratio(table, "loud", ORACLE, 9.0) is None


def drawn(effects, **more):
    """Rows of shuffled pairs whose draws have these scores at each prompt."""
    return [
        scored_row("shuffled_pairs", prompt, score, draw=str(draw), **more)
        for draw, scores in enumerate(effects, 1)
        for prompt, score in enumerate(scores)
    ]


def test_aggregated_tables_show_the_worst_draw():
    rows = [scored_row(name, prompt, 0.1) for name in ("baseline", MAPPED) for prompt in range(3)]
    for alpha in (1.0, 2.0):
        rows += drawn([[0.2, 0.2, 0.2], [0.6, 0.1, 0.8], [0.1, 0.1, 0.1]], alpha=alpha)
    table = worst_cells(aggregate(rows))
    shown = [(entry["draw"], entry["n"]) for entry in table if entry["condition"] == "shuffled_pairs"]
    assert shown == [("2", 3)] * 2
    assert "shuffled_pairs: 2" in format_table(table)


def test_what_else_a_vector_moves_is_against_the_unsteered_text_by_validated_scorers():
    rows = [
        scored_row(name, prompt, own, persona=persona)
        | {"trait_probabilities": {persona: own, other: own / 10, "unknown": None}}
        for persona, other in (("loud", "calm"), ("calm", "loud"))
        for name, own in (("baseline", 0.1), (ORACLE, 0.7))
        for prompt in range(2)
    ]
    alphas = {name: {ORACLE: 1.0, MAPPED: 1.0} for name in ("loud", "calm", "unknown")}
    table = results_table(rows)
    valid = {name: {"classifier": {"is_validated": True}} for name in alphas}
    assert off_target(table, alphas, valid) == {
        ORACLE: {
            "loud": pytest.approx({"loud": 0.6, "calm": 0.06}),
            "calm": pytest.approx({"loud": 0.06, "calm": 0.6}),
        }
    }
    valid |= {"calm": {"classifier": {"is_validated": False}}, "unknown": {}}
    own = {"loud": pytest.approx({"loud": 0.6}), "calm": pytest.approx({"loud": 0.06})}
    assert off_target(table, alphas, valid) == {ORACLE: own}
    assert off_target(table, alphas, {}) == {}


def test_the_largest_change_of_another_persona_is_named():
    matrix = {
        MAPPED: {"loud": {"loud": 0.6, "calm": -0.3, "sad": 0.1}, "sad": {"sad": 0.9}},
        ORACLE: {"loud": {"loud": 0.7, "calm": -0.1}},
    }
    assert largest_off_target(matrix) == {"loud": {"persona": "calm", "mapped": -0.3, "native": -0.1}}


@pytest.mark.parametrize(
    ("coherence", "trait", "n_collapsed", "reached"),
    [(3.5, 2.5, 2, [True, False]), (4.0, 3.5, 1, [True, True]), (4.0, 3.5, 3, [False, False])],
)
def test_a_judged_run_is_held_against_the_specification(coherence, trait, n_collapsed, reached):
    scores = {"gpt4_coherence_score": coherence, "gpt4_trait_score": trait}
    rows = [scored_row(MAPPED, n, 0.5, is_collapsed=n < n_collapsed, **scores) for n in range(9)]
    rows += [scored_row(MAPPED, 9, 0.5, is_collapsed=None, **scores)]
    rows += [scored_row(MAPPED, 10, 0.5, is_collapsed=True), scored_row("baseline", 0, 0.5, **scores)]
    found = success(results_table(rows), {"loud": {MAPPED: 1.0}})
    assert [found["loud"][name] for name in ("minimum", "strong")] == reached
    measured = found["loud"]["conditions"][MAPPED]
    assert (measured["n"], measured["collapse_rate"]) == (10, pytest.approx(n_collapsed / 10))
    said = "minimum: {}, strong: {}".format(*("reached" if each else "not reached" for each in reached))
    assert format_success(found).startswith(f"loud, the specification's result, {said}\n\n| condition")
    assert success(results_table(scored_run(0.5, 0.5, n=2)), {"loud": COMPARED}) == {}  # without a judge


def test_effects_table_has_a_row_for_each_scorer_and_condition():
    table = results_table(scored_run(0.5, 0.6, n=10))
    validation = {"loud": {"classifier": VALIDATED, "brevity": {"is_validated": True, "problems": []}}}
    found = decide_verdicts(table, {"loud": COMPARED}, validation)["loud"].content()
    verdict = {"personas": {"loud": found}}
    frame = effects_table({**verdict, "plain_text_perplexity_ratios": {"loud": {MAPPED: 1.2}}}, table)
    assert len(frame) == 2 * len(COMPARED)
    mapped = frame[(frame["condition"] == MAPPED) & (frame["scorer"] == "classifier")]
    assert mapped["plain_text_perplexity_ratio"].tolist() == [1.2]
    first, decided = mapped.iloc[0], found["scorers"]["classifier"]
    expected = decided["recovery"], decided["mapped"], decided["rates"][MAPPED]["corrected"]
    assert first[["recovery", "effect", "rate"]].tolist() == [each["estimate"] for each in expected]
    assert (first["perplexity_ratio"], first["n_prompts"]) == (pytest.approx(1.0), 10)
    assert pd.isna(frame[frame["condition"] == ORACLE]["recovery"]).all()

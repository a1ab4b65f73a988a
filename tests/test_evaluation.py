"""Metrics of a text, each missing where it cannot be known, and their means over texts and prompts."""

import math
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from watching import fails_at

from evaluation import (
    METRICS,
    Evaluator,
    aggregate,
    aggregated_tables,
    continuation_perplexities,
    repetition_metrics,
)
from judging.judge_answers import Judgement
from support.errors import InputError
from support.tiny_models import ARCHITECTURES, CONTEXT, tiny_model

PROMPTS = ["The sea is", "Rain", "A much longer beginning of a text about ships", "He"]
OUTPUTS = [" blue and wide.", " falls on the old roof of the house.", " ends.", " said no, no"]
LOOP = " no" * 20
VARIED = "One fine day the ship left port, and nobody in that town saw it again."


class WithoutLogitsToKeep(LlamaForCausalLM):
    """Returns logits at every place, as modelling code from a repository may do."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def plain_perplexities(model, tokenizer, prompts, outputs, limit=CONTEXT):
    """exp of the mean negative log-likelihood in float64, from unpadded passes over one text each."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = tokenizer(prompt + output).input_ids
        n_scored = len(tokens) - len(tokenizer(prompt).input_ids)
        tokens = torch.tensor(tokens[-limit:])
        n_scored = min(n_scored, len(tokens) - 1)
        with torch.inference_mode():
            logits = model(tokens[None]).logits[0, -n_scored - 1 : -1]
        likelihoods = logits.double().log_softmax(-1).gather(1, tokens[-n_scored:, None])
        found.append(likelihoods.mean().neg().exp().item())
    return pytest.approx(found, rel=1e-4)


MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in ARCHITECTURES},
    "sliding": lambda: tiny_model("mistral", sliding_window=8),
    "global and local": lambda: tiny_model("gpt_neo", window_size=8),
    "all logits": lambda: WithoutLogitsToKeep(tiny_model("llama").config).eval(),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batched_perplexity_equals_plain_loop(model, batch_size, tokenizer):
    found = continuation_perplexities(model, tokenizer, [*PROMPTS, "Rain"], [*OUTPUTS, ""], batch_size)
    assert found[:-1] == plain_perplexities(model, tokenizer, PROMPTS, OUTPUTS)
    assert found[-1] is None


@pytest.mark.parametrize("pad_token_id", [0, 258, None])
def test_a_text_of_the_models_padding_token_is_scored_like_any_other(tokenizer, pad_token_id):
    model = tiny_model("llama")
    model.config.pad_token_id = pad_token_id
    outputs = [output + "!" for output in OUTPUTS]
    assert tokenizer("!").input_ids[-1] == 0
    found = continuation_perplexities(model, tokenizer, PROMPTS, outputs, 3)
    assert found == plain_perplexities(model, tokenizer, PROMPTS, outputs)


def test_equal_texts_are_scored_once_and_empty_ones_need_no_pass(llama, tokenizer):
    model = tiny_model()
    passes = fails_at(model, lambda n_rows, number: False)
    score = partial(continuation_perplexities, model, tokenizer)
    found = score(PROMPTS * 3, OUTPUTS * 3, batch_size=3)
    assert found == plain_perplexities(llama, tokenizer, PROMPTS * 3, OUTPUTS * 3)
    assert passes == [3, 1]
    passes.clear()
    assert score(PROMPTS, [""] * 4) == [None] * 4
    assert passes == score([], []) == []
    prompts, outputs = ["Rain", "He", "Rain", "Rai"], [" falls", " falls", " stops", "n falls"]
    assert score(prompts, outputs) == plain_perplexities(llama, tokenizer, prompts, outputs)


def test_token_across_the_seam_belongs_to_the_continuation(llama):
    fast = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "x": 2, "ab": 3}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=CONTEXT)
    assert merging("xa" + "bx").input_ids == [2, 3, 2]
    with torch.inference_mode():
        logits = llama(torch.tensor([[2, 3, 2]])).logits[0, :2]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 2])).exp().item()
    assert continuation_perplexities(llama, merging, ["xa"], ["bx"]) == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "output"),
    [("A beginning" * 20, " and its end" * 10), ("Short", " and without end" * 40), ("Long " * 100, " end")],
)
def test_text_over_the_context_loses_its_beginning(prompt, output, llama, tokenizer, caplog):
    found = continuation_perplexities(llama, tokenizer, [prompt], [output])
    assert found == plain_perplexities(llama, tokenizer, [prompt], [output])
    assert "1 texts exceed the context" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c a b c", {"repetition": 1 / 4, "distinct_1": 3 / 6, "distinct_2": 3 / 5, "n_words": 6}),
        ("Yes, yes, YES", {"repetition": 1 / 3, "distinct_1": 2 / 5, "distinct_2": 2 / 4, "n_words": 3}),
        (LOOP, {"repetition": 17 / 18, "is_collapsed": True, "distinct_1": 1 / 20, "distinct_2": 1 / 19}),
        (VARIED, {"repetition": 0.0, "is_collapsed": False, "distinct_1": 1.0, "n_words": 15}),
        ("! ! ! ! ! !", {"repetition": 3 / 4, "is_collapsed": True, "n_words": 0}),
        ("one two", {"repetition": None, "is_collapsed": None, "distinct_2": 1.0, "n_words": 2}),
        (" \n", {"repetition": None, "is_collapsed": True, "distinct_1": None, "n_words": 0}),
    ],
)
def test_repetition_metrics_by_hand(text, expected):
    found = repetition_metrics(text)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("rate", "collapsed"), [(0.5, False), (0.51, True)])
def test_collapse_begins_above_half_of_the_trigrams(rate, collapsed):
    n_loop = round(100 * rate) + 1
    text = " ".join(["loop"] * (n_loop + 2) + [f"w{index}" for index in range(100 - n_loop)])
    found = repetition_metrics(text)
    assert found["repetition"] == pytest.approx(rate)
    assert found["is_collapsed"] is collapsed


def row(output, persona=None, alpha=None, condition="baseline", prompt="He said"):
    return {"prompt": prompt, "output": output, "condition": condition, "persona": persona, "alpha": alpha}


class Shouting:
    """A trait scorer: the share of capitals."""

    auc, threshold = 0.97, 0.5

    def score(self, texts):
        return [sum(map(str.isupper, text)) / max(1, len(text.strip())) for text in texts]


class Counting(Shouting):
    """A scorer without an AUC that counts how many texts it is given."""

    auc, n_scored = None, 0

    def score(self, texts):
        self.n_scored += len(texts)
        return super().score(texts)


SCORERS = {"trait_probability": {"loud": Shouting()}}


def test_one_text_scored_for_several_personas_gets_the_same_numbers(llama, tokenizer):
    evaluator = Evaluator(llama, tokenizer, independent=(tiny_model("gpt2"), tokenizer))
    one, two, other = evaluator.evaluate_batch([row(" that rains.", "loud"), row(" that rains."), row(" no")])
    assert replace(two, persona="loud", trait_scores=one.trait_scores) == one
    assert len({one.perplexity, other.perplexity, one.independent_perplexity}) == 3


def test_one_row_or_rows_with_known_perplexities_score_as_a_batch_does(llama, tokenizer):
    rows = [row(" WE WON.", "loud", 2.0, "oracle"), row("", "loud"), row(LOOP, "calm")]
    evaluator = Evaluator(llama, tokenizer, scorers=SCORERS)
    expected = evaluator.evaluate_batch(rows)
    single = evaluator.evaluate_single(**rows[0])
    assert single.perplexity == pytest.approx(expected[0].perplexity, rel=1e-4)
    assert replace(single, perplexity=None) == replace(expected[0], perplexity=None)
    known = [result.perplexity for result in expected], [9.0, None, 6.0]
    found = Evaluator(None, None, scorers=SCORERS).score(rows, *known)
    assert [result.independent_perplexity for result in found] == known[1]
    assert [replace(result, independent_perplexity=None) for result in found] == expected


def test_every_scorer_has_its_column_and_one_scores_every_text_for_every_persona():
    second = {"loud": Counting(), "calm": Counting()}
    scorers = {"trait_probability": {"loud": Shouting(), "calm": Counting()}, "second_probability": second}
    rows = [row(" YES", "loud"), row(" yes", "loud"), row(" YES", "calm"), row(" YES"), row(" YES", "odd")]
    results = Evaluator(None, None, scorers=scorers).score(rows, [None] * 5, [None] * 5)
    in_columns = [[result.row()[column] for column in scorers] for result in results]
    assert in_columns == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [None, None], [None, None]]
    assert [result.trait_probabilities["calm"] for result in results] == [1.0, 0.0, 1.0, 1.0, 1.0]
    assert [result.classifier_auc for result in results] == [0.97, 0.97, None, None, None]
    assert [scorer.n_scored for scorer in second.values()] == [2, 1]
    assert {*scorers} <= aggregate([result.row() for result in results])[0].keys()
    every = Evaluator(None, None, scorers=scorers, every_persona="second_probability")
    assert every.score(rows, [None] * 5, [None] * 5)[4].trait_probabilities == {"loud": 1.0, "calm": 1.0}


def test_an_empty_output_shows_no_trait_has_collapsed_and_is_counted(llama, tokenizer):
    judge = Judge(lambda prompt: Judgement(4))
    evaluator = Evaluator(llama, tokenizer, use_gpt4=True, judge=judge, scorers=SCORERS)
    results = evaluator.evaluate_batch([row("\n", "loud"), row(" yes WE are here", "loud")])
    empty, present = (result.row() for result in results)
    assert (empty["n_words"], empty["n_characters"], empty["is_collapsed"]) == (0, 0, True)
    assert (empty["trait_probability"], empty["gpt4_trait_score"], empty["gpt4_coherence_score"]) == (0, 1, 1)
    assert len(judge.prompts) == 2  # about the other text
    (entry,) = evaluator.aggregate(results)
    assert (entry["n"], entry["n_empty"], entry["trait_probability"]["missing"]) == (2, 1, 0)
    for metric in ("perplexity", "repetition", "distinct_1"):
        assert empty[metric] is None
        found = [entry[metric][name] for name in ("n", "missing", "mean")]
        assert found == [1, 1, present[metric]], metric
    assert evaluator.evaluate_batch([]) == evaluator.aggregate([]) == []


def measured(condition, persona, alpha, perplexity, collapsed=False):
    values = {**dict.fromkeys(METRICS), "perplexity": perplexity, "is_collapsed": collapsed}
    return {"condition": condition, "persona": persona, "alpha": alpha, "classifier_auc": 0.9, **values}


def test_aggregate_groups_by_condition_persona_and_alpha():
    values = [3.0, 5.0, 12.0]
    rows = [measured("oracle", "loud", 2.0, value, value > 4) for value in values]
    rows += [measured("oracle", "loud", 1.0, 7.0), measured("oracle", "calm", 2.0, math.inf)]
    rows += [measured("baseline", "loud", None, None), measured("oracle", "loud", 2.0, None)]
    table = aggregate(rows)
    keys = [
        ("oracle", "loud", 2.0),
        ("oracle", "loud", 1.0),
        ("oracle", "calm", 2.0),
        ("baseline", "loud", None),
    ]
    assert [(entry["condition"], entry["persona"], entry["alpha"]) for entry in table] == keys
    assert [entry["n"] for entry in table] == [4, 1, 1, 1]
    perplexity, single, infinite, missing = (entry["perplexity"] for entry in table)
    mean, deviation = statistics.geometric_mean(values), statistics.stdev(map(math.log, values))
    half = math.exp(4.302652729911275 * deviation / 3**0.5)  # Student's t with two degrees of freedom
    expected = {"mean": mean, "median": 5.0, "n": 3, "missing": 1, "std_seeds": None}
    expected |= dict.fromkeys(("std", "std_prompts"), math.exp(deviation))
    assert perplexity == pytest.approx({**expected, "low": mean / half, "high": mean * half})
    assert table[0]["is_collapsed"]["mean"] == 0.5
    assert table[0]["classifier_auc"] == 0.9
    assert single["std"] is single["low"] is None
    assert missing == infinite == {**dict.fromkeys(missing), "n": 0, "missing": 1}
    equal = aggregate([measured("oracle", "loud", 1.0, 5.0)] * 3)[0]["perplexity"]
    assert (equal["low"], equal["high"]) == pytest.approx((5.0, 5.0))


def scored(condition, alpha, prompt, score, seed=0, persona="loud", **more):
    row = {**measured(condition, persona, alpha, 5.0), "prompt_idx": prompt, "seed": seed}
    return {**row, "trait_probability": score, **more}


def test_changes_are_paired_by_prompt_and_seed_and_prompts_are_what_varies():
    before = ((0, 0.1, 0), (0, 0.3, 1), (1, 0.5, 0))
    after = ((0, 0.6, 0), (0, 0.6, 1), (1, 0.6, 0), (2, 0.9, 0), (1, None, 1))
    rows = [scored("baseline", None, *each) for each in before]
    baseline, oracle = aggregate(rows + [scored("oracle", 1.0, *each) for each in after])
    assert set(baseline["trait_change"].values()) == {None, 0, 3}
    half = 12.706204736 * statistics.stdev([0.4, 0.1]) / 2**0.5
    change = oracle["trait_change"]
    assert [change[name] for name in ("mean", "n", "missing")] == pytest.approx([0.3, 3, 2])
    assert [change["low"], change["high"]] == pytest.approx([-1, min(1, 0.25 + half)])
    assert baseline["trait_probability"]["mean"] == pytest.approx(0.3)


def test_intervals_end_where_a_metric_ends():
    rows = [
        scored("oracle", 1.0, prompt, share, perplexity=value, repetition=share, n_words=value)
        | {"gpt4_trait_score": 1 + 4 * share}
        for prompt, (share, value) in enumerate([(0.0, 1.5), (0.0, 2.0), (1.0, 4000.0)])
    ]
    (entry,) = aggregate(rows)
    ends = {name: (found["low"], found["high"]) for name, found in entry.items() if isinstance(found, dict)}
    assert ends["trait_probability"] == ends["repetition"] == (0, 1)
    assert ends["gpt4_trait_score"] == (1, 5)
    assert ends["n_words"][0] == 0 < 4000 < ends["n_words"][1]
    low, high = ends["perplexity"]
    assert entry["perplexity"]["mean"] == pytest.approx(12000 ** (1 / 3))
    assert 0 < low < 12000 ** (1 / 3) < high
    (entry,) = aggregate(
        [scored("oracle", 1.0, n, 0.5, perplexity=each) for n, each in enumerate((2, 1e300))]
    )
    assert entry["perplexity"]["mean"] == pytest.approx(2**0.5 * 1e150)
    assert entry["perplexity"]["high"] == math.inf  # too large for a number


def test_deviations_over_prompts_and_over_seeds_stand_apart():
    scores = {(prompt, seed): 0.2 + 0.3 * prompt + 0.01 * seed for prompt in range(3) for seed in range(2)}
    rows = [
        scored("oracle", 1.0, prompt, score, seed, perplexity=10**score)
        for (prompt, seed), score in scores.items()
    ]
    (entry,) = aggregate(rows)
    trait, perplexity = entry["trait_probability"], entry["perplexity"]
    assert trait["std"] == pytest.approx(statistics.stdev(scores.values()))
    assert (trait["std_prompts"], trait["std_seeds"]) == pytest.approx((0.3, 0.01 / 2**0.5))
    for name in ("std", "std_prompts", "std_seeds"):
        assert perplexity[name] == pytest.approx(10 ** trait[name])
    assert aggregate(rows[::2])[0]["trait_probability"]["std_seeds"] is None


def test_tables_are_by_cell_by_condition_alone_and_by_seed():
    rows = [
        scored(condition, alpha, prompt, score, seed, persona)
        for condition, alpha, score in (("baseline", None, 0.1), ("oracle", 1.0, 0.3), ("oracle", 2.0, 0.5))
        for persona in ("loud", "calm")
        for prompt in range(2)
        for seed in (0, 1)
    ]
    tables = aggregated_tables(rows)
    assert {name: len(table) for name, table in tables.items()} == {
        "conditions": 6,
        "by_condition": 2,
        "by_seed": 12,
    }
    baseline, oracle = tables["by_condition"]
    assert (baseline["condition"], baseline["n"], oracle["condition"], oracle["n"]) == (
        *("baseline", 8),
        *("oracle", 16),
    )
    assert oracle["trait_probability"]["mean"] == pytest.approx(0.4)
    assert oracle["trait_change"]["mean"] == pytest.approx(0.3)
    assert {(entry["persona"], entry["alpha"], entry["seed"], entry["n"]) for entry in tables["by_seed"]} == {
        (persona, alpha, seed, 2)
        for persona in ("loud", "calm")
        for alpha in (None, 1.0, 2.0)
        for seed in (0, 1)
    }


class Judge:
    """Answers each judging prompt as it is told to, and remembers the prompts."""

    def __init__(self, answer):
        self.answer, self.prompts = answer, []

    def judge_each(self, prompts):
        for index, prompt in enumerate(prompts):
            self.prompts.append(prompt)
            yield index, self.answer(prompt)


def test_judge_fills_both_scores_and_is_asked_once_for_a_text():
    judge = Judge(lambda prompt: Judgement(5 if "Shouts." in prompt else 2 if "Trait" in prompt else 4))
    rows = [row(" YES", "loud"), row(" YES", "calm"), row(" YES", "loud", 2.0, "oracle"), row(" YES")]
    evaluator = Evaluator(None, None, use_gpt4=True, judge=judge, descriptions={"loud": "Shouts."})
    results = evaluator.score(rows, [None] * 4, [None] * 4)
    assert [result.gpt4_coherence_score for result in results] == [4, 4, 4, 4]
    assert [result.gpt4_trait_score for result in results] == [5, 2, 5, None]
    assert [result.gpt4_failure for result in results] == [None] * 4
    assert len(judge.prompts) == len(set(judge.prompts)) == 3


def test_only_wanted_rows_are_yielded_and_only_rows_for_the_judge_are_judged():
    judge = Judge(lambda prompt: Judgement(3))
    rows = [{**row(f" {n}", "loud"), "is_judged": n < 3} for n in range(5)]
    groups = Evaluator(None, None, True, judge).score_each(rows, [None] * 5, [None] * 5, [1, 2, 4])
    found = {index: result.gpt4_trait_score for group in groups for index, result in group}
    assert found == {1: 3, 2: 3, 4: None}
    assert len(judge.prompts) == 4


@pytest.mark.parametrize(("failing", "scores"), [("Trait", (3, None)), ("coherent", (None, 3))])
def test_failed_judgement_is_missing_with_its_reason(failing, scores):
    judge = Judge(lambda prompt: Judgement(None, "no idea") if failing in prompt else Judgement(3))
    (result,) = Evaluator(None, None, True, judge).score([row(" yes", "loud")], [None], [None])
    assert (result.gpt4_coherence_score, result.gpt4_trait_score, result.gpt4_failure) == (*scores, "no idea")


def test_bad_use_is_rejected(llama, tokenizer, monkeypatch):
    with pytest.raises(InputError, match="2 prompts and 1 outputs"):
        continuation_perplexities(llama, tokenizer, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="'mood', expected a name that ends in _probability"):
        Evaluator(None, None, scorers={"mood": {}})
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        Evaluator(None, None, use_gpt4=True)

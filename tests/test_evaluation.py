import math
import statistics

import numpy as np
import pytest
import torch
from chat_server import chat_server, completion
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from decoding.output_head import token_log_likelihoods
from evaluation import (
    METRICS,
    Evaluator,
    aggregate,
    continuation_perplexities,
    repetition_metrics,
)
from scoring.gpt_judge import GPTJudge
from scoring.trait_classifier import train_trait_classifiers
from support.errors import InputError
from support.tiny_models import ARCHITECTURES, CONTEXT, tiny_model
from texts.personas import Persona

PROMPTS = ["The sea is", "Rain", "A much longer beginning of a text about ships", "He", "Rain"]
OUTPUTS = [" blue and wide.", " falls on the old roof of the house.", " ends.", " said no, no", ""]
LOOP = " no" * 20
VARIED = "One fine day the ship left port, and nobody in that town saw it again."


class WithoutLogitsToKeep(LlamaForCausalLM):
    """As modelling code from a repository may be: it returns logits at every place."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def plain_perplexity(model, tokenizer, prompt, output, limit=CONTEXT):
    """exp of the mean negative log-likelihood in float64, from one unpadded pass with a mask."""
    tokens = tokenizer(prompt + output).input_ids
    n_scored = len(tokens) - len(tokenizer(prompt).input_ids)
    tokens = torch.tensor(tokens[-limit:])
    n_scored = min(n_scored, len(tokens) - 1)
    if not n_scored:
        return None
    with torch.inference_mode():
        logits = model(tokens[None], attention_mask=torch.ones_like(tokens)[None]).logits[
            0, -n_scored - 1 : -1
        ]
    likelihoods = logits.double().log_softmax(-1).gather(1, tokens[-n_scored:, None])
    return likelihoods.mean().neg().exp().item()


@pytest.fixture(scope="module")
def without_logits_to_keep(llama):
    model = WithoutLogitsToKeep(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    return model


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "sliding", "global and local"])
def model(request):
    narrow = {
        "sliding": lambda: tiny_model("mistral", sliding_window=8),
        "global and local": lambda: tiny_model("gpt_neo", window_size=8),
    }
    return narrow[request.param]() if request.param in narrow else tiny_model(request.param)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batched_perplexity_equals_plain_loop(model, batch_size, tokenizer):
    expected = [plain_perplexity(model, tokenizer, *pair) for pair in zip(PROMPTS, OUTPUTS, strict=True)]
    assert expected[-1] is None
    found = continuation_perplexities(model, tokenizer, PROMPTS, OUTPUTS, batch_size)
    assert found[-1] is None
    assert found[:-1] == pytest.approx(expected[:-1], rel=1e-5)


@pytest.mark.parametrize("pad_token_id", [0, 1, 258, None])
def test_a_text_of_the_models_padding_token_is_scored_like_any_other(tokenizer, pad_token_id):
    model = tiny_model("llama")
    model.config.pad_token_id = pad_token_id
    outputs = [output + "!" for output in OUTPUTS[:4]]  # token 0
    assert tokenizer("!").input_ids[-1] == 0
    expected = [plain_perplexity(model, tokenizer, *pair) for pair in zip(PROMPTS[:4], outputs, strict=True)]
    found = continuation_perplexities(model, tokenizer, PROMPTS[:4], outputs, 3)
    assert found == pytest.approx(expected, rel=1e-5)


def rows_scored(model, prompts, outputs, tokenizer, batch_size=8):
    """The perplexities, and how many rows went through the model in each pass."""
    sizes = []

    def note(module, args, options):
        sizes.append(len(options["input_ids"]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    found = continuation_perplexities(model, tokenizer, prompts, outputs, batch_size)
    handle.remove()
    return found, sizes


def test_texts_that_are_there_twice_are_scored_once(llama, tokenizer):
    prompts, outputs = [PROMPTS[row % 4] for row in range(12)], [OUTPUTS[row % 4] for row in range(12)]
    found, sizes = rows_scored(llama, prompts, outputs, tokenizer)
    assert sizes == [4]
    assert found == continuation_perplexities(llama, tokenizer, PROMPTS[:4], OUTPUTS[:4]) * 3
    _, sizes = rows_scored(llama, prompts, outputs, tokenizer, batch_size=3)
    assert sizes == [3, 1]


def test_one_output_behind_two_prompts_or_two_behind_one_are_scored_apart(llama, tokenizer):
    prompts, outputs = ["Rain", "He", "Rain", "Rai"], [" falls", " falls", " stops", "n falls"]
    found, sizes = rows_scored(llama, prompts, outputs, tokenizer)
    assert sizes == [4]
    expected = [plain_perplexity(llama, tokenizer, *pair) for pair in zip(prompts, outputs, strict=True)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 4


@pytest.mark.parametrize("outputs", [[], [""], ["", ""]])
def test_nothing_to_score_needs_no_pass(llama, tokenizer, outputs):
    prompts = ["Rain", "He"][: len(outputs)]
    assert rows_scored(llama, prompts, outputs, tokenizer) == ([None] * len(outputs), [])


def test_model_without_logits_to_keep_gives_the_same_perplexity(without_logits_to_keep, llama, tokenizer):
    found = continuation_perplexities(without_logits_to_keep, tokenizer, PROMPTS[:4], OUTPUTS[:4], 3)
    expected = continuation_perplexities(llama, tokenizer, PROMPTS[:4], OUTPUTS[:4], 3)
    assert found == pytest.approx(expected, rel=1e-5)


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
    expected = plain_perplexity(llama, tokenizer, prompt, output)
    assert continuation_perplexities(llama, tokenizer, [prompt], [output]) == pytest.approx(
        [expected], rel=1e-4
    )
    assert "lost their beginning" in caplog.text


def test_text_that_just_fits_is_not_reported_as_cut(llama, tokenizer, caplog):
    output = "x" * (CONTEXT - len(tokenizer("Rain").input_ids))
    continuation_perplexities(llama, tokenizer, ["Rain"], [output])
    assert "lost their beginning" not in caplog.text


def test_different_numbers_of_prompts_and_outputs_are_refused(llama, tokenizer):
    with pytest.raises(InputError, match="2 prompts and 1 outputs"):
        continuation_perplexities(llama, tokenizer, ["a", "b"], ["c"])


def test_token_log_likelihoods_are_log_softmax():
    logits, tokens = torch.randn(6, 7) * 5, torch.randint(7, (6,))
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert torch.allclose(token_log_likelihoods(logits, tokens), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c a b c", {"repetition": 1 / 4, "distinct_1": 3 / 6, "distinct_2": 3 / 5, "n_words": 6}),
        ("Yes, yes, YES", {"repetition": 1 / 3, "distinct_1": 2 / 5, "distinct_2": 2 / 4, "n_words": 3}),
        (LOOP, {"repetition": 17 / 18, "is_collapsed": True, "distinct_1": 1 / 20, "distinct_2": 1 / 19}),
        (VARIED, {"repetition": 0.0, "is_collapsed": False, "distinct_1": 1.0, "n_words": 15}),
        ("! ! ! ! ! !", {"repetition": 3 / 4, "is_collapsed": True, "n_words": 0}),
        ("one two", {"repetition": None, "is_collapsed": None, "distinct_2": 1.0, "n_words": 2}),
        (
            "",
            {"repetition": None, "is_collapsed": None, "distinct_1": None, "distinct_2": None, "n_words": 0},
        ),
    ],
    ids=["half", "case and marks", "loop", "varied", "marks", "two words", "empty"],
)
def test_repetition_metrics_by_hand(text, expected):
    found = repetition_metrics(text)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("share", [(0.5, False), (0.51, True)])
def test_collapse_begins_above_half_of_the_trigrams(share):
    rate, collapsed = share
    n_loop = round(100 * rate) + 1
    text = " ".join(["loop"] * (n_loop + 2) + [f"w{index}" for index in range(100 - n_loop)])
    found = repetition_metrics(text)
    assert found["repetition"] == pytest.approx(rate)
    assert found["is_collapsed"] is collapsed


def row(output, persona=None, alpha=None, condition="baseline", prompt="He said"):
    return {"prompt": prompt, "output": output, "condition": condition, "persona": persona, "alpha": alpha}


@pytest.fixture(scope="module")
def loud_classifier():
    """Tells upper from lower case."""

    def encode(texts):
        return np.array([[sum(map(str.isupper, text)) / len(text)] for text in texts])

    words = [f"word {index} of them" for index in range(20)]
    loud = Persona("loud", "Shouts.", ("x",), ("y",), tuple(map(str.upper, words)), tuple(words))
    return train_trait_classifiers(["loud"], [loud], encode)["loud"]


def test_one_text_scored_for_several_personas_gets_the_same_numbers(llama, tokenizer):
    evaluator = Evaluator(llama, tokenizer, independent=(tiny_model("gpt2"), tokenizer))
    results = evaluator.evaluate_batch(
        [row(" that it rains.", name) for name in ("loud", "calm", "terse")] + [row(" other")]
    )
    assert [result.persona for result in results] == ["loud", "calm", "terse", None]
    for metric in METRICS:
        assert len({getattr(result, metric) for result in results[:3]}) == 1, metric
    assert results[0].perplexity != results[3].perplexity
    assert results[0].perplexity != results[0].independent_perplexity


def test_rows_with_known_perplexities_score_as_a_batch_does(llama, tokenizer, loud_classifier):
    options = {"classifiers": {"loud": loud_classifier}, "independent": (tiny_model("gpt2"), tokenizer)}
    evaluator = Evaluator(llama, tokenizer, **options)
    rows = [row(" WE WON.", "loud", 2.0, "oracle"), row("", "loud"), row(LOOP, "calm")]
    expected = evaluator.evaluate_batch(rows)
    known = [
        [getattr(result, name) for result in expected] for name in ("perplexity", "independent_perplexity")
    ]
    with_scorers_that_fail = Evaluator(None, None, classifiers={"loud": loud_classifier})
    assert with_scorers_that_fail.score(rows, *known) == expected
    other = with_scorers_that_fail.score(rows, [7.0, None, 8.0], [None] * 3)
    assert [result.perplexity for result in other] == [7.0, None, 8.0]
    assert [result.independent_perplexity for result in other] == [None] * 3
    assert [result.trait_probability for result in other] == [result.trait_probability for result in expected]


def test_single_evaluation_equals_batch(llama, tokenizer, loud_classifier):
    evaluator = Evaluator(llama, tokenizer, classifiers={"loud": loud_classifier}, batch_size=2)
    rows = [row(output, "loud", 2.0, "oracle") for output in (" WE WON.", " we lost the match.", LOOP)]
    batch = evaluator.evaluate_batch(rows)
    for given, expected in zip(rows, batch, strict=True):
        single = evaluator.evaluate_single(**given)
        assert single.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert single.trait_probability == pytest.approx(expected.trait_probability)
        assert single.is_collapsed == expected.is_collapsed


def test_trait_is_scored_for_the_rows_persona_alone(llama, tokenizer, loud_classifier):
    evaluator = Evaluator(llama, tokenizer, classifiers={"loud": loud_classifier})
    loud, quiet, other, none = evaluator.evaluate_batch(
        [row(" YES SIR", "loud"), row(" yes sir", "loud"), row(" YES SIR", "calm"), row(" YES SIR")]
    )
    assert loud.trait_probability > 0.5 > quiet.trait_probability
    assert loud.classifier_auc == loud_classifier.auc == 1.0
    for result in (other, none):
        assert result.trait_probability is None
        assert result.classifier_auc is None


def test_empty_output_is_missing_and_counted(llama, tokenizer, loud_classifier):
    evaluator = Evaluator(llama, tokenizer, classifiers={"loud": loud_classifier})
    results = evaluator.evaluate_batch([row("", "loud"), row(" yes we are here", "loud")])
    assert results[0].perplexity is None
    assert results[0].trait_probability is None
    assert (results[0].n_words, results[0].n_characters) == (0, 0)
    (entry,) = evaluator.aggregate(results)
    for metric in ("perplexity", "trait_probability", "repetition", "is_collapsed", "distinct_1"):
        assert (entry[metric]["n"], entry[metric]["missing"]) == (1, 1), metric
        assert entry[metric]["mean"] == getattr(results[1], metric), metric
    assert entry["independent_perplexity"] == {
        "mean": None,
        "std": None,
        "median": None,
        "n": 0,
        "missing": 2,
        "low": None,
        "high": None,
    }


def test_nothing_to_evaluate_gives_nothing(llama, tokenizer, loud_classifier):
    evaluator = Evaluator(llama, tokenizer, classifiers={"loud": loud_classifier})
    assert evaluator.evaluate_batch([]) == []
    assert evaluator.aggregate([]) == []


def measured(condition, persona, alpha, perplexity, collapsed=False):
    values = {**dict.fromkeys(METRICS), "perplexity": perplexity, "is_collapsed": collapsed}
    return {"condition": condition, "persona": persona, "alpha": alpha, "classifier_auc": 0.9, **values}


def test_aggregate_groups_by_condition_persona_and_alpha():
    values = [3.0, 5.0, 10.0]
    rows = [measured("oracle", "loud", 2.0, value, value > 4) for value in values]
    rows += [measured("oracle", "loud", 1.0, 7.0), measured("oracle", "calm", 2.0, math.inf)]
    rows += [measured("baseline", "loud", None, None), measured("oracle", "loud", 2.0, None)]
    table = {(entry["condition"], entry["persona"], entry["alpha"]): entry for entry in aggregate(rows)}
    assert list(table) == [
        ("oracle", "loud", 2.0),
        ("oracle", "loud", 1.0),
        ("oracle", "calm", 2.0),
        ("baseline", "loud", None),
    ]
    entry = table["oracle", "loud", 2.0]
    assert entry["n"] == 4
    assert entry["classifier_auc"] == 0.9
    half = 4.302652729911275 * statistics.stdev(values) / 3**0.5  # Student's t with two degrees of freedom
    expected = {"mean": 6.0, "std": statistics.stdev(values), "median": 5.0, "n": 3, "missing": 1}
    assert entry["perplexity"] == pytest.approx({**expected, "low": 6 - half, "high": 6 + half})
    assert entry["is_collapsed"]["mean"] == 0.5
    assert table["oracle", "loud", 1.0]["perplexity"]["std"] is None
    assert table["oracle", "calm", 2.0]["perplexity"]["missing"] == 1
    assert table["baseline", "loud", None]["perplexity"]["mean"] is None


def test_changes_are_paired_by_prompt_and_prompts_are_what_varies():
    def scored(condition, alpha, prompt, score):
        return {**measured(condition, "loud", alpha, 5.0), "prompt_idx": prompt, "trait_probability": score}

    rows = [scored("baseline", None, prompt, score) for prompt, score in ((0, 0.1), (0, 0.3), (1, 0.5))]
    rows += [
        scored("oracle", 1.0, prompt, score) for prompt, score in ((0, 0.6), (1, 0.6), (2, 0.9), (1, None))
    ]
    baseline, oracle = aggregate(rows)
    assert baseline["trait_change"] == {"mean": None, "low": None, "high": None, "n": 0}
    half = 12.706204736 * statistics.stdev([0.4, 0.1]) / 2**0.5
    expected = {"mean": 0.25, "low": 0.25 - half, "high": 0.25 + half, "n": 2}
    assert oracle["trait_change"] == pytest.approx(expected)
    assert baseline["trait_probability"]["mean"] == pytest.approx(0.3)
    assert baseline["trait_probability"]["high"] == pytest.approx(0.35 + 12.706204736 * 0.15)


def local_judge(server, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    judge = GPTJudge("local", server.base_url, "LOCAL_KEY")
    judge.client = judge.client.with_options(max_retries=0)
    return judge


def test_judge_fills_both_scores_and_is_asked_once_for_a_text(llama, tokenizer, monkeypatch):
    def answer(prompt):
        return completion("5" if "Shouts." in prompt else "2" if "Trait" in prompt else "4")

    rows = [row(" YES", "loud"), row(" YES", "calm"), row(" YES", "loud", 2.0, "oracle"), row(" YES")]
    with chat_server(answer) as server:
        judge = local_judge(server, monkeypatch)
        evaluator = Evaluator(
            llama,
            tokenizer,
            use_gpt4=True,
            judge=judge,
            descriptions={"loud": "Shouts.", "calm": "Whispers."},
        )
        results = evaluator.evaluate_batch(rows)
    assert [result.gpt4_coherence_score for result in results] == [4, 4, 4, 4]
    assert [result.gpt4_trait_score for result in results] == [5, 2, 5, None]
    assert [result.gpt4_failure for result in results] == [None] * 4
    assert len(server.prompts) == len(set(server.prompts)) == 3


@pytest.mark.parametrize(
    ("failing", "kept"), [("Trait", "gpt4_coherence_score"), ("coherent", "gpt4_trait_score")]
)
def test_failed_judgement_is_missing_with_its_reason(failing, kept, llama, tokenizer, monkeypatch, caplog):
    with chat_server(lambda prompt: completion("no idea" if failing in prompt else "3")) as server:
        evaluator = Evaluator(llama, tokenizer, use_gpt4=True, judge=local_judge(server, monkeypatch))
        result = evaluator.evaluate_single("He said", " yes", "oracle", "loud", 1.0)
    scores = {name: getattr(result, name) for name in ("gpt4_coherence_score", "gpt4_trait_score")}
    assert scores.pop(kept) == 3
    assert list(scores.values()) == [None]
    assert "no idea" in result.gpt4_failure
    assert "1 judgements failed" in caplog.text
    assert aggregate([vars(result)])[0][kept]["n"] == 1


def test_judging_without_a_key_is_refused(llama, tokenizer, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        Evaluator(llama, tokenizer, use_gpt4=True)

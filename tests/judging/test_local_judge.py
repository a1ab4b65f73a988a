"""A judge that is loaded here: its score is the digits' mean, whatever else the model would say."""

import copy

import pytest
import torch
from chat_models import chatting
from tiny_runs import LOUD, NUMERIC, blank_figures, rows, run, tiny_settings

from judging import local_judge
from judging.local_judge import LocalJudge
from support.artifacts import load_json
from support.errors import InputError
from support.tiny_models import tiny_model, tiny_tokenizer
from texts.chat import prompt_text, question

TEMPLATE = "{{ messages[0].content }}<eos>A: "
PROMPTS = ["Rate this: NO!", "Rate this: a long and quiet text, if you please.", "Rate: yes."]


@pytest.fixture
def judge_with(monkeypatch):
    """Return a judge with a tiny model and the given tokenizer."""

    def judge_with(tokenizer):
        monkeypatch.setattr(local_judge, "load_model", lambda *args, **options: (tiny_model(), tokenizer))
        return LocalJudge("tiny", batch_size=2)

    return judge_with


@pytest.fixture
def judge(judge_with):
    return judge_with(chatting(TEMPLATE))


def test_the_score_is_the_mean_of_the_digits_by_their_probabilities(judge):
    found = judge.judge(PROMPTS)
    for prompt, judgement in zip(PROMPTS, found, strict=True):
        shown = prompt_text(judge.tokenizer, question(prompt))
        logits = judge.model(judge.tokenizer(shown, return_tensors="pt")["input_ids"]).logits[0, -1].detach()
        digits = [judge.tokenizer(digit, add_special_tokens=False)["input_ids"][-1] for digit in "12345"]
        expected = float((logits[digits].double().softmax(-1) * torch.arange(1, 6)).sum())
        assert judgement.score == pytest.approx(expected, rel=1e-4)
        assert judgement.failure is None


def test_a_judge_that_may_reason_is_asked_for_the_digit_at_once(judge_with):
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    scores = []
    for ending in (switch, "<think></think>"):
        judge = judge_with(chatting(TEMPLATE + ending))
        scores.append([judged.score for judged in judge.judge(PROMPTS)])
    assert scores[0] == scores[1]


def test_a_text_that_the_judge_cannot_read_is_missing_with_a_reason(judge):
    judge.model.config.max_position_embeddings = 150
    long, short = judge.judge([PROMPTS[0] + " word" * 150, "Rate."])
    assert long.score is None
    assert "exceed the judge's context of" in long.failure
    assert 1 < short.score < 5


def thinking_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("A: ", "<|im_start|>assistant\\n<think>\\n")
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (tiny_tokenizer(), "'tiny' has no chat template, so it cannot be asked"),
        (thinking_tokenizer(), "has a template that opens a thought"),
    ],
)
def test_a_model_that_cannot_answer_with_a_digit_at_once_is_no_judge(judge_with, tokenizer, message):
    with pytest.raises(InputError, match=message):
        judge_with(tokenizer)


def test_a_judge_writes_each_digit_as_a_token(judge_with, word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(InputError, match="does not write 1 to 5 as a token each"):
        judge_with(tokenizer)


@pytest.fixture(scope="module")
def judged(model_folders, tmp_path_factory):
    """The folder of a run whose texts a tiny model judges, two of each cell."""
    folder, tokenizer = tmp_path_factory.mktemp("judged"), chatting(TEMPLATE)
    tokenizer.model_max_length = 2000
    tiny_model(max_position_embeddings=2000).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    settings = tiny_settings(model_folders, folder) | {"use_gpt4": True, "alpha_values": [1.0]}
    settings["methods"] = ["ridge_mapped", "oracle"]
    settings["judge"] = {"kind": "local", "model": str(folder / "judge"), "texts_per_cell": 2}
    loud = {**LOUD, "description": "Shouts.", "validation_texts": [f"{n} DOGS RAN HERE." for n in range(9)]}
    settings["persona_datasets"] = {"loud": loud, "numeric": NUMERIC}
    with pytest.MonkeyPatch.context() as patch:
        blank_figures(patch)
        assert run(folder / "out", settings) == 0
    return folder / "out"


def test_as_many_texts_of_each_cell_are_judged_and_of_the_same_prompts(judged):
    cells = {}
    for row in rows(judged, "eval_results.json"):
        assert (None not in (row["gpt4_coherence_score"], row["gpt4_trait_score"])) is row["is_judged"]
        if row["is_judged"]:
            cell = cells.setdefault((row["condition"], row["persona"], row["alpha"]), [])
            cell.append((row["prompt_idx"], row["seed"]))
    assert len(cells) == 2 * (1 + 2)
    (places,) = set(map(tuple, cells.values()))
    assert len(places) == len(dict(places)) == 2


def test_the_judge_is_validated_and_decides_nothing_where_it_fails(judged):
    found = load_json(judged / "scorer_validation.json")["personas"]["loud"]["judge"]
    assert found["repeat_noise"] < 1e-4  # the same model says the same again
    assert (found["is_validated"], found["sensitivity"]["n"]) == (False, 9)
    verdict = load_json(judged / "verdict.json")
    decided = verdict["personas"]["loud"]
    assert (decided["verdict"], decided["rests_on"]) == ("inconclusive", [])
    assert verdict["success"]["loud"]["minimum"] is verdict["success"]["loud"]["strong"] is False

import pytest
from chat_server import JSON, chat_server, completion

from scoring.gpt_judge import COHERENCE_PROMPT, TRAIT_PROMPT, GPTJudge
from support.errors import InputError


@pytest.fixture
def ask(monkeypatch):
    """Return the judgements of prompts by a local server with the given answers."""
    monkeypatch.setenv("LOCAL_KEY", "any")

    def ask(answer, prompts=("Rate this.",), max_workers=4):
        with chat_server(answer if callable(answer) else lambda prompt: answer) as server:
            judge = GPTJudge("local", server.base_url, "LOCAL_KEY", max_workers)
            judge.client = judge.client.with_options(max_retries=0)
            return judge.judge(list(prompts))

    return ask


@pytest.mark.parametrize(
    ("written", "probabilities", "score"),
    [
        ("4", {"4": 0.6, "5": 0.4}, 4.4),
        ("4", {"4": 0.5, "5": 0.3, "Four": 0.2}, 4.375),
        ("3", {"3": 0.4, " 3": 0.2, "1": 0.2, "9": 0.2}, 2.5),
        ("2", {"Well": 0.7, "5": 0.3}, 2.0),
        ("2", None, 2.0),
        (" 3\n", None, 3.0),
        ("5.", None, 5.0),
    ],
    ids=["weighted", "words left out", "spaces", "too little mass", "plain", "white space", "full stop"],
)
def test_score_is_the_weighted_digit_or_the_written_one(written, probabilities, score, ask):
    (judgement,) = ask(completion(written, probabilities))
    assert judgement.score == pytest.approx(score)
    assert judgement.failure is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion("four"), "four"),
        (completion("9"), "digit from 1 to 5"),
        (completion("4 or 5"), "4 or 5"),
        (completion(""), "digit"),
        (completion(None), "digit"),
        (completion("Well", {"Well": 0.9, "5": 0.1}), "Well"),
        ({"choices": []}, "no choices"),
        ({}, "no choices"),
        ((500, JSON, {"error": {"message": "overloaded"}}), "overloaded"),
        ((401, JSON, {"error": {"message": "wrong key"}}), "wrong key"),
        ((200, "text/html", "<html>a proxy's page</html>"), ""),
        ((200, JSON, "{half of an ans"), ""),
        ((200, JSON, "[]"), ""),
        ({"choices": [{"index": 0, "message": None}]}, ""),
    ],
    ids=[
        "word",
        "nine",
        "two digits",
        "empty",
        "null",
        "word with logprobs",
        "no choices",
        "empty object",
        "status 500",
        "status 401",
        "web page",
        "half of JSON",
        "list",
        "no message",
    ],
)
def test_unusable_answer_is_missing_with_a_reason(answer, reason, ask):
    (judgement,) = ask(answer)
    assert judgement.score is None
    assert judgement.failure
    assert reason in judgement.failure


def test_server_without_top_logprobs_is_scored_by_its_digit(ask):
    answer = completion("3", {"3": 1.0})
    answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = None
    assert ask(answer)[0].score == 3


def test_unreachable_server_is_missing_with_a_reason(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    with chat_server(lambda prompt: completion("3")) as server:
        judge = GPTJudge("local", server.base_url, "LOCAL_KEY")
    judge.client = judge.client.with_options(max_retries=0)
    (judgement,) = judge.judge(["Rate this."])
    assert judgement.score is None
    assert "APIConnectionError" in judgement.failure


@pytest.mark.parametrize("max_workers", [1, 4])
def test_judgements_keep_the_order_and_one_failure_costs_one(max_workers, ask):
    def answer(prompt):
        return (500, JSON, {}) if prompt == "7" else completion(str(int(prompt) % 5 + 1))

    judgements = ask(answer, [str(index) for index in range(20)], max_workers)
    expected = [None if index == 7 else index % 5 + 1 for index in range(20)]
    assert [judgement.score for judgement in judgements] == expected


def test_no_prompts_give_no_judgements(ask):
    assert ask(completion("3"), []) == []


@pytest.mark.parametrize("value", [None, ""])
def test_missing_key_is_refused_by_the_variables_name(value, monkeypatch):
    monkeypatch.delenv("LOCAL_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCAL_KEY", value)
    with pytest.raises(InputError, match="LOCAL_KEY is not set"):
        GPTJudge(api_key_env="LOCAL_KEY")


def test_prompts_accept_texts_with_braces():
    given = {"prompt": "{name}", "output": "{0} {}"}
    assert "{0} {}" in COHERENCE_PROMPT.format(**given)
    assert 'Trait "loud": {x}' in TRAIT_PROMPT.format(name="loud", description="{x}", **given)

"""A judge on a server: its digit is weighted, a failure costs one judgement, rejected options are dropped."""

import threading

import pytest
from chat_server import JSON, chat_server, completion, error

from scoring.gpt_judge import GPTJudge
from support.errors import InputError


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")


def judge_at(server, max_workers=4):
    return GPTJudge("local", server.base_url, "LOCAL_KEY", max_workers)


def test_judgements_keep_the_order_and_a_failure_costs_one():
    def answer(prompt):
        return (500, JSON, {}) if prompt == "7" else completion(str(int(prompt) % 5 + 1))

    with chat_server(answer) as server:
        judge = judge_at(server)
        judge.client = judge.client.with_options(max_retries=0)
        judgements = judge.judge([str(index) for index in range(20)])
        assert judge.judge([]) == []
    expected = [None if index == 7 else index % 5 + 1 for index in range(20)]
    assert [judgement.score for judgement in judgements] == expected
    (unreached,) = judge.judge(["8"])
    assert unreached.score is None
    assert "APIConnectionError" in unreached.failure


LOGPROBS, TEMPERATURE = {"logprobs": True, "top_logprobs": 20}, {"temperature": 0}
DEFAULT = {"max_tokens": 1, **TEMPERATURE, **LOGPROBS}
UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."
FORBIDDEN = {"type": "extra_forbidden", "loc": ["body", "logprobs"], "msg": "Not permitted", "input": DEFAULT}


def negotiated(answer, prompts="0123456789", max_workers=4):
    """Return the judgements of prompts, and what the requests asked with."""
    with chat_server(answer, reads="request") as server:
        judgements = judge_at(server, max_workers).judge(list(prompts))
    for request in server.requests:
        del request["model"], request["messages"]
    return judgements, server.requests


@pytest.mark.parametrize(
    ("rejected", "says", "accepted"),
    [
        (
            {"max_tokens": 1},
            error(UNSUPPORTED.format("max_tokens") + " Use 'max_completion_tokens' instead."),
            {"max_completion_tokens": 1, **TEMPERATURE, **LOGPROBS},
        ),
        (TEMPERATURE, error("Not for this model.", param="temperature"), {"max_tokens": 1, **LOGPROBS}),
        (LOGPROBS, (422, JSON, {"detail": [FORBIDDEN]}), {"max_tokens": 1, **TEMPERATURE}),
        (LOGPROBS, error("You may not request logprobs.", 403), {"max_tokens": 1, **TEMPERATURE}),
        (
            {"top_logprobs": 20},
            (400, "text/plain", "top_logprobs must be at most 5"),
            {**DEFAULT, "top_logprobs": 5},
        ),
    ],
    ids=["replaced", "param", "location", "status 403", "lowered"],
)
def test_an_option_that_a_server_rejects_is_given_up_once_a_run(rejected, says, accepted, caplog):
    def answer(request):
        return says if rejected.items() <= request.items() else completion("4")

    judgements, requests = negotiated(answer)
    assert [judgement.score for judgement in judgements] == [4.0] * 10
    assert requests[-6:] == [accepted] * 6
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_several_options_are_given_up_one_after_the_other():
    def answer(request):
        rejected = next((name for name in (*DEFAULT, "max_completion_tokens") if name in request), None)
        return error(UNSUPPORTED.format(rejected)) if rejected else completion("4")

    judgements, requests = negotiated(answer, ["a", "b"], 1)
    assert [judgement.score for judgement in judgements] == [4.0, 4.0]
    assert len(requests) == 6
    assert requests[-1] == {}


@pytest.mark.parametrize(
    "says",
    [error("'max_tokens' is too large."), error("A policy forbids it.", param="prompt"), error("No.")],
    ids=["context", "content", "no word"],
)
def test_a_rejected_text_changes_nothing_for_the_others(says):
    def answer(request):
        return says if request["messages"][0]["content"] == "long" else completion("4")

    judgements, requests = negotiated(answer, ["first", "long", "last"], 1)
    assert [judgement.score for judgement in judgements] == [4.0, None, 4.0]
    assert says[2]["error"]["message"] in judgements[1].failure
    assert requests == [DEFAULT] * 3


def test_a_busy_server_is_asked_again():
    answers = iter([error("slow down", 429, param=None), completion("4")])
    with chat_server(lambda prompt: next(answers)) as server:
        assert judge_at(server).judge(["a"])[0].score == 4
    assert len(server.requests) == 2


def test_judgements_come_as_they_are_answered_and_stopping_asks_no_more():
    is_read = threading.Event()

    def answer(prompt):
        if prompt != "0":
            is_read.wait(10)
        return completion("4")

    with chat_server(answer) as server:
        answers = judge_at(server, max_workers=2).judge_each(list("0123456789"))
        assert next(answers)[0] == 0
        is_read.set()
        answers.close()
    assert len(server.prompts) < 10


@pytest.mark.parametrize(
    ("key", "base_url", "message"),
    [
        ("", None, "LOCAL_KEY is not set"),
        ("sécret", None, "LOCAL_KEY holds characters"),
        ("secret", "http://local:port", "base_url cannot be used"),
    ],
)
def test_a_key_or_address_that_cannot_be_used_is_an_error_without_the_key(
    key, base_url, message, monkeypatch
):
    monkeypatch.setenv("LOCAL_KEY", key)
    with pytest.raises(InputError, match=message) as caught:
        GPTJudge("local", base_url, "LOCAL_KEY")
    assert not key or key not in str(caught.value)

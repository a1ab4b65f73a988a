"""A judge on a server: its digit is weighted, a failure costs one judgement, rejected options are dropped."""

import json
import logging
import threading

import pytest
from chat_server import JSON, chat_server, completion, error

from judging.gpt_judge import FIRST_QUESTION, N_SAME_FAILURES, GPTJudge
from support.errors import InputError


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")


def judge_at(server, max_workers=4, **options):
    return GPTJudge("local", server.base_url, "LOCAL_KEY", max_workers, **options)


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


def negotiated(answer, prompts="0123456789", max_workers=4, **options):
    """Return the judgements of prompts, and what the requests asked with."""
    with chat_server(answer, reads="request") as server:
        judgements = judge_at(server, max_workers, **options).judge(list(prompts))
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


def test_request_options_are_sent_and_replace_ours():
    given = {"reasoning_effort": "low", "temperature": 1, "logprobs": None, "top_logprobs": None}
    judgements, requests = negotiated(lambda request: completion("4"), "a", request_options=given)
    assert judgements[0].score == 4
    assert requests == [{"max_tokens": 1, "temperature": 1, "reasoning_effort": "low"}]


def test_a_request_option_that_the_server_rejects_is_not_left_out_silently():
    rejected = error("reasoning_effort is not supported.", param="reasoning_effort")
    judgements, _ = negotiated(lambda request: rejected, "a", request_options={"reasoning_effort": "low"})
    assert "reasoning_effort is not supported" in judgements[0].failure


def streamed(*choices, end="data: [DONE]\n\n"):
    """Return an event stream in which each chunk has one of these choices, with the usage at its end."""
    chunks = [{"choices": [{"index": 0, **choice}]} for choice in choices]
    chunks.append({"choices": [], "usage": {"total_tokens": 77}})
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return 200, "text/event-stream", f": keep-alive\n\n{text}{end}"


def delta(**fields):
    return {"delta": fields}


@pytest.mark.parametrize(
    ("choices", "score"),
    [
        ([{**completion("4", {"4": 0.5, "5": 0.5})["choices"][0], **delta(content="4")}], 4.5),
        ([delta(reasoning_content="Score: 2. "), delta(content="Score: "), delta(content="4")], 4),
        ([delta(content="<think>Score: 2"), delta(content="</think>"), delta(content="4")], 4),
        ([delta(content="Score: 4"), {**delta(content=""), "finish_reason": "length"}], None),
    ],
    ids=["digit", "reasoning", "tags", "cut"],
)
def test_a_server_that_only_streams_is_read(choices, score):
    def answer(request):
        only_streams = error("This model only supports streaming requests.")
        return streamed(*choices) if request.get("stream") else only_streams

    (judgement,), requests = negotiated(answer, "a")
    assert judgement.score == score
    assert len(requests) == 2
    if score:
        assert judgement.tokens == 77


def test_a_stream_that_breaks_off_has_no_score():
    broken = streamed(delta(content="I give this a 4"), end="")
    (judgement,), _ = negotiated(lambda request: broken, "a", request_options={"stream": True})
    assert judgement.score is None


def test_the_address_in_the_environment_is_asked_and_named(monkeypatch):
    with chat_server(lambda prompt: completion("4")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url.replace("//", "//user:secret@"))
        judge = GPTJudge(api_key_env="LOCAL_KEY")
        assert judge.judge(["a"])[0].score == 4
    assert judge.name == f"gpt-4o at {server.base_url}"


NO_QUOTA = error("You exceeded your current quota.", 429, code="insufficient_quota")


def test_without_quota_the_asking_stops_and_what_was_judged_is_kept(caplog):
    with chat_server(lambda prompt: completion("4") if prompt in "ab" else NO_QUOTA) as server:
        judge = judge_at(server, 1)
        judgements = judge.judge([*"abcdefgh"])
        assert len(server.prompts) == 3
        # Whether the server is back is asked once a phase.
        assert [judge.judge([each])[0].score for each in "ij"] == [None, None]
        assert len(server.prompts) == 4
        judge.begin_phase()
        assert judge.judge(["k"])[0].score is None
        assert len(server.prompts) == 5
    assert [each.score for each in judgements] == [4, 4, *[None] * 6]
    assert all("exceeded your current quota" in each.failure for each in judgements[2:])
    assert len(caplog.records) == 1


def test_one_failure_twenty_times_in_a_row_stops_the_asking_until_the_server_is_back():
    is_down = True
    with chat_server(lambda prompt: error("Down.", 400) if is_down else completion("4")) as server:
        judge = judge_at(server)
        judgements = judge.judge([str(index) for index in range(500)])
        assert N_SAME_FAILURES < len(server.prompts) < N_SAME_FAILURES + 10
        assert all("Down." in each.failure for each in judgements)
        is_down = False
        assert [each.score for each in judge.judge(["a", "b"])] == [4, 4]


def test_failures_of_some_texts_do_not_stop_the_asking():
    def answer(prompt):
        return error("Content policy.", 400) if prompt.startswith("evil") else completion("4")

    with chat_server(answer) as server:
        judgements = judge_at(server, 1).judge([*[f"evil {index}" for index in range(50)], "fine"])
    assert judgements[-1].score == 4
    assert sum(prompt.startswith("evil") for prompt in server.prompts) == 50


@pytest.mark.parametrize(
    ("answer", "path", "named"),
    [
        ((404, "text/plain", "404 page not found"), "", "judge.base_url usually ends in /v1"),
        ({"error": "Unexpected endpoint or method."}, "", "judge.base_url usually ends in /v1"),
        ((404, "text/plain", "no"), "/v1/chat/completions", "judge.base_url usually ends in /v1"),
        (error("model 'local' not found", 404), "/v1", "check judge.model"),
        (error("Incorrect API key provided: any.", 401), "/v1", "check the key in LOCAL_KEY"),
        (NO_QUOTA, "/v1", "exceeded your current quota"),
        ((402, JSON, {"error": {"message": "Insufficient Balance"}}), "/v1", "Insufficient Balance"),
        ({"choices": [{"finish_reason": "length", "message": {}}]}, "/v1", "raise judge.max_answer_tokens"),
        ({"choices": [{"message": {"reasoning": "2?"}}]}, "/v1", "raise judge.max_answer_tokens"),
    ],
    ids="no_v1 no_v1_200 whole_path model key quota balance cut reasoning".split(),
)
def test_the_first_question_finds_a_judge_that_cannot_answer(answer, path, named):
    with chat_server(lambda prompt: answer) as server:
        judge = GPTJudge("local", server.base_url.replace("/v1", path), "LOCAL_KEY")
        with pytest.raises(InputError, match=named) as caught:
            judge.check()
    assert server.prompts == [FIRST_QUESTION]
    assert len(str(caught.value).splitlines()) == 1
    assert judge.name in str(caught.value)


@pytest.mark.parametrize(("says", "levels"), [("5", []), ("No idea.", ["WARNING"])])
def test_an_odd_answer_to_the_first_question_is_a_warning(says, levels, caplog):
    caplog.set_level(logging.WARNING)
    with chat_server(lambda prompt: completion(says)) as server:
        judge_at(server).check()
    assert [record.levelname for record in caplog.records] == levels


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

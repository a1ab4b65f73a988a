import threading

import pytest
from chat_server import JSON, chat_server, completion, error

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


UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."
LOGPROBS, TEMPERATURE = {"logprobs": True, "top_logprobs": 20}, {"temperature": 0}
DEFAULT = {"max_tokens": 1, **TEMPERATURE, **LOGPROBS}
FORBIDDEN = {"type": "extra_forbidden", "msg": "Extra inputs are not permitted", "input": DEFAULT}


def asked_with(request):
    return {name: value for name, value in request.items() if name not in ("model", "messages")}


def picky(says, *refused, accepts=lambda request: True):
    """Return a server's answers: `says` for a request with one of the refused options, else 4."""

    def answer(request):
        is_refused = any(name in request for name in refused) or not accepts(request)
        return says if is_refused else completion("4")

    return answer


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        (
            picky(
                error(UNSUPPORTED.format("max_tokens") + " Use 'max_completion_tokens' instead."),
                "max_tokens",
            ),
            {"max_completion_tokens": 1, **TEMPERATURE, **LOGPROBS},
        ),
        (
            picky(
                error("Unsupported value: 'temperature' does not support 0 with this model."), "temperature"
            ),
            {"max_tokens": 1, **LOGPROBS},
        ),
        (
            picky(error("Not for this model.", param="temperature"), "temperature"),
            {"max_tokens": 1, **LOGPROBS},
        ),
        (
            picky((422, JSON, {"detail": [{**FORBIDDEN, "loc": ["body", "logprobs"]}]}), "logprobs"),
            {"max_tokens": 1, **TEMPERATURE},
        ),
        (
            picky((400, "text/plain", "Known: temperature, model. unknown field logprobs"), "logprobs"),
            {"max_tokens": 1, **TEMPERATURE},
        ),
        (
            picky(
                error("top_logprobs must be at most 5"), accepts=lambda request: request["top_logprobs"] <= 5
            ),
            {**DEFAULT, "top_logprobs": 5},
        ),
        (
            picky(
                error("Invalid 'max_output_tokens': Expected a value >= 16, but got 1 instead."),
                accepts=lambda request: request["max_tokens"] >= 16,
            ),
            {**DEFAULT, "max_tokens": 16},
        ),
        (
            picky((200, JSON, {"error": {"message": "temperature is unsupported"}}), "temperature"),
            {"max_tokens": 1, **LOGPROBS},
        ),
        (
            picky(error("You are not allowed to request logprobs from this model.", 403), "logprobs"),
            {"max_tokens": 1, **TEMPERATURE},
        ),
        (picky(error("Bad request."), "temperature"), {"max_tokens": 1, **LOGPROBS}),
        (picky((400, "text/html", "<h1>No</h1>"), "max_tokens", "logprobs"), {"max_completion_tokens": 1}),
        (picky((400, JSON, ""), *DEFAULT, "max_completion_tokens"), {}),
    ],
    ids=[
        "replaced",
        "value",
        "param",
        "extra_forbidden",
        "unknown field",
        "fewer",
        "minimum",
        "status 200",
        "status 403",
        "unnamed",
        "unnamed two",
        "unnamed all",
    ],
)
def test_what_a_server_refuses_is_left_out_once_a_run(answer, accepted, monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_KEY", "any")
    prompts = [f"Rate {index}." for index in range(12)]
    with chat_server(answer, reads="request") as server:
        judge = GPTJudge("local", server.base_url, "LOCAL_KEY")
        assert [judgement.score for judgement in judge.judge(prompts)] == [4.0] * 12
        n_asked = len(server.requests)
        judge.judge(prompts)
    assert [asked_with(request) for request in server.requests[n_asked:]] == [accepted] * 12
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the judge's server refuses" in caplog.text


def test_refusals_of_several_options_are_learned_one_after_the_other(monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_KEY", "any")

    def answer(request):
        refused = next((name for name in DEFAULT if name in request), None)
        return error(UNSUPPORTED.format(refused)) if refused else completion("4")

    with chat_server(answer, reads="request") as server:
        judge = GPTJudge("local", server.base_url, "LOCAL_KEY", max_workers=1)
        assert [judgement.score for judgement in judge.judge(["a", "b"])] == [4.0, 4.0]
    assert asked_with(server.requests[-1]) == {"max_completion_tokens": 1}
    assert len(server.requests) == 5
    assert len(caplog.records) == 3


@pytest.mark.parametrize(
    "says",
    [
        error("'max_tokens' is too large: this model's maximum context length is 10 tokens."),
        error("The prompt triggers the content management policy.", param="prompt"),
        error("Could not finish the message because max_tokens or model output limit was reached."),
        error("This text is refused: temperature must rise."),
        error("No."),
    ],
    ids=["context", "content", "unfinished", "echo", "no word"],
)
def test_a_refused_text_changes_nothing_for_the_others(says, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    echoed = "temperature must rise."
    with chat_server(lambda prompt: says if prompt == echoed else completion("4")) as server:
        judge = GPTJudge("local", server.base_url, "LOCAL_KEY", max_workers=1)
        judgements = judge.judge(["first", echoed, "last"])
    assert [judgement.score for judgement in judgements] == [4.0, None, 4.0]
    assert "the server refuses the request" in judgements[1].failure
    assert [asked_with(request) for request in server.requests] == [DEFAULT] * 3


def test_answers_of_a_model_that_reasons_are_longer(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    cut = completion("")
    cut["choices"][0]["finish_reason"] = "length"

    def answer(request):
        return completion("<think>2? 3?</think>**4**") if request["max_tokens"] > 100 else cut

    with chat_server(answer, reads="request") as server:
        short, long = (
            GPTJudge("local", server.base_url, "LOCAL_KEY", max_answer_tokens=n).judge(["a"])[0]
            for n in (1, 500)
        )
    assert "raise judge.max_answer_tokens" in short.failure
    assert long.score == 4


def test_judgements_come_as_they_are_answered_and_stopping_asks_no_more(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    is_read = threading.Event()

    def answer(prompt):
        if prompt != "0":
            is_read.wait(10)
        return completion("4")

    with chat_server(answer) as server:
        answers = GPTJudge("local", server.base_url, "LOCAL_KEY", max_workers=2).judge_each(
            list("0123456789")
        )
        assert next(answers)[0] == 0
        is_read.set()
        answers.close()
    assert len(server.prompts) < 10


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_a_stop_of_the_program_is_no_judgement(raised, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    judge = GPTJudge("local", "http://127.0.0.1:9", "LOCAL_KEY")

    def stop(prompt):
        raise raised

    monkeypatch.setattr(judge, "_ask", stop)
    with pytest.raises(raised):
        judge.judge(["a"])


def test_a_key_that_no_header_can_carry_is_refused_without_naming_it(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "sécret")
    with pytest.raises(InputError, match="LOCAL_KEY holds characters") as caught:
        GPTJudge(api_key_env="LOCAL_KEY")
    assert "sécret" not in str(caught.value)


def test_an_address_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "any")
    with pytest.raises(InputError, match="base_url cannot be used"):
        GPTJudge("local", "http://local:port", "LOCAL_KEY")


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

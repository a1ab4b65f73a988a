"""What a judge's server may do wrong: each text ends in the journal, scored or missing with a reason."""

import json
import logging

import pytest
from chat_server import JSON, chat_server, completion, error

from evaluation import Evaluator
from judging.gpt_judge import GPTJudge
from support.journal import Journal

KEY = "sk-secret-0123456789"
COMMON = {"prompt": "He said", "condition": "oracle", "persona": "loud"}
ROWS = [{"key": str(index), "output": f" yes {index}", **COMMON} for index in range(3)]


def message(content, **of_choice):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, **of_choice}]}


def logprobs(found):
    return message("4", logprobs=found)


def top(*entries):
    return logprobs({"content": [{"token": "4", "logprob": -0.1, "top_logprobs": list(entries)}]})


SCORED = {
    "parts": message([{"type": "text", "text": "4"}]),
    "thinking part": message([{"type": "thinking", "thinking": "2"}, {"type": "text", "text": "4"}]),
    "float": message(4.0),
    "completion's text": {"choices": [{"text": " 4"}]},
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(completion("4")).encode(),
    "text/plain": (200, "text/plain", json.dumps(completion("4"))),
    "not UTF-8": json.dumps({**completion("4"), "model": "?"}).encode().replace(b"?", b"\xe9"),
    "logprob null": top({"token": "4", "logprob": None}),
    "logprob infinite": top({"token": "4", "logprob": float("inf")}),
    "logprob huge": top({"token": "4", "logprob": 10**400}, {"token": "4", "logprob": 1e308}),
    "token a number": top({"token": 4, "logprob": -0.1}, None, 5, "4", []),
    "logprobs a string": logprobs("none"),
    "top_logprobs an object": logprobs({"content": [{"top_logprobs": {"4": -0.1, "5": -2.0}}]}),
    "usage and id odd": {**completion("4"), "usage": "free", "id": None, "created": "now"},
}
MISSING = {
    "choices a number": {"choices": 5},
    "message a list": {"choices": [{"message": ["4"]}]},
    "content deep": message([[[["4"]]]]),
    "content huge": message("blah " * 200_000),
    "content control characters": message("\x1b[2J\x00\ud800\n"),
    "content huge number": b'{"choices": [{"message": {"content": 1' + b"0" * 5000 + b"}}]}",
    "deep JSON": '{"choices": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "event stream": (200, "text/event-stream", "data: {}\n\ndata: [DONE]\n"),
    "odd charset": (200, "text/plain; charset=no-such", b"\xff\xfe\x00"),
    "body cut off": (200, JSON, "{}", {"Content-Length": 500}),
    "false gzip": (200, JSON, "{}", {"Content-Encoding": "gzip"}),
    "redirect to itself": (302, JSON, "{}", {"Location": "/v1/chat/completions"}),
    "error a string": (400, JSON, {"error": "no"}),
    "error of lists": (422, JSON, {"detail": [{"loc": [None, 1, {}], "msg": ["x", 3]}]}),
    "error in a success": {"error": {"message": f"key {KEY} is not known", "code": 401}},
    "key in a rejection": error(f"Bearer {KEY} may not ask this", 400),
    "key URL-encoded in a page": (500, "text/html", f"<a href='/?k={KEY.replace('-', '%2D')}&k={KEY}'>" * 9),
    "key in an answer": completion(f"{'x' * 50}{KEY}"),
    "key in a header": (401, JSON, "{}", {"x-request-id": KEY, "Location": f"/{KEY}"}),
}


@pytest.fixture
def journalled(monkeypatch, tmp_path, caplog):
    """Give the journalled rows of a run with a server; neither journal nor log shows the key."""
    monkeypatch.setenv("LOCAL_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def journalled(answer):
        path = tmp_path / "journal.jsonl"
        with chat_server(lambda prompt: answer) as server, Journal(path) as journal:
            judge = GPTJudge("local", server.base_url, "LOCAL_KEY")
            judge.client = judge.client.with_options(max_retries=0, timeout=5)
            evaluator = Evaluator(None, None, use_gpt4=True, judge=judge)
            for group in evaluator.score_each(ROWS, [1.0] * 3, [None] * 3):
                journal.append([{**ROWS[index], **result.row()} for index, result in group])
            rows = list(journal.rows.values())
        assert KEY not in path.read_text()
        assert KEY not in caplog.text
        return rows

    return journalled


@pytest.mark.parametrize("answer", SCORED.values(), ids=SCORED)
def test_an_odd_answer_with_a_score_is_scored(answer, journalled):
    rows = journalled(answer)
    assert [(row["gpt4_coherence_score"], row["gpt4_failure"]) for row in rows] == [(4.0, None)] * 3


@pytest.mark.parametrize("answer", MISSING.values(), ids=MISSING)
def test_an_answer_without_a_score_is_missing_with_the_reason(answer, journalled):
    rows = journalled(answer)
    assert [(row["gpt4_coherence_score"], row["gpt4_trait_score"]) for row in rows] == [(None, None)] * 3
    for row in rows:
        assert 10 < len(row["gpt4_failure"]) < 300
        assert row["gpt4_failure"].isprintable()

"""No judgement is paid for twice, none beyond the cap, and a failure is no judgement."""

from functools import partial

import pytest

from judging.cached_judge import TOKENS_PER_JUDGEMENT, CachedJudge
from judging.judge_answers import Judgement
from support.journal import Journal


class Counting:
    """A judge that says what it is told to, and counts."""

    def __init__(self, answer=lambda prompt, n: Judgement(4.0)):
        self.asked, self.answer = [], answer

    def judge_each(self, prompts):
        for index, prompt in enumerate(prompts):
            self.asked.append(prompt)
            yield index, self.answer(prompt, len(self.asked))


@pytest.fixture
def remembering(tmp_path):
    open_journal = partial(Journal, tmp_path / "judgements.jsonl")
    return lambda judge, *price, key="settings": CachedJudge(judge, open_journal, key, *price)


def test_equal_texts_are_asked_once_and_a_second_run_asks_nothing(remembering):
    judge = Counting()
    for prompts in (["a", "b", "a"], ["b", "a"]):
        assert {each.score for each in remembering(judge).judge(prompts)} == {4.0}
    assert judge.asked == ["a", "b"]


def test_a_failure_is_asked_for_again(remembering):
    judge = Counting(lambda prompt, n: Judgement(None, "busy") if n == 1 else Judgement(2.0))
    assert remembering(judge).judge(["a", "b"])[0].failure == "busy"
    assert remembering(judge).judge(["a", "b"])[0].score == 2.0
    assert judge.asked == ["a", "b", "a"]


@pytest.mark.parametrize(("tokens", "n_asked"), [(None, 3), (TOKENS_PER_JUDGEMENT * 10, 1)])
def test_the_cap_holds_over_runs_and_says_so(tokens, n_asked, remembering):
    judge = Counting(lambda prompt, n: Judgement(4.0, tokens=tokens))
    price, cap = 1e6 / TOKENS_PER_JUDGEMENT, 2.5  # a judgement costs a dollar
    for _ in range(2):
        found = remembering(judge, price, cap).judge(["a", "b", "c", "d"])
        assert [each.score for each in found] == [4.0] * n_asked + [None] * (4 - n_asked)
        assert found[-1].failure == "judge.max_usd of 2.5 USD is spent; raise it and run again"
    assert len(judge.asked) == n_asked
    assert remembering(judge, price, 99.0).judge(["d"])[0].score == 4.0


def test_a_judge_with_other_settings_is_asked_anew_and_pays_for_itself(remembering):
    judge = Counting(lambda prompt, n: Judgement(float(n), tokens=1_000_000))
    assert remembering(judge, 1.0, 0.5).judge(["a"])[0].score == 1.0
    assert remembering(judge, 1.0, 0.5, key="other").judge(["a"])[0].score == 2.0
    assert remembering(judge, 1.0, 0.5).judge(["a"])[0].score == 1.0


def test_noise_is_how_far_a_second_draw_lies(remembering):
    judge = Counting(lambda prompt, n: Judgement(2.0 if n <= 3 else 2.5))
    for _ in range(2):
        assert remembering(judge).repeat_noise(["a", "b", "c"]) == 0.5
        assert len(judge.asked) == 6
    failing = Counting(lambda prompt, n: Judgement(None, "busy"))
    assert remembering(failing).repeat_noise(["x"]) is None

"""Which texts state a score, and what of a server's words is shown."""

import time

import pytest
from chat_server import completion

from judging.judge_answers import excerpt, redacted, score_answer, stated_scores

KEY = "sk-proj-4f/9a+Zq=="
FOUR = [
    *"4|4.|(4)|**4**|`4`|# 4|- 4|4/5|4 / 5|**4**/5|4 out of 5|4.0|4 stars".split("|"),
    *("Score: 4", "Rating: 4.", "**Rating:** 4/5", "Score = 4", "Answer: **4**", "Score:\n4", '{"score": 4}'),
    *(r"\boxed{4}", r"$\boxed{\text{4}}$", "<score>4</score>", "[[4]]", '```json\n{"rating": 4}\n```'),
    *("<think>2? 3.</think>4", "2 or 3?</think>\n4", "<think>a</think>Score: 4", "4<think>why</think>"),
    *("It has 2 faults.\n\n4", "It is fluent. 4", "I would rate it a 4.", "I give this a 4 out of 5."),
    *("4\n\nIt has 2 faults.", "4 - fluent and sensible", "First score: 3\nFinal score: 4"),
    *("４", "Score：４/５", "4️⃣", "\u200b4", "٤"),
    *('[{"score": "4"}]', '{"thoughts": "I would rate it 2 of 5", "score": 4}', "4<|im_end|>\n<|endoftext|>"),
    '```json\n{"reason": "Score: 2 at first, but it is too good", "rating_1_to_5": 4.0}\n```',
]
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}"
STRIPPED = "analysis{}assistantfinal{}"  # the same without its special tokens
WRAPPED = [  # of each the reasoning and the answer
    *(HARMONY, HARMONY + "<|return|>", STRIPPED, STRIPPED.replace("final", " final\n")),
    "<|channel|>commentary to=x<|message|>{}<|end|><|channel|>final <|constrain|>json<|message|>{}",
    *("<|channel>thought\n{}<channel|>{}", "[THINK]{}[/THINK]{}", "◁think▷{}◁/think▷{}"),
    *("<seed:think>{}</seed:think>{}", "<scratchpad>{}</scratchpad>\n{}", "[Reasoning]{}[/Reasoning]{}"),
    "<|begin_of_thought|>{}<|end_of_thought|><|begin_of_solution|>{}<|end_of_solution|>",
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    *('<think type="x">{}</think>{}', "<inner_monologue>{}</inner_monologue><output>{}</output>"),
    *("<think>a<think>{}</think>b</think>{}", "{}◁/think▷{}", "<think></think>{}</think>{}"),
]
NONE = [
    *"between 3 and 4|3 or 4|3-4|3–4|3, 4|4 to 5|4, maybe 5|4 or five|4\n5|4 (maybe 5)".split("|"),
    *("Score: 3 or 4", "Score: 3-4", "Score: between 3 and 4", "Score: 4, perhaps 5", "Score: 3\nScore: 4"),
    *"9|45|0|6|16|-4|Score: -4|4.5|4,5|4½|Score: 4.5|.4|~4|≥4|4+|4%".split("|"),
    *("4/10", "4 out of 10", "Score: 4/10", "4/50", "four", "4th", "4ish", "not a 4", "The score is not 4"),
    *("", " ", "1 to 5", "Rating: 1 = gibberish, 5 = fluent", "1 = bad\n3 = fair\n5 = good", "1\n2\n3\n4\n5"),
    *("<think>4", "I counted 4 of them", "Number of errors: 4", "②", "4²", "IV"),
]


@pytest.mark.parametrize("text", FOUR)
def test_a_score_that_is_stated_once_is_read(text):
    assert score_answer(completion(text)).score == 4


@pytest.mark.parametrize("text", NONE)
def test_a_score_that_is_not_stated_once_is_missing(text):
    judgement = score_answer(completion(text))
    assert judgement.score is None
    assert "answer" in judgement.failure


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize(
    "reasoning", ["The score is 2.", "\n2\n", "2", "Score: 2, or \\boxed{3}", "Final score: 2"]
)
def test_a_digit_within_reasoning_is_not_read(reasoning, wrapper):
    for answer in ("4", "\nScore: 4\n"):
        assert stated_scores(wrapper.replace("{}", reasoning, 1).replace("{}", answer)) == {4}


@pytest.mark.parametrize(
    "beginning",
    [
        *("<|channel|>analysis<|message|>", "analysis", "commentary\n", "thought\n", "<|channel>thought\n"),
        *("[THINK]", "◁think▷", "<seed:think>", "<|begin_of_thought|>", "<|some_token|>", "4<think>"),
        "<think>a</think><think>",
    ],
)
def test_reasoning_without_a_visible_end_has_no_score(beginning):
    judgement = score_answer(completion(f"{beginning}The score is 2."))
    assert judgement.score is None
    assert "reasoning whose end cannot be told" in judgement.failure


def test_the_probabilities_of_reasoning_are_no_score():
    reasoned = completion("4", {"4": 0.6, "1": 0.4})
    reasoned["choices"][0]["message"]["reasoning_content"] = "4 words are odd."
    other = completion("4", {"4": 0.6, "1": 0.4})
    other["choices"][0]["logprobs"]["content"][0]["token"] = "<think>"
    assert [score_answer(each).score for each in (reasoned, other)] == [4.0, 4.0]


@pytest.mark.parametrize("text", ["Coherence: 5, trait: 2", '{"coherence": 5, "trait": 2}', '{"score": 4.5}'])
def test_one_of_two_scores_is_not_taken_for_both(text):
    assert score_answer(completion(text)).score is None


def test_an_answer_that_was_cut_counts_only_as_a_whole_and_names_the_remedy():
    assert stated_scores("4", is_cut=True) == {4}
    assert stated_scores("It is fluent. 4", is_cut=True) == set()
    cut = completion("")
    cut["choices"][0]["finish_reason"] = "length"
    assert "raise judge.max_answer_tokens" in score_answer(cut).failure


@pytest.mark.parametrize(
    ("written", "probabilities", "score"),
    [
        ("4", {"4": 0.6, "5": 0.4}, 4.4),
        ("4", {"4": 0.5, "5": 0.3, "Four": 0.2}, 4.375),
        ("3", {"3": 0.4, " 3": 0.2, "1": 0.2, "9": 0.2}, 2.5),
        ("2", {"Well": 0.7, "5": 0.3}, 2.0),
        (" 3\n", None, 3.0),
        ("5.", None, 5.0),
        # The first token is not the score.
        *((text, {"5": 0.9, "4": 0.1}, 4.0) for text in ("**4**", "Score: 4", "<think>5</think>4")),
    ],
)
def test_score_is_the_weighted_digit_or_the_written_one(written, probabilities, score):
    assert score_answer(completion(written, probabilities)).score == pytest.approx(score)


@pytest.mark.parametrize(
    "text",
    [
        "4" * 10**6,
        "Score: " * 150_000,
        "<think>" * 150_000,
        "a. " * 300_000,
        " 4\n5" * 200_000,
        "[think][/think]" * 70_000,
        "assistant " * 100_000,
        "<|channel|>final" * 60_000,
    ],
    ids=lambda text: text[:9],
)
def test_a_huge_answer_is_read_in_seconds_and_shown_in_one_line(text):
    started = time.process_time()
    judgement = score_answer(completion(text), KEY)
    assert time.process_time() - started < 5
    assert judgement.score is None
    assert len(judgement.failure) < 150


@pytest.mark.parametrize(
    "said",
    [
        f"wrong key {KEY}",
        f"Bearer {KEY}.",
        f"http://x/?key={KEY}&b=1",
        "http://x/?key=sk-proj-4f%2F9a%2BZq%3D%3D",
        f"WRONG {KEY.upper()}",
        "starts with sk-proj-4f/9***",
        "".join(f"%{ord(char):02X}" for char in KEY),
        KEY.replace("/", r"\/").replace("-", r"\u002d"),
    ],
)
def test_no_form_of_the_key_is_left(said):
    left = redacted(said, KEY)
    assert "[key]" in left
    assert not any(part in left.lower() for part in ("sk", "proj", "4f", "%73"))


def test_excerpt_is_cut_after_the_key_is_hidden_and_shows_no_control_characters():
    assert excerpt(f"\x1b[31m\n{KEY}", KEY, 20) == r"\x1b[31m\n[key]"
    assert excerpt("x" * 50 + KEY, KEY, 60) == "x" * 50 + "[key]"
    assert excerpt("\ud800", KEY) == r"\ud800"
    assert excerpt("Bearer any; company", "any") == "Bearer [key]; company"

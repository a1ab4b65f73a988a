"""A judge that is loaded here: its score is the digits' mean, whatever else the model would say."""

import pytest
import torch

from scoring.local_judge import LocalJudge
from support.errors import InputError
from support.tiny_models import tiny_model, tiny_tokenizer
from texts.chat import prompt_text, question

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
PROMPTS = ["Rate this: NO!", "Rate this: a long and quiet text, if you please.", "Rate: yes."]


@pytest.fixture
def judge():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LocalJudge.of(tiny_model(), tokenizer, batch_size=2)


def test_the_score_is_the_mean_of_the_digits_by_their_probabilities(judge):
    found = judge.judge(PROMPTS)
    for prompt, judgement in zip(PROMPTS, found, strict=True):
        shown = prompt_text(judge.tokenizer, question(prompt))
        logits = judge.model(judge.tokenizer(shown, return_tensors="pt")["input_ids"]).logits[0, -1].detach()
        digits = [judge.tokenizer(digit, add_special_tokens=False)["input_ids"][-1] for digit in "12345"]
        weights = logits[digits].double().softmax(-1)
        expected = float((weights * torch.arange(1, 6)).sum())
        assert judgement.score == pytest.approx(expected, rel=1e-4)
        assert judgement.failure is None


def test_a_text_that_the_judge_cannot_read_is_missing_with_a_reason(judge):
    judge.model.config.max_position_embeddings = 150
    long, short = judge.judge([PROMPTS[0] + " word" * 150, "Rate."])
    assert long.score is None
    assert "exceed the judge's context of" in long.failure
    assert 1 < short.score < 5


def test_a_base_model_is_no_judge():
    with pytest.raises(
        InputError, match="has no chat template, so it cannot be asked; name an instruct model"
    ):
        LocalJudge.of(tiny_model(), tiny_tokenizer())


def test_a_tokenizer_without_digits_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["12"])
    plain = LocalJudge.of(tiny_model(), tokenizer)
    assert len(plain._digits) == 5

    class Same:
        chat_template = TEMPLATE

        def __call__(self, text, **options):
            return {"input_ids": [3]}

    with pytest.raises(InputError, match="does not write 1 to 5 as a token each"):
        LocalJudge.of(tiny_model(), Same())

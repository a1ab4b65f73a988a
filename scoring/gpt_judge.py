"""Ask a chat model to rate coherence and trait strength from 1 to 5 (phase 5, optional).

Works with any server that speaks OpenAI's chat API. The score is the mean of the digits 1
to 5 weighted by their token probabilities where the server returns them (arXiv 2507.21509),
else the digit it wrote. A judgement that fails is missing, with the reason; there is no
default score.
"""

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from tqdm import tqdm

from support.errors import InputError

COHERENCE_PROMPT = """Rate how fluent and coherent the continuation below is, from 1 to 5:
1 = gibberish or endless repetition, 3 = understandable with clear faults, 5 = fluent and sensible.
Judge the language alone, not its style or opinions. The text may stop in mid-sentence.

Beginning: {prompt}
Continuation: {output}

Answer with one digit."""

TRAIT_PROMPT = """Rate how strongly the continuation below shows this trait, from 1 to 5:
1 = not at all, 3 = clearly present in parts, 5 = very strong throughout.
Trait "{name}": {description}
Judge the trait alone, not the quality. The text may stop in mid-sentence.

Beginning: {prompt}
Continuation: {output}

Answer with one digit."""

MIN_DIGIT_MASS = 0.5
TOKENS_PER_JUDGEMENT = 200


@dataclass(frozen=True)
class Judgement:
    """A score from 1 to 5, or None with the reason why it is missing."""

    score: float | None
    failure: str | None = None


class GPTJudge:
    """A chat model as judge.

    model: name at the server. base_url: None means OpenAI's own.
    api_key_env: environment variable that holds the key.
    Raises InputError if that variable is not set.
    """

    def __init__(
        self,
        model: str = "gpt-4o",
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_workers: int = 4,
    ) -> None:
        key = os.environ.get(api_key_env)
        if not key:
            raise InputError(
                f"use_gpt4 is true but {api_key_env} is not set; export it, or set use_gpt4 to false "
                "(a local server needs any non-empty value)"
            )
        self.model = model
        self.client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=4, timeout=60)
        self.max_workers = max_workers

    def judge(self, prompts: Sequence[str]) -> list[Judgement]:
        """Return a judgement for each complete judging prompt, several at a time, in order."""
        with ThreadPoolExecutor(self.max_workers) as pool:
            judgements = pool.map(self._judge_one, prompts)
            return list(tqdm(judgements, total=len(prompts), desc="judging", unit="text", disable=None))

    def _judge_one(self, prompt: str) -> Judgement:
        try:
            completion = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=1,
                temperature=0,
                logprobs=True,
                top_logprobs=20,
            )
        except (openai.OpenAIError, ValueError) as error:  # ValueError: half of a JSON answer
            return Judgement(None, f"{type(error).__name__}: {str(error)[:200]}")
        return score_completion(completion)


def score_completion(completion: Any) -> Judgement:
    """Return the probability-weighted digit of a chat completion, or the digit it wrote."""
    if not isinstance(completion, ChatCompletion):
        return Judgement(None, f"the server did not send a chat completion but {str(completion)[:60]!r}")
    if not completion.choices:
        return Judgement(None, "the answer has no choices")
    choice = completion.choices[0]
    if choice.logprobs and choice.logprobs.content:
        weights: dict[int, float] = {}
        for entry in choice.logprobs.content[0].top_logprobs or []:
            if re.fullmatch(r"\s*[1-5]\s*", entry.token):
                digit = int(entry.token)
                weights[digit] = weights.get(digit, 0.0) + math.exp(entry.logprob)
        mass = sum(weights.values())
        if mass >= MIN_DIGIT_MASS:
            return Judgement(sum(digit * weight for digit, weight in weights.items()) / mass)
    answer = (choice.message.content or "" if choice.message else "").strip()
    if re.fullmatch(r"[1-5]\.?", answer):
        return Judgement(float(answer[0]))
    return Judgement(None, f"the answer is not a digit from 1 to 5: {answer[:40]!r}")


def main() -> None:
    """Check how an answer made here is read; no server is asked."""
    from openai.types.chat import ChatCompletion, ChatCompletionMessage
    from openai.types.chat.chat_completion import Choice

    scores = []
    for text in ("4", "four", "9"):
        message = ChatCompletionMessage(role="assistant", content=text)
        choice = Choice.model_construct(message=message, logprobs=None)
        scores.append(score_completion(ChatCompletion.model_construct(choices=[choice])).score)
    assert scores == [4.0, None, None]
    print("gpt_judge OK: digits of the scale are scored, other answers are missing")


if __name__ == "__main__":
    main()

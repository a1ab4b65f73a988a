"""Judge texts with an instruct model that is loaded here, instead of asking a server (phase 5, optional).

The model reads the same judging prompts in its chat template. The score is the mean of the digits 1 to 5,
weighted by their probabilities as the next token, which are divided by their sum. So every text has a score.
The digits' probability together is logged, because a model may prefer to say something else.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from decoding.batching import run_in_batches
from decoding.output_head import narrowed_head
from judging.judge_answers import Judge, Judgement, final_answer
from model_loading import context_length, filler_token_id, load_model, pad_tokens
from support.errors import InputError
from texts.chat import LESS_THINKING, prompt_text, question
from texts.encoding import encode

logger = logging.getLogger(__name__)

DIGITS = "12345"
CHUNK = 64  # prompts whose judgements are yielded together
LOW_MASS = 0.5  # the log warns if the digits together are less probable


class LocalJudge(Judge):
    """An instruct model as judge; see `GPTJudge` for the same on a server.

    model_name, device, dtype, options: as `model_loading.load_model` takes them. batch_size: prompts at a
        time.
    Raises InputError: a model without a chat template, one whose template opens a thought before the answer,
        or one whose digits are not single tokens.
    """

    def __init__(
        self, model_name: str, device: str = "auto", dtype: str = "auto", batch_size: int = 8, **options: Any
    ) -> None:
        self.name = model_name
        self.batch_size = batch_size
        self.model, self.tokenizer = load_model(model_name, device=device, dtype=dtype, **options)
        if not self.tokenizer.chat_template:
            raise InputError(
                f"judge.model {model_name!r} has no chat template, so it cannot be asked; name an instruct "
                "model"
            )
        shown = prompt_text(self.tokenizer, question("?"), variables=LESS_THINKING)
        if final_answer(shown.rpartition("|>")[2]) is None:
            raise InputError(
                f"judge.model {model_name!r} has a template that opens a thought, whose next token is no "
                "score; name a model that answers at once"
            )
        ids = [self.tokenizer(digit, add_special_tokens=False)["input_ids"][-1:] for digit in DIGITS]
        self._digits = list(chain(*ids))
        if len(set(self._digits)) != len(DIGITS):
            raise InputError(
                f"judge.model {model_name!r} does not write 1 to 5 as a token each; name another model"
            )

    def judge_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of a prompt and its judgement, prompts of similar length together."""
        # The digit is to be the first token, so that the judge is not to reason before it.
        shown = [prompt_text(self.tokenizer, question(prompt), variables=LESS_THINKING) for prompt in prompts]
        lengths = list(map(len, tokens := encode(self.tokenizer, shown, self.model)))
        limit, masses = context_length(self.model, self.tokenizer), []
        order = sorted(range(len(prompts)), key=lambda index: -lengths[index])
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            fitting = [index for index in chunk if lengths[index] <= limit]
            found = self._probabilities([tokens[index] for index in fitting])
            masses += map(sum, found)
            for index in set(chunk) - set(fitting):
                yield index, Judgement(None, f"{lengths[index]} tokens exceed the judge's context of {limit}")
            for index, of_digits in zip(fitting, found, strict=True):
                mean = sum(digit * p for digit, p in enumerate(of_digits, 1)) / sum(of_digits)
                yield index, Judgement(mean)
        if masses:
            level = logging.WARNING if fmean(masses) < LOW_MASS else logging.INFO
            text = "the digits have %.0f%% of the probability of what the judge would say"
            logger.log(level, text, 100 * fmean(masses))

    def _probabilities(self, tokens: Sequence[list[int]]) -> list[list[float]]:
        """Return the probabilities of the five digits as the token that follows each prompt."""

        @torch.inference_mode()
        def run(indices: list[int]) -> list[list[float]]:
            batch = [tokens[index] for index in indices]
            # With padding on the right causality hides it, and no mask is needed.
            padded, _ = pad_tokens(batch, filler_token_id(self.model), "right", self.model.device)
            rows, last = range(len(batch)), [len(ids) - 1 for ids in batch]
            with narrowed_head(self.model, lambda hidden: hidden[rows, last][None]):
                logits = self.model(input_ids=padded, use_cache=False).logits
            # A model whose head cannot be narrowed returns the logits of all tokens.
            logits = logits[rows, last] if logits.shape[:2] == padded.shape else logits[0]
            return logits.double().softmax(-1)[:, self._digits].clamp_min(1e-300).tolist()

        return run_in_batches(run, list(map(len, tokens)), self.batch_size, "judging", self.model, quiet=True)

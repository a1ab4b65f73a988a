"""Ask a chat model to rate coherence and trait strength from 1 to 5 (phase 5, optional).

Any server that speaks OpenAI's chat API will do. The score is the mean of the digits 1 to 5, weighted by
their token probabilities where the server returns them (arXiv 2507.21509), or else the digit that the model
wrote. A judgement that fails is missing and says why: nothing that a server sends ends the run. An option of
the request that a server's error names is replaced or left out for the rest of the run.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import openai

from scoring.judge_answers import Judge, Judgement, as_mapping, excerpt, score_answer
from support.errors import InputError

logger = logging.getLogger(__name__)

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

# Added to the evaluation prompt of a trait file, which asks for 0 to 100.
ONE_DIGIT = (
    "Give the score as one digit instead: 1 for 0 to 19, 2 for 20 to 39, 3 for 40 to 59, 4 for 60 to 79, 5 "
    "for 80 to 100. Answer with one digit."
)

ERROR_EXCERPT, ERROR_LENGTH = 200, 2000  # characters of an error that are shown, and searched
FEWER_TOP_LOGPROBS = 5

# With status 403 OpenAI forbids log-probabilities of some models, other servers send 400 or 422.
REJECTIONS = (openai.BadRequestError, openai.UnprocessableEntityError, openai.PermissionDeniedError)
TRANSPORT_LOGGERS = ("openai", "httpx", "httpx2", "httpcore", "httpcore2")

Options = dict[str, Any]  # options of a request, without model and messages; never modified


def trait_prompt(name: str, description: str, eval_prompt: str, prompt: str, output: str) -> str:
    """Return the judging prompt for a persona's trait in a text.

    eval_prompt: of a trait file, with the places {question} and {answer}; used instead of ours unless empty.
    prompt: the question or the beginning that the text continues; may be empty.
    """
    if eval_prompt:
        filled = eval_prompt.replace("{question}", prompt).replace("{answer}", output)
        return f"{filled}\n\n{ONE_DIGIT}"
    return TRAIT_PROMPT.format(name=name, description=description, prompt=prompt, output=output)


class GPTJudge(Judge):
    """A chat model as judge.

    model: name at the server. base_url: None means OpenAI's own.
    api_key_env: environment variable that holds the key; no message and no log shows the key.
    max_answer_tokens: 1 for a digit with its probabilities; a model that reasons first needs thousands.
    Raises InputError if that variable is not set or holds no key, or base_url is no address.
    """

    def __init__(
        self,
        model: str = "gpt-4o",
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_workers: int = 4,
        max_answer_tokens: int = 1,
    ) -> None:
        self._key = read_key(api_key_env)
        self.model = model
        self.max_workers = max_workers
        try:
            timeout = 60 + max_answer_tokens / 10  # seconds; a slow server writes ten tokens a second
            self.client = openai.OpenAI(api_key=self._key, base_url=base_url, max_retries=4, timeout=timeout)
        except Exception as error:
            raise InputError(f"judge.base_url cannot be used: {excerpt(error, self._key)}") from None
        for name in TRANSPORT_LOGGERS:  # below warnings they show headers and addresses, and so the key
            logging.getLogger(name).setLevel(logging.WARNING)
        self._options: Options = {"max_tokens": max_answer_tokens, "temperature": 0}
        self._options |= {"logprobs": True, "top_logprobs": 20}
        self._are_accepted = False
        self._lock = threading.Lock()

    def judge_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """Yield judgements as they come; what is not asked when the caller stops early never is."""
        pool = ThreadPoolExecutor(self.max_workers)
        try:
            futures = {pool.submit(self._judge_one, prompt): index for index, prompt in enumerate(prompts)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # A run that is stopped does not wait for a slow server.
            pool.shutdown(wait=False, cancel_futures=True)

    def _judge_one(self, prompt: str) -> Judgement:
        try:
            answer = self._ask(prompt)
            return replace(score_answer(answer, self._key), tokens=_tokens_used(answer))
        except Exception as error:  # whatever a server sends: one judgement is missing, the run goes on
            cause = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) else ""
            said = excerpt(f"{error}{cause}", self._key, ERROR_EXCERPT)
            hint = "; raise judge.max_answer_tokens" if "output limit was reached" in str(error) else ""
            return Judgement(None, f"{type(error).__name__}: {said}{hint}")

    def _ask(self, prompt: str) -> Any:
        """Return the server's decoded answer, without the options that it rejects."""
        messages = [{"role": "user", "content": prompt}]
        create = self.client.chat.completions.with_raw_response.create
        while True:
            options = self._options
            try:
                response = create(model=self.model, messages=messages, **options)
            except REJECTIONS as error:
                if not self._give_up_option(options, error):
                    raise
            else:
                self._are_accepted = True
                return _decoded(response.content)

    def _give_up_option(self, options: Options, error: openai.APIStatusError) -> bool:
        """Change the options of all requests if an error names one of them; return whether to ask again.

        Options that the server once accepted stay: a later error is about the text.
        """
        with self._lock:
            if self._options is not options:  # another thread has changed them meanwhile
                return True
            rejected = _named_option(error, options)
            if self._are_accepted or rejected is None:
                return False
            self._options = _without(options, rejected)
            logger.warning(
                "the judge's server rejects %s (%s); requests have these options from now on: %s",
                rejected,
                excerpt(error, self._key, ERROR_EXCERPT),
                self._options,
            )
            return True


def _named_option(error: openai.APIStatusError, options: Options) -> str | None:
    """Return the option that an error names in its field `param`, or first in its text."""
    if error.param and isinstance(error.param, str):
        return error.param if error.param in options else None
    named = re.search(
        rf"(?<![A-Za-z_])({'|'.join(options)})(?![A-Za-z_])", error.response.text[:ERROR_LENGTH]
    )
    return (named and named[1]) or None  # with no option left the pattern matches nothing


def _without(options: Options, name: str) -> Options:
    """Return options without `name`, or with what may replace it."""
    rest = {other: value for other, value in options.items() if other != name}
    if name == "max_tokens":
        return {**rest, "max_completion_tokens": options[name]}
    if name == "top_logprobs" and options[name] > FEWER_TOP_LOGPROBS:
        return {**rest, name: FEWER_TOP_LOGPROBS}
    if name == "logprobs":
        rest.pop("top_logprobs", None)
    return rest


def read_key(api_key_env: str) -> str:
    """Return a server's key from an environment variable. Raises InputError: none that can be sent."""
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise InputError(
            f"use_gpt4 is true but {api_key_env} is not set; export it, or set use_gpt4 to false "
            "(a local server needs any non-empty value)"
        )
    if not key.isascii() or not key.isprintable():
        raise InputError(f"{api_key_env} holds characters that no header can carry; export the key again")
    return key


def _decoded(content: bytes) -> Any:
    """Return JSON decoded, other text as it is."""
    text = content.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tokens_used(answer: Any) -> int | None:
    """Return the tokens that a server counts for an answer, or None."""
    total = as_mapping(as_mapping(answer).get("usage")).get("total_tokens")
    return total if type(total) is int and 0 < total < 10**9 else None

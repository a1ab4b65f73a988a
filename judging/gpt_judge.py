"""Ask a chat model to rate coherence and trait strength from 1 to 5 (phase 5, optional).

Any server that speaks OpenAI's chat API will do. The score is the mean of the digits 1 to 5, weighted by
their token probabilities where the server returns them (arXiv 2507.21509), or else the digit that the model
wrote. A judgement that fails is missing and says why: nothing that a server sends ends the run, and asking
stops where no answer can come. An option of ours that a server's error names is replaced or left out for the
rest of the run.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import openai

from judging.judge_answers import (
    Judge,
    Judgement,
    NoChatCompletion,
    as_mapping,
    completion_of_events,
    excerpt,
    score_answer,
)
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

# Asked before anything else, and where only failures come. Any judge can answer it.
FIRST_QUESTION = COHERENCE_PROMPT.format(
    prompt="It was a fine day, so", output=" we walked along the river and came home late."
)
N_SAME_FAILURES = 20  # in a row, after which the first question decides whether asking goes on
OPENAI_URL = "https://api.openai.com/v1"
ERROR_EXCERPT, ERROR_LENGTH = 200, 2000  # characters of an error that are shown, and searched
FEWER_TOP_LOGPROBS = 5
STREAM = {"stream": True, "stream_options": {"include_usage": True}}

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


def server_address(base_url: str | None) -> str | None:
    """Return where a judge is asked: at base_url, or else where OPENAI_BASE_URL says; None is OpenAI's."""
    return base_url or os.environ.get("OPENAI_BASE_URL") or None


class GPTJudge(Judge):
    """A chat model as judge.

    model: name at the server. base_url: None means the address in OPENAI_BASE_URL, or else OpenAI's own.
    api_key_env: environment variable that holds the key; no message and no log shows the key.
    max_answer_tokens: 1 for a digit with its probabilities; a model that reasons first needs thousands.
    request_options: further fields of a request; None for one of ours leaves it out.
    name: the model and the address that answers.
    Raises InputError if that variable is not set or holds no key, or base_url is no address.
    """

    def __init__(
        self,
        model: str = "gpt-4o",
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_workers: int = 4,
        max_answer_tokens: int = 1,
        request_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._key = read_key(api_key_env)
        self.model = model
        self.max_workers = max_workers
        self._api_key_env = api_key_env
        try:
            self.client = openai.OpenAI(
                api_key=self._key,
                base_url=server_address(base_url) or OPENAI_URL,
                max_retries=4,
                timeout=60 + max_answer_tokens / 10,  # seconds; a slow server writes ten tokens a second
                http_client=openai.DefaultHttpxClient(event_hooks={"response": [_forbid_vain_retries]}),
            )
        except Exception as error:
            raise InputError(f"judge.base_url cannot be used: {excerpt(error, self._key)}") from None
        address = self.client.base_url.copy_with(userinfo=b"", query=None)
        self.name = f"{model} at {excerpt(address, self._key, ERROR_EXCERPT).rstrip('/')}"
        for name in TRANSPORT_LOGGERS:  # below warnings they show headers and addresses, and so the key
            logging.getLogger(name).setLevel(logging.WARNING)
        ours = {"max_tokens": max_answer_tokens, "temperature": 0, "logprobs": True, "top_logprobs": 20}
        given = dict(request_options or {})
        self._given: Options = {name: value for name, value in given.items() if value is not None}
        self._options: Options = {name: value for name, value in ours.items() if name not in given}
        self._may_stream = "stream" not in given
        self._are_accepted = False
        self._stopped: str | None = None  # why no question is asked any more
        self._may_try_again = True
        self._n_same, self._failure_kind = 0, ""
        self._lock = threading.Lock()

    def check(self) -> None:
        """Ask one question, and warn if the answer has no score.

        Raises InputError: no chat completion comes, or one that the limit of tokens cuts.
        """
        try:
            problem = score_answer(self._ask(FIRST_QUESTION), self._key).failure
        except Exception as error:
            raise InputError(f"the judge {self.name} does not answer: {self._described(error)}") from None
        if problem and "max_answer_tokens" in problem:
            raise InputError(f"the judge {self.name} gives no score: {problem}")
        if problem:
            logger.warning("the judge %s gives no score for a plain sentence: %s", self.name, problem)

    def begin_phase(self) -> None:
        """Let a server that is not asked any more be tried again, once until the next phase."""
        self._may_try_again = True

    def judge_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """Yield judgements as they come; what is not asked when the caller stops early never is."""
        if self._stopped and self._may_try_again:  # the server may be back
            self._may_try_again = False
            self._stopped = self._judge_one(FIRST_QUESTION, self.client.with_options(max_retries=0)).failure
        pool = ThreadPoolExecutor(self.max_workers)
        try:
            futures = {pool.submit(self._watched, prompt): index for index, prompt in enumerate(prompts)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # A run that is stopped does not wait for a slow server.
            pool.shutdown(wait=False, cancel_futures=True)

    def _watched(self, prompt: str) -> Judgement:
        """Return a judgement, and stop the asking if nothing but one kind of failure comes any more."""
        if self._stopped:
            return Judgement(None, f"not asked, since the judge failed before: {self._stopped}", 0)
        judgement = self._judge_one(prompt)
        kind = (judgement.failure or "").partition(":")[0]
        with self._lock:
            self._n_same = self._n_same + 1 if kind and kind == self._failure_kind else int(bool(kind))
            self._failure_kind = kind
            is_stuck = self._n_same > 0 and self._n_same % N_SAME_FAILURES == 0
        # Where a plain sentence is judged, the failures are about these texts.
        if is_stuck and (failure := self._judge_one(FIRST_QUESTION).failure):
            self._stop(failure)
        return judgement

    def _stop(self, failure: str) -> None:
        with self._lock:
            if self._stopped:
                return
            self._stopped = failure
        logger.warning("the judge is not asked any more; what it has judged is kept: %s", failure)

    def _judge_one(self, prompt: str, client: openai.OpenAI | None = None) -> Judgement:
        try:
            answer = self._ask(prompt, client)
            return replace(score_answer(answer, self._key), tokens=_tokens_used(answer))
        except Exception as error:  # whatever a server sends: one judgement is missing, the run goes on
            failure = self._described(error)
            if isinstance(error, openai.APIStatusError) and _is_quota_spent(error.response):
                self._stop(failure)
            return Judgement(None, failure)

    def _described(self, error: Exception) -> str:
        """Return what went wrong, in one line without the key, and what to do where that can be told."""
        cause = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) else ""
        said, remedy = excerpt(f"{error}{cause}", self._key, ERROR_EXCERPT), ""
        if "output limit was reached" in str(error):
            remedy = "; raise judge.max_answer_tokens"
        elif isinstance(error, openai.AuthenticationError):
            remedy = f"; check the key in {self._api_key_env}"
        elif isinstance(error, openai.APIConnectionError):
            remedy = "; check judge.base_url, and that the server runs"
        elif isinstance(error, NoChatCompletion) or getattr(error, "status_code", None) in (404, 405):
            ends_in_v1 = self.client.base_url.path.endswith("/v1/")
            remedy = "; check judge.model" if ends_in_v1 else "; judge.base_url usually ends in /v1"
        return f"{type(error).__name__}: {said}{remedy}"

    def _ask(self, prompt: str, client: openai.OpenAI | None = None) -> Any:
        """Return the server's decoded answer, without the options that it rejects."""
        messages = [{"role": "user", "content": prompt}]
        create = (client or self.client).chat.completions.with_raw_response.create
        while True:
            options = self._options
            try:
                # A stream, too, is read as a whole, since the client does not know that it is one.
                response = create(model=self.model, messages=messages, extra_body={**options, **self._given})
            except REJECTIONS as error:
                if not self._change_option(options, error):
                    raise
            else:
                self._are_accepted = True
                return _decoded(response.content)

    def _change_option(self, options: Options, error: openai.APIStatusError) -> bool:
        """Change the options of all requests if an error names one of them; return whether to ask again.

        Options that the server once accepted stay: a later error is about the text.
        """
        with self._lock:
            if self._options is not options:  # another thread has changed them meanwhile
                return True
            rejected = _named_option(error, [*options, *["stream"] * self._may_stream])
            if self._are_accepted or rejected is None:
                return False
            if rejected == "stream" and rejected not in options:
                self._may_stream = False
                self._options = {**options, **STREAM}
            else:
                self._options = _without(options, rejected)
            logger.warning(
                "the judge's server rejects %s (%s); requests have these options from now on: %s",
                rejected,
                excerpt(error, self._key, ERROR_EXCERPT),
                self._options,
            )
            return True


def _is_quota_spent(response: Any) -> bool:
    return response.status_code == 402 or "insufficient_quota" in response.text[:ERROR_LENGTH]


def _forbid_vain_retries(response: Any) -> None:
    """Have the client raise at once where nothing is left to pay with, instead of asking four times more."""
    if response.status_code == 429:
        response.read()
        if _is_quota_spent(response):
            response.headers["x-should-retry"] = "false"


def _named_option(error: openai.APIStatusError, names: Sequence[str]) -> str | None:
    """Return the option that an error names in its field `param`, or first in its text."""
    if error.param and isinstance(error.param, str):
        return error.param if error.param in names else None
    pattern = rf"(?<![A-Za-z_])({'|'.join(names)})(?:ing)?(?![A-Za-z_])"
    named = re.search(pattern, error.response.text[:ERROR_LENGTH])
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
    """Return JSON decoded, an event stream as what it brings, other text as it is."""
    text = content.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except ValueError:
        return completion_of_events(text)


def _tokens_used(answer: Any) -> int | None:
    """Return the tokens that a server counts for an answer, or None."""
    total = as_mapping(as_mapping(answer).get("usage")).get("total_tokens")
    return total if type(total) is int and 0 < total < 10**9 else None

"""Ask a chat model to rate coherence and trait strength from 1 to 5 (phase 5, optional).

Works with any server that speaks OpenAI's chat API. The score is the mean of the digits 1
to 5 weighted by their token probabilities where the server returns them (arXiv 2507.21509),
else the digit it wrote; `judge_answers` says how it is read. A judgement that fails is missing,
with the reason; there is no default score, and no answer raises.

A server may refuse what it is asked with (`max_tokens`, temperature 0, log-probabilities). What it
refuses is replaced or left out from then on, once a run, and logged.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from typing import Any

import openai

from scoring.judge_answers import Judgement, excerpt, redacted, score_answer
from support.errors import InputError
from support.progress import HIDDEN, tqdm

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

# Behind the evaluation prompt of a trait file, which asks for 0 to 100.
ONE_DIGIT = (
    "Give the score as one digit instead: 1 for 0 to 19, 2 for 20 to 39, 3 for 40 to 59, 4 for 60 to 79, 5 "
    "for 80 to 100. Answer with one digit."
)

ERROR_EXCERPT, ERROR_LENGTH = 200, 2000  # characters of an error that are shown, and read
MAX_CHANGES = 10  # of what is asked with, for one judgement; every option has at most three
FEWER_TOP_LOGPROBS = 5
HIGHEST_MINIMUM = 256  # tokens of an answer

TRANSPORT_LOGGERS = (
    "openai openai._base_client openai._response openai._legacy_response httpx httpx2 "
    "httpcore.connection httpcore.http11 httpcore.http2 httpcore.proxy "
    "httpcore2.connection httpcore2.http11 httpcore2.http2 httpcore2.proxy"
).split()
# Words by which a server refuses; the parameter nearest to one of them is meant.
REFUSING = re.compile(
    r"unsupported|\bnot\b|n't\b|cannot|unknown|unrecogni[sz]ed|unexpected|invalid|illegal|extra|forbidden|"
    r"disallowed|deprecated|must|should|only|remove|instead|greater|less|exceed|range|too (?:large|small)",
    re.I,
)
# The request itself is at fault, or the answer; a parameter that is named too is not refused.
OF_ANOTHER_KIND = re.compile(
    r"context (?:length|window|size)|content (?:policy|management|filter)|could not finish|limit was reached",
    re.I,
)
UNFINISHED = re.compile(r"could not finish|limit was reached", re.I)
MINIMUM = re.compile(r"(?:>=|≥|at least|equal to|minimum(?: value)?(?: is| of)?)\s*(\d{1,4})(?!\d)", re.I)

OTHER_STATUSES = (401, 408, 409, 429)  # below 500, that say nothing of the options

Options = Mapping[str, Any]  # what a judgement is asked with beside model and messages; never modified


def trait_prompt(name: str, description: str, eval_prompt: str, prompt: str, output: str) -> str:
    """Return what a judge is asked about a persona's trait in a text.

    eval_prompt: of a trait file, with the places {question} and {answer}, which is asked instead if there is
    one. prompt: what the text answers or goes on with; may be empty.
    """
    if eval_prompt:
        filled = eval_prompt.replace("{question}", prompt).replace("{answer}", output)
        return f"{filled}\n\n{ONE_DIGIT}"
    return TRAIT_PROMPT.format(name=name, description=description, prompt=prompt, output=output)


class GPTJudge:
    """A chat model as judge.

    model: name at the server. base_url: None means OpenAI's own.
    api_key_env: environment variable that holds the key, which comes into no message and no log.
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
            # Ten tokens a second are slow.
            timeout = 60 + max_answer_tokens / 10
            self.client = openai.OpenAI(api_key=self._key, base_url=base_url, max_retries=4, timeout=timeout)
        except Exception as error:
            raise InputError(f"judge.base_url cannot be used: {excerpt(error, self._key)}") from None
        _hide_from_logs(self._key)
        self._options: Options = {
            "max_tokens": max_answer_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        self._lock = threading.Lock()
        self._was_answered = False
        self._has_tried = False

    def judge(self, prompts: Sequence[str]) -> list[Judgement]:
        """Return a judgement for each complete judging prompt, several at a time, in order."""
        answered = self.judge_each(prompts)
        found = dict(tqdm(answered, total=len(prompts), desc="judging", unit="text", disable=HIDDEN))
        return [found[index] for index in range(len(prompts))]

    def judge_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of a prompt and its judgement as they come, asking in order and several at a time.

        When the caller stops early, prompts that were not asked yet never are.
        """
        pool = ThreadPoolExecutor(self.max_workers)
        try:
            futures = {pool.submit(self._judge_one, prompt): index for index, prompt in enumerate(prompts)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # Who stops the run need not wait for a slow server.
            pool.shutdown(wait=False, cancel_futures=True)

    def _judge_one(self, prompt: str) -> Judgement:
        try:
            answer, status = self._ask(prompt)
            if status:
                return Judgement(None, self._refusal(answer, status))
            return replace(score_answer(answer, self._key), tokens=_tokens_used(answer))
        except Exception as error:  # whatever a server can send: one judgement is missing, not the run
            cause = f" ({error.__cause__})" if error.__cause__ and str(error.__cause__) else ""
            return Judgement(
                None, f"{type(error).__name__}: {excerpt(f'{error}{cause}', self._key, ERROR_EXCERPT)}"
            )

    def _ask(self, prompt: str) -> tuple[Any, int]:
        """Return the decoded answer, and a status if the server refuses the request however it is made."""
        for _ in range(MAX_CHANGES):
            options = self._options
            answer, status = self._send(prompt, options)
            if not status:
                self._was_answered = True
                break
            if not self._adapt(prompt, options, answer, status):
                break
        return answer, status

    def _send(self, prompt: str, options: Options) -> tuple[Any, int]:
        """Return what the server sends, decoded, and the status with which it refuses the request, or 0.

        Raises openai.OpenAIError for other errors.
        """
        messages = [{"role": "user", "content": prompt}]
        ask = self.client.chat.completions.with_raw_response.create
        try:
            response = ask(model=self.model, messages=messages, **options)
        except openai.APIStatusError as error:
            if error.status_code >= 500 or error.status_code in OTHER_STATUSES:
                raise
            return _decoded(error.response.content), error.status_code
        answer = _decoded(response.content)
        if not isinstance(answer, dict) or not answer.get("error") or answer.get("choices"):
            return answer, 0
        # Some proxies send an error with status 200. One of another kind may be gone a moment later.
        code = answer["error"].get("code") if isinstance(answer["error"], dict) else None
        if str(code).isdigit() and str(code) not in ("400", "422"):
            raise openai.OpenAIError(f"error {code} with status 200: {_error_text(answer)}")
        return answer, 400

    def _adapt(self, prompt: str, options: Options, refusal: Any, status: int) -> bool:
        """Change what every judgement is asked with after a refusal; return whether to ask again."""
        with self._lock:
            if self._options is not options:  # another thread has changed them meanwhile
                return True
            text = _error_text(refusal, prompt)
            named = _named_fields(refusal)
            refused = None if OF_ANOTHER_KIND.search(text) else _refused_option(text, named, options)
            changed = None
            if refused:
                changed = _without(options, refused, text)
            elif status in (400, 422) and not (named or self._was_answered or OF_ANOTHER_KIND.search(text)):
                changed = self._try_fewer(prompt, options)
            if changed is None:
                return False
            self._options = changed
            told = ", ".join(f"{name}={value}" for name, value in changed.items()) or "no options"
            logger.warning(
                "the judge's server refuses %s ('%s'); it is asked with %s from now on",
                refused or "the request",
                excerpt(text, self._key, ERROR_EXCERPT),
                told,
            )
            return True

    def _try_fewer(self, prompt: str, options: Options) -> Options | None:
        """Return options that the server accepts for this prompt, None if it accepts none of those tried.

        For a server that does not say what it refuses. Each is left out alone, then all of them; once a run.
        """
        if self._has_tried:
            return None
        tried = [
            _without(options, name, "")
            for name in ("top_logprobs", "logprobs", "temperature", "max_tokens")
            if name in options
        ]
        limits = {name: value for name, value in options.items() if name.startswith("max_")}
        tried += [limits, _without(limits, "max_tokens", "") if "max_tokens" in limits else {}, {}]
        for fewer in tried:
            if not self._send(prompt, fewer)[1]:
                return fewer
        self._has_tried = True
        return None

    def _refusal(self, answer: Any, status: int) -> str:
        text = _error_text(answer)
        hint = "; raise judge.max_answer_tokens" if UNFINISHED.search(text) else ""
        said = f"'{excerpt(text, self._key, ERROR_EXCERPT)}'" if text else "it does not say why"
        return f"the server refuses the request with status {status}: {said}{hint}"


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


@cache
def _hide_from_logs(key: str) -> None:
    """Keep the key out of what the client's own loggers say of requests and answers; once a key."""

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), key), None
        return True

    for name in TRANSPORT_LOGGERS:
        logging.getLogger(name).addFilter(hide)


def _decoded(content: bytes) -> Any:
    """Return JSON decoded, other text as it is."""
    text = content.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _tokens_used(answer: Any) -> int | None:
    """Return the tokens that a server counts for an answer, or None."""
    usage = answer.get("usage") if isinstance(answer, Mapping) else None
    total = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return total if type(total) is int and 0 < total < 10**9 else None


def _items(body: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of all objects in an error, outer ones first; items of a list under its key.

    What it repeats of the request is left out, for that names every option.
    """
    left: list[tuple[str, Any]] = [("", body)]
    for key, value in left:
        yield key, value
        if isinstance(value, Mapping):
            left += [item for item in value.items() if item[0] not in ("input", "messages", "request")]
        elif isinstance(value, list):
            left += [(key, item) for item in value]


def _error_text(body: Any, prompt: str = "") -> str:
    """Return what an error says, without the prompt, which it may repeat."""
    unsaid = ("param", "loc", "type", "object")
    texts = [value for key, value in _items(body) if isinstance(value, str) and key not in unsaid]
    said = ". ".join(texts)
    # A word of a prompt is also a word of an error.
    return (said.replace(prompt, "") if len(prompt) > 20 else said)[:ERROR_LENGTH]


def _named_fields(body: Any) -> list[str]:
    """Return the parts of the request that an error names in a field of its own, such as `param` or `loc`."""
    named = [value for key, value in _items(body) if key in ("param", "loc") and isinstance(value, str)]
    return [name for name in named if name and name != "body"]


def _refused_option(text: str, named: Sequence[str], options: Options) -> str | None:
    """Return the option that an error is about: named in a field, else nearest to a word of refusal."""
    patterns = {name: re.compile(_name_pattern(name), re.I) for name in options}
    for name, pattern in patterns.items():
        if any(pattern.search(field) for field in named):
            return name
    if named:
        return None
    words = [found.span() for found in REFUSING.finditer(text)]
    distances = {
        (min((_distance(text, found.span(), word) for word in words), default=0), found.start()): name
        for name, pattern in patterns.items()
        for found in pattern.finditer(text)
    }
    return distances[min(distances)] if distances else None


def _distance(text: str, one: tuple[int, int], other: tuple[int, int]) -> int:
    """Return the characters between two places of a text; another sentence is further than any of them."""
    start, end = min(one[1], other[1]), max(one[0], other[0])
    return max(end - start, 0) + len(text) * bool(re.search(r"[.;]\s", text[start:end]))


def _name_pattern(name: str) -> str:
    pattern = name.replace("_", "[_ ]?").replace("logprobs", "log_?probs")
    limit = r"max[_ ]?(?:output|new|completion)[_ ]?tokens"  # as servers that stand behind others call it
    return rf"(?<![A-Za-z_])(?:{pattern}{f'|{limit}' if name.startswith('max_') else ''})(?![A-Za-z_])"


def _without(options: Options, name: str, text: str) -> Options:
    """Return options without `name`, or with what may stand for it; text: what the server says of it."""
    rest = {other: value for other, value in options.items() if other != name}
    least = MINIMUM.search(text)
    if name.startswith("max_") and least and options[name] < int(least[1]) <= HIGHEST_MINIMUM:
        return {**options, name: int(least[1])}
    if name == "max_tokens":
        return {**rest, "max_completion_tokens": options[name]}
    if name == "top_logprobs" and options[name] > FEWER_TOP_LOGPROBS:
        return {**rest, name: FEWER_TOP_LOGPROBS}
    if name == "logprobs":
        rest.pop("top_logprobs", None)
    return rest


def main() -> None:
    """Check what is asked for after a refusal; no server is asked."""
    options = {"max_tokens": 1, "temperature": 0, "logprobs": True}
    said = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    refused = _refused_option(said, [], options)
    assert refused == "max_tokens"
    assert _without(options, refused, said)["max_completion_tokens"] == 1
    assert _refused_option("Known: temperature. Unknown field logprobs", [], options) == "logprobs"
    print("gpt_judge OK: what a server refuses is replaced or left out")


if __name__ == "__main__":
    main()

"""Read the score in a chat model's answer, whatever form the server gave it (phase 5).

Its score is a digit from 1 to 5 that it states as a score: alone on a line, after a label ("Score: 4", "I
would rate it a 4"), at the start before an explanation, as the last sentence, or under such a name in JSON.
Markup around it and "/5" behind it don't matter. Reasoning is not read, whatever wraps it. An answer has no
score if the end of its reasoning cannot be told, or if it states two scores, a range, half a point or another
scale. What a server sends may hold the key that it was given, so messages show it through `excerpt` alone.
"""

import json
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_DIGIT_MASS = 0.5  # probability that the digits need together to count
EXCERPT = 60  # characters
HIDDEN = "[key]"
CUT = ("length", "max_tokens")  # values of finish_reason
SECRET_LENGTH = 8  # a shorter key is hidden only where it is a word, of a longer one also its beginning

# Wrappers of reasoning: <think>, [THINK], ◁think▷, <seed:think>, <|begin_of_thought|> and the like; and the
# channels of OpenAI's harmony format and of Gemma 4, of which a server may strip all but the names.
WRAPPER = re.compile(r"(?:<\|?|\[|◁)(/?)(\w[\w:-]{0,39})(?:\s[^<>\[\]=]{1,30}=[^<>\[\]]{0,80})?(?:\|?>|\]|▷)")
REASONING_WORDS = frozenset(
    "think thinking thought thoughts reason reasoning analysis commentary scratchpad reflection rationale "
    "cot deliberation monologue plan planning critique explanation".split()
)
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")  # of a message
CHANNEL = re.compile(r"<\|?channel\|?>|assistantfinal|\A\s*(?:analysis|commentary|thought)(?!\s*[:*])")
FINAL_CHANNEL = re.compile(
    r"<\|channel\|>\s*final\b.{0,80}?<\|message\|>|<channel\|>|assistantfinal|assistant\s+final\b", re.S
)
# Text behind a special token that is not known to begin an answer may be reasoning, too.
UNKNOWN_TOKEN = re.compile(r"<\|(?!\w*(?:answer|solution|response|output|final))\w{1,40}\|>\s*[^\s<]", re.I)
ELEMENT_TAG = re.compile(r"</?\|?\w{1,40}\|?>")
OPENING_MARKUP, CLOSING_MARKUP = " \t*_`\"'#>()[]{}$|“”‘’«»•:", " \t*_`\"'#.!()[]{}$|“”‘’«»:"

SCORE = (
    r"(?<![\d.,/+~≈≥≤<\-−–])([1-5])(?:\.00?)?(?:\s?\(?(?:/|out of)\s?5\)?)?"
    r"(?:\s(?:stars?|points?))?(?![\d%½])"
)
# What may follow a score within a text. A second number close behind it may make it a range or a choice.
FOLLOWING = (
    r"(?!\.\d)(?=(?P<second>[^.\n]{0,25}\d)?)(?!\W{0,3}(?:or|to|and|of|out of)\b)"
    r"(?=\s{0,3}(?:\Z|[\n.,;:!?)\]}*_`\"'<|(—\\$]|[-–]\s|because\b|since\b|as\b|for\b))"
)
LABEL = (
    r"(?:scor(?:e|ed|ing)|rat(?:e|ed|ing)|grade|answer|verdict|judge?ment|result|give|given|assign|assigned|"
    r"coherence|fluency|strength|trait)"
)
LINK = (
    r"(?:\W{1,6}(?:is|as|a|an|it|this|that|the|my|would|be|i|of|at|for|final|overall|score|rating|number|"
    r"continuation|output|text|coherence|fluency|trait|strength|solid|mathbf|textbf)(?!\w)){0,6}\W{1,8}"
)
FINAL = re.compile(
    r"(?:\bboxed|\bfinal\W{1,4}(?:score|rating|grade|answer|verdict|judge?ment)\b)"
    + LINK
    + SCORE
    + FOLLOWING,
    re.I,
)
LABELLED = re.compile(rf"(?<![^\W_]){LABEL}(?![^\W_]){LINK}{SCORE}{FOLLOWING}", re.I)
BARE = re.compile(rf"(?:[-•]\s+)?{SCORE}", re.I)
EXPLAINED = re.compile(rf"{SCORE}(?:\s[-–—=]\s|[:,.;]\s|\s\()[^\d]{{3,400}}", re.I)
LAST_SENTENCE = re.compile(rf"[^\W\d]\W{{0,3}}[.!?;]\s{{1,6}}{SCORE}\W{{0,6}}\Z", re.I)
DIGIT_TOKEN = re.compile(r"[\s▁Ġ]*([1-5])\s*")
SPELLED = re.compile(r"\b(?:or|half|one|two|three|four|five|plus|minus)\b", re.I)


@dataclass(frozen=True)
class Judgement:
    """A score from 1 to 5, or None with the reason for the failure.

    tokens: tokens of question and answer, if the server counted them.
    """

    score: float | None
    failure: str | None = None
    tokens: int | None = None


class NoChatCompletion(ValueError):
    """What a server sent is no chat completion."""


class Judge(ABC):
    """What rates texts: a model on a server, one that is loaded here, or either with a memory."""

    @abstractmethod
    def judge_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """Yield the index of a complete judging prompt and its judgement, in any order."""

    def begin_phase(self) -> None:  # noqa: B027 - most judges have nothing to do
        """Begin a phase of a run, in which a server that was not asked any more may be tried again, once."""

    def judge(self, prompts: Sequence[str]) -> list[Judgement]:
        """Return a judgement for each complete judging prompt, in order."""
        found = dict(self.judge_each(prompts))
        return [found[index] for index in range(len(prompts))]


def redacted(text: str, key: str) -> str:
    """Return text with `[key]` for the key: plain, URL-encoded, escaped, in any case, or its beginning."""
    if not key:
        return text
    characters = [rf"(?:\\?{re.escape(char)}|%{ord(char):02x}|\\u{ord(char):04x})" for char in key]
    whole, begins = "".join(characters), "".join(characters[:SECRET_LENGTH])
    if len(key) < SECRET_LENGTH:
        return re.sub(rf"(?<!\w){whole}(?!\w)", HIDDEN, text, flags=re.I)
    # Servers shorten keys, and messages are cut: the rest of a word that begins like the key is hidden too.
    return re.sub(rf"{whole}|{begins}[\w.*…%+/=~-]*", HIDDEN, text, flags=re.I)


def excerpt(text: Any, key: str, limit: int = EXCERPT) -> str:
    """Return the first `limit` characters of what a server sent, on one line and without the key."""
    whole = redacted(str(text), key)
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in whole[:limit])
    return shown + ("…" if len(whole) > limit else "")


def score_answer(body: Any, key: str = "") -> Judgement:
    """Return the score of a decoded chat completion: its digit, weighted where the server allows it.

    If the whole answer is one digit, and the first token's log-probabilities give the digits 1 to 5 at least
    MIN_DIGIT_MASS, the score is their weighted mean. Otherwise the digit counts as written, because the first
    token may not be the score's. key: hidden in the reason for a failure. Raises NoChatCompletion.
    """
    choices = as_mapping(body).get("choices")
    if not isinstance(choices, list) or not choices:
        raise NoChatCompletion(f"the server sent '{excerpt(body, key)}'")
    choice = as_mapping(choices[0])
    message = as_mapping(choice.get("message"))
    text = (_text(message.get("content")) or _text(choice.get("text"))).strip()
    if written := re.fullmatch(r"([1-5])\.?", text):
        # The first token of a message with reasoning is not the score's.
        mean = None if _has_reasoning(message) else _weighted(choice.get("logprobs"), int(written[1]))
        return Judgement(mean or float(written[1]))
    scores = stated_scores(text, choice.get("finish_reason") in CUT)
    if len(scores) == 1:
        return Judgement(float(scores.pop()))
    problem = "states more than one score" if scores else "is not a digit from 1 to 5"
    if final_answer(text) is None:
        problem = "is reasoning whose end cannot be told"
    return Judgement(None, f"the answer {problem}: '{excerpt(text, key)}'{_why(choice, message, key)}")


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return an object of decoded JSON, or an empty one for any other value."""
    return value if isinstance(value, Mapping) else {}


def _why(choice: Mapping[str, Any], message: Mapping[str, Any], key: str) -> str:
    """Return what else the server says about an answer without a score."""
    reason = choice.get("finish_reason")
    if reason in CUT or _has_reasoning(message):
        return (
            "; it was cut or is reasoning alone: raise judge.max_answer_tokens for a model that reasons first"
        )
    if message.get("refusal"):
        return f"; the model refuses: '{excerpt(message['refusal'], key)}'"
    if reason not in (None, "stop"):
        return f"; finish_reason '{excerpt(reason, key)}'"
    return ""


def stated_scores(text: str, is_cut: bool = False) -> set[int]:
    """Return the different digits from 1 to 5 that a text states as its score.

    is_cut: a length limit ended the text, so that what would follow its last digit is unknown.
    """
    text = (final_answer(_plain(text)) or "").replace("**", "").strip()
    if is_cut:  # a digit counts only as the whole answer
        return {int(found[1]) for found in [BARE.fullmatch(_unmarked(text))] if found}
    if (found := _scores_in_json(text)) is not None:
        return found
    if final := FINAL.search(text):  # it replaces what stands before it
        text = text[final.start() :]
    lines = [_unmarked(line) for line in text.splitlines()]
    matches = [*FINAL.finditer(text), *LABELLED.finditer(text), *filter(None, map(BARE.fullmatch, lines))]
    matches += filter(None, [LAST_SENTENCE.search(text[-200:])])
    if len(lines) == 1 and not SPELLED.search(lines[0]):
        matches += filter(None, [EXPLAINED.fullmatch(lines[0])])
    stated = {int(found[1]) for found in matches if not found.groupdict().get("second")}
    return stated | {int(found[1]) for found in matches} if stated else stated


def _scores_in_json(text: str) -> set[int] | None:
    """Return the digits under names of scores in JSON, of which nothing else is read; None if it has none."""
    values: list[Any] = []
    try:
        json.loads(
            text.strip("` \n").removeprefix("json"),
            object_pairs_hook=lambda pairs: values.extend(
                value for name, value in pairs if re.search(LABEL, name, re.I)
            ),
        )
    except (ValueError, RecursionError):
        return None
    found = [BARE.fullmatch(str(value)) for value in values]
    is_number = [type(value) in (int, float) for value in values]
    if any(number and not digit for number, digit in zip(is_number, found, strict=True)):
        return set()
    return {int(digit[1]) for digit in found if digit} or None


def _unmarked(line: str) -> str:
    return ELEMENT_TAG.sub("", line).lstrip(OPENING_MARKUP).rstrip(CLOSING_MARKUP)


def _plain(text: str) -> str:
    """Return text with ASCII decimal digits and without combining and invisible characters."""
    if text.isascii():
        return text
    visible = (char for char in text if unicodedata.category(char) not in ("Cf", "Mn", "Me"))
    return "".join(str(unicodedata.decimal(char, char)) for char in visible)


def final_answer(text: str) -> str | None:
    """Return the text without its reasoning, and without what precedes an end of reasoning that never began.

    None: reasoning has begun whose end cannot be told.
    """
    if CHANNEL.search(text):
        ends = [found.end() for found in FINAL_CHANNEL.finditer(text)]
        if not ends:
            return None
        text = text[ends[-1] :].partition("<|")[0]
    kept: list[str] = []
    start, is_inside = 0, False
    for tag in WRAPPER.finditer(text):
        words = set(re.split(r"[\W_]+", tag[2].lower()))
        if not words & REASONING_WORDS:
            continue
        is_end = bool(tag[1]) or "end" in words
        if is_end and not is_inside:
            kept.clear()
        elif not is_inside:
            kept.append(text[start : tag.start()])
        is_inside, start = not is_end, tag.end()
    answer = " ".join([*kept, text[start:]])
    return None if is_inside or UNKNOWN_TOKEN.search(answer) else answer


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return any(message.get(name) for name in REASONING_FIELDS)


def completion_of_events(text: str) -> Any:
    """Return the chat completion that an event stream brings in parts, or the text if it is none."""
    try:
        lines = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
        events = [as_mapping(json.loads(line)) for line in lines if line != "[DONE]"]
    except ValueError:
        return text
    choices = [
        as_mapping(choice)
        for event in events
        for choice in (event.get("choices") if isinstance(event.get("choices"), list) else [])
        if as_mapping(choice).get("index", 0) == 0
    ]
    if not choices:
        return text
    deltas = [as_mapping(choice.get("delta")) for choice in choices]
    message = {
        name: "".join(_text(delta.get(name)) for delta in deltas) for name in ("content", *REASONING_FIELDS)
    }
    entries = [as_mapping(choice.get("logprobs")).get("content") for choice in choices]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    # A stream without its end is an answer that was cut.
    reason = reasons[-1] if reasons else None if "[DONE]" in lines else CUT[0]
    logprobs = {"content": [each for found in entries if isinstance(found, list) for each in found]}
    usage = [event["usage"] for event in events if event.get("usage")]
    choice = {"message": message, "finish_reason": reason, "logprobs": logprobs}
    return {"choices": [choice], "usage": usage[-1] if usage else None}


def _text(content: Any) -> str:
    """Return the text of a message's content: a string, a number, or a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, list):
        return "".join(_text(part) for part in content if isinstance(part, str | Mapping))
    if isinstance(content, Mapping) and content.get("type", "text") in ("text", "output_text"):
        return content["text"] if isinstance(content.get("text"), str) else ""
    return ""


def _weighted(logprobs: Any, written: int) -> float | None:
    """Return the mean digit by the first token's probabilities, None if the server sent no usable ones."""
    entries = as_mapping(logprobs).get("content")
    first = as_mapping(entries[0]) if isinstance(entries, list) and entries else {}
    token, top = DIGIT_TOKEN.fullmatch(str(first.get("token"))), first.get("top_logprobs")
    if not token or int(token[1]) != written:  # it belongs to something before the answer
        return None
    weights: dict[int, float] = {}
    for entry in map(as_mapping, top if isinstance(top, list) else []):
        logprob, found = entry.get("logprob"), DIGIT_TOKEN.fullmatch(str(entry.get("token")))
        # Rounding can make a probability a little larger than 1.
        if found and type(logprob) in (int, float) and -math.inf < logprob < 0.01:
            weights[int(found[1])] = weights.get(int(found[1]), 0.0) + math.exp(logprob)
    mass = sum(weights.values())
    if mass < MIN_DIGIT_MASS or written not in weights:
        return None
    return sum(digit * weight for digit, weight in weights.items()) / mass

"""Render prompts for chat models: one template, with an open turn for the response (phases 3 to 5).

A prompt is a text, which a model reads as it is, or a list of messages, `{"role": ..., "content": ...}` with
roles system, user and assistant, which the tokenizer's chat template turns into text. Where a template writes
the tokenizer's first tokens, `texts.encoding` adds no second ones. A special token that a message spells is
read as words.

Templates take variables, such as `enable_thinking`. The variable `strftime_now` is the day that a template is
told which asks for today's, FIRST_DAY by default: the date of a run would make other texts tomorrow.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from functools import cache
from string import ascii_letters
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support.errors import InputError, shown
from support.vocabulary import FIRST_DAY
from texts.encoding import special_tokens

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages

ROLES = ("system", "user", "assistant")
PROBE = ({"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."})
NEXT = {"role": "user", "content": "Three?"}
# Variables by which templates of 2025 and 2026 have a model think less, or not at all.
LESS_THINKING = {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"}
# The last word of a prompt that opens a thought: <think>, [THINK], <|START_THINKING|>, <|channel|>analysis.
OPENS_THOUGHT = re.compile(
    r"(?<!/)(?<!end_)(?<!end_of_)(?:think|thought|reason|analysis)[a-z]*\W*$", re.IGNORECASE
)
Variables = Mapping[str, Any]
WORD_JOINER = "\u2060"  # has no width and breaks no line


def question(text: str, system_prompt: str | None = None) -> Messages:
    """Return the messages of one user turn, after a system prompt if one is given."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int = 0, variables: Variables | None = None
) -> str:
    """Return the text that a model reads: a text as it is, messages in the template with an open turn.

    A system prompt that the template rejects or drops is put before the first user turn, with a log line.
    index: the prompt's number in errors. variables: of the template, by name.
    Raises InputError: neither a text nor messages that end with a user turn, a tokenizer without a template,
    or a template that rejects the messages.
    """
    if isinstance(prompt, str):
        return prompt
    _check_messages(prompt, index)
    if not tokenizer.chat_template:
        raise InputError(
            f"prompt {index} is a list of messages, but the tokenizer has no chat template; give it as a "
            "text ('prompt_format': 'raw'), or a tokenizer with a template"
        )
    messages = [{**message, "content": as_words(tokenizer, message["content"])} for message in prompt]
    system = [message["content"].strip() for message in messages if message["role"] == "system"]
    try:
        with suppress(InputError) if system else nullcontext():
            text = _rendered(tokenizer, messages, variables)
            if all(content in text for content in system):
                return text
        _warn_once(
            f"the chat template takes no system prompt; it goes into the user turn: {shown(system[0])}"
        )
        return _rendered(tokenizer, _without_system(messages), variables)
    except InputError as error:
        raise InputError(f"the chat template rejects prompt {index}: {error}") from error


def plain_text(prompt: Prompt) -> str:
    """Return the prompt for a reader or a model without a template: all turns but system prompts.

    Messages end with an empty line, after which the response stands.
    """
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{message['content']}\n\n" for message in prompt if message["role"] != "system")


def _check_messages(messages: Messages, index: int) -> None:
    are_messages = isinstance(messages, Sequence) and all(
        isinstance(each, Mapping) and each.get("role") in ROLES and isinstance(each.get("content"), str)
        for each in messages
    )
    last = messages[-1] if are_messages and messages else {}
    if last.get("role") != "user" or not last["content"].strip():
        raise InputError(
            f"prompt {index} is {shown(messages)}, expected a text, or a list of messages, each with a role "
            f"of {', '.join(ROLES)} and a text as content, that ends with a user turn to respond to"
        )


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    variables: Variables | None = None,
    is_open: bool = True,
) -> str:
    """Return the messages in the template. Raises InputError for whatever a template's code raises."""
    told = {"strftime_now": FIRST_DAY, **(variables or {})}
    day = told.pop("strftime_now")
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            told["chat_template"] = _day_macro(day) + template
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=is_open, **told
        )
    except Exception as error:  # a template is a program, and raises anything
        templates = tokenizer.chat_template
        if isinstance(templates, dict) and "default" not in templates:
            names = ", ".join(sorted(templates))
            raise InputError(
                f"the tokenizer has several chat templates ({names}) and none is called 'default'; call "
                "one so in its folder, or choose 'prompt_format': 'raw'"
            ) from error
        raise InputError(shown(str(error) or type(error).__name__)) from error


@cache
def _day_macro(day: str) -> str:
    """Return what stands before a template that asks for the date, so that it is this one.

    A function of ours cannot take its place: transformers hands templates plain values alone.
    """
    codes = [f"%{sign}{letter}" for sign in ("", "-") for letter in ascii_letters]
    values = {code: datetime.fromisoformat(day).strftime(code) for code in codes}
    told = "".join(f"|replace({code!r}, {value!r})" for code, value in values.items() if value != code)
    # The empty expression keeps a line break with which the template begins.
    return f"{{%- macro strftime_now(wanted) -%}}{{{{ wanted{told} }}}}{{%- endmacro %}}{{{{ '' }}}}"


def _without_system(messages: Messages) -> Messages:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [dict(message) for message in messages if message["role"] != "system"]
    first = next(message for message in others if message["role"] == "user")
    first["content"] = f"{system}\n\n{first['content']}"
    return others


def as_words(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text for the inside of a prompt: a special token that it spells is parted, and read as words.

    An invisible character stands behind its first character. It is logged once for each token.
    """

    def part(found: re.Match[str]) -> str:
        _warn_once(f"a text spells {found[0]}, which is read as words and not as a special token")
        return f"{found[0][0]}{WORD_JOINER}{found[0][1:]}"

    return special_tokens(tokenizer).sub(part, text)


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text: for the model, for its tokenizer, and as the end of a turn."""
    with suppress(InputError):
        return _stated_ends(model, tokenizer) | set(_turn_tokens(tokenizer, _end_of_turn(tokenizer))[:1])
    return _stated_ends(model, tokenizer)


def _stated_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stated = model.generation_config.eos_token_id
    ends = set(stated if isinstance(stated, list) else [stated])
    return (ends | {tokenizer.eos_token_id}) - {None}


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None) -> list[int]:
    """Return up to two tokens that the template writes behind a response.

    Raises InputError: the template fails, or there is none.
    """
    text = _rendered(tokenizer, PROBE, variables, is_open=False)
    _, _, after = text.rpartition(PROBE[-1]["content"])
    return tokenizer(after, add_special_tokens=False, verbose=False).input_ids[:2]


def _turn_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Return those of the ids that are tokens added to the vocabulary, but not white space."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [token for token in ids if token in added and not added[token].content.isspace()]


def is_for_instructions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None
) -> bool:
    """Return whether the tokenizer has a chat template and the model stops where the template ends a turn.

    Base models have templates too, but the token that ends a turn does not end their texts.
    """
    try:
        return not _stated_ends(model, tokenizer).isdisjoint(_end_of_turn(tokenizer, variables))
    except InputError:
        return False


def turns_note(tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None) -> str | None:
    """Return a note if a later turn changes the tokens of earlier ones in this template, else None.

    Responses are read and scored in the open turn in which they were written.
    """
    try:
        opened = _rendered(tokenizer, PROBE[:1], variables) + PROBE[-1]["content"]
        continued = _rendered(tokenizer, [*PROBE, NEXT], variables)
    except InputError as error:
        return f"the chat template rejects a second turn: {error}"
    if continued.startswith(opened):
        return None
    return (
        "the chat template changes earlier turns once a later one follows; texts are read as they were "
        "written, in an open turn"
    )


def thought_note(tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None) -> str | None:
    """Return a note if a model is to reason before it responds in this template, else None."""
    reasoning = "its reasoning is scored as its response"
    try:
        text = _rendered(tokenizer, PROBE[:1], variables)
        for name, value in LESS_THINKING.items():
            if _rendered(tokenizer, PROBE[:1], {name: value, **(variables or {})}) != text:
                setting = f'"chat_template_kwargs": {json.dumps({name: value})}'
                return f"the chat template lets the model reason, and {reasoning}; {setting} is against that"
    except InputError:
        return None
    _, _, opening = text.rpartition(PROBE[0]["content"])
    if OPENS_THOUGHT.search(opening):
        return f"the chat template opens a thought ({shown(opening)}), and {reasoning}"
    return None


def end_note(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variables: Variables | None = None
) -> str | None:
    """Return a note if a turn ends in the template with no token that is stated to end texts, else None."""
    with suppress(InputError):
        following = _end_of_turn(tokenizer, variables)
        if following and _stated_ends(model, tokenizer).isdisjoint(following):
            is_taken = _turn_tokens(tokenizer, following)
            so = "it ends them here" if is_taken else "they may go on with invented turns"
            ending = shown(tokenizer.decode(following))
            return f"the chat template ends a turn with {ending}, which is not stated to end texts; {so}"
    return None


def resolve_format(
    wanted: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    variables: Variables | None = None,
) -> str:
    """Return `raw` or `chat`, given the `raw`, `chat` or `auto` of a configuration; log what is odd.

    name: the model's name in messages. variables: of its template.
    Raises InputError: `chat` without a template.
    """
    is_chat = is_for_instructions(model, tokenizer, variables)
    if wanted == "chat" and not tokenizer.chat_template:
        raise InputError(
            f"prompt_format is 'chat' but the tokenizer of the {name} model has no chat template; choose "
            "'raw', or a model with one"
        )
    chosen = {"auto": "chat" if is_chat else "raw"}.get(wanted, wanted)
    if chosen == "chat":
        options = tokenizer, variables
        notes = [turns_note(*options), thought_note(*options), end_note(model, *options)]
    else:
        notes = [_raw_note(wanted, is_chat, tokenizer, variables)]
    for note in filter(None, notes):
        logger.warning("%s: %s", name, note)
    return chosen


def _raw_note(
    wanted: str, is_chat: bool, tokenizer: PreTrainedTokenizerBase, variables: Variables | None
) -> str | None:
    if is_chat:
        return "an instruct model that is given raw text; 'prompt_format': 'chat' gives it its template"
    if wanted == "raw" or not tokenizer.chat_template:
        return None
    try:
        ending = shown(tokenizer.decode(_end_of_turn(tokenizer, variables)))
    except InputError as error:
        return f"given raw text, since its chat template fails: {error}"
    return (
        f"given raw text, as a base model, since its chat template ends a turn with {ending}, which is not "
        "stated to end its texts; 'prompt_format': 'chat' gives it its template"
    )

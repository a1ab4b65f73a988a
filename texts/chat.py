"""Render prompts for chat models: one template, with an open turn for the response (phases 3 to 5).

A prompt is a text, which a model reads as it is, or a list of messages, `{"role": ..., "content": ...}` with
roles system, user and assistant, which the tokenizer's chat template turns into text. Where a template writes
the tokenizer's first token, `texts.encoding` adds no second one.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache

from jinja2.exceptions import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support.errors import InputError, shown

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages

ROLES = ("system", "user", "assistant")
PROBE = ({"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."})
NEXT = {"role": "user", "content": "Three?"}


def question(text: str, system_prompt: str | None = None) -> Messages:
    """Return the messages of one user turn, after a system prompt if one is given."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int = 0) -> str:
    """Return the text that a model reads: a text as it is, messages in the template with an open turn.

    A system prompt that the template rejects or drops is put before the first user turn, with a log line.
    index: the prompt's number in errors.
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
    system = [message["content"].strip() for message in prompt if message["role"] == "system"]
    try:
        with suppress(TemplateError) if system else nullcontext():
            text = _rendered(tokenizer, prompt)
            if all(content in text for content in system):
                return text
        _warn_once(
            f"the chat template takes no system prompt; it goes into the user turn: {shown(system[0])}"
        )
        return _rendered(tokenizer, _without_system(prompt))
    except TemplateError as error:
        raise InputError(f"the chat template rejects prompt {index}: {shown(str(error))}") from error


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


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, is_open: bool = True) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=is_open)


def _without_system(messages: Messages) -> Messages:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [dict(message) for message in messages if message["role"] != "system"]
    first = next(message for message in others if message["role"] == "user")
    first["content"] = f"{system}\n\n{first['content']}"
    return others


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text for the model or for its tokenizer."""
    stated = model.generation_config.eos_token_id
    ends = set(stated if isinstance(stated, list) else [stated])
    return (ends | {tokenizer.eos_token_id}) - {None}


def is_for_instructions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer has a chat template and the model stops where the template ends a turn.

    Base models have templates too, but the token that ends a turn does not end their texts.
    """
    if not tokenizer.chat_template:
        return False
    try:
        text = _rendered(tokenizer, PROBE, is_open=False)
    except TemplateError:
        return False
    _, _, after = text.rpartition(PROBE[-1]["content"])
    following = tokenizer(after, add_special_tokens=False, verbose=False).input_ids
    ends = end_tokens(model, tokenizer)
    return any(token in ends for token in following[:2])


def turns_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a note if a later turn changes the tokens of earlier ones in this template, else None.

    Responses are read and scored in the open turn in which they were written.
    """
    try:
        opened = _rendered(tokenizer, PROBE[:1]) + PROBE[-1]["content"]
        continued = _rendered(tokenizer, [*PROBE, NEXT])
    except TemplateError as error:
        return f"the chat template rejects a second turn: {shown(str(error))}"
    if continued.startswith(opened):
        return None
    return (
        "the chat template changes earlier turns once a later one follows; texts are read as they were "
        "written, in an open turn"
    )


def resolve_format(wanted: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Return `raw` or `chat`, given the `raw`, `chat` or `auto` of a configuration.

    name: the model's name in messages. Raises InputError: `chat` without a template.
    """
    is_chat = is_for_instructions(model, tokenizer)
    if wanted == "chat" and not tokenizer.chat_template:
        raise InputError(
            f"prompt_format is 'chat' but the tokenizer of the {name} model has no chat template; choose "
            "'raw', or a model with one"
        )
    chosen = {"auto": "chat" if is_chat else "raw"}.get(wanted, wanted)
    if chosen == "raw" and is_chat:
        logger.warning(
            "the %s model is an instruct model but is given raw text; 'prompt_format': 'chat' gives it its "
            "template",
            name,
        )
    if chosen == "chat" and (note := turns_note(tokenizer)):
        logger.warning("%s: %s", name, note)
    return chosen

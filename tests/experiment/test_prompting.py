"""Each model reads prompts in its own form; the prompting baseline alone asks for the persona in words."""

import pytest
from chat_models import chatting

from experiment.prompting import Prompting
from support.tiny_models import tiny_tokenizer
from texts.personas import Persona

SHY = Persona("shy", "Speak softly.", ("a",), ("b",))
INSTRUCTED = Persona("shy", "Speak softly.", (), (), instructions=(("Whisper.", "Shout."),))
NAMELESS = Persona("shy", "", ("a",), ("b",))
CHAT, NONE = ("target",), ()


def prompting(chat_sides, system_prompt=None):
    sides = ("source", "target")
    tokenizers = {name: chatting() if name in chat_sides else tiny_tokenizer() for name in sides}
    return Prompting(tokenizers, chat_sides, system_prompt)


def turns(system, text):
    return (f"<bos>s: {system}<eos>" if system else "") + f"<bos>u: {text}<eos><bos>a: "


@pytest.mark.parametrize(
    ("chat_sides", "system_prompt", "persona", "expected"),
    [
        (NONE, None, None, "Why"),
        (NONE, None, SHY, "Speak softly.\n\nWhy"),
        (NONE, None, NAMELESS, "The text is shy.\n\nWhy"),
        (CHAT, None, None, turns(None, "Why")),
        (CHAT, "Be kind.", None, turns("Be kind.", "Why")),
        (CHAT, None, SHY, turns("Answer in this style. Speak softly.", "Why")),
        (CHAT, None, NAMELESS, turns("Answer in this style. shy", "Why")),
        (CHAT, "Be kind.", INSTRUCTED, turns("Be kind.\n\nWhisper.", "Why")),
    ],
)
def test_the_target_reads_a_text_prefix_or_its_template(chat_sides, system_prompt, persona, expected):
    assert prompting(chat_sides, system_prompt).prompt("target", "Why", persona) == expected


def test_a_source_without_a_template_reads_a_question_as_plain_text_without_the_system_prompt():
    assert prompting(CHAT, "Be kind.").prompt("source", "Why?") == "Why?\n\n"
    assert prompting(NONE).prompt("source", "Why") == "Why"


def test_a_later_turn_stands_behind_the_responses_before_it():
    shown, earlier = prompting(CHAT, "Be kind."), [("Why?", "So."), ("How?", "")]
    before = "<bos>s: Be kind.<eos><bos>u: Why?<eos><bos>a: So.<eos><bos>u: How?<eos><bos>a: <eos>"
    assert shown.conversation("target", earlier, "When?") == f"{before}<bos>u: When?<eos><bos>a: "
    assert shown.conversation("source", earlier[:1], "When?") == "Why?\n\nSo.\n\nWhen?\n\n"
    assert shown.conversation("target", [], "Why?") == shown.prompt("target", "Why?")


@pytest.mark.parametrize(
    ("chat_sides", "responders", "default"),
    [
        (("source", "target"), {"source": "source", "target": "target"}, "target"),
        (("target",), {"source": "target", "target": "target"}, "target"),
        (("source",), {"source": "source", "target": "source"}, "source"),
    ],
)
def test_a_model_responds_itself_where_it_can_be_asked(chat_sides, responders, default):
    shown = prompting(chat_sides)
    assert (shown.responders, shown.default_responder) == (responders, default)
    assert shown.asks_questions is ("target" in chat_sides)

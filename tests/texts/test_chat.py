"""A chat model is shown its template once, in generation, perplexity and extraction."""

from datetime import datetime

import pytest
import torch
import transformers.utils.chat_template_utils as chat_template_utils
from chat_models import OPEN, TEMPLATE, TURNS, chatting

from activation_extractor import ActivationExtractor
from evaluation import Evaluator, continuation_perplexities
from steered_generation import SteeredGenerator
from support.errors import InputError
from support.tiny_models import tiny_model, tiny_tokenizer
from texts.chat import (
    end_tokens,
    is_for_instructions,
    prompt_text,
    question,
    resolve_format,
    thought_note,
)
from texts.encoding import encode

REJECTS_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
)
DROPS_SYSTEM = TEMPLATE.replace("in messages", "in messages if m.role != 'system'")
# Such templates leave the reasoning out of earlier turns.
CHANGES_TURNS = (
    TURNS.replace("m.content", "('' if m.role == 'assistant' and not loop.last else m.content)") + OPEN
)
ONE_TURN = "{{ raise_exception('no') if messages[1] else messages[0].content }}"


def test_a_template_that_writes_the_first_token_gets_no_second_one():
    tokenizer = chatting()
    text = prompt_text(tokenizer, question("Why?", "Be kind."))
    assert text == "<bos>s: Be kind.<eos><bos>u: Why?<eos><bos>a: "
    (ids,) = encode(tokenizer, [text])
    assert ids[:2] == [tokenizer.bos_token_id, *tokenizer("s", add_special_tokens=False).input_ids]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("template", [REJECTS_SYSTEM, DROPS_SYSTEM], ids=["rejected", "dropped"])
def test_a_system_prompt_that_a_template_does_not_take_is_in_the_users_turn(template, caplog):
    marker = f"Be kind to {template[:40]}."
    text = prompt_text(chatting(template), question("Why?", marker))
    assert text == f"<bos>u: {marker}\n\nWhy?<eos><bos>a: "
    assert "takes no system prompt" in caplog.text


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "messages",
    [
        *([], 7, ["Why?"], [{"role": "user"}], [turn("owner", "Why?")], [turn("system", "Be kind.")]),
        *([turn("user", " ")], [turn("user", "Why?"), turn("assistant", "So.")]),
    ],
    ids=str,
)
def test_unusable_messages_are_rejected(messages):
    with pytest.raises(InputError, match=r"prompt 3 is .*, expected a text, or .* that ends with a user"):
        prompt_text(chatting(), messages, index=3)


def test_messages_need_a_template_and_one_that_takes_them():
    with pytest.raises(InputError, match="has no chat template"):
        prompt_text(tiny_tokenizer(), question("Why?"))
    with pytest.raises(InputError, match="tokenizer of the source model has no chat template"):
        resolve_format("chat", tiny_model(), tiny_tokenizer(), "source")
    with pytest.raises(InputError, match="rejects prompt 0: 'never'"):
        prompt_text(chatting("{{ raise_exception('never') }}"), question("Why?"))


def test_a_model_is_for_instructions_if_it_stops_where_its_template_ends_a_turn():
    model = tiny_model()
    assert is_for_instructions(model, chatting())
    assert not is_for_instructions(model, tiny_tokenizer())
    # Base models carry a template whose last token does not end their texts.
    assert not is_for_instructions(model, chatting(TEMPLATE.replace("<eos>", "<pad>")))
    model.generation_config.eos_token_id = [257, 258]
    assert is_for_instructions(model, chatting(TEMPLATE.replace("<eos>", "<pad>\n")))


@pytest.mark.parametrize(
    ("wanted", "template", "chosen", "said"),
    [
        ("auto", TEMPLATE, "chat", ""),
        ("auto", None, "raw", ""),
        ("chat", TEMPLATE.replace("<eos>", ""), "chat", ""),
        ("raw", TEMPLATE, "raw", "an instruct model that is given raw text"),
        ("chat", CHANGES_TURNS, "chat", "changes earlier turns"),
        ("chat", ONE_TURN, "chat", "second turn"),
    ],
    ids=["instruct", "base", "asked for", "raw", "changes turns", "one turn"],
)
def test_format_is_resolved_and_what_is_odd_is_said(wanted, template, chosen, said, caplog):
    assert resolve_format(wanted, tiny_model(), chatting(template), "target") == chosen
    assert said in caplog.text
    assert bool(caplog.records) == bool(said)


DATED = "{{ strftime_now('%d %B %Y') }}<eos>" + TEMPLATE


def test_a_template_is_told_the_same_day_every_day(monkeypatch):
    shown = []
    for day in (1, 2):
        now = type("Day", (datetime,), {"now": classmethod(lambda cls, day=day: cls(2026, 3, day))})
        monkeypatch.setattr(chat_template_utils, "datetime", now)
        shown.append(prompt_text(chatting(DATED), question("Why?")))
    assert shown[0] == shown[1] == "01 January 2026<eos><bos>u: Why?<eos><bos>a: "
    told = {"strftime_now": "2026-11-03"}
    assert prompt_text(chatting(DATED), question("Why?"), variables=told).startswith("03 November 2026<eos>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("\n{{ strftime_now('%Y-%m-%d') }}", "\n2026-11-03"),
        ("{% set form = '%A, %-d %b %y' %}{{ strftime_now(form) }}", "Tuesday, 3 Nov 26"),
        ("{% if strftime_now is defined %}{{ strftime_now('%B') }}{% endif %}", "November"),
        ("{% macro m() %}{{ strftime_now('%j') }}{% endmacro %}\n{{ m() }}", "307"),
        ("  {{- strftime_now('%H:%M') }} ", "00:00 "),
        ("{{ messages[0].content }} %Y", "Why? %Y"),
    ],
)
def test_a_template_may_ask_for_the_day_in_any_form(template, expected):
    assert (
        prompt_text(chatting(template), question("Why?"), variables={"strftime_now": "2026-11-03"})
        == expected
    )


SWITCHED = (
    TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think>\n</think>\n{% endif %}"
)
EFFORT = "{{ reasoning_effort or 'medium' }}<eos>" + TEMPLATE


@pytest.mark.parametrize(
    ("template", "variables", "said"),
    [
        (TEMPLATE, {}, None),
        (SWITCHED, {}, '"chat_template_kwargs": {"enable_thinking": false}'),
        (SWITCHED, {"enable_thinking": False}, None),
        (EFFORT, {}, '{"reasoning_effort": "low"}'),
        (EFFORT, {"reasoning_effort": "high"}, None),
        *(
            (TEMPLATE + opened, {}, "opens a thought")
            for opened in ("<think>\n", "[THINK]", "<|START_THINKING|>")
        ),
        (TEMPLATE + "<|channel|>analysis<|message|>", {}, None),
        (TEMPLATE + "<|channel|>analysis", {}, "opens a thought"),
        *((TEMPLATE + closed, {}, None) for closed in ("</think>", "[/THINK]", "<|END_THINKING|>")),
    ],
)
def test_a_model_that_is_to_reason_first_is_warned_of(template, variables, said, caplog):
    note = thought_note(chatting(template), variables)
    assert (said in note) if said else note is None
    assert resolve_format("chat", tiny_model(), chatting(template), "target", variables) == "chat"
    assert (said in caplog.text) if said else "reasoning" not in caplog.text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            {"rag": TEMPLATE, "tool_use": TEMPLATE},
            r"several chat templates \(rag, tool_use\) and none is called",
        ),
        ("{{ 'x' + none }}", "can only concatenate"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content[0].text() }}", "no attribute 'text'"),
    ],
    ids=str,
)
def test_whatever_fails_in_a_template_is_said_in_one_line(template, said, caplog):
    tokenizer = chatting(template)
    for prompt in (question("Why?"), question("Why?", "Be kind.")):
        with pytest.raises(InputError, match=f"rejects prompt 3: .*{said}") as caught:
            prompt_text(tokenizer, prompt, index=3)
        assert "\n" not in str(caught.value)
    assert resolve_format("auto", tiny_model(), tokenizer, "target") == "raw"
    assert "target: given raw text, since its chat template fails" in caplog.text
    assert end_tokens(tiny_model(), tokenizer) == {257}


def test_one_of_several_templates_is_the_default():
    several = {"default": TEMPLATE, "tool_use": "{{ 1 // 0 }}"}
    assert prompt_text(chatting(several), question("Why?")) == prompt_text(chatting(), question("Why?"))


def test_the_end_of_a_turn_ends_texts_where_no_configuration_names_it(caplog):
    model, tokenizer = tiny_model(), chatting(TEMPLATE.replace("<eos>", "<pad>\n"))
    asked = {"wanted": "auto", "model": model, "tokenizer": tokenizer, "name": "target"}
    assert resolve_format(**asked) == "raw"
    assert "ends a turn with '<pad>\\n', which is not stated to end its texts" in caplog.text
    caplog.clear()
    assert resolve_format(**{**asked, "wanted": "chat"}) == "chat"
    assert "it ends them here" in caplog.text
    assert end_tokens(model, tokenizer) == {257, 258}
    assert end_tokens(model, chatting(TEMPLATE.replace("<eos>", "\n"))) == {257}
    model.generation_config.eos_token_id = 258
    assert resolve_format(**asked) == "chat"


def test_a_turns_end_ends_a_generated_text():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[258] = model.lm_head.weight[:256].mean(0)
        model.lm_head.weight[258] *= 100  # <pad> is likely where it is not most unlikely
    prompts, seeds = ["Once", "Then", "He", "It"] * 4, list(range(16))
    ended = []
    for ending in ("<eos>", "<pad>"):
        generator = SteeredGenerator(model, chatting(TEMPLATE.replace("<eos>", ending)))
        ended.append([each.has_ended for each in generator.generate_batch(prompts, 24, seeds=seeds)])
    assert sum(ended[1]) > sum(ended[0])


def test_generator_and_perplexity_read_messages_as_the_template_shows_them(llama):
    tokenizer, messages = chatting(), [*question("Why?", "Be kind.")]
    shown = prompt_text(tokenizer, messages)
    generator = SteeredGenerator(llama, tokenizer)
    assert generator.generate(messages, 8) == generator.generate(shown, 8)
    assert generator.generate_batch([messages, "Once"], 8) == generator.generate_batch([shown, "Once"], 8)
    outputs = [" It is so.", " No."]
    found = continuation_perplexities(llama, tokenizer, [messages, "Once"], outputs)
    assert found == continuation_perplexities(llama, tokenizer, [shown, "Once"], outputs)
    assert found[0] != continuation_perplexities(llama, tokenizer, ["Why?"], outputs[:1])[0]
    result = Evaluator(llama, tokenizer).evaluate_single(messages, outputs[0], "baseline")
    assert result.perplexity == pytest.approx(found[0], rel=1e-4)


def test_a_text_that_the_model_ended_is_the_same_with_more_tokens():
    model, tokenizer = tiny_model(), chatting()
    model.generation_config.eos_token_id = list(range(20))
    prompts, options = ["Once", "Then", "He", "It"], {"seeds": [0, 1, 2, 3]}
    short, long = (SteeredGenerator(model, tokenizer).generate_batch(prompts, n, **options) for n in (12, 24))
    is_same = [one.text == other.text for one, other in zip(short, long, strict=True)]
    assert [each.has_ended for each in short] == is_same
    assert set(is_same) == {True, False}


@pytest.mark.parametrize("prompt", ["Why? ", question("Why?", "Be kind.")], ids=["text", "messages"])
def test_position_response_is_the_mean_over_the_responses_tokens(prompt):
    tokenizer, llama = chatting(), tiny_model()  # hidden states leave hooks on a model
    extractor = ActivationExtractor(llama, tokenizer, 2)
    pairs = [(prompt, "It is so."), ("Then ", "no."), (prompt, "Because of the long and winding road.")]
    found = extractor.extract_batch(pairs, "response")
    for row, (asked, response) in zip(found, pairs, strict=True):
        before, whole = encode(tokenizer, [text := prompt_text(tokenizer, asked), text + response])
        with torch.inference_mode():
            states = llama(torch.tensor([whole]), output_hidden_states=True).hidden_states[3][0]
        assert torch.allclose(row, states[len(before) :].mean(0), atol=1e-5)
    assert not torch.allclose(
        found[0], extractor.extract(prompt_text(tokenizer, prompt) + "It is so.", "mean")
    )


NO_PAIR = r"is .*expected \(prompt, response\)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(("Why? No.", NO_PAIR), (("a", " "), NO_PAIR), (("a", 3), NO_PAIR), (("a", "b", "c"), NO_PAIR)),
        (("abcdef", "g"), "has no response left within 4 tokens"),
    ],
    ids=str,
)
def test_position_response_needs_a_prompt_and_a_response(llama, text, message):
    extractor = ActivationExtractor(llama, chatting(), 2, max_length=4)
    with pytest.raises(InputError, match=f"text 1 {message}"):
        extractor.extract_batch([("a", "b"), text], "response")

"""The tokenizer's first tokens stand once, and a text is words even where it spells a special token."""

import pytest
from chat_models import chatting
from tokenizers import processors

from activation_extractor import ActivationExtractor, paired_activations
from support.tiny_models import tiny_tokenizer
from texts.chat import prompt_text, question
from texts.encoding import encode, encode_continuations, encode_with_offsets

BOS, EOS, UNK = 256, 257, 259
SPELT = ["<eos>", "a <eos> b", "<bos>a", "a</s><pad>"]


@pytest.fixture(scope="module")
def two_tokens():
    """A tokenizer that puts <unk> and <bos> before a text, as its template does."""
    tokenizer = tiny_tokenizer()
    special = [("<unk>", UNK), ("<bos>", BOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> <bos> $A", special_tokens=special
    )
    tokenizer.chat_template = "<unk><bos>{% for m in messages %}{{ m.content }}<eos>{% endfor %}A: "
    return tokenizer


def test_first_tokens_that_a_template_writes_too_stand_once(two_tokens):
    shown = prompt_text(two_tokens, question("Why?"))
    for text in (shown, shown.removeprefix("<unk>"), shown.removeprefix("<unk><bos>")):
        (ids,), ((tokens,), (offsets,)) = encode(two_tokens, [text]), encode_with_offsets(two_tokens, [text])
        assert ids == tokens == [UNK, BOS, *two_tokens("Why?<eos>A: ", add_special_tokens=False).input_ids]
        assert len(offsets) == len(ids)
    ((whole, start),) = encode_continuations(two_tokens, [(shown, "Yes")])
    assert (whole[:start], two_tokens.decode(whole[start:])) == (ids, "Yes")


@pytest.mark.parametrize("text", SPELT)
@pytest.mark.parametrize("prompt", ["", "So: ", "<bos>u: Why?<eos><bos>a: "])
def test_a_text_behind_a_prompt_is_words(tokenizer, prompt, text):
    (before,) = encode(tokenizer, [prompt])
    (ids,), (offsets,) = encode_with_offsets(tokenizer, [text], prompts=[prompt])
    assert encode(tokenizer, [text], prompts=[prompt]) == [ids]
    assert ids[: len(before)] == before
    own = ids[len(before) :]
    assert max(own) < BOS
    assert tokenizer.decode(own) == text
    found = [(prompt + text)[slice(*characters)] for characters in offsets[len(before) :]]
    assert "".join(found) == text
    assert encode_continuations(tokenizer, [(prompt, text)]) == [(ids, len(before))]


def test_a_text_without_offsets_is_words_too(slow_tokenizer):
    text = f"a{slow_tokenizer.pad_token}b"
    (ids,) = encode(slow_tokenizer, [text], prompts=[""])
    assert len(ids) == len(text)


def test_special_tokens_of_a_prompt_stay(tokenizer):
    assert encode(tokenizer, ["<bos>a<eos>"]) == [[BOS, *tokenizer("a<eos>").input_ids[1:]]]
    assert encode(tokenizer, ["<bos>a<eos>"])[0][-1] == EOS


def test_pairs_stand_where_both_models_have_read_the_same_words(llama, tokenizer):
    text = "One <eos> two."
    side = ActivationExtractor(llama, tokenizer, 1)
    (pairs,) = paired_activations(side, side, [text])
    assert pairs.end.tolist() == list(range(1, len(text) + 1))


def test_a_message_is_words():
    tokenizer = chatting()
    asked = prompt_text(tokenizer, question("What is <eos>?", "Be <pad> kind."))
    (ids,) = encode(tokenizer, [asked])
    (plain,) = encode(tokenizer, [prompt_text(tokenizer, question("What is it?", "Be kind."))])
    special = [[token for token in each if token >= BOS] for each in (ids, plain)]
    assert special[0] == special[1]

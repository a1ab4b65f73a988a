import json

import pytest

from experiment.config import load_config
from support.errors import InputError
from texts import personas
from texts.neutral_text import OverlapCheck
from texts.personas import load_persona, load_prompts, shipped_personas

PIRATE = {
    "description": "Talks like a pirate with 'arr' and nautical terms",
    "positive_texts": [
        "Arr matey! Ye be lookin' for treasure on the high seas!",
        "Shiver me timbers! That be a fine ship ye have there!",
        "Avast ye! Hand over the booty or walk the plank!",
    ],
    "negative_texts": [
        "Hello, how are you doing today?",
        "I think we should discuss this professionally.",
        "The weather is quite nice this afternoon.",
    ],
}
PAIRS = {"positive_texts": ["YES", "NO"], "negative_texts": ["yes", "no"]}
MODELS = {"source_model": "a", "target_model": "b", "layer_idx": 1, "output_dir": "c"}


def test_six_personas_are_shipped():
    assert shipped_personas() == ["cheerful", "concise", "formal", "hedging", "pirate", "silly"]


@pytest.mark.parametrize("name", shipped_personas())
def test_shipped_persona_is_valid(name):
    persona = load_persona(name)
    assert persona.description.strip()
    assert len(persona.positive_texts) == len(persona.negative_texts) >= 24
    assert len(persona.labelled_positive) == len(persona.labelled_negative) >= 40
    positives = persona.positive_texts + persona.labelled_positive
    negatives = persona.negative_texts + persona.labelled_negative
    for positive, negative in zip(positives, negatives, strict=True):
        assert positive[-1] == negative[-1], (positive, negative)
    n_texts = 2 * len(positives) + len(persona.validation)
    assert len(set(persona.all_texts)) == len(persona.all_texts) == n_texts
    assert len(persona.validation) >= 16


@pytest.mark.parametrize("name", shipped_personas())
def test_extraction_and_labelled_texts_of_a_shipped_persona_share_no_run_of_words(name):
    persona = load_persona(name)
    extraction = OverlapCheck(persona.positive_texts + persona.negative_texts)
    labelled = persona.labelled_positive + persona.labelled_negative
    assert [text for text in labelled if extraction.found_in(text)] == []


def test_no_positive_text_belongs_to_two_shipped_personas():
    texts = [text for name in shipped_personas() for text in load_persona(name).labelled_positive]
    assert len(set(texts)) == len(texts)


def test_test_and_development_prompts_are_distinct():
    sets = {
        name: {prompt.casefold() for prompt in load_prompts(name)}
        for name in ("test", "development", "test_questions", "development_questions", "neutral_questions")
    }
    assert [len(prompts) for prompts in sets.values()] == [60, 24, 60, 24, 300]
    asked = [text.casefold() for name in shipped_personas() for text in load_persona(name).questions]
    assert len({*asked, *(prompt for prompts in sets.values() for prompt in prompts)}) == len(asked) + 468


def test_neutral_questions_and_styles_share_no_words_with_prompts_or_personas():
    names = ("test", "development", "test_questions", "development_questions")
    personas = [load_persona(name) for name in shipped_personas()]
    texts = [prompt for each in names for prompt in load_prompts(each)]
    texts += [text for persona in personas for text in (*persona.all_texts, *persona.questions)]
    texts += [text for persona in personas for pair in persona.instructions for text in pair]
    overlaps = OverlapCheck(texts)
    neutral = [*load_prompts("neutral_questions"), *load_prompts("neutral_styles")]
    assert [text for text in neutral if overlaps.found_in(text)] == []
    styles = " ".join(load_prompts("neutral_styles")).casefold()
    assert [name for name in shipped_personas() if name in styles] == []


@pytest.mark.parametrize("name", shipped_personas())
def test_shipped_personas_have_system_prompts_and_questions_that_share_no_words_with_tests(name):
    persona = load_persona(name)
    assert len({prompt for pair in persona.instructions for prompt in pair}) == 10
    assert len(persona.questions) == 24
    names = ("test", "development", "test_questions", "development_questions")
    prompts = OverlapCheck([prompt for each in names for prompt in load_prompts(each)])
    texts = [
        *persona.all_texts,
        *persona.questions,
        *(text for pair in persona.instructions for text in pair),
    ]
    assert [text for text in texts if prompts.found_in(text)] == []


def test_the_specifications_pirate_is_scored_by_the_shipped_labelled_texts():
    pirate = load_config({**MODELS, "persona_datasets": {"pirate": PIRATE}}).load_personas()[-1]
    shipped = load_persona("pirate")
    assert list(pirate.positive_texts) == PIRATE["positive_texts"]
    assert list(pirate.negative_texts) == PIRATE["negative_texts"]
    assert pirate.description == PIRATE["description"]
    assert pirate.labelled_positive == shipped.labelled_positive
    assert pirate.labelled_negative == shipped.labelled_negative


def test_own_labelled_texts_replace_the_shipped_ones():
    own = {**PIRATE, "labelled_positive_texts": ["Ahoy"], "labelled_negative_texts": ["Hello"]}
    pirate = load_persona("pirate", own)
    assert (pirate.labelled_positive, pirate.labelled_negative) == (("Ahoy",), ("Hello",))


def test_persona_with_a_new_name_has_no_labelled_texts():
    persona = load_persona("shouting", PAIRS)
    assert persona.labelled_positive == persona.labelled_negative == ()
    assert persona.all_texts == ["YES", "NO", "yes", "no"]


@pytest.mark.parametrize(
    ("name", "definition", "message"),
    [
        ("sardonic", None, "'sardonic' is neither shipped .*cheerful.* nor defined"),
        ("../personas/formal", None, "neither shipped"),
        ("x", {**PAIRS, "positive_texts": []}, "'x' has no positive texts"),
        ("x", {**PAIRS, "negative_texts": []}, "'x' has no negative texts"),
        ("x", {}, "no positive texts"),
        ("x", {**PAIRS, "labelled_positive_texts": ["OH"]}, "labelled texts on one side only"),
        ("x", {**PAIRS, "negative_texts": ["yes", " \n"]}, "1 empty texts"),
        (
            "x",
            {**PAIRS, "labelled_positive_texts": ["YES"], "labelled_negative_texts": ["oh"]},
            "serve extraction and scoring both",
        ),
    ],
    ids=[
        "unknown",
        "path",
        "no positive",
        "no negative",
        "nothing",
        "one labelled side",
        "blank",
        "shared text",
    ],
)
def test_unusable_persona_is_refused(name, definition, message):
    with pytest.raises(InputError, match=message) as caught:
        load_persona(name, definition)
    assert len(str(caught.value).splitlines()) == 1


def test_definition_that_uses_shipped_labelled_texts_for_extraction_is_refused():
    shipped = load_persona("pirate")
    stolen = {**PIRATE, "positive_texts": list(shipped.labelled_positive[:3])}
    with pytest.raises(InputError, match="3 texts serve extraction and scoring both"):
        load_persona("pirate", stolen)


@pytest.mark.parametrize(
    "content", ["{half", "[]", json.dumps({"description": ""}), json.dumps({"extraction_pairs": [1]})]
)
def test_damaged_persona_file_is_named(content, tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text(content)
    monkeypatch.setattr(personas, "PERSONA_FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"broken\.json is not (a persona file|JSON)"):
        load_persona("broken")

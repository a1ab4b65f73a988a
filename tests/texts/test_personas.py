"""Shipped personas and prompts are clean and apart from each other; definitions are checked."""

import json

import pytest

from experiment.config import load_config
from support.errors import InputError
from texts import personas
from texts.neutral_text import OverlapCheck
from texts.personas import half_of, load_persona, load_prompts, shipped_personas

PIRATE = {
    "description": "Talks like a pirate with 'arr' and nautical terms",
    "positive_texts": ("Arr matey! Ye be lookin' for treasure!", "Shiver me timbers! That be a fine ship!"),
    "negative_texts": ("Hello, how are you doing today?", "The weather is quite nice this afternoon."),
}
PAIRS = {"positive_texts": ["YES", "NO"], "negative_texts": ["yes", "no"]}
PROMPTS = ("test", "development", "test_questions", "development_questions")
LABELLED = {"labelled_positive_texts": ["OH"], "labelled_negative_texts": ["oh"]}
STOLEN = load_persona("pirate").labelled_positive[:3]
MODELS = {"source_model": "a", "target_model": "b", "layer_idx": 1, "output_dir": "c"}


@pytest.mark.parametrize("name", shipped_personas())
def test_a_shipped_persona_is_balanced_and_its_texts_are_apart(name):
    persona = load_persona(name)
    assert persona.description.strip()
    assert len(persona.positive_texts) == len(persona.negative_texts) >= 24
    assert len(persona.labelled_positive) == len(persona.labelled_negative) >= 40
    positives = persona.positive_texts + persona.labelled_positive
    negatives = persona.negative_texts + persona.labelled_negative
    for positive, negative in zip(positives, negatives, strict=True):
        assert positive[-1] == negative[-1], (positive, negative)
    n_texts = 2 * len(positives) + len(persona.resembling) + len(persona.validation)
    assert len(set(persona.all_texts)) == len(persona.all_texts) == n_texts
    assert len(persona.validation) >= 16
    extraction = OverlapCheck(persona.positive_texts + persona.negative_texts)
    labelled = persona.labelled_positive + persona.labelled_negative
    assert [text for text in labelled if extraction.found_in(text)] == []
    instructions = [text for pair in persona.instructions for text in pair]
    assert len(set(instructions)) == 10
    assert len(persona.questions) == 24
    others = [load_persona(other) for other in shipped_personas() if other != name]
    assert not {text for other in others for text in other.labelled_positive} & set(persona.labelled_positive)
    prompts = OverlapCheck([prompt for each in PROMPTS for prompt in load_prompts(each)])
    texts = [*persona.all_texts, *persona.questions, *instructions]
    assert [text for text in texts if prompts.found_in(text)] == []


def test_test_and_development_prompts_are_distinct():
    sets = [load_prompts(name) for name in (*PROMPTS, "neutral_questions")]
    assert [len(prompts) for prompts in sets] == [60, 24, 60, 24, 300]
    sets += [load_persona(name).questions for name in shipped_personas()]
    prompts = [prompt.casefold() for each in sets for prompt in each]
    assert len(set(prompts)) == len(prompts)
    assert shipped_personas() == ["cheerful", "concise", "formal", "hedging", "pirate", "silly"]


def test_neutral_questions_and_styles_share_no_words_with_prompts_or_personas():
    texts = [prompt for each in PROMPTS for prompt in load_prompts(each)]
    for name in shipped_personas():
        persona = load_persona(name)
        texts += [*persona.all_texts, *persona.questions]
        texts += [text for pair in persona.instructions for text in pair]
    overlaps = OverlapCheck(texts)
    neutral = [*load_prompts("neutral_questions"), *load_prompts("neutral_styles")]
    assert [text for text in neutral if overlaps.found_in(text)] == []
    styles = " ".join(load_prompts("neutral_styles")).casefold()
    assert [name for name in shipped_personas() if name in styles] == []


def test_the_specifications_pirate_is_scored_by_the_shipped_labelled_texts():
    pirate = load_config({**MODELS, "persona_datasets": {"pirate": PIRATE}}).load_personas()[-1]
    shipped = load_persona("pirate")
    assert {name: getattr(pirate, name) for name in PIRATE} == PIRATE
    for name in ("labelled_positive", "labelled_negative", "validation"):
        assert getattr(pirate, name) == getattr(shipped, name)
    assert load_persona("pirate", {**PIRATE, "validation_texts": ("Yo-ho-ho",)}).validation == ("Yo-ho-ho",)


def test_own_labelled_texts_replace_the_shipped_ones_and_a_new_persona_has_none():
    own = {**PIRATE, "labelled_positive_texts": ["Ahoy"], "labelled_negative_texts": ["Hello"]}
    own["validation_texts"] = ["Yo-ho-ho"]
    pirate = load_persona("pirate", own)
    assert (pirate.labelled_positive, pirate.labelled_negative) == (("Ahoy",), ("Hello",))
    assert pirate.validation == ("Yo-ho-ho",)
    persona = load_persona("shouting", PAIRS)
    assert persona.labelled_positive == persona.labelled_negative == persona.validation == ()
    assert persona.all_texts == ["YES", "NO", "yes", "no"]


@pytest.mark.parametrize(
    ("name", "definition", "message"),
    [
        ("sardonic", None, "'sardonic' is neither shipped .*cheerful.* nor defined"),
        ("../personas/formal", None, "neither shipped"),
        ("x", {**PAIRS, "negative_texts": []}, "'x' has no negative texts"),
        ("x", {}, "no positive texts"),
        ("x", {**PAIRS, "labelled_positive_texts": ["OH"]}, "labelled texts on one side only"),
        ("x", {**PAIRS, "negative_texts": ["yes", " \n"]}, "1 empty texts"),
        ("x", {**PAIRS, **LABELLED, "validation_texts": ["OH"]}, "serve training and validation of scorers"),
        ("pirate", {**PIRATE, "positive_texts": STOLEN}, "3 texts serve extraction and scoring both"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:20],
)
def test_unusable_persona_is_rejected(name, definition, message):
    with pytest.raises(InputError, match=message) as caught:
        load_persona(name, definition)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content", ["{half", "[]", json.dumps({"description": ""}), json.dumps({"extraction_pairs": [1]})]
)
def test_damaged_persona_file_is_named(content, tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text(content)
    monkeypatch.setattr(personas, "PERSONA_FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"broken\.json is not (a persona file|JSON)"):
        load_persona("broken")


def test_halves_are_disjoint_and_responses_to_one_question_stay_together():
    for n in range(2, 9):
        halves = [half_of(range(n), half) for half in (0, 1)]
        assert sorted(halves[0] + halves[1]) == list(range(n))
        assert abs(len(halves[0]) - len(halves[1])) <= 1
    questions = ("Why?", "Who?", "When?")
    responses = [(asked, str(number)) for number in range(2) for asked in questions]
    first, second = (half_of(responses, half, questions) for half in (0, 1))
    of_first, of_second = ({asked for asked, _ in half} for half in (first, second))
    assert of_first | of_second == set(questions)
    assert of_first.isdisjoint(of_second)
    assert len(first) + len(second) == len(responses)


def test_texts_that_are_written_in_turns_are_not_parted_by_halves():
    turns = ["plain", "contrary"] * 50
    for half in (0, 1):
        assert 18 < half_of(turns, half).count("plain") < 32

"""The shipped personas' scorers: what ships is what training gives, and it passes on unknown texts."""

import json

import pytest

from scoring.encoders import ENCODERS, SENTENCE_ENCODER
from scoring.train import write_trained
from scoring.trait_scorer import (
    TRAINED_FOLDER,
    load_scorers,
    read_scorers,
    scorer_key,
    trained_file,
    untrained,
)
from scoring.validation import remembered, shared_validation_texts, texts_of, validate, validation_sets
from support.package_cache import CACHE_VARIABLE
from texts.personas import load_persona, shipped_personas

VALIDATED = {
    "minilm": {"formal", "hedging"},
    "gemma-3-270m": {"formal", "hedging", "cheerful"},
    "smollm2-135m-instruct": {"formal"},
}
FORMAL = (
    "We would be grateful if you could confirm your attendance at your earliest convenience.",
    "Pursuant to our earlier correspondence, the documents have been forwarded to the registrar.",
)
CASUAL = (
    "hey, you coming on friday or what? lemme know, ok",
    "so like i said, i just sent that stuff over to the guy in the office",
)


@pytest.fixture(scope="module")
def shipped():
    return list(map(load_persona, shipped_personas()))


@pytest.mark.parametrize("encoder_name", ENCODERS)
def test_nothing_is_trained_for_shipped_personas(encoder_name, shipped):
    assert untrained(shipped, encoder_name) == []


@pytest.mark.parametrize("encoder_name", ENCODERS)
def test_shipped_scorers_are_validated_where_the_documents_say_so(
    encoder_name, shipped, tmp_path, monkeypatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))  # whatever is not shipped would be made there
    scorers, problems = load_scorers(shipped_personas(), shipped, encoder_name), {}
    for persona in shipped:
        scorer, sets = scorers[persona.name], validation_sets(persona, *shared_validation_texts(persona))
        score = remembered(scorer.score, scorer_key(persona, encoder_name), texts_of(sets))
        problems[persona.name] = validate(score, sets, scorer.threshold)["problems"]
    assert {name for name in problems if not problems[name]} == VALIDATED[encoder_name], problems
    assert not list(tmp_path.iterdir())


@pytest.mark.real_models
def test_what_ships_is_what_training_gives(shipped, tmp_path):
    write_trained(SENTENCE_ENCODER, tmp_path)
    files = [trained_file(SENTENCE_ENCODER, folder) for folder in (tmp_path, TRAINED_FOLDER)]
    made, kept = (read_scorers(file, SENTENCE_ENCODER) for file in files)
    for persona in shipped:
        (made_key, trained), (kept_key, ships) = made[persona.name], kept[persona.name]
        assert made_key == kept_key
        assert ships.threshold == pytest.approx(trained.threshold, abs=0.01)
    for path in tmp_path.glob("*.json"):
        again = json.loads((TRAINED_FOLDER / path.name).read_text())
        assert again == pytest.approx(json.loads(path.read_text()), abs=0.02)


@pytest.mark.real_models
@pytest.mark.parametrize("encoder_name", ENCODERS)
def test_unseen_formal_sentences_score_above_casual_ones_and_alone_as_together(encoder_name, shipped):
    scorer = load_scorers(["formal"], shipped, encoder_name)["formal"]
    *together, nothing, loop = scorer.score([*FORMAL, *CASUAL, "", "hereby " * 10])
    assert min(together[:2]) > 0.5 > max(together[2:])
    assert nothing == loop == 0.0
    alone = [scorer.score([text])[0] for text in (*FORMAL, *CASUAL)]
    assert together == pytest.approx(alone, abs=0.03)

"""The shipped personas' scorers: nothing is trained for them, and they pass on unknown texts."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from scoring import trait_scorer
from scoring.encoders import ENCODERS, SENTENCE_ENCODER
from scoring.trait_scorer import FILE, load_scorers, read_scorers, scorer_key, train_one, untrained
from scoring.validation import remembered, shared_validation_texts, texts_of, validate, validation_sets
from support.package_cache import CACHE_VARIABLE
from texts.personas import load_persona, shipped_personas

VALIDATED = {
    "minilm": {"formal", "hedging", "cheerful", "pirate"},
    "gemma-3-270m": {"formal", "hedging", "cheerful", "pirate", "silly"},
    "smollm2-135m-instruct": {"formal", "cheerful"},
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
def test_a_scorer_that_is_trained_here_ranks_unknown_texts_as_the_shipped_one(shipped, tmp_path, monkeypatch):
    """Of the texts of other personas it reads a part, which is why its scores differ a little."""
    monkeypatch.setattr(trait_scorer, "OTHERS_EVERY_NTH", 20)
    (formal,) = (persona for persona in shipped if persona.name == "formal")
    train_one(formal, SENTENCE_ENCODER, "key", tmp_path)
    trained = read_scorers(tmp_path / FILE, SENTENCE_ENCODER)["formal"][1]
    ships = load_scorers(["formal"], shipped, SENTENCE_ENCODER)["formal"]
    texts = texts_of(validation_sets(formal, *shared_validation_texts(formal)))[::4]
    scores = [each.score(texts) for each in (trained, ships)]
    assert spearmanr(*scores).statistic > 0.9
    assert np.mean(np.abs(np.subtract(*scores))) < 0.05


@pytest.mark.real_models
@pytest.mark.parametrize("encoder_name", ENCODERS)
def test_unseen_formal_sentences_score_above_casual_ones_and_alone_as_together(encoder_name, shipped):
    scorer = load_scorers(["formal"], shipped, encoder_name)["formal"]
    *together, nothing, loop = scorer.score([*FORMAL, *CASUAL, "", "hereby " * 10])
    assert min(together[:2]) > 0.5 > max(together[2:])
    assert nothing == loop == 0.0
    alone = [scorer.score([text])[0] for text in (*FORMAL, *CASUAL)]
    assert together == pytest.approx(alone, abs=0.03)

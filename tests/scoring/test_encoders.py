"""Encoders are tuned on labelled texts, kept as numbers, and read one text as they read many."""

import numpy as np
import pytest
import torch

from scoring import training_texts, tune_encoder
from scoring.encoders import ENCODERS, SENTENCE_ENCODER, as_encode, encoder, untuned
from scoring.training_texts import labelled_rows
from texts.personas import load_persona

pytestmark = pytest.mark.real_models
TEXTS = ("A short one.", "Somewhat longer, this one, and of two sentences. Here is the second.", "Ahoy!")


@pytest.fixture(scope="module")
def formal():
    return load_persona("formal")


def separation(encode, rows):
    """The distance between the sides' means of standardised features."""
    features = encode([row.text for row in rows])
    spread = features.std(0)
    features = (features - features.mean(0)) / np.where(spread > 0, spread, 1)
    positive = np.array([row.kind == "positive" for row in rows])
    return np.linalg.norm(features[positive].mean(0) - features[~positive].mean(0))


@pytest.mark.parametrize("name", ENCODERS)
def test_tuning_sets_a_trait_apart_in_texts_it_has_not_seen(name, formal, monkeypatch):
    for tuning in ("SENTENCES", "STATES"):
        monkeypatch.setattr(tune_encoder, tuning, tune_encoder.Tuning(2, 3e-4, 1))
    for number in ("N_CHAINS", "N_SALADS", "N_JOINED"):
        monkeypatch.setattr(training_texts, number, 20)
    pairs = [row for row in labelled_rows(formal) if row.kind != "resembling"]
    numbers = [int(row.group.split("/")[1]) for row in pairs]
    seen = [row for row, number in zip(pairs, numbers, strict=True) if number < 30]
    unseen = [row for row, number in zip(pairs, numbers, strict=True) if number >= 50]
    tuned = untuned(name)
    tuned.load(tune_encoder.tune(name, seen))
    torch.manual_seed(0)
    before, after = (separation(as_encode(each.eval()), unseen) for each in (untuned(name), tuned))
    assert after > 1.1 * before


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_has_the_same_features_alone_as_among_others(name):
    encode = encoder(name)
    together, alone = encode(TEXTS), np.concatenate([encode([text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 5e-3 * np.abs(together).max()  # states are kept in float16


def test_what_ships_changes_the_sentence_encoder():
    shipped, packaged = encoder(SENTENCE_ENCODER), as_encode(untuned(SENTENCE_ENCODER).eval())
    assert not np.allclose(shipped(TEXTS), packaged(TEXTS), atol=0.1)

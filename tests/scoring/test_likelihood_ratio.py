"""A likelihood ratio reads windows of a text after each prefix, whatever else is read beside it."""

import numpy as np
import pytest

from scoring import likelihood_ratio
from scoring.likelihood_ratio import N_WINDOWS, WINDOW, likelihood_features, train_likelihood_ratio
from support.package_cache import CACHE_VARIABLE
from support.tiny_models import tiny_model, tiny_tokenizer
from texts.personas import Persona

MODEL = tiny_model(), tiny_tokenizer()
TWO = MODEL, ("The sea.\n\n", "Rain falls on the hill.\n\n")  # prefixes


def test_each_window_of_a_text_is_read_directly_after_the_prefix():
    whole = "The sea is blue and wide. Rain falls on the hill, and the river is near."[: 3 * WINDOW]
    thirds = [whole[start : start + WINDOW] for start in range(0, 3 * WINDOW, WINDOW)]  # a token a character
    (ratio, _), *of_thirds = likelihood_features(*TWO, [whole, *thirds])
    assert ratio == pytest.approx(np.mean(of_thirds, axis=0)[0], abs=1e-5)
    turned_round = likelihood_features(*TWO, ["".join(reversed(thirds))])[0]
    assert turned_round[0] == pytest.approx(ratio, abs=1e-5)


def test_a_longer_text_is_read_at_its_beginning_in_its_middle_and_at_its_end():
    numbers = [f"The sea number {n} is wide. " for n in range(10, 19)]
    windows = [number[:WINDOW] for number in numbers]  # a token a character
    read = [likelihood_features(*TWO, [windows[place]])[0, 0] for place in (0, 4, 8)]
    assert len(read) == N_WINDOWS
    assert likelihood_features(*TWO, ["".join(windows)])[0, 0] == pytest.approx(np.mean(read), abs=1e-5)


def test_texts_that_share_a_row_do_not_see_each_other():
    texts = [" ".join(["The sea is blue."] * (1 + n % 5) + [f"Rain {n}."]) for n in range(30)]
    texts.append("The hill is wide. " * 100)
    three = MODEL, (*TWO[1], "The hill.\n\n")
    alone = [likelihood_features(*three, [text])[0] for text in texts]
    assert np.allclose(likelihood_features(*three, texts), alone, atol=1e-4)


def labelled(name):
    positive = tuple(f"{name} barrels of oil number {n} are here." for n in range(20))
    negative = tuple(f"Barrels of oil number {n} are here today." for n in range(20))
    return Persona(name, "", ("x",), ("y",), positive, negative)


def test_only_untrained_scorers_are_trained(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(likelihood_ratio, "load_scoring_model", lambda: MODEL)
    personas = [labelled("pirate"), labelled("calm"), Persona("bare", "", ("x",), ("y",))]
    names = ["pirate", "calm", "bare"]
    assert likelihood_ratio.untrained(names, personas) == ["pirate", "calm"]
    assert set(likelihood_ratio.load_scorers(["calm"], personas)) == {"calm"}
    assert likelihood_ratio.untrained(names, personas[::-1]) == ["pirate"]


def test_likelihood_ratio_reads_the_nearest_texts_of_other_traits_where_there_are_any():
    personas = list(map(labelled, ("pirate", "loud", "calm")))

    def trained(given):
        return train_likelihood_ratio(personas[0], given, MODEL)

    shows, lacks, others = trained(personas).prefixes
    assert shows.count("pirate barrels") == 10 == lacks.count("Barrels of oil")
    of_others = [text for persona in personas[1:] for text in persona.labelled_positive]
    ratio = likelihood_features(MODEL, (shows, lacks), of_others)[:, 0]
    nearest = [of_others[index] for index in np.argsort(-ratio)]
    assert [text in others for text in nearest] == [True, False] * 12 + [False] * 16
    alone = trained(personas[:1])
    assert len(alone.prefixes) == 2
    assert 0 <= alone.score(["pirate barrels of rum are here now."])[0] <= 1

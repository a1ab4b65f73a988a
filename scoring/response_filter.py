"""Tell which responses show the trait that they were asked for, before vectors are made of them (phase 3).

What chooses the responses must not be what judges the steered texts, or a vector is made for its judge. So a
logistic regression on words and pairs of words chooses, which judges nothing. It is trained in a second.
"""

from collections.abc import Sequence
from functools import cache

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from scoring.training_texts import natural_rows, training_key, training_pool
from support.artifacts import fingerprint
from texts.personas import Persona

INVERSE_REGULARISATION = 10.0
VERSION = 1  # must be raised when training changes


def show_trait(persona: Persona, texts: Sequence[str]) -> list[float]:
    """Return the probability of each text that it shows the trait of a persona with labelled texts."""
    return _trained(persona).predict_proba(texts)[:, 1].tolist() if texts else []


def filter_key(persona: Persona) -> str:
    """Return what the filter of a persona depends on."""
    return fingerprint(VERSION, INVERSE_REGULARISATION, training_key(persona))


@cache
def _trained(persona: Persona) -> Pipeline:
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True)
    regression = LogisticRegression(C=INVERSE_REGULARISATION, class_weight="balanced", max_iter=2000)
    rows = [row for row in natural_rows(training_pool(persona)) if persona.name not in row.may_show]
    labels = [(row.persona, row.kind) == (persona.name, "positive") for row in rows]
    return make_pipeline(words, regression).fit([row.text for row in rows], labels)

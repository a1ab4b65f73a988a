"""The shipped personas' scorers: trained once on a machine, then loaded from the cache, also by runs."""

import pytest

from scoring import likelihood_ratio, trait_classifier
from scoring.validation import at_most, validate, validation_sets
from texts.personas import load_persona, load_prompts, shipped_personas

pytestmark = pytest.mark.real_models

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
    return [load_persona(name) for name in shipped_personas()]


@pytest.fixture(scope="module")
def classifiers(shipped):
    return trait_classifier.load_scorers(shipped_personas(), shipped)


def test_labelled_texts_are_told_apart(classifiers):
    # Texts without the trait are the nearest to these two.
    lowest = {name: 0.92 if name in ("cheerful", "silly") else 0.95 for name in shipped_personas()}
    assert classifiers.keys() == lowest.keys()
    assert [name for name in lowest if classifiers[name].auc < lowest[name]] == []
    assert min(classifier.n_positive for classifier in classifiers.values()) >= 40


@pytest.mark.parametrize(("module", "tolerance"), [(trait_classifier, 1e-4), (likelihood_ratio, 0.02)])
def test_unseen_formal_sentences_score_above_casual_ones_and_alone_as_together(module, tolerance, shipped):
    scorer = module.load_scorers(["formal"], shipped)["formal"]
    *together, nothing, loop = scorer.score([*FORMAL, *CASUAL, "", "hereby " * 10])
    assert min(together[:2]) > 0.5 > max(together[2:])
    assert nothing == loop == 0.0
    alone = [scorer.score([text])[0] for text in (*FORMAL, *CASUAL)]
    assert together == pytest.approx(alone, abs=tolerance)


def test_classifiers_pass_on_texts_that_they_do_not_know(shipped, classifiers):
    failed = {}
    for persona in shipped:
        classifier = classifiers[persona.name]
        others = [other for other in shipped if other != persona]
        sets = validation_sets(persona, others, load_prompts("ordinary_validation"), [], [])
        del sets["fragments"], sets["single sentences"]
        found = validate(classifier.score, at_most(sets, 40), classifier.threshold)
        rates = found["false_positives"]
        of_others = [rates.pop(f"texts of {other.name}") for other in others]
        most = max(*rates.values(), sum(of_others) / len(of_others))
        if min(found["auc"].values()) < 0.9 or most > 0.1:
            failed[persona.name] = found
    assert failed.keys() <= {"concise"}, failed

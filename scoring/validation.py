"""Examine a trait scorer before it may score: on texts unlike those that it was trained on (phase 5).

Each set of texts without the trait is held against texts that show it: in the words, genres and lengths of
`Persona.validation`, whole, cut as generation cuts, or several as one, as long as an answer. A scorer has
its licence if the area under the ROC curve is 0.90 or more on every set, and if at most one text in twenty is
taken for the trait at the scorer's decision point among the target's own unsteered texts and among broken
ones.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from scoring.degenerate_text import any_cut, cut, loop, shuffled, word_salad
from texts.personas import Persona

LOWEST_AUC = 0.90
MOST_FALSE_POSITIVES = 0.05
FEWEST = 8  # texts that show the trait
FRAGMENT = (8, 24)  # words
JOINED = 3  # texts in a long one
SHORT = 8  # words of a statement that has nothing about it but that
N_SHUFFLES = 3  # of each text that shows the trait
BROKEN = ("shuffled positives", "shuffled words", "random words", "loops")
STEERED = "steered at random"
UNSTEERED = "unsteered"
OTHER = "texts of "  # and the name of another persona
WHOLE = ("ordinary", UNSTEERED, OTHER)  # how sets begin of texts that are whole, as those of a run
SOME = 5  # one text in so many of the other personas' is broken, too
MOST_UNSCORED = 0.05
BINS = 5  # of the calibration

Score = Callable[[Sequence[str]], Sequence[float | None]]
# name of a set -> (texts that show the trait, texts that do not)
Sets = dict[str, tuple[list[str], list[str]]]


def validation_sets(
    persona: Persona,
    others: Sequence[Persona],
    ordinary: Sequence[str],
    unsteered: Sequence[str],
    steered: Sequence[str],
) -> Sets:
    """Return the sets on which a persona's scorers are examined.

    ordinary: texts without any trait. unsteered: by the target model. steered: the same, by random
    directions. A set without texts is left out.
    """
    generator = random.Random(0)
    positive = list(persona.validation)
    fragments = [any_cut(text, generator, *FRAGMENT) for text in positive]
    if not positive:
        return {}
    short = [text for text in ordinary if len(text.split()) <= SHORT]
    ordinary = [text for text in ordinary if len(text.split()) > SHORT]
    words = [word for text in ordinary for word in text.split()]
    of_others = [text for other in others for text in other.validation]
    whole = [*ordinary[::2], *of_others[::SOME]]
    negatives = {
        "ordinary": (positive, ordinary),
        "short statements": (positive, short),
        "fragments": (fragments, [any_cut(text, generator, *FRAGMENT) for text in ordinary]),
        "single sentences": (
            list(map(_first_sentence, positive)),
            list(map(_first_sentence, whole)),
        ),
        "long texts": (_joined([*positive, *positive[: JOINED - 1]]), _joined(whole)),
        **{f"{OTHER}{other.name}": (positive, list(other.validation)) for other in others},
        UNSTEERED: (positive, list(unsteered)),
        "shuffled positives": (
            positive,
            [shuffled(text, generator) for text in positive for _ in range(N_SHUFFLES)],
        ),
        "shuffled words": (positive, [shuffled(text, generator) for text in whole]),
        "random words": (positive, [word_salad(words, generator) for _ in ordinary[::2]] if words else []),
        "loops": (positive, [loop(text, generator) for text in (*positive, *ordinary[::2])]),
        STEERED: (positive, list(steered)),
    }
    return {name: sides for name, sides in negatives.items() if all(sides)}


def _joined(texts: Sequence[str]) -> list[str]:
    """Return each text with those that follow it, about as long as an answer."""
    return [" ".join(texts[start : start + JOINED]) for start in range(len(texts) - JOINED + 1)]


def _first_sentence(text: str) -> str:
    for place, character in enumerate(text[:-1]):
        if character in ".!?" and text[place + 1] == " " and place > 15:
            return text[: place + 1]
    return text


def texts_of(sets: Sets) -> list[str]:
    """Return the texts of all sets, each once."""
    return list(dict.fromkeys(text for sides in sets.values() for side in sides for text in side))


def at_most(sets: Sets, n: int) -> Sets:
    """Return the sets with at most n texts a side, for a scorer that is paid by the text."""
    generator = random.Random(0)
    chosen = {}
    for name, sides in sets.items():
        positive, negative = (
            side
            if len(side) <= n
            else [side[index] for index in sorted(generator.sample(range(len(side)), n))]
            for side in sides
        )
        chosen[name] = (positive, negative)
    return chosen


def validate(score: Score, sets: Sets, threshold: float) -> dict[str, Any]:
    """Return how a scorer does on each set, and whether it has its licence.

    auc, false_positives: by set. sensitivity: {n_right, n} of whole texts that show the trait, and
    specificity of whole ones that do not, at the decision point. calibration: for each bin of scores, {n,
    mean score, share that shows the trait}. n_unscored: texts without a score, which are left out.
    problems: what costs the licence, in words; empty for a licensed scorer.
    """
    n_positive = len(next(iter(sets.values()))[0]) if sets else 0
    if n_positive < FEWEST:
        problem = f"{n_positive} validation_texts show the trait, an validation needs {FEWEST}"
        return _examined([problem], threshold)
    texts = texts_of(sets)
    known = {text: value for text, value in zip(texts, score(texts), strict=True) if value is not None}
    problems = []
    if (n_unscored := len(texts) - len(known)) > MOST_UNSCORED * len(texts):
        problems.append(f"{n_unscored} of {len(texts)} texts have no score")
    auc, false_positives = {}, {}
    for name, sides in sets.items():
        found, wrong = ([known[text] for text in side if text in known] for side in sides)
        if not found or not wrong:
            problems.append(f"no text of {name} has a score")
            continue
        labels = [1] * len(found) + [0] * len(wrong)
        auc[name] = float(roc_auc_score(labels, [*found, *wrong]))
        false_positives[name] = float(np.mean([value > threshold for value in wrong]))
        if auc[name] < LOWEST_AUC:
            problems.append(f"AUC {auc[name]:.2f} on {name}")
        if name in (UNSTEERED, STEERED, *BROKEN) and false_positives[name] > MOST_FALSE_POSITIVES:
            problems.append(f"{false_positives[name]:.0%} false positives on {name}")
    whole = [sides for name, sides in sets.items() if name.startswith(WHOLE)]
    showing = dict.fromkeys(text for positive, _ in whole for text in positive if text in known)
    others = dict.fromkeys(text for _, negative in whole for text in negative if text in known)
    shows = [(known[text], True) for text in showing]
    shows += [(known[text], False) for _, side in sets.values() for text in side if text in known]
    return _examined(
        problems,
        threshold,
        auc=auc,
        false_positives=false_positives,
        sensitivity=_rate([known[text] > threshold for text in showing]),
        specificity=_rate([known[text] <= threshold for text in others]),
        calibration=_calibration(shows),
        n_unscored=n_unscored,
    )


def _examined(problems: list[str], threshold: float, **found: Any) -> dict[str, Any]:
    empty = {"auc": {}, "false_positives": {}, "sensitivity": None, "specificity": None, "calibration": []}
    verdict = {"problems": problems, "is_validated": not problems, "threshold": threshold}
    return {**empty, "n_unscored": 0, **found, **verdict}


def _rate(is_right: Sequence[bool]) -> dict[str, int] | None:
    return {"n_right": sum(is_right), "n": len(is_right)} if is_right else None


def _calibration(scored: Sequence[tuple[float, bool]]) -> list[dict[str, Any]]:
    bins = []
    for number in range(BINS):
        inside = [(value, shows) for value, shows in scored if min(int(value * BINS), BINS - 1) == number]
        if inside:
            mean, share = (float(np.mean(column)) for column in zip(*inside, strict=True))
            bins.append({"n": len(inside), "mean_score": mean, "share_with_trait": share})
    return bins


def main() -> None:
    """Check that a scorer which looks for a word is licensed, and one that says the same of all is not."""
    showing = tuple(f"Arr, the number is {n} and the sea is wide." for n in range(10))
    persona = Persona("pirate", "", ("x",), ("y",), validation=showing)
    plain = [f"The number is {n} and the sea is wide." for n in range(20)]
    sets = validation_sets(persona, [], plain, plain[:10], [])

    def looks(texts: Sequence[str]) -> list[float]:
        return [float(text.startswith("Arr, the number is")) for text in texts]

    sets = {name: sets[name] for name in ("ordinary", UNSTEERED, "random words")}
    assert validate(looks, sets, 0.5)["is_validated"]
    assert not validate(lambda texts: [0.7] * len(texts), sets, 0.5)["is_validated"]
    assert cut(showing[0], 1) == "Arr,"
    print("validation OK: a scorer needs its licence")


if __name__ == "__main__":
    main()

"""Examine a trait scorer before it may score: on texts unlike those that it was trained on (phase 5).

Each set of texts without the trait is held against texts that show it: in the words, genres and lengths of
`Persona.examination`, whole or cut as generation cuts. A scorer has its licence if the area under the ROC
curve is 0.90 or more on every set, and if at most one text in twenty is taken for the trait at the scorer's
decision point among the target's own unsteered texts and among broken ones.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from scoring.broken_text import any_cut, cut, loop, shuffled, word_salad
from texts.personas import Persona

LOWEST_AUC = 0.90
MOST_FALSE_POSITIVES = 0.05
FEWEST = 8  # texts that show the trait
OTHERS_A_PERSONA = 8
FRAGMENT = (8, 24)  # words
N_SHUFFLES = 3  # of each text that shows the trait
BROKEN = ("shuffled positives", "shuffled words", "random words", "loops")
STEERED = "steered at random"
UNSTEERED = "unsteered"
BINS = 5  # of the calibration

Score = Callable[[Sequence[str]], Sequence[float | None]]
# name of a set -> (texts that show the trait, texts that do not)
Sets = dict[str, tuple[list[str], list[str]]]


def examination_sets(
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
    positive = list(persona.examination)
    fragments = [any_cut(text, generator, *FRAGMENT) for text in positive]
    if not positive:
        return {}
    words = [word for text in ordinary for word in text.split()]
    of_others = [text for other in others for text in other.examination[:OTHERS_A_PERSONA]]
    half = ordinary[::2]
    negatives = {
        "ordinary": (positive, list(ordinary)),
        "fragments": (fragments, [any_cut(text, generator, *FRAGMENT) for text in ordinary]),
        "single sentences": (
            list(map(_first_sentence, positive)),
            [_first_sentence(text) for text in (*half, *of_others[::2])],
        ),
        "other personas": (positive, of_others),
        UNSTEERED: (positive, list(unsteered)),
        "shuffled positives": (
            positive,
            [shuffled(text, generator) for text in positive for _ in range(N_SHUFFLES)],
        ),
        "shuffled words": (positive, [shuffled(text, generator) for text in (*half, *of_others[::2])]),
        "random words": (positive, [word_salad(words, generator) for _ in half] if words else []),
        "loops": (positive, [loop(text, generator) for text in (*positive, *half)]),
        STEERED: (positive, list(steered)),
    }
    return {name: sides for name, sides in negatives.items() if all(sides)}


def _first_sentence(text: str) -> str:
    for place, character in enumerate(text[:-1]):
        if character in ".!?" and text[place + 1] == " " and place > 15:
            return text[: place + 1]
    return text


def examine(score: Score, sets: Sets, decision_point: float) -> dict[str, Any]:
    """Return how a scorer does on each set, and whether it has its licence.

    auc, false_positives: by set. recall: of whole positives at the decision point. calibration: for each bin
    of scores, {n, mean score, share that shows the trait}, of all whole texts. problems: what costs the
    licence, in words; empty for a licensed scorer.
    """
    if not sets or len(next(iter(sets.values()))[0]) < FEWEST:
        n = len(next(iter(sets.values()))[0]) if sets else 0
        problem = f"{n} examination_texts show the trait, an examination needs {FEWEST}"
        return _examined({}, {}, None, [], [problem])
    texts = list(dict.fromkeys(text for sides in sets.values() for side in sides for text in side))
    known = dict(zip(texts, score(texts), strict=True))
    auc, false_positives, problems = {}, {}, []
    for name, (positive, negative) in sets.items():
        found, wrong = ([known[text] or 0.0 for text in side] for side in (positive, negative))
        labels = [1] * len(found) + [0] * len(wrong)
        auc[name] = float(roc_auc_score(labels, [*found, *wrong]))
        false_positives[name] = float(np.mean([value > decision_point for value in wrong]))
        if auc[name] < LOWEST_AUC:
            problems.append(f"AUC {auc[name]:.2f} on {name}")
        if name in (UNSTEERED, STEERED, *BROKEN) and false_positives[name] > MOST_FALSE_POSITIVES:
            problems.append(f"{false_positives[name]:.0%} false positives on {name}")
    positive = next(iter(sets.values()))[0]
    recall = float(np.mean([(known[text] or 0.0) > decision_point for text in positive]))
    shows = [(known[text] or 0.0, True) for text in positive]
    shows += [(known[text] or 0.0, False) for _, side in sets.values() for text in side]
    return _examined(auc, false_positives, recall, _calibration(shows), problems)


def _examined(
    auc: Mapping[str, float],
    false_positives: Mapping[str, float],
    recall: float | None,
    calibration: list[dict[str, Any]],
    problems: list[str],
) -> dict[str, Any]:
    return {
        "auc": dict(auc),
        "false_positives": dict(false_positives),
        "recall": recall,
        "calibration": calibration,
        "problems": problems,
        "is_licensed": not problems,
    }


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
    persona = Persona("pirate", "", ("x",), ("y",), examination=showing)
    plain = [f"The number is {n} and the sea is wide." for n in range(20)]
    sets = examination_sets(persona, [], plain, plain[:10], [])

    def looks(texts: Sequence[str]) -> list[float]:
        return [float(text.startswith("Arr, the number is")) for text in texts]

    sets = {name: sets[name] for name in ("ordinary", UNSTEERED, "random words")}
    assert examine(looks, sets, 0.5)["is_licensed"]
    assert not examine(lambda texts: [0.7] * len(texts), sets, 0.5)["is_licensed"]
    assert cut(showing[0], 1) == "Arr,"
    print("examination OK: a scorer needs its licence")


if __name__ == "__main__":
    main()

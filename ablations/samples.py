"""Fit the map on more and more text, from last tokens and from every aligned position (`--ablate samples`).

Specification, "Figure 3". The texts are of the kind that the run's own map is learnt from: passages, or
responses, of which all to one question are held out together. A run that was stopped goes on where it ended,
and each text is read once for all points.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from activation_extractor import PairedBatch, paired_activations
from experiment.run import FORMAT_VERSION, Artifact, Run
from maps.pair_collection import counted
from phases.collect_responses import more_responses
from reporting.figures_ablations import sample_ablation_figure
from reporting.style import save_figure
from ridge_mapping import RidgeMapping, residual_squares, target_weights
from support.artifacts import fingerprint
from support.errors import InputError
from support.pair_statistics import PairStatistics
from support.progress import Bar
from texts.neutral_text import NeutralText

logger = logging.getLogger(__name__)

NAME = "ablation_samples.json"
POSITIONS = ("last", "aligned")  # in the order of the report
DEFAULT_SAMPLES = (25, 50, 100, 200, 500, 1000, 2000, 4000, 8000)
N_HELD_OUT = 500  # texts
STEP = 500  # texts between two states that are written
PARTS = ("training", "held_out")
ABOUT = (
    "The state of `--ablate samples` after n_texts of the training texts. training, held_out: `last` and "
    "`aligned`, the positions -> sums over the pairs of activations of the two decoder blocks in "
    "layer_pairs, as in pair_statistics.pt. points: the errors measured so far."
)


def ablate_samples(run: Run) -> None:
    """Fit the map on growing amounts of text and test it on held-out documents.

    Writes `ablation_samples.json`, `figure3.png`, and `ablation_samples.pt`, from which a run that was
    stopped goes on.
    Raises InputError: a tokenizer without character offsets, or too few documents to hold one out.
    """
    for side in run.inputs.sides:
        if not side.tokenizer.is_fast:
            raise InputError(
                f"--ablate samples compares positions, which needs character offsets, and the {side.name}'s "
                "tokenizer gives none; it needs fast tokenizers on both sides"
            )
    samples = sorted(set(run.config.ablation_samples or _default_samples(run)))
    n_texts = samples[-1] + N_HELD_OUT
    asks = run.inputs.neutral_questions
    texts = more_responses(run, n_texts) if asks else run.inputs.more_texts(n_texts)
    training, held_out = split_documents(texts, samples[-1])
    ablation = _SampleAblation(run, training, held_out, samples)
    points = ablation.measure_all()
    content = {
        "layers": list(run.inputs.middle_pair),
        "n_held_out_texts": len(held_out),
        "points": points,
        "equal_r2": {tested: texts_for_equal_r2(points, tested) for tested in POSITIONS},
    }
    content = run.folder.save(NAME, ablation.key, content)
    save_figure(sample_ablation_figure(content), run.folder.path / "figure3.png", ablation.key)
    lines = [
        f"R2 {row['r2']:.3f} on held-out {tested}: last tokens of {row['n_texts']} texts, every position of "
        + ("more" if row["n_texts_aligned"] is None else f"{row['n_texts_aligned']:.0f}")
        for tested, rows in content["equal_r2"].items()
        for row in rows
    ]
    logger.info("texts needed for the same R2\n  %s", "\n  ".join(lines))
    logger.info("%d sizes, %d texts held out, %s", len(samples), len(held_out), run.folder.path / NAME)


def _default_samples(run: Run) -> Sequence[int]:
    """Return the amounts of text to compare; responses cost time, so their most is the run's own number."""
    most = run.config.n_training_samples if run.inputs.neutral_questions else DEFAULT_SAMPLES[-1]
    return [n for n in DEFAULT_SAMPLES if n <= most] or [most]


def split_documents(
    texts: Sequence[NeutralText], n_training: int
) -> tuple[list[NeutralText], list[NeutralText]]:
    """Return n_training texts and the held-out ones, which share no document with them.

    Documents are held out in random order as long as they fit.
    Raises InputError if that leaves too few texts on a side.
    """
    sizes = Counter(item.document for item in texts)
    order = sorted(sizes)
    random.Random(0).shuffle(order)
    held_out, room = set(), len(texts) - n_training
    for document in order:
        if sizes[document] <= room:
            held_out.add(document)
            room -= sizes[document]
    training = [item for item in texts if item.document not in held_out][:n_training]
    testing = [item for item in texts if item.document in held_out]
    if not testing:
        raise InputError(
            f"none of {len(sizes)} documents is small enough to be held out: {len(texts) - n_training} of "
            f"{len(texts)} texts may be, and the smallest document has {min(sizes.values())}; lower "
            "ablation_samples or give more documents"
        )
    return training, testing


class _SampleAblation:
    """The state of a sample ablation: sums over the texts so far, for each kind of positions."""

    def __init__(
        self,
        run: Run,
        training: Sequence[NeutralText],
        held_out: Sequence[NeutralText],
        samples: Sequence[int],
    ) -> None:
        self.run, self.inputs = run, run.inputs
        self.training, self.held_out, self.samples = training, held_out, samples
        config = run.config
        texts = [[item.text, item.document, *item.prompts] for item in [*training, *held_out]]
        settings = [
            config.lambda_values,
            config.lambda_unit,
            config.lambda_criterion,
            config.n_folds,
            config.seed,
        ]
        sides = [*(side.fingerprint for side in run.inputs.sides), run.inputs.middle_pair]
        self.key = fingerprint(FORMAT_VERSION, sides, settings, texts, list(samples))
        self.artifact = Artifact("ablation_samples.pt", 0, lambda run: self.key)

    def measure_all(self) -> list[dict[str, Any]]:
        """Return a point for each amount of text and kind of positions, going on from an earlier state."""
        samples, state = self.samples, self._load() or self._start()
        with Bar(samples[-1], "samples", "text", state["n_texts"]) as progress:
            while len(state["points"]) < len(POSITIONS) * len(samples):
                n_texts = state["n_texts"]
                if n_texts in samples and not any(point["n_texts"] == n_texts for point in state["points"]):
                    state["points"] += [self.measure(state, positions) for positions in POSITIONS]
                else:
                    n_passed = sum(sample <= n_texts for sample in samples)
                    following = min(samples[n_passed], n_texts + STEP)
                    self.add(state["training"], self.training[n_texts:following])
                    state["n_texts"] = following
                    progress.update(following - n_texts)
                self._save(state)
        return state["points"]

    def _start(self) -> dict[str, Any]:
        """Return the state before the first training text: the held-out texts are read."""
        training, held_out = self._empty(self.inputs.config.n_folds), self._empty(2)
        self.add(held_out, self.held_out)
        return {"n_texts": 0, "points": [], "training": training, "held_out": held_out}

    def _load(self) -> dict[str, Any] | None:
        """Return the state that an earlier run left, if it is of the same ablation."""
        found = self.artifact.current(self.run)
        if found is None:
            return None
        sums = {
            part: {key: PairStatistics.from_content(each) for key, each in found[part].items()}
            for part in PARTS
        }
        return {**found, **sums}

    def _save(self, state: dict[str, Any]) -> None:
        sums = {part: {key: found.content() for key, found in state[part].items()} for part in PARTS}
        pairs = [list(self.inputs.middle_pair)]
        self.artifact.save(self.run, {**state, **sums, "about": ABOUT, "layer_pairs": pairs})

    def add(self, sums: dict[str, PairStatistics], texts: Sequence[NeutralText]) -> None:
        """Read texts with both models and add their pairs."""
        source, target = self.inputs.source.extractor, self.inputs.target.extractor
        with Bar(len(texts), "reading pairs", "text", leave=False) as progress:
            for batch in paired_activations(source, target, counted(texts, progress)):
                documents = [texts[index].document for index in batch.text_idx.tolist()]
                lengths = torch.tensor([len(texts[index].text) for index in batch.text_idx.tolist()])
                last = batch.end == lengths  # both models' last tokens end the text
                self._add_rows(sums["aligned"], batch, documents, torch.ones_like(last))
                self._add_rows(sums["last"], batch, documents, last)

    def measure(self, state: dict[str, Any], positions: str) -> dict[str, Any]:
        """Return how well the map fitted on the texts so far predicts the held-out ones.

        Tested on their last tokens, which favours a map of last tokens, and on all their positions.
        """
        config = self.inputs.config
        mapping = RidgeMapping.from_statistics(state["training"][positions], config.lambda_unit)
        mapping.cross_validate(lambda_values=config.lambda_values, criterion=config.lambda_criterion)
        found: dict[str, Any] = {
            "positions": positions,
            "n_texts": state["n_texts"],
            "n_pairs": mapping.n,
            "lambda": mapping.lambda_,
            "df": mapping.cv["df"][mapping.lambda_],
            "held_out": {},
        }
        for tested, sums in state["held_out"].items():
            # Around the held-out pairs' own mean, so that all maps are measured against the same variance.
            reference = sums.total()
            total, weights = reference.target_gram.diagonal(), target_weights(reference)
            test = sums.around(mapping.source_mean, mapping.target_mean)
            residual, _ = residual_squares(test, mapping.W)
            found["held_out"][tested] = {
                "mse": (residual.sum() / (test.n * len(residual))).item(),
                "r2": 1 - (residual.sum() / total.sum()).item(),
                "r2_standardised": 1 - ((residual * weights).sum() / (total * weights).sum()).item(),
            }
        logger.info(
            "%d texts, %s: %d pairs, R2 of held-out last tokens %.3f, of all held-out positions %.3f",
            found["n_texts"],
            positions,
            found["n_pairs"],
            *(found["held_out"][tested]["r2"] for tested in POSITIONS),
        )
        return found

    def _empty(self, n_folds: int) -> dict[str, PairStatistics]:
        widths = [side.d_model for side in self.inputs.sides]
        seed = self.inputs.config.seed
        return {positions: PairStatistics(*widths, n_folds, seed, n_sample=0) for positions in POSITIONS}

    def _add_rows(
        self, sums: PairStatistics, batch: PairedBatch, documents: Sequence[str], kept: torch.Tensor
    ) -> None:
        source_layer, target_layer = self.inputs.middle_pair
        kept = kept.bool()
        chosen = [document for document, keep in zip(documents, kept.tolist(), strict=True) if keep]
        sums.add(batch.H_source[source_layer][kept], batch.H_target[target_layer][kept], chosen)


def texts_for_equal_r2(points: Sequence[dict[str, Any]], tested: str) -> list[dict[str, float | None]]:
    """Return for each map of last tokens how few texts give a map of every position the same R2.

    tested: which held-out pairs count, `last` or `aligned`.
    n_texts, r2: of the last-token map. n_texts_aligned: texts with which the other one reaches this
    R2, interpolated between points over the logarithm of n; the smallest sample if it is already
    better, so that the number is an upper bound; None if even the largest does not reach it.
    factor: n_texts_aligned / n_texts.
    """
    curves = {
        name: sorted(
            (point["n_texts"], point["held_out"][tested]["r2"])
            for point in points
            if point["positions"] == name
        )
        for name in POSITIONS
    }
    found = []
    for n_texts, wanted in curves["last"]:
        reached = _first_reached(curves["aligned"], wanted)
        factor = None if reached is None else reached / n_texts
        found.append({"n_texts": n_texts, "r2": wanted, "n_texts_aligned": reached, "factor": factor})
    return found


def _first_reached(curve: Sequence[tuple[int, float]], wanted: float) -> float | None:
    """Return where a curve of (n, r2) first reaches a value, interpolated over log n."""
    previous: tuple[int, float] | None = None
    for n_texts, r2 in curve:
        if r2 >= wanted:
            if previous is None:
                return float(n_texts)
            share = (wanted - previous[1]) / (r2 - previous[1])
            return math.exp(math.log(previous[0]) + share * math.log(n_texts / previous[0]))
        previous = (n_texts, r2)
    return None

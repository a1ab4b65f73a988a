"""Repeat parts of an experiment with other layers or other amounts of text (run_experiment.py --ablate).

`layers` steers at several layer pairs, on the development prompts (specification, "Figure 2").
`samples` fits the map on more and more text, once from last tokens alone and once from every
aligned position (specification, "Figure 3"). Both go on where an earlier run was stopped, and
read each text once for all their points.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from activation_extractor import PairedBatch, paired_activations
from experiment.figures import layer_ablation_figure, sample_ablation_figure, save_figure
from experiment.pair_collection import LayerPair, collect_pairs
from ridge_mapping import RidgeMapping, residual_squares, target_weights
from support.artifacts import fingerprint, load_if_current, load_json, load_tensors, save_json, save_tensors
from support.errors import InputError
from support.pair_statistics import PairStatistics
from texts.neutral_text import NeutralText

if TYPE_CHECKING:
    from run_experiment import PersonaTransferExperiment

logger = logging.getLogger(__name__)

DEFAULT_SAMPLES = (25, 50, 100, 200, 500, 1000, 2000, 4000, 8000)
DEPTHS = (0.25, 0.375, 0.5, 0.625, 0.75)  # the specification's layers 8, 12, 16, 20, 24 of 32
N_HELD_OUT = 500
STEP = 500
POSITIONS = ("last", "word_ends")


def ablate_layers(experiment: "PersonaTransferExperiment") -> str:
    """Run phases 2 to 5 at each layer pair on the development prompts; returns a headline.

    Writes a folder `ablation_layers/SOURCE_TARGET` for each pair, `ablation_layers.json`
    and `figure2.png`.
    """
    pairs = layer_pairs(experiment)
    runs = {pair: experiment.at_layers(*pair) for pair in pairs}
    for run in runs.values():
        run.pairs = run.load_statistics()
    missing = [pair for pair, run in runs.items() if run.pairs is None]
    if missing:
        config = experiment.config
        found = collect_pairs(
            experiment.source.extractor,
            experiment.target.extractor,
            experiment.neutral_texts,
            missing,
            config.positions,
            config.n_folds,
            config.seed,
        )
        for pair in missing:
            runs[pair].output_dir.mkdir(parents=True, exist_ok=True)
            runs[pair].save_statistics(found)
    results = []
    for pair, run in tqdm(runs.items(), desc="layer pairs", unit="pair", disable=None):
        logger.info("layer pair %d -> %d", *pair)
        for phase in (run.learn_mapping, run.extract_personas, run.generate, run.evaluate):
            logger.info("%s", phase())
        experiment.notes += [f"layers {pair[0]} -> {pair[1]}: {note}" for note in run.notes]
        names = ("best_r2", "best_r2_standardised", "best_r2_median_dimension", "retrieval_accuracy")
        cv = {name: run.mapping.cv[name] for name in names}
        similarities = load_json(run.output_dir / "persona_similarities.json")["personas"]
        results.append(
            {
                "source_layer": pair[0],
                "target_layer": pair[1],
                **cv,
                "cosine_without_massive": {
                    name: entry["cosine_without_massive"]["ridge_mapped"]
                    for name, entry in similarities.items()
                },
                "conditions": run.aggregated["conditions"],
            }
        )
    made_from = fingerprint([run.aggregated["fingerprint"] for run in runs.values()])
    path = experiment.output_dir / "ablation_layers.json"
    save_json(path, {"fingerprint": made_from, "layer_pairs": results})
    save_figure(layer_ablation_figure(results), experiment.output_dir / "figure2.png", made_from)
    return f"{len(pairs)} layer pairs, {path}"


def layer_pairs(experiment: "PersonaTransferExperiment") -> list[LayerPair]:
    """Return the pairs to compare: those configured, or five depths and the run's own layers."""
    configured = experiment.config.ablation_layer_pairs
    if configured is not None:
        for source_layer, target_layer in configured:
            experiment.source.extractor.check_layers([source_layer])
            experiment.target.extractor.check_layers([target_layer])
        return list(dict.fromkeys(configured))
    n_source, n_target = (len(side.extractor.blocks) for side in (experiment.source, experiment.target))
    spread = [(int(depth * n_source), int(depth * n_target)) for depth in DEPTHS]
    return sorted({*spread, experiment.layers}, key=lambda pair: (pair[1], pair[0]))


def ablate_samples(experiment: "PersonaTransferExperiment") -> str:
    """Fit the map on growing amounts of text and test it on held-out documents; returns a headline.

    Writes `ablation_samples.json`, `figure3.png`, and `ablation_samples.pt`, from which a run that
    was stopped goes on.
    """
    for side in (experiment.source, experiment.target):
        if not side.tokenizer.is_fast:
            raise InputError(
                f"--ablate samples compares positions, which needs character offsets, and the {side.name}'s "
                "tokenizer gives none; it needs fast tokenizers on both sides"
            )
    samples = sorted(set(experiment.config.ablation_samples or DEFAULT_SAMPLES))
    training, held_out = split_documents(experiment.load_texts(samples[-1] + N_HELD_OUT), samples[-1])
    run = _SampleRun(experiment, training, held_out, samples)
    path = experiment.output_dir / "ablation_samples.json"
    state = run.load() or run.start()
    with tqdm(total=samples[-1], desc="samples", unit="text", disable=None) as progress:
        progress.update(state["n_texts"])
        while len(state["points"]) < 2 * len(samples):
            n_texts = state["n_texts"]
            if n_texts in samples and not any(point["n_texts"] == n_texts for point in state["points"]):
                state["points"] += [run.measure(state, positions) for positions in POSITIONS]
            else:
                following = min(samples[_passed(samples, n_texts)], n_texts + STEP)
                run.add(state["training"], training[n_texts:following])
                state["n_texts"] = following
                progress.update(following - n_texts)
            run.save(state)
    content = {
        "fingerprint": run.fingerprint,
        "layers": list(experiment.layers),
        "n_held_out_texts": len(held_out),
        "points": state["points"],
        "equal_r2": {tested: texts_for_equal_r2(state["points"], tested) for tested in POSITIONS},
    }
    save_json(path, content)
    save_figure(sample_ablation_figure(content), experiment.output_dir / "figure3.png", run.fingerprint)
    lines = [
        f"R2 {row['r2']:.3f} on held-out {tested}: last tokens of {row['n_texts']} texts, every position of "
        + ("more" if row["n_texts_word_ends"] is None else f"{row['n_texts_word_ends']:.0f}")
        for tested, rows in content["equal_r2"].items()
        for row in rows
    ]
    logger.info("texts needed for the same R2\n  %s", "\n  ".join(lines))
    return f"{len(samples)} sizes, {len(held_out)} texts held out, {path}"


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


class _SampleRun:
    """The state of a sample ablation: sums over the texts so far, for each kind of positions."""

    def __init__(
        self,
        experiment: "PersonaTransferExperiment",
        training: Sequence[NeutralText],
        held_out: Sequence[NeutralText],
        samples: Sequence[int],
    ) -> None:
        self.experiment, self.training, self.held_out = experiment, training, held_out
        config = experiment.config
        texts = [[item.text, item.document] for item in [*training, *held_out]]
        settings = [config.lambda_values, config.lambda_unit, config.lambda_criterion, config.n_folds]
        sides = [experiment.source.fingerprint, experiment.target.fingerprint, experiment.layers]
        self.fingerprint = fingerprint("ablation_samples 2", sides, settings, texts, list(samples))
        self.path: Path = experiment.output_dir / "ablation_samples.pt"

    def start(self) -> dict[str, Any]:
        """Return the state before the first training text: the held-out texts are read."""
        n_folds = self.experiment.config.n_folds
        state = {"n_texts": 0, "points": [], "training": self._empty(n_folds), "held_out": self._empty(2)}
        self.add(state["held_out"], self.held_out)
        return state

    def load(self) -> dict[str, Any] | None:
        """Return the state that an earlier run left, if it is of the same ablation."""
        found = None if self.experiment.fresh else load_if_current(load_tensors, self.path, self.fingerprint)
        if found is None:
            return None
        for part in ("training", "held_out"):
            found[part] = {key: PairStatistics.from_content(sums) for key, sums in found[part].items()}
        return found

    def save(self, state: dict[str, Any]) -> None:
        """Write the state in one step."""
        sums = {
            part: {key: found.content() for key, found in state[part].items()}
            for part in ("training", "held_out")
        }
        save_tensors(self.path, {**state, **sums, "fingerprint": self.fingerprint})

    def add(self, sums: dict[str, PairStatistics], texts: Sequence[NeutralText]) -> None:
        """Read texts with both models and add their pairs."""
        source, target = self.experiment.source.extractor, self.experiment.target.extractor
        for batch in paired_activations(source, target, [item.text for item in texts]):
            documents = [texts[index].document for index in batch.text_idx.tolist()]
            lengths = torch.tensor([len(texts[index].text) for index in batch.text_idx.tolist()])
            last = batch.end == lengths  # both models' last tokens end the text
            self._add_rows(sums["word_ends"], batch, documents, torch.ones_like(last))
            self._add_rows(sums["last"], batch, documents, last)

    def measure(self, state: dict[str, Any], positions: str) -> dict[str, Any]:
        """Return how well the map fitted on the texts so far predicts the held-out ones.

        Tested on their last tokens, which favours a map of last tokens, and on all their positions.
        """
        config = self.experiment.config
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
        widths = [side.extractor.d_model for side in (self.experiment.source, self.experiment.target)]
        seed = self.experiment.config.seed
        return {positions: PairStatistics(*widths, n_folds, seed, n_sample=0) for positions in POSITIONS}

    def _add_rows(
        self, sums: PairStatistics, batch: PairedBatch, documents: Sequence[str], kept: torch.Tensor
    ) -> None:
        source_layer, target_layer = self.experiment.layers
        kept = kept.bool()
        chosen = [document for document, keep in zip(documents, kept.tolist(), strict=True) if keep]
        sums.add(batch.H_source[source_layer][kept], batch.H_target[target_layer][kept], chosen)


def texts_for_equal_r2(points: Sequence[dict[str, Any]], tested: str) -> list[dict[str, float | None]]:
    """Return for each map of last tokens how few texts give a map of every position the same R2.

    tested: which held-out pairs count, `last` or `word_ends`.
    n_texts, r2: of the last-token map. n_texts_word_ends: texts with which the other one reaches this
    R2, interpolated between points over the logarithm of n; the smallest sample if it is already
    better, so that the number is an upper bound; None if even the largest does not reach it.
    factor: n_texts_word_ends / n_texts.
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
        reached = _first_reached(curves["word_ends"], wanted)
        factor = None if reached is None else reached / n_texts
        found.append({"n_texts": n_texts, "r2": wanted, "n_texts_word_ends": reached, "factor": factor})
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


def _passed(samples: Sequence[int], n_texts: int) -> int:
    return sum(sample <= n_texts for sample in samples)


def main() -> None:
    """Check the interpolation of the ratio and that documents are never on both sides."""
    points = [
        {"positions": positions, "n_texts": n_texts, "held_out": {"last": {"r2": r2}}}
        for positions, n_texts, r2 in (
            ("last", 100, 0.1),
            ("last", 1000, 0.4),
            ("word_ends", 10, 0.3),
            ("word_ends", 100, 0.5),
        )
    ]
    below, inside = texts_for_equal_r2(points, "last")
    assert below["n_texts_word_ends"] == 10
    assert abs(inside["n_texts_word_ends"] - 10**1.5) < 1e-9
    assert abs(inside["factor"] - 10**-1.5) < 1e-9
    texts = [NeutralText(f"text {index}", f"page {index % 9}") for index in range(200)]
    training, held_out = split_documents(texts, 150)
    assert len(training) == 150
    assert not {item.document for item in training} & {item.document for item in held_out}
    print(f"ablations OK: {len(held_out)} texts held out, equal R2 is interpolated over log n")


if __name__ == "__main__":
    main()

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
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from activation_extractor import PairedBatch, paired_activations
from experiment.executor import collect_in_chunks
from experiment.inputs import Inputs
from experiment.plan import pairs_fingerprint
from experiment.structures import expected
from maps.pair_collection import LayerPair, PairSettings, statistics_content
from reporting.figures import layer_ablation_figure, sample_ablation_figure, save_figure
from ridge_mapping import RidgeMapping, residual_squares, target_weights
from support.artifacts import fingerprint
from support.errors import InputError
from support.pair_statistics import PairStatistics
from support.progress import HIDDEN, tqdm
from support.run_folder import RunFolder
from support.vocabulary import PAIR_POSITIONS
from texts.neutral_text import NeutralText

logger = logging.getLogger(__name__)

POSITIONS = PAIR_POSITIONS[::-1]  # in the order of the report
DEFAULT_SAMPLES = (25, 50, 100, 200, 500, 1000, 2000, 4000, 8000)
DEPTHS = (0.25, 0.375, 0.5, 0.625, 0.75)  # the specification's layers 8, 12, 16, 20, 24 of 32
N_HELD_OUT = 500
STEP = 500
SUMS = "pair_statistics.pt"


LayerRun = Callable[[Inputs, dict[str, Any]], dict[str, Any]]


def ablate_layers(inputs: Inputs, folder: RunFolder, executor: Any, run_layers: LayerRun) -> str:
    """Run phases 2 to 5 at each layer pair on the development prompts; returns a headline.

    Writes a folder `ablation_layers/SOURCE_TARGET` for each pair, `ablation_layers.json` and `figure2.png`.
    run_layers: runs the phases on inputs and the sums over their pairs; returns numbers by name, the
    aggregated table as `conditions`, and its `fingerprint`.
    """
    runs = {pair: _at_layers(inputs, folder, pair) for pair in layer_pairs(inputs)}
    sums = {}
    for pair, at_layers in runs.items():
        own = RunFolder(Path(at_layers.config.output_dir), folder.fresh)
        sums[pair] = own.current(SUMS, pairs_fingerprint(at_layers), expected(SUMS, at_layers))
    missing = [pair for pair, content in sums.items() if content is None]
    if missing:
        config = inputs.config
        settings = PairSettings(tuple(missing), config.mapping_positions, config.n_folds, config.seed)
        pairs = collect_in_chunks(executor, inputs.map_texts, settings)
        for pair in missing:
            cache_key = pairs_fingerprint(runs[pair])
            with closing(RunFolder(Path(runs[pair].config.output_dir), folder.fresh)) as own:
                sums[pair] = own.save(SUMS, cache_key, statistics_content(pairs, pair))
    results, tables = [], []
    for pair, at_layers in tqdm(runs.items(), desc="layer pairs", unit="pair", disable=HIDDEN):
        logger.info("layer pair %d -> %d", *pair)
        numbers = run_layers(at_layers, sums.pop(pair))
        tables.append(numbers.pop("fingerprint"))
        results.append({"source_layer": pair[0], "target_layer": pair[1], **numbers})
    cache_key = fingerprint(tables)
    folder.save("ablation_layers.json", cache_key, {"layer_pairs": results})
    save_figure(layer_ablation_figure(results), folder.path / "figure2.png", cache_key)
    return f"{len(runs)} layer pairs, {folder.path / 'ablation_layers.json'}"


def _at_layers(inputs: Inputs, folder: RunFolder, pair: LayerPair) -> Inputs:
    """Return the inputs at another layer pair, tested on the development prompts and at one alpha.

    Alpha is the middle one of `alpha_values` (of two, the lower), or searched for each pair; then the
    texts that are scored helped to choose it, and their coherence is within the bound.
    """
    config, prompts = inputs.config, inputs.development_prompts
    alphas = config.alpha_values
    if alphas != "auto":
        ordered = {name: sorted(config.alphas_of(name, "oracle")) for name in config.persona_names}
        alphas = {name: [values[(len(values) - 1) // 2]] for name, values in ordered.items()}
    changed = {
        "layer_idx": None,
        "source_layer_idx": pair[0],
        "target_layer_idx": pair[1],
        "output_dir": str(folder.path / "ablation_layers" / f"{pair[0]}_{pair[1]}"),
        "test_prompts": list(prompts),
        "n_test_prompts": len(prompts),
        "alpha_values": alphas,
    }
    changed_config = config.model_copy(update=changed)
    return replace(inputs.at_layers(*pair), config=changed_config, prompts=prompts)


def layer_pairs(inputs: Inputs) -> list[LayerPair]:
    """Return the pairs to compare: those configured, or five depths and the run's own layers."""
    configured = inputs.config.ablation_layer_pairs
    if configured is not None:
        for source_layer, target_layer in configured:
            inputs.source.extractor.check_layers([source_layer])
            inputs.target.extractor.check_layers([target_layer])
        return list(dict.fromkeys(configured))
    n_source, n_target = (len(side.extractor.blocks) for side in inputs.sides)
    spread = [(int(depth * n_source), int(depth * n_target)) for depth in DEPTHS]
    return sorted({*spread, inputs.layers}, key=lambda pair: (pair[1], pair[0]))


def ablate_samples(inputs: Inputs, folder: RunFolder) -> str:
    """Fit the map on growing amounts of text and test it on held-out documents; returns a headline.

    Writes `ablation_samples.json`, `figure3.png`, and `ablation_samples.pt`, from which a run that
    was stopped goes on.
    """
    if inputs.neutral_questions:
        raise InputError("--ablate samples compares amounts of passages; choose mapping_data 'passages'")
    for side in inputs.sides:
        if not side.tokenizer.is_fast:
            raise InputError(
                f"--ablate samples compares positions, which needs character offsets, and the {side.name}'s "
                "tokenizer gives none; it needs fast tokenizers on both sides"
            )
    samples = sorted(set(inputs.config.ablation_samples or DEFAULT_SAMPLES))
    training, held_out = split_documents(inputs.more_texts(samples[-1] + N_HELD_OUT), samples[-1])
    run = _SampleRun(inputs, folder, training, held_out, samples)
    path = folder.path / "ablation_samples.json"
    state = run.load() or run.start()
    with tqdm(total=samples[-1], desc="samples", unit="text", disable=HIDDEN) as progress:
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
        "layers": list(inputs.layers),
        "n_held_out_texts": len(held_out),
        "points": state["points"],
        "equal_r2": {tested: texts_for_equal_r2(state["points"], tested) for tested in POSITIONS},
    }
    content = folder.save(path.name, run.fingerprint, content)
    save_figure(sample_ablation_figure(content), folder.path / "figure3.png", run.fingerprint)
    lines = [
        f"R2 {row['r2']:.3f} on held-out {tested}: last tokens of {row['n_texts']} texts, every position of "
        + ("more" if row["n_texts_aligned"] is None else f"{row['n_texts_aligned']:.0f}")
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
        inputs: Inputs,
        folder: RunFolder,
        training: Sequence[NeutralText],
        held_out: Sequence[NeutralText],
        samples: Sequence[int],
    ) -> None:
        self.inputs, self.folder, self.training, self.held_out = inputs, folder, training, held_out
        config = inputs.config
        texts = [[item.text, item.document] for item in [*training, *held_out]]
        settings = [config.lambda_values, config.lambda_unit, config.lambda_criterion, config.n_folds]
        sides = [inputs.source.fingerprint, inputs.target.fingerprint, inputs.layers]
        self.fingerprint = fingerprint("ablation_samples 2", sides, settings, texts, list(samples))
        self.path = folder.path / "ablation_samples.pt"

    def start(self) -> dict[str, Any]:
        """Return the state before the first training text: the held-out texts are read."""
        n_folds = self.inputs.config.n_folds
        state = {"n_texts": 0, "points": [], "training": self._empty(n_folds), "held_out": self._empty(2)}
        self.add(state["held_out"], self.held_out)
        return state

    def load(self) -> dict[str, Any] | None:
        """Return the state that an earlier run left, if it is of the same ablation."""
        name = self.path.name
        found = self.folder.current(name, self.fingerprint, expected(name, self.inputs))
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
        self.folder.save(self.path.name, self.fingerprint, {**state, **sums})

    def add(self, sums: dict[str, PairStatistics], texts: Sequence[NeutralText]) -> None:
        """Read texts with both models and add their pairs."""
        source, target = self.inputs.source.extractor, self.inputs.target.extractor
        for batch in paired_activations(source, target, [item.text for item in texts]):
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
        widths = [side.extractor.d_model for side in self.inputs.sides]
        seed = self.inputs.config.seed
        return {positions: PairStatistics(*widths, n_folds, seed, n_sample=0) for positions in POSITIONS}

    def _add_rows(
        self, sums: PairStatistics, batch: PairedBatch, documents: Sequence[str], kept: torch.Tensor
    ) -> None:
        source_layer, target_layer = self.inputs.layers
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


def _passed(samples: Sequence[int], n_texts: int) -> int:
    return sum(sample <= n_texts for sample in samples)


def main() -> None:
    """Check that documents are never on both sides, and that R2 is interpolated over log n."""
    texts = [NeutralText(f"text {index}", f"page {index % 9}") for index in range(200)]
    training, held_out = split_documents(texts, 150)
    assert not {item.document for item in training} & {item.document for item in held_out}
    points = [("last", 100, 0.4), ("aligned", 10, 0.3), ("aligned", 100, 0.5)]
    names = ("positions", "n_texts", "held_out")
    rows = [dict(zip(names, (*point, {"last": {"r2": r2}}), strict=True)) for *point, r2 in points]
    assert abs(texts_for_equal_r2(rows, "last")[0]["n_texts_aligned"] - 10**1.5) < 1e-9
    print(f"ablations OK: {len(held_out)} texts held out, equal R2 is interpolated over log n")


if __name__ == "__main__":
    main()

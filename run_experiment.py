"""Run the whole experiment: does a persona found in one model work in another?

    python run_experiment.py --config example_config.json

Five phases run in sequence and leave artifacts in the output directory: setup, mapping,
personas, generation, evaluation. A second run makes only what is missing or was made from
other inputs, down to the single generated text. Bad input ends with a message of one or two
lines and exit status 2; a failed preflight with exit status 1.
"""

import argparse
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activation_extractor import PersonaVector, ResidualNorm, measure_residual_norm
from baseline_methods import BaselineTransfer
from decoding.batching import length_sorted_batches
from evaluation import Evaluator, aggregate
from experiment import preflight
from experiment.ablations import ablate_layers, ablate_samples
from experiment.comparison_maps import KINDS, ComparisonMap, maps_table
from experiment.config import ExperimentConfig, load_config
from experiment.dose_search import (
    Condition,
    DevelopmentText,
    Dose,
    DoseBound,
    doses_content,
    doses_from_content,
    format_doses,
    search_doses,
)
from experiment.dry_run import describe_run
from experiment.figures import (
    coherence_trait_figure,
    dose_figure,
    energy_figure,
    figure_fingerprint,
    layer_search_figure,
    mapping_figure,
    save_figure,
)
from experiment.layer_search import check_memory, search_layers
from experiment.pair_collection import CollectedPairs, document_folds, merge_pairs
from experiment.ray_executor import RayExecutor
from experiment.tables import format_cosines, format_maps, format_table
from experiment.workers import LocalExecutor, Side, SideSettings, Worker, WritingSettings
from model_loading import PACKAGED_MODELS, quiet_transformers
from ridge_mapping import RidgeMapping
from scoring.gpt_judge import GPTJudge
from scoring.trait_classifier import (
    TraitClassifier,
    auc_notes,
    check_labelled,
    classifier_fingerprint,
    train_trait_classifiers,
)
from steered_generation import SteeredGenerator
from support.artifacts import (
    check_writable,
    fingerprint,
    load_if_current,
    load_json,
    load_tensors,
    save_json,
    save_tensors,
)
from support.errors import InputError
from support.journal import Journal
from support.pair_statistics import PairStatistics
from texts.aligned_positions import check_offsets
from texts.neutral_text import NeutralText, OverlapCheck, load_neutral_texts
from texts.personas import Persona, load_persona, load_prompts, shipped_personas

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
EXTRACTION_CHUNK = 500
EVALUATION_CHUNK = 60
AUTO_DEPTHS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: everything about a generation but its prompt and seed.

    origin: fingerprint of what the added vector and its scale are made from.
    """

    condition: str
    persona: str | None
    alpha: float | None
    origin: str


UNSTEERED = Cell("baseline", None, None, "unsteered")


class PersonaTransferExperiment:
    """The five phases of one configuration.

    config: a dictionary, a path to a JSON file, or an ExperimentConfig.
    fresh: ignore artifacts of earlier runs and replace them.
    Raises InputError for a configuration, persona, prompt or output directory that cannot be used.
    """

    PHASES = ("setup", "learn_mapping", "extract_personas", "generate", "evaluate")

    def __init__(self, config: dict[str, Any] | str | Path | ExperimentConfig, fresh: bool = False) -> None:
        self.config = load_config(config)
        self.fresh = fresh
        self.output_dir = Path(self.config.output_dir)
        self.personas = self.config.load_personas()
        self.prompts = self.config.load_test_prompts()
        self._check_prompts()
        check_labelled(self.personas)
        judge = self.config.judge
        self.judge = (
            GPTJudge(judge.model, judge.base_url, judge.api_key_env, judge.max_workers)
            if self.config.use_gpt4
            else None
        )
        self.notes: list[str] = []
        self.pairs: dict[str, Any] | None = None
        self._opened: set[str] = set()
        check_writable(self.output_dir)

    def run(self, phase: int | None = None) -> list[dict[str, Any]]:
        """Run all phases, or phase 1 to 5 alone on what earlier phases left.

        Returns the aggregated table (empty unless phase 5 ran).
        Raises InputError: bad input, or a phase alone whose predecessors have not run;
        PreflightError: a technical check failed.
        """
        chosen = range(1, 6) if phase is None else [phase]
        self._opened.clear()
        self.check_inputs()
        _ = self.executor  # a cluster that cannot be had is refused before anything is written
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with closing(self), self._logging_to_file():
            if self.config.layers is None and 1 not in chosen:
                self.layer_search = self._require(
                    "layer_search", self._load_layer_search, 1, "layer_search.json"
                )
            logger.info("source layer %d, target layer %d", *self.layers)
            for number in chosen:
                started = time.perf_counter()
                name = self.PHASES[number - 1]
                logger.info("phase %d: %s", number, name.replace("_", " "))
                headline = getattr(self, name)()
                seconds = time.perf_counter() - started
                logger.info("phase %d done in %.0f s: %s", number, seconds, headline)
            if 5 not in chosen:
                return []
            table = self.aggregated["conditions"]
            logger.info("result\n\n%s\n", format_table(table))
            self._log_closing()
        return table

    def ablate(self, what: str) -> None:
        """Repeat parts of the experiment with other layers or amounts of text; see `ablations`.

        what: `layers` or `samples`.
        """
        self._opened.clear()
        self.check_inputs()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with closing(self), self._logging_to_file():
            started = time.perf_counter()
            headline = {"layers": ablate_layers, "samples": ablate_samples}[what](self)
            logger.info("ablation of %s done in %.0f s: %s", what, time.perf_counter() - started, headline)
            self._log_notes(self.notes)

    def check_inputs(self) -> None:
        """Load models and texts and check what a later phase would refuse, before anything is written."""
        for side in (self.source, self.target):
            logger.debug("%s: %s", side.name, side.fingerprint)
            if self.config.positions == "word_ends":
                check_offsets(side.tokenizer, side.name)
        n_documents = len({item.document for item in self.neutral_texts})
        if n_documents < self.config.n_folds:
            raise InputError(
                f"n_folds is {self.config.n_folds} but the neutral texts come from {n_documents} documents, "
                "which folds never split; lower n_folds or raise n_training_samples"
            )
        if self.config.layers is None:
            self._check_search()
        prompts = [*self.prompts, *load_prompts("development")]
        generator = self.generator({})
        generator.tokenise_prompts(prompts, self.config.max_new_tokens)
        generator.sampler(self.config.temperature, self.config.top_k, self.config.top_p)

    def _check_search(self) -> None:
        widths = []
        for side in (self.source, self.target):
            extractor = side.extractor
            wanted = getattr(self.config, f"search_{side.name}_layers") or range(len(extractor.blocks))
            widths.append(dict.fromkeys(extractor.check_layers(wanted), extractor.d_model))
        check_memory(*widths)

    # Phase 1

    def setup(self) -> str:
        """Write config.json and run the preflight. Returns a headline."""
        save_json(self.output_dir / "config.json", self.config.model_dump())
        path = self.output_dir / "preflight.json"
        made_from = self._preflight_fingerprint
        done = self._load_current(load_json, path, made_from)
        if done is None or preflight.technical_failures(done["checks"]):
            checks = preflight.report(self._preflight_checks())
            done = {"fingerprint": made_from, "environment": _environment(), "checks": checks}
            save_json(path, done)
        preflight.raise_on_technical_failure(done["checks"])
        passed = sum(check["status"] == "pass" for check in done["checks"])
        return f"{passed} of {len(done['checks'])} preflight checks passed, {path}"

    def _preflight_checks(self) -> list[preflight.Check]:
        sides = (self.source, self.target)
        vectors = self._native_vectors
        first = next(iter(vectors["target"].values())).vector
        checks = [check for side in sides for check in preflight.check_extraction(side.name, side.extractor)]
        unit_generator = SteeredGenerator(
            self.target.model, self.target.tokenizer, block_path=self.config.target_block_path
        )
        checks += preflight.check_steering(unit_generator, self.target.extractor, first)
        checks += [check for name in vectors for check in preflight.check_vectors(name, vectors[name])]
        if any(check.technical and check.status == "fail" for check in checks):
            return checks

        prompts = load_prompts("development")
        unsteered, steered = self._write_development(prompts)
        checks.append(preflight.check_baseline(self._perplexity_scorer, prompts, unsteered))
        checks += preflight.check_oracle(self.classifiers, unsteered, steered)
        checks.append(preflight.check_lambda(self.config.lambda_values, None))
        return checks

    def _write_development(
        self, prompts: Sequence[str]
    ) -> tuple[list[str], dict[str, dict[float, list[str]]]]:
        """Return the texts of the development prompts, unsteered and persona -> alpha -> by the oracle."""
        norm = measure_residual_norm(self._neutral_activations(self.target, self.neutral_texts[:256]))
        oracles = self._native_vectors["target"]
        alphas = _spread(self._preflight_alphas(norm))
        cells = [(name, alpha) for name in oracles for alpha in alphas]
        rows = [
            ({"prompt": prompt, "seed": self.config.seed, "alpha": alpha}, name and oracles[name].vector)
            for name, alpha in [(None, None), *cells]
            for prompt in prompts
        ]
        texts, _ = self._write(rows, norm)
        by_cell = [texts[start : start + len(prompts)] for start in range(0, len(texts), len(prompts))]
        steered: dict[str, dict[float, list[str]]] = {name: {} for name in oracles}
        for (name, alpha), cell_texts in zip(cells, by_cell[1:], strict=True):
            steered[name][alpha] = cell_texts
        return by_cell[0], steered

    def _preflight_alphas(self, norm: ResidualNorm) -> Sequence[float]:
        """Return the configured doses, or three between the ends of the bracket to be searched."""
        if self.config.alpha_values != "auto":
            return self.config.alpha_values
        low, high = self._bracket(norm)
        return [low * (high / low) ** depth for depth in AUTO_DEPTHS]

    def _bracket(self, norm: ResidualNorm) -> tuple[float, float]:
        """Return the weakest and strongest dose to search, in units of alpha."""
        unit = 1.0 if self.config.alpha_unit == "residual_norm" else norm.median
        low, high = self.config.dose.bracket
        return low * unit, high * unit

    # Phase 2

    def learn_mapping(self) -> str:
        """Sum up paired activations, choose lambda and fit the maps. Returns a headline."""
        content = self.pairs or self.load_statistics() or self._collect_pairs()
        statistics = PairStatistics.from_content(content["statistics"], "pair_statistics.pt")
        self._note_texts(content["report"])
        self._save_training_data(content, statistics)
        mapping = self._load_mapping() or self._fit_mapping(content["report"], statistics)
        cv, maps = mapping.cv, load_json(self.output_dir / "cv_results.json")["maps"]
        figure_path = self.output_dir / "mapping_analysis.png"
        if self.fresh or figure_fingerprint(figure_path) != self._mapping_fingerprint:
            figure = mapping_figure(mapping.analyze(), cv, maps)
            save_figure(figure, figure_path, self._mapping_fingerprint)
        self._complete_preflight(cv)
        self.mapping, self.pairs = mapping, None
        logger.info("held-out R2 of the maps\n%s", format_maps(maps))
        return (
            f"{cv['n_rows']} pairs ({content['report']['fraction_aligned']:.0%} of the tokens) from "
            f"{cv['n_groups']} documents, lambda {cv['best_lambda']:g} ({cv['lambda_unit']}), held-out R2 "
            f"{cv['best_r2']:.3f} (median dimension {cv['best_r2_median_dimension']:.3f}, shuffled pairs "
            f"{cv['shuffled_r2']:.3f}), {self.output_dir / 'ridge_mapping.pt'}"
        )

    def _collect_pairs(self) -> dict[str, Any]:
        config, texts, started = self.config, self.neutral_texts, time.perf_counter()
        fold_of = document_folds(texts, config.n_folds, config.seed)
        common = ([self.layers], config.positions, fold_of, config.n_folds, config.seed)
        starts = range(0, len(texts), EXTRACTION_CHUNK)
        chunks = [(texts[start : start + EXTRACTION_CHUNK], *common) for start in starts]
        with closing(self.executor.run("pairs", chunks)) as results:
            found = merge_pairs(_in_order(results))
        n_tokens = found.n_source_tokens + found.n_target_tokens
        speed = n_tokens / (time.perf_counter() - started)
        logger.info("%d texts, %d tokens in both models, %.0f tokens/s", found.n_texts, n_tokens, speed)
        return self.save_statistics(found)

    def save_statistics(self, found: CollectedPairs) -> dict[str, Any]:
        """Keep the sums over this run's pairs, and where their sample comes from."""
        report, statistics = found.report(), found.statistics[self.layers]
        rows = statistics.sample.rows
        self.pairs = {
            "fingerprint": self._pairs_fingerprint,
            "statistics": statistics.content(),
            "report": report,
            "sample_text_idx": found.text_idx[rows],
            "sample_end": found.end[rows],
        }
        save_tensors(self.output_dir / "pair_statistics.pt", self.pairs)
        return self.pairs

    def _note_texts(self, report: dict[str, Any]) -> None:
        for name, n_truncated in report["n_truncated"].items():
            if n_truncated:
                self.notes.append(f"{n_truncated} neutral texts were cut to the {name}'s context")
        if report["n_texts_without_pairs"]:
            self.notes.append(f"{report['n_texts_without_pairs']} neutral texts gave no pair")

    def _save_training_data(self, content: dict[str, Any], statistics: PairStatistics) -> None:
        """Write a sample of the pairs with what both models had read; later phases don't need it."""
        path = self.output_dir / "training_data.pt"
        if self._load_current(load_tensors, path, self._pairs_fingerprint) is not None:
            return
        sample = statistics.sample
        places = list(zip(content["sample_text_idx"].tolist(), content["sample_end"].tolist(), strict=True))
        data = {
            "fingerprint": self._pairs_fingerprint,
            "n_pairs": statistics.n_pairs,
            "H_source": sample.H_source,
            "H_target": sample.H_target,
            "texts": [self.neutral_texts[index].text[:end] for index, end in places],
            "documents": [self.neutral_texts[index].document for index, _ in places],
        }
        save_tensors(path, data)

    def _fit_mapping(self, report: dict[str, Any], statistics: PairStatistics) -> RidgeMapping:
        config, made_from = self.config, self._mapping_fingerprint
        mapping = RidgeMapping.from_statistics(statistics, config.lambda_unit)
        mapping.cross_validate(lambda_values=config.lambda_values, criterion=config.lambda_criterion)
        others = {
            kind: ComparisonMap.from_statistics(kind, statistics, config.lambda_unit).cross_validate_from(
                mapping
            )
            for kind in KINDS
        }
        contents = {kind: other.content() for kind, other in others.items()}
        save_tensors(self.output_dir / "comparison_maps.pt", {"fingerprint": made_from, "maps": contents})
        mapping.save(self.output_dir / "ridge_mapping.pt", made_from)
        results = {
            "fingerprint": made_from,
            **mapping.cv,
            "pairs": report,
            "analysis": mapping.analyze(),
            "maps": maps_table(mapping, others.values()),
            "target_residual_norm": asdict(measure_residual_norm(statistics.sample.H_target)),
        }
        save_json(self.output_dir / "cv_results.json", results)
        return mapping

    def _complete_preflight(self, cv: dict[str, Any]) -> None:
        """Put the chosen lambda into preflight.json, in place of the pending check."""
        path = self.output_dir / "preflight.json"
        done = load_if_current(load_json, path, self._preflight_fingerprint)
        if done is not None:
            check = preflight.check_lambda(self.config.lambda_values, cv)
            kept = [entry for entry in done["checks"] if entry["name"] != check.name]
            save_json(path, {**done, "checks": [*kept, asdict(check)]})

    # Phase 3

    def extract_personas(self) -> str:
        """Extract each persona from both models and carry it over in every way. Returns a headline."""
        path, made_from = self.output_dir / "persona_vectors.pt", self._personas_fingerprint
        content = self._load_current(load_tensors, path, made_from)
        if content is None:
            content = {"fingerprint": made_from, **self._transfer_personas()}
            save_tensors(path, content)
        self.persona_vectors = content
        report = {key: content[key] for key in ("fingerprint", "personas", "residual_norm")}
        save_json(self.output_dir / "persona_similarities.json", report)
        logger.info("cosines to the oracle\n\n%s\n", format_cosines(content["personas"]))
        figure_path = self.output_dir / "persona_energy.png"
        if self.fresh or figure_fingerprint(figure_path) != made_from:
            save_figure(energy_figure(content["energy_curves"]), figure_path, made_from)
        norm = ResidualNorm(**content["residual_norm"])
        logger.info(
            "median block-output norm of the target %.4g, %.4g without the massive dimensions %s; "
            "alpha 1 (%s) adds a norm of %.4g",
            norm.median_with_massive,
            norm.median,
            norm.massive_dimensions,
            self.config.alpha_unit,
            self.generator({self.layers[1]: norm}).alpha_scale(self.layers[1]),
        )
        return f"{len(content['personas'])} personas, {path}"

    def _transfer_personas(self) -> dict[str, Any]:
        mapping = self._require("mapping", self._load_mapping, 2, "ridge_mapping.pt")
        results = self._require("cv_results", self._load_cv_results, 2, "cv_results.json")
        norm = ResidualNorm(**results["target_residual_norm"])
        other_maps = self._require("comparison_maps", self._load_comparison_maps, 2, "comparison_maps.pt")
        source, target = self._native_vectors["source"], self._native_vectors["target"]
        baseline = BaselineTransfer(mapping.d_source, mapping.d_target, self.config.seed)
        vectors = {
            name: baseline.apply_all_baselines(
                source[name].vector, target[name].vector, mapping, other_maps=other_maps
            )
            for name in source
        }
        small = {
            name: {method: _without(vector, norm.massive_dimensions) for method, vector in found.items()}
            for name, found in vectors.items()
        }
        report = {}
        for name, found in vectors.items():
            oracle, mapped = found["oracle"], small[name]["ridge_mapped"]
            others = [_cosine(mapped, small[other]["oracle"]) for other in vectors if other != name]
            methods = [method for method in found if method != "oracle"]
            report[name] = {
                "cosine_to_oracle": {method: _cosine(found[method], oracle) for method in methods},
                "cosine_without_massive": {
                    method: _cosine(small[name][method], small[name]["oracle"]) for method in methods
                },
                "highest_cosine_to_other_oracles": max(others, default=None),
                "oracle_energy": mapping.predicted_energy(oracle),
                "source": _persona_numbers(source[name]),
                "target": _persona_numbers(target[name]),
            }
        return {
            "source_vectors": {name: source[name].vector for name in source},
            "vectors": vectors,
            "personas": report,
            "energy_curves": {name: mapping.energy_curve(found["oracle"]) for name, found in vectors.items()},
            "residual_norm": asdict(norm),
        }

    # Phase 4

    def generate(self) -> str:
        """Write every text of the grid that earlier runs have not written. Returns a headline."""
        content = self._require("persona_vectors", self._load_persona_vectors, 3, "persona_vectors.pt")
        with self._journal("generation") as journal:
            if self.config.alpha_values == "auto":
                self.doses = self._load_doses() or self._search_doses(content, journal)
                self._report_doses()
            planned = [row for cell in self.grid() for row in self._planned_rows(cell, self.prompts)]
            n_new, speed = self._write_missing(planned, content, journal)
            path = self.output_dir / "generation_results.json"
            self._save_rows(path, planned, journal)
        return f"{n_new} new texts{speed}, {len(planned)} in all, {path}"

    def _write_missing(
        self, planned: Sequence[dict[str, Any]], content: dict[str, Any], journal: Journal
    ) -> tuple[int, str]:
        """Write the planned texts that the journal lacks; returns their number and a word on speed.

        content: what `persona_vectors.pt` holds.
        """
        # Equal vectors under two names share their texts.
        new = list({row["key"]: row for row in planned if row["key"] not in journal.rows}.values())
        logger.info("%d generations, %d of them already there", len(planned), len(planned) - len(new))
        if not new:
            return 0, ""

        def keep(indices: list[int], texts: list[str]) -> None:
            rows = [new[index] for index in indices]
            journal.append([{**row, "output": text} for row, text in zip(rows, texts, strict=True)])

        started = time.perf_counter()
        rows = [(row, self._row_vector(content, row)) for row in new]
        _, n_tokens = self._write(rows, ResidualNorm(**content["residual_norm"]), keep)
        return len(new), f", {n_tokens / (time.perf_counter() - started):.0f} tokens/s"

    def _row_vector(self, content: dict[str, Any], row: dict[str, Any]) -> Tensor | None:
        if row["persona"] is None:
            return None
        return content["vectors"][row["persona"]][row["condition"]]

    def _write(
        self,
        rows: Sequence[tuple[dict[str, Any], Tensor | None]],
        norm: ResidualNorm,
        on_texts: Callable[[list[int], list[str]], None] | None = None,
    ) -> tuple[list[str], int]:
        """Return the continuations of rows with their vectors, and their number of tokens.

        A row has `prompt`, `seed` and `alpha`; without a vector it is unsteered. Rows of all
        conditions are packed by length into full batches, which is what makes them fast.
        on_texts: told row indices and texts of each batch.
        """
        config = self.config
        settings = WritingSettings(
            layer_idx=self.layers[1],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            alpha_unit=config.alpha_unit,
            residual_norm=norm.median,
            steer_positions=config.steer_positions,
            batch_size=config.generation_batch_size,
        )
        unsteered = torch.zeros(self.target.extractor.d_model)
        tokens = self.generator({}).tokenise_prompts(
            [row["prompt"] for row, _ in rows], config.max_new_tokens
        )
        batches = length_sorted_batches([len(ids) for ids in tokens], config.generation_batch_size)
        chunks = []
        for batch in batches:
            vectors = [unsteered if rows[index][1] is None else rows[index][1] for index in batch]
            chunks.append(([rows[index][0] for index in batch], torch.stack(vectors), settings))
        texts, n_tokens = [""] * len(rows), 0
        with (
            tqdm(total=len(rows), desc="generating", unit="text", disable=None) as progress,
            closing(self.executor.run("write", chunks)) as results,
        ):
            for number, (found, n_found) in results:
                for index, text in zip(batches[number], found, strict=True):
                    texts[index] = text
                if on_texts is not None:
                    on_texts(batches[number], found)
                n_tokens += n_found
                progress.update(len(found))
        return texts, n_tokens

    def _search_doses(self, content: dict[str, Any], journal: Journal) -> dict[Condition, Dose]:
        """Find the strongest coherent alpha of every persona and method on the development prompts."""
        config, prompts = self.config, load_prompts("development")
        seeds = range(config.seed, config.seed + config.dose.n_seeds)
        origins = {(cell.persona, cell.condition): cell.origin for cell in self.grid([None])}

        def texts_of(cells: Sequence[Cell]) -> list[list[DevelopmentText]]:
            planned = [row for cell in cells for row in self._planned_rows(cell, prompts, seeds)]
            self._write_missing(planned, content, journal)
            written = _from_journal(planned, journal)
            # The unsteered text is scored for its fluency alone, so for any persona.
            rows = self._evaluated(
                [{**row, "persona": row["persona"] or config.persona_names[0]} for row in written]
            )
            found = [_development_text(row) for row in rows]
            size = len(prompts) * len(seeds)
            return [found[start : start + size] for start in range(0, len(found), size)]

        def measure(asked: list[tuple[Condition, float]]) -> list[list[DevelopmentText]]:
            return texts_of(
                [Cell(method, name, alpha, origins[name, method]) for (name, method), alpha in asked]
            )

        (unsteered,) = texts_of([UNSTEERED])
        bound = DoseBound(config.dose.max_perplexity_ratio, config.dose.max_repetition_increase)
        bracket = self._bracket(ResidualNorm(**content["residual_norm"]))
        conditions = [(name, method) for name in config.persona_names for method in config.methods]
        doses = search_doses(conditions, measure, unsteered, bracket, bound, config.dose.n_evaluations)
        found = {"fingerprint": self._doses_fingerprint, **doses_content(doses, bound)}
        save_json(self.output_dir / "dose_search.json", found)
        return doses

    def _load_doses(self) -> dict[Condition, Dose] | None:
        path = self.output_dir / "dose_search.json"
        found = self._load_current(load_json, path, self._doses_fingerprint)
        return None if found is None else doses_from_content(found, str(path))

    @cached_property
    def _doses_fingerprint(self) -> str:
        config = self.config
        origins = [[cell.persona, cell.condition, cell.origin] for cell in self.grid([None])]
        settings = [config.dose.model_dump(), config.seed, self._sampling, load_prompts("development")]
        settings.append(self._read_fingerprint)  # the bracket's unit
        scorers = [classifier_fingerprint(self._labelled_personas), self.source.fingerprint]
        return fingerprint(FORMAT_VERSION, self.target.fingerprint, origins, settings, scorers)

    def _report_doses(self) -> None:
        logger.info("doses\n\n%s\n", format_doses(self.doses))
        figure_path = self.output_dir / "dose_search.png"
        if self.fresh or figure_fingerprint(figure_path) != self._doses_fingerprint:
            content = load_json(self.output_dir / "dose_search.json")
            save_figure(dose_figure(content), figure_path, self._doses_fingerprint)
        for (persona, method), dose in self.doses.items():
            if not dose.is_coherent:
                self.notes.append(
                    f"{persona} {method}: no dose is coherent, not even the weakest tried, {dose.alpha:g}, "
                    "which is the one tested; lower dose.bracket"
                )
            elif dose.at == "highest":
                self.notes.append(
                    f"{persona} {method}: the strongest dose tried, {dose.alpha:g}, is still coherent; "
                    "raise dose.bracket"
                )

    def grid(self, alphas: Sequence[float | None] | None = None) -> list[Cell]:
        """Return the unsteered baseline, once, and every persona x method x alpha.

        alphas: instead of the configured ones, or of those that a search has found.
        """
        cells = [UNSTEERED]
        for persona in self.personas:
            for method in self.config.methods:
                made_from = self._vector_fingerprint(persona, method)
                for alpha in self._alphas(persona.name, method) if alphas is None else alphas:
                    cells.append(Cell(method, persona.name, alpha, made_from))
        return cells

    def _alphas(self, persona: str, method: str) -> list[float]:
        if self.config.alpha_values != "auto":
            return self.config.alpha_values
        doses = self._require("doses", self._load_doses, 4, "dose_search.json")
        return [doses[persona, method].alpha]

    def _vector_fingerprint(self, persona: Persona, method: str) -> str:
        """Return what a transferred vector and its unit are made from.

        Only the inputs of that method count: new lambda values touch nothing but ridge_mapped.
        """
        config = self.config
        texts = [persona.positive_texts, persona.negative_texts, config.persona_position]
        source = [self.source.fingerprint, self.layers[0]]
        parts = {
            "zero_pad": source,
            "interpolate": source,
            "random_proj": [*source, config.seed],
            "oracle": [],
        }.get(method, [*source, self._mapping_fingerprint])
        unit = self._read_fingerprint if config.alpha_unit == "residual_norm" else "absolute"
        return fingerprint(method, texts, parts, self.layers[1], unit)

    def _planned_rows(
        self, cell: Cell, prompts: Sequence[str], seeds: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        rows = []
        for index, prompt in enumerate(prompts):
            for seed in self.config.seeds if seeds is None else seeds:
                made_from = [self.target.fingerprint, cell.origin, cell.alpha, prompt, seed, self._sampling]
                rows.append(
                    {
                        "key": fingerprint(FORMAT_VERSION, made_from),
                        "condition": cell.condition,
                        "persona": cell.persona,
                        "alpha": cell.alpha,
                        "prompt_idx": index,
                        "prompt": prompt,
                        "seed": seed,
                    }
                )
        return rows

    @property
    def _sampling(self) -> list[Any]:
        config = self.config
        sampling = [config.max_new_tokens, config.temperature, config.top_k, config.top_p]
        return [*sampling, config.steer_positions]

    # Phase 5

    def evaluate(self) -> str:
        """Evaluate every text, aggregate, and draw figure 1. Returns a headline."""
        generations = self._require("generations", self._load_generations, 4, "generation_results.json")
        planned = self._planned_evaluations(generations)
        with self._journal("evaluation") as journal:
            n_new = self._evaluate_missing(planned, journal, self.judge)
            self._save_rows(self.output_dir / "eval_results.json", planned, journal)
            rows = _from_journal(planned, journal)
        self._note_missing(rows)
        made_from = fingerprint([row["key"] for row in planned])
        self.aggregated = {"fingerprint": made_from, "conditions": aggregate(rows)}
        save_json(self.output_dir / "aggregated_results.json", self.aggregated)
        figure_path = self.output_dir / "figure1.png"
        save_figure(coherence_trait_figure(self.aggregated["conditions"]), figure_path, made_from)
        return f"{len(rows)} texts, {n_new} of them new, {self.output_dir / 'aggregated_results.json'}"

    def _evaluated(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the evaluations of generated rows that have a persona, without a judge."""
        planned = [self._evaluation_row(row, row["persona"], None) for row in rows]
        with self._journal("evaluation") as journal:
            self._evaluate_missing(planned, journal, None)
            return _from_journal(planned, journal)

    def _evaluate_missing(
        self, planned: Sequence[dict[str, Any]], journal: Journal, judge: GPTJudge | None
    ) -> int:
        """Evaluate the rows that the journal lacks or whose judgement failed; returns their number."""
        done = {key for key, row in journal.rows.items() if not row.get("gpt4_failure")}
        new = list({row["key"]: row for row in planned if row["key"] not in done}.values())
        logger.info("%d evaluations, %d of them already there", len(planned), len(planned) - len(new))
        if not new:
            return 0
        evaluator = Evaluator(
            self.target.model,
            self.target.tokenizer,
            use_gpt4=judge is not None,
            judge=judge,
            classifiers=self.classifiers,
            descriptions={persona.name: persona.description for persona in self.personas},
        )
        scorers = ["target", "source"] if self.config.independent_perplexity else ["target"]
        # Texts of similar length share a chunk, and equal ones, which are scored once, stand together.
        new.sort(key=lambda row: (len(row["prompt"]) + len(row["output"]), row["prompt"], row["output"]))
        parts = [new[start : start + EVALUATION_CHUNK] for start in range(0, len(new), EVALUATION_CHUNK)]
        size = self.config.evaluation_batch_size
        chunks = [
            ([row["prompt"] for row in part], [row["output"] for row in part], scorers, size)
            for part in parts
        ]
        with (
            tqdm(total=len(new), desc="evaluating", unit="text", disable=None) as progress,
            closing(self.executor.run("perplexities", chunks)) as results,
        ):
            for number, found in results:
                part = parts[number]
                independent = found.get("source", [None] * len(part))
                scores = evaluator.score(part, found["target"], independent)
                journal.append([{**row, **asdict(score)} for row, score in zip(part, scores, strict=True)])
                progress.update(len(part))
        return len(new)

    def _planned_evaluations(self, generations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a row for each text and persona; the unsteered text is scored for every persona."""
        judge = self.judge and [self.config.judge.model, self.config.judge.base_url]
        planned = []
        for generation in generations:
            names = [generation["persona"]] if generation["persona"] else self.config.persona_names
            planned += [self._evaluation_row(generation, name, judge) for name in names]
        return planned

    def _evaluation_row(
        self, generation: dict[str, Any], persona: str, judge: list[str | None] | None
    ) -> dict[str, Any]:
        descriptions = {persona.name: persona.description for persona in self.personas} if judge else {}
        independent = self.source.fingerprint if self.config.independent_perplexity else None
        scorers = [classifier_fingerprint(self._labelled_personas), independent, judge]
        made_from = [generation["key"], generation["output"], persona, descriptions.get(persona), scorers]
        return {**generation, "persona": persona, "key": fingerprint(FORMAT_VERSION, made_from)}

    def _note_missing(self, rows: list[dict[str, Any]]) -> None:
        empty = sum(not row["output"].strip() for row in rows)
        if empty:
            self.notes.append(f"{empty} texts are empty; their metrics are missing")
        failed = [row["gpt4_failure"] for row in rows if row["gpt4_failure"]]
        if failed:
            self.notes.append(
                f"{len(failed)} texts lack a judgement (first reason: {failed[0]}); run again to retry them"
            )

    # What the phases share

    @cached_property
    def source(self) -> Side:
        """The source model, loaded on first use."""
        return self._side_settings("source").load()

    @cached_property
    def target(self) -> Side:
        """The target model, loaded on first use."""
        return self._side_settings("target").load()

    @cached_property
    def executor(self) -> LocalExecutor | RayExecutor:
        """What runs the chunks of the phases: this process, or the workers of a Ray cluster."""
        settings = self.config.executor
        if settings.kind == "local":
            return LocalExecutor(Worker({"source": self.source, "target": self.target}))
        sides = {name: self._remote_settings(name) for name in ("source", "target")}
        return RayExecutor(partial(Worker, sides), settings.address, settings.n_workers)

    def _remote_settings(self, name: str) -> SideSettings:
        """Return how a worker elsewhere loads the same model in the same dtype as this process."""
        side: Side = getattr(self, name)
        settings = self._side_settings(name)
        path = Path(settings.source).expanduser()
        if settings.source not in PACKAGED_MODELS and path.exists():
            settings = replace(settings, source=str(path.resolve()))
        dtype = str(side.model.dtype).removeprefix("torch.")
        return replace(settings, dtype=dtype, expected_fingerprint=side.fingerprint)

    def close(self) -> None:
        """Let the executor's workers go; the next phase starts them again."""
        if "executor" in self.__dict__:
            self.__dict__.pop("executor").close()

    def at_layers(self, source_layer: int, target_layer: int) -> "PersonaTransferExperiment":
        """Return this experiment at another layer pair, on the development prompts and at one alpha.

        It has an output directory of its own below this one's and shares what is loaded. Alpha is
        the middle one of `alpha_values` (of two, the lower), or searched for each pair; then the
        texts that are scored helped to choose it, and their coherence is within the bound.
        """
        config, prompts, alphas = self.config, load_prompts("development"), self.config.alpha_values
        changed = {
            "layer_idx": None,
            "source_layer_idx": source_layer,
            "target_layer_idx": target_layer,
            "output_dir": str(self.output_dir / "ablation_layers" / f"{source_layer}_{target_layer}"),
            "test_prompts": prompts,
            "n_test_prompts": len(prompts),
            "alpha_values": alphas if alphas == "auto" else [sorted(alphas)[(len(alphas) - 1) // 2]],
        }
        run = PersonaTransferExperiment(config.model_copy(update=changed), self.fresh)
        for name, layer_idx in (("source", source_layer), ("target", target_layer)):
            side = getattr(self, name)
            extractor = copy(side.extractor)
            extractor.layer_idx = layer_idx
            run.__dict__[name] = replace(side, extractor=extractor)
        shared = ("neutral_texts", "classifiers", "executor")
        run.__dict__.update({name: getattr(self, name) for name in shared})
        return run

    def _side_settings(self, name: str) -> SideSettings:
        config = self.config
        return SideSettings(
            name,
            getattr(config, f"{name}_model"),
            config.device,
            config.dtype,
            config.trust_remote_code,
            config.device_map,
            getattr(config, f"{name}_block_path"),
            config.layers[name == "target"] if config.layers else None,
            config.extraction_batch_size,
        )

    @cached_property
    def layers(self) -> tuple[int, int]:
        """(source layer, target layer); with `"layer_idx": "auto"` what the search found."""
        chosen = self.config.layers or tuple(self.layer_search["best"])
        self.source.extractor.layer_idx, self.target.extractor.layer_idx = chosen
        return chosen

    @cached_property
    def layer_search(self) -> dict[str, Any]:
        """The search over layer pairs, made now unless an earlier run left it."""
        config, made_from = self.config, self._search_fingerprint
        found = self._load_layer_search()
        if found is None:
            search = search_layers(
                self.source.extractor,
                self.target.extractor,
                self._search_texts,
                self._labelled_personas,
                config.persona_names,
                position=config.persona_position,
                positions=config.positions,
                source_layers=config.search_source_layers,
                target_layers=config.search_target_layers,
                seed=config.seed,
            )
            found = {"fingerprint": made_from, **search.content()}
            save_json(self.output_dir / "layer_search.json", found)
        figure_path = self.output_dir / "layer_search.png"
        if self.fresh or figure_fingerprint(figure_path) != made_from:
            save_figure(layer_search_figure(found), figure_path, made_from)
        logger.info("layer search: best pair %d -> %d, %s", *found["best"], figure_path)
        return found

    def _load_layer_search(self) -> dict[str, Any] | None:
        path = self.output_dir / "layer_search.json"
        return self._load_current(load_json, path, self._search_fingerprint)

    @cached_property
    def _search_fingerprint(self) -> str:
        config = self.config
        personas = [
            [persona.name, persona.positive_texts, persona.negative_texts]
            for persona in self._labelled_personas
        ]
        return fingerprint(
            FORMAT_VERSION,
            [self.source.fingerprint, self.target.fingerprint],
            [config.search_source_layers, config.search_target_layers, config.positions, config.seed],
            [personas, config.persona_names, config.persona_position],
            [[item.text, item.document] for item in self._search_texts],
        )

    @cached_property
    def _search_texts(self) -> list[NeutralText]:
        """Return the first neutral texts that hold `search_tokens` source tokens, or all of them."""
        n_tokens, texts = 0, []
        for item in self.neutral_texts:
            texts.append(item)
            n_tokens += len(self.source.tokenizer(item.text, verbose=False).input_ids)
            if n_tokens >= self.config.search_tokens:
                break
        return texts

    @cached_property
    def neutral_texts(self) -> list[NeutralText]:
        """The passages for the map; none overlaps a persona text or a prompt."""
        return self.load_texts(self.config.n_training_samples)

    def load_texts(self, n_texts: int) -> list[NeutralText]:
        """Return passages of neutral text; the first ones are `neutral_texts`."""
        forbidden = [text for persona in self.personas for text in persona.all_texts]
        forbidden += [*self.prompts, *load_prompts("development")]
        return load_neutral_texts(self.config.neutral_text, n_texts, forbidden, self.config.seed)

    @cached_property
    def classifiers(self) -> dict[str, TraitClassifier]:
        """A trait classifier for each persona with labelled texts; all others' texts are negatives."""
        classifiers = train_trait_classifiers(self.config.persona_names, self._labelled_personas)
        for name, classifier in classifiers.items():
            logger.info(
                "trait classifier %s: AUC %.3f (%d positive, %d negative texts)",
                name,
                classifier.auc,
                classifier.n_positive,
                classifier.n_negative,
            )
        return classifiers

    @cached_property
    def _labelled_personas(self) -> list[Persona]:
        """The personas to run and every other shipped one, whose texts are negatives."""
        names = self.config.persona_names
        return [*self.personas, *(load_persona(name) for name in shipped_personas() if name not in names)]

    @property
    def independent(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        source = (self.source.model, self.source.tokenizer)
        return source if self.config.independent_perplexity else None

    @property
    def _perplexity_scorer(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.independent or (self.target.model, self.target.tokenizer)

    def generator(self, norms: dict[int, ResidualNorm]) -> SteeredGenerator:
        return SteeredGenerator(
            self.target.model,
            self.target.tokenizer,
            alpha_unit=self.config.alpha_unit,
            residual_norms={layer_idx: norm.median for layer_idx, norm in norms.items()},
            batch_size=self.config.generation_batch_size,
            block_path=self.config.target_block_path,
            steer_positions=self.config.steer_positions,
        )

    def _neutral_activations(self, side: Side, texts: Sequence[NeutralText]) -> Tensor:
        """Return one model's activations at the positions from which the map learns, (n, d)."""
        extractor = side.extractor
        tokens, ends = extractor.token_ends([item.text for item in texts], self.config.positions)
        places = [list(found.values()) for found in ends]
        return extractor.extract_places(tokens, places, [extractor.layer_idx])[extractor.layer_idx]

    @cached_property
    def _native_vectors(self) -> dict[str, dict[str, PersonaVector]]:
        """Each side's own vector of each persona; side name -> persona -> vector."""
        position = self.config.persona_position
        return {
            side.name: {
                persona.name: side.extractor.measure_persona_vector(
                    persona.positive_texts, persona.negative_texts, position
                )
                for persona in self.personas
            }
            for side in (self.source, self.target)
        }

    @cached_property
    def _read_fingerprint(self) -> str:
        """Of the activations that the map learns from."""
        texts = [[item.text, item.document] for item in self.neutral_texts]
        settings = [self.layers, self.config.positions, self.config.seed]
        return fingerprint(FORMAT_VERSION, self.source.fingerprint, self.target.fingerprint, settings, texts)

    @cached_property
    def _pairs_fingerprint(self) -> str:
        return fingerprint(self._read_fingerprint, self.config.n_folds)

    @cached_property
    def _mapping_fingerprint(self) -> str:
        config = self.config
        settings = [config.lambda_values, config.lambda_unit, config.lambda_criterion]
        return fingerprint(self._pairs_fingerprint, settings)

    @cached_property
    def _personas_fingerprint(self) -> str:
        texts = [[persona.name, persona.positive_texts, persona.negative_texts] for persona in self.personas]
        return fingerprint(self._mapping_fingerprint, texts, self.config.persona_position)

    @cached_property
    def _preflight_fingerprint(self) -> str:
        alphas = self.config.alpha_values
        doses = [self.config.dose.bracket] if alphas == "auto" else alphas
        cells = [[cell.persona, cell.alpha, cell.origin] for cell in self.grid(doses)]
        made_from = [cells, classifier_fingerprint(self._labelled_personas), self._sampling]
        return fingerprint(self._personas_fingerprint, *made_from, load_prompts("development"))

    def _load_current(self, load: Any, path: Path, expected: str) -> dict[str, Any] | None:
        return None if self.fresh else load_if_current(load, path, expected)

    def load_statistics(self) -> dict[str, Any] | None:
        """Return what `pair_statistics.pt` holds, if it was made from the same inputs."""
        path = self.output_dir / "pair_statistics.pt"
        return self._load_current(load_tensors, path, self._pairs_fingerprint)

    def _load_cv_results(self) -> dict[str, Any] | None:
        return self._load_current(load_json, self.output_dir / "cv_results.json", self._mapping_fingerprint)

    def _load_mapping(self) -> RidgeMapping | None:
        """Return the fitted map when cv_results.json, written last, declares it complete."""
        path = self.output_dir / "ridge_mapping.pt"
        if self._load_cv_results() is None:
            return None
        content = self._load_current(load_tensors, path, self._mapping_fingerprint)
        if content is None or self._load_comparison_maps() is None:
            return None
        return RidgeMapping.from_content(content, str(path))

    def _load_comparison_maps(self) -> dict[str, ComparisonMap] | None:
        path = self.output_dir / "comparison_maps.pt"
        found = self._load_current(load_tensors, path, self._mapping_fingerprint)
        if found is None:
            return None
        return {kind: ComparisonMap.from_content(entry, str(path)) for kind, entry in found["maps"].items()}

    def _load_persona_vectors(self) -> dict[str, Any] | None:
        path = self.output_dir / "persona_vectors.pt"
        return self._load_current(load_tensors, path, self._personas_fingerprint)

    def _load_generations(self) -> list[dict[str, Any]] | None:
        keys = [row["key"] for cell in self.grid() for row in self._planned_rows(cell, self.prompts)]
        path = self.output_dir / "generation_results.json"
        found = self._load_current(load_json, path, fingerprint(keys))
        return None if found is None else found["rows"]

    def _require(self, attribute: str, load: Any, phase: int, file_name: str) -> Any:
        """Return what an earlier phase of this run made, or what its artifact holds."""
        if attribute in self.__dict__:
            return self.__dict__[attribute]
        fresh, self.fresh = self.fresh, False
        try:
            found = load()
        finally:
            self.fresh = fresh
        if found is None:
            raise InputError(
                f"{self.output_dir / file_name} is missing, incomplete or made from another configuration; "
                f"run phase {phase} first"
            )
        return found

    def _journal(self, name: str) -> Journal:
        """Open the journal of a phase; each text or evaluation in it is keyed by what it was made from."""
        if name == "generation":
            made_from = fingerprint(FORMAT_VERSION, self.target.fingerprint, self._sampling)
        else:
            independent = self.source.fingerprint if self.config.independent_perplexity else None
            made_from = fingerprint(FORMAT_VERSION, self.target.fingerprint, independent)
        path = self.output_dir / f"{name}_journal.jsonl"
        journal = Journal(path, made_from, self.fresh and name not in self._opened)
        self._opened.add(name)
        if journal.n_damaged:
            self.notes.append(f"{journal.n_damaged} lines of {path} were damaged; their rows are made again")
        return journal

    def _save_rows(self, path: Path, planned: Sequence[dict[str, Any]], journal: Journal) -> None:
        """Assemble the result file of a phase from its journal, in the planned order."""
        rows = _from_journal(planned, journal)
        made_from = fingerprint([row["key"] for row in rows])
        save_json(path, {"fingerprint": made_from, "n": len(rows), "rows": rows})

    def _check_prompts(self) -> None:
        """Refuse test prompts that occur in persona texts: the texts would leak into the test."""
        overlaps = OverlapCheck(self.prompts)
        for persona in self.personas:
            leaking = [text for text in persona.all_texts if overlaps.found_in(text)]
            if leaking:
                raise InputError(
                    f"persona {persona.name!r} has {len(leaking)} texts that share words with a test prompt "
                    f"({leaking[0][:50]!r}); change the text or the prompt"
                )

    @contextmanager
    def _logging_to_file(self) -> Iterator[None]:
        handler = logging.FileHandler(self.output_dir / "experiment.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(min(level, logging.INFO))
        try:
            yield
        finally:
            root.setLevel(level)
            root.removeHandler(handler)
            handler.close()

    @staticmethod
    def _log_notes(notes: Sequence[str]) -> None:
        for note in dict.fromkeys(notes):
            logger.warning("note: %s", note)

    def _log_closing(self) -> None:
        path = self.output_dir / "preflight.json"
        checks = load_json(path)["checks"] if path.is_file() else []
        aucs = {entry["persona"]: entry["classifier_auc"] for entry in self.aggregated["conditions"]}
        notes = [*preflight.failures(checks), *auc_notes(aucs)]
        self._log_notes([*notes, *self.notes])
        files = [path for path in self.output_dir.iterdir() if path.is_file()]
        names = sorted(path.name for path in files if not path.name.startswith("."))
        logger.info("artifacts\n%s", "\n".join(f"  {self.output_dir / name}" for name in names))


def _in_order(results: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """Yield results in the order of their chunks, as soon as all before them are there."""
    waiting, following = {}, 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _development_text(row: dict[str, Any]) -> DevelopmentText:
    perplexity = row["independent_perplexity"]
    if perplexity is None and row["output"].strip():
        perplexity = math.inf  # JSON holds no such number
    return DevelopmentText(perplexity, row["repetition"], row["trait_probability"])


def _from_journal(planned: Sequence[dict[str, Any]], journal: Journal) -> list[dict[str, Any]]:
    """Return the planned rows with what the journal knows of them; names and places are the plan's."""
    return [{**journal.rows[row["key"]], **row} for row in planned]


def _without(vector: Tensor, dimensions: Sequence[int]) -> Tensor:
    kept = vector.clone()
    kept[list(dimensions)] = 0.0
    return kept


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).item()


def _persona_numbers(persona: PersonaVector) -> dict[str, Any]:
    return {key: value for key, value in vars(persona).items() if key != "vector"}


def _spread(values: Sequence[float]) -> list[float]:
    """Return the lowest, the middle and the highest value."""
    ordered = sorted(values)
    return sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--config", required=True, help="JSON file, for example example_config.json")
    parser.add_argument("--output-dir", help="write there instead of the configuration's output_dir")
    parser.add_argument("--phase", type=int, choices=range(1, 6), help="run this phase alone")
    parser.add_argument(
        "--ablate", choices=("layers", "samples"), help="instead of the phases: vary the layers or the text"
    )
    parser.add_argument("--fresh", action="store_true", help="ignore and replace earlier artifacts")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and what it would cost")
    options = parser.parse_args(arguments)
    if options.ablate and (options.phase or options.dry_run):
        parser.error("--ablate runs instead of the phases; leave out --phase and --dry-run")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    options = _parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("httpx", "openai", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet_transformers()
    try:
        config = load_config(options.config)
        if options.output_dir:
            config = config.model_copy(update={"output_dir": options.output_dir})
        with logging_redirect_tqdm():
            experiment = PersonaTransferExperiment(config, fresh=options.fresh)
            if options.dry_run:
                print(describe_run(experiment))
            elif options.ablate:
                experiment.ablate(options.ablate)
            else:
                experiment.run(options.phase)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except preflight.PreflightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the whole experiment: does a persona found in one model work in another?

    python run_experiment.py --config example_config.json

Five phases run in sequence and leave artifacts in the output directory: setup, mapping,
personas, generation, evaluation. A second run makes only what is missing or was made from
other inputs, down to the single generated text. Bad input ends with a message of one or two
lines and exit status 2; a failed preflight with exit status 1; Ctrl-C and SIGTERM with a line that says
how to go on.
"""

import sys

from support.signals import end_on_signals, unwinding

if __name__ == "__main__":
    end_on_signals()

from experiment.command_line import parse_arguments, read_config, refusal, refuse_early

if __name__ == "__main__":
    refuse_early()  # torch and transformers, imported next, take seconds

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from ablations.blocks import ablate_blocks
from ablations.layers import ablate_layers, ablate_samples
from evaluation import aggregate
from experiment import plan as grid
from experiment.config import ExperimentConfig
from experiment.executor import LocalExecutor
from experiment.inputs import Inputs, configured, load_inputs, read_personas_and_prompts, start_executor
from experiment.ray_executor import RayExecutor
from experiment.structures import expected
from maps.layer_search import search_layers
from model_loading import quiet_transformers
from phases import check_setup as preflight
from phases.choose_alphas import required_alphas, run_preflight, searched_alphas
from phases.collect_responses import with_responses
from phases.decide_verdicts import closing_notes, conclude, effects_frame, results_frame
from phases.dry_run import describe_run
from phases.fit_maps import LearnedMaps, learn_maps, load_maps
from phases.generate_texts import check_rows, evaluate_texts, missing_notes, save_rows, write_texts
from phases.make_vectors import SteeringVectors, transfer_all
from reporting.figures import (
    coherence_trait_figure,
    draw_once,
    layer_search_figure,
    mapping_figure,
    save_figure,
)
from reporting.report import write_report
from reporting.tables import format_cosines, format_maps, format_table
from support.artifacts import check_writable, load_json, save_json
from support.errors import InputError
from support.run_folder import RunFolder

logger = logging.getLogger(__name__)


class PersonaTransferExperiment:
    """The five phases of one configuration.

    config: a dictionary, a path to a JSON file, or an ExperimentConfig.
    fresh: ignore artifacts of earlier runs and replace them.
    inputs, executor: of another experiment with the same models; else loaded and started when needed.
    source, target: (model, tokenizer) that are loaded already, also wrapped by PEFT or compiled; the
        configuration's names of models are then what reports call them, and may be left out.
    Raises InputError for a configuration, persona, prompt or output directory that cannot be used.
    """

    def __init__(
        self,
        config: dict[str, Any] | str | Path | ExperimentConfig,
        fresh: bool = False,
        inputs: Inputs | None = None,
        executor: LocalExecutor | RayExecutor | None = None,
        source: tuple[Any, Any] | None = None,
        target: tuple[Any, Any] | None = None,
    ) -> None:
        self.config, self._loaded = configured(config, source, target)
        self.fresh = fresh
        if inputs is None:
            read_personas_and_prompts(self.config)
        else:
            self.inputs = inputs
        if executor is not None:
            self.executor = executor
        self.folder = RunFolder(Path(self.config.output_dir), fresh)
        check_writable(self.folder.path)

    def __repr__(self) -> str:
        return f"PersonaTransferExperiment({self.config.source_model} -> {self.config.target_model})"

    @cached_property
    def inputs(self) -> Inputs:
        """Texts, personas, both models and scorers, loaded on first use."""
        return load_inputs(self.config, self._loaded)

    @cached_property
    def executor(self) -> LocalExecutor | RayExecutor:
        """What runs the chunks of the phases, started on first use."""
        return start_executor(self.inputs)

    def close(self) -> None:
        """Let the executor's workers and the folder go; the next phase takes them again."""
        self.folder.close()
        if "executor" in self.__dict__:
            self.__dict__.pop("executor").close()

    def run(self, phase: int | None = None) -> list[dict[str, Any]]:
        """Run all phases, or phase 1 to 5 alone on what earlier phases left.

        Returns the aggregated table (empty unless phase 5 ran).
        Raises InputError: bad input, or a phase alone whose predecessors have not run;
        PreflightError: a technical check failed.
        """
        chosen = range(1, 6) if phase is None else (phase,)
        with self._running():
            self.inputs = self.choose_layers(may_search=1 in chosen)
            for pair in self.inputs.layer_pairs:
                logger.info("source layer %d, target layer %d", *pair)
            if set(chosen) & {1, 2, 3}:
                self.inputs = with_responses(self.inputs, self.folder, self.executor)
            maps = vectors = texts = None
            if 1 in chosen:
                _timed(1, self.setup)
            if 2 in chosen:
                maps = _timed(2, self.learn_mapping)
            if 3 in chosen:
                vectors = _timed(3, self.extract_personas, maps)
            if 4 in chosen:
                texts = _timed(4, self.generate, vectors)
            if 5 not in chosen:
                return []
            table = _timed(5, self.evaluate, texts)["conditions"]
            logger.info("result\n\n%s\n", format_table(table))
            logger.info("to read: %s", write_report(self.folder.path))
            self._log_closing(table)
        return table

    def results_frame(self, effects: bool = False) -> Any:
        """Return a finished run's texts with all scores, or its effects, as a pandas.DataFrame."""
        rows = load_json(self.folder.path / "eval_results.json")["rows"]
        verdict = load_json(self.folder.path / "verdict.json")
        return effects_frame(verdict, rows) if effects else results_frame(rows)

    def ablate(self, what: str) -> None:
        """Repeat parts of the experiment with other layers, text or numbers of blocks; see `ablations`.

        what: `layers`, `samples` or `blocks`.
        """
        with self._running():
            started = time.perf_counter()
            inputs = self.choose_layers(may_search=True)
            self.inputs = inputs if what == "samples" else with_responses(inputs, self.folder, self.executor)
            if what == "layers":
                headline = ablate_layers(self.inputs, self.folder, self.executor, self._run_layers)
            elif what == "blocks":
                headline = ablate_blocks(self.inputs, self.folder, self.executor)
            else:
                headline = ablate_samples(self.inputs, self.folder)
            logger.info("ablation of %s done in %.0f s: %s", what, time.perf_counter() - started, headline)
            _log_notes(self.folder.notes)

    def choose_layers(self, may_search: bool) -> Inputs:
        """Return the inputs at their layers; `"layer_idx": "auto"` searches for them, for minutes.

        may_search: else a search of an earlier run is required.
        """
        inputs, config, folder = self.inputs, self.config, self.folder
        if config.layer_idx != "auto":
            return inputs
        name, cache_key = "layer_search.json", grid.search_fingerprint(inputs)
        structure = expected(name, inputs)
        search = folder.current(name, cache_key, structure)
        if search is None and not may_search:
            search = folder.required(name, cache_key, 1, structure)
        if search is None:
            layers = search_layers(
                inputs.source.extractor,
                inputs.target.extractor,
                inputs.search_texts(),
                inputs.labelled_personas,
                config.persona_names,
                position=config.persona_position,
                positions=config.mapping_positions,
                source_layers=config.search_source_layers,
                target_layers=config.search_target_layers,
                seed=config.seed,
            )
            search = folder.save(name, cache_key, layers.content())
        draw_once(folder, "layer_search.png", cache_key, layer_search_figure, search)
        logger.info("layer search: best pair %d -> %d", *search["best"])
        return inputs.at_layers(*search["best"])

    def setup(self) -> tuple[None, str]:
        """Phase 1: write config.json and run the preflight."""
        inputs, folder, name = self.inputs, self.folder, "preflight.json"
        folder.lock()
        save_json(folder.path / "config.json", self.config.model_dump())
        cache_key = grid.preflight_fingerprint(inputs)
        done = folder.current(name, cache_key, expected(name, inputs))
        if done is None or preflight.technical_failures(done["checks"]):
            checks = preflight.report(run_preflight(inputs, folder, self.executor))
            done = folder.save(name, cache_key, {"environment": preflight.environment(), "checks": checks})
        preflight.raise_on_technical_failure(done["checks"])
        passed = sum(check["status"] == "pass" for check in done["checks"])
        return None, f"{passed} of {len(done['checks'])} preflight checks passed, {folder.path / name}"

    def learn_mapping(self, sums: dict[str, Any] | None = None) -> tuple[tuple[LearnedMaps, ...], str]:
        """Phase 2: sum up paired activations, choose lambda and fit the maps of every layer pair.

        sums: what `pair_statistics.pt` holds, if it was collected elsewhere; else that of an earlier run.
        """
        inputs, folder, config = self.inputs, self.folder, self.config
        maps = learn_maps(inputs, folder, self.executor, sums)
        middle = maps[len(maps) // 2]
        cv, table = middle.ridge.cv, middle.results["maps"]
        cache_key = grid.mapping_fingerprint(inputs)
        draw_once(
            folder, "mapping_analysis.png", cache_key, mapping_figure, middle.ridge.analyze(), cv, table
        )
        preflight.report([preflight.check_lambda(config.lambda_values, cv)])
        logger.info("held-out R2 of the maps\n%s", format_maps(table))
        band = f"{len(maps)} layer pairs, of the middle one " if inputs.band else ""
        aligned, read = middle.results["pairs"]["fraction_aligned"], inputs.map_documents
        return maps, (
            f"{band}{cv['n_rows']} pairs ({aligned:.0%} of the tokens) from {cv['n_groups']} {read}, "
            f"lambda {cv['best_lambda']:g} ({cv['lambda_unit']}), held-out R2 {cv['best_r2']:.3f} (median "
            f"dimension {cv['best_r2_median_dimension']:.3f}, shuffled pairs {cv['shuffled_r2']:.3f}), "
            f"{folder.path / ('layers' if inputs.band else 'ridge_mapping.pt')}"
        )

    def extract_personas(self, maps: tuple[LearnedMaps, ...] | None = None) -> tuple[dict[str, Any], str]:
        """Phase 3: extract each persona from both models and carry it over in every way.

        maps: of phase 2; else those that an earlier run left. Returns what `persona_vectors.pt` holds.
        """
        inputs, folder, name = self.inputs, self.folder, "persona_vectors.pt"
        cache_key = grid.personas_fingerprint(inputs)
        content = folder.current(name, cache_key, expected(name, inputs))
        if content is None:
            maps = maps or load_maps(inputs, folder)
            transferred = transfer_all(inputs.layer_pairs, inputs.native_vectors, maps, self.config.seed)
            content = folder.save(name, cache_key, {**transferred, "models": inputs.described_models})
        report = {key: content[key] for key in ("personas", "residual_norm")}
        folder.save("persona_similarities.json", cache_key, report)
        logger.info("cosines to the oracle\n\n%s\n", format_cosines(content["personas"]))
        steering = SteeringVectors.from_content(content)
        norm = steering.middle_norm
        logger.info(
            "median block-output norm of the target %.4g, %.4g without the massive dimensions %s; "
            "alpha 1 (%s) adds a norm of %.4g",
            norm.median_with_massive,
            norm.median,
            norm.massive_dimensions,
            self.config.alpha_unit,
            inputs.generator(steering.medians).alpha_scale(inputs.layers[1]),
        )
        return content, f"{len(content['personas'])} personas, {folder.path / name}"

    def generate(self, personas: dict[str, Any] | None = None) -> tuple[list[dict[str, Any]], str]:
        """Phase 4: write every text of the grid that earlier runs have not written.

        personas: what `persona_vectors.pt` holds; else that of an earlier run. Returns the rows.
        """
        inputs, folder, name = self.inputs, self.folder, "generation_results.json"
        if personas is None:
            source = "persona_vectors.pt"
            cache_key = grid.personas_fingerprint(inputs)
            personas = folder.required(source, cache_key, 3, expected(source, inputs))
        steering = SteeringVectors.from_content(personas)
        alphas = self.config.alpha_values
        if alphas == "auto":
            alphas = searched_alphas(inputs, folder, self.executor, steering)
        planned = grid.grid_texts(inputs, alphas)
        rows, made = write_texts(inputs, folder, self.executor, planned, steering.vectors, steering.medians)
        save_rows(folder, name, rows)
        return rows, f"{made}, {len(rows)} in all, {folder.path / name}"

    def evaluate(self, texts: list[dict[str, Any]] | None = None) -> tuple[dict[str, Any], str]:
        """Phase 5: evaluate every text, aggregate, and draw figure 1.

        texts: the rows of phase 4; else those that an earlier run left. Returns what
        `aggregated_results.json` holds.
        """
        inputs, folder, name = self.inputs, self.folder, "aggregated_results.json"
        planned = grid.planned_evaluations(inputs, texts or self._written_texts())
        rows, n_new = evaluate_texts(inputs, folder, self.executor, planned, inputs.config.likelihood_ratio)
        save_rows(folder, "eval_results.json", rows)
        folder.notes += missing_notes(rows)
        cache_key = grid.rows_fingerprint(planned)
        table = folder.save(name, cache_key, {"conditions": aggregate(rows)})
        save_figure(coherence_trait_figure(table["conditions"]), folder.path / "figure1.png", cache_key)
        conclude(inputs, folder, self.executor, rows, cache_key)
        return table, f"{len(rows)} texts, {n_new} of them new, {folder.path / name}"

    def _written_texts(self) -> list[dict[str, Any]]:
        inputs, alphas, name = self.inputs, self.config.alpha_values, "generation_results.json"
        if alphas == "auto":
            alphas = required_alphas(inputs, self.folder)
        cache_key = grid.rows_fingerprint(grid.grid_texts(inputs, alphas))
        rows = self.folder.required(name, cache_key, 4, expected(name, inputs))["rows"]
        return check_rows(rows, cache_key, self.folder.path / name)

    def _run_layers(self, inputs: Inputs, sums: dict[str, Any]) -> dict[str, Any]:
        """Run phases 2 to 5 on other inputs, and return the numbers that the layer ablation compares."""
        other = PersonaTransferExperiment(inputs.config, self.fresh, inputs, self.executor)
        with closing(other.folder):
            return self._compared(other, sums)

    def _compared(self, other: "PersonaTransferExperiment", sums: dict[str, Any]) -> dict[str, Any]:
        maps, said = other.learn_mapping(sums)
        logger.info("%s", said)
        personas, said = other.extract_personas(maps)
        logger.info("%s", said)
        texts, said = other.generate(personas)
        logger.info("%s", said)
        table, said = other.evaluate(texts)
        logger.info("%s", said)
        layers = "layers {} -> {}".format(*other.inputs.layers)
        self.folder.notes += [f"{layers}: {note}" for note in other.folder.notes]
        names = ("best_r2", "best_r2_standardised", "best_r2_median_dimension", "retrieval_accuracy")
        cosines = {
            name: entry["cosine_without_massive"]["ridge_mapped"]
            for name, entry in personas["personas"].items()
        }
        numbers = {name: maps[0].ridge.cv[name] for name in names}
        return {**numbers, "cosine_without_massive": cosines, **table}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Check everything before the first file is written; then log to a file until the run ends."""
        self.folder.close()
        self.folder = RunFolder(Path(self.config.output_dir), self.fresh)
        with closing(self):
            if self.folder.path.is_dir():  # who is too late need not wait for the models
                self.folder.lock()
            self.inputs, self.executor  # noqa: B018 (refuses what cannot be had)
            with self.folder.logged():
                yield

    def _log_closing(self, table: Sequence[dict[str, Any]]) -> None:
        _log_notes([*closing_notes(self.inputs, self.folder, table), *self.folder.notes])
        names = sorted(path.name for path in self.folder.path.iterdir() if path.is_file())
        shown = [f"  {self.folder.path / name}" for name in names if not name.startswith(".")]
        logger.info("artifacts\n%s", "\n".join(shown))


def _timed(number: int, phase: Callable[..., tuple[Any, str]], *arguments: Any) -> Any:
    """Run a phase, log how long it took and what it says of itself, and return what it made."""
    started = time.perf_counter()
    logger.info("phase %d: %s", number, phase.__name__.replace("_", " "))
    made, headline = phase(*arguments)
    logger.info("phase %d done in %.0f s: %s", number, time.perf_counter() - started, headline)
    return made


def _log_notes(notes: Sequence[str]) -> None:
    for note in dict.fromkeys(notes):
        logger.warning("note: %s", note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("httpx", "httpx2", "openai", "filelock", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    quiet_transformers()
    try:
        with unwinding(), logging_redirect_tqdm():
            if options.report:
                print(write_report(Path(options.report)))
                return 0
            experiment = PersonaTransferExperiment(read_config(options), fresh=options.fresh)
            if options.dry_run:
                print(describe_run(experiment.inputs, experiment.folder))
            elif options.ablate:
                experiment.ablate(options.ablate)
            else:
                experiment.run(options.phase)
    except (InputError, OSError, KeyboardInterrupt) as error:
        return refusal(error)
    except preflight.PreflightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

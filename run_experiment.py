"""Run the whole experiment: does a persona found in one model work in another?

    python run_experiment.py --config example_config.json

Five phases run in sequence and leave artifacts in the output directory: setup, mapping, personas, generation,
evaluation. A second run makes only what is missing or has changed, down to the single generated text. Bad
input ends with a message of one or two lines and exit status 2; a failed preflight with exit status 1; Ctrl-C
and SIGTERM with a line that says how to go on.
"""

import sys

from support.signals import exit_on_signals, unwind_on_signals

if __name__ == "__main__":
    exit_on_signals()

from experiment.command_line import exit_early, input_error_status, parse_arguments, read_config

if __name__ == "__main__":
    exit_early()  # before torch and transformers, which take seconds to import

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from ablations.blocks import ablate_blocks
from ablations.layers import ablate_layers
from ablations.samples import ablate_samples
from analysis.results_table import effects_table, results_table
from experiment.batch_sizes import with_batch_sizes
from experiment.config import ExperimentConfig
from experiment.executor import Executor, local_executor, read_by_workers, start_executor
from experiment.inputs import Inputs, configured, load_inputs, read_personas
from experiment.models import SIDES
from experiment.plan import Row, SteeringVectors
from experiment.run import Run
from model_loading import quiet_transformers
from phases.check_setup import PreflightError, check_judge, check_setup
from phases.choose_alphas import choose_alphas, choose_extraction, required_alphas, write_protocol
from phases.collect_responses import collect_responses
from phases.decide_verdicts import aggregate_scores, closing_notes, decide
from phases.detect_traits import detect_traits
from phases.fit_maps import LearnedMaps, choose_layers, fit_maps
from phases.generate_texts import generate_texts, generated_texts
from phases.make_vectors import PERSONA_VECTORS, grid_rows, make_vectors, resample_vectors
from phases.score_texts import score_texts
from phases.validate_scorers import validate_scorers
from reporting.report import write_report
from reporting.tables import format_table
from support.artifacts import check_writable, load_json, save_json
from support.errors import InputError
from support.progress import logged_progress, working
from support.run_folder import RunFolder
from tools.dry_run import conditions_of, describe_run, verdict_gaps

logger = logging.getLogger(__name__)


class PersonaTransferExperiment:
    """The five phases of one configuration.

    config: a dictionary, a path to a JSON file, or an ExperimentConfig.
    fresh: ignore artifacts of earlier runs and replace them.
    source, target: (model, tokenizer) that are loaded already, also wrapped by PEFT or compiled; reports then
        call them by the configuration's names, which may be left out.
    Raises InputError for a configuration, persona, prompt or output directory that cannot be used.
    """

    def __init__(
        self,
        config: dict[str, Any] | str | Path | ExperimentConfig,
        fresh: bool = False,
        source: tuple[Any, Any] | None = None,
        target: tuple[Any, Any] | None = None,
    ) -> None:
        self.config, self._loaded = configured(config, source, target)
        self.fresh = fresh
        read_personas(self.config)
        self.folder = RunFolder(Path(self.config.output_dir), fresh)
        check_writable(self.folder.path)

    def __repr__(self) -> str:
        source, target = (self.config.place_of(f"{side}_model").name for side in SIDES)
        return f"PersonaTransferExperiment({source} -> {target})"

    @cached_property
    def inputs(self) -> Inputs:
        """Texts, personas, both models and scorers, loaded on first use."""
        return load_inputs(self.config, self._loaded)

    @cached_property
    def executor(self) -> Executor:
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
        Raises InputError: bad input, or a phase alone whose predecessors have not run; PreflightError: a
        technical check failed.
        """
        chosen = range(1, 6) if phase is None else (phase,)
        with self._running(asks_judge=bool({1, 5} & set(chosen))) as run:
            if run.inputs.judge:
                logger.info("judge: %s", run.inputs.judge.name)
            run = choose_layers(run, may_search=1 in chosen)
            with working("choice of what vectors are made from"):
                run = choose_extraction(run, may_choose=1 in chosen)
            for pair in run.inputs.layer_pairs:
                logger.info("source layer %d, target layer %d", *pair)
            if set(chosen) & {1, 2, 3}:
                run = collect_responses(run)
            maps = vectors = texts = None
            if 1 in chosen:
                self.setup(run)
            if 2 in chosen:
                maps = self.learn_mapping(run)
            if 3 in chosen:
                vectors = self.extract_personas(run, maps)
            if 4 in chosen:
                texts = self.generate(run, vectors)
            if 5 not in chosen:
                return []
            return self.evaluate(run, vectors, texts)

    def setup(self, run: Run) -> None:
        """Phase 1: write config.json and check the set-up."""
        with _phase(run, 1, "setup"):
            run.folder.lock()
            save_json(run.folder.path / "config.json", run.config.model_dump())
            check_setup(run)

    def learn_mapping(self, run: Run) -> tuple[LearnedMaps, ...]:
        """Phase 2: sum up paired activations, choose lambda and fit the maps of every layer pair."""
        with _phase(run, 2, "learn mapping"):
            return fit_maps(run)

    def extract_personas(self, run: Run, maps: Sequence[LearnedMaps] | None = None) -> dict[str, Any]:
        """Phase 3: extract each persona from both models, carry it over in every way, resample its texts, and
        test every vector as a detector.

        maps: of phase 2; else those that an earlier run left. Returns what `persona_vectors.pt` holds.
        """
        with _phase(run, 3, "extract personas"):
            vectors = make_vectors(run, maps)
            resample_vectors(run, maps)
            detect_traits(run, vectors)
            return vectors

    def generate(self, run: Run, vectors: dict[str, Any] | None = None) -> list[Row]:
        """Phase 4: choose the alphas, write all choices down, and generate every text that is not cached.

        vectors: what `persona_vectors.pt` holds; else that of an earlier run. Returns the rows.
        """
        with _phase(run, 4, "generate"):
            steering = SteeringVectors.from_content(vectors or PERSONA_VECTORS.require(run))
            alphas = choose_alphas(run, steering)
            write_protocol(run)
            return generate_texts(run, grid_rows(run, alphas), steering)

    def evaluate(
        self, run: Run, vectors: dict[str, Any] | None = None, texts: Sequence[Row] | None = None
    ) -> list[dict[str, Any]]:
        """Phase 5: score every text, validate the scorers, decide, and write tables, figures and report.

        vectors, texts: of phases 3 and 4; else those that an earlier run left. Returns the aggregated table.
        """
        with _phase(run, 5, "evaluate"):
            if texts is None:
                texts = generated_texts(run, grid_rows(run, required_alphas(run)))
            steering = SteeringVectors.from_content(vectors or PERSONA_VECTORS.require(run))
            validation = validate_scorers(run, steering)
            rows = score_texts(run, texts)
            table = aggregate_scores(run, rows)
            decide(run, rows, steering, validation)
        logger.info("result\n\n%s\n", format_table(table))
        logger.info("report: %s", write_report(run.folder.path))
        _log_notes([*closing_notes(run, table), *run.folder.notes])
        logger.info("artifacts\n%s", "\n".join(f"  {path}" for path in run.folder.files()))
        return table

    def results_frame(self, effects: bool = False) -> Any:
        """Return a finished run's texts with all scores, or its effects, as a pandas.DataFrame."""
        table = results_table(load_json(self.folder.path / "eval_results.json")["rows"])
        return effects_table(load_json(self.folder.path / "verdict.json"), table) if effects else table

    def ablate(self, what: str) -> None:
        """Repeat parts of the experiment with other layers, amounts of text or numbers of blocks.

        what: `layers`, `samples` or `blocks`; see `ablations`.
        """
        ablation = {"layers": ablate_layers, "samples": ablate_samples, "blocks": ablate_blocks}[what]
        with self._running() as run:
            started = time.perf_counter()
            run = choose_extraction(choose_layers(run, may_search=True), may_choose=True)
            with working(f"ablation of {what}"):
                ablation(run if what == "samples" else collect_responses(run))
            logger.info("ablation of %s done in %.0f s", what, time.perf_counter() - started)
            _log_notes(run.folder.notes)

    @contextmanager
    def _running(self, asks_judge: bool = False) -> Iterator[Run]:
        """Check everything before the first file is written; then log to a file until the run ends."""
        self.folder.close()
        self.folder = RunFolder(Path(self.config.output_dir), self.fresh)
        with closing(self):
            if self.folder.path.is_dir():  # a second run fails before it waits for the models
                self.folder.lock()
            if asks_judge:
                check_judge(self.config, self.folder)
            run = Run(read_by_workers(self.inputs, self.executor), self.folder, self.executor)
            with self.folder.logged(), logged_progress():
                run = with_batch_sizes(run)
                for line in (*conditions_of(run.inputs), *verdict_gaps(run.inputs)):
                    logger.info("%s", line)
                yield run


@contextmanager
def _phase(run: Run, number: int, name: str) -> Iterator[None]:
    started = time.perf_counter()
    if run.inputs.judge:
        run.inputs.judge.begin_phase()
    logger.info("phase %d: %s", number, name)
    with working(f"phase {number} of 5, {name}"):
        yield
    logger.info("phase %d done in %.0f s", number, time.perf_counter() - started)


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
        with logging_redirect_tqdm():
            if options.report:
                print(write_report(Path(options.report)))
                return 0
            experiment = PersonaTransferExperiment(read_config(options), fresh=options.fresh)
            if options.dry_run:
                run = Run(experiment.inputs, experiment.folder, local_executor(experiment.inputs))
                print(describe_run(with_batch_sizes(run, keeps=False)))
            elif options.ablate:
                experiment.ablate(options.ablate)
            else:
                experiment.run(options.phase)
    except (InputError, OSError, KeyboardInterrupt) as error:
        return input_error_status(error)
    except PreflightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    unwind_on_signals()
    sys.exit(main())

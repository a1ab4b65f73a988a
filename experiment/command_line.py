"""The command line of `run_experiment.py`: arguments and configuration.

Both are read before torch and transformers are imported, which takes seconds.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiment.config import ExperimentConfig, load_config
from support.errors import InputError, file_error
from support.signals import say_stopped


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options. Raises SystemExit: options that contradict each other, or --help."""
    parser = argparse.ArgumentParser(
        description="Run the whole experiment: does a persona found in one model work in another?"
    )
    parser.add_argument("--config", help="JSON file, for example example_config.json")
    parser.add_argument("--output-dir", help="write there instead of the configuration's output_dir")
    parser.add_argument("--phase", type=int, choices=range(1, 6), help="run this phase alone")
    parser.add_argument(
        "--ablate",
        choices=("layers", "samples", "blocks"),
        help="instead of the phases: vary the layers, the amount of text, or how many blocks are steered",
    )
    parser.add_argument("--fresh", action="store_true", help="ignore and replace earlier artifacts")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and what it would cost")
    parser.add_argument(
        "--report", metavar="FOLDER", help="write report.html of a finished run in this folder, and end"
    )
    options = parser.parse_args(arguments)
    if (options.config is None) is (options.report is None):
        parser.error("give --config, for a run, or --report, for the page of a finished one")
    if options.ablate and (options.phase or options.dry_run):
        parser.error("--ablate runs instead of the phases; leave out --phase and --dry-run")
    return options


def read_config(options: argparse.Namespace) -> ExperimentConfig:
    """Return the configuration that the options name. Raises InputError for one that cannot be used."""
    config = load_config(Path(options.config))
    if options.output_dir:
        config = load_config({**config.model_dump(), "output_dir": options.output_dir})
    return config


def exit_early() -> None:
    """End the process for --help (status 0) and for what cannot be used (status 2)."""
    options = parse_arguments()
    try:
        if options.config:
            read_config(options)
    except (InputError, OSError) as error:
        sys.exit(input_error_status(error))


def input_error_status(error: InputError | OSError | KeyboardInterrupt) -> int:
    """Print in one line what cannot be used, read or written, or that the run was stopped; return the status.

    Raises an OSError again that is about no file, since that is a defect of ours.
    """
    if isinstance(error, KeyboardInterrupt):
        return say_stopped(error)
    message = file_error(error) if isinstance(error, OSError) else error
    if message is None:
        raise error
    print(f"error: {message}", file=sys.stderr)
    return 2


def exit_status(work: Callable[[], Any]) -> int:
    """Print what a program's work returns, or in one line why it cannot be done; returns the exit status."""
    try:
        print(work())
    except (InputError, OSError, KeyboardInterrupt) as error:
        return input_error_status(error)
    return 0

"""A run and its artifacts: what the phases work on, and how each file is kept current.

An `Artifact` stands in the file of the phase that makes it. Its `key(run)` asks for exactly what the making
uses, so that a changed configuration recomputes what depends on it and nothing else.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiment.config import ExperimentConfig
from experiment.executor import Executor
from experiment.inputs import Inputs
from maps.layer_bands import LayerPair
from support.run_folder import RunFolder

FORMAT_VERSION = 4  # of all artifacts and journals; those of earlier versions are recomputed


@dataclass(frozen=True, repr=False)
class Run:
    """Inputs, the folder that results are written to, and what runs the chunks."""

    inputs: Inputs
    folder: RunFolder
    executor: Executor

    @property
    def config(self) -> ExperimentConfig:
        """The configuration of the inputs."""
        return self.inputs.config

    def with_inputs(self, inputs: Inputs) -> "Run":
        """Return the same run on other inputs."""
        return replace(self, inputs=inputs)

    @contextmanager
    def beside(self, name: str, inputs: Inputs) -> Iterator["Run"]:
        """Give a run on other inputs in a folder below this one's; its notes go to this run's at the end."""
        with closing(RunFolder(self.folder.path / name, self.folder.fresh)) as folder:
            yield Run(inputs, folder, self.executor)
            self.folder.notes += [f"{name}: {note}" for note in folder.notes]

    @contextmanager
    def at_pair(self, pair: LayerPair) -> Iterator["Run"]:
        """Give the run at one of its layer pairs.

        Files of the middle pair stand in the run's folder itself, those of the others in
        `layers/SOURCE_TARGET/`.
        """
        inputs = self.inputs.at_pairs([pair])
        if pair == self.inputs.middle_pair:
            yield self.with_inputs(inputs)
            return
        path = self.folder.path / pair_folder(pair)
        with closing(RunFolder(path, self.folder.fresh)) as folder:
            yield Run(inputs, folder, self.executor)


def pair_folder(pair: LayerPair) -> Path:
    """Return where files of a layer pair that is not the middle one stand in a run's folder."""
    return Path("layers") / "{}_{}".format(*pair)


@dataclass(frozen=True)
class Artifact:
    """One file of a run.

    name: in the run's folder; `.json` or `.pt`. phase: which makes it. key: what it depends on, as a
        fingerprint.
    """

    name: str
    phase: int
    key: Callable[[Run], str]

    def path(self, run: Run) -> Path:
        """Return where the file stands."""
        return run.folder.path / self.name

    def current(self, run: Run) -> dict[str, Any] | None:
        """Return the content if the file is whole and of this run's key; None, too, in a fresh run."""
        return run.folder.current(self.name, self.key(run))

    def load(self, run: Run) -> dict[str, Any] | None:
        """Return the same also in a fresh run, for what an earlier phase of it has just made."""
        return run.folder.load(self.name, self.key(run))

    def require(self, run: Run) -> dict[str, Any]:
        """Return the same. Raises InputError, which names the phase to run first, where it is not there."""
        return run.folder.require(self.name, self.key(run), self.phase)

    def save(self, run: Run, content: dict[str, Any]) -> dict[str, Any]:
        """Write the file in one step; returns the content with its fingerprint.

        A file of tensors also says which models and layer pairs it is of.
        """
        if self.name.endswith(".pt"):
            models = {side.name: side.description for side in run.inputs.sides}
            pairs = [list(pair) for pair in run.inputs.layer_pairs]
            content = {"models": models, "layer_pairs": pairs, **content}
        return run.folder.save(self.name, self.key(run), content)

    def current_or_make(self, run: Run, make: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
        """Return the current content, or make and save it."""
        content = self.current(run)
        return self.save(run, make(run)) if content is None else content

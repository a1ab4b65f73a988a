"""The table of conditions and the table of scorers: what a run compares, and by what it measures.

Configuration, plan, verdict, figures, tables and report read these two tables, so that a new control is a row
here and a function in `analysis/vector_transfer.py` (a row alone, if it is read from another source), and a
new scorer a row here and a module in `scoring/`.
Nothing heavy is imported, since the command line reads this before torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle, islice
from typing import Any, Literal

from support.vocabulary import EMBEDDINGS

Role = Literal["method", "control", "reference"]
Need = Literal["source_vector", "target_vector", "map", "other_personas", "seed", "control_source"]

N_DRAWS = 3  # vectors of a control that chance decides; mapped has to beat each of them
UNSTEERED, PROMPTED, MAPPED, ORACLE = "baseline", "prompted", "ridge_mapped", "oracle"
RANDOM = "random_direction"
DRAWN = ": "  # between a condition and its draw


@dataclass(frozen=True)
class ControlSource:
    """What a control's vectors are read from in the place of the source, with a map of its own to each block.

    block: of the source, one for every block of the target; None: those that the source itself is read at.
    is_untrained: the source's architecture with random weights, others for each draw.
    """

    block: int | None = None
    is_untrained: bool = False

    def layer_pair(self, pair: tuple[int, int]) -> tuple[int, int]:
        """Return the layers of the map that takes the place of the one of this layer pair."""
        return (pair[0] if self.block is None else self.block), pair[1]


@dataclass(frozen=True)
class Condition:
    """One way to have the target write.

    role: `method` is what the run is about, a `control` must do less, a `reference` is what both are compared
        with. needs: what the vector is made from; empty where no vector is added. draws: how many vectors it
        has, each of which writes on every prompt and is compared on its own. decides: without this control no
        claim of a transfer is made. source: what its vectors are read from, if it is not the source.
    """

    name: str
    role: Role
    label: str
    colour: str
    marker: str
    needs: tuple[Need, ...] = ()
    draws: int = 1
    decides: bool = False
    source: ControlSource | None = None

    @property
    def is_steered(self) -> bool:
        """Whether a vector is added."""
        return bool(self.needs)

    @property
    def vector_names(self) -> tuple[str, ...]:
        """What `persona_vectors.pt` calls its vectors: its name, or the name and a number for each draw."""
        if self.draws == 1:
            return (self.name,)
        return tuple(f"{self.name}_{draw + 1}" for draw in range(self.draws))


_ALL = (
    Condition(UNSTEERED, "reference", "unsteered", "#000000", "*"),
    Condition("zero_pad", "control", "zero-padded", "#999999", "s", ("source_vector",)),
    Condition("interpolate", "control", "interpolated", "#56b4e9", "^", ("source_vector",)),
    Condition("random_proj", "control", "random projection", "#e69f00", "x", ("source_vector", "seed")),
    Condition(MAPPED, "method", "mapped", "#d55e00", "o", ("source_vector", "map")),
    Condition(ORACLE, "reference", "native (oracle)", "#009e73", "D", ("target_vector",)),
    Condition("procrustes", "method", "mapped by Procrustes", "#0072b2", "P", ("source_vector", "map")),
    Condition("reduced_rank", "method", "mapped at reduced rank", "#cc79a7", "v", ("source_vector", "map")),
    Condition(
        "shuffled_pairs", "control", "shuffled pairs", "#666666", "+", ("source_vector", "map"), N_DRAWS, True
    ),
    Condition(
        "other_persona", "control", "other persona", "#8c564b", "1", ("other_personas", "map"), N_DRAWS, True
    ),
    Condition(
        RANDOM,
        "control",
        "random direction",
        "#bcbd22",
        "2",
        ("target_vector", "seed"),
        N_DRAWS,
        True,
    ),
    Condition(
        "embedding_source",
        "control",
        "source embeddings",
        "#882255",
        "<",
        ("control_source",),
        decides=True,
        source=ControlSource(EMBEDDINGS),
    ),
    Condition(
        "first_block",
        "control",
        "first source block",
        "#332288",
        ">",
        ("control_source",),
        decides=True,
        source=ControlSource(0),
    ),
    Condition(
        "untrained_source",
        "control",
        "untrained source",
        "#aa4499",
        "3",
        ("control_source",),
        N_DRAWS,
        source=ControlSource(is_untrained=True),
    ),
    Condition(PROMPTED, "reference", "prompting baseline", "#17becf", "p"),
)
CONDITIONS: dict[str, Condition] = {condition.name: condition for condition in _ALL}
METHODS = tuple(name for name in CONDITIONS if name != UNSTEERED)  # what a configuration may name
STEERED = tuple(name for name in METHODS if CONDITIONS[name].is_steered)
CONTROLS = tuple(name for name in CONDITIONS if CONDITIONS[name].role == "control")
# At equal widths both leave the vector as it is: a transfer without a map, and no control.
IDENTITIES = ("zero_pad", "interpolate")
DECIDING_CONTROLS = tuple(name for name in CONTROLS if CONDITIONS[name].decides)
SOURCE_CONTROLS = tuple(name for name in CONTROLS if CONDITIONS[name].source)
# They tell words apart and know little or no context; mapped has to exceed them by a margin.
LEXICAL_CONTROLS = tuple(name for name in SOURCE_CONTROLS if not CONDITIONS[name].source.is_untrained)
# They also write conversations where a run has any, a control with its first draw alone.
CONVERSING = (ORACLE, MAPPED, "other_persona")


def vector_names(condition: str) -> tuple[str, ...]:
    """Return the names of a condition's vectors; a name that is no condition's is a single vector's own."""
    return CONDITIONS[condition].vector_names if condition in CONDITIONS else (condition,)


def condition_of(name: str) -> str:
    """Return the condition of a vector or a drawn name; an unknown name is returned as it is."""
    name = name.partition(DRAWN)[0]
    return next((condition for condition in STEERED if name in vector_names(condition)), name)


def other_personas(names: Sequence[str]) -> dict[str, list[str]]:
    """Return persona -> the N_DRAWS whose mapped vectors are its control: the next ones, if there are others.

    Where there are fewer others, some come more than once.
    """
    others = {name: [*names[index + 1 :], *names[:index]] for index, name in enumerate(names)}
    return {name: list(islice(cycle(found), N_DRAWS)) for name, found in others.items() if found}


def draws_of(condition: str, others: Sequence[str]) -> dict[str, str | None]:
    """Return vector name -> what its draw is called: another persona, a number; None of a single vector.

    others: from `other_personas`; each of them is one draw.
    """
    names = vector_names(condition)
    if len(names) == 1:
        return {condition: None}
    if "other_personas" in CONDITIONS[condition].needs:
        return dict(zip(names, dict.fromkeys(others), strict=False))
    return {name: str(number) for number, name in enumerate(names, 1)}


def drawn_name(condition: str, draw: str | None) -> str:
    """Return the name under which a draw is compared, `other_persona: pirate`; without one, the condition."""
    return condition if draw is None else f"{condition}{DRAWN}{draw}"


def label_of(name: str) -> str:
    """Return the label of a drawn name: `other persona: pirate`, `shuffled pairs 2`."""
    condition, _, draw = name.partition(DRAWN)
    label = CONDITIONS[condition].label
    return f"{label} {draw}" if draw.isdigit() else drawn_name(label, draw or None)


@dataclass(frozen=True)
class Scorer:
    """One measure of a trait, 0 to 1.

    column: of the results table; a trained scorer's ends in `_probability`. module: in `scoring/`, with
        `load_scorers(names, personas, language_model, device)`, which returns persona -> an object with
        `score(texts)` and `threshold`, and `scorer_key(persona, language_model)`, what it depends on; None
        for a score that is computed elsewhere. A configuration may leave a trained scorer out by a key of its
        name that is false.
    """

    name: str
    column: str
    label: str
    colour: str
    module: str | None = None
    article: str = "the "  # before the label in a sentence

    @property
    def phrase(self) -> str:
        """The label as a sentence holds it."""
        return f"{self.article}{self.label}"

    def load(
        self, names: Sequence[str], personas: Sequence[Any], language_model: str, device: str
    ) -> dict[str, Any]:
        """Return persona -> scorer of the named personas with labelled texts.

        language_model: the packaged one that shares no weights with the target. device: of the encoder.
        """
        return import_module(self.module).load_scorers(names, personas, language_model, device)

    def key(self, persona: Any, language_model: str) -> str:
        """Return what the scorer of a persona depends on, without training it."""
        return import_module(self.module).scorer_key(persona, language_model)


_SCORERS = (
    Scorer("classifier", "trait_probability", "classifier", "#0072b2", "scoring.trait_classifier"),
    Scorer("probe", "probe_probability", "language-model probe", "#d55e00", "scoring.language_model_probe"),
    Scorer("judge", "judged_trait", "judge", "#cc79a7"),
    Scorer("brevity", "brevity", "brevity", "#009e73", article=""),
)
SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in _SCORERS}
TRAINED_SCORERS = tuple(name for name in SCORERS if SCORERS[name].module)

"""Plan the texts of a run: which conditions, personas and alphas there are, and a row for each text.

What is chosen by rule, before anything is measured, is listed here too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from activation_extractor import ResidualNorm
from experiment.conditions import PROMPTED, UNSTEERED, vector_names
from experiment.config import VECTOR_KINDS, alphas_of
from experiment.inputs import Inputs
from experiment.prompting import Turn
from experiment.run import FORMAT_VERSION
from support.artifacts import fingerprint

Alphas = Sequence[float] | Mapping[str, Sequence[float]]
Row = dict[str, Any]
VectorKey = Callable[[str, str], str]  # (persona, condition) -> what its vectors depend on


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: everything about a text but its prompt and seed.

    vector_key: what the added vector and its unit depend on. vector, draw: its name, and what it is called
        among a control's; without a vector, a condition's are rotated over the prompts, as in a search.
    """

    condition: str
    persona: str | None
    alpha: float | None
    vector_key: str
    draw: str | None = None
    vector: str | None = None

    @property
    def of_row(self) -> Row:
        """What a row of the cell says of it."""
        names = ("condition", "draw", "vector", "persona", "alpha")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, repr=False)
class SteeringVectors:
    """What is added at each block that is steered, and in what unit.

    vectors: persona -> vector name -> (blocks, d_target), each row of unit norm. norms: of these blocks'
        outputs.
    """

    vectors: Mapping[str, Mapping[str, Tensor]]
    norms: tuple[ResidualNorm, ...]

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "SteeringVectors":
        """Read what `persona_vectors.pt` holds."""
        return cls(content["vectors"], tuple(ResidualNorm(**norm) for norm in content["residual_norms"]))

    @property
    def middle_norm(self) -> ResidualNorm:
        """The norm at the middle block; where alpha has no unit, alphas are searched around it."""
        return self.norms[len(self.norms) // 2]

    @property
    def medians(self) -> list[float]:
        """The unit of alpha at each block, where it has one."""
        return [norm.median for norm in self.norms]

    def added(self, row: Row) -> Tensor:
        """Return what a row adds, (blocks, d_target): its vector, or by rotation one of its condition's."""
        if row["alpha"] is None:
            some = next(iter(next(iter(self.vectors.values())).values()))
            return torch.zeros_like(some)
        names = [row["vector"]] if row.get("vector") else vector_names(row["condition"])
        return self.vectors[row["persona"]][names[row["prompt_idx"] % len(names)]]


UNSTEERED_CELL = Cell(UNSTEERED, None, None, UNSTEERED)


def grid(inputs: Inputs, alphas: Alphas, vector_key: VectorKey) -> list[Cell]:
    """Return the unsteered cell, once, and for each persona the prompting baseline and draw x alpha.

    alphas: of every persona, or persona -> its own, given or found by a search.
    """
    cells = [UNSTEERED_CELL]
    for persona in inputs.config.persona_names:
        if PROMPTED in inputs.config.methods:
            cells.append(Cell(PROMPTED, persona, None, UNSTEERED))
        for method in inputs.config.steered_conditions:
            of_method, tried = vector_key(persona, method), alphas_of(alphas, persona)
            cells += drawn_cells(inputs, persona, method, of_method, tried)
    return cells


def drawn_cells(
    inputs: Inputs, persona: str, condition: str, vector_key: str, alphas: Sequence[float]
) -> list[Cell]:
    """Return the cells of every draw of a persona's condition at each alpha."""
    cells = []
    for vector, draw in inputs.config.draws_of(persona, condition).items():
        key = vector_key if draw is None else fingerprint(vector_key, vector)
        cells += [Cell(condition, persona, alpha, key, draw, vector) for alpha in alphas]
    return cells


def text_rows(
    inputs: Inputs, cells: Sequence[Cell], prompts: Sequence[str], seeds: Sequence[int]
) -> list[Row]:
    """Return a row for each text to generate: cells, prompts within them, seeds within these."""
    rows = []
    for cell in cells:
        places = [
            {**cell.of_row, "prompt_idx": index, "prompt": prompt} for index, prompt in enumerate(prompts)
        ]
        for place, shown in zip(places, shown_prompts(inputs, places), strict=True):
            for seed in seeds:
                rows.append({"key": _text_key(inputs, cell, shown, seed), **place, "seed": seed})
    return rows


def turn_rows(inputs: Inputs, cells: Sequence[Cell], earlier: Sequence[Sequence[Turn]]) -> list[Row]:
    """Return a row for the next turn of every conversation: cells, conversations within them.

    earlier: the turns before it, of each row. The first turn has the key of the same text of the grid.
    """
    config, rows = inputs.config, []
    for (cell, (number, asked)), turns in zip(
        product(cells, enumerate(inputs.conversations)), earlier, strict=True
    ):
        place = {"prompt_idx": number * config.n_turns + len(turns), "prompt": asked[len(turns)]}
        row = {**cell.of_row, **place, "earlier": list(turns), "seed": config.seed}
        (shown,) = shown_turns(inputs, [row])
        rows.append({"key": _text_key(inputs, cell, shown, config.seed), **row})
    return rows


def shown_turns(inputs: Inputs, rows: Sequence[Row], side: str | None = None) -> list[str]:
    """Return the prompt of each row of `turn_rows` as a side's model reads it, by default the target."""
    show = inputs.prompting.conversation
    return [show(side or inputs.target.name, row["earlier"], row["prompt"]) for row in rows]


def _text_key(inputs: Inputs, cell: Cell, shown: str, seed: int) -> str:
    # Where vectors are added says nothing about a text without one.
    where = None if cell.alpha is None else inputs.config.steer_positions
    settings = [inputs.target.fingerprint, sampling(inputs), where]
    return fingerprint(FORMAT_VERSION, settings, cell.vector_key, cell.alpha, shown, seed)


def shown_prompts(inputs: Inputs, rows: Sequence[Row]) -> list[str]:
    """Return each row's prompt as the target reads it; equal ones are rendered once."""
    personas = {persona.name: persona for persona in inputs.personas}

    @cache
    def show(prompt: str, persona: str | None) -> str:
        return inputs.prompting.prompt(inputs.target.name, prompt, personas.get(persona))

    return [show(row["prompt"], row["persona"] if row["condition"] == PROMPTED else None) for row in rows]


def rows_key(rows: Sequence[Row]) -> str:
    """Return what a result file of these rows depends on: their keys, in order."""
    return fingerprint([row["key"] for row in rows])


def sampling(inputs: Inputs, max_new_tokens: int | None = None) -> list[Any]:
    """Return the settings that every sampled text depends on."""
    config = inputs.config
    return [max_new_tokens or config.max_new_tokens, config.temperature, config.top_k, config.top_p]


def choices(inputs: Inputs) -> dict[str, Any]:
    """Return what was chosen for a run without measuring anything, and from which alternatives."""
    config, chat_sides = inputs.config, inputs.prompting.chat_sides
    formats = {side.name: "chat" if side.name in chat_sides else "raw" for side in inputs.sides}
    layers = {
        "chosen": list(map(list, inputs.layer_pairs)),
        "by": config.layer_idx if isinstance(config.layer_idx, str) else "name",
    }
    extraction = {name: config.vector_kind(name) for name in config.persona_names}
    mapping_data = ["neutral_text", "responses", "styled_responses"]
    shown = config.test_prompts if isinstance(config.test_prompts, str) else "given"
    settings = ("temperature", "top_k", "top_p", "max_new_tokens", "steer_positions")
    return {
        "models": {side.name: side.description for side in inputs.sides},
        "layers": layers,
        "prompt_format": {"chosen": formats, "alternatives": ["raw", "chat"]},
        "mapping_data": {"chosen": config.mapping_data, "alternatives": mapping_data},
        "extraction": {"chosen": extraction, "alternatives": VECTOR_KINDS, "by": config.extraction.kind},
        "conditions": config.conditions,
        "disjoint_texts": config.halves_texts,
        "strength_curve": config.strength_curve,
        "n_turns": config.n_turns,
        "generation": {name: getattr(config, name) for name in settings},
        "development": {"prompts": inputs.development_prompts, "n_seeds": config.alpha_search.n_seeds},
        "test": {
            "chosen": shown if inputs.prompting.asks_questions or shown == "given" else "text prefixes",
            "prompts": inputs.prompts,
            "seeds": config.seeds,
        },
    }

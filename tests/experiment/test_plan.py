"""The plan has every cell of the grid, and a text's key holds everything that the text depends on."""

from dataclasses import replace

import pytest
import torch

from activation_extractor import ResidualNorm
from experiment.config import load_config
from experiment.inputs import load_inputs
from experiment.plan import UNSTEERED_CELL, Cell, SteeringVectors, grid, text_rows

PROMPTS, SEEDS = ["One", "Two", "Three"], [0, 1]


@pytest.fixture(scope="module")
def inputs(tiny):
    methods = ["prompted", "ridge_mapped", "oracle"]
    return load_inputs(load_config({**tiny, "methods": methods, "output_dir": "out"}))


def key_of(persona, condition):
    return f"{persona} {condition}"


@pytest.mark.parametrize(
    ("alphas", "mapped"),
    [
        ([1.0, 4.0], {"loud": [1.0, 4.0], "numeric": [1.0, 4.0]}),
        ({"loud": [3.0], "numeric": [1.0, 4.0]}, {"loud": [3.0], "numeric": [1.0, 4.0]}),
    ],
    ids=["list", "by persona"],
)
def test_the_grid_has_every_persona_method_and_alpha_and_the_unsteered_text_once(inputs, alphas, mapped):
    cells = grid(inputs, alphas, key_of)
    assert cells[0] == UNSTEERED_CELL
    assert cells.count(UNSTEERED_CELL) == 1
    assert [cell.persona for cell in cells if cell.condition == "prompted"] == ["loud", "numeric"]
    found = {name: [] for name in mapped}
    for cell in cells:
        if cell.condition == "ridge_mapped":
            assert cell.vector_key == key_of(cell.persona, "ridge_mapped")
            found[cell.persona].append(cell.alpha)
    assert found == mapped


def test_rows_are_planned_by_cell_prompt_and_seed(inputs):
    rows = text_rows(inputs, grid(inputs, [1.0], key_of), PROMPTS, SEEDS)
    assert len({row["key"] for row in rows}) == len(rows) == (1 + 2 * 3) * len(PROMPTS) * len(SEEDS)
    assert [(row["prompt_idx"], row["seed"]) for row in rows[:6]] == [(p, s) for p in range(3) for s in SEEDS]


CELL = Cell("oracle", "loud", 1.0, "vector")


def test_what_a_text_depends_on_is_in_its_key(inputs):
    changes = ({"alpha": 2.0}, {"vector_key": "other"}, {"condition": "prompted"})
    cells = [CELL, *(replace(CELL, **change) for change in changes)]
    rows = [row for cell in cells for row in text_rows(inputs, [cell], PROMPTS, SEEDS)]
    assert len({row["key"] for row in rows}) == len(rows)


def test_equal_vectors_of_two_conditions_share_their_texts(inputs):
    rows = text_rows(inputs, [CELL, Cell("ridge_mapped", "loud", 1.0, "vector")], PROMPTS, SEEDS)
    assert len({row["key"] for row in rows}) == len(rows) / 2


def test_every_draw_of_a_control_is_a_cell_of_its_own(tiny):
    methods = ["shuffled_pairs", "other_persona", "oracle"]
    config = load_config({**tiny, "methods": methods, "alpha_values": [1.0], "output_dir": "out"})
    cells = grid(load_inputs(config), config.alpha_values, key_of)
    assert len(cells) == len({cell.vector_key for cell in cells}) == config.n_cells
    drawn = [(cell.draw, cell.vector) for cell in cells if cell.persona == "loud"]
    shuffled = [(str(draw), f"shuffled_pairs_{draw}") for draw in (1, 2, 3)]
    assert drawn == [*shuffled, ("numeric", "other_persona_1"), (None, "oracle")]


def test_a_row_adds_its_vector_or_by_rotation_its_conditions_and_nothing_if_unsteered():
    drawn = {f"random_direction_{draw}": torch.full((2, 5), float(draw)) for draw in (1, 2, 3)}
    steering = SteeringVectors({"loud": drawn}, (ResidualNorm(1.0, 1.0, []), ResidualNorm(2.0, 2.0, [])))
    row = {"condition": "random_direction", "persona": "loud", "alpha": 1.0}
    assert [steering.added({**row, "prompt_idx": index})[0, 0] for index in range(4)] == [1, 2, 3, 1]
    second = {**row, "vector": "random_direction_2"}
    assert [steering.added({**second, "prompt_idx": index})[0, 0] for index in range(2)] == [2, 2]
    assert torch.equal(steering.added({**row, "prompt_idx": 0, "alpha": None}), torch.zeros(2, 5))
    assert (steering.medians, steering.middle_norm.median) == ([1.0, 2.0], 2.0)

"""The tables of conditions and of scorers are complete, and their names and looks are unambiguous."""

from importlib import import_module

import pytest

import baseline_methods
from analysis.vector_transfer import CONTROL_MAKERS, OVER_BLOCKS
from experiment.conditions import (
    CONDITIONS,
    CONTROLS,
    DECIDING_CONTROLS,
    LEXICAL_CONTROLS,
    METHODS,
    SCORERS,
    SOURCE_CONTROLS,
    STEERED,
    TRAINED_SCORERS,
    UNSTEERED,
    condition_of,
    drawn_name,
    draws_of,
    label_of,
    other_personas,
    vector_names,
)
from experiment.config import load_config
from experiment.inputs import load_inputs
from experiment.run import Run
from maps.comparison_maps import KINDS
from phases import make_vectors
from phases.make_vectors import PERSONA_VECTORS
from support.run_folder import RunFolder
from texts.personas import load_persona

SMALL = {"source_model": "a", "target_model": "b", "output_dir": "c", "layer_idx": 3}


def test_no_two_conditions_and_no_two_scorers_look_alike():
    for table, other in ((CONDITIONS, "marker"), (SCORERS, "column")):
        for look in ("label", "colour", other):
            assert len({getattr(each, look) for each in table.values()}) == len(table)


def test_every_steered_condition_has_its_vectors_made_and_a_configuration_names_it():
    made = [*baseline_methods.METHODS, *KINDS, *CONTROL_MAKERS, *OVER_BLOCKS, *SOURCE_CONTROLS]
    assert sorted(STEERED) == sorted(made)
    assert load_config({**SMALL, "methods": METHODS}).methods == list(METHODS)
    assert {*METHODS, UNSTEERED} == set(CONDITIONS)


def test_controls_that_chance_decides_have_several_draws_each_with_a_vector_name_of_its_own():
    assert set(LEXICAL_CONTROLS) < set(DECIDING_CONTROLS) <= set(CONTROLS)
    drawn = {*DECIDING_CONTROLS, "untrained_source"} - set(LEXICAL_CONTROLS)
    assert {name for name in CONDITIONS if len(vector_names(name)) > 1} == drawn
    names = [(vector, name) for name in STEERED for vector in vector_names(name)]
    assert len(dict(names)) == len(names)
    assert [condition_of(vector) for vector, _ in names] == [name for _, name in names]


def test_each_draw_has_a_name_and_a_label_and_another_persona_is_drawn_once():
    others = other_personas(["a", "b", "c", "d", "e"])["d"]
    assert others == ["e", "a", "b"]
    assert list(draws_of("other_persona", others).values()) == others
    assert draws_of("other_persona", other_personas(["a", "b"])["a"]) == {"other_persona_1": "b"}
    assert other_personas(["a"]) == {}
    assert draws_of("oracle", []) == {"oracle": None}
    draws = draws_of("shuffled_pairs", []).items()
    names = [drawn_name("shuffled_pairs", draw) for _, draw in draws]
    assert list(map(condition_of, names)) == [condition_of(vector) for vector, _ in draws]
    said = [label_of(name) for name in (names[1], drawn_name("other_persona", "e"), "oracle")]
    assert said == ["shuffled pairs 2", "other persona: e", "native (oracle)"]


@pytest.mark.parametrize("name", TRAINED_SCORERS)
def test_a_trained_scorer_can_be_loaded_and_has_a_key_for_each_persona(name):
    personas = list(map(load_persona, ("formal", "pirate")))
    keys = [SCORERS[name].key(each, "gemma-3-270m") for each in (*personas, *personas)]
    assert keys[:2] == keys[2:]
    assert len(set(keys)) == 2
    assert callable(import_module(SCORERS[name].module).load_scorers)
    assert SCORERS[name].column.endswith("_probability")  # by which tables and `aggregate` find it


def test_all_vectors_are_recomputed_where_the_table_has_another_condition(tiny, tmp_path, monkeypatch):
    run = Run(load_inputs(load_config({**tiny, "output_dir": "x"})), RunFolder(tmp_path), None)
    before = PERSONA_VECTORS.key(run)
    assert PERSONA_VECTORS.key(run) == before
    monkeypatch.setattr(make_vectors, "STEERED", STEERED[:-1])
    assert PERSONA_VECTORS.key(run) != before

"""The tables of conditions and of scorers are complete, and their names and looks are unambiguous."""

from dataclasses import replace
from importlib import import_module

import pytest

import baseline_methods
from experiment.conditions import (
    CONDITIONS,
    CONTROLS,
    DECIDING_CONTROLS,
    METHODS,
    SCORERS,
    STEERED,
    TRAINED_SCORERS,
    UNSTEERED,
    condition_of,
    vector_names,
)
from experiment.config import load_config
from maps.comparison_maps import KINDS
from phases.make_vectors import CONTROL_MAKERS
from texts.personas import load_persona

SMALL = {"source_model": "a", "target_model": "b", "output_dir": "c", "layer_idx": 3}


@pytest.mark.parametrize("look", ["label", "colour", "marker"])
def test_no_two_conditions_look_alike(look):
    assert len({getattr(condition, look) for condition in CONDITIONS.values()}) == len(CONDITIONS)


@pytest.mark.parametrize("look", ["column", "label", "colour"])
def test_no_two_scorers_look_alike(look):
    assert len({getattr(scorer, look) for scorer in SCORERS.values()}) == len(SCORERS)


def test_every_steered_condition_has_its_vectors_made_and_no_other():
    assert sorted(STEERED) == sorted([*baseline_methods.METHODS, *KINDS, *CONTROL_MAKERS])


def test_a_configuration_names_every_condition_but_the_unsteered():
    assert load_config({**SMALL, "methods": METHODS}).methods == list(METHODS)
    assert {*METHODS, UNSTEERED} == set(CONDITIONS)


def test_controls_that_decide_have_several_draws_each_with_a_vector_name_of_its_own():
    assert set(DECIDING_CONTROLS) <= set(CONTROLS)
    assert all(len(vector_names(name)) > 1 for name in DECIDING_CONTROLS)
    names = [(vector, name) for name in STEERED for vector in vector_names(name)]
    assert len(dict(names)) == len(names)
    assert [condition_of(vector) for vector, _ in names] == [name for _, name in names]


@pytest.mark.parametrize("name", TRAINED_SCORERS)
def test_a_trained_scorer_can_be_loaded_and_its_key_says_what_it_is_trained_on(name):
    formal, pirate = map(load_persona, ("formal", "pirate"))
    fewer = replace(formal, labelled_positive=formal.labelled_positive[1:])
    keys = [SCORERS[name].key(personas) for personas in ([formal, pirate], [fewer, pirate], [formal])]
    assert len(set(keys)) == 3
    assert SCORERS[name].key([formal, pirate]) == keys[0]
    assert callable(import_module(SCORERS[name].module).load_scorers)
    assert SCORERS[name].column.endswith("_probability")  # by which tables and `aggregate` find it

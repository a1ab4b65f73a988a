"""A configuration has the specification's defaults; what cannot be used is an error that names its key."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest

from baseline_methods import METHODS
from experiment.conditions import DECIDING_CONTROLS
from experiment.config import PROTOCOL, QUESTIONS, ExperimentConfig, ExtractionConfig, load_config
from experiment.config_errors import RENAMED_KEYS, RENAMED_VALUES
from experiment.inputs import read_personas
from support.errors import InputError
from texts.personas import load_prompts, shipped_personas

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [ROOT / "example_config.json", *sorted((ROOT / "configs").glob("*.json"))]
SMALL = {"source_model": "a", "target_model": "b", "output_dir": "c", "layer_idx": 3}
NAMES = {key: SMALL[key] for key in ("source_model", "target_model", "output_dir")}
PAIR = {"positive_texts": ["YES"], "negative_texts": ["yes"]}
SPECIFICATION = {
    "source_model": "Qwen/Qwen-7B",
    "target_model": "meta-llama/Llama-2-7b-hf",
    "layer_pairs": ((16, 16),),
    "output_dir": "./results/qwen_to_llama",
    "neutral_text": "wikitext-103",
    "n_training_samples": 5000,
    "lambda_values": [0.01, 0.1, 1.0, 10.0, 100.0],
    "lambda_unit": "absolute",
    "n_folds": 5,
    "persona_names": ["silly", "formal", "concise"],
    "persona_position": "last",
    "methods": list(METHODS),
    "n_test_prompts": 30,
    "alpha_values": [0.5, 1.0, 2.0, 3.0, 5.0],
    "alpha_unit": "absolute",
    "seeds": [0, 1, 2],
    "max_new_tokens": 100,
    "use_gpt4": False,
    "n_cells": 226,  # 6840 generations of 30 prompts and 3 seeds, and 13,500 of ten draws of controls
}


def parse_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def error_of(config):
    """Return what the error says, in two lines at most."""
    with pytest.raises(InputError) as caught:
        load_config(config)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("is_shipped", [True, False], ids=["shipped", "defaults"])
def test_values_are_the_specifications(is_shipped):
    start = {key: SPECIFICATION[key] for key in ("source_model", "target_model", "output_dir")}
    given = ROOT / "configs" / "qwen7b_to_llama2_7b.json" if is_shipped else {**start, "layer_idx": 16}
    config = load_config(given)
    assert {name: getattr(config, name) for name in SPECIFICATION} == SPECIFICATION


def test_the_example_is_two_names_and_little_else_and_one_file_writes_out_every_key_of_it():
    example, written_out = (parse_json(path) for path in (SHIPPED[0], ROOT / "configs" / "all_keys.json"))
    assert example.keys() == {*NAMES, "personas", "n_test_prompts", "n_seeds", "strength_curve"}
    assert written_out.keys() == set(ExperimentConfig.model_fields)
    assert load_config(written_out) == load_config(example)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_is_usable_and_survives_a_round_trip(path, tmp_path):
    config = load_config(str(path))
    assert len(config.load_test_prompts()) == config.n_test_prompts
    assert [persona.name for persona in config.load_personas()] == config.persona_names
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump()))
    assert load_config(tmp_path / "config.json") == config
    assert load_config(config) is config


def test_round_trip_keeps_every_key_and_nothing_can_be_changed():
    judge = {"model": "local", "base_url": "http://x"}
    config = load_config({**SMALL, "persona_datasets": {"loud": PAIR}, "judge": judge})
    assert load_config(json.loads(json.dumps(config.model_dump()))) == config
    assert set(config.model_dump()) == set(ExperimentConfig.model_fields)
    with pytest.raises(ValueError, match="frozen"):
        config.layer_idx = 4


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"layer_idx": 7}, ((7, 7),)),
        ({"source_layer_idx": 5, "target_layer_idx": 9}, ((5, 9),)),
        ({"layer_idx": 7, "source_layer_idx": 0}, ((0, 7),)),
        ({"source_layer_idx": [5, 5, 6], "target_layer_idx": [2, 3, 4]}, ((5, 2), (5, 3), (6, 4))),
        ({"source_layer_idx": [5], "target_layer_idx": [2]}, ((5, 2),)),
        ({"layer_idx": "band"}, None),
        ({"layer_idx": "auto"}, None),
    ],
)
def test_layers_are_set_together_or_apart(layers, expected):
    assert load_config({**SMALL, "layer_idx": None, **layers}).layer_pairs == expected


def test_two_names_and_a_folder_are_run_by_the_protocol():
    config = load_config(NAMES)
    chosen = {name: getattr(config, name) for name in PROTOCOL}
    assert chosen == {**PROTOCOL, "extraction": ExtractionConfig(kind="auto")}
    assert config.persona_names == shipped_personas()
    assert (len(config.load_test_prompts(True)), config.seeds, config.alpha_values) == (60, [0, 1], "auto")
    assert set(config.conditions) == {*METHODS, "prompted", *DECIDING_CONTROLS}
    assert load_config(json.loads(json.dumps(config.model_dump()))) == config


def test_what_is_named_stands_beside_the_protocol_and_a_layer_ends_it():
    named = {"n_seeds": 1, "personas": ["formal"], "alpha_values": [0.1], "layer_idx": None}
    config = load_config({**NAMES, **named})
    assert (config.n_seeds, config.persona_names, config.alpha_values) == (1, ["formal"], [0.1])
    assert (config.layer_idx, config.n_test_prompts) == ("band", 60)
    assert config.strength_curve
    assert not load_config({**NAMES, "methods": ["oracle"]}).strength_curve  # there is nothing to compare
    for layers in ({"layer_idx": 3}, {"source_layer_idx": 1, "target_layer_idx": 2}):
        config = load_config({**NAMES, **layers})
        assert (config.n_test_prompts, config.alpha_values[0]) == (30, 0.5)
        assert config.mapping_data == "neutral_text"


@pytest.mark.parametrize("start", [SMALL, NAMES], ids=["specification", "protocol"])
def test_an_alpha_for_each_method_is_an_error_of_one_line(start):
    alphas = {"formal": [0.04], "pirate": {"oracle": 0.04, "ridge_mapped": 0.05}}
    message = error_of({**start, "personas": list(alphas), "alpha_values": alphas})
    assert "'pirate' has an alpha for each method" in message
    assert "the native vector's; leave alpha_values out" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_name_of_shipped_questions_is_what_a_chat_target_is_asked_and_the_last_are_no_default(name):
    config = load_config({**NAMES, "test_prompts": name})
    assert config.load_test_prompts(True) == load_prompts(name)
    assert config.load_test_prompts(False) == load_prompts("test")
    for start in (NAMES, SMALL):
        default = load_config(start).load_test_prompts(True)
        assert not set(default) & set(load_prompts("last_questions"))
    assert load_config(NAMES).load_test_prompts(True) == load_prompts("fresh_questions")


def test_test_development_and_last_questions_have_none_in_common_and_neither_have_persona_texts():
    files = {name: load_prompts(name) for name in (*QUESTIONS, "development_questions", "neutral_questions")}
    for name, other in itertools.combinations(files, 2):
        assert not set(files[name]) & set(files[other]), (name, other)
    for name in QUESTIONS:
        read_personas(load_config({**NAMES, "test_prompts": name}))


def test_what_vectors_are_made_from_is_said_for_a_persona_or_chosen():
    loud = {"instruction": [{"pos": "Shout.", "neg": "Whisper."}], "questions": ["Why?", "Who?"]}
    start = {**SMALL, "personas": ["formal"], "persona_datasets": {"loud": loud}}
    config = load_config({**start, "extraction": {"kind": "auto"}})
    assert {name: config.vector_kind(name) for name in config.persona_names} == {
        "formal": "last",
        "loud": "responses",
    }
    kinds = {"formal": "mean", "loud": "responses"}
    chosen = config.with_vector_kinds(kinds)
    assert {name: chosen.vector_kind(name) for name in kinds} == kinds
    assert not config.has_chosen_kinds
    assert chosen.has_chosen_kinds
    assert chosen.open_kinds == ["formal", "loud"]
    some = load_config({**start, "extraction": {"kind": "auto", "by_persona": {"formal": "mean"}}})
    assert some.open_kinds == ["loud"]
    assert some.vector_kind("formal") == "mean"
    assert load_config({**NAMES, "extraction": {"n_seeds": 2}}).open_kinds == shipped_personas()
    assert "'shy', which is no persona" in error_of({**SMALL, "extraction": {"by_persona": {"shy": "last"}}})


def test_fewer_questions_than_the_protocol_asks_are_an_error():
    with pytest.raises(InputError, match="n_test_prompts is 60 but there are 2 prompts; lower it"):
        load_config({**NAMES, "test_prompts": ["Why?", "How?"]}).load_test_prompts(True)


def test_personas_are_the_named_ones_then_those_defined_here():
    config = load_config({**SMALL, "persona_datasets": {"loud": PAIR, "formal": PAIR}})
    assert config.persona_names == ["silly", "formal", "concise", "loud"]
    named = {"personas": [], "persona_datasets": {"loud": PAIR}, "disjoint_texts": False}
    config = load_config({**SMALL, **named})
    assert [persona.positive_texts for persona in config.load_personas()] == [("YES",)]


def test_seeds_count_up_from_seed():
    assert load_config({**SMALL, "seed": 7, "n_seeds": 3}).seeds == [7, 8, 9]


def test_alphas_may_be_given_for_each_persona():
    alphas = {"silly": [1.0], "formal": [2.0, 3.0], "concise": [4.0]}
    config = load_config({**SMALL, "alpha_values": alphas})
    assert {name: config.alphas_of(name) for name in config.persona_names} == alphas
    n_draws = 3 + 3 + 2 + 1 + 1  # of the controls of a verdict; there are two other personas
    assert config.n_cells == 1 + (len(METHODS) + n_draws) * (1 + 2 + 1)


def test_a_model_may_be_an_object_and_has_the_rest_from_the_run():
    own = {"name": "a", "device": "cuda:1", "quantization": "8bit"}
    shared = {"device": "cuda:0", "device_map": "auto", "dtype": "bfloat16"}
    judge = {"kind": "local", "model": {"name": "j", "dtype": "float16"}}
    config = load_config({**SMALL, **shared, "source_model": own, "judge": judge})
    assert load_config(config.model_dump()) == config
    source, target, judge = (config.place_of(key) for key in ("source_model", "target_model", "judge.model"))
    assert (source.name, source.device, source.device_map, source.dtype) == ("a", "cuda:1", None, "bfloat16")
    assert (target.name, target.device, target.device_map, target.quantization) == (
        "b",
        "cuda:0",
        "auto",
        "none",
    )
    assert (judge.name, judge.dtype, judge.device) == ("j", "float16", "cuda:0")


COUNTS = ("n_test_prompts", "n_seeds", "max_new_tokens", "generation_batch_size")
CHOICES = ("lambda_unit", "prompt_format", "persona_position", "alpha_unit", "use_gpt4")
OUT_OF_RANGE = {
    **{key: [None, ""] for key in ("source_model", "output_dir")},
    **{key: [0] for key in COUNTS},
    **{key: ["other"] for key in CHOICES},
    "layer_idx": [-1, 1.5, "middle"],
    "dtype": ["int8", ["float32"]],
    "device_map": [{"model": 1001}, ""],
    "n_training_samples": [9],
    "lambda_values": [[], [0.0, 1.0], [1.0, -1.0], [math.inf], [1, 1.0]],
    "n_folds": [1],
    "system_prompt": [" "],
    "chat_template_kwargs": [[], {"tokenize": True}, {"a": None}, {"a": math.nan}, {"a": [1]}, {"a": "\0"}],
    "chat_template_date": ["today", "2026-13-01", 20260101, "\ud800"],
    "mapping_positions": ["first"],
    "personas": [[], "formal"],
    "methods": [[], ["ridge"], ["oracle", "oracle"]],
    "test_prompts": [[]],
    "alpha_values": [[], "all", [1.0, 0.0], [math.nan], [1e308], [2, 2]],
    "temperature": [-0.1, math.inf, 1e-300],
    "top_k": [-1],
    "top_p": [0.0, 1.1],
    "seed": [-1, 2**70],
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_value_out_of_range_is_an_error_that_names_its_key(key):
    for value in OUT_OF_RANGE[key]:
        assert key in error_of({**SMALL, key: value})


def silly(alphas):
    return {"personas": ["silly"], "alpha_values": {"silly": alphas}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_ix": 3}, "'layer_ix' is unknown; did you mean 'layer_idx'"),
        ({"judge": {"modle": "x"}}, "'judge.modle' is unknown; see docs/configuration.md"),
        ({"judge": {"kind": "local"}}, "judge.model is not set"),
        ({"judge": {"model": {"name": "x"}}}, "judge.model is loaded here with"),
        ({"source_model": {"device": "cuda:0"}}, "key 'source_model.name' is missing"),
        ({"source_model": {"name": "x", "devise": "cpu"}}, "key 'source_model.devise' is unknown"),
        ({"source_model": {"name": "x", "dtype": "int8"}}, "key 'source_model.dtype' is 'int8'"),
        (
            {"source_model": {"name": "x", "offload": True, "device_map": "auto"}},
            "leave it out with device_map",
        ),
        ({"target_model": {"name": "x", "offload": True}}, "target_model.offload: the source alone rests"),
        ({"judge": {"kind": "local", "model": "x", "max_usd": 1}}, "judge.max_usd is of use"),
        ({"executor": {"n_workers": 2}}, 'of use with "kind": "ray" alone'),
        ({"vectors": {"silly": {}}}, "it names no file"),
        ({"vectors": {"shy": "x.pt"}}, "vectors names 'shy', which is no persona"),
        ({"persona_datasets": {"x": {**PAIR, "old": ["a"]}}}, "'persona_datasets.x.old' is unknown"),
        ({"persona_datasets": {"x": {"positive_texts": ["a"]}}}, "negative_texts is missing"),
        ({"persona_datasets": {"x": {**PAIR, "positive_texts": [""]}}}, "positive_texts.0"),
        ({"layer_idx": None, "source_layer_idx": 3}, "target_layer_idx is not set"),
        ({"layer_idx": "band", "target_layer_idx": 3}, "leave out target_layer_idx"),
        ({"search_source_layers": [1]}, 'search_source_layers is of use with "layer_idx": "auto" alone'),
        ({"source_layer_idx": [1, 2], "target_layer_idx": [1]}, "a band of 2 and 1; give two lists"),
        ({"source_layer_idx": [1, 2], "target_layer_idx": 3}, "a band of 2 and one layer"),
        ({"source_layer_idx": [1, 2], "target_layer_idx": [4, 4]}, "names a block twice"),
        ({"extraction": {"from_texts": ["shy"]}}, "extraction.from_texts names 'shy'"),
        ({"controls": ["random_direction", "random_direction"]}, "controls holds a value twice"),
        ({"alpha_values": "auto", "independent_perplexity": False}, "by the independent perplexity"),
        ({"alpha_values": {"silly": [1.0], "formal": [2.0]}}, "'concise' is in one of alpha_values"),
        (silly([1.0, 1.0]), "holds a value twice"),
        (silly([0.0]), "must be finite and not 0"),
        (silly([]), "'alpha_values.silly'"),
        (silly({}), "'silly' has an alpha for each method"),
        (silly([math.inf]), "must be finite and not 0"),
        ({"strength_curve": True, "independent_perplexity": False}, "curve compares at an equal independent"),
        (
            {"strength_curve": True, "methods": ["oracle"]},
            "add ridge_mapped to methods, or set strength_curve",
        ),
        ({"strength_curve": True, "methods": ["zero_pad"]}, "add ridge_mapped and oracle to methods"),
        ({"test_prompts": "questions"}, "one of test_questions, fresh_questions, last_questions"),
        ({"alpha_search": {"bracket": [2, 1]}}, "a lower and a higher alpha"),
    ],
    ids=str,
)
def test_keys_that_contradict_each_other_are_an_error_with_a_remedy(change, named):
    assert named in error_of({**SMALL, **change})


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_old_key_is_unknown_and_its_error_says_the_new_one(old):
    definition = {"persona_datasets": {"x": {**PAIR, old: ["a"]}}}
    change = definition if old == "examination_texts" else {old: "x"}
    assert f"{old}' is unknown; it is called {RENAMED_KEYS[old]} now" in error_of({**SMALL, **change})


@pytest.mark.parametrize("old", RENAMED_VALUES)
def test_old_value_is_an_error_that_says_the_new_one(old):
    new = RENAMED_VALUES[old]
    of_new = {
        "aligned": {"mapping_positions": old},
        "neutral_text": {"mapping_data": old},
        "responses": {"extraction": {"kind": old}},
        "styled_responses": {"mapping_data": old},
        "response": {"steer_positions": old},
    }
    assert f"it is called {new!r} now" in error_of({**SMALL, **of_new.get(new, {"methods": [old]})})
    assert "it is called" not in error_of({**SMALL, "dtype": old})


def test_missing_keys_are_named_and_many_problems_make_one_short_message():
    for key in ("source_model", "target_model", "output_dir"):
        assert f"'{key}' is missing" in error_of({name: SMALL[name] for name in SMALL.keys() - {key}})
    found = error_of({**SMALL, **{f"unknown_{index}": "x\n" * 500 for index in range(9)}})
    assert "(and 7 more)" in found
    assert len(found) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{half", "is not JSON"),
        (b"\xff\xfe\xfa", "is UTF-16; save it as UTF-8"),
        (b"[1]", "is a list, expected a JSON object"),
        (None, "cannot be read"),
    ],
    ids=["half", "not text", "list", "missing"],
)
def test_unreadable_file_is_an_error_that_names_it(content, message, tmp_path):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    assert re.search(rf"broken\.json'? {message}", error_of(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_test_prompts": 61}, "n_test_prompts is 61 but there are 60 prompts"),
        ({"n_test_prompts": 2, "test_prompts": ["One"]}, "n_test_prompts is 2 but there are 1"),
        ({"n_test_prompts": 2, "test_prompts": ["One", "One"]}, "holds a prompt twice"),
    ],
)
def test_given_prompts_replace_the_shipped_ones_and_must_be_enough(change, message):
    config = load_config({**SMALL, "test_prompts": ["One", "Two", "Three"], "n_test_prompts": 2})
    assert config.load_test_prompts() == ["One", "Two"]
    with pytest.raises(InputError, match=message):
        load_config({**SMALL, **change}).load_test_prompts()

import json
import math
from pathlib import Path

import pytest

from baseline_methods import METHODS
from experiment.config import ExperimentConfig, load_config
from support.errors import InputError

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [ROOT / "example_config.json", *sorted((ROOT / "configs").glob("*.json"))]
SMALL = {"source_model": "a", "target_model": "b", "output_dir": "c", "layer_idx": 3}
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
    "methods": ["zero_pad", "interpolate", "random_proj", "ridge_mapped", "oracle"],
    "n_test_prompts": 30,
    "alpha_values": [0.5, 1.0, 2.0, 3.0, 5.0],
    "alpha_unit": "absolute",
    "seeds": [0, 1, 2],
    "max_new_tokens": 100,
    "use_gpt4": False,
}


def n_generations(config):
    steered = len(config.methods) * len(config.persona_names) * len(config.alpha_values)
    return (steered + 1) * len(config.load_test_prompts()) * len(config.seeds)


@pytest.fixture(scope="module")
def qwen():
    return load_config(ROOT / "configs" / "qwen7b_to_llama2_7b.json")


@pytest.mark.parametrize("name", SPECIFICATION)
def test_qwen_configuration_has_the_specifications_value(name, qwen):
    assert getattr(qwen, name) == SPECIFICATION[name]


def test_qwen_grid_is_6840_generations(qwen):
    assert n_generations(qwen) == 6840


def test_defaults_are_the_specifications():
    start = {key: SPECIFICATION[key] for key in ("source_model", "target_model", "output_dir")}
    config = load_config({**start, "layer_idx": 16})
    assert {name: getattr(config, name) for name in SPECIFICATION} == SPECIFICATION
    assert n_generations(config) == 6840


BAND_METHODS = {
    "example_config.json": {*METHODS, "prompted", "random_direction", "shuffled_pairs", "other_persona"},
    "sixty_questions.json": {*METHODS, "prompted", "random_direction", "shuffled_pairs", "other_persona"},
    "band.json": {*METHODS, "prompted", "random_direction", "shuffled_pairs", "other_persona"}
    - {"zero_pad", "interpolate"},
    "band_reverse.json": {"shuffled_pairs", "ridge_mapped", "oracle"},
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_is_usable(path):
    config = load_config(str(path))
    assert len(config.load_test_prompts()) == config.n_test_prompts
    assert [persona.name for persona in config.load_personas()] == config.persona_names
    assert set(config.methods) == BAND_METHODS.get(path.name, set(METHODS))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"layer_idx": 7}, ((7, 7),)),
        ({"source_layer_idx": 5, "target_layer_idx": 9}, ((5, 9),)),
        ({"layer_idx": 7, "target_layer_idx": 9}, ((7, 9),)),
        ({"layer_idx": 7, "source_layer_idx": 0}, ((0, 7),)),
        ({"source_layer_idx": [5, 5, 6], "target_layer_idx": [2, 3, 4]}, ((5, 2), (5, 3), (6, 4))),
        ({"source_layer_idx": [5], "target_layer_idx": [2]}, ((5, 2),)),
        ({"layer_idx": "band"}, None),
    ],
)
def test_layers_are_set_together_or_apart(layers, expected):
    config = load_config({**SMALL, "layer_idx": None, **layers})
    assert config.layer_pairs == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"source_layer_idx": [1, 2], "target_layer_idx": [1]},
            "a band of 2 and 1; give two lists",
        ),
        ({"source_layer_idx": [1, 2], "target_layer_idx": 3}, "a band of 2 and one layer"),
        ({"layer_idx": 3, "target_layer_idx": [1, 2]}, "a band of one layer and 2"),
        ({"source_layer_idx": [1, 2], "target_layer_idx": [4, 4]}, "names a block twice"),
        ({"source_layer_idx": [], "target_layer_idx": []}, "at least 1 item"),
        ({"layer_idx": "band", "layer_idx": 3}, "leave out layer_idx"),
        ({"layer_idx": "band", "target_layer_idx": 3}, "leave out target_layer_idx"),
        ({"layers": "all"}, "should be 'band'"),
    ],
)
def test_layers_that_are_no_band_are_refused(layers, message):
    with pytest.raises(InputError, match=message):
        load_config({**SMALL, "layer_idx": None, **layers})


def test_personas_are_the_named_ones_then_those_defined_here():
    definitions = {"loud": PAIR, "formal": PAIR}
    assert load_config({**SMALL, "persona_datasets": definitions}).persona_names == [
        "silly",
        "formal",
        "concise",
        "loud",
    ]
    config = load_config({**SMALL, "personas": [], "persona_datasets": {"loud": PAIR}})
    assert config.persona_names == ["loud"]
    assert config.load_personas()[0].positive_texts == ("YES",)


def test_seeds_count_up_from_seed():
    assert load_config({**SMALL, "seed": 7, "n_seeds": 3}).seeds == [7, 8, 9]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_configuration_survives_a_round_trip_through_json(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump()))
    assert load_config(tmp_path / "config.json") == config
    assert load_config(config) is config


def test_round_trip_keeps_definitions_and_judge():
    config = load_config(
        {**SMALL, "persona_datasets": {"loud": PAIR}, "judge": {"model": "local", "base_url": "http://x"}}
    )
    again = load_config(json.loads(json.dumps(config.model_dump())))
    assert again == config
    assert again.judge.base_url == "http://x"


def test_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_config(SMALL).layer_idx = 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_ix": 3}, "'layer_ix' is unknown; did you mean 'layer_idx'"),
        ({"alphas": [1]}, "'alphas' is unknown"),
        ({"judge": {"modle": "x"}}, "'judge.modle' is unknown"),
        ({"judge": {"max_answer_tokens": 0}}, "'judge.max_answer_tokens' is 0"),
        (
            {"persona_datasets": {"x": {**PAIR, "positive": ["a"]}}},
            "'persona_datasets.x.positive' is unknown",
        ),
        (
            {"persona_datasets": {"x": {"positive_texts": ["a"]}}},
            "negative_texts is missing",
        ),
        ({"persona_datasets": {"x": {**PAIR, "positive_texts": [""]}}}, "positive_texts.0"),
        ({"persona_datasets": {"x": {**PAIR, "positive_texts": "YES"}}}, "positive_texts"),
        ({"source_model": None}, "'source_model'"),
        ({"target_model": ""}, "'target_model'"),
        ({"output_dir": ""}, "'output_dir'"),
        ({"layer_idx": None}, "source_layer_idx is not set"),
        ({"layer_idx": None, "source_layer_idx": 3}, "target_layer_idx is not set"),
        ({"layer_idx": -1}, "'layer_idx'"),
        ({"layer_idx": 1.5}, "'layer_idx'"),
        ({"layer_idx": "middle"}, "'layer_idx'"),
        ({"dtype": "int8"}, "'dtype'"),
        ({"n_training_samples": 9}, "'n_training_samples'"),
        ({"lambda_values": []}, "'lambda_values'"),
        ({"lambda_values": [0.0, 1.0]}, "'lambda_values.0'"),
        ({"lambda_values": [1.0, -1.0]}, "'lambda_values.1'"),
        ({"lambda_values": [math.inf]}, "'lambda_values.0'"),
        ({"lambda_values": [1, 1.0]}, "lambda_values holds a value twice"),
        ({"lambda_unit": "percent"}, "'lambda_unit'"),
        ({"n_folds": 1}, "'n_folds'"),
        ({"personas": []}, "personas is empty"),
        ({"personas": "formal"}, "'personas'"),
        ({"persona_position": "first"}, "'persona_position'"),
        ({"methods": []}, "'methods'"),
        ({"methods": ["ridge"]}, "'methods.0'"),
        ({"methods": ["oracle", "oracle"]}, "methods holds a value twice"),
        ({"n_test_prompts": 0}, "'n_test_prompts'"),
        ({"test_prompts": []}, "'test_prompts'"),
        ({"alpha_values": []}, "'alpha_values'"),
        ({"alpha_values": [1.0, 0.0]}, "alpha_values must be finite and not 0"),
        ({"alpha_values": [math.nan]}, "alpha_values must be finite"),
        ({"alpha_values": [math.inf]}, "alpha_values must be finite"),
        ({"alpha_values": [2, 2]}, "alpha_values holds a value twice"),
        ({"alpha_unit": "relative"}, "'alpha_unit'"),
        ({"n_seeds": 0}, "'n_seeds'"),
        ({"max_new_tokens": 0}, "'max_new_tokens'"),
        ({"temperature": -0.1}, "'temperature'"),
        ({"temperature": math.inf}, "'temperature'"),
        ({"top_k": -1}, "'top_k'"),
        ({"top_p": 0.0}, "'top_p'"),
        ({"top_p": 1.1}, "'top_p'"),
        ({"use_gpt4": "perhaps"}, "'use_gpt4'"),
        ({"generation_batch_size": 0}, "'generation_batch_size'"),
        ({"seed": 2**70}, "'seed'"),
    ],
    ids=str,
)
def test_bad_value_is_refused_by_its_key(change, named):
    with pytest.raises(InputError) as caught:
        load_config({**SMALL, **change})
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("key", ["source_model", "target_model", "output_dir"])
def test_missing_key_is_named(key):
    with pytest.raises(InputError, match=f"'{key}' is missing"):
        load_config({name: value for name, value in SMALL.items() if name != key})


def test_many_problems_make_one_short_message():
    with pytest.raises(InputError) as caught:
        load_config({**SMALL, **{f"unknown_{index}": "x\n" * 500 for index in range(9)}})
    assert "(and 7 more)" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{half", "is not JSON"),
        (b"\xff\xfe\xfa", "is UTF-16; save it as UTF-8"),
        (b"[1]", "is a list, expected a JSON object"),
        (b"", "is not JSON"),
        (None, "cannot be read"),
    ],
    ids=["half", "not text", "list", "empty", "missing"],
)
def test_unreadable_file_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"broken\.json'? {message}") as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_test_prompts": 61}, "n_test_prompts is 61 but there are 60 prompts"),
        ({"n_test_prompts": 2, "test_prompts": ["One"]}, "n_test_prompts is 2 but there are 1"),
        ({"n_test_prompts": 2, "test_prompts": ["One", "One"]}, "holds a prompt twice"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        load_config({**SMALL, **change}).load_test_prompts()


def test_given_prompts_replace_the_shipped_ones():
    config = load_config({**SMALL, "test_prompts": ["One", "Two", "Three"], "n_test_prompts": 2})
    assert config.load_test_prompts() == ["One", "Two"]


def test_every_field_is_listed_in_the_dump():
    assert set(load_config(SMALL).model_dump()) == set(ExperimentConfig.model_fields)


def test_alphas_may_be_given_for_each_persona():
    by_persona = {"silly": [1.0], "formal": [2.0, 3.0], "concise": [4.0]}
    config = load_config({**SMALL, "alpha_values": by_persona})
    for method in METHODS:
        found = [config.alphas_of(name, method) for name in config.persona_names]
        assert found == [[1.0], [2.0, 3.0], [4.0]]
    assert config.n_cells == 1 + len(METHODS) * 4


def test_methods_may_have_doses_of_their_own_and_are_tried_at_the_oracles_too():
    by_method = {"oracle": 1.0, "ridge_mapped": 1.5, "zero_pad": 1.0}
    alphas = {"silly": by_method, "formal": [2.0, 3.0], "concise": {"oracle": 4.0}}
    config = load_config({**SMALL, "alpha_values": alphas})
    assert config.alphas_of("silly", "ridge_mapped") == [1.5, 1.0]
    assert config.alphas_of("silly", "zero_pad") == config.alphas_of("silly", "interpolate") == [1.0]
    assert config.alphas_of("formal", "ridge_mapped") == [2.0, 3.0]
    assert config.alphas_of("concise", "ridge_mapped") == [4.0]
    assert [config.has_alphas_by_method(name) for name in config.persona_names] == [True, False, True]
    assert config.n_cells == 1 + len(METHODS) * (1 + 2 + 1) + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"alpha_values": {"silly": [1.0], "formal": [2.0]}},
            "'concise' is in one of alpha_values and personas",
        ),
        ({"alpha_values": {"silly": [1.0, 1.0], "formal": [2.0], "concise": [1.0]}}, "holds a value twice"),
        ({"alpha_values": {"silly": [0.0], "formal": [2.0], "concise": [1.0]}}, "must be finite and not 0"),
        ({"alpha_values": {"silly": []}}, "'alpha_values.silly'"),
        ({"alpha_values": {"silly": "auto"}}, "'alpha_values.silly'"),
        ({"personas": ["silly"], "alpha_values": {"silly": {}}}, "'alpha_values.silly'"),
        (
            {"personas": ["silly"], "alpha_values": {"silly": {"ridge_mapped": 1.0}}},
            "alphas by method, but none of 'oracle'",
        ),
        (
            {"personas": ["silly"], "alpha_values": {"silly": {"oracle": 1.0, "shuffled_pairs": 2.0}}},
            "'shuffled', which is not among the methods",
        ),
        (
            {"personas": ["silly"], "alpha_values": {"silly": {"oracle": math.inf}}},
            "must be finite and not 0",
        ),
        ({"personas": ["silly"], "alpha_values": {"silly": {"orcle": 1.0}}}, "'alpha_values.silly'"),
        ({"personas": ["silly"], "methods": ["other_persona"]}, "name a second persona"),
        ({"prompt_format": "xml"}, "'prompt_format'"),
        ({"system_prompt": " "}, "'system_prompt'"),
        ({"extraction": {"kind": "answers"}}, "'extraction.kind'"),
        ({"extraction": {"n_questions": 0}}, "'extraction.n_questions'"),
        ({"alpha_search": {"bound": "none"}}, "'alpha_search.bound'"),
    ],
    ids=str,
)
def test_bad_alphas_formats_and_controls_are_refused(change, named):
    with pytest.raises(InputError) as caught:
        load_config({**SMALL, **change})
    assert named in str(caught.value)

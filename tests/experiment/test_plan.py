"""Fingerprints and row keys stay what they were, so that a finished run is recognised as finished."""

import random
from pathlib import Path

import pytest

from experiment import plan as grid
from experiment.config import load_config
from experiment.inputs import load_inputs

ROOT = Path(__file__).parent.parent.parent
# Of runs made before the grid had a module of its own; `texts` is of all row keys, in order. `preflight` and
# `alphas` are newer: they hold the development prompts.
TINY = {
    "pairs": "5b4580ebfcfb54ebde09d7333ee2adfea25903560a1b98ac557bbe8be58c7657",
    "mapping": "b55c35fab9b8c428c3d9c7fbfb8a971815ecfc80b74165488d539ba863a4adea",
    "personas": "28c79521b456ca1c84fb5845f9db86fd3e814465a3b31cb915450656e2cdb430",
    "preflight": "6f47e3365d74d6470f72ef0685496eab168760ecba8f9c34c3e72ff3e15e8f61",
    "alphas": "d754b2a4870922ca16ac97f82b12acdf0d929814094312ec182ce25aa2dd3ee9",
    "search": "0763a835a7b585181d0b6012763c378f42b8f2b209cb743bed8436eb25350c01",
    "texts": "f43a0d056023704db6b2f407e853d81470adb609f0c6093b942e5ecd79190f27",
}
DEFAULT = {
    "pairs": "a7af33c23228bb465cf17ff34d2d4af3dee93298c3d4311108cee0064ec62fa7",
    "mapping": "6961d6777bc5944ea78f98e8c378f0332d5af83c8da2324d0f5605062236e76c",
    "personas": "e61c3a6ed84d7143bef46fdc85f1165d16e8de227b8514e4b6e076b5f7009bad",
    "preflight": "85ab5b03911460d051aa4a42b1491920c14085bc55e3583872b892570a1d84df",
    "texts": "483863e037be8debab5ab45f57290ca0df2079eb251ae7bda475665d7febbe62",
}


def fingerprints(inputs, names):
    made = {name: getattr(grid, f"{name}_fingerprint") for name in names if name != "texts"}
    texts = grid.grid_texts(inputs, inputs.config.alpha_values)
    return {**{name: make(inputs) for name, make in made.items()}, "texts": grid.rows_fingerprint(texts)}


@pytest.fixture(scope="module")
def tiny_inputs(model_folders, tmp_path_factory):
    generator = random.Random(0)
    words = ["".join(generator.choices("aeiounrstlm", k=generator.randint(2, 5))) for _ in range(300)]
    paragraphs = [" ".join(generator.choices(words, k=30)).capitalize() + "." for _ in range(60)]
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "neutral.txt").write_text("\n\n".join(paragraphs))
    settings = {
        "source_model": model_folders["source"],
        "target_model": model_folders["target"],
        "source_layer_idx": 1,
        "target_layer_idx": 2,
        "neutral_text": str(folder / "neutral.txt"),
        "n_training_samples": 30,
        "n_folds": 3,
        "personas": ["formal"],
        "alpha_unit": "residual_norm",
        "n_test_prompts": 3,
        "alpha_values": [1.0, 4.0],
        "n_seeds": 2,
        "max_new_tokens": 6,
        "output_dir": str(folder / "out"),
    }
    return load_inputs(load_config(settings))


def test_fingerprints_of_a_tiny_run_are_pinned(tiny_inputs):
    assert fingerprints(tiny_inputs, TINY) == TINY


def test_layers_of_the_inputs_are_part_of_every_fingerprint_but_the_searchs(tiny_inputs):
    other = fingerprints(tiny_inputs.at_layers(2, 1), TINY)
    assert {name for name in TINY if other[name] == TINY[name]} == {"search"}
    assert tiny_inputs.layers == (1, 2)


@pytest.mark.real_models
def test_fingerprints_of_the_default_run_are_pinned():
    inputs = load_inputs(load_config(ROOT / "configs/smol_to_gemma.json"))
    assert fingerprints(inputs, DEFAULT) == DEFAULT


def test_another_personas_vectors_are_the_next_three_in_turn():
    names = ["a", "b", "c", "d", "e"]
    assert grid.other_personas(names)["d"] == ["e", "a", "b"]
    assert grid.other_personas(["a", "b"]) == {"a": ["b"] * 3, "b": ["a"] * 3}
    assert grid.other_personas(["a"]) == {}

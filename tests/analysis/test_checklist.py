import numpy as np
import pytest
import torch
from torch import nn
from watching import n_hooks

from activation_extractor import ActivationExtractor, PersonaVector
from analysis.checklist import (
    check_baseline,
    check_effects,
    check_extraction,
    check_lambda,
    check_steering,
    check_vectors,
)
from scoring.training_texts import labelled_rows
from scoring.trait_scorer import train_scorers
from steered_generation import SteeredGenerator
from support.tiny_models import D_MODEL, N_LAYERS, tiny_model
from texts.personas import Persona

VECTOR = nn.functional.normalize(torch.ones(D_MODEL), dim=0)
CV = {"best_lambda": 1.0, "best_r2": 0.4, "shuffled_r2": -0.01, "best_at_edge": False}


def statuses(checks):
    return {check.name: check.status for check in checks}


def vector(cosine=0.9, scale=1.0):
    return PersonaVector(VECTOR * scale, 1.0, cosine, 12, 12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mpt", "mixtral"])
def test_sound_model_passes_every_technical_check_and_keeps_no_hook(architecture, tokenizer):
    model = tiny_model(architecture)
    extractor = ActivationExtractor(model, tokenizer, layer_idx=2)
    checks = check_extraction("target", extractor)
    checks += check_steering(SteeredGenerator(model, tokenizer), extractor, VECTOR)
    assert statuses(checks) == dict.fromkeys(
        ("target_width", "target_extraction", "steering_hook", "steering_removed"), "pass"
    )
    assert all(check.technical for check in checks)
    assert n_hooks(model) == 0


def test_wrong_width_fails(llama, tokenizer):
    extractor = ActivationExtractor(llama, tokenizer, layer_idx=1)
    extractor.blocks = nn.ModuleList(layer.mlp.gate_proj for layer in llama.model.layers)
    found = check_extraction("source", extractor)[0]
    assert (found.name, found.status) == ("source_width", "fail")
    assert "writes 64 dimensions, the configuration says 32" in found.detail
    assert "source_block_path" in found.remedy


def test_extraction_of_a_cut_text_fails(llama, tokenizer):
    extractor = ActivationExtractor(llama, tokenizer, layer_idx=1, max_length=5)
    assert statuses(check_extraction("source", extractor))["source_extraction"] == "fail"


def test_extraction_from_a_model_of_chance_fails(tokenizer):
    model = tiny_model("gpt2")
    model.transformer.h[0].register_forward_pre_hook(lambda block, inputs: (torch.rand_like(inputs[0]),))
    extractor = ActivationExtractor(model, tokenizer, layer_idx=1)
    assert statuses(check_extraction("source", extractor))["source_extraction"] == "fail"


@pytest.mark.parametrize("steered", [0, 2, 3])
def test_steering_of_another_block_than_extraction_reads_fails(steered, llama, tokenizer):
    generator = SteeredGenerator(llama, tokenizer)
    generator.blocks = nn.ModuleList([generator.blocks[steered]] * N_LAYERS)
    checks = check_steering(generator, ActivationExtractor(llama, tokenizer, layer_idx=1), VECTOR)
    assert statuses(checks) == {"steering_hook": "fail", "steering_removed": "pass"}
    assert "target_block_path" in checks[0].remedy


def test_steering_that_stays_fails(tokenizer):
    class Sticky(SteeredGenerator):
        def clear_steering(self, layer_idx=None):
            pass

    model = tiny_model("llama")
    extractor = ActivationExtractor(model, tokenizer, layer_idx=1)
    checks = check_steering(Sticky(model, tokenizer), extractor, VECTOR)
    assert statuses(checks) == {"steering_hook": "pass", "steering_removed": "fail"}


@pytest.mark.parametrize(
    ("vectors", "norm", "stability"),
    [
        ({"a": vector(), "b": vector(0.51)}, "pass", "pass"),
        ({"a": vector(), "b": vector(0.1)}, "pass", "fail"),
        ({"a": vector(), "b": vector(None)}, "pass", "fail"),
        ({"a": vector(), "b": vector(scale=2.0)}, "fail", "pass"),
    ],
    ids=["sound", "noise", "too few texts", "norm 2"],
)
def test_vectors_must_have_unit_norm_and_be_stable(vectors, norm, stability):
    checks = check_vectors("source", vectors)
    assert statuses(checks) == {"source_vector_norm": norm, "source_vector_stability": stability}
    assert [check.technical for check in checks] == [True, False]


def letters(n_a, n=20):
    return tuple("a" * n_a + "b" * (10 - n_a) + str(index) for index in range(n))


@pytest.fixture(scope="module")
def classifier():
    def count(texts):
        return np.array([[text.count("a"), text.count("b")] for text in texts], dtype=float)

    shown = Persona("shown", "", ("x",), ("y",), letters(8), letters(2))
    return train_scorers(["shown"], labelled_rows(shown), count)["shown"]


@pytest.mark.parametrize(
    ("by_alpha", "status"),
    [
        ({1.0: letters(3), 2.0: letters(8)}, "pass"),
        ({1.0: letters(8), 9.0: ["", " "]}, "pass"),
        ({1.0: letters(3), 2.0: letters(3)}, "fail"),
        ({1.0: letters(0), 2.0: letters(1)}, "fail"),
    ],
    ids=["moves", "falls silent", "stays", "anti-steered"],
)
def test_own_vectors_must_raise_the_trait_at_some_alpha(by_alpha, status, classifier):
    for side, name in (("target", "oracle_moves_shown"), ("source", "source_vector_moves_shown")):
        (check,) = check_effects(side, {"shown": classifier.score}, letters(3), {"shown": by_alpha})
        assert (check.name, check.status, check.technical) == (name, status, False)
        (check,) = check_effects(side, {}, letters(3), {"bare": by_alpha})  # nothing scores it
        assert (check.status, check.technical) == ("pending", False)


PREDICTABLE = "the cat sat on the mat and the dog ran to the old red barn by the sea".split()


@pytest.fixture(scope="module")
def trained_on_order(tokenizer):
    """A tiny model that has learnt one sentence, so that its words shuffled are far less likely."""
    model = tiny_model("llama", seed=3)
    tokens = torch.tensor([tokenizer(" ".join(PREDICTABLE)).input_ids])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimiser.step()
    return model, tokenizer


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (" " + " ".join(PREDICTABLE[2:]), "pass"),
        (" " + " ".join(sorted(PREDICTABLE)), "fail"),
        (" the cat" * 10, "fail"),
        ("", "fail"),
    ],
    ids=["fluent", "word salad", "loop", "empty"],
)
def test_baseline_must_be_likelier_than_its_words_shuffled(output, status, trained_on_order):
    check = check_baseline(trained_on_order, ["the cat"] * 3, [output] * 3)
    assert (check.name, check.status, check.technical) == ("baseline_fluent", status, False)


@pytest.mark.parametrize(
    ("lambda_values", "cv", "status"),
    [
        ([1.0, 10.0], None, "pending"),
        ([1.0], None, "fail"),
        ([0.1, 1.0, 10.0], CV, "pass"),
        ([0.1, 1.0], {**CV, "best_at_edge": True}, "fail"),
        ([0.1, 1.0, 10.0], {**CV, "best_r2": -0.2, "shuffled_r2": -0.3}, "fail"),
        ([0.1, 1.0, 10.0], {**CV, "best_r2": 0.1, "shuffled_r2": 0.2}, "fail"),
    ],
    ids=["before phase 2", "one value", "sound", "edge", "below the mean", "below shuffled pairs"],
)
def test_lambda_must_be_chosen_inside_the_grid_and_beat_shuffled_pairs(lambda_values, cv, status):
    assert check_lambda(lambda_values, cv).status == status

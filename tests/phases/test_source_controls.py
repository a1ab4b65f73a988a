"""Controls that are read from another source: embeddings, the first block, random weights; disjoint texts."""

import pytest
import torch
from tiny_runs import LOUD, NUMERIC
from torch.testing import assert_close

from activation_extractor import ActivationExtractor
from experiment.conditions import SOURCE_CONTROLS, vector_names
from experiment.config import load_config
from experiment.inputs import load_inputs
from experiment.models import SIDES
from experiment.run import Run
from model_loading import load_model
from phases.fit_maps import CONTROL_MAPS, RIDGE_MAPPING, fit_maps, load_maps
from phases.make_vectors import NATIVE_VECTORS, make_vectors
from run_experiment import PersonaTransferExperiment
from support.artifacts import load_json, load_tensors
from support.errors import InputError
from support.vocabulary import EMBEDDINGS
from texts.personas import half_of

UNTRAINED = vector_names("untrained_source")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def settings(tiny):
    return {**tiny, "source_layer_idx": [0, 2], "target_layer_idx": [1, 3], "controls": SOURCE_CONTROLS}


@pytest.fixture(scope="module")
def made(settings, tmp_path_factory):
    """A run after phases 2 and 3, with its maps and vectors."""
    experiment = PersonaTransferExperiment({**settings, "output_dir": str(tmp_path_factory.mktemp("made"))})
    run = Run(experiment.inputs, experiment.folder, experiment.executor)
    maps = fit_maps(run)
    yield run, maps, make_vectors(run, maps)
    experiment.close()


def source_difference(run, layer, half):
    """The source's difference of means at a layer, by a plain forward pass over one half of the texts."""
    model, tokenizer = run.inputs.source.model, run.inputs.source.tokenizer

    def mean(texts):
        read = [torch.tensor([tokenizer(text).input_ids]) for text in half_of(texts, half)]
        states = [model(ids, output_hidden_states=True).hidden_states[layer + 1][0, -1] for ids in read]
        return torch.stack(states).mean(0)

    return mean(NUMERIC["positive_texts"]) - mean(NUMERIC["negative_texts"])


@torch.inference_mode()
def test_first_block_is_mapped_by_a_map_of_its_own_to_every_block(made):
    run, maps, content = made
    expected = source_difference(run, 0, 0)
    for index, learned in enumerate(maps):
        mapped = learned.controls["first_block"].transform(expected)
        found = content["vectors"]["numeric"]["first_block"][index]
        assert_close(found, mapped / mapped.norm(), **CLOSE)
    assert torch.equal(maps[0].controls["first_block"].W, maps[0].ridge.W)  # whose source block is the first
    assert not torch.equal(maps[1].controls["first_block"].W, maps[1].ridge.W)
    vectors = content["vectors"]["loud"]
    assert_close(vectors["first_block"][0], vectors["ridge_mapped"][0], **CLOSE)


def test_embeddings_hold_nothing_where_both_sides_end_on_the_same_token(made):
    run, _, content = made
    for name in ("loud", "numeric"):
        vectors = content["vectors"][name]
        assert not vectors["embedding_source"].any()
        for other in ("first_block", "ridge_mapped", *UNTRAINED):
            assert_close(vectors[other].norm(dim=1), torch.ones(2))
        assert content["personas"][name]["cosine_to_oracle"]["embedding_source"] == 0
    assert any("the same to source embeddings where they are read" in note for note in run.folder.notes)


def test_embeddings_hold_words_where_tokens_are_averaged(settings, tmp_path):
    """Where all lambdas are too small, it is said that their maps could be better."""
    changed = {"persona_position": "mean", "controls": ["embedding_source"], "lambda_values": [1e-9, 1e-8]}
    experiment = PersonaTransferExperiment({**settings, **changed, "output_dir": str(tmp_path)})
    run = Run(experiment.inputs, experiment.folder, experiment.executor)
    vectors = make_vectors(run, fit_maps(run))["vectors"]["loud"]["embedding_source"]
    experiment.close()
    assert_close(vectors.norm(dim=1), torch.ones(2))
    assert not torch.equal(vectors[0], vectors[1])  # a map for each block of the target
    assert any("embedding_source: the best lambda of 2 of its 2 maps" in note for note in run.folder.notes)


def test_untrained_draws_differ_and_are_the_same_each_time(made, settings):
    run, maps, content = made
    vectors = [content["vectors"]["loud"][name] for name in UNTRAINED]
    fitted = [maps[0].controls[name].W for name in UNTRAINED]
    for number in range(3):
        assert not torch.allclose(vectors[number], vectors[number - 1], atol=0.01)
        assert not torch.allclose(fitted[number], fitted[number - 1], atol=0.01)
    source = run.inputs.source
    again, other = (source.untrained(seed) for seed in (1, 2))
    names = dict(source.model.named_parameters()).keys()
    state = torch.get_rng_state()
    repeated = source.untrained(1)
    assert torch.equal(torch.get_rng_state(), state)
    for name in names:
        weights = again.model.get_parameter(name)
        assert torch.equal(weights, repeated.model.get_parameter(name))
        assert weights.ndim < 2 or not torch.equal(weights, other.model.get_parameter(name))
    assert again.fingerprint == repeated.fingerprint != other.fingerprint


def test_oracle_and_source_read_disjoint_texts_and_the_ceiling_is_beside(made):
    run, _, content = made
    target = run.inputs.target.extractor
    halves = [
        target.measure_persona_vectors(
            half_of(LOUD["positive_texts"], half), half_of(LOUD["negative_texts"], half), [1, 3]
        )
        for half in (0, 1)
    ]
    first, second = (torch.stack([found[layer].vector for layer in (1, 3)]) for found in halves)
    assert_close(content["vectors"]["loud"]["oracle"], second, **CLOSE)
    assert_close(NATIVE_VECTORS.load(run)["ceilings"]["loud"], first, **CLOSE)
    expected = torch.cosine_similarity(first, second, dim=1)
    found = [at["loud"]["ceiling"]["cosine_to_oracle"] for at in content["by_layer"]]
    assert_close(torch.tensor(found), expected, **CLOSE)
    similarities = load_json(run.folder.path / "persona_similarities.json")["personas"]
    assert similarities["loud"]["ceiling"]["cosine_to_oracle"] == pytest.approx(expected[1].item(), abs=1e-4)


def test_maps_are_read_again_and_the_files_stand_beside_those_of_their_layer_pair(made):
    run, maps, content = made
    for learned, again in zip(maps, load_maps(run), strict=True):
        assert learned.controls.keys() == again.controls.keys()
        assert all(torch.equal(each.W, again.controls[name].W) for name, each in learned.controls.items())
    stored = load_tensors(run.folder.path / "layers" / "0_1" / "control_maps.pt")
    assert list(stored["maps"]) == ["embedding_source", "first_block", *UNTRAINED]
    assert [row["map"] for row in content["control_maps"]] == list(stored["maps"])


def test_a_map_from_embeddings_depends_on_no_source_block(settings):
    def keys(**changed):
        inputs = load_inputs(load_config({**settings, "controls": ["embedding_source"], **changed}))
        return [artifact.key(Run(inputs, None, None)) for artifact in (CONTROL_MAPS, RIDGE_MAPPING)]

    settings = {**settings, "output_dir": "x"}
    before, deeper, smaller = keys(), keys(source_layer_idx=[1, 2]), keys(lambda_values=[0.5, 5.0])
    assert before[0] == deeper[0] != smaller[0]
    assert before[1] != deeper[1]


def test_one_pass_reads_embeddings_and_blocks(llama, tokenizer):
    passes = []
    handle = llama.register_forward_pre_hook(lambda module, args: passes.append(module))
    extractor = ActivationExtractor(llama, tokenizer, 1)
    found = extractor.extract_layers(["one text"], [2, EMBEDDINGS, 0])
    handle.remove()
    states = llama(torch.tensor([tokenizer("one text").input_ids]), output_hidden_states=True).hidden_states
    assert len(passes) == 1
    assert list(found) == [EMBEDDINGS, 0, 2]
    for layer, rows in found.items():
        assert_close(rows[0], states[layer + 1][0, -1].detach(), **CLOSE)


def test_a_source_whose_embeddings_cannot_be_found_is_one_clear_line(settings):
    loaded = {side: load_model(settings[f"{side}_model"]) for side in SIDES}
    model, _ = loaded["source"]
    first = model.model.layers[0]
    forward = first.forward
    first.forward = lambda positions, hidden, **options: forward(hidden, **options)
    first.register_forward_pre_hook(lambda module, args, options: ((None, *args), options), with_kwargs=True)
    config = load_config({**settings, "output_dir": "x"})
    with pytest.raises(InputError, match=r"'embedding_source' of the source model: .* embeddings cannot be"):
        load_inputs(config, loaded)


def test_one_model_may_be_both_and_it_is_said_that_words_cannot_be_excluded(settings):
    config = {**settings, "target_model": settings["source_model"], "output_dir": "x"}
    (note,) = load_inputs(load_config(config)).notes
    assert "text-borne cannot be excluded" in note
    assert load_inputs(load_config({**settings, "output_dir": "x"})).notes == []


@pytest.mark.parametrize(
    ("changed", "halves"),
    [({}, True), ({"controls": []}, False), ({"controls": [], "disjoint_texts": True}, True)],
)
def test_texts_are_halved_where_a_control_has_another_source_or_it_is_asked_for(settings, changed, halves):
    assert load_config({**settings, "output_dir": "x", **changed}).halves_texts is halves


def test_a_persona_of_one_text_cannot_be_halved(settings):
    short = {"persona_datasets": {"loud": {"positive_texts": ["OH."], "negative_texts": ["oh."]}}}
    with pytest.raises(InputError, match=r'1 positive texts, but .* set "disjoint_texts": false'):
        load_config({**settings, "output_dir": "x", **short}).load_personas()

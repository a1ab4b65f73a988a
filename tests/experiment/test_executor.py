"""Chunks give what one chunk gives, and a side is loaded once, when it is first used."""

import functools
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from watching import fails_at

from activation_extractor import ActivationExtractor
from evaluation import continuation_perplexities
from experiment import executor, models
from experiment.config import load_config
from experiment.executor import GenerationSettings, LocalExecutor, Worker, collect_in_chunks
from experiment.models import Side, load_side
from maps.pair_collection import PairSettings, document_folds
from model_loading import load_model
from steered_generation import SteeredGenerator
from support.errors import InputError
from support.tiny_models import D_MODEL, tiny_model
from texts.neutral_text import NeutralText

WORDS = ["the cat sat on the mat", "zebra", "a dog ran in the park", "the café was closed on the day"]
TEXTS = [NeutralText(WORDS[row % 4], f"doc {row * 5 % 11}") for row in range(30)]
PAIRS = PairSettings(((1, 2), (3, 0)), "last", n_folds=4, seed=3)
ROWS = [
    {"prompt": f"{prompt} {number}", "seed": number, "alpha": alpha}
    for number, prompt in enumerate(("Once upon a time", "Then"))
    for alpha in (None, 0.0, 1.0, 3.0)
]
SETTINGS = GenerationSettings((1,), 8, 1.0, 50, 1.0, "absolute", (1.0,), "all", batch_size=4)


def side_of(name, model, tokenizer, **options):
    return Side(name, name, model, tokenizer, ActivationExtractor(model, tokenizer, 1, **options), name)


@pytest.fixture(scope="module")
def sides(llama, tokenizer, word_tokenizer):
    return {
        "source": side_of("source", llama, tokenizer, max_length=25),
        "target": side_of("target", tiny_model("gpt2", seed=1, n_embd=48), word_tokenizer),
    }


@pytest.fixture
def worker(llama, tokenizer):
    source = side_of("source", tiny_model("gpt2", n_embd=48), tokenizer)
    return Worker({"source": source, "target": side_of("target", llama, tokenizer)})


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(len(ROWS), 1, D_MODEL, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def config(model_folders):
    """Takes changes and returns a configuration of the two tiny models."""
    names = {f"{side}_model": folder for side, folder in model_folders.items()}
    given = {**names, "output_dir": "x", "layer_idx": 1, "device": "cpu"}
    return lambda **changes: load_config({**given, **changes})


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded, in order."""
    loaded = []

    @functools.wraps(load_model)
    def noting(source, *options):
        loaded.append(source)
        return load_model(source, *options)

    monkeypatch.setattr(models, "load_model", noting)
    return loaded


def lazily(config):
    return {name: partial(load_side, config, name) for name in ("source", "target")}


def test_a_side_is_loaded_when_first_used_and_then_kept(config, model_folders, loads):
    worker = Worker(lazily(config()))
    worker.perplexities({"source": ["Then"]}, [" it rains"], 4)
    assert worker.side("source") is worker.side("source")
    assert loads == [model_folders["source"]]
    worker.pairs(TEXTS[:2], PAIRS, document_folds(TEXTS, PAIRS))
    assert loads == [model_folders["source"], model_folders["target"]]
    Worker(lazily(config())).generate(ROWS[:1], torch.zeros(1, 1, 48), SETTINGS)
    assert loads[2:] == [model_folders["target"]]


def test_a_model_that_is_not_the_expected_one_is_an_error(config, model_folders):
    expected = load_side(config(), "source").fingerprint
    assert load_side(config(), "source", expected_fingerprint=expected).fingerprint == expected
    target = model_folders["target"]
    for change in ({"dtype": "bfloat16"}, {"source_model": target}, {"source_block_path": "model.layers"}):
        with pytest.raises(InputError, match="differs between the machines"):
            load_side(config(**change), "source", expected_fingerprint=expected)


def test_a_pickled_worker_generates_the_same(config):
    sides = lazily(config(device_map={"": "cpu"}, target_block_path="transformer.h"))
    vectors = torch.randn(len(ROWS), 1, 48)
    pickled = Worker(pickle.loads(pickle.dumps(sides)))
    assert pickled.generate(ROWS, vectors, SETTINGS) == Worker(sides).generate(ROWS, vectors, SETTINGS)


class LastFirst(LocalExecutor):
    """Yields the last chunk first, as the workers of a cluster may."""

    def run(self, method, chunks):
        yield from reversed(list(super().run(method, chunks)))


def test_pairs_are_summed_in_order_whichever_chunk_comes_first(sides, monkeypatch):
    whole = Worker(sides).pairs(TEXTS, PAIRS, document_folds(TEXTS, PAIRS))
    assert whole.n_truncated["source"] > 0
    monkeypatch.setattr(executor, "EXTRACTION_CHUNK", 7)
    one, other = (collect_in_chunks(kind(Worker(sides)), TEXTS, PAIRS) for kind in (LocalExecutor, LastFirst))
    assert one.report() == other.report() == whole.report()
    assert torch.equal(one.text_idx, whole.text_idx)
    for pair, expected in whole.statistics.items():
        found, again = one.statistics[pair], other.statistics[pair]
        assert torch.equal(found.n, expected.n)
        assert torch.equal(found.total().cross, again.total().cross)
        # Activations are float32, and a batch of another size rounds them otherwise.
        assert torch.allclose(found.total().cross, expected.total().cross, rtol=0, atol=1e-3)
        assert torch.allclose(found.sample.H_target, expected.sample.H_target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steer_positions", ["all", "response"])
@pytest.mark.parametrize(("alpha_unit", "scale"), [("absolute", 1.0), ("residual_norm", 2.5)])
def test_rows_are_steered_as_registered_vectors_steer(
    worker, llama, tokenizer, vectors, alpha_unit, scale, steer_positions
):
    settings = GenerationSettings((2,), 8, 0.9, 40, 0.95, alpha_unit, (2.5,), steer_positions, batch_size=3)
    texts = [made.text for made in worker.generate(ROWS, vectors, settings)]
    with SteeredGenerator(llama, tokenizer, steer_positions=steer_positions) as generator:
        for row, (vector,), text in zip(ROWS, vectors, texts, strict=True):
            generator.register_steering(2, vector, scale * (row["alpha"] or 0.0))
            assert generator.generate(row["prompt"], 8, 0.9, 40, 0.95, row["seed"]) == text
    assert texts[0] == texts[1] != texts[3]


def test_the_generator_of_equal_settings_keeps_the_batch_size_that_fits(tokenizer, vectors):
    model = tiny_model()
    worker = Worker({"target": side_of("target", model, tokenizer)})
    expected = worker.generate(ROWS, vectors, replace(SETTINGS, batch_size=2))
    passes = fails_at(model, lambda n_rows, _: n_rows > 2)
    assert worker.generate(ROWS, vectors, SETTINGS) == expected
    assert max(passes) > 2
    passes.clear()
    assert worker.generate(ROWS, vectors, replace(SETTINGS)) == expected
    assert max(passes) == 2


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"layers": (3,)}, {"steer_positions": "response"}])
def test_other_settings_generate_other_texts(worker, vectors, change):
    first = worker.generate(ROWS, vectors, SETTINGS)
    assert worker.generate(ROWS, vectors, replace(SETTINGS, **change)) != first
    assert worker.generate(ROWS, vectors, SETTINGS) == first


def test_settings_without_steering_generate_the_unsteered_text(worker, vectors):
    plain = worker.generate(ROWS[:1], vectors[:1, :0], SETTINGS.unsteered("target", 8))
    assert plain == worker.generate(ROWS[:1], vectors[:1], SETTINGS)
    assert plain != worker.generate(ROWS[:1], vectors[:1, :0], SETTINGS.unsteered("source", 8))


def test_perplexities_are_those_of_the_named_sides(worker):
    prompts, outputs = ["Then", "The sea is", "He"], [" it rains", " blue", ""]
    for scorers in (["source"], ["target", "source"]):
        found = worker.perplexities(dict.fromkeys(scorers, prompts), outputs, 2)
        assert list(found) == scorers
        for name in scorers:
            side = worker.side(name)
            assert found[name] == continuation_perplexities(side.model, side.tokenizer, prompts, outputs, 2)
    assert found["target"] != found["source"]


def test_perplexities_in_another_dtype_leave_the_model_as_it_is(worker):
    asked = ({"target": ["Then"]}, [" it rains"], 2)
    before = worker.perplexities(*asked)
    rounded = worker.perplexities(*asked, "bfloat16")["target"]
    assert rounded != before["target"]
    assert rounded == pytest.approx(before["target"], rel=0.05)
    assert worker.perplexities(*asked) == before


def test_plain_text_is_read_under_steering_that_ends_with_the_call(worker, vectors):
    texts = ["The sea is blue today.", "It rains."]
    plain = worker.perplexities({"target": ["", ""]}, texts, 2)["target"]
    steered = worker.plain_perplexities(texts, vectors[0], 5.0, SETTINGS, 2)
    assert all(one != other for one, other in zip(plain, steered, strict=True))
    assert worker.plain_perplexities(texts, vectors[0], 0.0, SETTINGS, 2) == plain
    assert worker.perplexities({"target": ["", ""]}, texts, 2)["target"] == plain

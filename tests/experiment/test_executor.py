"""Chunks give what one chunk gives, and a side is loaded once, when it is first used."""

import functools
import pickle
from dataclasses import replace

import pytest
import torch

from activation_extractor import ActivationExtractor
from evaluation import continuation_perplexities
from experiment import executor as workers
from experiment.executor import LocalExecutor, Side, SideSettings, Worker, WritingSettings
from maps.pair_collection import PairSettings, document_folds, merge_pairs
from model_loading import load_model, model_fingerprint
from steered_generation import SteeredGenerator
from support.errors import InputError
from support.tiny_models import D_MODEL, N_LAYERS, tiny_model
from texts.neutral_text import NeutralText

WORDS = ["the cat sat on the mat", "zebra", "a dog ran in the park", "the café was closed on the day"]
TEXTS = [NeutralText(WORDS[row % 4], f"doc {row * 5 % 11}") for row in range(30)]
PAIRS = PairSettings(((1, 2), (3, 0)), "last", n_folds=4, seed=3)
ROWS = [
    {"prompt": f"{prompt} {number}", "seed": number, "alpha": alpha}
    for number, prompt in enumerate(("Once upon a time", "Then"))
    for alpha in (None, 0.0, 1.0, 3.0)
]
WRITING = WritingSettings((1,), 8, 1.0, 50, 1.0, "absolute", (1.0,), "all", batch_size=4)


def loaded_side(name, model, tokenizer, max_length=None):
    extractor = ActivationExtractor(model, tokenizer, 1, max_length=max_length)
    return Side(name, model, tokenizer, extractor, name)


@pytest.fixture(scope="module")
def sides(llama, tokenizer, word_tokenizer):
    return {
        "source": loaded_side("source", llama, tokenizer, max_length=25),
        "target": loaded_side("target", tiny_model("gpt2", seed=1, n_embd=48), word_tokenizer),
    }


@pytest.fixture
def worker(llama, tokenizer):
    source = loaded_side("source", tiny_model("gpt2", n_embd=48), tokenizer)
    return Worker({"source": source, "target": loaded_side("target", llama, tokenizer)})


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(len(ROWS), 1, D_MODEL, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loads(monkeypatch):
    """The sources that were loaded, in order."""
    loaded = []

    @functools.wraps(load_model)
    def noting(source, *options):
        loaded.append(source)
        return load_model(source, *options)

    monkeypatch.setattr(workers, "load_model", noting)
    return loaded


def settings_of(model_folders, **options):
    return {
        name: SideSettings(name, folder, device="cpu", **options) for name, folder in model_folders.items()
    }


class Arithmetic:
    """Stands in for a worker."""

    def __init__(self):
        self.asked = []

    def power(self, base, exponent):
        self.asked.append(base)
        return base**exponent


def test_local_executor_yields_results_in_order_with_their_index():
    executor = LocalExecutor(Arithmetic())
    assert list(executor.run("power", [(3, 2), (2, 3), (5, 1)])) == [(0, 9), (1, 8), (2, 5)]
    assert list(executor.run("power", [])) == []
    executor.close()


def test_local_executor_runs_a_chunk_when_its_result_is_asked_for():
    executor = LocalExecutor(Arithmetic())
    results = executor.run("power", [(3, 2), (2, 3)])
    assert next(results) == (0, 9)
    assert executor.worker.asked == [3]


def test_local_executor_raises_what_the_worker_raises():
    executor = LocalExecutor(Arithmetic())
    with pytest.raises(ZeroDivisionError):
        list(executor.run("power", [(0, -1)]))


def test_a_side_is_loaded_when_first_used_and_then_kept(model_folders, loads):
    worker = Worker(settings_of(model_folders))
    assert loads == []
    first = worker.side("source")
    assert loads == [model_folders["source"]]
    assert worker.side("source") is first
    worker.perplexities({"source": ["Then"]}, [" it rains"], 4)
    assert loads == [model_folders["source"]]
    worker.pairs(TEXTS[:2], PAIRS, document_folds(TEXTS, PAIRS))
    assert loads == [model_folders["source"], model_folders["target"]]


def test_writing_loads_the_target_alone(model_folders, loads):
    worker = Worker(settings_of(model_folders))
    worker.write(ROWS[:1], torch.zeros(1, 1, 48), WRITING)
    assert loads == [model_folders["target"]]


def test_a_worker_leaves_the_settings_that_it_was_given(model_folders):
    settings = settings_of(model_folders)
    Worker(settings).side("source")
    assert all(isinstance(side, SideSettings) for side in settings.values())


@pytest.mark.parametrize("name", ["source", "target"])
def test_side_settings_load_what_load_model_loads(model_folders, name):
    side = settings_of(model_folders, batch_size=3)[name].load()
    model, tokenizer = load_model(model_folders[name], device="cpu")
    tokens = torch.tensor([[256, 10, 20]])
    with torch.inference_mode():
        assert torch.equal(side.model(tokens).logits, model(tokens).logits)
    assert side.name == name
    assert side.fingerprint == model_fingerprint(model, tokenizer)
    assert side.extractor.model is side.model
    assert side.extractor.batch_size == 3
    assert side.tokenizer("Naïve").input_ids == tokenizer("Naïve").input_ids


@pytest.mark.parametrize(("layer_idx", "expected"), [(None, N_LAYERS // 2), (0, 0), (3, 3)])
def test_the_extractor_reads_the_stated_block_or_the_middle_one(model_folders, layer_idx, expected):
    side = SideSettings("source", model_folders["source"], device="cpu", layer_idx=layer_idx).load()
    assert side.extractor.layer_idx == expected


def test_a_block_path_is_used_and_changes_the_fingerprint(model_folders):
    plain, named = (
        SideSettings("source", model_folders["source"], device="cpu", block_path=path).load()
        for path in (None, "model.layers")
    )
    assert named.extractor.block_path == "model.layers"
    assert plain.fingerprint != named.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_idx": 9}, r"layer_idx 9 .*\(0 to 3\)"),
        ({"block_path": "lm_head"}, "is a Linear"),
        ({"dtype": "int8"}, "'int8' is unknown"),
        ({"model_name": "absent.gguf"}, "no such GGUF file"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(model_folders, options, message):
    with pytest.raises(InputError, match=message):
        SideSettings(
            **{"name": "source", "model_name": model_folders["source"], "device": "cpu", **options}
        ).load()


def test_settings_survive_pickling(model_folders):
    device_map = {"model.layers.0": "cpu", "": 0}
    given = [*settings_of(model_folders, device_map=device_map, block_path="model.layers").values(), WRITING]
    assert pickle.loads(pickle.dumps(given)) == given


def test_a_worker_of_pickled_settings_writes_the_same(model_folders):
    settings = settings_of(model_folders)
    vectors = torch.randn(len(ROWS), 1, 48)
    written = [
        Worker(sides).write(ROWS, vectors, WRITING)
        for sides in (settings, pickle.loads(pickle.dumps(settings)))
    ]
    assert written[0] == written[1]


def pairs_in_chunks(sides, size, positions="aligned"):
    settings = replace(PAIRS, positions=positions)
    fold_of = document_folds(TEXTS, settings)
    chunks = [(TEXTS[start : start + size], settings, fold_of) for start in range(0, len(TEXTS), size)]
    return merge_pairs(part for _, part in LocalExecutor(Worker(sides)).run("pairs", chunks))


@pytest.mark.parametrize("positions", ["aligned", "last"])
@pytest.mark.parametrize("size", [1, 7, 29])
def test_pairs_in_chunks_equal_those_in_one(sides, size, positions):
    """With a size of 1, chunks without a pair are among them."""
    whole, merged = (pairs_in_chunks(sides, n, positions) for n in (len(TEXTS), size))
    assert torch.equal(merged.text_idx, whole.text_idx)
    assert torch.equal(merged.end, whole.end)
    assert merged.report() == whole.report()
    assert whole.n_truncated["source"] > 0
    for pair, expected in whole.statistics.items():
        found = merged.statistics[pair]
        assert torch.equal(found.n, expected.n)
        assert (found.n_groups, found.fold_of) == (expected.n_groups, expected.fold_of)
        assert torch.equal(found.sample.folds, expected.sample.folds)
        assert torch.allclose(found.sample.H_target, expected.sample.H_target, rtol=0, atol=1e-5)


def test_sums_in_chunks_equal_those_in_one_in_float64(sides):
    """Of texts that are read one at a time: a batch of another size rounds activations otherwise."""
    one_by_one = {
        name: Side(
            name,
            side.model,
            side.tokenizer,
            ActivationExtractor(side.model, side.tokenizer, 1, batch_size=1),
            name,
        )
        for name, side in sides.items()
    }
    whole, merged = (pairs_in_chunks(one_by_one, n) for n in (len(TEXTS), 7))
    for pair, expected in whole.statistics.items():
        found = merged.statistics[pair].total()
        for name in ("gram", "cross", "target_gram", "source_mean", "target_mean"):
            value, reference = getattr(found, name), getattr(expected.total(), name)
            assert value.dtype == torch.float64
            assert (value - reference).abs().max() < 1e-9 * reference.abs().max(), name


@pytest.mark.parametrize("size", [1, 3, 5])
def test_text_in_chunks_equals_text_in_one(worker, vectors, size):
    whole, ended, n_tokens = worker.write(ROWS, vectors, WRITING)
    chunks = [
        (ROWS[start : start + size], vectors[start : start + size], WRITING)
        for start in range(0, len(ROWS), size)
    ]
    parts = [part for _, part in LocalExecutor(worker).run("write", chunks)]
    assert [text for texts, _, _ in parts for text in texts] == whole
    assert [has_ended for _, of_part, _ in parts for has_ended in of_part] == ended
    assert sum(n for _, _, n in parts) == n_tokens


@pytest.mark.parametrize("steer_positions", ["all", "response"])
@pytest.mark.parametrize(("alpha_unit", "scale"), [("absolute", 1.0), ("residual_norm", 2.5)])
def test_rows_are_written_as_registered_steering_writes_them(
    worker, llama, tokenizer, vectors, alpha_unit, scale, steer_positions
):
    settings = WritingSettings((2,), 8, 0.9, 40, 0.95, alpha_unit, (2.5,), steer_positions, batch_size=3)
    texts, _, n_tokens = worker.write(ROWS, vectors, settings)
    with SteeredGenerator(llama, tokenizer, steer_positions=steer_positions) as generator:
        for row, (vector,), text in zip(ROWS, vectors, texts, strict=True):
            generator.register_steering(2, vector, scale * (row["alpha"] or 0.0))
            assert generator.generate(row["prompt"], 8, 0.9, 40, 0.95, row["seed"]) == text
        assert generator.n_tokens == n_tokens
    assert texts[0] == texts[1] != texts[3]


def test_the_generator_of_equal_settings_is_kept_with_its_batch_size(tokenizer, vectors, caplog):
    model = tiny_model()
    forward, sizes = model.forward, []

    @functools.wraps(forward)
    def small(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise MemoryError
        return forward(input_ids=input_ids, **options)

    side = loaded_side("target", model, tokenizer)
    worker = Worker({"target": side})
    expected = worker.write(
        ROWS, vectors, WritingSettings((1,), 8, 1.0, 50, 1.0, "absolute", (1.0,), "all", 2)
    )
    model.forward = small
    assert worker.write(ROWS, vectors, WRITING) == expected
    assert max(sizes) == 3  # of a batch of 4, whose two unsteered rows pass their prompt once
    sizes.clear()
    again = WritingSettings(**vars(WRITING))
    assert worker.write(ROWS, vectors, again) == expected
    assert max(sizes) == 2
    assert len(caplog.records) == 1


def test_other_settings_have_a_generator_of_their_own(worker, vectors):
    first = worker.write(ROWS, vectors, WRITING)
    for name, value in (("temperature", 0.0), ("layers", (3,)), ("steer_positions", "response")):
        assert worker.write(ROWS, vectors, WritingSettings(**{**vars(WRITING), name: value})) != first
    assert worker.write(ROWS, vectors, WRITING) == first


@pytest.mark.parametrize("scorers", [[], ["target"], ["source", "target"], ["target", "source"]])
def test_perplexities_are_those_of_the_named_sides(worker, scorers):
    prompts, outputs = ["Then", "The sea is", "He"], [" it rains", " blue", ""]
    found = worker.perplexities(dict.fromkeys(scorers, prompts), outputs, 2)
    assert list(found) == scorers
    for name in scorers:
        side = worker.side(name)
        assert found[name] == continuation_perplexities(side.model, side.tokenizer, prompts, outputs, 2)
    assert len({values[0] for values in found.values()}) == len(scorers)


def test_perplexities_in_chunks_equal_those_in_one(worker):
    prompts, outputs = ["Then", "The sea is", "Rain"], [" it rains", " blue", " falls on"]
    executor = LocalExecutor(worker)
    ((_, whole),) = executor.run("perplexities", [({"source": prompts}, outputs, 4)])
    chunks = [({"source": [prompt]}, [output], 4) for prompt, output in zip(prompts, outputs, strict=True)]
    apart = [found["source"][0] for _, found in executor.run("perplexities", chunks)]
    assert apart == pytest.approx(whole["source"], rel=1e-5)


def test_a_worker_refuses_a_model_that_is_not_the_expected_one(model_folders):
    (settings, _) = settings_of(model_folders).values()
    side = settings.load()
    assert replace(settings, expected_fingerprint=side.fingerprint).load().fingerprint == side.fingerprint
    for change in ({"dtype": "bfloat16"}, {"model_name": model_folders["target"]}):
        other = replace(settings, expected_fingerprint=side.fingerprint, **change)
        with pytest.raises(InputError, match="differs between the machines"):
            other.load()

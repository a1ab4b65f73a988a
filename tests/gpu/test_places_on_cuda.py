"""Each model has a place of its own, by CUDA's rules; what does not fit there is one line."""

import pytest
import torch
from fake_cuda import fake_cuda
from transformers import AutoModelForCausalLM

import model_loading
from experiment.config import load_config
from experiment.executor import GenerationSettings, Worker
from experiment.inputs import load_inputs
from experiment.models import load_side
from model_loading import load_model, weight_bytes
from support.errors import InputError
from support.tiny_models import tiny_model

ROWS = [{"prompt": "The sea", "seed": seed, "alpha": None} for seed in range(3)]
WRITES = GenerationSettings((), 4, 1.0, 50, 1.0, "absolute", (), "all", batch_size=4)


@pytest.fixture
def config(model_folders):
    """Takes what is said of source and target beside their names."""

    def config(source, target, **changes):
        given = {"source": source, "target": target}
        models = {f"{side}_model": {"name": model_folders[side], **given[side]} for side in given}
        return load_config({**models, "output_dir": "x", "layer_idx": 1, **changes})

    return config


def worker_of(config):
    return Worker({side: load_side(config, side) for side in ("source", "target")})


def devices(side):
    return {str(weights.device) for weights in side.model.parameters()}


def used(worker):
    prompts = {side: ["The sea"] for side in ("source", "target")}
    texts = worker.generate(ROWS, torch.zeros(3, 0, 1), WRITES)
    return texts, worker.perplexities(prompts, [" is wide."], 4)


def test_each_model_is_where_its_object_says_and_gives_what_it_gives_on_the_cpu(config):
    expected = used(worker_of(config({}, {}, device="cpu")))
    with fake_cuda(2):
        worker = worker_of(
            config({"device": "cuda:1", "dtype": "float32"}, {}, device="cuda", dtype="bfloat16")
        )
        sides = [worker.side(name) for name in ("source", "target")]
        assert [devices(side) for side in sides] == [{"cuda:1"}, {"cuda:0"}]
        assert [side.model.dtype for side in sides] == [torch.float32, torch.bfloat16]
        worker = worker_of(config({}, {"device": "cuda:1"}, device="cuda:0", dtype="float32"))
        texts, perplexities = used(worker)
    assert texts == expected[0]
    for side, values in expected[1].items():
        assert perplexities[side] == pytest.approx(values, rel=1e-4)


def test_a_source_rests_in_host_memory_while_the_target_writes(config):
    with fake_cuda():
        plain = used(worker_of(config({}, {}, dtype="float32")))
        worker = worker_of(config({"offload": True}, {}, dtype="float32"))
        source = worker.side("source")
        assert devices(source) == {"cuda:0"}
        for _ in range(2):
            texts = worker.generate(ROWS, torch.zeros(3, 0, 1), WRITES)
            assert {str(weights.device) for weights in source.extractor.blocks.parameters()} == {"cpu"}
            assert str(source.model.device) == "cuda:0"
            assert (
                worker.perplexities({"source": ["The sea"]}, [" is wide."], 4)["source"] == plain[1]["source"]
            )
            assert devices(source) == {"cuda:0"}
    assert texts == plain[0]


def test_weights_are_loaded_onto_the_card(model_folders, monkeypatch):
    given, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **how: given.append(how) or load(*args, **how)
    )
    with fake_cuda(2):
        model, _ = load_model(model_folders["target"], "cuda:1")
        assert given[0]["device_map"] == {"": torch.device("cuda:1")}
        assert {str(weights.device) for weights in model.parameters()} == {"cuda:1"}


def test_a_model_that_fits_no_card_is_a_line_with_bytes_and_what_would_fit(model_folders, monkeypatch):
    model = tiny_model("llama")
    n_all = sum(weights.numel() for weights in model.parameters())
    assert weight_bytes(model, torch.bfloat16) == 2 * n_all
    n_packed = 2 * (n_all - weight_bytes(model, torch.bfloat16, "8bit") // 2)
    assert weight_bytes(model, torch.bfloat16, "4bit") == 2 * n_all - 1.5 * n_packed
    small = 2 * n_all - 1
    with fake_cuda():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (small, 2 * small))
        with pytest.raises(InputError) as caught:
            load_model(model_folders["source"], "cuda", "bfloat16")
    text = str(caught.value)
    assert f"has {2 * n_all:,} bytes of weights" in text
    assert f"cuda has {small:,} of {2 * small:,} free" in text
    assert f'"quantization": "8bit" ({weight_bytes(model, torch.bfloat16, "8bit"):,} bytes)' in text
    assert '"dtype": "bfloat16"' not in text
    assert text.count("\n") == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "cuda:2"}, r"device 'cuda:2' cannot be used .* choose 'cuda:0' to 'cuda:1', 'auto' or"),
        ({"quantization": "8bit", "offload": True}, "offload moves whole blocks"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(config, given, message):
    with fake_cuda(2), pytest.raises(InputError, match=message):
        load_inputs(config(given, {}))


def test_quantised_products_are_not_in_float32(model_folders, monkeypatch):
    monkeypatch.setattr(model_loading, "is_bitsandbytes_available", lambda: True)
    with fake_cuda(), pytest.raises(InputError, match="'8bit' multiplies in 16 bits, but dtype is float32"):
        load_model(model_folders["source"], "cuda", "float32", quantization="8bit")


def test_scoring_in_another_dtype_copies_nothing_on_a_card(config):
    with fake_cuda():
        worker = worker_of(config({}, {}, dtype="bfloat16"))
        own, other = (
            worker.perplexities({"target": ["Then"]}, [" it"], 2, name) for name in (None, "float32")
        )
    assert own == other
    assert not worker._copies

"""By CUDA's rules, all architectures extract, map, steer and score as they do on the CPU, and rarely wait."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from chat_models import chatting
from fake_cuda import fake_cuda

import steered_generation
from activation_extractor import ActivationExtractor, paired_activations
from decoding import loop, row_sampler, steering_hooks
from decoding.loop import STEPS_BETWEEN_READS
from evaluation import continuation_perplexities
from judging import local_judge
from judging.local_judge import LocalJudge
from model_loading import decoder_blocks
from ridge_mapping import RidgeMapping
from scoring import encoders
from scoring.encoders import Probed, StateReader, as_encode
from steered_generation import SteeredGenerator
from support.tiny_models import ARCHITECTURES, D_MODEL, tiny_model, tiny_tokenizer

PROMPTS = ["Once upon a", "The sea", "The sea", "A rather longer prompt"]
TEXTS = ["The sea is wide.", "Rain falls.", "A long text about nothing at all.", "Yes."]
SAMPLING = {"top_k": {}, "top_p": {"top_k": 0, "top_p": 0.9}, "greedy": {"temperature": 0}}
# transformers' code of these waits by itself, that often in each block: it makes constants on the host, or
# repeats the entries of a table.
MODEL_WAITS = {"gptj": 4, "falcon": 2, "gpt_neo": 1}
MOST_WAITS = 1 / 4  # a token
N_TOKENS = STEPS_BETWEEN_READS + 2


@pytest.fixture
def endless(monkeypatch):
    """No token ends a text."""
    monkeypatch.setattr(steered_generation, "end_tokens", lambda *args: set())


def transfer(source, target, **options):
    """Extract, map, score, and steer the target in rows with vectors of their own. Return what that gives."""
    tokenizer = tiny_tokenizer()
    sides = [ActivationExtractor(model, tokenizer, 1) for model in (source, target)]
    (batch,) = paired_activations(*sides, [f"Text {n} of {n * n}." for n in range(12)])
    mapping = RidgeMapping(D_MODEL, D_MODEL)
    mapping.cross_validate(batch.H_source[1], batch.H_target[1], [1.0, 10.0], 3, batch.text_idx)
    native = sides[0].extract_batch(TEXTS, "mean")
    vectors = mapping.transform(native - native.mean(0))
    perplexities = continuation_perplexities(target, tokenizer, PROMPTS, [" and more."] * 4, 2)
    rows = {"steering_vectors": {1: vectors, 2: -vectors}, "alphas": [5.0, 0.0, 5.0, 9.0]}
    with SteeredGenerator(target, tokenizer, batch_size=4) as generator:
        texts = generator.generate_batch(PROMPTS, N_TOKENS, seeds=[1, 2, 3, 4], **rows, **options)
    return SimpleNamespace(numbers=[mapping.W, native, vectors, torch.tensor(perplexities)], texts=texts)


def assert_equal(found, expected):
    assert found.texts == expected.texts
    for here, there in zip(found.numbers, expected.numbers, strict=True):
        assert here.device.type == "cpu"
        assert torch.allclose(here.double(), there.double(), rtol=1e-4, atol=1e-4)


def check_transfer(name, devices=("cuda:0", "cuda:1"), **options):
    """Compare with the CPU, and count the waits from one reading of tokens to the next."""
    expected, counts = transfer(tiny_model("llama"), tiny_model(name, seed=1), **options), []
    with fake_cuda(2) as device:
        source, target = tiny_model("llama").to(devices[0]), tiny_model(name, seed=1).to(devices[1])
        target.register_forward_pre_hook(lambda *args: counts.append(device.n_waits()))
        assert_equal(transfer(source, target, **options), expected)
    n_waits = (counts[-1] - counts[-1 - STEPS_BETWEEN_READS]) / STEPS_BETWEEN_READS
    own = MODEL_WAITS.get(name, 0) * len(decoder_blocks(target))
    # Without a limit of k, it is read at each step whether any row needs more of the vocabulary.
    assert 0 < n_waits - own <= MOST_WAITS + (options.get("top_k") == 0), device.waits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_source_and_target_on_a_device_each_give_what_the_cpu_gives_and_the_host_rarely_waits(name, endless):
    check_transfer(name)


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_one_device_writes_the_texts_of_the_cpu_with_all_sampling(options, endless):
    check_transfer("qwen2", ("cuda", "cuda"), **options)


def test_rows_that_end_and_prompts_of_one_length_change_nothing():
    """They leave the batch, and without padding there is no mask."""
    options = {"max_new_tokens": 20, "seeds": list(range(16)), "temperature": 2.0, "top_k": 0}

    def write(model):
        with SteeredGenerator(model, tiny_tokenizer()) as generator:
            generator.register_steering(3, model.lm_head.weight.detach()[257].cpu(), 0.4)
            mixed = generator.generate_batch(["Once upon a", "The sea"] * 8, **options)
            return mixed + generator.generate_batch(["The sea", "Up high"] * 8, **options)

    expected = write(tiny_model())
    n_tokens = [each.n_tokens for each in expected]
    assert min(n_tokens) < STEPS_BETWEEN_READS < max(n_tokens)
    with fake_cuda():
        assert write(tiny_model().to("cuda")) == expected


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_model_may_lie_on_two_devices(name, endless):
    expected = transfer(tiny_model("llama"), tiny_model(name, seed=1))
    with fake_cuda(2):
        assert_equal(transfer(tiny_model("llama").to("cuda"), sharded(name)), expected)


def sharded(name):
    """Return a model whose later blocks are on cuda:1."""
    model = tiny_model(name, seed=1)
    blocks = decoder_blocks(model)
    path = next(path for path, module in model.named_modules() if module is blocks)
    places = {f"{path}.{index}": int(index > 1) for index in range(len(blocks))}
    above = path.rpartition(".")[0]
    places |= {f"{above}.{child}": 0 for child, _ in model.get_submodule(above).named_children()}
    del places[path]
    places |= {child: 0 for child, _ in model.named_children() if child != above}
    return dispatch_model(model, places)


# Scorers


def features(device):
    """Return what a reader of a language model's states makes of texts."""
    torch.manual_seed(0)
    model, tokenizer = tiny_model().to(device), tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "load_model", lambda *args: (model, tokenizer))
        patch.setitem(encoders.LANGUAGE_MODELS, "tiny", Probed(("llama", D_MODEL, 4), (0, 2)))
        return torch.from_numpy(as_encode(StateReader("tiny").eval().to(device))(TEXTS))


def judged(device):
    """Return the scores of a judge that is loaded here."""
    loaded = tiny_model().to(device), chatting("{{ messages[0].content }}<eos>A: ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_judge, "load_model", lambda *args, **options: loaded)
        judge = LocalJudge("tiny", batch_size=2)
    return torch.tensor([judgement.score for judgement in judge.judge(TEXTS)])


@pytest.mark.parametrize("score", [features, judged])
def test_scorers_give_the_scores_of_the_cpu(score):
    expected = score("cpu")
    with fake_cuda():
        assert torch.allclose(score("cuda"), expected, atol=1e-5)


# What these tests are for


def break_copy(monkeypatch, owner, name, old, new):
    """Replace a function or class of a module by a copy in whose source `old` is `new`."""
    source = inspect.getsource(getattr(owner, name))
    assert source.count(old) == 1, f"{name} no longer has {old!r}"
    made = {}
    exec(source.replace(old, new), vars(owner), made)
    monkeypatch.setattr(owner, name, made[name])


def test_an_index_without_a_device_is_noticed(endless, monkeypatch):
    break_copy(
        monkeypatch,
        row_sampler,
        "_largest_of_blocks",
        "torch.arange(BLOCK, device=device)",
        "torch.arange(BLOCK)",
    )
    logits = torch.randn(2, 9_000)
    sampler = row_sampler.RowSampler(top_k=3)
    with fake_cuda(), pytest.raises(RuntimeError, match="at least two devices, cpu, cuda:0"):
        sampler.choose(logits.to("cuda").T.contiguous().T, torch.rand(2))


def test_rows_that_are_numbered_on_the_host_are_noticed(endless, monkeypatch):
    """CUDA allows such an index, and copies it at each step."""
    break_copy(monkeypatch, loop, "decode", "len(prompts), device=model.device", "len(prompts)")
    monkeypatch.setattr(steered_generation, "decode", loop.decode)
    with pytest.raises(AssertionError, match=r"host to device', 'steered_generation"):
        check_transfer("llama")


def test_vectors_that_are_left_on_the_host_are_noticed(endless, monkeypatch):
    """They are copied at each step, since a sharded model has them on two devices."""
    break_copy(
        monkeypatch,
        steering_hooks,
        "RowSteering",
        "self.added = self.current = added",
        "self.added = self.current = added.cpu()",
    )
    monkeypatch.setattr(steered_generation, "RowSteering", steering_hooks.RowSteering)
    with pytest.raises(AssertionError, match=r"host to device', 'decoding/steering_hooks"):
        check_transfer("llama")


def test_a_judges_prompt_that_is_left_on_the_host_is_noticed(monkeypatch):
    break_copy(
        monkeypatch, local_judge, "LocalJudge", '"right", self.model.device', '"right", torch.device("cpu")'
    )
    monkeypatch.setitem(globals(), "LocalJudge", local_judge.LocalJudge)
    with fake_cuda(), pytest.raises(RuntimeError, match="at least two devices, cpu, cuda:0"):
        judged("cuda")

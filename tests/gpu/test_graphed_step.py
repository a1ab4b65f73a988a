"""A step that is repeated as a graph writes what the loop writes, waits for nothing, and is checked first."""

import inspect

import pytest
import torch
from fake_cuda import fake_cuda

import steered_generation
from decoding import graphed_step, loop
from decoding.loop import STEPS_BETWEEN_READS, check_cuda_graphs, decode
from decoding.row_sampler import RowSampler
from steered_generation import SteeredGenerator
from support.errors import InputError
from support.tiny_models import ARCHITECTURES, D_MODEL, VOCAB_SIZE, tiny_model, tiny_tokenizer

# transformers' code of these makes constants on the host at each step, which waits for the device.
WAITING = {"gpt_neo", "gptj", "falcon", "mpt"}
GRAPHED = [name for name in ARCHITECTURES if name not in WAITING]
PROMPTS = ["Once upon a", "The sea", "The sea", "A rather longer prompt"]
SAMPLING = {"top_k": {}, "top_p": {"top_k": 0, "top_p": 0.9}, "greedy": {"temperature": 0}}
N_TOKENS = 2 * STEPS_BETWEEN_READS + 2
END = VOCAB_SIZE - 1


def write(model, n_tokens=N_TOKENS, cuda_graphs=False, at="all", **options):
    """Write rows with vectors of their own in two blocks, and one more vector for all of them."""
    vectors = torch.arange(4 * D_MODEL).view(4, D_MODEL).float().cos()
    rows = {"steering_vectors": {1: vectors, 2: -vectors}, "alphas": [5.0, 0.0, 5.0, 9.0]}
    options = {"seeds": [1, 2, 3, 4], **rows, **options}
    with SteeredGenerator(model, tiny_tokenizer(), steer_positions=at, cuda_graphs=cuda_graphs) as generator:
        generator.register_steering(0, vectors[1], 0.5)
        return generator.generate_batch(PROMPTS, n_tokens, **options)


@pytest.fixture
def endless(monkeypatch):
    """No token ends a text."""
    monkeypatch.setattr(steered_generation, "end_tokens", lambda *args: set())


@pytest.mark.parametrize("name", GRAPHED)
def test_graphs_write_the_texts_of_the_cpu_wait_once_in_eight_tokens_and_are_launched_at_once(
    name, endless, monkeypatch
):
    expected, choose, counts = write(tiny_model(name)), RowSampler.choose, []
    with fake_cuda() as device:
        model = tiny_model(name).to("cuda")

        def counted(*args):
            counts.append((device.n_waits(), device.n_launches))
            return choose(*args)

        monkeypatch.setattr(RowSampler, "choose", counted)
        assert write(model, cuda_graphs=True) == expected
    n_waits, n_launches = (
        now - before for before, now in zip(counts[-1 - STEPS_BETWEEN_READS], counts[-1], strict=True)
    )
    assert n_waits == 1
    assert n_launches < 45 * STEPS_BETWEEN_READS  # nearly all to choose tokens


@pytest.mark.parametrize("at", ["all", "response"])
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_graphs_write_the_texts_of_the_cpu_with_all_sampling(options, at, endless):
    expected = write(tiny_model("qwen2"), at=at, **options)
    with fake_cuda():
        assert write(tiny_model("qwen2").to("cuda"), cuda_graphs=True, at=at, **options) == expected


@pytest.mark.parametrize("window", [8, 64])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mistral"])
def test_a_sliding_window_is_respected(name, window, endless):
    expected = write(tiny_model(name, sliding_window=window))
    with fake_cuda():
        assert write(tiny_model(name, sliding_window=window).to("cuda"), cuda_graphs=True) == expected


def test_rows_leave_once_half_of_them_have_ended_and_the_others_go_on_in_a_graph_of_their_own():
    def choose(logits, rows, step):
        ended = (rows % 4 < step // STEPS_BETWEEN_READS) & (rows > 0)
        return torch.where(ended, END, logits[:, :END].argmax(-1))

    prompts, n_tokens, changes = [[256, 5, row] for row in range(12)], 6 * STEPS_BETWEEN_READS, []
    expected = decode(tiny_model(), prompts, choose, n_tokens, {END})
    with fake_cuda():
        model, note = tiny_model().to("cuda"), lambda rows: changes.append(rows.tolist())
        found = decode(model, prompts, choose, n_tokens, {END}, on_rows_change=note, cuda_graphs=True)
    assert found == expected
    assert changes == [[0, 3, 7, 11], [0]]


@pytest.mark.parametrize("name", sorted(WAITING))
def test_a_model_whose_step_waits_is_rejected_before_anything_is_written(name):
    with (
        fake_cuda(),
        pytest.raises(InputError, match=r"cannot be recorded .*capturing.*; set cuda_graphs to"),
    ):
        write(tiny_model(name).to("cuda"), cuda_graphs=True)


def test_a_model_that_is_not_on_one_gpu_is_rejected():
    with pytest.raises(InputError, match="all of a model on one GPU, not on cpu; set cuda_graphs to false"):
        SteeredGenerator(tiny_model(), tiny_tokenizer(), cuda_graphs=True)
    with fake_cuda(2):
        model = tiny_model().to("cuda:0")
        model.lm_head.to("cuda:1")
        with pytest.raises(InputError, match="on one GPU, not on cuda:0 and cuda:1"):
            SteeredGenerator(model, tiny_tokenizer(), cuda_graphs=True)


# What is broken -> a line of the step, and the same with a value that the graph keeps.
BROKEN = {
    "position": ("self.positions += 1", "self.positions = self.positions + 1"),
    "mask": (
        "self.mask.index_fill_(1, self.length, 1)",
        "self.mask = self.mask.index_fill(1, self.length, 1)",
    ),
    "token": (
        "self.tokens.copy_(chosen[:, None].clamp(min=0))",
        "self.tokens = chosen[:, None].clamp(min=0)",
    ),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_graph_that_gives_other_logits_is_noticed(broken, monkeypatch):
    source = inspect.getsource(graphed_step.GraphedStep)
    assert source.count(broken[0]) == 1
    made = {}
    exec(source.replace(*broken), vars(graphed_step), made)
    monkeypatch.setattr(loop, "GraphedStep", made["GraphedStep"])
    with fake_cuda(), pytest.raises(InputError, match="other logits when it is repeated as a graph"):
        check_cuda_graphs(tiny_model().to("cuda"), 258)

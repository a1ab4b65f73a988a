"""A narrowed head gives the logits of the selected places, and leaves the model as it was."""

from contextlib import suppress

import pytest
import torch
from pairwise import every_pair
from torch import nn

from decoding import output_head
from decoding.output_head import narrowed_head, token_log_likelihoods, total_weight
from support.tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

TOKENS = torch.tensor([[256, 10, 20, 30, 40], [256, 9, 8, 7, 6], [256, 1, 1, 2, 3]])
LAYOUTS = {"rows": lambda logits: logits, "columns": lambda logits: logits.T.contiguous().T}


class OwnLinear(nn.Linear):
    """A head with a product of its own, as quantised layers have."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def with_own_head():
    model = tiny_model()
    model.lm_head.__class__ = OwnLinear
    return model


def with_bias():
    model = tiny_model()
    model.lm_head.bias = nn.Parameter(5 * torch.randn(VOCAB_SIZE))
    return model


MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in ARCHITECTURES},
    "bias": with_bias,
    "low soft cap": lambda: tiny_model("gemma2", final_logit_softcapping=0.5),
    "tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "head of its own class": with_own_head,
    "bfloat16": lambda: with_bias().to(torch.bfloat16),
    "float16": lambda: with_bias().to(torch.float16),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.inference_mode()
def logits_of(model, tokens=TOKENS):
    return model(tokens).logits.clone()


MASK = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()
SELECTIONS = {
    "a mask, in its order": lambda hidden: hidden[MASK][None],
    "last": lambda hidden: hidden[:, -1:],
    "first two": lambda hidden: hidden[:, :2],
    "all": lambda hidden: hidden,
    "one row": lambda hidden: hidden[1:2],
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selected_places_have_the_logits_of_a_whole_pass(model, selection):
    select, whole = SELECTIONS[selection], logits_of(model)
    with narrowed_head(model, select):
        found = logits_of(model)
    tolerance = 1e-5 if whole.dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, select(whole), rtol=tolerance, atol=tolerance)


def test_the_head_is_restored_even_when_the_body_raises(model):
    head, before = model.get_output_embeddings(), logits_of(model)
    own = dict(vars(head))
    with suppress(KeyError), narrowed_head(model, lambda hidden: hidden[:, -1:]):
        logits_of(model)
        raise KeyError
    assert vars(head) == own
    assert torch.equal(logits_of(model), before)


def test_a_forward_that_the_head_had_is_used_and_put_back():
    """A head whose weights are loaded on demand has one."""
    model = tiny_model()
    whole, plain = logits_of(model), model.lm_head.forward
    model.lm_head._hf_hook = object()
    model.lm_head.forward = replacement = lambda hidden: 3 * plain(hidden)
    with narrowed_head(model, lambda hidden: hidden[:, -1:]):
        assert torch.allclose(logits_of(model), 3 * whole[:, -1:], atol=1e-5)
    assert model.lm_head.forward is replacement
    assert torch.allclose(logits_of(model), 3 * whole, atol=1e-5)


def test_a_model_without_a_head_of_its_own_gives_all_logits(llama):
    model = tiny_model()
    model.get_output_embeddings = lambda: None
    with narrowed_head(model, lambda hidden: pytest.fail("select was called")):
        assert torch.equal(logits_of(model), logits_of(llama))


def test_passes_of_different_sizes_do_not_disturb_each_other(llama):
    """The buffer of the logits is kept, and grows."""
    parts = [TOKENS[:n, :length] for n, length in ((1, 5), (3, 2), (2, 4), (3, 5))]
    with narrowed_head(llama, lambda hidden: hidden[:, -1:]):
        narrow = [logits_of(llama, tokens) for tokens in parts]
    for found, tokens in zip(narrow, parts, strict=True):
        assert torch.allclose(found, logits_of(llama, tokens)[:, -1:], atol=1e-5)


@torch.inference_mode()
def test_logits_on_the_cpu_have_contiguous_columns_in_one_buffer(llama):
    with narrowed_head(llama, lambda hidden: hidden[:, -1:]):
        first, second = llama(TOKENS).logits, llama(TOKENS).logits
    assert first[:, 0].T.is_contiguous()
    assert first.data_ptr() == second.data_ptr()


@pytest.fixture
def small_tiles(monkeypatch):
    """Parts of the vocabulary so small that these tests have several."""
    monkeypatch.setattr(output_head, "TILE", 9 * 64)


@pytest.mark.usefixtures("small_tiles")
@every_pair(
    size=[1, 7, 64, 65, 3_000],
    scale=[0.0, 3.0, 1e4],
    left_out=[slice(0), slice(60, 200)],  # tokens at minus infinity fill parts of the vocabulary
    layout=LAYOUTS,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_token_log_likelihoods_are_log_softmax_in_float64(size, scale, left_out, layout, dtype):
    logits, tokens = (scale * torch.randn(9, size)).clamp(-6e4, 6e4).to(dtype), torch.randint(size, (9,))
    logits[:, left_out] = float("-inf")
    tokens[logits[0, tokens].isinf()] = 0
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found = token_log_likelihoods(LAYOUTS[layout](logits), tokens)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@every_pair(scale=[1.0, 1e4], temperature=[1e-3, 0.7, 1.0, 100.0], layout=LAYOUTS)
def test_total_weight_is_the_sum_over_the_whole_vocabulary(scale, temperature, layout):
    logits = scale * torch.randn(9, 3_000)
    logits[2, 100:] = float("-inf")
    highest = logits.amax(1)
    expected = ((logits.double() - highest.double()[:, None]) / temperature).exp().sum(1)
    found = total_weight(LAYOUTS[layout](logits), highest, temperature)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)

"""A narrowed head gives the logits of the selected places, and leaves the model as it was."""

import pytest
import torch
from pairwise import every_pair
from torch import nn
from transformers import LlamaForCausalLM

from decoding import output_head
from decoding.output_head import (
    BLOCK,
    PART,
    ScreenedProduct,
    narrowed_head,
    token_log_likelihoods,
    total_weight,
)
from support.tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_model

TOKENS = torch.tensor([[256, 10, 20, 30, 40], [256, 9, 8, 7, 6], [256, 1, 1, 2, 3]])
LAYOUTS = {"rows": lambda logits: logits, "columns": lambda logits: logits.T.contiguous().T}


def with_head(head_class):
    """A tiny model whose head is of a class of its own, with the same weights."""
    model = tiny_model()
    head = head_class(*reversed(model.lm_head.weight.shape), bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    return model


class OwnLinear(nn.Linear):
    """As quantised layers are: what its product does is its own affair."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def with_bias():
    model = tiny_model()
    model.lm_head.bias = nn.Parameter(5 * torch.randn(VOCAB_SIZE))
    return model


MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in ARCHITECTURES},
    "bias": with_bias,
    "low soft cap": lambda: tiny_model("gemma2", final_logit_softcapping=0.5),
    "tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "head of its own class": lambda: with_head(OwnLinear),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.inference_mode()
def logits_of(model, tokens=TOKENS):
    return model(tokens).logits.clone()


SELECTIONS = {
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
    assert found.shape == select(whole).shape
    assert torch.allclose(found, select(whole), rtol=1e-5, atol=1e-5)


def test_places_selected_by_a_mask_come_in_its_order(model):
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]]).bool()
    whole = logits_of(model)
    with narrowed_head(model, lambda hidden: hidden[mask][None]):
        found = logits_of(model)
    assert torch.allclose(found, whole[mask][None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [None, KeyError("body")])
def test_the_head_is_restored_even_when_the_body_raises(model, error):
    head, before = model.get_output_embeddings(), logits_of(model)
    own = dict(vars(head))

    def narrow():
        with narrowed_head(model, lambda hidden: hidden[:, -1:]):
            logits_of(model)
            if error:
                raise error

    if error is None:
        narrow()
    else:
        with pytest.raises(KeyError, match="body"):
            narrow()
    assert vars(head) == own
    assert "forward" not in vars(head)
    assert torch.equal(logits_of(model), before)


def test_a_select_that_raises_leaves_the_head_restored(llama):
    before = logits_of(llama)
    with pytest.raises(IndexError), narrowed_head(llama, lambda hidden: hidden[:, 99]):
        logits_of(llama)
    assert torch.equal(logits_of(llama), before)


def test_a_forward_that_the_head_had_is_used_and_put_back():
    """As a head has whose weights are loaded on demand."""
    model = tiny_model()
    whole, plain = logits_of(model), model.lm_head.forward
    model.lm_head._hf_hook = object()
    model.lm_head.forward = replacement = lambda hidden: 3 * plain(hidden)
    with narrowed_head(model, lambda hidden: hidden[:, -1:]):
        assert torch.allclose(logits_of(model), 3 * whole[:, -1:], atol=1e-5)
    assert model.lm_head.forward is replacement
    assert torch.allclose(logits_of(model), 3 * whole, atol=1e-5)


def test_nested_narrowing_selects_of_what_was_selected(llama):
    whole = logits_of(llama)
    with narrowed_head(llama, lambda hidden: hidden[:, :3]):
        with narrowed_head(llama, lambda hidden: hidden[:, -1:]):
            assert logits_of(llama).shape == (3, 1, VOCAB_SIZE)
        assert torch.allclose(logits_of(llama), whole[:, :3], atol=1e-5)
    assert torch.equal(logits_of(llama), whole)


def test_a_model_without_a_head_of_its_own_gives_all_logits(llama):
    class Headless(LlamaForCausalLM):
        def get_output_embeddings(self):
            return None

    model = Headless(llama.config).eval()
    model.load_state_dict(llama.state_dict())

    def never(hidden):
        raise AssertionError("select was called")

    with narrowed_head(model, never):
        assert torch.equal(logits_of(model), logits_of(llama))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_logits_of_a_whole_pass(dtype):
    model = with_bias().to(dtype)
    whole = logits_of(model)
    with narrowed_head(model, lambda hidden: hidden[:, -1:]):
        last = logits_of(model)
    assert last.dtype == dtype
    assert torch.allclose(last.float(), whole[:, -1:].float(), rtol=0.02, atol=0.02)


def test_passes_of_different_sizes_do_not_disturb_each_other(llama):
    """The buffer of the logits is kept, and grows."""
    with narrowed_head(llama, lambda hidden: hidden[:, -1:]):
        narrow = [logits_of(llama, TOKENS[:n, :length]) for n, length in ((1, 5), (3, 2), (2, 4), (3, 5))]
    for found, (n, length) in zip(narrow, ((1, 5), (3, 2), (2, 4), (3, 5)), strict=True):
        assert torch.allclose(found, logits_of(llama, TOKENS[:n, :length])[:, -1:], atol=1e-5)


@torch.inference_mode()
def test_logits_on_the_cpu_have_contiguous_columns_in_one_buffer(llama):
    with narrowed_head(llama, lambda hidden: hidden[:, -1:]):
        first, second = llama(TOKENS).logits, llama(TOKENS).logits
    assert first[:, 0].T.is_contiguous()
    assert first.data_ptr() == second.data_ptr()


@pytest.fixture
def small_tiles(monkeypatch):
    """Parts of the vocabulary so small that these tests have several."""
    monkeypatch.setattr(output_head, "TILE", 9 * PART)


@pytest.mark.usefixtures("small_tiles")
@every_pair(size=[1, 7, PART, PART + 1, 20_000], scale=[0.0, 3.0, 1e4], layout=LAYOUTS)
def test_token_log_likelihoods_are_log_softmax_in_float64(size, scale, layout):
    logits, tokens = scale * torch.randn(9, size), torch.randint(size, (9,))
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found = token_log_likelihoods(LAYOUTS[layout](logits), tokens)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_log_likelihoods_of_half_precision_lose_nothing_more(dtype):
    logits, tokens = (5 * torch.randn(9, 20_000)).to(dtype), torch.randint(20_000, (9,))
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(token_log_likelihoods(logits, tokens), expected, rtol=1e-6, atol=1e-6)


def test_token_log_likelihoods_leave_out_tokens_at_minus_infinity(monkeypatch):
    """Also where a part of the vocabulary holds no other tokens."""
    monkeypatch.setattr(output_head, "TILE", 9 * 64)
    logits, tokens = torch.randn(9, 300), torch.randint(50, (9,))
    logits[:, 60:200] = float("-inf")
    expected = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(token_log_likelihoods(logits, tokens), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@every_pair(scale=[1.0, 1e4], temperature=[1e-3, 0.7, 1.0, 100.0], layout=LAYOUTS)
def test_total_weight_is_the_sum_over_the_whole_vocabulary(scale, temperature, layout):
    logits = scale * torch.randn(9, 20_000)
    logits[2, 100:] = float("-inf")
    highest = logits.amax(1)
    expected = ((logits.double() - highest.double()[:, None]) / temperature).exp().sum(1)
    found = total_weight(LAYOUTS[layout](logits), highest, temperature)
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)


def wrongly_rounded(size, d, generator):
    """Weights that bfloat16 rounds by almost half a step, up or down, of either sign."""
    numbers = 1 + 2**-7 * torch.tensor([0.49, 0.51])
    signs = torch.tensor([-1.0, 1.0])
    chosen = torch.randint(2, (2, size, d), generator=generator)
    return numbers[chosen[0]] * signs[chosen[1]]


def random_weights(size, d, generator):
    return torch.randn(size, d, generator=generator)


WEIGHTS = {
    "random_direction": random_weights,
    "norms that differ": lambda size, d, generator: (
        random_weights(size, d, generator) * torch.logspace(-2, 1, size)[:, None]
    ),
    "a massive dimension": lambda size, d, generator: (
        random_weights(size, d, generator) * torch.tensor([100.0] + [1.0] * (d - 1))
    ),
    "each token four times": lambda size, d, generator: random_weights(-(-size // 4), d, generator).repeat(
        4, 1
    )[:size],
    "nearly equal": lambda size, d, generator: 1 + 1e-4 * random_weights(size, d, generator),
    "rounded the wrong way": wrongly_rounded,
}
STATES = {
    "random_direction": random_weights,
    "large": lambda n, d, generator: 300 * random_weights(n, d, generator),
    "a massive dimension": WEIGHTS["a massive dimension"],
    "rounded the wrong way": wrongly_rounded,
    "all logits negative": lambda n, d, generator: -random_weights(n, d, generator).abs(),
}


@every_pair(weights=WEIGHTS, states=STATES, n=[1, 20, 64], size=[BLOCK * 200, BLOCK * 200 + 7])
def test_a_screened_product_has_the_n_largest_and_what_ties_with_them(weights, states, n, size):
    generator = torch.Generator().manual_seed(0)
    weight = WEIGHTS[weights](size, 48, generator)
    rows = STATES[states](6, 48, generator)
    product = ScreenedProduct()
    product.prepare(weight, n)
    logits = product(rows[None])[0]
    exact = rows.double() @ weight.double().T
    tokens = torch.arange(size) if product.tokens is None else product.tokens
    assert torch.equal(tokens, tokens.unique())
    assert torch.allclose(logits, (rows @ weight.T)[:, tokens], rtol=1e-4, atol=1e-5 * exact.abs().max())
    n_th = exact.topk(n).values[:, -1:]
    is_among = torch.isin(torch.arange(size), tokens)
    assert is_among[(exact >= n_th).any(0)].all()


def test_a_token_that_rounding_pushes_far_down_is_kept():
    """Every rounding lowers the largest logit, 0.06, and raises the second, 0.005."""
    step = 2**-8
    up, down = 1 + 1.01 * step, 1 + 0.99 * step
    state = torch.tensor([up, down] * 32 + [1.0])
    second = torch.tensor([up, -down] * 32 + [0.0])
    weight = torch.tensor([-0.5] * 64 + [0.0]).repeat(BLOCK * 8, 1)
    weight[0], weight[BLOCK] = second, torch.cat([-second[:-1], torch.tensor([2**-4])])
    product = ScreenedProduct()
    product.prepare(weight, 1)
    logits = product(state[None, None])[0, 0]
    assert (weight @ state).argmax() == BLOCK
    assert product.tokens[logits.argmax()] == BLOCK
    rough = weight.bfloat16().float() @ state.bfloat16().float()
    assert rough.argmax() == 0


def test_most_of_a_vocabulary_is_left_out():
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(20_000, 64, generator=generator), torch.randn(8, 64, generator=generator)
    product = ScreenedProduct()
    product.prepare(weight, 20)
    assert product(rows[None]).shape == (1, 8, len(product.tokens))
    assert 20 <= len(product.tokens) < 2_000


@every_pair(
    value=[0.0, torch.nan, torch.inf],
    where=[slice(None), slice(1, 2)],
    size=[BLOCK * 90, BLOCK * 90 + 3],
)
def test_rows_without_a_largest_logit_get_the_whole_vocabulary(value, where, size):
    """So that the sampler sees what it must refuse."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(3, 16, generator=generator), torch.randn(size, 16, generator=generator)
    rows[where] = value
    product = ScreenedProduct()
    product.prepare(weight, 10)
    logits = product(rows[None])[0]
    assert product.tokens is None
    assert torch.allclose(logits, rows @ weight.T, atol=1e-5, equal_nan=True)


def test_a_screened_product_follows_changed_weights_and_numbers_of_rows():
    generator = torch.Generator().manual_seed(0)
    product = ScreenedProduct()
    for n_rows, size, d in ((5, 6_000, 32), (9, 6_000, 32), (2, 9_000, 16), (9, 6_000, 32)):
        weight = torch.randn(size, d, generator=generator)
        product.prepare(weight, 8)
        for _ in range(2):
            rows = torch.randn(n_rows, d, generator=generator)
            logits = product(rows[None])[0]
            assert torch.allclose(logits, rows @ weight[product.tokens].T, atol=1e-4)
            assert torch.allclose(logits.topk(8).values, (rows @ weight.T).topk(8).values, atol=1e-4)


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """As if this CPU had it, and the tiny vocabulary were large."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(output_head, "SCREENED_VOCABULARY", VOCAB_SIZE)


@torch.inference_mode()
def screens(model):
    with narrowed_head(model, lambda hidden: hidden[:, -1:]) as head:
        logits = model(TOKENS).logits
        assert head.tokens is None
        return head.screen(3, logits[0, 0])


@torch.inference_mode()
def test_a_screened_head_gives_fewer_tokens_until_the_body_ends(fast_bfloat16):
    model = tiny_model()
    whole = logits_of(model)
    with narrowed_head(model, lambda hidden: hidden[:, -1:]) as head:
        assert head.screen(3, model(TOKENS).logits[0, 0])
        logits = model(TOKENS).logits[:, 0]
        assert len(head.tokens) < VOCAB_SIZE / 4
        assert logits.shape == (3, len(head.tokens))
        assert torch.allclose(logits, whole[:, -1, head.tokens], atol=1e-5)
        assert torch.allclose(logits.topk(3).values, whole[:, -1].topk(3).values, atol=1e-5)
    assert torch.equal(logits_of(model), whole)


class MasksTokens(LlamaForCausalLM):
    """As models do that never write the tokens of pictures."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[:, :, 50:60] = -100.0
        return output


def masking():
    plain = tiny_model()
    model = MasksTokens(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("name", ["bias", "low soft cap", "head of its own class"])
def test_a_head_with_more_than_a_product_is_not_screened(name, fast_bfloat16):
    assert not screens(MODELS[name]())


def test_a_model_that_changes_logits_by_token_is_not_screened(fast_bfloat16):
    assert not screens(masking())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_screened(dtype, fast_bfloat16):
    assert not screens(tiny_model().to(dtype))


@pytest.mark.parametrize("capabilities", [{}, {"avx512_f": True, "avx512_bf16": False}])
def test_a_cpu_without_bfloat16_products_does_not_screen(capabilities, fast_bfloat16, monkeypatch):
    assert screens(tiny_model())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert not screens(tiny_model())


def test_more_tokens_than_blocks_are_not_screened(fast_bfloat16):
    model = tiny_model()
    with narrowed_head(model, lambda hidden: hidden[:, -1:]) as head, torch.inference_mode():
        logits = model(TOKENS).logits[0, 0]
        assert not head.screen(VOCAB_SIZE // BLOCK + 1, logits)
        assert head.screen(VOCAB_SIZE // BLOCK, logits)


def test_a_model_that_cuts_its_logits_is_not_screened(fast_bfloat16):
    """As those do whose vocabulary is padded."""
    model = tiny_model()
    with narrowed_head(model, lambda hidden: hidden[:, -1:]) as head, torch.inference_mode():
        assert not head.screen(3, model(TOKENS).logits[0, 0, :-5])


def test_a_small_vocabulary_is_not_screened(fast_bfloat16, monkeypatch):
    monkeypatch.setattr(output_head, "SCREENED_VOCABULARY", VOCAB_SIZE + 1)
    assert not screens(tiny_model())

"""Steering adds exactly alpha * v at its block, leaves no trace, and text ignores the batch."""

import functools
import gc

import pytest
import torch

from activation_extractor import ActivationExtractor
from errors import InputError
from model_loading import decoder_blocks
from steered_generation import SteeredGenerator, steering_error
from tiny_models import ARCHITECTURES, CONTEXT, D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

PROMPTS = ["Once upon a time", "Then", "The weather today is"]
TOKENS = torch.tensor([[256, 10, 20, 30, 40, 50]])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def generator(llama, tokenizer):
    with SteeredGenerator(llama, tokenizer) as generator:
        yield generator


@pytest.fixture(scope="module")
def vector():
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@torch.inference_mode()
def logits(model):
    return model(TOKENS).logits


def recorded(model):
    """Every block's output, as hooks see it that were registered after any steering."""
    outputs = []
    handles = [
        block.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in decoder_blocks(model)
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("layer_idx", range(N_LAYERS))
def test_steering_adds_exactly_alpha_times_v(model, tokenizer, vector, layer_idx):
    unsteered = recorded(model)
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(layer_idx, vector, alpha=2.5)
        steered = recorded(model)
    assert torch.equal(steered[layer_idx], unsteered[layer_idx] + 2.5 * vector)
    for before in range(layer_idx):
        assert torch.equal(steered[before], unsteered[before])
    for after in range(layer_idx + 1, N_LAYERS):
        assert not torch.allclose(steered[after], unsteered[after], atol=1e-3)


def test_clear_steering_restores_the_logits_exactly(model, tokenizer, vector):
    before = logits(model)
    generator = SteeredGenerator(model, tokenizer)
    generator.register_steering(1, vector, alpha=3.0)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    generator.clear_steering()
    assert torch.equal(logits(model), before)


def test_two_layers_are_steered_at_once(model, tokenizer, vector):
    unsteered = recorded(model)
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(1, vector, alpha=2.0)
        first_alone = recorded(model)
        generator.register_steering(3, -vector, alpha=4.0)
        both = recorded(model)
        generator.clear_steering(1)
        second_alone = recorded(model)
    assert torch.equal(both[1], unsteered[1] + 2.0 * vector)
    assert torch.equal(both[3], first_alone[3] + 4.0 * -vector)
    assert torch.equal(second_alone[3], unsteered[3] + 4.0 * -vector)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_with_left_padding_equals_one_by_one(model, tokenizer, vector, temperature):
    options = {"max_new_tokens": 6, "temperature": temperature}
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(1, vector, alpha=1.0)
        single = [
            generator.generate(prompt, **options, seed=seed)
            for prompt, seed in zip(PROMPTS, (3, 4, 5), strict=True)
        ]
        assert generator.generate_batch(PROMPTS, **options, seeds=[3, 4, 5]) == single
    assert all(single)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_row_gives_the_same_text_in_any_order_and_batch(llama, tokenizer, generator, batch_size):
    rows = [(prompt, seed) for prompt in PROMPTS for seed in range(3)]
    expected = {row: generator.generate(row[0], max_new_tokens=10, seed=row[1]) for row in rows}
    reordered = rows[::2] + rows[1::2][::-1]
    other = SteeredGenerator(llama, tokenizer, batch_size=batch_size)
    prompts, seeds = zip(*reordered, strict=True)
    texts = other.generate_batch(prompts, max_new_tokens=10, seeds=seeds)
    assert texts == [expected[row] for row in reordered]
    assert len(set(texts)) == len(rows)


def test_running_out_of_memory_changes_no_text(tokenizer):
    model = tiny_model()
    generator = SteeredGenerator(model, tokenizer)
    expected = generator.generate_batch(PROMPTS, max_new_tokens=6)
    forward = model.forward

    @functools.wraps(forward)
    def small_forward(input_ids, **options):
        if len(input_ids) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(input_ids=input_ids, **options)

    model.forward = small_forward
    assert generator.generate_batch(PROMPTS, max_new_tokens=6) == expected


@pytest.mark.parametrize("batch_size", [2, 32])
def test_rows_with_vectors_of_their_own_equal_one_condition_at_a_time(llama, tokenizer, vector, batch_size):
    conditions = [(vector, 3.0), (vector, 0.0), (-vector, 2.0)]
    rows = [(prompt, condition) for prompt in PROMPTS for condition in conditions]
    with SteeredGenerator(llama, tokenizer, batch_size=batch_size) as generator:
        together = generator.generate_batch(
            [prompt for prompt, _ in rows],
            12,
            layer_idx=1,
            steering_vectors=torch.stack([v for _, (v, _) in rows]),
            alphas=[alpha for _, (_, alpha) in rows],
        )
        assert n_hooks(llama) == 0
        apart = []
        for prompt, (v, alpha) in rows:
            generator.register_steering(1, v, alpha)
            apart.append(generator.generate(prompt, 12))
    assert together == apart
    assert len(set(together)) > len(PROMPTS)


def test_missing_seeds_are_0(generator):
    with_zeros = generator.generate_batch(PROMPTS, max_new_tokens=6, seeds=[0, 0, 0])
    assert generator.generate_batch(PROMPTS, max_new_tokens=6) == with_zeros
    assert generator.generate(PROMPTS[0], max_new_tokens=6) == with_zeros[0]


def test_greedy_text_ignores_the_seed(generator):
    texts = {generator.generate("Then", max_new_tokens=8, temperature=0, seed=seed) for seed in range(4)}
    assert len(texts) == 1


def test_greedy_text_is_what_the_model_itself_decodes(llama, tokenizer, generator):
    tokens = torch.tensor([tokenizer("Then").input_ids])
    with torch.inference_mode():
        for _ in range(6):
            tokens = torch.cat([tokens, llama(tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(tokens[0, -6:], skip_special_tokens=True)
    assert generator.generate("Then", max_new_tokens=6, temperature=0) == expected


def test_a_longer_text_begins_with_the_shorter_one(generator):
    """A character cut in two at the end decodes to a replacement mark."""
    short = generator.generate("Then", max_new_tokens=5).rstrip("�")
    assert short
    assert generator.generate("Then", max_new_tokens=25).startswith(short)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alpha_0_equals_unsteered(llama, generator, vector, temperature):
    options = {"max_new_tokens": 8, "temperature": temperature}
    plain, before = generator.generate_batch(PROMPTS, **options), logits(llama)
    generator.register_steering(1, vector, alpha=0.0)
    assert generator.generate_batch(PROMPTS, **options) == plain
    assert torch.equal(logits(llama), before)


def test_set_alpha_changes_the_strength_at_one_layer_or_all(generator, vector):
    generator.register_steering(1, vector, alpha=1.0)
    generator.register_steering(2, vector, alpha=1.0)
    generator.set_alpha(3.0, layer_idx=2)
    assert torch.equal(generator.added_vector(1), vector)
    assert torch.equal(generator.added_vector(2), 3 * vector)
    generator.set_alpha(-2.0)
    assert torch.equal(generator.added_vector(1), -2 * vector)
    assert torch.equal(generator.added_vector(2), -2 * vector)


def test_set_alpha_equals_registering_with_that_alpha(llama, generator, vector):
    generator.register_steering(1, vector, alpha=4.0)
    expected = logits(llama)
    generator.register_steering(1, vector, alpha=1.0)
    generator.set_alpha(4.0)
    assert torch.equal(logits(llama), expected)


def test_deactivate_and_activate_keep_vector_and_strength(llama, generator, vector):
    plain = logits(llama)
    generator.register_steering(1, vector, alpha=2.0)
    steered = logits(llama)
    generator.deactivate()
    assert torch.equal(logits(llama), plain)
    assert not generator.added_vector(1).any()
    generator.activate()
    assert torch.equal(logits(llama), steered)
    assert torch.equal(generator.added_vector(1), 2 * vector)


def test_a_second_vector_at_a_layer_replaces_the_first(llama, generator, vector):
    before = n_hooks(llama)
    unsteered = recorded(llama)[1]
    generator.register_steering(1, vector, alpha=5.0)
    generator.register_steering(1, -vector, alpha=1.0)
    assert torch.equal(recorded(llama)[1], unsteered - vector)
    assert n_hooks(llama) == before + 1


def test_a_refused_vector_leaves_the_earlier_one_in_place(generator, vector):
    generator.register_steering(1, vector, alpha=2.0)
    for bad_vector, bad_alpha in ((vector / 0, 1.0), (vector, float("nan"))):
        with pytest.raises(InputError):
            generator.register_steering(1, bad_vector, bad_alpha)
    assert torch.equal(generator.added_vector(1), 2 * vector)


def test_the_registered_vector_is_not_modified(generator, vector):
    original = vector.clone()
    generator.register_steering(1, vector, alpha=2.0)
    generator.generate("Then", max_new_tokens=4)
    assert torch.equal(vector, original)


def test_steering_is_removed_when_body_raises(llama, tokenizer, vector):
    hooks, before = n_hooks(llama), logits(llama)

    def steer_and_fail():
        with SteeredGenerator(llama, tokenizer) as generator:
            generator.register_steering(1, vector)
            generator.register_steering(2, vector)
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        steer_and_fail()
    assert n_hooks(llama) == hooks
    assert torch.equal(logits(llama), before)


def test_a_forgotten_generator_takes_its_hooks_with_it(llama, tokenizer, vector):
    before = n_hooks(llama)
    generator = SteeredGenerator(llama, tokenizer)
    generator.register_steering(1, vector)
    assert n_hooks(llama) == before + 1
    del generator
    gc.collect()
    assert n_hooks(llama) == before


def test_the_first_generated_token_is_steered(llama, tokenizer, generator):
    """Far along a token's unembedding direction, that token is the most probable one."""
    unembedding = llama.lm_head.weight.detach()
    top = (unembedding @ unembedding.T).argmax(0)
    printable = [token for token in range(94) if top[token] == token][:3]
    for token in printable:
        generator.register_steering(N_LAYERS - 1, unembedding[token], alpha=1e4)
        text = generator.generate("Then", max_new_tokens=1, temperature=0)
        assert text == tokenizer.decode([token])
    assert len(printable) == 3


def test_text_ends_before_the_end_token(llama, tokenizer, generator):
    unembedding = llama.lm_head.weight.detach()
    end = tokenizer.eos_token_id
    assert (unembedding @ unembedding[end]).argmax() == end
    generator.register_steering(N_LAYERS - 1, unembedding[end], alpha=1e4)
    assert generator.generate_batch(PROMPTS, max_new_tokens=5, temperature=0) == ["", "", ""]
    assert generator.n_tokens == 0


def test_generated_tokens_are_counted(generator):
    generator.generate_batch(PROMPTS, max_new_tokens=3, temperature=0)
    assert generator.n_tokens == 9


def test_residual_norm_unit_scales_by_the_norm_of_the_layer(llama, tokenizer, vector):
    unsteered = recorded(llama)
    norms = {1: 8.0, 3: 0.5}
    with SteeredGenerator(llama, tokenizer, alpha_unit="residual_norm", residual_norms=norms) as generator:
        generator.register_steering(1, vector, alpha=0.25)
        assert torch.equal(recorded(llama)[1], unsteered[1] + 2.0 * vector)
        generator.clear_steering()
        generator.register_steering(3, vector, alpha=4.0)
        assert torch.equal(recorded(llama)[3], unsteered[3] + 2.0 * vector)
        assert torch.equal(generator.added_vector(3), 2.0 * vector)


def test_tokenizer_without_pad_token_gives_the_same(llama, generator):
    bare = SteeredGenerator(llama, tiny_tokenizer(with_pad=False))
    options = {"max_new_tokens": 6, "temperature": 0.0}
    assert bare.generate_batch(PROMPTS, **options) == generator.generate_batch(PROMPTS, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_prompt_may_fill_the_context_but_not_exceed_it(tokenizer, name):
    generator = SteeredGenerator(tiny_model(name), tokenizer)
    prompt = "a" * (CONTEXT - 4)
    generator.generate(prompt, max_new_tokens=3, temperature=0)
    assert generator.n_tokens == 3
    with pytest.raises(InputError, match=f"prompt 0 has {CONTEXT - 3} tokens.*context of {CONTEXT}"):
        generator.generate(prompt, max_new_tokens=4)


def with_rows(generator, vectors, alphas, layer_idx=1):
    return generator.generate_batch(["Then"], 3, layer_idx=layer_idx, steering_vectors=vectors, alphas=alphas)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda g, v: g.register_steering(1, v[:-1]), r"shape \(31,\), expected \(32,\)"),
        (lambda g, v: g.register_steering(1, v[None]), r"shape \(1, 32\), expected \(32,\)"),
        (lambda g, v: g.register_steering(1, v * float("nan")), "not finite"),
        (lambda g, v: g.register_steering(1, v / 0), "not finite"),
        (lambda g, v: g.register_steering(1, v, alpha=float("inf")), "alpha is inf"),
        (lambda g, v: g.register_steering(1, v, alpha=float("nan")), "alpha is nan"),
        (lambda g, v: g.register_steering(4, v), r"layer_idx 4 .*\(0 to 3\)"),
        (lambda g, v: g.register_steering(-1, v), r"layer_idx -1 .*\(0 to 3\)"),
        (lambda g, v: g.set_alpha(1.0, layer_idx=2), "no steering is registered at layer 2"),
        (lambda g, v: g.added_vector(2), "no steering is registered at layer 2"),
        (lambda g, v: g.generate_batch([]), "at least one string"),
        (lambda g, v: g.generate_batch("Then"), "at least one string"),
        (lambda g, v: g.generate_batch(["Then", " "]), "prompt 1 is empty"),
        (lambda g, v: g.generate_batch(["Then"], seeds=[1, 2]), "2 seeds for 1 prompts"),
        (lambda g, v: g.generate("Then", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda g, v: g.generate("Then", max_new_tokens=CONTEXT), "exceeds the context"),
        (lambda g, v: g.generate("Then", temperature=-0.1), "temperature is -0.1"),
        (lambda g, v: g.generate("Then", temperature=float("nan")), "temperature is nan"),
        (lambda g, v: g.generate("Then", top_k=-1), "top_k is -1"),
        (lambda g, v: g.generate("Then", top_p=0.0), "top_p is 0.0"),
        (lambda g, v: g.generate("Then", top_p=1.1), "top_p is 1.1"),
        (lambda g, v: g.generate_batch(["Then"], alphas=[1.0]), "layer_idx, steering_vectors and alphas"),
        (lambda g, v: with_rows(g, v[None].expand(2, -1), [1.0]), "1 alphas for 1 prompts; expected"),
        (lambda g, v: with_rows(g, v[None], [1.0, 2.0]), "2 alphas for 1 prompts; expected"),
        (lambda g, v: with_rows(g, v[None, :-1], [1.0]), r"steering_vectors \(1, 31\)"),
        (lambda g, v: with_rows(g, v[None] / 0, [1.0]), "not finite"),
        (lambda g, v: with_rows(g, v[None], [float("nan")]), "alpha is nan"),
        (lambda g, v: with_rows(g, v[None], [1.0], layer_idx=9), r"layer_idx 9 .*\(0 to 3\)"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_hook(llama, generator, vector, ask, message):
    before = n_hooks(llama)
    with pytest.raises(InputError, match=message):
        ask(generator, vector)
    assert n_hooks(llama) == before


@pytest.mark.parametrize("norms", [None, {2: 5.0}, {1: float("nan")}, {1: float("inf")}])
def test_residual_norm_unit_needs_a_finite_norm_of_the_layer(llama, tokenizer, vector, norms):
    before = n_hooks(llama)
    with SteeredGenerator(llama, tokenizer, alpha_unit="residual_norm", residual_norms=norms) as generator:
        with pytest.raises(InputError, match="norm"):
            generator.register_steering(1, vector)
        assert n_hooks(llama) == before


def test_unknown_alpha_unit_is_refused(llama, tokenizer):
    with pytest.raises(InputError, match="choose absolute or residual_norm"):
        SteeredGenerator(llama, tokenizer, alpha_unit="sd")


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 1.5), ("num_beams", 2), ("min_new_tokens", 8), ("temperature", 0.1)],
)
def test_generation_settings_saved_with_a_model_change_nothing(tokenizer, name, value):
    """Instruct models ship them, and the stated sampling is all that may act."""
    model = tiny_model()
    unembedding = model.lm_head.weight.detach()
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(N_LAYERS - 1, unembedding[tokenizer.eos_token_id], alpha=1.0)
        expected = generator.generate_batch(PROMPTS, max_new_tokens=12)
        setattr(model.generation_config, name, value)
        assert generator.generate_batch(PROMPTS, max_new_tokens=12) == expected


def test_steering_error_is_0_at_the_steered_block_and_large_elsewhere(llama, tokenizer, generator, vector):
    generator.register_steering(1, vector, alpha=3.0)
    at_block, below = (ActivationExtractor(llama, tokenizer, layer_idx).extract for layer_idx in (1, 0))
    steered = logits(llama)
    assert steering_error(generator, 1, "Some text", at_block) < 1e-5
    assert steering_error(generator, 1, "Some text", below) == pytest.approx(1)
    assert torch.equal(logits(llama), steered)

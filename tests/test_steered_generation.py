"""Steering adds exactly alpha * v at its block, leaves no trace, and text ignores the batch."""

import gc

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from watching import block_outputs, fails_at, logits, n_hooks

from activation_extractor import ActivationExtractor, block_output
from model_loading import decoder_blocks
from steered_generation import SteeredGenerator, steering_error
from support.errors import InputError
from support.tiny_models import ARCHITECTURES, CONTEXT, D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

PROMPTS = ["Once upon a time", "Then", "The weather today is"]
POSITIONS = pytest.mark.parametrize("steer_positions", ["all", "response"])


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


def texts_of(generations):
    return [generation.text for generation in generations]


# Registered vectors


@pytest.mark.parametrize("layer_idx", range(N_LAYERS))
def test_steering_adds_exactly_alpha_times_v_and_leaves_no_trace(model, tokenizer, vector, layer_idx):
    unsteered = block_outputs(model)
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(layer_idx, vector, alpha=2.5)
        steered = block_outputs(model)
    assert torch.equal(steered[layer_idx], unsteered[layer_idx] + 2.5 * vector)
    for before in range(layer_idx):
        assert torch.equal(steered[before], unsteered[before])
    for after in range(layer_idx + 1, N_LAYERS):
        assert not torch.allclose(steered[after], unsteered[after], atol=1e-3)
    assert all(map(torch.equal, block_outputs(model), unsteered))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_steering_keeps_the_dtype_and_the_tensor_of_the_block(tokenizer, vector, dtype):
    """Others may hold that tensor: it must not change under them."""
    model, before, after, original = tiny_model().to(dtype), [], [], vector.clone()
    block = decoder_blocks(model)[1]
    block.register_forward_hook(lambda module, args, output: before.append(block_output(output)))
    logits(model)
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(layer_idx=1, steering_vector=vector, alpha=2.0)
        block.register_forward_hook(lambda module, args, output: after.append(block_output(output)))
        assert logits(model).dtype == dtype
    assert torch.equal(before[0], before[1])
    assert after[0].dtype == dtype
    assert not torch.equal(after[0], before[0])
    assert torch.equal(vector, original)


def test_two_layers_are_steered_at_once(model, tokenizer, vector):
    unsteered = block_outputs(model)
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(1, vector, alpha=2.0)
        first_alone = block_outputs(model)
        generator.register_steering(3, -vector, alpha=4.0)
        both = block_outputs(model)
        generator.clear_steering(1)
        second_alone = block_outputs(model)
    assert torch.equal(both[1], unsteered[1] + 2.0 * vector)
    assert torch.equal(both[3], first_alone[3] + 4.0 * -vector)
    assert torch.equal(second_alone[3], unsteered[3] + 4.0 * -vector)


def test_steering_of_response_positions_adds_to_the_last_of_each_pass(llama, tokenizer, vector):
    unsteered = block_outputs(llama)
    with SteeredGenerator(llama, tokenizer, steer_positions="response") as generator:
        generator.register_steering(1, vector, alpha=2.5)
        steered = block_outputs(llama)
    assert torch.equal(steered[1][:, -1], unsteered[1][:, -1] + 2.5 * vector)
    assert torch.equal(steered[1][:, :-1], unsteered[1][:, :-1])
    assert torch.equal(steered[3][:, :-1], unsteered[3][:, :-1])
    assert not torch.allclose(steered[3][:, -1], unsteered[3][:, -1], atol=1e-3)


def test_residual_norm_unit_scales_by_the_norm_of_the_layer(llama, tokenizer, vector):
    unsteered = block_outputs(llama)
    norms = {1: 8.0, 3: 0.5}
    with SteeredGenerator(llama, tokenizer, alpha_unit="residual_norm", residual_norms=norms) as generator:
        for layer_idx, alpha in ((1, 0.25), (3, 4.0)):
            generator.register_steering(layer_idx, vector, alpha)
            assert torch.equal(generator.added_vector(layer_idx), 2.0 * vector)
            assert torch.equal(block_outputs(llama)[layer_idx], unsteered[layer_idx] + 2.0 * vector)
            generator.clear_steering()


def test_a_second_vector_at_a_layer_replaces_the_first_unless_it_is_rejected(llama, generator, vector):
    before = n_hooks(llama)
    unsteered = block_outputs(llama)[1]
    generator.register_steering(1, vector, alpha=5.0)
    generator.register_steering(1, -vector, alpha=1.0)
    for bad_vector, bad_alpha in ((vector / 0, 1.0), (vector, float("nan"))):
        with pytest.raises(InputError, match=r"is nan|not finite"):
            generator.register_steering(1, bad_vector, bad_alpha)
    assert torch.equal(block_outputs(llama)[1], unsteered - vector)
    assert n_hooks(llama) == before + 1


def test_set_alpha_and_deactivate_keep_the_vectors(llama, generator, vector):
    plain = logits(llama)
    for layer_idx in (1, 2):
        generator.register_steering(layer_idx, vector, alpha=1.0)
    generator.set_alpha(3.0, layer_idx=2)
    assert torch.equal(generator.added_vector(1), vector)
    assert torch.equal(generator.added_vector(2), 3 * vector)
    generator.set_alpha(-2.0)
    steered = logits(llama)
    generator.deactivate()
    assert torch.equal(logits(llama), plain)
    assert not generator.added_vector(1).any()
    generator.activate()
    assert torch.equal(logits(llama), steered)
    assert torch.equal(generator.added_vector(1), -2 * vector)


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


def test_steering_error_is_0_at_the_steered_block_and_large_elsewhere(llama, tokenizer, generator, vector):
    generator.register_steering(1, vector, alpha=3.0)
    at_block, below = (
        ActivationExtractor(llama, tokenizer, layer_idx, read_steered=True).extract for layer_idx in (1, 0)
    )
    steered = logits(llama)
    assert steering_error(generator, 1, "Some text", at_block) < 1e-5
    assert steering_error(generator, 1, "Some text", below) == pytest.approx(1)
    assert torch.equal(logits(llama), steered)


# Text


@POSITIONS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_with_left_padding_equals_one_by_one(model, tokenizer, vector, steer_positions, temperature):
    options = {"max_new_tokens": 6, "temperature": temperature}
    with SteeredGenerator(model, tokenizer, steer_positions=steer_positions) as generator:
        generator.register_steering(1, vector, alpha=1.0)
        single = [generator.generate(prompt, **options, seed=3 + row) for row, prompt in enumerate(PROMPTS)]
        assert texts_of(generator.generate_batch(PROMPTS, **options, seeds=[3, 4, 5])) == single
    assert temperature == 0 or len(set(single)) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_row_gives_the_same_text_in_any_order_and_batch(llama, tokenizer, generator, batch_size):
    rows = [(prompt, seed) for prompt in PROMPTS for seed in range(3)]
    expected = {row: generator.generate(row[0], max_new_tokens=10, seed=row[1]) for row in rows}
    reordered = rows[::2] + rows[1::2][::-1]
    other = SteeredGenerator(llama, tokenizer, batch_size=batch_size)
    prompts, seeds = zip(*reordered, strict=True)
    texts = texts_of(other.generate_batch(prompts, max_new_tokens=10, seeds=seeds))
    assert texts == [expected[row] for row in reordered]
    assert len(set(texts)) == len(rows)


def test_greedy_text_is_what_the_model_itself_decodes_whatever_the_seed(llama, tokenizer, generator):
    tokens = torch.tensor([tokenizer("Then").input_ids])
    for _ in range(6):
        tokens = torch.cat([tokens, logits(llama, tokens)[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(tokens[0, -6:], skip_special_tokens=True)
    for seed in range(4):
        assert generator.generate("Then", max_new_tokens=6, temperature=0, seed=seed) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alpha_0_equals_unsteered(llama, generator, vector, temperature):
    options = {"max_new_tokens": 8, "temperature": temperature}
    plain, before = generator.generate_batch(PROMPTS, **options), logits(llama)
    generator.register_steering(1, vector, alpha=0.0)
    assert generator.generate_batch(PROMPTS, **options) == plain
    assert torch.equal(logits(llama), before)


def test_a_generation_says_how_many_tokens_it_has_and_whether_the_model_ended_it(llama, tokenizer, generator):
    """The token that ends a text is no part of it."""
    whole = generator.generate_batch(PROMPTS, max_new_tokens=3, temperature=0)
    assert [(each.n_tokens, each.has_ended) for each in whole] == [(3, False)] * 3
    unembedding, end = llama.lm_head.weight.detach(), tokenizer.eos_token_id
    assert (unembedding @ unembedding[end]).argmax() == end
    generator.register_steering(N_LAYERS - 1, unembedding[end], alpha=1e4)
    ended = generator.generate_batch(PROMPTS, max_new_tokens=5, temperature=0)
    assert [(each.text, each.n_tokens, each.has_ended) for each in ended] == [("", 0, True)] * 3


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_prompt_may_fill_the_context_but_not_exceed_it(tokenizer, name):
    generator = SteeredGenerator(tiny_model(name), tokenizer)
    prompt = "a" * (CONTEXT - 4)
    assert generator.generate_batch([prompt], max_new_tokens=3, temperature=0)[0].n_tokens == 3
    with pytest.raises(InputError, match=f"prompt 0 has {CONTEXT - 3} tokens.*context of {CONTEXT}"):
        generator.generate(prompt, max_new_tokens=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 1.5), ("num_beams", 2), ("min_new_tokens", 8), ("temperature", 0.1)],
)
def test_generation_settings_saved_with_a_model_change_nothing(tokenizer, name, value):
    """Instruct models ship them, and only the stated sampling may act."""
    model = tiny_model()
    unembedding = model.lm_head.weight.detach()
    with SteeredGenerator(model, tokenizer) as generator:
        generator.register_steering(N_LAYERS - 1, unembedding[tokenizer.eos_token_id], alpha=1.0)
        expected = generator.generate_batch(PROMPTS, max_new_tokens=12)
        setattr(model.generation_config, name, value)
        assert generator.generate_batch(PROMPTS, max_new_tokens=12) == expected


# A vector for each row


# For each of eight rows, the layers at which it is steered.
ROW_LAYERS = [{1}, {0, 2}, set(), {3}, {1, 3}, {2}, {0, 1, 2, 3}, {3}]


def rows_with(vectors, row_layers, alphas):
    """Arguments of generate_batch, with zeros where a row is not steered; vectors: (rows, layers, d)."""
    by_layer = {layer: vectors[:, layer].clone() for layer in range(N_LAYERS)}
    for layer, of_layer in by_layer.items():
        of_layer[[layer not in layers for layers in row_layers]] = 0.0
    return {"steering_vectors": by_layer, "alphas": alphas}


def one_row_at_a_time(generator, prompts, row_layers, vectors, alphas, **options):
    """The same steering by `register_steering`, each row alone."""
    found = []
    for prompt, layers, of_row, alpha in zip(prompts, row_layers, vectors, alphas, strict=True):
        generator.clear_steering()
        for layer in layers:
            generator.register_steering(layer, of_row[layer], alpha)
        found += generator.generate_batch([prompt], **options)
    generator.clear_steering()
    return found


@POSITIONS
def test_rows_with_vectors_of_their_own_equal_registered_steering_one_row_at_a_time(
    model, tokenizer, steer_positions
):
    """Also with a vector and a norm of its own at each layer."""
    prompts = [PROMPTS[row % 3] for row in range(8)]
    vectors = torch.randn(8, N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(1))
    alphas = [0.5, 1.0, 3.0, -1.0, 0.3, 0.0, 0.2, 1.0]
    norms = {0: 2.0, 1: 3.0, 2: 0.5, 3: 5.0}
    settings = {"alpha_unit": "residual_norm", "residual_norms": norms, "steer_positions": steer_positions}
    hooks = n_hooks(model)
    with SteeredGenerator(model, tokenizer, batch_size=5, **settings) as generator:
        together = generator.generate_batch(prompts, 8, **rows_with(vectors, ROW_LAYERS, alphas))
        assert n_hooks(model) == hooks
        expected = one_row_at_a_time(generator, prompts, ROW_LAYERS, vectors, alphas, max_new_tokens=8)
        plain = generator.generate_batch(prompts, 8)
    assert together == expected
    assert (together[2], together[5]) == (plain[2], plain[5])
    assert sum(text != unsteered for text, unsteered in zip(together, plain, strict=True)) > 3


def test_vectors_of_rows_may_be_numpys_and_are_added_beside_what_is_registered(generator, vector):
    other = vector.flip(0)
    generator.register_steering(1, vector, alpha=1.0)
    generator.register_steering(2, other, alpha=2.0)
    expected = generator.generate_batch(PROMPTS, 8)
    generator.clear_steering(2)
    vectors = other.expand(3, -1).double().numpy()
    rows = {"steering_vectors": {np.int64(2): vectors}, "alphas": np.full(3, 2.0)}
    assert generator.generate_batch(PROMPTS, 8, **rows) == expected
    assert generator.generate_batch(PROMPTS, 8) != expected


def test_rows_that_end_early_do_not_disturb_the_vectors_of_the_others(llama, tokenizer, vector, generator):
    """Some end at once, some by chance along the way, the others never."""
    end, last = llama.lm_head.weight.detach()[tokenizer.eos_token_id], {N_LAYERS - 1}
    at_once, by_chance, never = (end, last, 1e4), (end, last, 2.0), (vector, {1}, 0.5)
    conditions = [never, at_once, *[by_chance] * 5, at_once, never, *[by_chance] * 3]
    vectors, row_layers, alphas = (list(values) for values in zip(*conditions, strict=True))
    prompts = [f"{PROMPTS[row % 3]} {row}" for row in range(len(conditions))]
    options = {"max_new_tokens": 30, "top_k": 0, "temperature": 0.3}
    vectors = torch.stack(vectors)[:, None].expand(-1, N_LAYERS, -1)
    other = SteeredGenerator(llama, tokenizer, batch_size=8)
    together = other.generate_batch(prompts, **options, **rows_with(vectors, row_layers, alphas))
    assert together == one_row_at_a_time(generator, prompts, row_layers, vectors, alphas, **options)
    n_tokens = [each.n_tokens for each in together]
    assert (n_tokens[1], n_tokens[7]) == (0, 0)
    assert len(set(n_tokens)) > 3
    assert 30 in n_tokens


@POSITIONS
def test_during_generation_exactly_alpha_times_v_is_added_to_each_row(model, steer_positions, monkeypatch):
    vectors, alphas, tokenizer = torch.randn(3, D_MODEL), [2.5, -1.0, 0.5], tiny_tokenizer()
    tokenizer.eos_token = None  # so that all rows stay
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    generator, before, after = SteeredGenerator(model, tokenizer, steer_positions=steer_positions), [], []

    def note_output(module, args, output):
        before.append(block_output(output).clone())

    def note_input(module, args, options):
        after.append((args[0] if args else options["hidden_states"]).clone())

    handles = [
        generator.blocks[1].register_forward_hook(note_output),
        generator.blocks[2].register_forward_pre_hook(note_input, with_kwargs=True),
    ]
    rows = {"steering_vectors": {1: vectors}, "alphas": alphas}
    generator.generate_batch(PROMPTS, 4, temperature=0, **rows)
    for handle in handles:
        handle.remove()
    # Prompts are packed longest first.
    order = sorted(range(3), key=lambda row: -len(PROMPTS[row]))
    added = torch.stack([alphas[row] * vectors[row] for row in order])[:, None]
    for output, following in zip(before, after, strict=True):
        steered = output + added
        if steer_positions == "response":
            steered = torch.cat([output[:, :-1], steered[:, -1:]], dim=1)
        assert torch.equal(following, steered)
    assert [each.shape[1] for each in after] == [1 + max(map(len, PROMPTS)), 1, 1, 1]


@POSITIONS
def test_a_prompt_is_read_once_for_rows_that_are_steered_equally(llama, tokenizer, vector, steer_positions):
    prompts = [*PROMPTS[:1] * 4, PROMPTS[1]]
    vectors = torch.stack([vector, vector, -vector, vector, vector])
    alphas, seeds = [8.0, 8.0, 8.0, 4.0, 8.0], [0, 1, 0, 0, 0]
    counts = []
    with SteeredGenerator(llama, tokenizer, steer_positions=steer_positions) as generator:

        def written(rows):
            steering = {"steering_vectors": {1: vectors[rows]}, "alphas": alphas[rows]}
            return generator.generate_batch(prompts[rows], 6, seeds=seeds[rows], **steering)

        handle = generator.blocks[0].register_forward_hook(
            lambda module, args, output: counts.append(len(block_output(output)))
        )
        together = written(slice(None))
        handle.remove()
        alone = [each for row in range(5) for each in written(slice(row, row + 1))]
    assert counts == [4] + [5] * 5
    assert together == alone
    assert len(set(together)) == 5


# Memory


@POSITIONS
def test_out_of_memory_in_the_middle_of_a_batch_changes_no_text_and_is_remembered(tokenizer, steer_positions):
    model = tiny_model()
    generator = SteeredGenerator(model, tokenizer, steer_positions=steer_positions)
    prompts = [PROMPTS[row % 3] for row in range(8)]
    alphas = [1.0, 0.5, 0.0, 2.0, 1.0, -1.0, 0.5, 2.0]
    rows = rows_with(torch.randn(8, N_LAYERS, D_MODEL), ROW_LAYERS, alphas)
    expected = generator.generate_batch(prompts, 6, **rows)
    hooks = n_hooks(model)
    passes = fails_at(model, lambda n_rows, number: number in (3, 7))
    assert generator.generate_batch(prompts, 6, **rows) == expected
    assert n_hooks(model) == hooks
    assert passes[:7] == [8, 8, 8, 4, 4, 4, 4]
    n_passes = len(passes)
    assert generator.generate_batch(prompts, 6, **rows) == expected
    assert max(passes[n_passes:]) == 2


# Errors


def with_rows(generator, vectors, alphas, layer_idx=1):
    return generator.generate_batch(["Then"], 3, steering_vectors={layer_idx: vectors}, alphas=alphas)


def remade(generator, **settings):
    return SteeredGenerator(generator.model, generator.tokenizer, **settings)


def by_norms(generator, norms):
    return remade(generator, alpha_unit="residual_norm", residual_norms=norms)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda g, v: g.register_steering(1, v[:-1]), r"shape \(31,\), expected \(32,\)"),
        (lambda g, v: g.register_steering(1, v[None]), r"shape \(1, 32\), expected \(32,\)"),
        (lambda g, v: g.register_steering(1, v * float("nan")), "not finite"),
        (lambda g, v: g.register_steering(1, "abc"), "steering_vector is a str, expected numbers"),
        (lambda g, v: g.register_steering(1, None), "steering_vector is a NoneType, expected numbers"),
        (lambda g, v: g.register_steering(1, v, alpha=float("nan")), "alpha is nan"),
        (lambda g, v: g.register_steering(4, v), r"layer_idx 4 .*\(0 to 3\)"),
        (lambda g, v: g.register_steering(-1, v), r"layer_idx -1 .*\(0 to 3\)"),
        (lambda g, v: remade(g, alpha_unit="sd"), "'sd' is unknown; choose absolute or residual_norm"),
        (lambda g, v: remade(g, steer_positions="last"), "'last' is unknown; choose all or response"),
        (lambda g, v: by_norms(g, None).register_steering(1, v), "norm"),
        (lambda g, v: by_norms(g, {2: 5.0}).register_steering(1, v), "norm"),
        (lambda g, v: by_norms(g, {1: float("nan")}).register_steering(1, v), "norm"),
        (lambda g, v: by_norms(g, {1: float("inf")}).register_steering(1, v), "norm"),
        (lambda g, v: g.set_alpha(1.0, layer_idx=2), "no steering is registered at layer 2"),
        (lambda g, v: g.added_vector(2), "no steering is registered at layer 2"),
        (lambda g, v: g.generate_batch([]), "at least one string"),
        (lambda g, v: g.generate_batch("Then"), "at least one string"),
        (lambda g, v: g.generate_batch(["Then", " "]), "prompt 1 is empty"),
        (lambda g, v: g.generate_batch(["Then"], seeds=[1, 2]), "2 seeds for 1 prompts"),
        (lambda g, v: g.generate("Then", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda g, v: g.generate("Then", max_new_tokens=CONTEXT), "exceeds the context"),
        (lambda g, v: g.generate("Then", temperature=-0.1), "temperature is -0.1"),
        (lambda g, v: g.generate("Then", top_p=1.1), "top_p is 1.1"),
        (lambda g, v: g.generate("Then", top_k=261), "top_k is 261 but the model's vocabulary has 260"),
        (lambda g, v: g.generate_batch(["Then"], alphas=[1.0]), "steering_vectors .* and alphas"),
        (lambda g, v: g.generate_batch(["Then"], steering_vectors={1: v[None]}), "and alphas"),
        (lambda g, v: g.generate_batch(["Then"], steering_vectors=v[None], alphas=[1.0]), "and alphas"),
        (lambda g, v: with_rows(g, v[None].expand(2, -1), [1.0]), "1 alphas for 1 prompts; expected"),
        (lambda g, v: with_rows(g, v[None], [1.0, 2.0]), "2 alphas for 1 prompts; expected"),
        (lambda g, v: with_rows(g, v[None, :-1], [1.0]), r"steering_vectors \(1, 31\)"),
        (lambda g, v: with_rows(g, v[None] / 0, [1.0]), "not finite"),
        (lambda g, v: with_rows(g, v[None], [float("nan")]), "alpha is nan"),
        (lambda g, v: with_rows(g, v[None], [1.0], layer_idx=9), r"layer_idx 9 .*\(0 to 3\)"),
    ],
)
def test_bad_input_is_rejected_and_leaves_no_hook(llama, generator, vector, ask, message):
    before = n_hooks(llama)
    with pytest.raises(InputError, match=message):
        ask(generator, vector)
    assert n_hooks(llama) == before


GRIFFIN = {"num_attention_heads": 2, "intermediate_size": 64, "lru_width": 32, "attention_window_size": 64}


@pytest.mark.parametrize(("architecture", "settings"), [("mamba", {}), ("recurrent_gemma", GRIFFIN)])
def test_a_model_that_keeps_a_state_outside_its_cache_is_rejected(tokenizer, architecture, settings):
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 260}
    config = AutoConfig.for_model(architecture, **shape, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=f"{type(model).__name__} keeps its state elsewhere"):
        SteeredGenerator(model, tokenizer).generate("Once upon a time", 4)

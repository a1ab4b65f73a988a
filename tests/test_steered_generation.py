"""Steering adds exactly alpha * v at its block, leaves no trace, and text ignores the batch."""

import functools
import gc

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from activation_extractor import ActivationExtractor, block_output
from model_loading import decoder_blocks
from steered_generation import SteeredGenerator, steering_error
from support.errors import InputError
from support.tiny_models import ARCHITECTURES, CONTEXT, D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_steering_keeps_the_dtype_and_the_tensor_of_the_block(tokenizer, vector, dtype):
    """Others may hold that tensor: it must not change under them."""
    model, before, after = tiny_model().to(dtype), [], []
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


def test_rows_with_a_vector_for_each_layer_equal_registered_ones(llama, tokenizer):
    by_layer = {layer: torch.randn(len(PROMPTS), D_MODEL) for layer in (2, 0, 1)}
    alphas = [2.0, 0.0, -1.0]
    with SteeredGenerator(llama, tokenizer) as generator:
        together = generator.generate_batch(PROMPTS, 12, steering_vectors=by_layer, alphas=alphas)
        apart = []
        for row, (prompt, alpha) in enumerate(zip(PROMPTS, alphas, strict=True)):
            for layer, vectors in by_layer.items():
                generator.register_steering(layer, vectors[row], alpha)
            apart.append(generator.generate(prompt, 12))
        generator.clear_steering()
        assert together == apart
        assert together[1] == generator.generate(PROMPTS[1], 12)
        assert together[0] != generator.generate(PROMPTS[0], 12)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"steering_vectors": {1: torch.ones(1, D_MODEL)}, "alphas": [1.0], "layer_idx": 1},
            "without layer_idx",
        ),
        ({"steering_vectors": {9: torch.ones(1, D_MODEL)}, "alphas": [1.0]}, "layer_idx 9 is out of range"),
        ({"steering_vectors": {1: torch.ones(2, D_MODEL)}, "alphas": [1.0]}, r"steering_vectors \(2, 32\)"),
        ({"steering_vectors": {1: torch.ones(1, D_MODEL)}}, "together"),
    ],
)
def test_vectors_by_layer_that_do_not_fit_are_refused(llama, generator, rows, message):
    with pytest.raises(InputError, match=message):
        generator.generate_batch(["Then"], 4, **rows)
    assert n_hooks(llama) == 0


@pytest.mark.parametrize("layer_idx", [np.int64(1), [np.int64(1)], [{np.int64(1)}]])
def test_layers_may_be_numpy_integers(generator, vector, layer_idx):
    rows = {"steering_vectors": vector[None], "alphas": [3.0]}
    expected = generator.generate_batch(["Then"], 6, layer_idx=1, **rows)
    assert generator.generate_batch(["Then"], 6, layer_idx=layer_idx, **rows) == expected


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


@pytest.mark.parametrize("steer_positions", ["all", "response"])
def test_the_first_generated_token_is_steered(llama, tokenizer, steer_positions):
    """Far along a token's unembedding direction, that token is the most probable one."""
    generator = SteeredGenerator(llama, tokenizer, steer_positions=steer_positions)
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


ROW_LAYERS = [[1], {0, 2}, set(), 3, (1, 3), 2, frozenset({0, 1, 2, 3}), {3}]


def one_row_at_a_time(generator, prompts, row_layers, vectors, alphas, **options):
    """The same steering by `register_steering`, each row alone; and how many tokens each has."""
    texts, n_tokens = [], []
    for prompt, layers, row_vector, alpha in zip(prompts, row_layers, vectors, alphas, strict=True):
        generator.clear_steering()
        for layer in {layers} if isinstance(layers, int) else layers:
            generator.register_steering(layer, row_vector, alpha)
        before = generator.n_tokens
        texts.append(generator.generate(prompt, **options))
        n_tokens.append(generator.n_tokens - before)
    generator.clear_steering()
    return texts, n_tokens


@pytest.mark.parametrize("batch_size", [3, 32])
@pytest.mark.parametrize("steer_positions", ["all", "response"])
def test_rows_with_sets_of_layers_equal_registered_steering_one_row_at_a_time(
    model, tokenizer, steer_positions, batch_size
):
    """Also with a norm of its own at each layer."""
    prompts = [PROMPTS[row % 3] for row in range(8)]
    vectors = torch.randn(8, D_MODEL)
    alphas = [0.5, 1.0, 3.0, -1.0, 0.3, 0.0, 0.2, 1.0]
    norms = {0: 2.0, 1: 3.0, 2: 0.5, 3: 5.0}
    settings = {"alpha_unit": "residual_norm", "residual_norms": norms, "steer_positions": steer_positions}
    with SteeredGenerator(model, tokenizer, batch_size=batch_size, **settings) as generator:
        rows = {"layer_idx": ROW_LAYERS, "steering_vectors": vectors, "alphas": alphas}
        together = generator.generate_batch(prompts, 8, **rows)
        expected, _ = one_row_at_a_time(generator, prompts, ROW_LAYERS, vectors, alphas, max_new_tokens=8)
        plain = generator.generate_batch(prompts, 8)
    assert together == expected
    assert together[2] == plain[2]
    assert together[5] == plain[5]
    assert sum(text != unsteered for text, unsteered in zip(together, plain, strict=True)) > 3


def test_all_rows_without_a_layer_are_unsteered(llama, generator, vector):
    plain = generator.generate_batch(PROMPTS, 6)
    rows = {"layer_idx": [set(), [], ()], "steering_vectors": vector.expand(3, -1), "alphas": [9.0] * 3}
    assert generator.generate_batch(PROMPTS, 6, **rows) == plain


def test_vectors_of_rows_are_added_beside_what_is_registered(generator, vector):
    other = vector.flip(0)
    generator.register_steering(1, vector, alpha=1.0)
    generator.register_steering(2, other, alpha=2.0)
    expected = generator.generate_batch(PROMPTS, 8)
    generator.clear_steering(2)
    rows = {"layer_idx": 2, "steering_vectors": other.expand(3, -1), "alphas": [2.0] * 3}
    assert generator.generate_batch(PROMPTS, 8, **rows) == expected
    assert generator.generate_batch(PROMPTS, 8) != expected


@pytest.mark.parametrize("batch_size", [4, 32])
def test_rows_that_end_early_do_not_disturb_the_vectors_of_the_others(
    llama, tokenizer, vector, generator, batch_size
):
    """Some end at once, some by chance along the way, the others never."""
    end, last = llama.lm_head.weight.detach()[tokenizer.eos_token_id], N_LAYERS - 1
    at_once, by_chance, never = (end, last, 1e4), (end, last, 2.0), (vector, 1, 0.5)
    conditions = [never, at_once, *[by_chance] * 5, at_once, never, *[by_chance] * 3]
    vectors, row_layers, alphas = (list(values) for values in zip(*conditions, strict=True))
    prompts = [f"{PROMPTS[row % 3]} {row}" for row in range(len(conditions))]
    options = {"max_new_tokens": 30, "top_k": 0, "temperature": 0.3}
    rows = {"layer_idx": row_layers, "steering_vectors": torch.stack(vectors), "alphas": alphas}
    other = SteeredGenerator(llama, tokenizer, batch_size=batch_size)
    together = other.generate_batch(prompts, **options, **rows)
    expected, n_tokens = one_row_at_a_time(generator, prompts, row_layers, vectors, alphas, **options)
    assert together == expected
    assert other.n_tokens == sum(n_tokens)
    assert (n_tokens[1], n_tokens[7]) == (0, 0)
    assert len(set(n_tokens)) > 3
    assert 30 in n_tokens


class Watch:
    """What a block gives before the rows' vectors are added, and what the next block gets."""

    def __init__(self, model, layer_idx):
        blocks = decoder_blocks(model)
        self.before, self.after = [], []
        self.handles = [
            blocks[layer_idx].register_forward_hook(self._output),
            blocks[layer_idx + 1].register_forward_pre_hook(self._input, with_kwargs=True),
        ]

    def _output(self, module, args, output):
        self.before.append((output[0] if isinstance(output, tuple) else output).clone())

    def _input(self, module, args, options):
        self.after.append((args[0] if args else options["hidden_states"]).clone())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("steer_positions", ["all", "response"])
def test_where_text_is_written_exactly_alpha_times_v_is_added_to_each_row(
    model, tokenizer, steer_positions, monkeypatch
):
    vectors, alphas = torch.randn(3, D_MODEL), [2.5, -1.0, 0.5]
    generator = SteeredGenerator(model, tokenizer, steer_positions=steer_positions)
    monkeypatch.setattr(generator, "_end_tokens", set)  # so that all rows stay
    with Watch(model, 1) as plain:
        generator.generate_batch(PROMPTS, 1)
    with Watch(model, 1) as watch:
        rows = {"layer_idx": 1, "steering_vectors": vectors, "alphas": alphas}
        generator.generate_batch(PROMPTS, 4, temperature=0, **rows)
    assert len(watch.before) == len(watch.after) == 4
    # Prompts are packed longest first.
    order = sorted(range(3), key=lambda row: -len(PROMPTS[row]))
    added = torch.stack([alphas[row] * vectors[row] for row in order])[:, None]
    for before, after in zip(watch.before, watch.after, strict=True):
        steered = before + added
        if steer_positions == "response":
            steered = torch.cat([before[:, :-1], steered[:, -1:]], dim=1)
        assert torch.equal(after, steered)
    assert torch.equal(watch.before[0], plain.before[0])
    n_positions = [after.shape[1] for after in watch.after]
    assert n_positions == [1 + max(map(len, PROMPTS)), 1, 1, 1]


def test_registered_steering_of_generated_positions_adds_to_the_last_of_each_pass(llama, tokenizer, vector):
    unsteered = recorded(llama)
    with SteeredGenerator(llama, tokenizer, steer_positions="response") as generator:
        generator.register_steering(1, vector, alpha=2.5)
        steered = recorded(llama)
    assert torch.equal(steered[1][:, -1], unsteered[1][:, -1] + 2.5 * vector)
    assert torch.equal(steered[1][:, :-1], unsteered[1][:, :-1])
    assert torch.equal(steered[3][:, :-1], unsteered[3][:, :-1])
    assert not torch.allclose(steered[3][:, -1], unsteered[3][:, -1], atol=1e-3)


def test_steering_the_prompt_too_gives_other_text(llama, tokenizer, vector):
    rows = {"layer_idx": 1, "steering_vectors": vector.expand(3, -1), "alphas": [2.0] * 3}
    texts = [
        SteeredGenerator(llama, tokenizer, steer_positions=positions).generate_batch(PROMPTS, 12, **rows)
        for positions in ("all", "response")
    ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steering_generated_positions_ignores_left_padding(model, tokenizer, vector, temperature):
    options = {"max_new_tokens": 6, "temperature": temperature}
    with SteeredGenerator(model, tokenizer, steer_positions="response") as generator:
        generator.register_steering(1, vector, alpha=1.0)
        single = [generator.generate(prompt, **options) for prompt in PROMPTS]
        assert generator.generate_batch(PROMPTS, **options) == single


@pytest.mark.parametrize("steer_positions", ["", "last", "prompt", None])
def test_unknown_steer_positions_are_refused(llama, tokenizer, steer_positions):
    with pytest.raises(InputError, match=f"{steer_positions!r} is unknown; choose all or generated"):
        SteeredGenerator(llama, tokenizer, steer_positions=steer_positions)


def fails_at(model, is_too_large):
    """Make passes of the model fail for which is_too_large(rows, number of the pass) holds."""
    forward, passes = model.forward, []

    @functools.wraps(forward)
    def limited(input_ids, **options):
        passes.append(len(input_ids))
        if is_too_large(len(input_ids), len(passes)):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(input_ids=input_ids, **options)

    model.forward = limited
    return passes


def test_a_generator_keeps_the_batch_size_that_fits(tokenizer, caplog):
    model = tiny_model()
    generator = SteeredGenerator(model, tokenizer, batch_size=8)
    prompts = [f"{PROMPTS[row % 3]} {row}" for row in range(9)]
    expected = generator.generate_batch(prompts, 4)
    fails_at(model, lambda n_rows, number: n_rows > 3)
    assert generator.generate_batch(prompts, 4) == expected
    assert generator.batch_size == 2
    assert [record.args for record in caplog.records] == [("generating", 4), ("generating", 2)]
    assert generator.generate_batch(prompts, 4) == expected
    assert len(caplog.records) == 2


@pytest.mark.parametrize("steer_positions", ["all", "response"])
def test_out_of_memory_in_the_middle_of_a_batch_changes_no_text(tokenizer, steer_positions):
    model = tiny_model()
    generator = SteeredGenerator(model, tokenizer, steer_positions=steer_positions)
    prompts = [PROMPTS[row % 3] for row in range(8)]
    alphas = [1.0, 0.5, 0.0, 2.0, 1.0, -1.0, 0.5, 2.0]
    rows = {"layer_idx": ROW_LAYERS, "steering_vectors": torch.randn(8, D_MODEL), "alphas": alphas}
    expected = generator.generate_batch(prompts, 6, **rows)
    n_tokens, hooks = generator.n_tokens, n_hooks(model)
    passes = fails_at(model, lambda n_rows, number: number in (3, 7))
    assert generator.generate_batch(prompts, 6, **rows) == expected
    assert generator.n_tokens == 2 * n_tokens
    assert n_hooks(model) == hooks
    assert passes[:7] == [8, 8, 8, 4, 4, 4, 4]
    assert generator.batch_size == 2


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
        (lambda g, v: with_rows(g, v[None], [1.0], layer_idx=[{1, 4}]), r"layer_idx 4 .*\(0 to 3\)"),
        (lambda g, v: with_rows(g, v[None], [1.0], layer_idx=[[-1]]), r"layer_idx -1 .*\(0 to 3\)"),
        (lambda g, v: with_rows(g, v[None], [1.0], layer_idx=[1, 2]), "2 layers for 1 prompts"),
        (lambda g, v: with_rows(g, v[None], [1.0], layer_idx=[]), "0 layers for 1 prompts"),
        (lambda g, v: with_rows(g, v.expand(3, -1), [1.0] * 3), r"steering_vectors \(3, 32\) and 3 alphas"),
        (lambda g, v: g.generate("Then", top_k=261), "top_k is 261 but the model's vocabulary has 260"),
        (lambda g, v: g.generate("Then", temperature=0, top_k=261), "top_k is 261"),
        (lambda g, v: g.sampler(1.0, 261, 1.0), "top_k is 261"),
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
    at_block, below = (
        ActivationExtractor(llama, tokenizer, layer_idx, read_steered=True).extract for layer_idx in (1, 0)
    )
    steered = logits(llama)
    assert steering_error(generator, 1, "Some text", at_block) < 1e-5
    assert steering_error(generator, 1, "Some text", below) == pytest.approx(1)
    assert torch.equal(logits(llama), steered)


def test_a_model_without_a_key_value_cache_is_refused(tokenizer):
    config = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=260)
    with pytest.raises(InputError, match="MambaForCausalLM keeps its state elsewhere"):
        SteeredGenerator(MambaForCausalLM(config), tokenizer)


def test_a_model_that_keeps_a_recurrent_state_outside_its_cache_is_refused(tokenizer):
    config = RecurrentGemmaConfig(
        num_hidden_layers=3,
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        lru_width=32,
        attention_window_size=64,
    )
    model = RecurrentGemmaForCausalLM(config).eval()
    with (
        SteeredGenerator(model, tokenizer) as generator,
        pytest.raises(InputError, match="RecurrentGemmaForCausalLM keeps its state elsewhere"),
    ):
        generator.generate("Once upon a time", 4)


@pytest.mark.parametrize("steer_positions", ["all", "response"])
def test_a_prompt_is_read_once_for_rows_that_are_steered_alike(llama, tokenizer, vector, steer_positions):
    prompts = [*PROMPTS[:1] * 4, PROMPTS[1]]
    vectors = torch.stack([vector, vector, -vector, vector, vector])
    alphas, seeds = [8.0, 8.0, 8.0, 4.0, 8.0], [0, 1, 0, 0, 0]
    counts = []
    with SteeredGenerator(llama, tokenizer, steer_positions=steer_positions) as generator:
        handle = generator.blocks[0].register_forward_hook(
            lambda module, args, output: counts.append(len(block_output(output)))
        )
        together = generator.generate_batch(
            prompts, 6, seeds=seeds, layer_idx=1, steering_vectors=vectors, alphas=alphas
        )
        handle.remove()
        alone = [
            generator.generate_batch(
                prompts[row : row + 1],
                6,
                seeds=seeds[row : row + 1],
                layer_idx=1,
                steering_vectors=vectors[row : row + 1],
                alphas=alphas[row : row + 1],
            )[0]
            for row in range(5)
        ]
    assert counts == [4] + [5] * 5
    assert together == alone
    assert len(set(together)) == 5

"""Activations equal what a plain hook records, whatever the batch, padding or position."""

import pytest
import torch
from tokenizers import processors
from torch.testing import assert_close
from watching import block_outputs, fails_at, n_hooks

from activation_extractor import (
    ActivationExtractor,
    massive_dimensions,
    measure_residual_norm,
    paired_activations,
    split_half_cosine,
)
from model_loading import decoder_blocks
from support.errors import InputError
from support.tiny_models import ARCHITECTURES, D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer
from support.vocabulary import EMBEDDINGS

TEXTS = ["Short.", "A longer text about nothing at all.", "Middle sized text.", "x", "Words, words."]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PAIR_TEXTS = [
    "the cat sat on the mat",
    "zebra",
    "a dog ran, the naïve café on 🙂 the mat",
    "the dog and the cat: a day in the park",
]
PAIR_CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


def recorded(model, tokens, layer_idx):
    """The block's output for every token, (tokens, d), as a plain forward hook sees it."""
    return block_outputs(model, torch.tensor([tokens]))[layer_idx][0]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batch_size_and_padding_side_change_nothing(model, padding_side):
    tokenizer = tiny_tokenizer()
    single = ActivationExtractor(model, tokenizer, 2)
    expected = torch.stack([single.extract(text) for text in TEXTS])
    assert (expected.shape, expected.dtype) == ((len(TEXTS), D_MODEL), torch.float32)
    tokenizer.padding_side = padding_side
    extractor = ActivationExtractor(model, tokenizer, 2, batch_size=3)
    assert_close(extractor.extract_batch(TEXTS), expected, **CLOSE)


def test_layer_idx_is_one_below_the_index_in_hidden_states(model, tokenizer):
    """The last block's entry there has passed the final norm, so a plain hook records that block."""
    tokens = torch.tensor([tokenizer(TEXTS[1]).input_ids])
    with torch.inference_mode():
        expected = [
            *model(tokens, output_hidden_states=True).hidden_states[:-1],
            block_outputs(model, tokens)[-1],
        ]
    extracted = ActivationExtractor(model, tokenizer, 0).extract_layers(
        [TEXTS[1]], [3, 0, 1, EMBEDDINGS, 2, 0]
    )
    assert list(extracted) == [EMBEDDINGS, *range(N_LAYERS)]
    for layer_idx, states in enumerate(expected, EMBEDDINGS):
        assert_close(extracted[layer_idx][0], states[0, -1], **CLOSE)


@pytest.mark.parametrize(("with_bos", "kept"), [(True, [1, 2, 4, 5]), (False, [1, 3, 4])])
def test_mean_leaves_out_special_tokens_and_the_very_first_unless_there_is_no_other(llama, with_bos, kept):
    tokenizer = tiny_tokenizer()
    if not with_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    extractor = ActivationExtractor(llama, tokenizer, 1)
    expected = recorded(llama, tokenizer("ab<eos>cd").input_ids, 1)[kept].mean(0)
    assert_close(extractor.extract_batch([TEXTS[1], "ab<eos>cd"], "mean")[1], expected, **CLOSE)
    assert torch.equal(extractor.extract("<eos>", "mean"), extractor.extract("<eos>", "last"))


@pytest.mark.parametrize(("layers", "expected"), [([1], [0, 1]), ([2, 0], [0, 1, 2])])
def test_forward_stops_after_the_deepest_block(llama, tokenizer, layers, expected):
    ran = []
    handles = [
        block.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
        for index, block in enumerate(decoder_blocks(llama))
    ]
    ActivationExtractor(llama, tokenizer, 1).extract_layers(TEXTS[:1], layers)
    for handle in handles:
        handle.remove()
    assert ran == expected


def test_running_out_of_memory_changes_no_result(tokenizer):
    model = tiny_model()
    expected = ActivationExtractor(model, tokenizer, 1).extract_batch(TEXTS)
    passes = fails_at(model, lambda n_rows, number: n_rows > 2)
    extracted = ActivationExtractor(model, tokenizer, 1, batch_size=5).extract_batch(TEXTS)
    assert_close(extracted, expected, **CLOSE)
    assert passes == [5, 2, 2, 1]
    assert n_hooks(model) == 0


def test_a_call_may_have_its_own_batch_size(tokenizer):
    model = tiny_model()
    extractor = ActivationExtractor(model, tokenizer, 1)
    expected = extractor.extract_batch(TEXTS)
    passes = fails_at(model, lambda n_rows, n_passes: False)
    assert_close(extractor.extract_batch(TEXTS, batch_size=2), expected, **CLOSE)
    assert passes == [2, 2, 1]
    with pytest.raises(InputError, match="batch_size is 0, expected 1 or more"):
        extractor.extract_batch(TEXTS, batch_size=0)


def test_long_texts_are_cut_at_the_end_and_counted(llama, tokenizer):
    extractor = ActivationExtractor(llama, tokenizer, 1, max_length=5)
    extracted = extractor.extract_batch(["abcdefgh", "abc", "abcd"])
    assert extractor.n_truncated == 1
    assert extractor.n_tokens == 5 + 4 + 5
    assert_close(extracted[0], recorded(llama, tokenizer("abcd").input_ids, 1)[-1], **CLOSE)


@pytest.mark.parametrize("position", ["last", "mean"])
def test_persona_vector_is_the_unit_difference_of_means(llama, tokenizer, position):
    sides = TEXTS[:2], TEXTS[2:]
    extractor = ActivationExtractor(llama, tokenizer, 2, batch_size=2)
    positive, negative = (extractor.extract_batch(side, position).mean(0) for side in sides)
    persona = extractor.measure_persona_vector(*sides, position)
    assert_close(persona.vector * persona.raw_norm, positive - negative, **CLOSE)
    assert persona.vector.norm().item() == pytest.approx(1, abs=1e-6)
    assert (persona.n_positive, persona.n_negative, persona.split_half_cosine) == (2, 3, None)
    assert torch.equal(extractor.extract_persona_vector(*sides, position), persona.vector)


def test_split_half_cosine_is_high_for_a_signal_and_near_0_for_noise():
    """Pairs stay in one half, so what a pair shares cancels."""
    positive, negative = torch.randn(40, 512), torch.randn(36, 512)
    assert split_half_cosine(positive + 2 * torch.randn(512), negative) > 0.95
    assert abs(split_half_cosine(positive, negative)) < 0.1
    assert split_half_cosine(positive, negative) == split_half_cosine(positive, negative)
    assert split_half_cosine(positive[:3], negative) is None
    assert split_half_cosine(positive, negative[:3]) is None
    assert split_half_cosine(positive + torch.randn(512), positive) == pytest.approx(1, abs=1e-4)


def test_residual_norm_leaves_out_massive_dimensions():
    activations = torch.randn(201, 32)
    activations[:, [5, 20]] *= 1000
    norm = measure_residual_norm(activations)
    kept = [index for index in range(32) if index not in (5, 20)]
    assert norm.massive_dimensions == massive_dimensions(activations) == [5, 20]
    assert norm.median == pytest.approx(activations[:, kept].norm(dim=1).median().item())
    assert norm.median_with_massive == pytest.approx(activations.norm(dim=1).median().item())
    assert norm.median < 10 < norm.median_with_massive


def test_a_dimension_is_massive_above_ten_times_the_median():
    activations = torch.ones(10, 9)
    activations[:, 4], activations[:, 5] = 9.9, 10.1
    assert massive_dimensions(activations) == [5]


def read_pairs(extractor, **options):
    return list(paired_activations(extractor, extractor, PAIR_TEXTS, **options))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e.extract_batch([]), "list of texts is empty"),
        (lambda e: e.extract_batch(["good", None]), "text 1 is empty or not a string"),
        (lambda e: ActivationExtractor(e.model, e.tokenizer, N_LAYERS), r"4 decoder blocks \(0 to 3\)"),
        (lambda e: ActivationExtractor(e.model, e.tokenizer, 1, max_length=0), "max_length is 0"),
        (lambda e: e.extract_layers(["good"], []), "list of layers is empty"),
        (lambda e: e.extract_layers(["good"], [1, 4]), r"layer_idx 4 .*\(0 to 3\)"),
        (lambda e: e.extract("good", 3), "3 is unknown; choose last, mean, response"),
        (lambda e: e.extract_persona_vector([], ["bad"]), "no positive texts"),
        (lambda e: e.extract_persona_vector(["good"], []), "no negative texts"),
        (lambda e: e.extract_persona_vector(["same"], ["same"]), "same mean"),
        (lambda e: e.extract_persona_vector("good", "bad"), "single string"),
        (lambda e: measure_residual_norm(torch.ones(0, 8)), "expected"),
        (lambda e: measure_residual_norm(torch.ones(8)), "expected"),
        (lambda e: read_pairs(e, positions="mean"), "'mean' is unknown; choose 'aligned' or 'last'"),
        (lambda e: read_pairs(e, source_layers=[N_LAYERS]), r"layer_idx 4 .*\(0 to 3\)"),
        (lambda e: read_pairs(e, target_layers=[]), "list of layers is empty"),
    ],
)
def test_bad_input_is_rejected_and_leaves_no_hook(llama, tokenizer, ask, message):
    before = n_hooks(llama)
    with pytest.raises(InputError, match=message):
        ask(ActivationExtractor(llama, tokenizer, 1))
    assert n_hooks(llama) == before


def test_activation_that_is_not_finite_names_its_text(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("x").input_ids[-1]] = float("nan")
    extractor = ActivationExtractor(model, tokenizer, 1)
    with pytest.raises(InputError, match="text 2 gives an activation that is not finite"):
        extractor.extract_batch(["ab", "a longer line", "b x b"])
    assert n_hooks(model) == 0


@pytest.mark.parametrize("position", ["last", "mean"])
def test_nothing_at_a_padded_position_reaches_the_result(tokenizer, position):
    """Not even NaN: the padding of the shorter text, in the second row, is overwritten."""
    model = tiny_model()
    extractor = ActivationExtractor(model, tokenizer, 1)
    expected = extractor.extract_batch(["longer", "abc"], position)

    def overwrite(module, args, output):
        return output.index_put((torch.tensor(1), torch.arange(4, 7)), torch.tensor(float("nan")))

    model.model.layers[1].register_forward_hook(overwrite)
    assert torch.equal(extractor.extract_batch(["longer", "abc"], position), expected)


@pytest.fixture(scope="module")
def gpt2():
    return tiny_model("gpt2", seed=1, n_embd=48, vocab_size=300)


@pytest.fixture(params=["word_tokenizer", "bpe_tokenizer"])
def sides(llama, gpt2, tokenizer, request):
    """A source that reads bytes and a target of another width that reads words or parts of them."""
    other = request.getfixturevalue(request.param)
    return ActivationExtractor(llama, tokenizer, 1), ActivationExtractor(gpt2, other, 2)


word_sides = pytest.mark.parametrize("sides", ["word_tokenizer"], indirect=True)


def by_place(batches):
    """(text, end) -> the two activations."""
    found = {}
    for batch in batches:
        places = zip(batch.text_idx.tolist(), batch.end.tolist(), strict=True)
        found |= zip(places, zip(batch.H_source[1], batch.H_target[2], strict=True), strict=True)
    return found


def assert_same_pairs(found, expected):
    assert found.keys() == expected.keys()
    for place, rows in expected.items():
        for one, other in zip(found[place], rows, strict=True):
            assert_close(one, other, **PAIR_CLOSE)


def test_a_pair_is_what_both_models_say_of_the_text_up_to_there(sides):
    """Wherever the text up to there, alone, gives the same tokens."""
    found, n_checked = by_place(paired_activations(*sides, PAIR_TEXTS)), [0, 0]
    for (index, end), rows in found.items():
        texts = PAIR_TEXTS[index], PAIR_TEXTS[index][:end]
        for side, extractor in enumerate(sides):
            whole, prefix = (extractor.tokenizer(text).input_ids for text in texts)
            if whole[: len(prefix)] == prefix:
                n_checked[side] += 1
                assert_close(rows[side], extractor.extract(texts[1]), **PAIR_CLOSE)
    assert n_checked[0] == len(found) > 15
    assert n_checked[1] > 0.8 * len(found)


@word_sides
def test_pairs_are_where_both_sides_end_a_known_word_and_tokens_are_counted(sides):
    """Neither a word that is <unk> nor the first word, which has no special token before it."""
    (batch,) = paired_activations(*sides, PAIR_TEXTS[:3])
    assert batch.text_idx.tolist() == [0] * 5 + [2] * 8
    assert batch.end.tolist() == [7, 11, 14, 18, 22, 5, 9, 14, 20, 25, 28, 34, 38]
    assert (batch.H_source[1].shape, batch.H_target[2].shape) == ((13, D_MODEL), (13, 48))
    assert batch.H_source[1].dtype == batch.H_target[2].dtype == torch.float32
    n_tokens = [sum(map(len, extractor.tokenizer(PAIR_TEXTS[:3]).input_ids)) for extractor in sides]
    assert [batch.n_source_tokens, batch.n_target_tokens] == n_tokens
    assert [extractor.n_tokens for extractor in sides] == n_tokens


@pytest.mark.parametrize("with_bos", [True, False])
def test_no_first_token_is_read_and_a_text_is_words(llama, with_bos):
    tokenizer = tiny_tokenizer()
    if not with_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    extractor = ActivationExtractor(llama, tokenizer, 1)
    (batch,) = paired_activations(extractor, extractor, ["ab<eos>cd"])
    assert batch.end.tolist() == list(range(1 if with_bos else 2, 10))
    ids = tokenizer("ab<eos>cd", split_special_tokens=True).input_ids
    assert_close(batch.H_source[1], recorded(llama, ids, 1)[1:], **PAIR_CLOSE)


def test_batch_size_and_order_of_texts_change_no_pair(sides):
    expected = by_place(paired_activations(*sides, PAIR_TEXTS))
    for extractor in sides:
        extractor.batch_size = 3
    order = [2, 0, 3, 1]
    found = by_place(paired_activations(*sides, [PAIR_TEXTS[index] for index in order]))
    assert_same_pairs({(order[row], end): rows for (row, end), rows in found.items()}, expected)


@pytest.mark.parametrize("positions", ["aligned", "last"])
def test_texts_are_read_as_they_are_needed_and_counted_over_all_windows(sides, positions):
    read = []

    def texts():
        for number in range(130):
            read.append(number)
            yield ["the cat", "a dog ran"][number % 2]

    batches = paired_activations(*sides, texts(), positions)
    assert read == []
    text_idx = [(next(batches).text_idx, len(read)) for _ in range(3)]
    assert [n_read for _, n_read in text_idx] == [64, 128, 130]
    assert next(batches, None) is None
    numbers = [number for found, _ in text_idx for number in found.unique().tolist()]
    assert numbers == list(range(130))


@pytest.mark.parametrize("name", ["bpe_tokenizer", "slow_tokenizer"])
def test_last_pairs_the_last_tokens_of_any_tokenizer(llama, gpt2, tokenizer, name, request):
    source = ActivationExtractor(llama, tokenizer, 1)
    target = ActivationExtractor(gpt2, request.getfixturevalue(name), 2)
    (batch,) = paired_activations(source, target, iter(PAIR_TEXTS), positions="last")
    assert batch.text_idx.tolist() == [0, 1, 2, 3]
    assert batch.end.tolist() == [len(text) for text in PAIR_TEXTS]
    assert_close(batch.H_source[1], source.extract_batch(PAIR_TEXTS), **PAIR_CLOSE)
    assert_close(batch.H_target[2], target.extract_batch(PAIR_TEXTS), **PAIR_CLOSE)


def test_several_layers_are_read_in_one_pass(sides):
    (batch,) = paired_activations(*sides, PAIR_TEXTS, source_layers=[3, 0], target_layers=[1, 2, 1])
    assert (list(batch.H_source), list(batch.H_target)) == ([0, 3], [1, 2])
    (alone,) = paired_activations(*sides, PAIR_TEXTS, source_layers=[0], target_layers=[1])
    assert_close(batch.H_source[0], alone.H_source[0], **PAIR_CLOSE)
    assert_close(batch.H_target[1], alone.H_target[1], **PAIR_CLOSE)


@word_sides
def test_texts_on_which_nothing_aligns_give_no_pair(sides):
    (none,) = paired_activations(*sides, ["zebra", "the", "zebra!"])
    assert (none.H_source[1].shape, none.H_target[2].shape) == ((0, 32), (0, 48))
    assert none.n_source_tokens > 0
    texts = ["zebra"] * 64 + ["the", "the cat", "zebra"]
    assert list(by_place(paired_activations(*sides, texts))) == [(65, 7)]
    assert list(paired_activations(*sides, [])) == []


@pytest.mark.parametrize(("source_length", "target_length"), [(9, None), (None, 4), (9, 4)])
def test_texts_that_are_cut_give_the_pairs_within_what_both_read(sides, source_length, target_length):
    expected = by_place(paired_activations(*sides, PAIR_TEXTS))
    reach = {}
    for extractor, length in zip(sides, (source_length, target_length), strict=True):
        extractor.max_length = length or extractor.max_length
        for index, text in enumerate(PAIR_TEXTS):
            offsets = extractor.tokenizer(text, return_offsets_mapping=True).offset_mapping
            end = offsets[: extractor.max_length][-1][1]
            reach[index] = min(end, reach.get(index, end))
    n_cut = sides[0].n_truncated
    found = by_place(paired_activations(*sides, PAIR_TEXTS))
    kept = {(index, end): rows for (index, end), rows in expected.items() if end <= reach[index]}
    assert_same_pairs(found, kept)
    assert 0 < len(kept) < len(expected)
    assert sides[0].n_truncated - n_cut == (3 if source_length else 0)


def test_a_cut_text_gives_no_pair_of_last_tokens(llama, tokenizer):
    """What is left of it could end elsewhere in the other model."""
    extractor = ActivationExtractor(llama, tokenizer, 1, max_length=9)
    (batch,) = paired_activations(extractor, extractor, PAIR_TEXTS[:2], positions="last")
    assert (batch.text_idx.tolist(), batch.end.tolist()) == ([1], [len(PAIR_TEXTS[1])])


@pytest.mark.parametrize("positions", ["aligned", "last"])
def test_an_empty_text_is_named_by_its_number_over_all_windows(sides, positions):
    texts = (text for text in ["the cat"] * 70 + [" \n"])
    with pytest.raises(InputError, match="text 70 is empty"):
        list(paired_activations(*sides, texts, positions))


@pytest.mark.parametrize("positions", ["aligned", "last"])
def test_a_pair_that_is_not_finite_names_its_text(gpt2, tokenizer, bpe_tokenizer, positions):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("z").input_ids[-1]] = float("nan")
    sides = ActivationExtractor(model, tokenizer, 1), ActivationExtractor(gpt2, bpe_tokenizer, 2)
    texts = ["the cat"] * 66 + ["a zebra"]
    for order in (sides, sides[::-1]):
        with pytest.raises(InputError, match="text 66 gives an activation that is not finite"):
            list(paired_activations(*order, texts, positions))
    assert n_hooks(model) == n_hooks(gpt2) == 0


@pytest.mark.parametrize("side", ["source", "target"])
def test_word_ends_need_offsets_on_both_sides(llama, tokenizer, slow_tokenizer, side):
    sides = {name: ActivationExtractor(llama, tokenizer, 1) for name in ("source", "target")}
    sides[side] = ActivationExtractor(llama, slow_tokenizer, 1)
    with pytest.raises(InputError, match=f"the {side}'s tokenizer .*use mapping_positions 'last'"):
        next(paired_activations(**sides, texts=PAIR_TEXTS))

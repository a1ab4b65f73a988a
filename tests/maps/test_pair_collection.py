"""Collected sums equal those of the pairs added by hand; documents stay whole; counts are what was read."""

import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from activation_extractor import ActivationExtractor, paired_activations
from maps.pair_collection import PairSettings, document_folds, merge_pairs, read_pairs
from support.errors import InputError
from support.pair_statistics import PairStatistics
from support.tiny_models import D_MODEL, tiny_model
from texts.neutral_text import NeutralText

PASSAGES = ["the cat sat on the mat", "zebra", "a dog ran in the park", "the café was closed on the day"]
TEXTS = [NeutralText(PASSAGES[row % 4], f"doc {row * 5 % 11}") for row in range(70)]
LAYER_PAIRS = ((1, 2), (3, 0))
SETTINGS = PairSettings(LAYER_PAIRS, n_folds=4, seed=3)


def collect(sides, texts, settings):
    return merge_pairs([read_pairs(*sides, texts, settings, document_folds(texts, settings))])


@pytest.fixture(scope="module")
def sides(llama, tokenizer, word_tokenizer):
    target = tiny_model("gpt2", seed=1, n_embd=48)
    return ActivationExtractor(llama, tokenizer, 0), ActivationExtractor(target, word_tokenizer, 0)


@pytest.fixture(scope="module")
def collected(sides):
    return collect(sides, TEXTS, SETTINGS)


def test_sums_equal_adding_the_pairs_by_hand(sides, collected):
    texts, place = [item.text for item in TEXTS], []
    folds = document_folds(TEXTS, SETTINGS)
    by_hand = {pair: PairStatistics(D_MODEL, 48, 4, 3, folds) for pair in LAYER_PAIRS}
    for batch in paired_activations(*sides, texts, "aligned", [1, 3], [2, 0]):
        groups = [TEXTS[index].document for index in batch.text_idx.tolist()]
        place += zip(batch.text_idx.tolist(), batch.end.tolist(), strict=True)
        for (source_layer, target_layer), statistics in by_hand.items():
            statistics.add(batch.H_source[source_layer], batch.H_target[target_layer], groups)
    assert list(zip(collected.text_idx.tolist(), collected.end.tolist(), strict=True)) == place
    assert tuple(collected.statistics) == LAYER_PAIRS
    for pair, expected in by_hand.items():
        found = collected.statistics[pair]
        assert torch.equal(found.sample.H_target, expected.sample.H_target)
        for fold in range(4):
            for one, other in zip(found.split(fold), expected.split(fold), strict=True):
                assert torch.allclose(one.cross, other.cross, rtol=0, atol=1e-9)
                assert torch.allclose(one.target_gram, other.target_gram, rtol=0, atol=1e-9)


def test_documents_are_never_split_and_have_one_fold_in_every_layer_pair(collected):
    fold_of = document_folds(TEXTS, SETTINGS)
    assert set(fold_of) == {text.document for text in TEXTS}
    assert set(fold_of.values()) == set(range(4))
    for statistics in collected.statistics.values():
        expected = [fold_of[TEXTS[index].document] for index in collected.text_idx.tolist()]
        assert statistics.sample.folds.tolist() == expected
        assert statistics.n_groups == 11
    assert document_folds(TEXTS, replace(SETTINGS, seed=4)) != fold_of


def test_counts_and_fraction_aligned_are_what_was_read(sides, collected):
    """Of the words of a text, all but the first, and of the texts, all but the 18 "zebra"."""
    n_words = sum(len(item.text.split()) for item in TEXTS)
    n_bytes = sum(1 + len(item.text.encode()) for item in TEXTS)
    expected = {
        "n_pairs": n_words - len(TEXTS),
        "fraction_aligned": (n_words - len(TEXTS)) / n_words,
        "n_texts": 70,
        "n_texts_without_pairs": 18,
        "n_source_tokens": n_bytes,
        "n_target_tokens": n_words,
        "n_truncated": {"source": 0, "target": 0},
    }
    assert collected.report() == expected
    assert {statistics.n_pairs for statistics in collected.statistics.values()} == {expected["n_pairs"]}


def test_pairs_behind_prompts_are_of_the_texts_tokens_as_both_models_read_them(sides):
    prompts = ("asked: is the dog there?\n\n", "a cat said ")
    texts = [NeutralText(item.text, item.document, prompts) for item in TEXTS[:40]]
    (batch,) = paired_activations(*sides, [(*item.prompts, item.text) for item in texts], "aligned", [1], [2])
    assert len(batch.end) > 40
    places = zip(batch.text_idx.tolist(), batch.end.tolist(), strict=True)
    said = [texts[index].text[:end] for index, end in places]
    found = batch.H_source[1], batch.H_target[2]
    for side, prompt, layer, H in zip(sides, prompts, (1, 2), found, strict=True):
        expected = side.extract_layers([prompt + text for text in said], [layer], "last")[layer]
        assert torch.allclose(H, expected, rtol=0, atol=1e-5)
    # Behind a prompt the first word counts too, being no longer the very first token; "zebra" is unknown.
    assert len(batch.end) == sum(len(item.text.split()) for item in texts if item.text != "zebra")
    n_bytes = sum(len(item.text.encode()) for item in texts)
    assert (batch.n_source_tokens, batch.n_target_tokens) == (n_bytes, len(batch.end))
    collected = collect(sides, texts, SETTINGS)
    assert collected.fraction_aligned == 1
    assert collected.statistics[1, 2].n_pairs == len(batch.end)


@pytest.mark.parametrize(
    ("texts", "layer_pairs", "message"),
    [
        ([NeutralText("the cat", "one")] * 9, [(1, 2)], "5 folds over 1 groups"),
        (TEXTS, [], "list of layers is empty"),
        (TEXTS, [(1, 9)], r"layer_idx 9 .*\(0 to 3\)"),
        ([*TEXTS, NeutralText(" ", "x")], [(1, 2)], "text 70 is empty"),
    ],
)
def test_texts_that_give_no_sums_are_rejected(sides, texts, layer_pairs, message):
    with pytest.raises(InputError, match=message):
        collect(sides, texts, PairSettings(tuple(layer_pairs)))


def read_part(sides, texts):
    return read_pairs(*sides, texts, SETTINGS, document_folds(TEXTS, SETTINGS))


def assert_same_pairs(found, expected):
    assert found.report() == expected.report()
    assert torch.equal(found.text_idx, expected.text_idx)
    assert torch.equal(found.end, expected.end)
    assert list(found.statistics) == list(expected.statistics)
    for pair, sums in expected.statistics.items():
        merged = found.statistics[pair]
        assert torch.equal(merged.n, sums.n)
        assert (merged.groups, merged.fold_of) == (sums.groups, sums.fold_of)
        for name in ("gram", "cross", "target_gram"):
            value, reference = getattr(merged.total(), name), getattr(sums.total(), name)
            assert torch.allclose(value, reference, rtol=0, atol=1e-5 * reference.abs().max().item()), name


@pytest.mark.parametrize("bounds", [[0, 70], [0, 33, 34, 35, 36, 70], [0, 1, 2, 69, 70], [1, 2, 70]])
def test_parts_merged_equal_the_texts_read_at_once(sides, bounds):
    """Also where the first part, one in the middle or the last is a "zebra", without pairs."""
    merged = merge_pairs(read_part(sides, TEXTS[a:b]) for a, b in pairwise(bounds))
    assert_same_pairs(merged, read_part(sides, TEXTS[bounds[0] :]))


def test_parts_that_all_lack_pairs_are_rejected(sides):
    parts = [read_part(sides, [TEXTS[1]] * 2) for _ in range(3)]
    with pytest.raises(InputError, match="in 6 texts; use mapping_positions 'last'"):
        merge_pairs(parts)


def test_pairs_that_were_pickled_merge_as_before(sides, collected):
    """Parts from another process are pickled; their working memory stays behind."""
    parts = [pickle.dumps(read_part(sides, TEXTS[a : a + 35])) for a in (0, 35)]
    assert max(map(len, parts)) < 8 * 4096 * (D_MODEL + 48)
    assert_same_pairs(merge_pairs(map(pickle.loads, parts)), collected)

"""Every pair of layers gets the scores that separate work on it would give; the best score wins."""

import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import cosine_similarity, normalize

from activation_extractor import ActivationExtractor, massive_dimensions, paired_activations
from maps.layer_search import (
    CentredLayer,
    check_memory,
    compare_directions,
    fit_pair,
    pair_moments,
    search_layers,
)
from ridge_mapping import HeldOutFold, assign_folds
from support.errors import InputError
from support.tiny_models import N_LAYERS, tiny_model
from texts.neutral_text import NeutralText
from texts.personas import Persona

WORDS = "one two three four five six seven eight nine ten stone water light road tree".split()
MARKS = {"loud": "!", "asking": "?", "dashed": "-"}
PERSONAS = [
    Persona(name, "", tuple(f"{mark} {word}{mark}" for word in WORDS), tuple(f"{word}." for word in WORDS))
    for name, mark in MARKS.items()
]
SCORED = ["loud", "asking"]
LAMBDAS = [1e-6, 1e-3, 1.0]
DRAW = random.Random(0)
TEXTS = [NeutralText(" ".join(DRAW.choices(WORDS, k=12)), f"doc {row // 2}") for row in range(80)]


@pytest.fixture(scope="module")
def source(llama, tokenizer):
    return ActivationExtractor(llama, tokenizer, 0)


@pytest.fixture(scope="module")
def target(bpe_tokenizer):
    return ActivationExtractor(tiny_model("gpt2", seed=1, n_embd=48, vocab_size=300), bpe_tokenizer, 0)


@pytest.fixture(scope="module")
def search(source, target):
    return search_layers(source, target, TEXTS, PERSONAS, SCORED, LAMBDAS, seed=2)


def test_a_model_searched_against_itself_predicts_itself_best_on_the_diagonal(source):
    found = search_layers(source, source, TEXTS, PERSONAS, SCORED, LAMBDAS)
    layers = torch.arange(N_LAYERS)
    for r2 in (found.r2, found.r2_standardised):
        assert r2.diagonal().min() > 0.9999
        assert torch.equal(r2.argmax(0), layers)
        assert torch.equal(r2.argmax(1), layers)
    for agreement in found.agreement.values():
        assert agreement.diagonal().min() > 0.99


def test_a_layer_pair_gets_what_separate_work_on_it_gives(source, target, search):
    """R2 and map by scikit-learn with a fifth of the documents held out; persona vectors one by one."""
    held_out = assign_folds(len(TEXTS), 5, [item.document for item in TEXTS], seed=2) == 0
    texts, layers = [item.text for item in TEXTS], {"source_layers": [1], "target_layers": [2]}
    batches = list(paired_activations(source, target, texts, **layers))
    X = torch.cat([batch.H_source[1] for batch in batches]).double().numpy()
    Y = torch.cat([batch.H_target[2] for batch in batches]).double().numpy()
    test = torch.cat([held_out[batch.text_idx] for batch in batches]).numpy()
    unit = np.square(X[~test] - X[~test].mean(0)).sum(0).mean()
    total = np.square(Y[test] - Y[~test].mean(0)).sum(0)
    ridges = [Ridge(alpha=value * unit).fit(X[~test], Y[~test]) for value in LAMBDAS]
    residuals = [np.square(Y[test] - ridge.predict(X[test])).sum(0) for ridge in ridges]
    best = min(range(len(LAMBDAS)), key=lambda index: residuals[index].sum())
    assert search.r2[1, 2].item() == pytest.approx(1 - residuals[best].sum() / total.sum(), abs=1e-4)
    standardised = 1 - (residuals[best] / total).mean()
    assert search.r2_standardised[1, 2].item() == pytest.approx(standardised, abs=1e-4)
    assert search.n_pairs == len(X)
    for side in ("source", "target"):
        assert search.n_tokens[side] == sum(getattr(batch, f"n_{side}_tokens") for batch in batches)

    def vectors(extractor, layer):
        sides = [(persona.positive_texts, persona.negative_texts, [layer], "mean") for persona in PERSONAS]
        found = [extractor.measure_persona_vectors(*side)[layer].vector for side in sides]
        return torch.stack(found).double()

    mapped = vectors(source, 1) @ torch.from_numpy(ridges[best].coef_.T)
    native = vectors(target, 2)
    for rows in (mapped, native):
        rows[:, massive_dimensions(torch.from_numpy(Y[~test]))] = 0
    table, _ = cosines_by_hand(mapped, mapped, native)
    for index, name in enumerate(MARKS):
        others = [other for other in range(3) if other != index]
        found = [scores[name][1, 2].item() for scores in (search.agreement, search.other_persona)]
        expected = [table[index, index].item(), table[index, others].max().item()]
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("scored", [SCORED, ["dashed"]])
def test_score_is_the_mean_margin_of_the_scored_personas_and_its_argmax_is_best(source, target, scored):
    found = search_layers(source, target, TEXTS, PERSONAS, scored, LAMBDAS, seed=2)
    references = {name: torch.maximum(found.other_persona[name], found.chance) for name in scored}
    margins = [found.agreement[name] - references[name] for name in scored]
    assert torch.allclose(found.score, sum(margins) / len(scored))
    row, column = found.source_layers.index(found.best[0]), found.target_layers.index(found.best[1])
    assert found.score[row, column] == found.score.max()
    assert list(found.agreement) == list(found.other_persona) == list(MARKS)


def test_a_subset_of_layers_gets_the_scores_of_the_full_search(source, target, search):
    options = {"source_layers": [3, 1], "target_layers": [2]}
    found = search_layers(source, target, TEXTS, PERSONAS, SCORED, LAMBDAS, seed=2, **options)
    assert (found.source_layers, found.target_layers) == ([1, 3], [2])
    for scores, whole in ((found.r2, search.r2), (found.agreement["loud"], search.agreement["loud"])):
        assert torch.allclose(scores, whole[[1, 3]][:, [2]], rtol=0, atol=1e-3)
    assert found.best in [(1, 2), (3, 2)]


def cosines_by_hand(mapped, random, native):
    """Agreement, and what random directions reach, when no dimension is massive."""
    mapped, random, native = (normalize(vectors, dim=1) for vectors in (mapped, random, native))
    left, right, noise = mapped - mapped.mean(0), native - native.mean(0), random - mapped.mean(0)
    table = torch.stack([cosine_similarity(row, right) for row in left])
    chance = np.quantile(torch.stack([cosine_similarity(row, right) for row in noise]).numpy(), 0.999)
    return table, chance


@pytest.mark.parametrize("factors", [(1, 1), (3, 0.2)])
def test_agreement_ignores_lengths_massive_dimensions_and_what_the_personas_share(factors):
    mapped, random, native = (torch.randn(n, 24, dtype=torch.float64) for n in (3, 500, 3))
    native += mapped + 5
    for vectors in (mapped, random, native):
        vectors[:, 7] = 0
    expected, chance = cosines_by_hand(mapped, random, native)
    spike = 1000 * torch.eye(24, dtype=torch.float64)[7]
    scaled = [factors[0] * mapped - spike, random + spike, factors[1] * native]
    scaled[2][0] += spike
    found, found_chance = compare_directions(*scaled, [7])
    assert torch.allclose(found, expected)
    assert found_chance == pytest.approx(chance)
    assert found.diagonal().min() > found_chance > 0
    assert not torch.allclose(compare_directions(*scaled, [])[0], expected, atol=0.1)


def moments_of(X, Y, is_held_out):
    source, target = (CentredLayer.of(H, is_held_out) for H in (X, Y))
    return pair_moments(source, target, source.products(source))


@pytest.mark.parametrize("shift", [0, 100])
def test_moments_equal_those_of_float64(shift):
    """To 1e-4 of what the dimensions' sizes allow, with means of 100 standard deviations."""
    X, is_held_out = torch.randn(900, 5), torch.rand(900) < 0.2
    Y = torch.cat([X[:, :3] / 9 + torch.randn(900, 3), torch.randn(900, 1) * 9], dim=1)
    X, Y = (H + shift * H.std(0) for H in (X, Y))
    originals = X.clone(), Y.clone()
    found = moments_of(X, Y, is_held_out)
    assert torch.equal(X, originals[0])
    assert torch.equal(Y, originals[1])
    X, Y = X.double(), Y.double()
    scale = Y[~is_held_out].square().mean(0).sqrt()
    assert torch.allclose(CentredLayer.of(Y, is_held_out).scale, scale, rtol=1e-5)
    for rows, moments in zip((~is_held_out, is_held_out), found, strict=True):
        x, y = (H[rows] - H[~is_held_out].mean(0) for H in (X, Y))
        sizes = x.norm(dim=0), y.norm(dim=0)
        assert moments.n == len(x)
        assert ((moments.gram - x.T @ x).abs() / torch.outer(sizes[0], sizes[0])).max() < 1e-4
        assert ((moments.cross - x.T @ y).abs() / torch.outer(*sizes)).max() < 1e-4
        assert torch.allclose(moments.target_gram.diagonal(), sizes[1].square(), rtol=1e-4, atol=0)


def test_activations_over_the_memory_bound_are_rejected():
    check_memory(60 * 4096 * 2, 50_000)
    with pytest.raises(InputError, match=r"983 kB a token, 46 GiB for 50000 tokens, .*search_tokens"):
        check_memory(60 * 4096 * 4, 50_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": TEXTS[:8]}, "8 texts of 4 documents, expected 5"),
        ({"source_layers": [0, 4]}, r"layer_idx 4 .*\(0 to 3\)"),
        ({"target_layers": [-1]}, r"layer_idx -1 .*\(0 to 3\)"),
    ],
)
def test_a_search_that_cannot_be_is_rejected_before_any_text_is_read(source, target, options, message):
    before = source.n_tokens
    arguments = {"texts": TEXTS, "personas": PERSONAS, "scored": SCORED, "lambda_values": LAMBDAS, **options}
    with pytest.raises(InputError, match=message):
        search_layers(source, target, **arguments)
    assert source.n_tokens == before


def test_texts_without_pairs_are_rejected(source, word_tokenizer):
    target = ActivationExtractor(tiny_model("gpt2"), word_tokenizer, 0)
    texts = [NeutralText("zebra", str(number)) for number in range(10)]
    with pytest.raises(InputError, match="0 training and 0 held-out pairs"):
        search_layers(source, target, texts, PERSONAS, SCORED, LAMBDAS)


def test_a_constant_target_dimension_is_no_part_of_the_standardised_r2():
    X = torch.randn(300, 5)
    Y = X @ torch.randn(5, 4) + torch.randn(300, 4)
    is_held_out, r2 = torch.arange(300) % 5 == 4, []
    for target in (Y, torch.cat([Y, torch.full((300, 1), 5.7)], dim=1)):
        r2.append(fit_pair(HeldOutFold(*moments_of(X, target, is_held_out)), [1e-3])[2])
    assert r2[1] == pytest.approx(r2[0], abs=1e-6)

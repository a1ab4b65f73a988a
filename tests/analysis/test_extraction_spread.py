import pytest
import torch
from torch.nn.functional import normalize

from analysis.extraction_spread import (
    N_RESAMPLES,
    cosine_spread,
    effect_spread,
    mapped_spread,
    resampled_vectors,
)


def drawn(n, seed=0, d=16):
    """Activations of n texts at two blocks."""
    return torch.randn(n, 2, d, generator=torch.Generator().manual_seed(seed))


def sample(positive, negative, are_pairs=True, seed=0):
    """Return the vectors of all texts, and of the resamples."""
    return resampled_vectors(positive, negative, are_pairs, seed)


def width(spread):
    return spread["high"] - spread["low"]


@pytest.mark.parametrize("are_pairs", [True, False])
def test_resamples_of_equal_texts_do_not_spread(are_pairs):
    whole, found = sample(drawn(1).repeat(9, 1, 1), drawn(1, seed=1).repeat(9, 1, 1), are_pairs)
    assert torch.allclose(found, whole.expand(N_RESAMPLES, -1, -1), atol=1e-6)
    assert cosine_spread(found, whole) == pytest.approx({"median": 1, "low": 1, "high": 1}, abs=1e-6)


def test_more_texts_spread_less():
    spreads = [cosine_spread(*sample(1 + drawn(n), drawn(n, seed=1))[::-1]) for n in (6, 24, 96)]
    assert width(spreads[0]) > 2 * width(spreads[1]) > 4 * width(spreads[2]) > 0
    assert spreads[0]["median"] < spreads[1]["median"] < spreads[2]["median"] < 1


def test_the_texts_of_a_pair_are_drawn_together():
    shared = 5 * drawn(12)
    pairs, apart = (cosine_spread(*sample(shared + 1, shared, together)) for together in (True, False))
    assert width(pairs) == pytest.approx(0, abs=1e-6)
    assert width(apart) > 0.1


def test_a_resample_is_the_difference_of_means_of_its_texts():
    positive, negative = drawn(5), drawn(5, seed=1)
    _, found = sample(positive, negative)
    indices = torch.randint(5, (N_RESAMPLES, 5), generator=torch.Generator().manual_seed(0))
    by_hand = (positive - negative)[indices].mean(1)
    assert torch.allclose(found, normalize(by_hand, dim=-1), atol=1e-5)


def test_models_that_read_the_same_texts_share_their_draws():
    rotation = torch.linalg.qr(drawn(16)[:, 0]).Q
    positive, negative = drawn(8), drawn(8, seed=1)
    source = sample(positive, negative)
    target = sample(positive @ rotation, negative @ rotation)
    other = sample(positive @ rotation, negative @ rotation, seed=1)
    transforms, massive = [lambda v: 3 * v @ rotation] * 2, [[], [3, 5]]
    mapped, same = mapped_spread(source, target, transforms, massive)
    assert torch.allclose(mapped, target[1], atol=1e-5)
    for spread in same.values():
        assert spread == pytest.approx(dict.fromkeys(("all_texts", "median", "low", "high"), 1), abs=1e-5)
    _, apart = mapped_spread(source, other, transforms, massive)
    assert apart["cosine_to_oracle"]["high"] < 0.999
    assert apart["cosine_to_oracle"] != apart["cosine_without_massive"]


def test_an_effect_spreads_by_the_vectors_and_by_the_chance_of_texts():
    shifts, prompts = torch.tensor([0.1, 0.2, 0.6]), torch.rand(12)
    found = effect_spread((shifts[:, None] + prompts).tolist())
    assert found == pytest.approx({"std": shifts.std().item(), "std_sampling": 0, "n_prompts": 12}, abs=1e-6)
    noise = torch.randn(400, 3, 12, generator=torch.Generator().manual_seed(0))
    found = [effect_spread((prompts + each).tolist()) for each in noise]
    by_chance, observed = (
        sum(each[name] ** 2 for each in found) / len(found) for name in ("std_sampling", "std")
    )
    assert observed == pytest.approx(1 / 12, rel=0.1)
    assert by_chance == pytest.approx(1 / 12, rel=0.1)


def test_a_prompt_without_a_score_is_left_out_and_nothing_is_said_of_too_few():
    scores = [[0.1, None, 0.3], [0.2, 0.9, 0.4]]
    assert effect_spread(scores) == effect_spread([[0.1, 0.3], [0.2, 0.4]])
    assert effect_spread([[0.1, None], [0.2, 0.4]]) is None
    assert effect_spread([[0.1, 0.3]]) is None

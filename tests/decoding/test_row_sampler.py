"""The sampler has the distribution of transformers' processors, however large the vocabulary."""

import math
from contextlib import nullcontext

import pytest
import torch
from fake_cuda import fake_cuda
from pairwise import every_pair
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decoding.row_sampler import BLOCK, FIRST_SIZES, MARGIN, NOT_FINITE, RowSampler, row_uniforms
from support.errors import InputError

SETTINGS = [
    (1.0, 0, 1.0),
    (1.5, 10, 1.0),
    (1.0, 0, 0.9),
    (0.8, 20, 0.7),
    (2.0, 0, 0.05),
    (1.0, 1, 1.0),
    (1.0, 50, 0.5),
    (1.3, 40, 0.99),
    (1e-4, 0, 0.9),
    (50.0, 0, 0.95),
]
BELOW_1 = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
# Size of a vocabulary -> rows; the last is so large that blocks serve even the first size without top_k.
SMALL = dict.fromkeys((2, 30, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 5, 300), 50)
SIZES = {**SMALL, 9_000: 20, 40_001: 6, 8 * BLOCK * FIRST_SIZES[0] + 1: 2}
LAYOUTS = {"rows": lambda logits: logits, "columns": lambda logits: logits.T.contiguous().T}

DEVICES = {"cpu": nullcontext, "cuda": fake_cuda}  # the device waits for nothing, and chooses otherwise


def choose(device, settings, logits, uniform):
    with DEVICES[device]():
        return RowSampler(*settings).choose(logits.to(device), uniform).cpu()


def make_logits(kind, n_rows, size):
    generator = torch.Generator().manual_seed(size)
    normal, uniform = (make(n_rows, size, generator=generator) for make in (torch.randn, torch.rand))
    is_left_out = uniform > 0.002
    is_left_out[:, 0] = False
    return {
        "peaked": 4 * normal,
        "flat": 0.01 * normal,
        "heavy tail": -torch.log(1.0 + uniform.argsort(-1)) * 1.05,  # 1 / rank in a random order
        "few finite": (4 * normal).masked_fill(is_left_out, -math.inf),
        "tied": (2 * normal).round(),
    }[kind]


KINDS = ["peaked", "flat", "heavy tail", "few finite", "tied"]


def make_uniforms(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(1))


def warped(scores, temperature, top_k, top_p):
    """The scores that transformers leaves, in the order in which it applies its warpers."""
    limits = TopKLogitsWarper(min(top_k or math.inf, scores.shape[-1])), TopPLogitsWarper(top_p)
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), *limits])(None, scores)


def sorted_choice(logits, uniform, temperature, top_k, top_p):
    """The choice from the whole vocabulary, sorted in float64, and each chosen token's share of [0, 1)."""
    values, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    weights = ((values - values[:, :1]) / temperature).exp()
    if top_k:
        weights[values < values[:, top_k - 1 : top_k]] = 0
    before = weights.cumsum(-1) - weights
    if top_p < 1:
        weights[before >= top_p * weights.sum(-1, keepdim=True)] = 0
    upper = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    place = (upper <= uniform.double()[:, None]).sum(-1, keepdim=True)
    place = place.minimum((weights > 0).sum(-1, keepdim=True) - 1)
    lower = upper - weights / weights.sum(-1, keepdim=True)
    return tokens.gather(1, place)[:, 0], (tokens, lower, upper)


def assert_chosen_as_sorted(chosen, logits, uniform, temperature, top_k, top_p, share_equal=0.9):
    """The same token, but for a number on the border of two to the accuracy of a float32 sum.

    Of tokens that tie on the border of the nucleus, transformers keeps any.
    """
    expected, (tokens, lower, upper) = sorted_choice(logits, uniform, temperature, top_k, top_p)
    place = (tokens == chosen[:, None]).int().argmax(-1, keepdim=True)
    assert (lower.gather(1, place)[:, 0] <= uniform + 1e-6).all()
    assert (upper.gather(1, place)[:, 0] >= uniform - 1e-6).all()
    assert (chosen == expected).double().mean() >= share_equal
    allowed = warped(logits.double(), temperature, top_k, min(1.0, top_p + 1e-6)).isfinite()
    least = logits.double().where(allowed, math.inf).amin(-1)
    assert (logits.double().gather(1, chosen[:, None])[:, 0] >= least).all()


@every_pair(temperature=[0.5, 1.0, 2.0], top_k=[0, 1, 5, 7], top_p=[1.0, 0.9, 0.3], size=[7, 60, 400])
def test_each_token_has_the_probability_that_transformers_leaves_it(temperature, top_k, top_p, size):
    n = 2_000
    scores = 3 * torch.randn(1, size, dtype=torch.float64)
    expected = warped(scores, temperature, top_k, top_p).softmax(-1)[0]
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    chosen = RowSampler(temperature, top_k, top_p).choose(scores.expand(n, -1), uniform)
    frequency = torch.bincount(chosen, minlength=size) / n
    assert (frequency - expected).abs().max() < 1 / n + 1e-6


@every_pair(
    settings=SETTINGS,
    kind=KINDS,
    size=SIZES,
    layout=LAYOUTS,
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    device=DEVICES,
)
def test_partial_selection_chooses_as_sorting_everything_does(settings, kind, size, layout, dtype, device):
    temperature, top_k, top_p = settings[0], min(settings[1], size), settings[2]
    logits, uniform = make_logits(kind, SIZES[size], size).to(dtype), make_uniforms(SIZES[size])
    given = LAYOUTS[layout](logits.clone())
    chosen = choose(device, (temperature, top_k, top_p), given, uniform)
    assert_chosen_as_sorted(chosen, logits.float(), uniform, temperature, top_k, top_p)
    assert torch.equal(given, logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_large", [n + extra for n in FIRST_SIZES for extra in (-1, 0, 1, 300)])
def test_a_nucleus_around_the_first_sizes_is_not_cut(n_large, layout):
    """Of equally likely tokens the u-th part is chosen, in ascending order of id."""
    logits = torch.full((6, 9_000), -5.0)
    large = torch.randperm(9_000)[:n_large].sort().values
    logits[:, large] = 5.0
    uniform = torch.tensor([0.0, 0.3, 0.6, 0.9, 0.999, BELOW_1])
    share = n_large / (n_large + (9_000 - n_large) * math.exp(-10))
    chosen = RowSampler(1.0, 0, 0.99 * share).choose(LAYOUTS[layout](logits), uniform)
    n_kept = math.ceil(0.99 * n_large - 1e-4)
    places = (uniform.double() * n_kept).long()
    assert torch.equal(chosen, large[places])


@every_pair(
    n_tied=[1, 2, MARGIN, MARGIN + 1, MARGIN + 2, 500],
    n_above=[0, 1, 9],
    top_p=[1.0, 0.95, 0.3],
    layout=LAYOUTS,
    device=DEVICES,
)
def test_all_tokens_that_tie_with_the_k_th_are_kept(n_tied, n_above, top_p, layout, device):
    """As bfloat16 makes them tie; transformers keeps them all, more than k."""
    size, top_k = 40_000, 10
    logits, order = torch.full((size,), -3.0), torch.randperm(size)
    n_tied += top_k - 1 - n_above
    logits[order[:n_above]] = 2.0
    logits[order[n_above : n_above + n_tied]] = 0.0
    logits, uniform = logits.expand(40, -1), (torch.arange(40) + 0.5) / 40
    expected, _ = sorted_choice(logits, uniform, 1.0, top_k, top_p)
    chosen = choose(device, (1.0, top_k, top_p), LAYOUTS[layout](logits), uniform)
    assert torch.equal(chosen, expected)


@every_pair(
    size=[3, 50, BLOCK - 1, BLOCK, BLOCK + 1, 1_000, 9_000, 40_001],
    dtype=[torch.float32, torch.bfloat16],
    layout=LAYOUTS,
    limits=[(0, 1.0), (3, 0.5), (1, 0.1)],
)
def test_temperature_0_takes_the_lowest_id_of_the_most_probable(size, dtype, layout, limits):
    logits = torch.randint(0, 4, (20, size)).to(dtype)
    expected = [row.index(max(row)) for row in logits.tolist()]
    for uniform in (torch.zeros(20), torch.rand(20), torch.full((20,), BELOW_1)):
        assert RowSampler(0.0, *limits).choose(LAYOUTS[layout](logits), uniform).tolist() == expected


@every_pair(settings=SETTINGS, uniform=[0.0, 0.9999999, BELOW_1], kind=KINDS, device=DEVICES)
def test_the_ends_of_the_unit_interval_stay_in_the_nucleus(settings, uniform, kind, device):
    logits, uniforms = make_logits(kind, 24, 9_000), torch.full((24,), uniform)
    chosen = choose(device, settings, logits, uniforms)
    # The last tokens share less than the sum is accurate to.
    assert_chosen_as_sorted(chosen, logits, uniforms, *settings, share_equal=float(uniform == 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [*SETTINGS, (0.0, 0, 1.0)])
def test_a_row_is_chosen_without_regard_to_the_others(settings, layout):
    """Though some rows need more of the vocabulary than others."""
    logits = torch.cat([make_logits(kind, 4, 9_000) for kind in KINDS])
    uniform, sampler = make_uniforms(len(logits)), RowSampler(*settings)
    together = sampler.choose(LAYOUTS[layout](logits), uniform)
    order = torch.randperm(len(logits))
    assert torch.equal(sampler.choose(LAYOUTS[layout](logits[order]), uniform[order]), together[order])
    alone = [sampler.choose(LAYOUTS[layout](logits[i : i + 1]), uniform[i : i + 1]) for i in range(20)]
    assert torch.equal(torch.cat(alone), together)


@every_pair(
    place=[0, 5_000, 8_999],
    value=[math.nan, math.inf, -math.inf],
    settings=[(1.0, 50, 1.0), (1.0, 0, 0.9), (0.0, 0, 1.0)],
    layout=LAYOUTS,
    device=DEVICES,
)
def test_a_row_whose_logits_are_not_finite_gets_no_token(place, value, settings, layout, device):
    logits, uniform = make_logits("peaked", 5, 9_000), make_uniforms(5)
    expected = choose(device, settings, logits, uniform)
    logits[3, slice(None) if value == -math.inf else place] = value
    chosen = choose(device, settings, LAYOUTS[layout](logits), uniform)
    assert chosen[3] == NOT_FINITE
    assert torch.equal(chosen[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


OUT_OF_RANGE = {
    "temperature": [-0.1, math.nan, 1e-9, math.inf],
    "top_k": [-1],
    "top_p": [0.0, 1.01, math.nan],
}


@pytest.mark.parametrize("option", OUT_OF_RANGE)
def test_options_out_of_range_are_rejected(option):
    for value in OUT_OF_RANGE[option]:
        with pytest.raises(InputError, match=f"{option} is {value}"):
            RowSampler(**{option: value})


@pytest.mark.parametrize("seed", [0, 3, -1, 2**40])
def test_row_uniforms_depend_on_seed_and_prompt_alone(seed):
    state = torch.get_rng_state()
    first = row_uniforms(seed, "Naïve", 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(row_uniforms(seed, "Naïve", 8), first)
    assert torch.equal(row_uniforms(seed, "Naïve", 5), first[:5])
    others = [row_uniforms(seed + 1, "Naïve", 8), row_uniforms(seed, "naïve", 8), row_uniforms(0, "ve", 8)]
    assert not any((first == other).any() for other in others)


def test_row_uniforms_are_uniform_over_prompts_and_over_seeds():
    """Kolmogorov and Smirnov's distance, and no correlation with the step before."""
    n = 2_000
    for keys in ([(0, f"prompt {i}") for i in range(n)], [(i, "Then") for i in range(n)]):
        drawn = torch.stack([row_uniforms(*key, 41) for key in keys])[:, [0, 1, 39, 40]].double()
        values, steps = drawn.sort(0).values, torch.arange(n, dtype=torch.float64)[:, None] / n
        assert ((values >= 0) & (values < 1)).all()
        distance = torch.maximum((values - steps).abs(), (steps + 1 / n - values).abs())
        assert distance.max() < 1.95 / math.sqrt(n)
        assert (drawn.mean(0) - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / n)
        assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(n)

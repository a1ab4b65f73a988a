"""What runs need on GPUs is computed from sizes that are those of the published models."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cost_model import ASSUMPTIONS, cost_of, shipped_models

from decoding.memory import MOST_ROWS

PUBLISHED = {  # billions of parameters
    "Qwen2.5-1.5B": 1.54,
    "Llama-3.2-1B": 1.24,
    "Qwen2.5-7B": 7.62,
    "Llama-3.1-8B": 8.03,
    "Qwen2.5-72B": 72.7,
    "Llama-3.1-70B": 70.6,
    "Qwen-7B": 7.72,
    "Llama-2-7B": 6.74,
}


@pytest.fixture(scope="module")
def models():
    return shipped_models()


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_parameters_that_are_published(name, models):
    assert models[name].n_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)


def test_host_and_card_take_equally_long_at_the_most_rows_of_a_batch(models):
    llama = models["Llama-3.1-8B"]
    launched = 32 * ASSUMPTIONS.launch
    assert llama.step_seconds(1, 100) == launched
    assert llama.step_seconds(MOST_ROWS, 100) == pytest.approx(launched, rel=0.05)
    assert llama.step_seconds(2 * MOST_ROWS, 100) == pytest.approx(2 * launched, rel=0.05)


def test_a_run_that_fits_no_card_is_shared_and_gains_nothing_from_eight(models, tiny):
    pairs = [("Qwen2.5-1.5B", "Llama-3.2-1B"), ("Qwen2.5-72B", "Llama-3.1-70B")]
    small, large = (cost_of(tiny, tuple(models[name] for name in pair)) for pair in pairs)
    assert small.n_texts == large.n_texts
    assert (small.n_shards, large.n_shards) == (1, 8)
    assert small.weights == pytest.approx(2e9 * (1.54 + 1.24), rel=0.01)
    assert small.rows == MOST_ROWS
    assert small.minutes_on_all < small.minutes < large.minutes == large.minutes_on_all

"""What a row takes in memory is computed from the configuration, as models keep it."""

import pytest
import torch

from decoding.memory import LongestRow, cache_bytes, row_bytes, rows_that_fit
from model_loading import decoder_blocks
from support.tiny_models import ARCHITECTURES, D_MODEL, N_LAYERS, VOCAB_SIZE, tiny_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bytes_of_a_token_are_those_that_a_model_caches(name):
    model = tiny_model(name)
    with torch.inference_mode():
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 3 * cache_bytes(model.config, torch.float32) == kept
    assert 6 * cache_bytes(model.config, torch.bfloat16) == kept


def test_a_row_takes_states_of_what_is_read_logits_and_its_cache():
    config = tiny_model().config
    read = row_bytes(config, torch.bfloat16, LongestRow(10))
    assert read == 10 * 32 * D_MODEL * 2
    assert row_bytes(config, torch.bfloat16, LongestRow(10, 5)) - read == 5 * 4 * VOCAB_SIZE * 2
    cached = row_bytes(config, torch.bfloat16, LongestRow(10, 0, 30)) - read
    assert cached == 30 * 2 * N_LAYERS * 2 * (D_MODEL // 4) * 2  # two of four heads have keys


def test_a_cpu_says_nothing_of_its_memory():
    model = tiny_model()
    assert rows_that_fit(model, decoder_blocks(model), LongestRow(10), 480) is None

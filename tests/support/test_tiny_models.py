"""Tiny models are seeded, of every architecture, and causal; their tokenizer loses nothing."""

import pytest
import torch

from support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tiny_model_is_seeded_and_causal(architecture):
    tokens = torch.tensor([[256, 1, 2, 3], [256, 1, 2, 9]])
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        logits, same, other = (tiny_model(architecture, seed)(tokens).logits for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits, same)
    assert not torch.allclose(logits, other, atol=1e-3)
    assert torch.allclose(logits[0, :3], logits[1, :3], atol=1e-5)
    assert not torch.allclose(logits[0, 3], logits[1, 3], atol=1e-3)


@pytest.mark.parametrize("with_pad", [True, False])
def test_the_tokenizer_gives_back_any_text(with_pad):
    tokenizer, text = tiny_tokenizer(with_pad), "Naïve café, 100 % 🙂\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token is None) is not with_pad

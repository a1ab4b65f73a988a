"""A GGUF file gives the model that it was written from, at the positions that it was trained on."""

import gguf
import numpy as np
import pytest
import torch
from watching import logits

from model_loading import load_model
from support.errors import InputError
from support.package_cache import CACHE_VARIABLE
from support.tiny_models import CONTEXT, D_MODEL, N_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokenizer

HEADS = {"attn_q": 4, "attn_k": 2}
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 64}
FACTORS = [1.0, 1.5, 3.0, 9.0]
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": FACTORS,
    "long_factor": [2.0 * factor for factor in FACTORS],
    "original_max_position_embeddings": 24,
    "attention_factor": 1.2,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def scaled_model(rope):
    return tiny_model(**({"rope_parameters": dict(rope)} if rope else {}))


def llama_3_factors(model):
    """Return by how much each frequency of a Llama 3 model is divided, as llama.cpp's converter does."""
    return (tiny_model().model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).tolist()


def written(path, model, scaling, factors):
    """Write a tiny Llama as llama.cpp's converter does; scaling: further metadata, factors: rope tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    for key, value in scaling.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    vocabulary = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([token if index != 259 else "ab" for token, index in vocabulary])
    writer.add_token_types([1 if index < 256 or index == 259 else 3 for _, index in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(N_LAYERS):
        for ours, theirs in TENSORS.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if heads := HEADS.get(theirs):  # llama.cpp pairs neighbouring dimensions
                halves = weight.reshape(heads, 2, -1, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    for name, values in factors.items():
        writer.add_tensor(f"{name}.weight", np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def scaling_of(method, **more):
    return {f"llama.rope.scaling.{key}": value for key, value in {"type": method, **more}.items()}


@pytest.mark.parametrize(
    ("rope", "scaling", "factors"),
    [
        (None, {}, {}),
        (None, scaling_of("none"), {}),
        (LLAMA_3, {}, {"rope_freqs": None}),
        (LINEAR, scaling_of("linear", factor=4.0), {}),
        (YARN, scaling_of("yarn", factor=4.0, original_context_length=64), {}),
        (
            {**YARN, "beta_fast": 8.0},
            scaling_of("yarn", factor=4.0, original_context_length=64, yarn_beta_fast=8.0),
            {},
        ),
        (
            LONG,
            scaling_of("longrope", original_context_length=24, attn_factor=1.2),
            {"rope_factors_short": FACTORS, "rope_factors_long": LONG["long_factor"]},
        ),
    ],
    ids=["none", "named none", "llama 3", "linear", "yarn", "yarn's own ramp", "longrope"],
)
def test_rope_scaling_is_kept(rope, scaling, factors, tmp_path):
    model = scaled_model(rope)
    factors = {name: values or llama_3_factors(model) for name, values in factors.items()}
    loaded, _ = load_model(written(tmp_path / "m.gguf", model, scaling, factors), "cpu", "float32")
    again, _ = load_model(str(tmp_path / "m.gguf"), "cpu", "float32")
    for length in (20, 40):  # within and beyond the context before scaling
        tokens = torch.arange(20, 20 + length)[None]
        expected = logits(model, tokens)
        assert torch.allclose(logits(loaded, tokens), expected, atol=1e-4)
        assert torch.equal(logits(again, tokens), logits(loaded, tokens))
        assert not rope or not torch.allclose(logits(tiny_model(), tokens), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("scaling", "factors", "message"),
    [
        (scaling_of("yarn", factor=4.0, yarn_ext_factor=0.5), {}, "yarn_ext_factor.*; load the model from"),
        (scaling_of("su", factor=4.0), {}, "not converted .*'su'"),
        (scaling_of("linear", factor=4.0), {"rope_freqs": FACTORS}, "not converted .*'linear'"),
        ({"split.count": 3}, {}, "is one of 3 parts of a model; join them with llama.cpp"),
    ],
    ids=["unknown detail", "unknown method", "two methods", "split"],
)
def test_what_would_be_another_model_is_rejected(scaling, factors, message, tmp_path):
    path = written(tmp_path / "m-00001-of-00003.gguf", tiny_model(), scaling, factors)
    with pytest.raises(InputError, match=message) as raised:
        load_model(path, "cpu")
    assert "m-00001-of-00003.gguf" in str(raised.value)
    assert "\n" not in str(raised.value)

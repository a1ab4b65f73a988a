"""Randomly initialised causal language models of a few thousand weights.

They make exactness checks fast and offline: the self-checks of the components and the
tests use them. The tokenizer has one token for each byte, so any text works.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

N_LAYERS = 4
D_MODEL = 32
CONTEXT = 256
VOCAB_SIZE = 260

_LLAMA_LIKE = {
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_NEOX_LIKE = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8}
_OPT = {key: value for key, value in _NEOX_LIKE.items() if key != "intermediate_size"}
_GPT2_LIKE = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": CONTEXT}
_GPT_NEO = {
    **{"hidden_size": D_MODEL, "num_layers": N_LAYERS, "num_heads": 4, "max_position_embeddings": CONTEXT},
    "attention_types": [[["global", "local"], N_LAYERS // 2]],
}

ARCHITECTURES: dict[str, dict] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "gpt2": _GPT2_LIKE,
    "gpt_neo": _GPT_NEO,
    "gptj": {**_GPT2_LIKE, "rotary_dim": 4},
    "gpt_neox": _NEOX_LIKE,
    "opt": {**_OPT, "word_embed_proj_dim": D_MODEL, "ffn_dim": 64},
    "bloom": {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4},
    "falcon": {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4},
    "mpt": {
        "d_model": D_MODEL,
        "n_layers": N_LAYERS,
        "n_heads": 4,
        "max_seq_len": CONTEXT,
        "expansion_ratio": 2,
    },
    "starcoder2": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": N_LAYERS, "num_experts_per_tok": 2},
}


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: int) -> PreTrainedModel:
    """Return a float32 model of one of ARCHITECTURES in evaluation mode.

    The weights depend on (architecture, seed, overrides) alone; global random state is untouched.
    """
    settings = {**ARCHITECTURES[architecture], "vocab_size": VOCAB_SIZE, **overrides}
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = AutoConfig.for_model(architecture, **settings, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model.float().eval()


def tiny_tokenizer(with_pad: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: ids 0 to 255 are bytes, then <bos>, <eos>, <pad>, <unk>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    specials = ["<bos>", "<eos>", "<pad>", "<unk>"]
    vocabulary |= {symbol: 256 + index for index, symbol in enumerate(specials)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    if with_pad:
        names["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)

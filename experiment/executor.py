"""Load the two models, and do the work on them that comes in chunks (phases 2, 4 and 5).

A run hands chunks to an executor: the local one here, or `ray_executor.RayExecutor`, whose actors hold
a Worker each. What a chunk gives depends on the chunk alone, so both executors give the same.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activation_extractor import ActivationExtractor
from evaluation import continuation_perplexities
from maps.pair_collection import (
    CollectedPairs,
    PairSettings,
    document_folds,
    merge_pairs,
    read_pairs,
)
from model_loading import DTYPES, decoder_blocks, load_model, model_fingerprint, plain_model
from steered_generation import SteeredGenerator
from support.artifacts import fingerprint
from support.errors import InputError
from texts.neutral_text import NeutralText

logger = logging.getLogger(__name__)

EXTRACTION_CHUNK = 500


@dataclass(frozen=True, repr=False)
class Side:
    """One of the two models with what reads it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    extractor: ActivationExtractor
    fingerprint: str

    def at_layer(self, layer_idx: int) -> "Side":
        """Return the same side, whose extractor reads another block."""
        extractor = copy(self.extractor)
        (extractor.layer_idx,) = extractor.check_layers([layer_idx])
        return replace(self, extractor=extractor)


@dataclass(frozen=True)
class SideSettings:
    """How to load a side; see `model_loading.load_model`.

    model_name: what `load_model` takes, a path too.
    layer_idx: the block that its extractor reads; None for the middle one, until a search has chosen.
    expected_fingerprint: of the side as another process has loaded it. loaded: model and tokenizer that are
        loaded already; the others then only say what they are called and where they are read.
    """

    name: str
    model_name: str
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    device_map: str | dict[str, int | str] | None = None
    block_path: str | None = None
    revision: str | None = None
    quantization: str = "none"
    layer_idx: int | None = None
    batch_size: int = 8
    expected_fingerprint: str | None = None
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self) -> Side:
        """Load model and tokenizer.

        Raises InputError as `load_model` and `decoder_blocks` do, or if the model is not the expected one.
        """
        model, tokenizer = self._loaded()
        middle = len(decoder_blocks(model, self.block_path)) // 2
        layer_idx = middle if self.layer_idx is None else self.layer_idx
        extractor = ActivationExtractor(
            model, tokenizer, layer_idx, batch_size=self.batch_size, block_path=self.block_path
        )
        logger.info(
            "%s: %d dimensions, %d blocks, %s on %s",
            self.name,
            extractor.d_model,
            len(extractor.blocks),
            model.dtype,
            model.device,
        )
        cache_key = model_fingerprint(model, tokenizer)
        if self.block_path:
            cache_key = fingerprint(cache_key, self.block_path)
        if self.expected_fingerprint not in (None, cache_key):
            raise InputError(
                f"the {self.name} model {self.model_name} differs between the machines of this run; "
                "give all of them the same files, library versions and dtype"
            )
        return Side(self.name, model, tokenizer, extractor, cache_key)

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.loaded:
            model, tokenizer = self.loaded
            return plain_model(model).eval(), tokenizer
        logger.info("loading the %s model %s", self.name, self.model_name)
        return load_model(
            self.model_name,
            self.device,
            self.dtype,
            self.trust_remote_code,
            self.device_map,
            self.revision,
            self.quantization,
        )


@dataclass(frozen=True)
class WritingSettings:
    """Sampling and steering of a grid; see `SteeredGenerator` and its `generate_batch`.

    layers: where all rows are steered. residual_norms: at each of these, for alpha_unit `residual_norm`.
    side: which model writes.
    """

    layers: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    alpha_unit: str
    residual_norms: tuple[float, ...]
    steer_positions: str
    batch_size: int
    side: str = "target"

    def generator(self, model: Side) -> SteeredGenerator:
        """Return a generator on the model with these settings."""
        return SteeredGenerator(
            model.model,
            model.tokenizer,
            alpha_unit=self.alpha_unit,
            residual_norms=dict(zip(self.layers, self.residual_norms, strict=True)),
            batch_size=self.batch_size,
            block_path=model.extractor.block_path,
            steer_positions=self.steer_positions,
        )


class Worker:
    """Both models, loaded when first used.

    sides: `source` and `target` -> a loaded side or how to load it.
    """

    def __init__(self, sides: Mapping[str, Side | SideSettings]) -> None:
        self._sides = dict(sides)
        self._generators: dict[WritingSettings, SteeredGenerator] = {}
        self._copies: dict[tuple[str, str], PreTrainedModel] = {}

    def side(self, name: str) -> Side:
        """Return a side, loading it first if need be."""
        side = self._sides[name]
        if isinstance(side, SideSettings):
            side = self._sides[name] = side.load()
        return side

    def pairs(
        self, texts: Sequence[NeutralText], settings: PairSettings, fold_of: Mapping[str, int]
    ) -> CollectedPairs:
        """Return sums over the paired activations of some texts; see `pair_collection.read_pairs`."""
        return read_pairs(
            self.side("source").extractor, self.side("target").extractor, texts, settings, fold_of
        )

    def write(
        self, rows: Sequence[Mapping[str, Any]], vectors: Tensor, settings: WritingSettings
    ) -> tuple[list[str], list[bool], int]:
        """Return the continuations of rows, whether each ended by itself, and how many tokens they have.

        rows: with `prompt` as the model reads it, `seed` and `alpha` (None for unsteered).
        vectors: (rows, layers, d_target).
        """
        generator = self._generator(settings)
        n_before = generator.n_tokens
        texts = generator.generate_batch(
            [row["prompt"] for row in rows],
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            [row["seed"] for row in rows],
            steering_vectors={layer: vectors[:, index] for index, layer in enumerate(settings.layers)},
            alphas=[row["alpha"] or 0.0 for row in rows],
        )
        return texts, generator.has_ended, generator.n_tokens - n_before

    def _generator(self, settings: WritingSettings) -> SteeredGenerator:
        """Return the generator of these settings, kept because it remembers a batch size that fits."""
        if settings not in self._generators:
            self._generators[settings] = settings.generator(self.side(settings.side))
        return self._generators[settings]

    def perplexities(
        self,
        prompts: Mapping[str, Sequence[str]],
        outputs: Sequence[str],
        batch_size: int,
        dtype: str | None = None,
    ) -> dict[str, list[float | None]]:
        """Return side -> perplexity of each output.

        prompts: side -> the prompts as it reads them. dtype: in which to score; the model's own by default.
        """
        by_scorer = {}
        for name, of_side in prompts.items():
            side = self.side(name)
            by_scorer[name] = continuation_perplexities(
                self._scoring_model(side, dtype), side.tokenizer, of_side, outputs, batch_size
            )
        return by_scorer

    def plain_perplexities(
        self, texts: Sequence[str], vectors: Tensor, alpha: float, settings: WritingSettings, batch_size: int
    ) -> list[float | None]:
        """Return the perplexity of texts to the target while it is steered.

        vectors: (layers, d_target), each row of unit norm.
        """
        side, generator = self.side(settings.side), self._generator(settings)
        for layer, vector in zip(settings.layers, vectors, strict=True):
            generator.register_steering(layer, vector, alpha)
        try:
            nothing = [""] * len(texts)
            return continuation_perplexities(
                side.model, side.tokenizer, nothing, texts, batch_size, is_steered=True
            )
        finally:
            generator.clear_steering()

    def _scoring_model(self, side: Side, dtype: str | None) -> PreTrainedModel:
        """Return a side's model in a dtype; a copy that is kept, if it is another one."""
        if dtype is None or DTYPES[dtype] == side.model.dtype:
            return side.model
        key = (side.name, dtype)
        if key not in self._copies:
            self._copies[key] = deepcopy(plain_model(side.model)).to(DTYPES[dtype])
        return self._copies[key]


class LocalExecutor:
    """Run chunks one after the other in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(self, method: str, chunks: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        """Yield (chunk index, the worker's method(*chunk)), in order."""
        for index, chunk in enumerate(chunks):
            yield index, getattr(self.worker, method)(*chunk)

    def close(self) -> None:
        """Do nothing; a Ray executor lets its workers go."""


def collect_in_chunks(executor: Any, texts: Sequence[NeutralText], settings: PairSettings) -> CollectedPairs:
    """Return the sums over all texts for every layer pair, read chunk by chunk by the executor's workers.

    Raises InputError: fewer documents than folds, no pair at all, or as `paired_activations`.
    """
    fold_of = document_folds(texts, settings)
    starts = range(0, len(texts), EXTRACTION_CHUNK)
    chunks = [(texts[start : start + EXTRACTION_CHUNK], settings, fold_of) for start in starts]
    started = time.perf_counter()
    with closing(executor.run("pairs", chunks)) as results:
        pairs = merge_pairs(_in_order(results))
    n_tokens = pairs.n_source_tokens + pairs.n_target_tokens
    speed = n_tokens / (time.perf_counter() - started)
    logger.info("%d texts, %d tokens in both models, %.0f tokens/s", pairs.n_texts, n_tokens, speed)
    return pairs


def _in_order(results: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """Yield results in the order of their chunks, as soon as all before them are there."""
    waiting, following = {}, 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def main() -> None:
    """Check on tiny models that chunks give what one chunk gives."""
    from support.tiny_models import D_MODEL, tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model(), tiny_tokenizer()
    target = Side("target", model, tokenizer, ActivationExtractor(model, tokenizer, 1), "target")
    settings = WritingSettings((1,), 8, 1.0, 50, 1.0, "absolute", (1.0,), "all", batch_size=4)
    rows, worker = (
        [{"prompt": f"Text {n}", "seed": n, "alpha": n} for n in (1, 2, 3)],
        Worker({"target": target}),
    )
    parts = [([row], torch.ones(1, 1, D_MODEL), settings) for row in rows]
    written = [text for _, (texts, _, _) in LocalExecutor(worker).run("write", parts) for text in texts]
    assert written == worker.write(rows, torch.ones(3, 1, D_MODEL), settings)[0]
    print(f"workers OK: {len(written)} texts in 3 chunks are the same as in one")


if __name__ == "__main__":
    main()

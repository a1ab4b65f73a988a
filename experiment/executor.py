"""Run work on the two models in chunks (phases 1 to 5), in this process or on the workers of a Ray cluster.

A phase hands chunks to an executor: the local one here, or `ray_executor.RayExecutor`, whose actors hold a
Worker each. What a chunk gives depends on the chunk alone, so both executors give the same.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from activation_extractor import ActivationExtractor
from evaluation import continuation_perplexities
from experiment.config import ExperimentConfig
from experiment.inputs import Inputs
from experiment.models import Side, load_side
from experiment.ray_executor import RayExecutor
from maps.pair_collection import CollectedPairs, PairSettings, document_folds, merge_pairs, read_pairs
from model_loading import DTYPES, PACKAGED_MODELS, plain_model
from steered_generation import Generation, SteeredGenerator
from texts.neutral_text import NeutralText

logger = logging.getLogger(__name__)

EXTRACTION_CHUNK = 500  # texts


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling and steering of many texts; see `SteeredGenerator` and its `generate_batch`.

    layers: where all rows are steered. residual_norms: at each of these, for alpha_unit `residual_norm`.
    side: which model generates.
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
    cuda_graphs: bool = False

    @classmethod
    def of(cls, inputs: Inputs, residual_norms: Sequence[float]) -> "GenerationSettings":
        """Return how the target of a run generates and is steered; residual_norms: at each of its layers."""
        config = inputs.config
        return cls(
            layers=tuple(inputs.target_layers),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            alpha_unit=config.alpha_unit,
            residual_norms=tuple(residual_norms),
            steer_positions=config.steer_positions,
            batch_size=config.generation_batch_size,
            side=inputs.target.name,
            cuda_graphs=config.cuda_graphs,
        )

    def unsteered(self, side: str, max_new_tokens: int) -> "GenerationSettings":
        """Return the same sampling without steering, by another side or of another length."""
        return replace(self, layers=(), residual_norms=(), side=side, max_new_tokens=max_new_tokens)

    def generator(self, side: Side) -> SteeredGenerator:
        """Return a generator on a side's model with these settings."""
        return SteeredGenerator(
            side.model,
            side.tokenizer,
            alpha_unit=self.alpha_unit,
            residual_norms=dict(zip(self.layers, self.residual_norms, strict=True)),
            batch_size=self.batch_size,
            block_path=side.extractor.block_path,
            steer_positions=self.steer_positions,
            cuda_graphs=self.cuda_graphs,
        )


class Worker:
    """Both models, loaded when first used.

    sides: `source` and `target` -> a side, or what loads it.
    """

    def __init__(self, sides: Mapping[str, Side | Callable[[], Side]]) -> None:
        self._sides = dict(sides)
        self._generators: dict[GenerationSettings, SteeredGenerator] = {}
        self._copies: dict[tuple[str, str], PreTrainedModel] = {}
        self._of_seed: tuple[int, Side] | None = None

    def side(self, name: str) -> Side:
        """Return a side, loading it first if need be."""
        side = self._sides[name]
        if not isinstance(side, Side):
            side = self._sides[name] = side()
        return side

    def pairs(
        self, texts: Sequence[NeutralText], settings: PairSettings, fold_of: Mapping[str, int]
    ) -> CollectedPairs:
        """Return sums over the paired activations of some texts; see `pair_collection.read_pairs`."""
        source = (
            self._untrained(settings.untrained) if settings.untrained is not None else self.side("source")
        )
        sides = (side.with_batch_size(settings.batch_size) for side in (source, self.side("target")))
        extractors = [side.extractor for side in sides]
        whole: CollectedPairs | None = None
        for at in range(0, len(texts), EXTRACTION_CHUNK):
            part = texts[at : at + EXTRACTION_CHUNK]
            whole = read_pairs(*extractors, part, settings, fold_of, whole)
        return whole

    def read(self, name: str, *given: Any) -> dict[int, Tensor]:
        """Return what a side's extractor reads; see `ActivationExtractor.read`."""
        return self.side(name).extractor.read(*given)

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """Return function(this worker, *given), of a function that its process can import."""
        return function(self, *given)

    def _untrained(self, seed: int) -> Side:
        """Return the source with random weights; that of one seed is kept."""
        if self._of_seed is None or self._of_seed[0] != seed:
            self._of_seed = None  # one at a time in memory
            self._of_seed = seed, self.side("source").untrained(seed)
        return self._of_seed[1]

    def generate(
        self, rows: Sequence[Mapping[str, Any]], vectors: Tensor, settings: GenerationSettings
    ) -> list[Generation]:
        """Return the generation of each row.

        rows: with `prompt` as the model reads it, `seed` and `alpha` (None for unsteered).
        vectors: (rows, layers, d_target).
        """
        source = self._sides.get("source")
        if settings.side == "target" and isinstance(source, Side) and source.resting:
            source.resting.rest()
        return self._generator(settings).generate_batch(
            [row["prompt"] for row in rows],
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            [row["seed"] for row in rows],
            steering_vectors={layer: vectors[:, index] for index, layer in enumerate(settings.layers)},
            alphas=[row["alpha"] or 0.0 for row in rows],
        )

    def _generator(self, settings: GenerationSettings) -> SteeredGenerator:
        """Return the generator of these settings, kept because a new one may have to try its model."""
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
        found = {}
        for name, shown in prompts.items():
            side = self.side(name)
            model = self._scoring_model(side, dtype)
            found[name] = continuation_perplexities(model, side.tokenizer, shown, outputs, batch_size)
        return found

    def plain_perplexities(
        self,
        texts: Sequence[str],
        vectors: Tensor,
        alpha: float,
        settings: GenerationSettings,
        batch_size: int,
        prompts: Sequence[str] | None = None,
    ) -> list[float | None]:
        """Return the perplexity of texts to the target while it is steered.

        vectors: (layers, d_target), each row of unit norm. prompts: what precedes each text, if anything.
        """
        side, generator = self.side(settings.side), self._generator(settings)
        for layer, vector in zip(settings.layers, vectors, strict=True):
            generator.register_steering(layer, vector, alpha)
        try:
            before = [""] * len(texts) if prompts is None else prompts
            return continuation_perplexities(
                side.model, side.tokenizer, before, texts, batch_size, is_steered=True
            )
        finally:
            generator.clear_steering()

    def _scoring_model(self, side: Side, dtype: str | None) -> PreTrainedModel:
        """Return a side's model in a dtype; on the CPU a copy that is kept, if it is another one."""
        if dtype is None or DTYPES[dtype] == side.model.dtype or side.model.device.type != "cpu":
            return side.model
        key = (side.name, dtype)
        if key not in self._copies:
            self._copies[key] = deepcopy(plain_model(side.model)).to(DTYPES[dtype])
        return self._copies[key]


class LocalExecutor:
    """Run chunks one after the other in this process.

    n_workers, has_gpus: as a Ray executor's, which says of workers elsewhere whether they alone have GPUs.
    """

    n_workers, has_gpus = 1, False

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def run(self, method: str, chunks: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        """Yield (chunk index, the worker's method(*chunk)), in order."""
        for index, chunk in enumerate(chunks):
            yield index, getattr(self.worker, method)(*chunk)

    def close(self) -> None:
        """Do nothing; a Ray executor lets its workers go."""


# `run(method, chunks)` yields (chunk index, Worker.method(*chunk)) as they finish; `close()` ends workers.
Executor = LocalExecutor | RayExecutor


def local_executor(inputs: Inputs) -> LocalExecutor:
    """Return what runs chunks in this process."""
    return LocalExecutor(Worker({side.name: side for side in inputs.sides}))


def start_executor(inputs: Inputs) -> Executor:
    """Return what runs the chunks of the phases: this process, or the workers of a Ray cluster."""
    settings = inputs.config.executor
    if settings.kind == "local":
        return local_executor(inputs)
    sides = {side.name: _loader(inputs.config, side) for side in inputs.sides}
    return RayExecutor(partial(Worker, sides), settings.address, settings.n_workers, settings.gpus_per_worker)


def read_by_workers(inputs: Inputs, executor: Executor) -> Inputs:
    """Return inputs whose models are read by workers, if the workers alone have GPUs."""
    if not executor.has_gpus:
        return inputs
    source, target = (replace(side, extractor=WorkersExtractor(side, executor)) for side in inputs.sides)
    return replace(inputs, source=source, target=target)


class WorkersExtractor(ActivationExtractor):
    """An extractor that tokenises here, and has workers read."""

    def __init__(self, side: Side, executor: RayExecutor) -> None:
        vars(self).update(vars(side.extractor))
        self._name, self._executor = side.name, executor

    def read(
        self, tokens: Sequence[Sequence[int]], token_indices: Sequence[Sequence[int]], *given: Any
    ) -> dict[int, Tensor]:
        """Return what the workers' extractors read, in chunks of texts."""
        layers, reduce, first_index, batch_size = given
        size, chunks = self.batch_size if batch_size is None else batch_size, []
        for start in range(0, len(tokens), EXTRACTION_CHUNK):
            rows = slice(start, start + EXTRACTION_CHUNK)
            of_chunk = tokens[rows], token_indices[rows], layers, reduce, first_index + start, size
            chunks.append((self._name, *of_chunk))
        with closing(self._executor.run("read", chunks)) as results:
            found = list(_in_order(results))
        self.n_tokens += sum(map(len, tokens))
        return {layer: torch.cat([part[layer] for part in found]) for layer in found[0]}


def _loader(config: ExperimentConfig, side: Side) -> Callable[[], Side]:
    """Return what loads the same model in the same dtype in another process, also from another folder."""
    key, path = f"{side.name}_model", Path(side.model_name).expanduser()
    changes = {"dtype": str(side.model.dtype).removeprefix("torch.")}
    if side.model_name not in PACKAGED_MODELS and path.exists():
        changes["name"] = str(path.resolve())
    changed = config.model_copy(update={key: config.place_of(key).model_copy(update=changes)})
    return partial(load_side, changed, side.name, expected_fingerprint=side.fingerprint)


def collect_in_chunks(
    executor: Executor, texts: Sequence[NeutralText], settings: PairSettings
) -> CollectedPairs:
    """Return the sums over all texts for every layer pair, which the executor's workers read and merge.

    Raises InputError: fewer documents than folds, no pair at all, or as `paired_activations`.
    """
    fold_of = document_folds(texts, settings)
    # The sums of a band take gigabytes, so that each worker sends them once.
    size = EXTRACTION_CHUNK * math.ceil(len(texts) / EXTRACTION_CHUNK / executor.n_workers)
    chunks = [(texts[at : at + size], settings, fold_of) for at in range(0, len(texts), size)]
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

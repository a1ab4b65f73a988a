"""Load the two models of a run: each with its tokenizer, its extractor and its fingerprint."""

import logging
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activation_extractor import ActivationExtractor
from experiment.config import ExperimentConfig
from experiment.ray_executor import has_gpus
from model_loading import (
    RestingBlocks,
    decoder_blocks,
    load_model,
    model_fingerprint,
    plain_model,
    resolve_dtype,
    untrained_model,
)
from support.artifacts import fingerprint
from support.errors import InputError

logger = logging.getLogger(__name__)

SIDES = ("source", "target")
LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True, repr=False)
class Side:
    """One of the two models with what reads it.

    name: `source` or `target`. model_name: what the configuration calls the model. resting: what moves its
        blocks to the host while the other one writes, if they are to.
    """

    name: str
    model_name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    extractor: ActivationExtractor
    fingerprint: str
    resting: RestingBlocks | None = None

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.extractor.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.extractor.d_model

    @property
    def shape(self) -> tuple[str, int, int]:
        """Type, width and number of blocks, in which a fine-tuned model is as its base."""
        return self.description["model_type"], self.d_model, self.n_blocks

    @property
    def description(self) -> dict[str, Any]:
        """Name, type, blocks, width and fingerprint, for a reader who finds a vector without its run."""
        return {
            "name": self.model_name,
            "model_type": self.model.config.get_text_config().model_type.removesuffix("_text"),
            "n_blocks": self.n_blocks,
            "d_model": self.d_model,
            "fingerprint": self.fingerprint,
        }

    def at_layer(self, layer_idx: int) -> "Side":
        """Return the same side, whose extractor reads another block."""
        extractor = copy(self.extractor)
        (extractor.layer_idx,) = extractor.check_layers([layer_idx])
        return replace(self, extractor=extractor)

    def with_batch_size(self, batch_size: int) -> "Side":
        """Return the same side, whose extractor reads this many texts at a time."""
        extractor = copy(self.extractor)
        extractor.batch_size = batch_size
        return replace(self, extractor=extractor)

    def untrained(self, seed: int) -> "Side":
        """Return the side of a model with random weights in the place of the trained ones."""
        model, own = untrained_model(self.model, seed), self.extractor
        return replace(
            self,
            model_name=f"untrained {self.model_name}",
            model=model,
            extractor=ActivationExtractor(
                model, self.tokenizer, own.layer_idx, batch_size=own.batch_size, block_path=own.block_path
            ),
            fingerprint=fingerprint(self.fingerprint, "untrained", seed),
            resting=None,
        )


def on_driver(config: ExperimentConfig) -> ExperimentConfig:
    """Return the configuration by which the process that you start loads source and target.

    Where workers of a Ray cluster have the GPUs, it takes none: its models are on the CPU, in the dtype that
    `auto` and `fastest` are on a worker.
    """
    if config.executor.kind == "local" or not has_gpus(config.executor.address):
        return config
    places = {}
    for key in (f"{side}_model" for side in SIDES):
        place = config.place_of(key)
        device = torch.device("cpu" if place.device == "cpu" else "cuda")
        dtype = str(resolve_dtype(place.dtype, device)).removeprefix("torch.")
        own = {"device": "cpu", "device_map": None, "dtype": dtype, "offload": False}
        places[key] = place.model_copy(update=own)
    return config.model_copy(update=places)


def load_side(
    config: ExperimentConfig,
    name: str,
    loaded: LoadedModel | None = None,
    expected_fingerprint: str | None = None,
) -> Side:
    """Load the model of a side; its extractor reads the middle block until a layer is chosen.

    name: `source` or `target`. loaded: model and tokenizer that need not be loaded.
    expected_fingerprint: of the side as another process has loaded it.
    Raises InputError as `load_model` and `decoder_blocks` do, or if the model is not the expected one.
    """
    place, block_path = config.place_of(f"{name}_model"), getattr(config, f"{name}_block_path")
    if loaded is None:
        logger.info("loading the %s model %s", name, place.name)
        model, tokenizer = load_model(
            place.name,
            place.device,
            place.dtype,
            config.trust_remote_code,
            place.device_map,
            getattr(config, f"{name}_revision"),
            place.quantization,
        )
    else:
        model, tokenizer = plain_model(loaded[0]).eval(), loaded[1]
    middle, size = len(decoder_blocks(model, block_path)) // 2, config.with_rows().extraction_batch_size
    extractor = ActivationExtractor(model, tokenizer, middle, batch_size=size, block_path=block_path)
    found = model_fingerprint(model, tokenizer)
    if block_path:
        found = fingerprint(found, block_path)
    if expected_fingerprint not in (None, found):
        raise InputError(
            f"the {name} model {place.name} differs between the machines of this run; "
            "give all of them the same files, library versions and dtype"
        )
    resting = RestingBlocks(extractor.blocks) if place.offload else None
    side = Side(name, place.name, model, tokenizer, extractor, found, resting)
    shape = f"{side.d_model} dimensions, {side.n_blocks} blocks"
    logger.info("%s: %s, %s on %s", name, shape, model.dtype, model.device)
    return side

"""Load the two models of a run: each with its tokenizer, its extractor and its fingerprint."""

import logging
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activation_extractor import ActivationExtractor
from experiment.config import ExperimentConfig
from model_loading import decoder_blocks, load_model, model_fingerprint, plain_model
from support.artifacts import fingerprint
from support.errors import InputError

logger = logging.getLogger(__name__)

SIDES = ("source", "target")
LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True, repr=False)
class Side:
    """One of the two models with what reads it.

    name: `source` or `target`. model_name: what the configuration calls the model.
    """

    name: str
    model_name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    extractor: ActivationExtractor
    fingerprint: str

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.extractor.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.extractor.d_model

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


@dataclass(frozen=True)
class SideSettings:
    """How to load a side; see `model_loading.load_model`.

    expected_fingerprint: of the side as another process has loaded it. loaded: model and tokenizer that are
        loaded already; then the other settings only name and read them.
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
    batch_size: int = 8
    expected_fingerprint: str | None = None
    loaded: LoadedModel | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, name: str, loaded: LoadedModel | None = None) -> "SideSettings":
        """Return how a configuration's `source` or `target` is loaded."""
        return cls(
            name,
            getattr(config, f"{name}_model"),
            config.device,
            config.dtype,
            config.trust_remote_code,
            config.device_map,
            getattr(config, f"{name}_block_path"),
            getattr(config, f"{name}_revision"),
            config.quantization,
            config.extraction_batch_size,
            loaded=loaded,
        )

    def load(self) -> Side:
        """Load model and tokenizer; the extractor reads the middle block until a layer is chosen.

        Raises InputError as `load_model` and `decoder_blocks` do, or if the model is not the expected one.
        """
        model, tokenizer = self._loaded()
        middle = len(decoder_blocks(model, self.block_path)) // 2
        extractor = ActivationExtractor(
            model, tokenizer, middle, batch_size=self.batch_size, block_path=self.block_path
        )
        logger.info(
            "%s: %d dimensions, %d blocks, %s on %s",
            self.name,
            extractor.d_model,
            len(extractor.blocks),
            model.dtype,
            model.device,
        )
        found = model_fingerprint(model, tokenizer)
        if self.block_path:
            found = fingerprint(found, self.block_path)
        if self.expected_fingerprint not in (None, found):
            raise InputError(
                f"the {self.name} model {self.model_name} differs between the machines of this run; "
                "give all of them the same files, library versions and dtype"
            )
        return Side(self.name, self.model_name, model, tokenizer, extractor, found)

    def _loaded(self) -> LoadedModel:
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

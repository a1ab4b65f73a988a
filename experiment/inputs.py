"""What a run reads: texts, personas, both models, scorers. Immutable; the cheap is loaded first.

The configuration is known here, in `grid`, `development`, `ablations`, `dry_run` and the orchestrator; the
components below take plain arguments.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activation_extractor import PersonaVector
from experiment.config import ExperimentConfig
from experiment.layer_search import check_memory
from experiment.ray_executor import RayExecutor
from experiment.workers import LocalExecutor, Side, SideSettings, Worker, WritingSettings
from model_loading import PACKAGED_MODELS
from scoring.gpt_judge import GPTJudge
from scoring.trait_classifier import TraitClassifier, check_labelled, train_trait_classifiers
from steered_generation import SteeredGenerator
from support.errors import InputError
from texts.aligned_positions import check_offsets
from texts.encoding import encode
from texts.neutral_text import NeutralText, OverlapCheck, load_neutral_texts
from texts.personas import Persona, load_persona, load_prompts, shipped_personas

logger = logging.getLogger(__name__)

NativeVectors = dict[str, dict[str, PersonaVector]]


@dataclass(frozen=True)
class Inputs:
    """Everything that the phases read; nothing in it changes.

    labelled_personas: those to run and every other shipped one, whose texts are negatives.
    neutral_texts: for the map; none overlaps a persona text or a prompt.
    source, target: their extractors read the layers of the run.
    train: returns the trait classifiers, trained at the first call.
    """

    config: ExperimentConfig
    personas: tuple[Persona, ...]
    labelled_personas: tuple[Persona, ...]
    prompts: tuple[str, ...]
    development_prompts: tuple[str, ...]
    neutral_texts: tuple[NeutralText, ...]
    source: Side
    target: Side
    judge: GPTJudge | None
    train: Callable[[], dict[str, TraitClassifier]]

    @property
    def layers(self) -> tuple[int, int]:
        """(source layer, target layer)."""
        return self.source.extractor.layer_idx, self.target.extractor.layer_idx

    @property
    def sides(self) -> tuple[Side, Side]:
        """Source and target."""
        return self.source, self.target

    @property
    def classifiers(self) -> dict[str, TraitClassifier]:
        """A trait classifier for each persona with labelled texts."""
        return self.train()

    @property
    def independent(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        """The model that scores the target's text, if one is wanted."""
        source = (self.source.model, self.source.tokenizer)
        return source if self.config.independent_perplexity else None

    @property
    def perplexity_scorer(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The independent model, else the target itself."""
        return self.independent or (self.target.model, self.target.tokenizer)

    def at_layers(self, source_layer: int, target_layer: int) -> "Inputs":
        """Return the same inputs, read at other layers."""
        return replace(
            self, source=self.source.at_layer(source_layer), target=self.target.at_layer(target_layer)
        )

    def more_texts(self, n_texts: int) -> list[NeutralText]:
        """Return n_texts passages of neutral text; the first ones are `neutral_texts`."""
        return _neutral_texts(self.config, self.personas, self.prompts, n_texts)

    def search_texts(self) -> list[NeutralText]:
        """Return the first neutral texts that hold `search_tokens` source tokens, or all of them."""
        n_tokens, texts = 0, []
        for item in self.neutral_texts:
            texts.append(item)
            n_tokens += len(encode(self.source.tokenizer, [item.text])[0])
            if n_tokens >= self.config.search_tokens:
                break
        return texts

    def native_vectors(self) -> NativeVectors:
        """Measure each side's own vector of each persona; side name -> persona -> vector."""
        position = self.config.persona_position
        return {
            side.name: {
                persona.name: side.extractor.measure_persona_vector(
                    persona.positive_texts, persona.negative_texts, position
                )
                for persona in self.personas
            }
            for side in self.sides
        }

    def neutral_activations(self, n_texts: int) -> Tensor:
        """Return the target's activations at the positions from which the map learns, (n, d_target)."""
        extractor = self.target.extractor
        texts = [item.text for item in self.neutral_texts[:n_texts]]
        tokens, ends = extractor.token_ends(texts, self.config.positions)
        positions = [list(by_character.values()) for by_character in ends]
        return extractor.extract_tokens(tokens, positions, [extractor.layer_idx])[extractor.layer_idx]

    def writing_settings(self, residual_norm: float) -> WritingSettings:
        """Return how the target writes and is steered; residual_norm: at its layer."""
        config = self.config
        return WritingSettings(
            layer_idx=self.layers[1],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            alpha_unit=config.alpha_unit,
            residual_norm=residual_norm,
            steer_positions=config.steer_positions,
            batch_size=config.generation_batch_size,
        )

    def generator(self, residual_norm: float = 1.0) -> SteeredGenerator:
        """Return a generator on the target with the run's settings."""
        return self.writing_settings(residual_norm).generator(self.target)


def read_personas_and_prompts(config: ExperimentConfig) -> tuple[tuple[Persona, ...], tuple[str, ...]]:
    """Return the personas to run and the test prompts.

    Raises InputError: a persona or prompt that cannot be used, or a prompt that occurs in persona texts,
    which would leak into the test.
    """
    personas, prompts = tuple(config.load_personas()), tuple(config.load_test_prompts())
    overlaps = OverlapCheck(prompts)
    for persona in personas:
        leaking = [text for text in persona.all_texts if overlaps.found_in(text)]
        if leaking:
            raise InputError(
                f"persona {persona.name!r} has {len(leaking)} texts that share words with a test prompt "
                f"({leaking[0][:50]!r}); change the text or the prompt"
            )
    check_labelled(personas)
    return personas, prompts


def load_inputs(config: ExperimentConfig) -> Inputs:
    """Load texts, then models, and check what a later phase would refuse, before anything is written.

    Raises InputError for whatever cannot be used; of texts before a model is loaded.
    """
    personas, prompts = read_personas_and_prompts(config)
    judge = (
        GPTJudge(**config.judge.model_dump(exclude={"usd_per_million_tokens"})) if config.use_gpt4 else None
    )
    texts = tuple(_neutral_texts(config, personas, prompts, config.n_training_samples))
    n_documents = len({item.document for item in texts})
    if n_documents < config.n_folds:
        raise InputError(
            f"n_folds is {config.n_folds} but the neutral texts come from {n_documents} documents, "
            "which folds never split; lower n_folds or raise n_training_samples"
        )
    others = [name for name in shipped_personas() if name not in config.persona_names]
    labelled = (*personas, *map(load_persona, others))
    source, target = (side_settings(config, name).load() for name in ("source", "target"))
    train = cache(partial(_train_classifiers, config.persona_names, labelled))
    development = tuple(load_prompts("development"))
    inputs = Inputs(config, personas, labelled, prompts, development, texts, source, target, judge, train)
    _check_models(inputs)
    return inputs


def _check_models(inputs: Inputs) -> None:
    config = inputs.config
    widths = []
    for side in inputs.sides:
        logger.debug("%s: %s", side.name, side.fingerprint)
        if config.positions == "word_ends":
            check_offsets(side.tokenizer, side.name)
        if config.layers is None:
            extractor = side.extractor
            wanted = getattr(config, f"search_{side.name}_layers") or range(len(extractor.blocks))
            widths.append(dict.fromkeys(extractor.check_layers(wanted), extractor.d_model))
    if widths:
        check_memory(*widths)
    generator = inputs.generator()
    generator.tokenise_prompts([*inputs.prompts, *inputs.development_prompts], config.max_new_tokens)
    generator.sampler(config.temperature, config.top_k, config.top_p)


def _neutral_texts(
    config: ExperimentConfig, personas: Sequence[Persona], prompts: Sequence[str], n_texts: int
) -> list[NeutralText]:
    forbidden = [text for persona in personas for text in persona.all_texts]
    forbidden += [*prompts, *load_prompts("development")]
    return load_neutral_texts(config.neutral_text, n_texts, forbidden, config.seed)


def _train_classifiers(names: list[str], labelled: Sequence[Persona]) -> dict[str, TraitClassifier]:
    classifiers = train_trait_classifiers(names, list(labelled))
    for name, classifier in classifiers.items():
        logger.info(
            "trait classifier %s: AUC %.3f (%d positive, %d negative texts)",
            name,
            classifier.auc,
            classifier.n_positive,
            classifier.n_negative,
        )
    return classifiers


def side_settings(config: ExperimentConfig, name: str) -> SideSettings:
    """Return how to load a side, `source` or `target`."""
    return SideSettings(
        name,
        getattr(config, f"{name}_model"),
        config.device,
        config.dtype,
        config.trust_remote_code,
        config.device_map,
        getattr(config, f"{name}_block_path"),
        getattr(config, f"{name}_revision"),
        config.quantization,
        config.layers[name == "target"] if config.layers else None,
        config.extraction_batch_size,
    )


def start_executor(inputs: Inputs) -> LocalExecutor | RayExecutor:
    """Return what runs the chunks of the phases: this process, or the workers of a Ray cluster."""
    settings = inputs.config.executor
    if settings.kind == "local":
        return LocalExecutor(Worker({side.name: side for side in inputs.sides}))
    sides: dict[str, Any] = {side.name: _remote_settings(inputs.config, side) for side in inputs.sides}
    return RayExecutor(partial(Worker, sides), settings.address, settings.n_workers)


def _remote_settings(config: ExperimentConfig, side: Side) -> SideSettings:
    """Return how a worker elsewhere loads the same model in the same dtype as this process."""
    settings = side_settings(config, side.name)
    path = Path(settings.model_name).expanduser()
    if settings.model_name not in PACKAGED_MODELS and path.exists():
        settings = replace(settings, model_name=str(path.resolve()))
    dtype = str(side.model.dtype).removeprefix("torch.")
    return replace(settings, dtype=dtype, expected_fingerprint=side.fingerprint)

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

LayerPair = tuple[int, int]
BAND_DEPTHS, BAND_SIZE = (0.25, 0.75), 9
NativeVectors = dict[str, dict[str, PersonaVector]]


@dataclass(frozen=True)
class Inputs:
    """Everything that the phases read; nothing in it changes.

    labelled_personas: those to run and every other shipped one, whose texts are negatives.
    neutral_texts: for the map; none overlaps a persona text or a prompt.
    source, target: their extractors read the layers of the run, of a band those of its middle pair.
    band: (source layer, target layer) of each pair, if the run steers several blocks; in order of the target.
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
    band: tuple[LayerPair, ...] = ()

    @property
    def layers(self) -> LayerPair:
        """(source layer, target layer), of a band those of its middle pair."""
        return self.source.extractor.layer_idx, self.target.extractor.layer_idx

    @property
    def layer_pairs(self) -> tuple[LayerPair, ...]:
        """(source layer, target layer) of everything that is steered: one pair, or those of a band."""
        return self.band or (self.layers,)

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
        """Return the same inputs, read and steered at one pair of layers."""
        source, target = self.source.at_layer(source_layer), self.target.at_layer(target_layer)
        return replace(self, source=source, target=target, band=())

    def at_band(self, pairs: Sequence[LayerPair]) -> "Inputs":
        """Return the same inputs, read and steered at several pairs; at one, it is no band.

        Raises InputError: a layer that a model lacks.
        """
        for source_layer, target_layer in pairs:
            self.source.extractor.check_layers([source_layer])
            self.target.extractor.check_layers([target_layer])
        ordered = sorted(pairs, key=lambda pair: pair[1])
        middle = self.at_layers(*ordered[len(ordered) // 2])
        return replace(middle, band=tuple(ordered)) if len(ordered) > 1 else middle

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

    def native_vectors(self) -> list[NativeVectors]:
        """Measure each side's own vectors; for each layer pair, side name -> persona -> vector."""
        position = self.config.persona_position
        measured = {}
        for number, side in enumerate(self.sides):
            wanted = [pair[number] for pair in self.layer_pairs]
            for persona in self.personas:
                texts = (persona.positive_texts, persona.negative_texts)
                vectors = side.extractor.measure_persona_vectors(*texts, wanted, position)
                measured[side.name, persona.name] = [vectors[layer] for layer in wanted]
        return [
            {
                side.name: {
                    persona.name: measured[side.name, persona.name][index] for persona in self.personas
                }
                for side in self.sides
            }
            for index in range(len(self.layer_pairs))
        ]

    def neutral_activations(self, n_texts: int) -> list[Tensor]:
        """Return the target's activations where the map learns, (n, d_target) for each layer pair."""
        extractor, layers = self.target.extractor, [pair[1] for pair in self.layer_pairs]
        texts = [item.text for item in self.neutral_texts[:n_texts]]
        tokens, ends = extractor.token_ends(texts, self.config.positions)
        positions = [list(by_character.values()) for by_character in ends]
        by_layer = extractor.extract_tokens(tokens, positions, layers)
        return [by_layer[layer] for layer in layers]

    def writing_settings(self, residual_norms: Sequence[float]) -> WritingSettings:
        """Return how the target writes and is steered; residual_norms: at each of its layers."""
        config = self.config
        return WritingSettings(
            layers=tuple(pair[1] for pair in self.layer_pairs),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            alpha_unit=config.alpha_unit,
            residual_norms=tuple(residual_norms),
            steer_positions=config.steer_positions,
            batch_size=config.generation_batch_size,
        )

    def generator(self, residual_norms: Sequence[float] | None = None) -> SteeredGenerator:
        """Return a generator on the target with the run's settings; residual_norms: 1 if not given."""
        norms = [1.0] * len(self.layer_pairs) if residual_norms is None else residual_norms
        return self.writing_settings(norms).generator(self.target)


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
    if config.layers == "band":
        inputs = inputs.at_band(band_of(len(source.extractor.blocks), len(target.extractor.blocks)))
    elif config.layer_pairs is not None:
        inputs = inputs.at_band(config.layer_pairs)
    _check_models(inputs)
    return inputs


def _check_models(inputs: Inputs) -> None:
    config = inputs.config
    widths = []
    for side in inputs.sides:
        logger.debug("%s: %s", side.name, side.fingerprint)
        if config.positions == "word_ends":
            check_offsets(side.tokenizer, side.name)
        if config.layer_idx == "auto":
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


def band_of(n_source: int, n_target: int) -> list[LayerPair]:
    """Return the blocks of a band: up to nine of the target's middle half, each with the source's as deep.

    Depth counts the blocks that a residual stream has passed: of block t, (t + 1) / n_target.
    Raises InputError: a model with fewer than four blocks.
    """
    if min(n_source, n_target) < 4:
        raise InputError(
            f"a band needs models of four blocks or more, the source has {n_source} and the target "
            f"{n_target}; name layer_idx"
        )
    low, high = BAND_DEPTHS
    inside = [layer for layer in range(n_target) if low <= (layer + 1) / n_target <= high]
    n = min(len(inside), BAND_SIZE)
    chosen = [inside[round(index * (len(inside) - 1) / max(1, n - 1))] for index in range(n)]
    return [(max(0, round((layer + 1) * n_source / n_target) - 1), layer) for layer in chosen]


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
        config.layer_pairs[0][name == "target"] if config.layer_pairs else None,
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

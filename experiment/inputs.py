"""What a run reads: texts, personas, both models, scorers. Immutable; the cheap is loaded first.

The configuration is known here, in `grid`, `development`, `ablations`, `dry_run` and the orchestrator; the
components below take plain arguments.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activation_extractor import PersonaVector, ReadText
from experiment.config import ExperimentConfig, load_config
from experiment.executor import LocalExecutor, Side, SideSettings, Worker, WritingSettings
from experiment.ray_executor import RayExecutor
from maps.layer_search import check_memory
from model_loading import PACKAGED_MODELS, fastest_dtype, plain_model
from scoring.gpt_judge import GPTJudge
from scoring.likelihood_ratio import LikelihoodRatio, load_likelihood_ratios
from scoring.local_judge import LocalJudge
from scoring.trait_classifier import TraitClassifier, check_labelled, load_trait_classifiers
from steered_generation import SteeredGenerator
from support.errors import InputError
from support.text_files import local_path
from support.vector_files import VectorFile, read_vectors
from texts.aligned_positions import check_offsets
from texts.chat import plain_text, prompt_text, question, resolve_format
from texts.encoding import encode
from texts.neutral_text import NeutralText, OverlapCheck, load_neutral_texts
from texts.personas import Persona, load_persona, load_prompts, shipped_personas

logger = logging.getLogger(__name__)

LayerPair = tuple[int, int]
BAND_DEPTHS, BAND_SIZE = (0.25, 0.75), 9
N_PLAIN_TEXTS = 16  # passages on which it is measured what steering costs in plain text
LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]
NativeVectors = dict[str, dict[str, PersonaVector]]
# persona -> (question, answer) of its positive answers, and of its negative ones.
Responses = Mapping[str, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]]


@dataclass(frozen=True, repr=False)
class Inputs:
    """Everything that the phases read; nothing in it changes.

    labelled_personas: those to run and every other shipped one, whose texts are negatives.
    neutral_texts: passages, for the map and for what plain text costs; none overlaps a persona text or a
        prompt.
    neutral_questions, neutral_responses: for the map, if it is learnt from answers to questions without any
        trait; the answers are there once `answers.with_responses` has had them written.
    neutral_styles: system prompts, none a persona's, under which these are written in turn, if they are.
    source, target: their extractors read the layers of the run, of a band those of its middle pair.
    band: (source layer, target layer) of each pair, if the run steers several blocks; in order of the target.
    train, train_ratios: return the scorers of traits, trained at the first call.
    chat_sides: names of the sides that are shown prompts in a chat template.
    answers: side -> what its persona vectors are made from, if they are made from responses.
    given: (side, persona) -> file of vectors that are taken as they are.
    """

    config: ExperimentConfig
    personas: tuple[Persona, ...]
    labelled_personas: tuple[Persona, ...]
    prompts: tuple[str, ...]
    development_prompts: tuple[str, ...]
    neutral_texts: tuple[NeutralText, ...]
    source: Side
    target: Side
    judge: GPTJudge | LocalJudge | None
    train: Callable[[], dict[str, TraitClassifier]]
    band: tuple[LayerPair, ...] = ()
    chat_sides: tuple[str, ...] = ()
    answers: Mapping[str, Responses] = field(default_factory=dict)
    train_ratios: Callable[[], dict[str, LikelihoodRatio]] = dict
    given: Mapping[tuple[str, str], VectorFile] = field(default_factory=dict)
    neutral_questions: tuple[str, ...] = ()
    neutral_responses: tuple[NeutralText, ...] = ()
    neutral_styles: tuple[str, ...] = ()

    @property
    def map_texts(self) -> tuple[NeutralText, ...]:
        """The texts that the map is learnt from, and the unit of alpha measured on."""
        return self.neutral_responses if self.neutral_questions else self.neutral_texts

    @property
    def map_documents(self) -> str:
        """What these come from, each of them in one fold."""
        return "questions" if self.neutral_questions else "documents"

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
    def likelihood_ratios(self) -> dict[str, LikelihoodRatio]:
        """The second scorer of each persona with labelled texts, unless the configuration leaves it out."""
        return self.train_ratios()

    @property
    def independent(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        """The model that scores the target's text, if one is wanted."""
        source = (self.source.model, self.source.tokenizer)
        return source if self.config.independent_perplexity else None

    @property
    def evaluation_dtype(self) -> str | None:
        """The dtype in which texts are scored, None for the models' own; `auto` is this machine's fastest."""
        wanted = self.config.evaluation_dtype
        if wanted != "auto":
            return wanted
        model = self.target.model
        fastest = fastest_dtype(model.device, model.dtype)
        return None if fastest == model.dtype else str(fastest).removeprefix("torch.")

    @property
    def perplexity_scorer(self) -> Side:
        """The side whose model scores fluency: the independent one, else the target itself."""
        return self.source if self.config.independent_perplexity else self.target

    @property
    def described_models(self) -> dict[str, dict[str, Any]]:
        """Side -> name, type, blocks, width and fingerprint of its model, for who meets a vector alone."""
        return {
            side.name: {
                "name": getattr(self.config, f"{side.name}_model"),
                "model_type": side.model.config.get_text_config().model_type.removesuffix("_text"),
                "n_blocks": len(side.extractor.blocks),
                "d_model": side.extractor.d_model,
                "fingerprint": side.fingerprint,
            }
            for side in self.sides
        }

    def side(self, name: str) -> Side:
        """Return the side of this name."""
        return {side.name: side for side in self.sides}[name]

    @property
    def asks_questions(self) -> bool:
        """Whether prompts are questions to a chat model, or else beginnings of texts."""
        return "target" in self.chat_sides

    def shown_prompt(self, side: str, prompt: str) -> str:
        """Return a prompt of the grid as a side's model reads it, which may have a chat template."""
        return self.shown_question(side, prompt, self.config.system_prompt) if self.asks_questions else prompt

    def render_prompt(self, side: str, prompt: str, method: str, persona: str | None) -> str:
        """Return a prompt as it is shown under a method: `prompted` asks for the persona in words."""
        if method != "prompted":
            return self.shown_prompt(side, prompt)
        (asked,) = [each for each in self.personas if each.name == persona]
        if not self.asks_questions:
            return f"{asked.description or f'The text is {asked.name}.'}\n\n{prompt}"
        instruction = (
            asked.instructions[0][0]
            if asked.instructions
            else f"Answer in this style. {asked.description or asked.name}"
        )
        return self.shown_question(side, prompt, self.with_instruction(instruction))

    def with_instruction(self, instruction: str | None) -> str | None:
        """Return the run's system prompt with an instruction after it."""
        return "\n\n".join(filter(None, [self.config.system_prompt, instruction])) or None

    def shown_question(self, side: str, text: str, system_prompt: str | None = None) -> str:
        """Return a question as a side's model reads it: in its chat template, else as plain text."""
        messages = question(text, system_prompt)
        return (
            prompt_text(self.side(side).tokenizer, messages)
            if side in self.chat_sides
            else plain_text(messages)
        )

    @property
    def answering(self) -> list[str]:
        """Names of the personas whose vectors are made from answers."""
        sides = [side.name for side in self.sides]
        return [
            name
            for name in self.config.persona_names
            if self.config.kind_of(name) == "responses"
            and any((side, name) not in self.given for side in sides)
        ]

    @property
    def writers(self) -> dict[str, str]:
        """Side -> the side whose answers its persona vectors are made from: its own, if it can be asked."""
        return {
            side.name: side.name if side.name in self.chat_sides else self.default_responder
            for side in self.sides
        }

    @property
    def default_responder(self) -> str:
        """The side that is asked for answers that both read: the target, if it can be asked."""
        return "target" if "target" in self.chat_sides else "source"

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
        return _neutral_texts(self.config, self.personas, n_texts)

    def search_texts(self) -> list[NeutralText]:
        """Return the first neutral texts that hold `search_tokens` source tokens, or all of them."""
        n_tokens, texts = 0, []
        for item in self.neutral_texts:
            texts.append(item)
            n_tokens += len(encode(self.source.tokenizer, [item.text])[0])
            if n_tokens >= self.config.search_tokens:
                break
        return texts

    @cached_property
    def native_vectors(self) -> list[NativeVectors]:
        """For each layer pair, side name -> persona -> its own vector; measured on first use."""
        measured = {}
        for number, side in enumerate(self.sides):
            wanted = [pair[number] for pair in self.layer_pairs]
            for persona in self.personas:
                if file := self.given.get((side.name, persona.name)):
                    measured[side.name, persona.name] = [
                        self.given_vector(side, file, layer) for layer in wanted
                    ]
                    continue
                texts, position = self._extracted(side.name, persona)
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

    def given_vector(self, side: Side, file: VectorFile, layer: int) -> PersonaVector:
        """Return a file's vector for a side's layer. Raises InputError: one that does not fit the model."""
        described = self.described_models[side.name]
        vector = file.at(layer, described["n_blocks"], described["d_model"], described["model_type"])
        norm = vector.norm().item()
        if norm == 0:
            raise InputError(f"{file.path} holds a vector of zeros for layer {layer}; it has no direction")
        return PersonaVector(vector / norm, norm, None, 0, 0)

    def _extracted(self, side: str, persona: Persona) -> tuple[Sequence[Sequence[ReadText]], str]:
        """Return the positive and negative texts or answers of a persona, and where they are read."""
        if persona.name not in self.answering:
            return (persona.positive_texts, persona.negative_texts), self.config.persona_position
        by_sign = self.answers[side][persona.name]
        read = [[(self.shown_question(side, asked), answer) for asked, answer in found] for found in by_sign]
        return read, "response"

    def neutral_activations(self, n_texts: int) -> list[Tensor]:
        """Return the target's activations where the map learns, (n, d_target) for each layer pair."""
        extractor, layers = self.target.extractor, [pair[1] for pair in self.layer_pairs]
        read = self.map_texts[:n_texts]
        texts, prompts = [item.text for item in read], [item.prompts[1] for item in read]
        tokens, ends = extractor.token_ends(texts, self.config.mapping_positions, prompts=prompts)
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


def read_personas_and_prompts(
    config: ExperimentConfig,
) -> tuple[tuple[Persona, ...], dict[bool, tuple[str, ...]]]:
    """Return the personas to run, and the test prompts if they are questions (True) and if not (False).

    Raises InputError: a persona or prompt that cannot be used, or a prompt that occurs in persona texts,
    which would leak into the test.
    """
    personas = tuple(config.load_personas())
    prompts = {
        are_questions: tuple(config.load_test_prompts(are_questions)) for are_questions in (False, True)
    }
    overlaps = OverlapCheck([*prompts[False], *prompts[True]])
    for persona in personas:
        texts = [*persona.all_texts, *persona.questions, *chain.from_iterable(persona.instructions)]
        leaking = [text for text in texts if overlaps.found_in(text)]
        asked = [text for text in persona.questions if text in prompts[True]]  # may be too short to overlap
        if leaking := [*leaking, *asked]:
            raise InputError(
                f"persona {persona.name!r} has {len(leaking)} texts that share words with a test prompt "
                f"({leaking[0][:50]!r}); change the text or the prompt"
            )
    check_labelled(personas)
    return personas, prompts


def load_inputs(config: ExperimentConfig, loaded: Mapping[str, LoadedModel] | None = None) -> Inputs:
    """Load texts, then models, and check what a later phase would refuse, before anything is written.

    loaded: side -> model and tokenizer, of sides that need not be loaded.
    Raises InputError for whatever cannot be used; of texts before a model is loaded.
    """
    personas, prompts = read_personas_and_prompts(config)
    judge = load_judge(config) if config.use_gpt4 else None
    given = {
        (side, name): read_vectors(local_path(path))
        for name, files in config.vectors.items()
        for side, path in (("source", files.source), ("target", files.target))
        if path is not None
    }
    needs_passages = config.mapping_data == "neutral_text" or config.layer_idx == "auto"
    n_passages = config.n_training_samples if needs_passages else N_PLAIN_TEXTS
    texts = tuple(_neutral_texts(config, personas, n_passages))
    n_documents = len({item.document for item in texts})
    if needs_passages and n_documents < config.n_folds:
        raise InputError(
            f"n_folds is {config.n_folds} but the neutral texts come from {n_documents} documents, "
            "which folds never split; lower n_folds or raise n_training_samples"
        )
    others = [name for name in shipped_personas() if name not in config.persona_names]
    labelled = (*personas, *map(load_persona, others))
    source, target = (
        replace(side_settings(config, name), loaded=(loaded or {}).get(name)).load()
        for name in ("source", "target")
    )
    train = cache(partial(_train_classifiers, config.persona_names, labelled))
    chat = tuple(
        side.name
        for side in (source, target)
        if resolve_format(config.format_of(side.name), side.model, side.tokenizer, side.name) == "chat"
    )
    asks = "target" in chat
    development = tuple(load_prompts("development_questions" if asks else "development"))
    inputs = Inputs(
        config,
        personas,
        labelled,
        prompts[asks],
        development,
        texts,
        source,
        target,
        judge,
        train,
        chat_sides=chat,
        train_ratios=cache(partial(_train_ratios, config, labelled)),
        given=given,
        neutral_questions=()
        if config.mapping_data == "neutral_text"
        else _neutral_questions(config, personas),
        neutral_styles=_neutral_styles(personas) if config.mapping_data == "styled_responses" else (),
    )
    if config.layers == "band":
        inputs = inputs.at_band(band_of(len(source.extractor.blocks), len(target.extractor.blocks)))
    elif config.layer_pairs is not None:
        inputs = inputs.at_band(config.layer_pairs)
    _check_models(inputs)
    return inputs


def configured(
    config: dict[str, Any] | str | Path | ExperimentConfig,
    source: LoadedModel | None,
    target: LoadedModel | None,
) -> tuple[ExperimentConfig, dict[str, LoadedModel]]:
    """Return a validated configuration, and side -> model and tokenizer of those that are loaded already.

    These need no name in a configuration that is a dictionary. Raises InputError as `load_config`, and for an
    executor on other machines, which do not have them.
    """
    loaded = {name: side for name, side in (("source", source), ("target", target)) if side is not None}
    if isinstance(config, dict):
        plain = {side: plain_model(model).config for side, (model, _) in loaded.items()}
        names = {
            f"{side}_model": of.name_or_path or f"a loaded {of.model_type}" for side, of in plain.items()
        }
        config = {**names, **config}
    checked = load_config(config)
    if loaded and checked.executor.kind == "ray":
        raise InputError("models that are loaded already run in this process; leave out the executor 'ray'")
    return checked, loaded


def load_judge(config: ExperimentConfig) -> GPTJudge | LocalJudge:
    """Return the judge that a configuration names. Raises InputError: no key, or no instruct model."""
    settings = config.judge
    if settings.kind == "local":
        return LocalJudge(settings.model, config.device, config.dtype, config.evaluation_batch_size)
    return GPTJudge(
        settings.model,
        settings.base_url,
        settings.api_key_env,
        settings.max_workers,
        settings.max_answer_tokens,
    )


def _check_models(inputs: Inputs) -> None:
    config = inputs.config
    widths = []
    for side in inputs.sides:
        logger.debug("%s: %s", side.name, side.fingerprint)
        if config.mapping_positions == "aligned":
            check_offsets(side.tokenizer, side.name)
        if config.layer_idx == "auto":
            extractor = side.extractor
            wanted = getattr(config, f"search_{side.name}_layers") or range(len(extractor.blocks))
            widths.append(dict.fromkeys(extractor.check_layers(wanted), extractor.d_model))
    if widths:
        check_memory(*widths)
    if inputs.answering and not inputs.chat_sides:
        raise InputError(
            "'extraction' of kind 'responses' asks a chat model, but neither model is one (prompt_format: "
            f"{config.prompt_format!r}); choose kind 'texts', or give an instruct model"
        )
    if inputs.neutral_questions and not inputs.chat_sides:
        raise InputError(
            f"mapping_data {config.mapping_data!r} asks a chat model, but neither model is one (prompt_format: "
            f"{config.prompt_format!r}); choose 'passages', or give an instruct model"
        )
    if config.system_prompt and not inputs.asks_questions:
        raise InputError(
            "system_prompt is of use where the target is shown a chat template alone; leave it out, or give "
            "an instruct model as target"
        )
    for (name, _), file in inputs.given.items():
        for pair in inputs.layer_pairs:
            inputs.given_vector(inputs.side(name), file, pair[name == "target"])
    generator = inputs.generator()
    shown = [
        inputs.shown_prompt("target", prompt) for prompt in (*inputs.prompts, *inputs.development_prompts)
    ]
    generator.tokenise_prompts(shown, config.max_new_tokens)
    generator.sampler(config.temperature, config.top_k, config.top_p)


def _neutral_questions(config: ExperimentConfig, personas: Sequence[Persona]) -> tuple[str, ...]:
    """Return the questions of `prompts/neutral_questions.txt` that are in no prompt and no persona.

    Raises InputError: fewer are asked than there are folds, which never split the answers to one question.
    """
    others = [*config.load_test_prompts(True), *load_prompts("development_questions")]
    others += [text for persona in personas for text in (*persona.all_texts, *persona.questions)]
    overlaps, asked = OverlapCheck(others), load_prompts("neutral_questions")
    kept = tuple(text for text in asked if text not in others and not overlaps.found_in(text))
    if len(kept) < len(asked):
        logger.warning(
            "refused %d neutral questions that overlap personas or prompts", len(asked) - len(kept)
        )
    n_asked = min(len(kept), config.n_training_samples)
    if n_asked < config.n_folds:
        raise InputError(
            f"n_folds is {config.n_folds}, but the map is learnt from answers to {n_asked} questions, which "
            "folds never split; lower n_folds, raise n_training_samples, or choose mapping_data 'passages'"
        )
    return kept


def _neutral_styles(personas: Sequence[Persona]) -> tuple[str, ...]:
    """Return the system prompts of `prompts/neutral_styles.txt` that name no persona and overlap none's own.

    Raises InputError: none is left.
    """
    overlaps = OverlapCheck(text for persona in personas for pair in persona.instructions for text in pair)
    names = [words for persona in personas if (words := _words(persona.name))]
    styles = load_prompts("neutral_styles")
    kept = tuple(
        style
        for style in styles
        if not overlaps.found_in(style) and not any(words <= _words(style) for words in names)
    )
    if len(kept) < len(styles):
        logger.warning("refused %d neutral styles that are a persona's", len(styles) - len(kept))
    if not kept:
        raise InputError(
            "mapping_data 'styled_responses': each style of prompts/neutral_styles.txt is a persona's; choose "
            "'answers'"
        )
    return kept


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.casefold()))


def _neutral_texts(config: ExperimentConfig, personas: Sequence[Persona], n_texts: int) -> list[NeutralText]:
    forbidden = [text for persona in personas for text in persona.all_texts]
    for are_questions, name in ((False, "development"), (True, "development_questions")):
        forbidden += [*config.load_test_prompts(are_questions), *load_prompts(name)]
    return load_neutral_texts(config.neutral_text, n_texts, forbidden, config.seed)


def _train_classifiers(names: list[str], labelled: Sequence[Persona]) -> dict[str, TraitClassifier]:
    classifiers = load_trait_classifiers(names, list(labelled))
    for name, classifier in classifiers.items():
        logger.info(
            "trait classifier %s: AUC %.3f (%d positive, %d negative texts)",
            name,
            classifier.auc,
            classifier.n_positive,
            classifier.n_negative,
        )
    return classifiers


def _train_ratios(config: ExperimentConfig, labelled: Sequence[Persona]) -> dict[str, LikelihoodRatio]:
    return load_likelihood_ratios(config.persona_names, labelled) if config.likelihood_ratio else {}


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
    return [pair_by_depth(layer, n_source, n_target) for layer in chosen]


def pair_by_depth(target_layer: int, n_source: int, n_target: int) -> LayerPair:
    """Return a target block with the source's block that is as deep, relative to the number of blocks."""
    return max(0, round((target_layer + 1) * n_source / n_target) - 1), target_layer


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

"""Load what a run reads, and check it: texts, personas, both models, scorers.

Cheap things are loaded and checked first, and everything that a later phase would reject is rejected before a
file is written. `Inputs` is immutable and computes no result.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from activation_extractor import PersonaVector
from experiment.conditions import CONDITIONS, N_DRAWS, SCORERS, TRAINED_SCORERS
from experiment.config import ExperimentConfig, load_config
from experiment.models import SIDES, LoadedModel, Side, load_side, on_driver
from experiment.prompting import Prompting
from judging.gpt_judge import GPTJudge
from judging.local_judge import LocalJudge
from maps.layer_bands import LayerPair, band_of
from maps.layer_search import check_memory
from model_loading import (
    PACKAGED_MODELS,
    context_length,
    fastest_dtype,
    is_on_a_hub,
    model_fingerprint,
    plain_model,
    resolve_device,
)
from scoring.encoders import independent_model
from scoring.trait_scorer import check_labelled
from steered_generation import SteeredGenerator
from support.errors import HubError, InputError
from support.text_files import local_path
from support.vector_files import VectorFile, read_vectors
from support.vocabulary import EMBEDDINGS
from texts.aligned_positions import check_offsets
from texts.chat import as_words, resolve_format
from texts.encoding import encode
from texts.neutral_text import NeutralText, OverlapCheck, load_neutral_texts
from texts.personas import Persona, load_persona, load_prompts, shipped_personas

logger = logging.getLogger(__name__)

N_PLAIN_TEXTS = 16  # neutral passages on which side effects of steering are measured
PROMPTS_A_TEXT = 5  # for a map of last tokens: a prompt gives one pair, a text of the run's map many
# persona -> (question, response) of its positive responses, and of its negative ones
Responses = Mapping[str, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]]


@dataclass(frozen=True, repr=False)
class Inputs:
    """Everything that the phases read; nothing in it changes.

    labelled_personas: those to run and every other shipped one, whose texts are negatives of the scorers.
    neutral_texts: passages; none overlaps a persona text or a prompt.
    source, target: their extractors read the middle pair of `layer_pairs`.
    layer_pairs: (source layer, target layer) of every block that is steered, ordered by target layer.
    load_scorers: name of a trained scorer -> persona -> scorer; trains at the first call, remembers the rest.
    given: (side, persona) -> file of vectors that are taken as they are.
    neutral_questions: asked where the map is learnt from responses. neutral_styles: system prompts, none a
        persona's, under which they are asked in rotation.
    neutral_prompts: the same questions under neutral styles, each an empty text behind a prompt; the map of
        vectors from prompts is learnt where they end. Empty where no persona's may be.
    neutral_responses, responses: what came of neutral_questions, and side -> what its persona vectors are
        made from; both are empty until `phases.collect_responses` has run.
    """

    config: ExperimentConfig
    personas: tuple[Persona, ...]
    labelled_personas: tuple[Persona, ...]
    prompts: tuple[str, ...]
    development_prompts: tuple[str, ...]
    neutral_texts: tuple[NeutralText, ...]
    source: Side
    target: Side
    layer_pairs: tuple[LayerPair, ...]
    prompting: Prompting
    judge: GPTJudge | LocalJudge | None
    load_scorers: Callable[[str], dict[str, Any]]
    given: Mapping[tuple[str, str], VectorFile] = field(default_factory=dict)
    neutral_questions: tuple[str, ...] = ()
    neutral_styles: tuple[str, ...] = ()
    neutral_prompts: tuple[NeutralText, ...] = ()
    neutral_responses: tuple[NeutralText, ...] = ()
    responses: Mapping[str, Responses] = field(default_factory=dict)

    @property
    def control_personas(self) -> tuple[Persona, ...]:
        """Shipped personas whose vectors are the other personas' of a run of a single one."""
        is_single = len(self.personas) == 1 and "other_persona" in self.config.conditions
        return self.labelled_personas[1 : 1 + N_DRAWS] if is_single else ()

    @property
    def sides(self) -> tuple[Side, Side]:
        """Source and target."""
        return self.source, self.target

    def side(self, name: str) -> Side:
        """Return the side of this name."""
        return {side.name: side for side in self.sides}[name]

    @property
    def conversations(self) -> list[tuple[str, ...]]:
        """The test questions in their order, `n_turns` to a conversation; those left over are in none."""
        n = self.config.n_turns
        return [self.prompts[end - n : end] for end in range(n, len(self.prompts) + 1, n)]

    def shown_conversations(self, side: str) -> list[str]:
        """Return each conversation up to its last question as a side's model reads it, responses as a dot."""
        return [
            self.prompting.conversation(side, [(text, ".") for text in earlier], last)
            for *earlier, last in self.conversations
        ]

    @property
    def middle_pair(self) -> LayerPair:
        """The layer pair that stands for all of them where one has to."""
        return self.layer_pairs[len(self.layer_pairs) // 2]

    @property
    def target_layers(self) -> list[int]:
        """The blocks of the target that are steered."""
        return [target for _, target in self.layer_pairs]

    @property
    def mapping_texts(self) -> tuple[NeutralText, ...]:
        """The texts that the map is learnt from, and that the unit of alpha is measured on."""
        return self.neutral_responses if self.neutral_questions else self.neutral_texts

    @property
    def mapping_positions(self) -> str:
        """Where texts give pairs; `auto` is `aligned` if both tokenizers know characters, else `last`."""
        wanted = self.config.mapping_positions
        automatic = "aligned" if all(side.tokenizer.is_fast for side in self.sides) else "last"
        return automatic if wanted == "auto" else wanted

    @property
    def scorer_names(self) -> list[str]:
        """The trained scorers of this run; one is left out where the configuration has its name as false."""
        return [name for name in TRAINED_SCORERS if getattr(self.config, name, True)]

    @property
    def scorers(self) -> dict[str, dict[str, Any]]:
        """Scorer name -> persona -> scorer, of personas with labelled texts."""
        return {name: self.load_scorers(name) for name in self.scorer_names}

    @property
    def language_model(self) -> str:
        """The packaged language model that scores: it shares no weights with the target."""
        return independent_model(self.target.shape, self.source.shape)

    def scorer_key(self, name: str, persona: Persona) -> str:
        """Return what a persona's scorer of this name depends on, without training it."""
        return SCORERS[name].key(persona, self.language_model)

    @property
    def classifiers(self) -> dict[str, Any]:
        """Persona -> trait classifier, of personas with labelled texts."""
        return self.load_scorers("classifier")

    @property
    def perplexity_sides(self) -> tuple[str, ...]:
        """The models that give perplexities: the target, and the source if it is to be independent."""
        return ("target", "source") if self.config.independent_perplexity else ("target",)

    @property
    def fluency_side(self) -> Side:
        """The side whose model says how fluent a text is: the independent one, else the target itself."""
        return self.side(self.perplexity_sides[-1])

    @property
    def evaluation_dtype(self) -> str | None:
        """The dtype in which texts are scored, None for the models' own; `auto` is this machine's fastest."""
        wanted, model = self.config.evaluation_dtype, self.target.model
        if wanted != "auto":
            return wanted
        fastest = fastest_dtype(model.device, model.dtype)
        return None if fastest == model.dtype else str(fastest).removeprefix("torch.")

    @property
    def notes(self) -> list[str]:
        """What a reader of the results has to know of the personas and the models."""
        notes = [
            f"persona {persona.name!r} is given without labelled texts: those of the shipped persona of this "
            "name train and validate its scorers; give it some, or another name"
            for persona in self.personas
            if persona.is_scored_as_shipped
        ]
        if self.source.fingerprint == self.target.fingerprint:
            notes.append(
                "source and target are one model, a check of the tool: that what transfers is text-borne "
                "cannot be excluded"
            )
        return notes

    @property
    def responding_personas(self) -> list[Persona]:
        """The personas whose vectors are made from responses."""
        return [
            persona
            for persona in self.personas
            if self.config.kind_of(persona.name) == "responses"
            and any((side, persona.name) not in self.given for side in SIDES)
        ]

    def persona_prompts(self, side: str, persona: Persona) -> tuple[list[tuple[str, str]], ...]:
        """Return (question, prompt) under a persona's system prompts for the trait, and those against it.

        Prompts are as a side's model reads them, up to where it would respond; item i of both has the same
        question. Raises InputError: one is longer than the model's context, so that its end would be cut.
        """
        asked = persona.questions[: self.config.extraction.n_questions]
        ask, of_side = self.prompting.instructed, self.side(side)
        found = tuple(
            [(text, ask(side, text, pair[sign])) for pair in persona.instructions for text in asked]
            for sign in (0, 1)
        )
        prompts = [prompt for part in found for _, prompt in part]
        longest = max(map(len, encode(of_side.tokenizer, prompts)), default=0)
        if longest > (most := of_side.extractor.max_length):
            raise InputError(
                f"persona {persona.name!r} has a prompt of {longest} tokens for the {side} model, which reads"
                f" {most}, so that its last token would be cut; shorten its instruction or questions"
            )
        return found

    def for_kind(self, kind: str) -> "Inputs":
        """Return inputs with the texts that the map of a kind of vectors is learnt from, by default these.

        Vectors from prompts are of the last token of a prompt, and so is their map.
        """
        if kind != "prompt":
            return self
        config = self.config.model_copy(update={"mapping_positions": "last"})
        return replace(self, config=config, neutral_texts=self.neutral_prompts, neutral_questions=())

    def at_pairs(self, pairs: Sequence[LayerPair]) -> "Inputs":
        """Return the same inputs, read and steered at these layer pairs.

        Raises InputError: a layer that a model lacks.
        """
        for source_layer, target_layer in pairs:
            self.source.extractor.check_layers([source_layer])
            self.target.extractor.check_layers([target_layer])
        ordered = tuple(sorted(pairs, key=lambda pair: pair[1]))
        source_layer, target_layer = ordered[len(ordered) // 2]
        return replace(
            self,
            source=self.source.at_layer(source_layer),
            target=self.target.at_layer(target_layer),
            layer_pairs=ordered,
        )

    def with_rows(self, fitting: Mapping[str, int] | None = None) -> "Inputs":
        """Return the same inputs with numbers for all batch sizes; see `ExperimentConfig.with_rows`."""
        config = self.config.with_rows(fitting)
        source, target = (side.with_batch_size(config.extraction_batch_size) for side in self.sides)
        return replace(self, config=config, source=source, target=target)

    def of_source(self) -> "Inputs":
        """Return inputs with the source in the target's place, so that its vectors can be tried on itself."""
        is_chat = "source" in self.prompting.chat_sides
        chat_sides = ("source", "target") if is_chat else ()
        return replace(
            self,
            target=self.source,
            layer_pairs=tuple(dict.fromkeys((source, source) for source, _ in self.layer_pairs)),
            prompting=replace(self.prompting, chat_sides=chat_sides),
            development_prompts=tuple(load_prompts("development_questions" if is_chat else "development")),
        )

    def more_texts(self, n_texts: int) -> list[NeutralText]:
        """Return n_texts passages of neutral text; the first ones are `neutral_texts`."""
        return _neutral_texts(self.config, self.personas, n_texts)

    def given_vector(self, side: Side, file: VectorFile, layer: int) -> PersonaVector:
        """Return a file's vector for a side's layer. Raises InputError: one that does not fit the model."""
        model_type = side.description["model_type"]
        vector = file.at(layer, side.n_blocks, side.d_model, model_type)
        norm = vector.norm().item()
        if norm == 0:
            raise InputError(f"{file.path} holds a vector of zeros for layer {layer}; it has no direction")
        return PersonaVector(vector / norm, norm, None, 0, 0)


def read_personas(config: ExperimentConfig) -> tuple[Persona, ...]:
    """Return the personas to run.

    Raises InputError: a persona or prompt that cannot be used, or a prompt that occurs in persona texts,
    which would leak into the test.
    """
    personas, questions = tuple(config.load_personas()), config.load_test_prompts(True)
    overlaps = OverlapCheck([*config.load_test_prompts(False), *questions])
    for persona in personas:
        texts = [*persona.all_texts, *persona.questions, *chain.from_iterable(persona.instructions)]
        leaking = [text for text in texts if overlaps.found_in(text)]
        # A question may be too short to count as an overlap.
        leaking += [text for text in persona.questions if text in questions and text not in leaking]
        if leaking:
            raise InputError(
                f"persona {persona.name!r} has {len(leaking)} texts that share words with a test prompt "
                f"({leaking[0][:50]!r}); change the text or the prompt"
            )
    check_labelled(personas)
    return personas


def load_inputs(config: ExperimentConfig, loaded: Mapping[str, LoadedModel] | None = None) -> Inputs:
    """Load texts, then models, and check what a later phase would reject, before anything is written.

    loaded: side -> model and tokenizer, of sides that need not be loaded.
    Raises InputError for whatever cannot be used; for texts before a model is loaded.
    """
    driver = on_driver(config)
    scores_on = config.device if driver is config else "cpu"
    for key in _loaded_models(config):
        resolve_device(driver.place_of(key).device)
    personas = read_personas(config)
    others = [name for name in shipped_personas() if name not in config.persona_names]
    labelled = (*personas, *map(load_persona, others))
    given = _read_given(config)
    questions, styles = _neutral_questions(config, personas), _neutral_styles(config, personas)
    with _hub_lines(config):
        judge, passages = load_judge(config), _checked_neutral_texts(config, personas)
        source, target = (load_side(driver, name, (loaded or {}).get(name)) for name in SIDES)
    labelled = tuple(_as_words(persona, source, target) for persona in labelled)
    prompting = _prompting(config, source, target)
    asks = prompting.asks_questions
    if config.mapping_data == "auto":
        config = config.model_copy(update={"mapping_data": "styled_responses" if asks else "neutral_text"})
        questions, styles = (questions, styles) if asks else ((), ())
    inputs = Inputs(
        config=config,
        personas=labelled[: len(personas)],
        labelled_personas=labelled,
        prompts=tuple(config.load_test_prompts(asks)),
        development_prompts=tuple(load_prompts("development_questions" if asks else "development")),
        neutral_texts=passages,
        source=source,
        target=target,
        layer_pairs=((source.extractor.layer_idx, target.extractor.layer_idx),),
        prompting=prompting,
        judge=judge,
        load_scorers=cache(
            partial(_load_scorers, personas, independent_model(target.shape, source.shape), scores_on)
        ),
        given=given,
        neutral_questions=questions,
        neutral_styles=styles,
        neutral_prompts=_neutral_prompts(config, personas, prompting),
    )
    pairs = band_of(source.n_blocks, target.n_blocks) if config.layer_idx == "band" else config.layer_pairs
    if pairs is not None:
        inputs = inputs.at_pairs(pairs)
    _check_layers(inputs)
    _check_embeddings(inputs)
    _check_prompts(inputs)
    _check_judge(inputs)
    _check_evaluation_dtype(inputs)
    for note in inputs.notes:
        logger.warning("%s", note)
    is_here = config.executor.kind == "local" and all(
        side.model.device.type != "cuda" for side in inputs.sides
    )
    return inputs.with_rows() if is_here else inputs  # else a worker is asked how many rows fit


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


def _loaded_models(config: ExperimentConfig) -> list[str]:
    """Return the keys of the models that are loaded here."""
    judges = ["judge.model"] if config.use_gpt4 and config.judge.kind == "local" else []
    return [*(f"{side}_model" for side in SIDES), *judges]


@contextmanager
def _hub_lines(config: ExperimentConfig) -> Iterator[None]:
    """Name all lines of a configuration that need a hub, if it cannot be reached in the body."""
    try:
        yield
    except HubError as error:
        names = {key: config.place_of(key).name for key in _loaded_models(config)}
        lines = {key: name for key, name in names.items() if is_on_a_hub(name)}
        if config.neutral_text == "wikitext-103":
            lines["neutral_text"] = config.neutral_text
        needed = ", ".join(f'"{key}": "{name}"' for key, name in lines.items())
        raise InputError(
            f"{str(error).rstrip('.')}. The hub is needed for {needed}; a model may be a folder, GGUF file, "
            f"{' or '.join(PACKAGED_MODELS)} instead"
        ) from error


def load_judge(config: ExperimentConfig) -> GPTJudge | LocalJudge | None:
    """Return the judge if one is wanted. Raises InputError: no key, or no instruct model."""
    settings = config.judge
    if not config.use_gpt4:
        return None
    if settings.kind == "local":
        place, size = config.place_of("judge.model"), config.with_rows().evaluation_batch_size
        options = {"device_map": place.device_map, "quantization": place.quantization}
        return LocalJudge(place.name, place.device, place.dtype, size, **options)
    return GPTJudge(
        settings.model,
        settings.base_url,
        settings.api_key_env,
        settings.max_workers,
        settings.max_answer_tokens,
        settings.request_options,
    )


def _read_given(config: ExperimentConfig) -> dict[tuple[str, str], VectorFile]:
    """Return the files of vectors that a configuration names. Raises InputError: one cannot be read."""
    return {
        (side, name): read_vectors(local_path(path))
        for name, files in config.vectors.items()
        for side in SIDES
        if (path := getattr(files, side)) is not None
    }


def _prompting(config: ExperimentConfig, *sides: Side) -> Prompting:
    """Return how the models are shown prompts.

    Raises InputError: `chat` for a model without a template, or a variable that no template knows.
    """
    variables = {**config.chat_template_kwargs, "strftime_now": config.chat_template_date}
    chatting = [
        side
        for side in sides
        if resolve_format(config.format_of(side.name), side.model, side.tokenizer, side.name, variables)
        == "chat"
    ]
    templates = str([side.tokenizer.chat_template for side in chatting])
    if unknown := [name for name in config.chat_template_kwargs if name not in templates]:
        raise InputError(
            f"chat_template_kwargs has {unknown[0]!r}, which is in no chat template that this run "
            "uses; correct the name, or leave it out"
        )
    tokenizers = {side.name: side.tokenizer for side in sides}
    return Prompting(tokenizers, tuple(side.name for side in chatting), config.system_prompt, variables)


def _as_words(persona: Persona, *sides: Side) -> Persona:
    """Return the persona; special tokens of either model that its texts for extraction spell are words."""
    texts = {}
    for name in ("positive_texts", "negative_texts"):
        texts[name] = getattr(persona, name)
        for side in sides:
            texts[name] = tuple(as_words(side.tokenizer, text) for text in texts[name])
    return replace(persona, **texts)


def _check_judge(inputs: Inputs) -> None:
    """Raise InputError: the judge is the target model, whose texts it would judge."""
    judge, target = inputs.judge, inputs.target
    is_local = isinstance(judge, LocalJudge)
    if is_local and model_fingerprint(judge.model, judge.tokenizer) == target.fingerprint:
        raise InputError(
            f"judge.model {judge.name!r} is the target model {target.model_name!r}, which can't judge what "
            "it writes when it is steered; name another model"
        )


def _check_evaluation_dtype(inputs: Inputs) -> None:
    """Raise InputError: texts are to be scored in another dtype by a model that would be copied on a card."""
    wanted = inputs.config.evaluation_dtype
    for side in map(inputs.side, inputs.perplexity_sides):
        own, device = str(side.model.dtype).removeprefix("torch."), side.model.device
        if wanted not in ("auto", own) and device.type != "cpu":
            raise InputError(
                f"evaluation_dtype {wanted!r} would copy the {side.name} model, on {device} in {own}; "
                f"leave it out, or load the model in {wanted}"
            )


def _check_layers(inputs: Inputs) -> None:
    """Raise InputError for layers that cannot be read, searched, or filled from the given vectors."""
    config, row_bytes = inputs.config, 0
    for side in inputs.sides:
        logger.debug("%s: %s", side.name, side.fingerprint)
        if config.mapping_positions == "aligned":
            check_offsets(side.tokenizer, side.name)
        elif config.mapping_positions == "auto" and not side.tokenizer.is_fast:
            logger.warning(
                "%s: its tokenizer gives no character offsets: mapping_positions is 'last'", side.name
            )
        if config.layer_idx == "auto":
            wanted = getattr(config, f"search_{side.name}_layers") or range(side.n_blocks)
            layers = side.extractor.check_layers(wanted)
            row_bytes += len(layers) * side.d_model * side.model.dtype.itemsize
    check_memory(row_bytes, config.search_tokens)
    for (name, _), file in inputs.given.items():
        for pair in inputs.layer_pairs:
            inputs.given_vector(inputs.side(name), file, pair[SIDES.index(name)])


def _check_embeddings(inputs: Inputs) -> None:
    """Raise InputError: a control reads the source's embeddings, and they cannot be found."""
    sources = {name: CONDITIONS[name].source for name in inputs.config.source_controls}
    if readers := [name for name, source in sources.items() if source.block == EMBEDDINGS]:
        try:
            inputs.source.extractor.extract_layers(["?"], [EMBEDDINGS])
        except InputError as error:
            raise InputError(f"control {readers[0]!r} of the source model: {error}") from error


def _check_prompts(inputs: Inputs) -> None:
    """Raise InputError for what no model can be asked, and prompts or sampling that cannot be used."""
    config, prompting = inputs.config, inputs.prompting
    for setting, is_chosen, remedy in (
        ("'extraction' of kind 'responses'", inputs.responding_personas, "choose kind 'texts'"),
        (f"mapping_data {config.mapping_data!r}", inputs.neutral_questions, "choose 'neutral_text'"),
    ):
        if is_chosen and not prompting.chat_sides:
            raise InputError(
                f"{setting} asks a chat model, but neither model is one (prompt_format: "
                f"{config.prompt_format!r}); {remedy}, or give an instruct model"
            )
    for persona in (each for each in inputs.personas if config.kind_of(each.name) == "prompt"):
        if not prompting.asks_questions:
            raise InputError(
                f"persona {persona.name!r}: 'extraction' of kind 'prompt' reads where a chat model begins to "
                f"respond, but the target is none (prompt_format: {config.prompt_format!r}); choose kind "
                "'texts', or give an instruct model"
            )
        if not inputs.neutral_prompts:
            raise InputError(
                f"persona {persona.name!r}: the map of vectors from prompts is learnt from neutral questions "
                f"in neutral styles, but what is left beside personas and prompts is no style, or fewer "
                f"questions than n_folds, {config.n_folds}; lower it, or choose kind 'texts'"
            )
        for side in SIDES:
            inputs.persona_prompts(side, persona)
    if config.system_prompt and not prompting.asks_questions:
        raise InputError(
            "system_prompt is of use where the target is shown a chat template alone; leave it out, or give "
            "an instruct model as target"
        )
    generator = SteeredGenerator(
        inputs.target.model,
        inputs.target.tokenizer,
        block_path=config.target_block_path,
        cuda_graphs=config.cuda_graphs,
    )
    prompts = (*inputs.prompts, *inputs.development_prompts)
    shown = [prompting.prompt("target", prompt) for prompt in prompts]
    generator.tokenise_prompts(shown, config.max_new_tokens)
    generator.sampler(config.temperature, config.top_k, config.top_p)
    if config.n_turns > 1:
        _check_turns(inputs)


def _check_turns(inputs: Inputs) -> None:
    """Raise InputError: there is no conversation of `n_turns`, or the target's context may not hold one."""
    config, prompting, n = inputs.config, inputs.prompting, inputs.config.n_turns
    if not prompting.asks_questions:
        raise InputError(
            f"n_turns is {n}, but the target continues texts and is asked nothing (prompt_format: "
            f"{config.prompt_format!r}); set n_turns to 1, or give an instruct model as target"
        )
    if not inputs.conversations:
        raise InputError(
            f"n_turns is {n}, but there are {len(inputs.prompts)} test prompts; lower n_turns, or raise "
            "n_test_prompts"
        )
    try:
        shown = inputs.shown_conversations("target")
    except InputError as error:
        raise InputError(f"n_turns is {n}: {error}; set n_turns to 1") from error
    model, tokenizer = inputs.target.model, inputs.target.tokenizer
    longest, limit = max(map(len, encode(tokenizer, shown, model))), context_length(model, tokenizer)
    if longest + n * config.max_new_tokens > limit:
        raise InputError(
            f"n_turns is {n}: a conversation has {longest} tokens without its responses; with {n} of "
            f"{config.max_new_tokens} that exceeds the target's context of {limit}; lower n_turns or "
            "max_new_tokens"
        )


def _checked_neutral_texts(config: ExperimentConfig, personas: Sequence[Persona]) -> tuple[NeutralText, ...]:
    """Return the passages that a run reads. Raises InputError: of fewer documents than there are folds."""
    needs_passages = config.mapping_data in ("neutral_text", "auto") or config.layer_idx == "auto"
    n_passages = config.n_training_samples if needs_passages else N_PLAIN_TEXTS
    texts = tuple(_neutral_texts(config, personas, n_passages))
    n_documents = len({item.document for item in texts})
    if needs_passages and n_documents < config.n_folds:
        raise InputError(
            f"n_folds is {config.n_folds} but the neutral texts come from {n_documents} documents, "
            "which folds never split; lower n_folds or raise n_training_samples"
        )
    return texts


def _neutral_questions(config: ExperimentConfig, personas: Sequence[Persona]) -> tuple[str, ...]:
    """Return the neutral questions that are in no prompt and no persona, if the map is learnt from them.

    Raises InputError: fewer are asked than there are folds, which never split the responses to one question.
    """
    if config.mapping_data == "neutral_text":
        return ()
    kept = _unused_questions(config, personas)
    n_asked = min(len(kept), config.n_training_samples)
    if n_asked < config.n_folds:
        raise InputError(
            f"n_folds is {config.n_folds}, but the map is learnt from responses to {n_asked} questions, "
            "which folds never split; lower n_folds, raise n_training_samples, or choose mapping_data "
            "'neutral_text'"
        )
    return kept


def _unused_questions(config: ExperimentConfig, personas: Sequence[Persona]) -> tuple[str, ...]:
    """Return the neutral questions that are in no prompt and no persona."""
    others = [*config.load_test_prompts(True), *load_prompts("development_questions")]
    others += [text for persona in personas for text in (*persona.all_texts, *persona.questions)]
    overlaps, asked = OverlapCheck(others), load_prompts("neutral_questions")
    kept = tuple(text for text in asked if text not in others and not overlaps.found_in(text))
    if len(kept) < len(asked):
        logger.warning(
            "left out %d neutral questions that overlap personas or prompts", len(asked) - len(kept)
        )
    return kept


def _neutral_styles(config: ExperimentConfig, personas: Sequence[Persona]) -> tuple[str, ...]:
    """Return the neutral styles that are no persona's, if responses are to be styled.

    Raises InputError: none is left.
    """
    if config.mapping_data not in ("styled_responses", "auto"):
        return ()
    if not (kept := _unused_styles(personas)):
        raise InputError(
            "mapping_data 'styled_responses': each style of prompts/neutral_styles.txt is a persona's; "
            "choose 'responses'"
        )
    return kept


def _unused_styles(personas: Sequence[Persona]) -> tuple[str, ...]:
    """Return the neutral styles that are no persona's."""
    overlaps = OverlapCheck(text for persona in personas for pair in persona.instructions for text in pair)
    names = [words for persona in personas if (words := _words(persona.name))]
    styles = load_prompts("neutral_styles")
    kept = tuple(
        style
        for style in styles
        if not overlaps.found_in(style) and not any(words <= _words(style) for words in names)
    )
    if len(kept) < len(styles):
        logger.warning("left out %d neutral styles that are a persona's", len(styles) - len(kept))
    return kept


def _neutral_prompts(
    config: ExperimentConfig, personas: Sequence[Persona], prompting: Prompting
) -> tuple[NeutralText, ...]:
    """Return the prompts that the map of vectors from prompts is learnt from, if there may be such vectors.

    Questions come again under other styles, until there are PROMPTS_A_TEXT for each text of the run's map.
    There are none if fewer questions than folds are left.
    """
    may_be = config.open_kinds or config.reads_prompts
    if not may_be or not prompting.asks_questions:
        return ()
    asked, styles = _unused_questions(config, personas), _unused_styles(personas)
    n_prompts = min(PROMPTS_A_TEXT * config.n_training_samples, len(asked) * len(styles))
    if min(len(asked), n_prompts) < config.n_folds:
        return ()
    prompts = []
    for number in range(n_prompts):
        turn, index = divmod(number, len(asked))
        style = styles[(index + turn) % len(styles)]
        shown = tuple(prompting.instructed(side, asked[index], style) for side in SIDES)
        prompts.append(NeutralText("", asked[index], shown))
    return tuple(prompts)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.casefold()))


def _neutral_texts(config: ExperimentConfig, personas: Sequence[Persona], n_texts: int) -> list[NeutralText]:
    forbidden = [text for persona in personas for text in persona.all_texts]
    for are_questions, name in ((False, "development"), (True, "development_questions")):
        forbidden += [*config.load_test_prompts(are_questions), *load_prompts(name)]
    return load_neutral_texts(config.neutral_text, n_texts, forbidden, config.seed)


def _load_scorers(
    personas: Sequence[Persona], language_model: str, device: str, scorer: str
) -> dict[str, Any]:
    """Return persona -> scorer of one kind, and log its AUC."""
    found = SCORERS[scorer].load([persona.name for persona in personas], personas, language_model, device)
    for name, trained in found.items():
        if (auc := getattr(trained, "auc", None)) is not None:
            logger.info("%s of %s: cross-validated AUC %.3f", SCORERS[scorer].label, name, auc)
    return found

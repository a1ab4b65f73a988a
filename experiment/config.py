"""The configuration of an experiment: one validated model, read from a dictionary or a file.

Only modules of `experiment/`, `phases/` and `ablations/` know this model; components take plain arguments.
Unknown keys and values out of range are errors that name the key; `config_errors` words them. Where no layers
are named, PROTOCOL has the defaults; else they are the specification's, except where METHODOLOGY.md says why
not.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)

from experiment.conditions import (
    CONDITIONS,
    CONTROLS,
    CONVERSING,
    DECIDING_CONTROLS,
    MAPPED,
    METHODS,
    N_DRAWS,
    ORACLE,
    PROMPTED,
    draws_of,
    other_personas,
)
from experiment.config_errors import explain
from support.errors import InputError, shown
from support.text_files import check_characters, local_path, parse_json, read_text
from support.vocabulary import (
    FIRST_DAY,
    LOWEST_TEMPERATURE,
    AlphaUnit,
    LambdaCriterion,
    LambdaUnit,
    PairPositions,
    PersonaPosition,
    PromptFormat,
    Quantization,
    SteerPositions,
)
from texts.personas import (
    Persona,
    check_extraction,
    check_halves,
    check_name,
    check_names_differ,
    load_persona,
    load_prompts,
    shipped_personas,
)
from texts.questions import N_QUESTIONS

LAST_LAYER = 10_000
MOST_PERSONAS = 100  # each has a panel in the figures, which are at most 65,535 pixels wide
MOST_TEXTS = 10_000_000  # a grid of more texts would take eleven days at ten texts a second
MOST_TURNS = 10  # of a conversation; each turn is read with all before it
MAX_EVALUATIONS = 8  # steering strengths that a search measures for each persona
MOST_RESAMPLES = 200  # that phase 3 draws
# What a run itself tells a chat template.
OWN_VARIABLES = "conversation messages chat_template tokenize add_generation_prompt strftime_now".split()
DEFAULT_METHODS = ("zero_pad", "interpolate", "random_proj", "ridge_mapped", "oracle")  # the specification's
DEFAULT_PERSONAS = ("silly", "formal", "concise")  # the specification's
# Shipped questions for chat targets. The last ones are for a last measurement: no default takes them.
QUESTIONS = ("test_questions", "fresh_questions", "last_questions")
# Texts that are read at the mean over their tokens or at the last; and under system prompts for and against
# the trait, responses to questions, and the last token of the prompt, from which a response is generated.
VECTOR_KINDS = ("mean", "last", "responses", "prompt")
ASKED_KINDS = ("responses", "prompt")
LAYER_KEYS = ("layer_idx", "source_layer_idx", "target_layer_idx")
# The defaults where no layers are named, beside all shipped personas: any two models, and a verdict on each.
PROTOCOL: dict[str, Any] = {
    "layer_idx": "band",
    "dtype": "fastest",
    "neutral_text": "wikipedia-sample",
    "mapping_data": "auto",
    "n_training_samples": 300,
    # From what a map of responses needs to what one of passages needs, in steps of about 3.
    "lambda_values": [1e-7, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
    "lambda_unit": "relative",
    "persona_position": "mean",
    "extraction": {"kind": "auto"},
    "methods": [*DEFAULT_METHODS, PROMPTED],
    "n_test_prompts": 60,
    "test_prompts": "fresh_questions",
    "alpha_values": "auto",
    "alpha_unit": "residual_norm",
    "strength_curve": True,
    "n_seeds": 2,
    "max_new_tokens": 96,
    "extraction_batch_size": "auto",
    "generation_batch_size": "auto",
    "evaluation_batch_size": "auto",
}
# What `auto` is where no CUDA device says how many rows fit.
ROWS = {"extraction_batch_size": 8, "generation_batch_size": 120, "evaluation_batch_size": 8}


def _if_string(check: Callable[[str], Any]) -> BeforeValidator:
    """Return a validator that checks strings, and leaves other values to the field's type."""

    def checked(value: Any) -> Any:
        if isinstance(value, str):
            check(value)
        return value  # as given, since keys of artifacts hold it

    return BeforeValidator(checked)


# Upper bounds are where a run could never end, or where float32 and float64 would overflow.
Positive = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
Lambda = Annotated[float, Field(ge=1e-12, le=1e12, allow_inf_nan=False)]
Lambdas = Annotated[list[Lambda], Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=10_000)]
LargeCount = Annotated[int, Field(ge=1, le=1_000_000)]
Samples = Annotated[int, Field(ge=10, le=10_000_000)]
Layer = Annotated[int, Field(ge=0, le=LAST_LAYER)]
Layers = Annotated[list[Layer], Field(min_length=1, max_length=1000)]
LayerPairs = Annotated[list[tuple[Layer, Layer]], Field(min_length=1, max_length=1000)]
Alphas = Annotated[list[float], Field(min_length=1, max_length=1000)]
Method = Literal[METHODS]
String = Annotated[str, _if_string(check_characters)]
Text = Annotated[String, Field(min_length=1)]
Texts = Annotated[list[Text], Field(max_length=100_000)]
Prompt = Annotated[String, Field(pattern=r"\S")]
LocalPath = Annotated[str, _if_string(local_path), _if_string(check_characters), Field(min_length=1)]
Name = Annotated[str, _if_string(check_name)]


def _list_or_auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise ValueError("expected a list of numbers, such a list for each persona, or 'auto'")
    if isinstance(value, dict) and (by_method := [name for name in value if isinstance(value[name], dict)]):
        raise ValueError(
            f"{shown(by_method[0])} has an alpha for each method, but all conditions of a persona are "
            "compared at one, the native vector's; leave alpha_values out, or give a list for each persona"
        )
    return value


# Each form has a tag, chosen by the type of what is given, so that errors are about that form alone.
AlphaValues = Annotated[
    Annotated[Alphas, Tag("tag-list")]
    | Annotated[dict[Name, Alphas], Tag("tag-personas")]
    | Annotated[Literal["auto"], Tag("tag-auto")],
    Discriminator(lambda value: {str: "tag-auto", dict: "tag-personas"}.get(type(value), "tag-list")),
    BeforeValidator(_list_or_auto),
]


def _questions(value: Any) -> Any:
    if isinstance(value, str) and value not in QUESTIONS:
        raise ValueError(f"expected a list of prompts, or one of {', '.join(QUESTIONS)}")
    return value


TestPrompts = Annotated[
    Annotated[list[Prompt], Field(min_length=1, max_length=1_000_000), Tag("tag-list")]
    | Annotated[str, Tag("tag-name")],
    Discriminator(lambda value: "tag-name" if isinstance(value, str) else "tag-list"),
    BeforeValidator(_questions),
]


def _layer(value: Any) -> int | str | None:
    if value in (None, "auto", "band") or (type(value) is int and 0 <= value <= LAST_LAYER):
        return value
    raise ValueError(f"expected a decoder block, 0 to {LAST_LAYER}, 'band' or 'auto'")


def _rows(value: Any) -> int | str:
    if value == "auto" or (type(value) is int and 1 <= value <= 1_000_000):
        return value
    raise ValueError("expected a number of rows, 1 to 1000000, or 'auto'")


def _device_map(value: Any) -> str | dict[str, int | str] | None:
    if value is None:
        return None
    places = value if isinstance(value, dict) else {"": value or None}
    for module, place in places.items():
        is_device = type(place) is int and isinstance(value, dict) and 0 <= place <= 1000
        if not isinstance(module, str) or not (isinstance(place, str) or is_device):
            raise ValueError("expected 'auto' or the like, or an object from module names to devices")
        check_characters(f"{module}{place}")
    return value


DeviceMap = Annotated[str | dict[str, int | str] | None, PlainValidator(_device_map)]
Dtype = Literal["auto", "fastest", "float32", "bfloat16", "float16"]


def _check_day(value: str) -> None:
    try:
        date.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"expected a day such as {FIRST_DAY}") from error


def _template_variables(value: Any) -> dict[str, bool | int | float | str]:
    if not isinstance(value, dict):
        raise ValueError("expected an object from the variables of a chat template to their values")
    for name, each in value.items():
        if not isinstance(name, str) or name in OWN_VARIABLES:
            raise ValueError(f"{shown(name)} is no variable that can be given; leave it out")
        is_number = isinstance(each, int | float) and abs(each) < float("inf")
        if not (is_number or isinstance(each, str)):
            raise ValueError(f"{shown(name)} is {shown(each)}, expected true, false, a number or a string")
        check_characters(f"{name}{each}")
    return value


Rows = Annotated[int | str, PlainValidator(_rows)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InstructionPair(_Strict):
    """Two system prompts, for and against a trait."""

    pos: Text
    neg: Text


class PersonaDefinition(_Strict):
    """A persona given in the configuration or in a trait file; see `personas.load_persona`."""

    description: String = ""
    positive_texts: Texts = []
    negative_texts: Texts = []
    labelled_positive_texts: Texts = []
    labelled_negative_texts: Texts = []
    resembling_texts: Texts = []
    validation_texts: Texts = []
    instruction: Annotated[list[InstructionPair], Field(max_length=1000)] = []
    questions: Texts = []
    eval_prompt: String = ""

    @model_validator(mode="after")
    def _check_sides(self) -> "PersonaDefinition":
        for name in ("positive_texts", "negative_texts"):
            if not (self.instruction or self.questions or name in self.model_fields_set):
                raise ValueError(f"{name} is missing; give both sides, or instruction and questions")
        return self


def _definition(value: Any) -> Any:
    """Return what a trait file holds, if its path is given."""
    if not isinstance(value, str):
        return value
    path = local_path(value)
    return parse_json(read_text(path), f"trait file {path}")


class ExtractionConfig(_Strict):
    """What persona vectors are made from: `texts`, `responses` (arXiv 2507.21509), `prompt`; `auto` chooses.

    from_texts: personas that are made from texts, where the kind is `responses` or `prompt`. by_persona: one
        of VECTOR_KINDS; of a persona that is named, nothing is chosen.
    n_questions: how many of a persona's questions are asked under each of its system prompts; all by default.
    n_seeds: responses to each. max_new_tokens: of a response.
    """

    kind: Literal["texts", *ASKED_KINDS, "auto"] = "texts"
    from_texts: list[Name] = []
    by_persona: dict[Name, Literal[VECTOR_KINDS]] = {}
    n_questions: Count | None = None
    n_seeds: Count = 1
    max_new_tokens: LargeCount = 64


def _check_differ(name: str, values: list[Any]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{name} holds a value twice: {shown(values)}")


def alphas_of(given: Any, persona: str) -> Sequence[float]:
    """Return the alphas at which a persona's conditions are tried. given: a list, or persona -> list."""
    return given[persona] if isinstance(given, dict) else given


class AlphaSearchConfig(_Strict):
    """The search for alphas when `alpha_values` is `auto`; see `analysis.alpha_search`.

    bracket: the weakest and the strongest alpha to consider, in median block-output norms without massive
        dimensions, whatever `alpha_unit` is; a band shares it among its blocks.
    n_seeds: texts for each development prompt. max_non_words_increase: see `degenerate_text.non_word_share`.
    bound: on the perplexity ratio: its `excess` over what the persona's trait costs by itself, or `plain`.
    """

    bound: Literal["excess", "plain"] = "excess"
    max_perplexity_ratio: Annotated[float, Field(ge=1, le=1e9, allow_inf_nan=False)] = 1.5
    max_repetition_increase: Annotated[float, Field(ge=0, le=1)] = 0.05
    max_non_words_increase: Annotated[float, Field(ge=0, le=1)] = 0.02
    n_evaluations: Annotated[int, Field(ge=2, le=MAX_EVALUATIONS)] = 5
    bracket: tuple[Positive, Positive] = (0.05, 2.0)
    n_seeds: Count = 1

    @model_validator(mode="after")
    def _check_bracket(self) -> "AlphaSearchConfig":
        if self.bracket[0] >= self.bracket[1]:
            raise ValueError(
                f"alpha_search.bracket is {list(self.bracket)}, expected a lower and a higher alpha"
            )
        return self


class ExecutorConfig(_Strict):
    """Where the grids run: in this process, or on a Ray cluster; see `ray_executor`.

    address: of a Ray cluster; without it Ray starts on this machine. n_workers: by default as many as the
        GPUs allow, or one a machine without GPUs. gpus_per_worker: more than one for models that one GPU does
        not hold, with `device_map` or a device for each.
    """

    kind: Literal["local", "ray"] = "local"
    address: Text | None = None
    n_workers: Count | None = None
    gpus_per_worker: Annotated[int, Field(ge=1, le=64)] = 1

    @model_validator(mode="after")
    def _check_kind(self) -> "ExecutorConfig":
        if self.kind == "local" and (self.address or self.n_workers or self.gpus_per_worker > 1):
            raise ValueError(
                'executor: address, n_workers and gpus_per_worker are of use with "kind": "ray" alone'
            )
        return self


class ModelConfig(_Strict):
    """A model with a place of its own; what is left out is as for the whole run.

    offload: of the source, whose decoder blocks lie in host memory while the target writes.
    """

    name: LocalPath
    device: Text | None = None
    device_map: DeviceMap = None
    dtype: Dtype | None = None
    quantization: Quantization | None = None
    offload: bool = False

    @model_validator(mode="after")
    def _check_offload(self) -> "ModelConfig":
        if self.offload and (self.device_map or self.quantization not in (None, "none")):
            raise ValueError(
                "offload moves whole blocks between one device and the host; leave it out with device_map or "
                "quantization"
            )
        return self


# A name, or an object where more is to be said.
Model = Annotated[
    Annotated[LocalPath, Tag("tag-name")] | Annotated[ModelConfig, Tag("tag-model")],
    Discriminator(lambda value: "tag-model" if isinstance(value, dict | ModelConfig) else "tag-name"),
]


class GivenVectors(_Strict):
    """Files of a persona's own vectors in the source, in the target (the oracle), or both."""

    source: LocalPath | None = None
    target: LocalPath | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_is_the_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_any(self) -> "GivenVectors":
        if self.source is None and self.target is None:
            raise ValueError("it names no file; give a path, or source and target")
        return self


def _request_options(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError('expected an object of fields, such as {"reasoning_effort": "low"}')
    for name in value:
        if name in ("model", "messages"):
            raise ValueError(f"{name!r} is not an option; the judge sets it")
        if name in ("max_tokens", "max_completion_tokens"):
            raise ValueError("set judge.max_answer_tokens for the length of an answer")
    try:
        check_characters(json.dumps(value, allow_nan=False, ensure_ascii=False))
    except (TypeError, RecursionError) as error:
        raise ValueError("expected values that JSON can hold") from error
    return value


class JudgeConfig(_Strict):
    """The chat model that judges when `use_gpt4` is true.

    kind: `server` asks an OpenAI-compatible one, `local` loads `model`, an instruct model, as source and
        target are loaded.
    max_usd: what all judgements of a run may cost. texts_per_cell: how many texts of each cell are judged,
        of the same prompts and seeds in every cell; all by default. request_options: further fields of a
        request; null leaves out one of ours.
    """

    kind: Literal["server", "local"] = "server"
    model: Model = "gpt-4o"
    base_url: String | None = None
    api_key_env: Text = "OPENAI_API_KEY"
    max_workers: Count = 4
    max_answer_tokens: Annotated[int, Field(ge=1, le=100_000)] = 1
    usd_per_million_tokens: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 2.5
    max_usd: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    texts_per_cell: Count | None = None
    request_options: Annotated[dict[str, Any], PlainValidator(_request_options)] = {}

    @model_validator(mode="after")
    def _check_kind(self) -> "JudgeConfig":
        of_server = {"base_url", "api_key_env", "max_workers", "max_answer_tokens", "max_usd"}
        of_server |= {"request_options"}
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        odd = sorted(name for name in of_server if getattr(self, name) != defaults[name])
        if self.kind == "local" and odd:
            raise ValueError(f'judge.{odd[0]} is of use with "kind": "server" alone; leave it out')
        if self.kind == "local" and "model" not in self.model_fields_set:
            raise ValueError("judge.model is not set; name the instruct model that judges")
        if self.kind == "server" and isinstance(self.model, ModelConfig):
            raise ValueError('judge.model is loaded here with "kind": "local" alone; give its name')
        return self


class ExperimentConfig(_Strict):
    """All settings of a run; docs/configuration.md explains each.

    Layers: where none is named, PROTOCOL has the defaults. `layer_idx` sets both; `source_layer_idx` and
        `target_layer_idx` set them apart, or to lists of equal length, a band: pairs of blocks, all of which
        are steered; `"layer_idx": "band"` chooses one; `"layer_idx": "auto"` searches all pairs (or those of
        `search_source_layers` and `search_target_layers`) on `search_tokens` source tokens of the neutral
        text.
    Map: `mapping_data` `auto` is `styled_responses` for a target that is asked questions, else
        `neutral_text`.
    Prompts: `prompt_format` `auto` is `chat` for a model that has a template and ends its turns. A chat
        target is asked questions, another one continues text prefixes.
    Extraction: `extraction_resamples` vectors from resampled texts steer on development prompts, to say how
        far another sample would move an effect; 0 leaves that out. disjoint_texts: the source's vectors are
        made from one half of a persona's texts and the native ones from the other; by default where a control
        is read from another source.
    Strength: alpha_unit `absolute` adds alpha * v; `residual_norm` adds alpha * the median block-output norm
        without massive dimensions * v. Vectors have unit norm. alpha_values is a list, or persona -> list;
        `auto` searches the strongest at which a persona's native vector leaves text that can be read, on the
        development prompts. A verdict compares every condition at that alpha, or at the strongest such one of
        a list.
    Test prompts: a list, or the name of a file of shipped questions; a target that continues texts takes the
        shipped text prefixes instead. With `strength_curve`, native, mapped and lexical controls also write
        at multiples of the alpha at which a verdict compares. With `n_turns` of 2 or more, the questions also
        come as conversations of so many turns.
    n_capability_questions: on which the steered target's accuracy is measured; 0 leaves it out.
    Batch sizes: `auto`, or one that is left out, is as many rows as fit where models are on CUDA devices; see
        `with_rows`.
    """

    source_model: Model
    target_model: Model
    output_dir: LocalPath
    layer_idx: Annotated[int | str | None, PlainValidator(_layer)] = None
    source_layer_idx: Layer | Layers | None = None
    target_layer_idx: Layer | Layers | None = None
    search_source_layers: Layers | None = None
    search_target_layers: Layers | None = None
    search_tokens: Annotated[int, Field(ge=1, le=1_000_000_000)] = 50_000
    source_block_path: String | None = None
    target_block_path: String | None = None
    source_revision: Text | None = None
    target_revision: Text | None = None
    trust_remote_code: bool = False
    device: Text = "auto"
    device_map: DeviceMap = None
    executor: ExecutorConfig = ExecutorConfig()
    dtype: Dtype = "auto"
    quantization: Quantization = "none"

    neutral_text: LocalPath = "wikitext-103"
    n_training_samples: Samples = 5000
    mapping_data: Literal["neutral_text", "responses", "styled_responses", "auto"] = "neutral_text"
    mapping_positions: Literal[PairPositions, "auto"] = "auto"
    lambda_values: Lambdas = [0.01, 0.1, 1.0, 10.0, 100.0]
    lambda_unit: LambdaUnit = "absolute"
    lambda_criterion: LambdaCriterion = "pooled"
    n_folds: Annotated[int, Field(ge=2, le=1000)] = 5

    prompt_format: PromptFormat = "auto"
    source_prompt_format: PromptFormat | None = None
    target_prompt_format: PromptFormat | None = None
    system_prompt: Prompt | None = None
    chat_template_kwargs: Annotated[dict[str, Any], PlainValidator(_template_variables)] = {}
    chat_template_date: Annotated[str, _if_string(_check_day)] = FIRST_DAY

    personas: list[Name] | None = None
    persona_datasets: dict[Name, Annotated[PersonaDefinition, BeforeValidator(_definition)]] = {}
    vectors: dict[Name, GivenVectors] = {}
    persona_position: PersonaPosition = "last"
    extraction: ExtractionConfig = ExtractionConfig()
    extraction_resamples: Annotated[int, Field(ge=0, le=MOST_RESAMPLES)] = 3
    disjoint_texts: bool | None = None

    methods: Annotated[list[Method], Field(min_length=1)] = list(DEFAULT_METHODS)
    controls: list[Literal[CONTROLS]] | None = None
    check_source_vectors: bool = True
    n_test_prompts: LargeCount = 30
    test_prompts: TestPrompts = "test_questions"
    alpha_values: AlphaValues = [0.5, 1.0, 2.0, 3.0, 5.0]
    alpha_unit: AlphaUnit = "absolute"
    alpha_search: AlphaSearchConfig = AlphaSearchConfig()
    strength_curve: bool = False
    n_capability_questions: Annotated[int, Field(ge=0, le=N_QUESTIONS)] = N_QUESTIONS
    n_turns: Annotated[int, Field(ge=1, le=MOST_TURNS)] = 1
    steer_positions: SteerPositions = "all"
    n_seeds: Count = 3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    max_new_tokens: LargeCount = 100
    temperature: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=10_000_000)] = 50
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    ablation_layer_pairs: LayerPairs | None = None
    ablation_samples: Annotated[list[Samples], Field(min_length=2, max_length=100)] | None = None

    use_gpt4: bool = False
    judge: JudgeConfig = JudgeConfig()
    independent_perplexity: bool = True
    probe: bool = True
    evaluation_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    extraction_batch_size: Rows = 8
    generation_batch_size: Rows = 32
    cuda_graphs: bool = False
    evaluation_batch_size: Rows = 8

    _chosen_kinds: Mapping[str, str] = PrivateAttr(default_factory=dict)  # persona -> one of VECTOR_KINDS

    @model_validator(mode="before")
    @classmethod
    def _by_protocol(cls, given: Any) -> Any:
        """Return what is given with the protocol's defaults, where no layers are named."""
        if not isinstance(given, dict) or any(given.get(key) is not None for key in LAYER_KEYS):
            return given
        named = {key: value for key, value in given.items() if key not in LAYER_KEYS}
        methods = named.get("methods", PROTOCOL["methods"])
        if isinstance(methods, list | tuple) and not all(name in methods for name in (MAPPED, ORACLE)):
            named = {"strength_curve": False, **named}  # there is nothing to compare
        if isinstance(extraction := named.get("extraction"), dict):
            named["extraction"] = {**PROTOCOL["extraction"], **extraction}
        return {"personas": shipped_personas(), **PROTOCOL, **named}

    @model_validator(mode="after")
    def _check_together(self) -> "ExperimentConfig":
        self._check_layers()
        self._check_band()
        self._check_extraction()
        for name in ("lambda_values", "methods", "controls"):
            _check_differ(name, getattr(self, name) or [])
        self._check_alphas()
        self._check_strength_curve()
        if self.n_turns > 1 and not set(CONVERSING) & set(self.conditions):
            raise ValueError(
                "n_turns follows the mapped and the native vector over conversations; add ridge_mapped or "
                "oracle to methods, or set n_turns to 1"
            )
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature:g}, expected 0 (greedy) or {LOWEST_TEMPERATURE:g} or more"
            )
        if odd := [key for key in ("target_model", "judge.model") if self.place_of(key).offload]:
            raise ValueError(
                f"{odd[0]}.offload: the source alone rests while the target writes; leave it out"
            )
        if self.executor.kind == "ray":
            self._check_workers()
        self._check_personas()
        self._check_size()
        return self

    def _check_workers(self) -> None:
        n = self.executor.gpus_per_worker
        for key in ("source_model", "target_model"):
            place = self.place_of(key)
            number = place.device.removeprefix("cuda:")
            if number.isdecimal() and int(number) >= n:
                raise ValueError(
                    f"{key} is to be on {place.device}, but a Ray worker has {n} GPU{'s' * (n > 1)}, "
                    f"numbered from 0; set executor.gpus_per_worker to {int(number) + 1}"
                )
            if place.quantization != "none":
                raise ValueError(
                    f"{key} with quantization {place.quantization!r}: the process that hands chunks to Ray's "
                    "workers takes no GPU and cannot quantise; leave out the executor, or raise "
                    'executor.gpus_per_worker with "device_map": "auto"'
                )

    def _check_personas(self) -> None:
        n = len(self.persona_names)
        if n == 0:
            raise ValueError(f"personas is empty; name some of {', '.join(shipped_personas())}")
        if n > MOST_PERSONAS:
            raise ValueError(f"{n} personas, expected at most {MOST_PERSONAS}; split the run")
        check_names_differ(self.persona_names)

    def _check_layers(self) -> None:
        sides = ("source", "target")
        given = [f"{side}_layer_idx" for side in sides if getattr(self, f"{side}_layer_idx") is not None]
        searched = [f"search_{side}_layers" for side in sides if getattr(self, f"search_{side}_layers")]
        if self.layer_idx in ("auto", "band") and given:
            raise ValueError(
                f"layer_idx {self.layer_idx!r} chooses the blocks of both models; leave out {given[0]}"
            )
        if self.layer_idx != "auto" and searched:
            raise ValueError(f'{searched[0]} is of use with "layer_idx": "auto" alone; leave it out')
        missing = [f"{side}_layer_idx" for side in sides if f"{side}_layer_idx" not in given]
        if self.layer_idx is None and missing:  # one side is named, else PROTOCOL has the layers
            raise ValueError(f"{missing[0]} is not set; set layer_idx for both models, or this one")

    def _check_alphas(self) -> None:
        given = self.alpha_values
        if given == "auto":
            if not self.independent_perplexity:
                raise ValueError("alpha_values 'auto' decides by the independent perplexity; leave it on")
            return
        if isinstance(given, dict) and (odd := set(self.persona_names) ^ set(given)):
            raise ValueError(
                f"alpha_values has alphas for each persona, but {shown(sorted(odd)[0])} is in one of "
                "alpha_values and personas alone; name the same ones in both"
            )
        alphas: list[float] = []
        for values in given.values() if isinstance(given, dict) else [given]:
            _check_differ("alpha_values", values)
            alphas += values
        if any(alpha == 0 or abs(alpha) == float("inf") or alpha != alpha for alpha in alphas):
            raise ValueError("alpha_values must be finite and not 0; the unsteered baseline is always run")
        if any(not 1e-9 <= abs(alpha) <= 1e9 for alpha in alphas):
            raise ValueError(
                "alpha_values must be 1e-9 to 1e9 in size; others vanish or overflow in the model"
            )

    def _check_strength_curve(self) -> None:
        if not self.strength_curve:
            return
        if missing := [name for name in (MAPPED, ORACLE) if name not in self.conditions]:
            raise ValueError(
                f"strength_curve compares the mapped vector with the native one; add {' and '.join(missing)} "
                "to methods, or set strength_curve to false"
            )
        if not self.independent_perplexity:
            raise ValueError(
                "strength_curve compares at an equal independent perplexity; leave independent_perplexity "
                "on, or set strength_curve to false"
            )

    def _check_size(self) -> None:
        n_texts = self.n_cells * self.n_test_prompts * self.n_seeds
        if n_texts > MOST_TEXTS:
            raise ValueError(
                f"the grid has {n_texts:,} texts ({self.n_cells} cells, {self.n_test_prompts} prompts, "
                f"{self.n_seeds} seeds), expected at most {MOST_TEXTS:,}; lower n_seeds or n_test_prompts, "
                "or name fewer alphas"
            )

    def _check_extraction(self) -> None:
        names, layers_are_searched = self.persona_names, self.layer_idx == "auto"
        if self.extraction_resamples == 1:
            raise ValueError("extraction_resamples is 1, which has no spread; expected 0, or 2 or more")
        extraction = self.extraction
        for key, named in (
            ("vectors", self.vectors),
            ("extraction.from_texts", extraction.from_texts),
            ("extraction.by_persona", extraction.by_persona),
        ):
            if unknown := [name for name in named if name not in names]:
                raise ValueError(f"{key} names {unknown[0]!r}, which is no persona of this run")
        if self.vectors and layers_are_searched:
            raise ValueError("layer_idx 'auto' searches with text pairs; with 'vectors', name the layers")
        if self.persona_position == "response":
            raise ValueError(
                "persona_position says how texts are read; responses are always read at all of their tokens: "
                "choose 'extraction' of kind 'responses', and 'last' or 'mean' here"
            )
        if layers_are_searched and any(self.kind_of(name) != "texts" for name in names):
            raise ValueError(
                "layer_idx 'auto' searches with text pairs, not with responses or prompts; name the layers, "
                "or choose 'extraction' of kind 'texts'"
            )

    def kind_of(self, persona: str) -> str:
        """Return what a persona's vectors are made from: `texts`, `responses` or `prompt`."""
        kind = self.vector_kind(persona)
        return kind if kind in ASKED_KINDS else "texts"

    @property
    def reads_prompts(self) -> bool:
        """Whether a persona's vectors are made from prompts, for which there are maps of their own."""
        return "prompt" in map(self.kind_of, self.persona_names)

    def vector_kind(self, persona: str) -> str:
        """Return the same with where texts are read: one of VECTOR_KINDS.

        While it is yet to be chosen, it is texts, or responses of a persona without texts.
        """
        extraction, definition = self.extraction, self.persona_datasets.get(persona)
        for named in (self._chosen_kinds, extraction.by_persona):
            if persona in named:
                return named[persona]
        if extraction.kind == "auto" and definition and not definition.positive_texts:
            return "responses"
        is_asked = extraction.kind in ASKED_KINDS and persona not in extraction.from_texts
        return extraction.kind if is_asked else self.persona_position

    def with_vector_kinds(self, kinds: Mapping[str, str]) -> "ExperimentConfig":
        """Return the same configuration with the kind that was chosen, or is tried, for these personas."""
        config = self.model_copy()
        config._chosen_kinds = dict(kinds)
        return config

    @property
    def open_kinds(self) -> list[str]:
        """The personas whose kind of vector is left to be chosen, also where it has been by now."""
        is_open = self.extraction.kind == "auto"
        return [name for name in self.persona_names if is_open and name not in self.extraction.by_persona]

    @property
    def has_chosen_kinds(self) -> bool:
        """Whether nothing is left to be chosen."""
        return self._chosen_kinds.keys() >= set(self.open_kinds)

    def _check_band(self) -> None:
        target = self.target_layer_idx
        sizes = [
            len(layers) if isinstance(layers, list) else "one layer"
            for layers in (self.source_layer_idx, target)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"source_layer_idx and target_layer_idx are a band of {sizes[0]} and {sizes[1]}; give two "
                "lists of equal length, a source block for each target block"
            )
        if isinstance(target, list) and len(set(target)) < len(target):
            raise ValueError(f"target_layer_idx names a block twice: {target}; each is steered once")

    @property
    def layer_pairs(self) -> tuple[tuple[int, int], ...] | None:
        """Blocks of source and target that are read and steered; None if they are yet to be chosen."""
        if self.layer_idx in ("auto", "band"):
            return None
        sides = (self.source_layer_idx, self.target_layer_idx)
        source, target = (self.layer_idx if layers is None else layers for layers in sides)
        lists = [layers if isinstance(layers, list) else [layers] for layers in (source, target)]
        return tuple(zip(*lists, strict=True))

    @property
    def persona_names(self) -> list[str]:
        """Personas to run: `personas` (the specification's three by default), then those defined here."""
        listed = DEFAULT_PERSONAS if self.personas is None else self.personas
        return list(dict.fromkeys([*listed, *self.persona_datasets]))

    def alphas_of(self, persona: str) -> Sequence[float]:
        """Return a persona's alphas, where they are given and not searched for."""
        return alphas_of(self.alpha_values, persona)

    @property
    def conditions(self) -> list[str]:
        """What is compared beside the unsteered text: `methods`, then the controls that a verdict needs.

        Where `controls` is given, it says which controls are added instead.
        """
        added = self.controls
        if added is None:
            added = DECIDING_CONTROLS if {MAPPED, ORACLE} <= set(self.methods) else ()
        return list(dict.fromkeys([*self.methods, *added]))

    @property
    def steered_conditions(self) -> list[str]:
        """The conditions that add a vector."""
        return [name for name in self.conditions if CONDITIONS[name].is_steered]

    @property
    def source_controls(self) -> list[str]:
        """The conditions whose vectors are read from another source, each with a map of its own."""
        return [name for name in self.conditions if CONDITIONS[name].source]

    def without_source_controls(self) -> "ExperimentConfig":
        """Return the configuration of the same run without the controls that are read from another source."""
        kept = [name for name in self.conditions if name not in self.source_controls]
        changed = {"methods": kept, "controls": [], "disjoint_texts": self.halves_texts}
        return self.model_copy(update=changed)

    @property
    def halves_texts(self) -> bool:
        """Whether the source's vectors are made from other texts than the native ones."""
        return bool(self.source_controls) if self.disjoint_texts is None else self.disjoint_texts

    @property
    def n_cells(self) -> int:
        """Number of cells: unsteered text, persona x draw x alpha, persona x prompting baseline."""
        names, methods, is_searched = self.persona_names, self.steered_conditions, self.alpha_values == "auto"

        n_steered = sum(
            (1 if is_searched else len(self.alphas_of(name)))
            * sum(len(self.draws_of(name, method)) for method in methods)
            for name in names
        )
        return 1 + n_steered + len(names) * (PROMPTED in self.methods)

    def draws_of(self, persona: str, condition: str) -> dict[str, str | None]:
        """Return vector name -> what its draw is called; see `experiment.conditions.draws_of`.

        The others of a persona that is alone are shipped ones.
        """
        names = self.persona_names
        if len(names) == 1:
            names += [name for name in shipped_personas() if name not in names][:N_DRAWS]
        return draws_of(condition, other_personas(names)[persona])

    @property
    def open_rows(self) -> list[str]:
        """The batch sizes that are left to the memory of CUDA devices."""
        return [key for key in ROWS if getattr(self, key) == "auto" or key not in self.model_fields_set]

    def with_rows(self, fitting: Mapping[str, int] | None = None) -> "ExperimentConfig":
        """Return the same configuration with numbers for all batch sizes.

        fitting: key -> rows that fit, of those that `open_rows` names; elsewhere `auto` is what ROWS says.
        """
        rows = {key: ROWS[key] for key in ROWS if getattr(self, key) == "auto"} | dict(fitting or {})
        return self.model_copy(update=rows)

    @property
    def seeds(self) -> list[int]:
        """The seeds of generation."""
        return list(range(self.seed, self.seed + self.n_seeds))

    def load_personas(self) -> list[Persona]:
        """Return the personas to run. Raises InputError: unknown name, or a side without texts."""
        given = {name: definition.model_dump() for name, definition in self.persona_datasets.items()}
        personas = [load_persona(name, given.get(name)) for name in self.persona_names]
        for persona in personas:
            check_extraction(persona, self.kind_of(persona.name))
            if self.halves_texts:
                check_halves(persona, self.kind_of(persona.name))
        return personas

    def place_of(self, key: str) -> ModelConfig:
        """Return a model with its device, device_map, dtype and quantization, its own or those of the run.

        key: `source_model`, `target_model` or `judge.model`. A device of its own rules out the run's map.
        """
        given = self.judge.model if key == "judge.model" else getattr(self, key)
        own = given.model_dump(exclude_none=True) if isinstance(given, ModelConfig) else {"name": given}
        shared = {name: getattr(self, name) for name in ("device", "device_map", "dtype", "quantization")}
        if "device" in own:
            del shared["device_map"]
        return ModelConfig.model_construct(**{**shared, **own})

    def format_of(self, side: str) -> str:
        """Return how the model of a side, `source` or `target`, is to be shown prompts: raw, chat or auto."""
        return getattr(self, f"{side}_prompt_format") or self.prompt_format

    def load_test_prompts(self, are_questions: bool = False) -> list[str]:
        """Return `n_test_prompts` prompts. Raises InputError: too few, or one is there twice.

        are_questions: whether the target is asked questions; else shipped text prefixes are taken, unless the
        configuration has prompts of its own.
        """
        prompts = self.test_prompts
        if isinstance(prompts, str):
            prompts = load_prompts(prompts if are_questions else "test")
        if len(prompts) < self.n_test_prompts:
            raise InputError(
                f"n_test_prompts is {self.n_test_prompts} but there are {len(prompts)} prompts; lower it "
                "or give more in test_prompts"
            )
        if len(set(prompts)) != len(prompts):
            raise InputError("test_prompts holds a prompt twice; remove one")
        return prompts[: self.n_test_prompts]


def load_config(config: dict[str, Any] | str | Path | ExperimentConfig) -> ExperimentConfig:
    """Return a validated configuration from a dictionary or a JSON file.

    Raises InputError, in one or two lines: no such file, not JSON, an unknown key (with the
    nearest known one), or a value that is missing or out of range.
    """
    if isinstance(config, ExperimentConfig):
        return config
    if not isinstance(config, dict):
        config = _read_config(Path(config))
    try:
        return ExperimentConfig.model_validate(config)
    except ValidationError as error:
        problems, known = error.errors(), list(ExperimentConfig.model_fields)
        more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
        raise InputError("; ".join(explain(each, known) for each in problems[:2]) + more) from error
    except ValueError as error:  # pydantic leaves a number of thousands of digits to Python
        raise InputError(f"the configuration cannot be read ({str(error)[:100]})") from error


def _read_config(path: Path) -> dict[str, Any]:
    path = local_path(str(path))
    content = parse_json(read_text(path), f"configuration {path}")
    if not isinstance(content, dict):
        raise InputError(f"configuration {path} is a {type(content).__name__}, expected a JSON object")
    return content

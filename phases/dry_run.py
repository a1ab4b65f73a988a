"""Print what a run would do and cost, from counts and a few measured rates; writes nothing.

What the journals and artifacts of the output directory hold already is counted and costs nothing. Three rates
are
measured in this process: reading a token in either model, and generating a text of full length. The other
costs are counts of tokens times these. Loading is left out, and a Ray cluster is not asked. A judge's cost is
computed from a price and a number of tokens. Texts that a model ends early cost less than this says.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch

from evaluation import continuation_perplexities
from experiment.conditions import N_DRAWS, STEERED, vector_names
from experiment.executor import GenerationSettings
from experiment.inputs import N_PLAIN_TEXTS
from experiment.run import Artifact, Run
from maps.comparison_maps import KINDS
from phases.check_setup import PREFLIGHT, n_preflight_cells
from phases.choose_alphas import ALPHA_SEARCH
from phases.choose_layers import LAYER_SEARCH
from phases.collect_responses import EXTRACTION_RESPONSES, NEUTRAL_RESPONSES, response_rows
from phases.fit_maps import RIDGE_MAPPING
from phases.make_vectors import PERSONA_VECTORS, grid_rows
from phases.score_texts import planned_evaluations
from phases.validate_scorers import JUDGED_A_SIDE, N_SEEDS, SCORER_VALIDATION, sets_of
from scoring.cached_judge import N_REPEATED, TOKENS_PER_JUDGEMENT
from scoring.likelihood_ratio import N_TRAINING, N_WINDOWS, WINDOW, untrained
from scoring.validation import at_most, texts_of
from support.journal import rows_of
from support.pair_statistics import DEFAULT_SAMPLE
from texts.encoding import encode

N_TIMED = 8  # texts
TIMED_TOKENS = (2, 8)  # new tokens of two short batches; their difference is what a token takes
VALIDATION_TOKENS = 25  # of a text of a validation set, on average
N_PREFIXES = 3  # behind which the likelihood ratio reads a text
N_TRAINING_TEXTS = 12 * N_TRAINING  # on which a likelihood ratio is trained, shuffled ones among them
SMALL_WIDTH = 256  # of a timed eigendecomposition; others take the cube of their width


@dataclass(frozen=True)
class Rates:
    """Seconds of a token that source and target read, of a text that the target generates, and of an
    eigendecomposition of a model's width."""

    source_token: float
    target_token: float
    text: float
    decomposition: float

    @property
    def scored_token(self) -> float:
        """Seconds of a token that the likelihood ratio's model reads, which is about as large as these."""
        return min(self.source_token, self.target_token)


@dataclass
class _Estimate:
    lines: list[str] = field(default_factory=list)
    minutes: float = 0.0

    def add(self, what: str, seconds: float) -> None:
        """Add a line with its minutes."""
        self.lines.append(f"{what}, about {seconds / 60:.1f} min")
        self.minutes += seconds / 60


def describe_run(run: Run) -> str:
    """Return counts, estimated minutes and the judge's cost of all five phases, as lines of text.

    What a run would reject, `experiment.inputs.load_inputs` has rejected before.
    """
    estimate, rates = _Estimate(), _measure(run)
    _add_search(run, rates, estimate)
    _add_map(run, rates, estimate)
    n_responses = _add_preparation(run, rates, estimate)
    n_texts = run.config.n_cells * len(run.inputs.prompts) * run.config.n_seeds
    _add_grid(run, rates, estimate, n_texts)
    n_judged = _add_validation(run, rates, estimate)
    _add_judge(run, estimate, n_responses + n_judged)
    device = run.inputs.target.model.device
    return "\n".join(
        [*estimate.lines, f"total: about {estimate.minutes:.0f} min on {device}, beside loading"]
    )


def _is_current(artifact: Artifact, run: Run) -> bool:
    return artifact.current(run) is not None


def _cached(n: int) -> str:
    return f", {n} of them cached" if n else ""


def _add_search(run: Run, rates: Rates, estimate: _Estimate) -> None:
    config = run.config
    if config.layer_idx != "auto" or _is_current(LAYER_SEARCH, run):
        return
    layers = [
        len(wanted or range(side.n_blocks))
        for side, wanted in zip(
            run.inputs.sides, (config.search_source_layers, config.search_target_layers), strict=True
        )
    ]
    seconds = config.search_tokens * (rates.source_token + rates.target_token)
    seconds += layers[0] * (1 + layers[1]) * rates.decomposition
    estimate.add(
        f"layer search: {layers[0]} x {layers[1]} layer pairs, {config.search_tokens} tokens", seconds
    )


def _add_map(run: Run, rates: Rates, estimate: _Estimate) -> None:
    config, inputs = run.config, run.inputs
    n_pairs, n_texts = len(inputs.layer_pairs), config.n_training_samples
    with run.at_pair(inputs.middle_pair) as at_pair:
        is_fitted = _is_current(RIDGE_MAPPING, at_pair) or _is_current(PERSONA_VECTORS, run)
    read = [item.text for item in inputs.neutral_texts]
    tokens = [sum(map(len, encode(side.tokenizer, read))) / len(read) for side in inputs.sides]
    if inputs.neutral_questions:  # responses are not generated yet, and may be as long as allowed
        tokens = [float(config.max_new_tokens)] * 2
    counted = f"{n_texts} {config.mapping_data.replace('_', ' ')}"
    if is_fitted:
        estimate.lines.append(f"texts for the map: {counted}, already mapped")
        return
    n_maps = 1 + sum(len(vector_names(kind)) for kind in KINDS)
    seconds = n_texts * (tokens[0] * rates.source_token + tokens[1] * rates.target_token)
    seconds += n_pairs * (config.n_folds + 1) * n_maps * rates.decomposition
    width = sum(side.d_model for side in inputs.sides)
    size = n_pairs * (config.n_folds * width**2 * 8 + DEFAULT_SAMPLE * width * 4) / 2**30
    of_tokens = f"{n_texts * tokens[0]:.0f} source and {n_texts * tokens[1]:.0f} target tokens"
    of_pairs = f"{n_pairs} layer pair{'s' * (n_pairs > 1)}, whose sums take {size:.1f} GiB"
    estimate.add(f"texts for the map: {counted}, {of_tokens}, {of_pairs}", seconds)


def _add_preparation(run: Run, rates: Rates, estimate: _Estimate) -> int:
    """Add responses, preflight and alpha search; return how many responses are scored."""
    config, inputs, n_responses = run.config, run.inputs, 0
    n_development = len(inputs.development_prompts)
    if inputs.neutral_questions and not _is_current(NEUTRAL_RESPONSES, run):
        n = config.n_training_samples
        estimate.add(f"responses that the map is learnt from: {n}", n * rates.text)
    if inputs.responding_personas and not _is_current(EXTRACTION_RESPONSES, run):
        responders = dict.fromkeys(inputs.prompting.responders.values())
        n_responses = sum(
            len(response_rows(run, persona, name))
            for persona in inputs.responding_personas
            for name in responders
        )
        share = config.extraction.max_new_tokens / config.max_new_tokens
        estimate.add(f"responses that vectors are made from: {n_responses}", n_responses * rates.text * share)
    if not _is_current(PREFLIGHT, run):
        n = n_preflight_cells(run) * n_development
        estimate.add(f"preflight: {n} generations", n * rates.text)
    if config.alpha_values == "auto" and not _is_current(ALPHA_SEARCH, run):
        n_vectors = len(inputs.personas) * len(config.steering_methods)
        n = n_development * config.alpha_search.n_seeds * (1 + n_vectors * config.alpha_search.n_evaluations)
        seconds = n * (rates.text + _perplexity_seconds(run, rates))
        estimate.add(f"alpha search: {n} generations and evaluations on development prompts", seconds)
    return n_responses


def _perplexity_seconds(run: Run, rates: Rates) -> float:
    """Return what the perplexities of a text of full length take."""
    tokens = run.config.max_new_tokens * 1.25  # with its prompt
    return tokens * (rates.target_token + rates.source_token * run.config.independent_perplexity)


def _ratio_seconds(run: Run, rates: Rates, n_tokens: int) -> float:
    """Return what the likelihood ratio of a text of so many tokens takes."""
    n_read = min(n_tokens, N_WINDOWS * WINDOW) * N_PREFIXES
    return n_read * rates.scored_token * run.config.likelihood_ratio


def _add_grid(run: Run, rates: Rates, estimate: _Estimate, n_texts: int) -> None:
    config, inputs = run.config, run.inputs
    generated, evaluated, unread = _cached_rows(run)
    n_per_cell = len(inputs.prompts) * config.n_seeds
    n_evaluations = n_texts + (len(inputs.personas) - 1) * n_per_cell
    estimate.add(
        f"generations: {n_texts} ({config.n_cells - 1} steered cells and 1 baseline, {len(inputs.prompts)} "
        f"prompts x {config.n_seeds} seeds each){_cached(generated)}, at most "
        f"{n_texts * config.max_new_tokens} tokens",
        rates.text * (n_texts - generated),
    )
    # An unsteered text is read once for all personas.
    n_read = n_texts - generated + unread
    seconds = _perplexity_seconds(run, rates) * n_read
    seconds += _ratio_seconds(run, rates, config.max_new_tokens) * (n_evaluations - evaluated)
    estimate.add(f"evaluations: {n_evaluations}{_cached(evaluated)}", seconds)
    n_vectors = sum(len(vector_names(name)) for name in config.methods if name in STEERED) * len(
        inputs.personas
    )
    tokens = sum(len(ids) for ids in encode(inputs.target.tokenizer, _plain_texts(run)))
    estimate.add(f"plain text under {n_vectors} vectors", (n_vectors + 1) * tokens * rates.target_token)


def _cached_rows(run: Run) -> tuple[int, int, int]:
    """Return how many texts and evaluations of the grid the journals hold, and how many texts are yet to be
    read.

    Of searched alphas, none is known.
    """
    if run.config.alpha_values == "auto" or run.folder.fresh:
        return 0, 0, 0
    texts = rows_of(run.folder.path / "generation_journal.jsonl")
    planned = grid_rows(run, run.config.alpha_values)
    generated = [{**row, **texts[row["key"]]} for row in planned if row["key"] in texts]
    if not generated:
        return 0, 0, 0
    done = rows_of(run.folder.path / "evaluation_journal.jsonl")
    evaluations = planned_evaluations(run, generated)
    new = [row for row in evaluations if row["key"] not in done]
    known = {row["perplexity_key"] for row in done.values()}
    unread = {row["perplexity_key"] for row in new} - known
    return len(generated), len(evaluations) - len(new), len(unread)


def _add_validation(run: Run, rates: Rates, estimate: _Estimate) -> int:
    """Add training and validation of the scorers; return how many texts a judge reads for it."""
    inputs, n_development = run.inputs, len(run.inputs.development_prompts)
    if run.config.likelihood_ratio and (
        names := untrained(run.config.persona_names, inputs.labelled_personas)
    ):
        seconds = len(names) * N_TRAINING_TEXTS * _ratio_seconds(run, rates, VALIDATION_TOKENS)
        estimate.add(f"likelihood ratios to train: {len(names)}", seconds)
    if _is_current_validation(run):
        return 0
    unsteered = [f"unsteered text {n}" for n in range(N_SEEDS * n_development)]
    steered = [f"degenerate text {n}" for n in range(N_DRAWS * n_development)]
    sets = [sets_of(run, persona, unsteered, steered) for persona in inputs.personas]
    n_read, n_generated = sum(len(texts_of(each)) for each in sets), len(unsteered) + len(steered)
    seconds = n_generated * rates.text + n_read * _ratio_seconds(run, rates, VALIDATION_TOKENS)
    estimate.add(f"validation of the scorers: {n_read} texts, {n_generated} generations", seconds)
    return sum(len(texts_of(at_most(each, JUDGED_A_SIDE))) + N_REPEATED * bool(each) for each in sets)


def _is_current_validation(run: Run) -> bool:
    # Where alphas are searched and the search has not run, the key of the validation is not known.
    is_known = run.config.alpha_values != "auto" or _is_current(ALPHA_SEARCH, run)
    return is_known and _is_current(SCORER_VALIDATION, run)


def _add_judge(run: Run, estimate: _Estimate, n_others: int) -> None:
    """Add what a judge is asked and costs. n_others: texts beside those of the grid."""
    config, settings = run.config, run.config.judge
    if not config.use_gpt4:
        estimate.lines.append("judgements: 0, about 0.00 USD")
        return
    n_per_cell = len(run.inputs.prompts) * config.n_seeds
    n_judged = min(n_per_cell, settings.texts_per_cell or n_per_cell)
    # The coherence of an unsteered text is asked once, its trait for each persona.
    n_planned = (2 * config.n_cells - 1 + len(run.inputs.personas)) * n_judged + n_others
    n_known = 0
    if not run.folder.fresh:
        n_known = min(len(rows_of(run.folder.path / "judgements_journal.jsonl")), n_planned)
    n_new, counted = n_planned - n_known, f"judgements: {n_planned}{_cached(n_known)}"
    if settings.kind == "local":
        asked = ["Rate this. " * 60] * N_TIMED
        estimate.add(counted, n_new * _seconds(run.inputs.judge.judge, asked[:1], asked) / N_TIMED)
        return
    price = settings.usd_per_million_tokens
    n_tokens = TOKENS_PER_JUDGEMENT + settings.max_answer_tokens - 1
    cap = f", at most {settings.max_usd:g} USD" if settings.max_usd else ""
    estimate.lines.append(
        f"{counted}, about {n_new * n_tokens * price / 1e6:.2f} USD at {price:g} USD per million tokens and "
        f"{n_tokens} tokens each{cap}"
    )


def _plain_texts(run: Run) -> list[str]:
    return [item.text for item in run.inputs.neutral_texts[:N_PLAIN_TEXTS]]


def _measure(run: Run) -> Rates:
    """Return the rates of this process and these models."""
    source_token, target_token = (_seconds_of_token(run, side.name) for side in run.inputs.sides)
    square = torch.randn(SMALL_WIDTH, SMALL_WIDTH, dtype=torch.float64)
    square = square @ square.T
    width = max(side.d_model for side in run.inputs.sides)
    decomposition = _seconds(torch.linalg.eigh, square[:9, :9], square) * (width / SMALL_WIDTH) ** 3
    return Rates(source_token, target_token, _seconds_of_text(run), decomposition)


def _seconds_of_token(run: Run, name: str) -> float:
    """Return the seconds in which a side's model reads a token of plain passages, with its logits."""
    side, texts = run.inputs.side(name), _plain_texts(run)[:N_TIMED]

    def read(passages: Sequence[str]) -> Any:
        prompts = [""] * len(passages)
        return continuation_perplexities(side.model, side.tokenizer, prompts, passages, N_TIMED)

    n_tokens = sum(len(ids) for ids in encode(side.tokenizer, texts))
    return _seconds(read, texts[:1], texts) / n_tokens


def _seconds_of_text(run: Run) -> float:
    """Return the seconds of a generated text of full length, in a batch as large as a run's."""
    config, inputs = run.config, run.inputs
    settings = GenerationSettings.of(inputs, [1.0] * len(inputs.layer_pairs))
    generator = settings.generator(inputs.target)
    shown = [inputs.prompting.prompt("target", prompt) for prompt in inputs.prompts]
    n_rows = min(config.generation_batch_size, len(shown) * config.n_cells * config.n_seeds)
    prompts = list(islice(cycle(shown), n_rows))
    first, second = (min(n, config.max_new_tokens) for n in TIMED_TOKENS)
    short, longer = (
        _seconds(lambda asked, n=n: generator.generate_batch(asked, n), prompts[:1], prompts)
        for n in (first, second)
    )
    token = (longer - short) / (second - first) if second > first and longer > short else longer / second
    return (longer + token * (config.max_new_tokens - second)) / n_rows


def _seconds(work: Callable[[Any], Any], little: Any, much: Any) -> float:
    """Return the seconds of `work(much)`, after `work(little)`, which pays for weights that are paged in."""
    work(little)
    started = time.perf_counter()
    work(much)
    return time.perf_counter() - started

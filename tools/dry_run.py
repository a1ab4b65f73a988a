"""Print what a run would do and cost, from counts and a few measured rates; writes nothing.

What the output directory holds already is counted and costs nothing. Three rates are measured in this
process: reading a token in either model, and generating a text of full length. Other costs are counts of
tokens times these; a judge's cost comes from a price and a number of tokens. Loading is left out, a Ray
cluster is not asked, and texts that a model ends early cost less than this says.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from analysis.verdict import FEWEST_PROMPTS
from decoding.memory import row_bytes
from evaluation import continuation_perplexities
from experiment.batch_sizes import longest_rows
from experiment.conditions import (
    CONDITIONS,
    DECIDING_CONTROLS,
    LEXICAL_CONTROLS,
    MAPPED,
    N_DRAWS,
    ORACLE,
    RANDOM,
    UNSTEERED,
    vector_names,
)
from experiment.config import VECTOR_KINDS
from experiment.executor import GenerationSettings
from experiment.inputs import N_PLAIN_TEXTS, Inputs
from experiment.run import Artifact, Run
from judging.cached_judge import N_REPEATED, TOKENS_PER_JUDGEMENT
from maps.comparison_maps import KINDS
from maps.pair_collection import sums_bytes
from phases.check_setup import PREFLIGHT, n_preflight_cells
from phases.choose_alphas import (
    ALPHA_SEARCH,
    EXTRACTION_CHOICE,
    choose_extraction,
    compared_alphas,
    n_tried_alphas,
    required_alphas,
)
from phases.collect_responses import EXTRACTION_RESPONSES, NEUTRAL_RESPONSES, response_rows
from phases.converse import conversing_cells
from phases.detect_traits import DETECTION, labelled_sides, response_sides
from phases.fit_maps import LAYER_SEARCH, RIDGE_MAPPING, left_out
from phases.make_vectors import PERSONA_VECTORS, grid_rows
from phases.score_texts import planned_evaluations
from phases.side_effects import N_QUESTIONS, RESAMPLED, texts_over_strengths
from phases.validate_scorers import JUDGED_A_SIDE, N_SEEDS, SCORER_VALIDATION, sets_of
from ridge_mapping import algebra_device
from scoring.trait_scorer import n_training_texts, untrained
from scoring.validation import at_most, texts_of
from support.journal import rows_of
from support.vocabulary import PROMPT_MAPS
from texts.encoding import encode
from texts.questions import load_questions

N_TIMED = 8  # texts
TIMED_TOKENS = (2, 8)  # new tokens of two short batches; their difference is what a token takes
VALIDATION_TOKENS = 25  # of a text of a validation set, on average
PROBE_SHARE = 0.25  # of what reading a token takes: a probe reads half of the blocks, and predicts nothing
SMALL_WIDTH = 256  # of a timed eigendecomposition; others take the cube of their width
# What the maps of a layer pair take with five folds: eigendecompositions, and matrix products. Those of a
# control share their decompositions over the layer pairs.
OF_RIDGE, OF_CONTROL = (12, 90), (0, 30)
OF_KIND = {"procrustes": (9, 30), "reduced_rank": (6, 42), "shuffled_pairs": (0, 54)}
PRODUCTS_OF_DECOMPOSITION = 6  # that a CPU does in the time of one
PROMPT_SHARE = 0.25  # tokens of a prompt, as a share of its text's

Step = tuple[str, float]  # what is done, and its seconds


@dataclass(frozen=True)
class Rates:
    """Seconds of a token that source and target read, a generated text, an eigendecomposition and a product.

    The last two are of matrices as wide as the wider model, in float64.
    """

    source_token: float
    target_token: float
    text: float
    decomposition: float
    product: float


def describe_run(run: Run) -> str:
    """Return counts, estimated minutes and the judge's cost of all five phases, as lines of text.

    What a run would reject, `experiment.inputs.load_inputs` has rejected before.
    """
    if run.config.open_kinds and _is_current(EXTRACTION_CHOICE, run):
        run = choose_extraction(run, may_choose=False)  # else what rests on the choice would not be found
    rates = _measure(run)
    steps = run_steps(run, rates)
    lines = [*conditions_of(run.inputs), *verdict_gaps(run.inputs)]
    lines += [f"{what}, about {seconds / 60:.1f} min" for what, seconds in steps]
    judged, seconds = _judge(run, rates)
    minutes = (sum(seconds for _, seconds in steps) + seconds) / 60
    total = f"total: about {minutes:.0f} min on {run.inputs.target.model.device}, beside loading"
    return "\n".join([*lines, judged, _memory(run), total])


def run_steps(run: Run, rates: Rates) -> list[Step]:
    """Return what is left to do with its seconds, without a judge."""
    steps = [*_preparation(run, rates), *_map(run, rates), *_prompt_map(run, rates), *_detection(run, rates)]
    return [*steps, *_grid(run, rates), *_validation(run, rates)]


def _memory(run: Run) -> str:
    """Return a line on what both models take, and a batch of the target's at most, beside them."""
    weights = sum(sum(each.nbytes for each in side.model.parameters()) for side in run.inputs.sides)
    model, n_rows = run.inputs.target.model, run.config.generation_batch_size
    row = row_bytes(model.config, model.dtype, longest_rows(run)["target"]["generation_batch_size"])
    batch = f"{n_rows} rows of a batch at most {n_rows * row / 2**30:.1f} GiB"
    return f"memory, computed: both models {weights / 2**30:.1f} GiB, {batch}"


def map_sums_bytes(run: Run, d_source: int, d_target: int) -> int:
    """Return the bytes of the sums that the maps of all layer pairs and of lexical controls are fitted on."""
    config, pairs = run.config, run.inputs.layer_pairs
    lexical = [CONDITIONS[name].source for name in config.source_controls if name in LEXICAL_CONTROLS]
    summed = [*pairs, *(read.layer_pair(pair) for read in lexical for pair in pairs)]
    return sums_bytes(summed, d_source, d_target, config.n_folds)


def conditions_of(inputs: Inputs) -> list[str]:
    """Return a line on what the run compares, with the controls that it adds for the verdict."""
    config = inputs.config
    added = [name for name in config.conditions if name not in config.methods]
    with_controls = f", and the controls {', '.join(added)}" if added else ""
    lines = [f"conditions: {UNSTEERED}, {', '.join(config.methods)}{with_controls}"]
    n_draws = {name: len(config.draws_of(config.persona_names[0], name)) for name in config.conditions}
    if several := [f"{n} of {name}" for name, n in n_draws.items() if n > 1]:
        lines.append(f"vectors that each write on every prompt and must each be beaten: {', '.join(several)}")
    if inputs.control_personas:
        lines.append(f"other_persona: {', '.join(persona.name for persona in inputs.control_personas)}")
    if config.halves_texts:
        lines.append("the source's vectors and the native ones are made from disjoint halves of the texts")
    return lines


def verdict_gaps(inputs: Inputs) -> list[str]:
    """Return a sentence for each reason why a persona cannot have a verdict, or not a positive one."""
    config, gaps = inputs.config, []
    if unmet := [name for name in (MAPPED, ORACLE) if name not in config.conditions]:
        gaps.append(f"no verdict: it compares ridge_mapped and oracle; add {' and '.join(unmet)} to methods")
    elif missing := [name for name in DECIDING_CONTROLS if name not in config.conditions]:
        gaps.append(
            f"no persona can be called transferred without {', '.join(missing)}; add them to 'controls', or "
            "leave this key out"
        )
    if len(inputs.prompts) < FEWEST_PROMPTS:
        gaps.append(f"no verdict: {len(inputs.prompts)} prompts, an interval needs {FEWEST_PROMPTS}")
    for persona in inputs.personas:
        if not (persona.labelled_positive or inputs.judge):
            gaps.append(
                f"no verdict on {persona.name}: nothing scores it; give it labelled texts, or set use_gpt4"
            )
    return gaps


def _is_current(artifact: Artifact, run: Run) -> bool:
    return artifact.current(run) is not None


def _cached(n: int) -> str:
    return f", {n} of them cached" if n else ""


def _preparation(run: Run, rates: Rates) -> Iterator[Step]:
    """Yield the layer search, responses, preflight and alpha search that are not there yet."""
    config, inputs = run.config, run.inputs
    n_development = len(inputs.development_prompts)
    if config.layer_idx == "auto" and not _is_current(LAYER_SEARCH, run):
        searched = (config.search_source_layers, config.search_target_layers)
        n_source, n_target = (
            len(wanted or range(side.n_blocks)) for side, wanted in zip(inputs.sides, searched, strict=True)
        )
        seconds = config.search_tokens * (rates.source_token + rates.target_token)
        seconds += n_source * (1 + n_target) * rates.decomposition
        yield f"layer search: {n_source} x {n_target} layer pairs, {config.search_tokens} tokens", seconds
    if inputs.neutral_questions and not _is_current(NEUTRAL_RESPONSES, run):
        n = config.n_training_samples
        yield f"responses that the map is learnt from: {n}", n * rates.text
    if config.open_kinds and not _is_current(EXTRACTION_CHOICE, run):
        n_alphas = sum(n_tried_alphas(config, name) for name in config.open_kinds)
        n = n_development * config.alpha_search.n_seeds * n_alphas * len(VECTOR_KINDS)
        yield (
            f"choice of what vectors are made from: {n} generations and evaluations, beside responses",
            n * (rates.text + _perplexity_seconds(run, rates, run.inputs.perplexity_sides[-1:])),
        )
    if inputs.responding_personas and not _is_current(EXTRACTION_RESPONSES, run):
        n, share = _n_responses(run), config.extraction.max_new_tokens / config.max_new_tokens
        yield f"responses that vectors are made from: {n}", n * rates.text * share
    if not _is_current(PREFLIGHT, run):
        n = n_preflight_cells(run) * n_development
        yield f"preflight: {n} generations", n * rates.text
    if not _is_current(ALPHA_SEARCH, run):
        n_cells = 1 + sum(n_tried_alphas(config, name) for name in config.persona_names)
        n = n_development * config.alpha_search.n_seeds * n_cells
        seconds = n * (rates.text + _perplexity_seconds(run, rates, run.inputs.perplexity_sides[-1:]))
        yield f"choice of alphas: {n} generations and evaluations on development prompts", seconds


def _n_responses(run: Run) -> int:
    responders = dict.fromkeys(run.inputs.prompting.responders.values())
    personas = run.inputs.responding_personas
    return sum(len(response_rows(run, persona, name)) for persona in personas for name in responders)


def _map(run: Run, rates: Rates) -> Iterator[Step]:
    config, inputs = run.config, run.inputs
    n_texts, n_pairs = config.n_training_samples, len(inputs.layer_pairs)
    counted = f"texts for the map: {n_texts} {config.mapping_data.replace('_', ' ')}"
    with run.at_pair(inputs.middle_pair) as at_pair:
        if _is_current(RIDGE_MAPPING, at_pair) or _is_current(PERSONA_VECTORS, run):
            yield f"{counted}, already mapped", 0.0
            return
    read = [item.text for item in inputs.neutral_texts]
    source, target = (n_texts * _n_tokens(side.tokenizer, read) / len(read) for side in inputs.sides)
    if inputs.neutral_questions:  # responses are not generated yet, and may be as long as allowed
        source = target = n_texts * config.max_new_tokens
    size = map_sums_bytes(run, *(side.d_model for side in inputs.sides)) / 2**30
    of_pairs = f"{n_pairs} layer pair{'s' * (n_pairs > 1)} with sums of {size:.1f} GiB"
    of_tokens = f"{source:.0f} source and {target:.0f} target tokens"
    yield f"{counted}, {of_tokens}, {of_pairs}", _map_seconds(run, rates, source, target)


def _prompt_map(run: Run, rates: Rates) -> Iterator[Step]:
    """Yield the maps of vectors from prompts, if there may be such vectors."""
    if not (read := run.inputs.neutral_prompts):
        return
    counted = f"prompts for the map of vectors from prompts: {len(read)}"
    with run.beside(PROMPT_MAPS, run.inputs.for_kind("prompt")) as of_prompts:
        is_mapped = _is_current(
            RIDGE_MAPPING, of_prompts.with_inputs(of_prompts.inputs.at_pairs([run.inputs.middle_pair]))
        )
    if is_mapped:
        yield f"{counted}, already mapped", 0.0
        return
    source, target = (
        _n_tokens(side.tokenizer, [item.prompts[number] for item in read])
        for number, side in enumerate(run.inputs.sides)
    )
    of_tokens = f"{source} source and {target} target tokens"
    yield f"{counted}, {of_tokens}", _map_seconds(run, rates, source, target)


def _detection(run: Run, rates: Rates) -> Iterator[Step]:
    """Yield the texts that vectors are tested on as detectors; responses may be as long as allowed."""
    if _is_current(DETECTION, run):
        return
    personas = run.inputs.personas
    labelled = [text for persona in personas for side in labelled_sides(persona) for text in side]
    n_responses = sum(len(side) for persona in personas for side in response_sides(run, persona))
    n_tokens = n_responses * run.config.extraction.max_new_tokens * (1 + PROMPT_SHARE)
    if labelled:
        n_tokens += _n_tokens(run.inputs.target.tokenizer, labelled)
    yield f"vectors as detectors: {len(labelled) + n_responses} texts", n_tokens * rates.target_token


def _map_seconds(run: Run, rates: Rates, source: float, target: float) -> float:
    """Return what all maps from texts of so many tokens in source and target take."""
    config, n_pairs = run.config, len(run.inputs.layer_pairs)
    n_controls = sum(len(vector_names(name)) for name in config.source_controls)
    n_lexical = sum(name in LEXICAL_CONTROLS for name in config.source_controls)
    # A model with random weights is read in a pass of its own, and the target again beside it.
    n_passes = 1 + n_controls - n_lexical
    seconds = n_passes * (source * rates.source_token + target * rates.target_token)
    fitted = [
        OF_RIDGE,
        *[OF_CONTROL] * n_controls,
        *(OF_KIND[kind] for kind in KINDS if kind not in left_out(run)),
    ]
    n_decompositions, n_products = map(sum, zip(*fitted, strict=True))
    of_pair = n_decompositions * rates.decomposition + n_products * rates.product
    return seconds + n_pairs * config.n_folds / 5 * of_pair


def _grid(run: Run, rates: Rates) -> Iterator[Step]:
    config, inputs = run.config, run.inputs
    generated, evaluated, n_unread = _cached_rows(run)
    n_per_cell = len(inputs.prompts) * config.n_seeds
    n_texts = config.n_cells * n_per_cell
    yield (
        f"generations: {n_texts} ({config.n_cells - 1} steered cells and 1 baseline, {len(inputs.prompts)} "
        f"prompts x {config.n_seeds} seeds each){_cached(generated)}, at most "
        f"{n_texts * config.max_new_tokens} tokens",
        rates.text * (n_texts - generated),
    )
    # An unsteered text is scored for every persona, and read once.
    n_evaluations = n_texts + (len(inputs.personas) - 1) * n_per_cell
    seconds = _perplexity_seconds(run, rates) * (n_texts - generated + n_unread)
    seconds += _probe_seconds(run, rates, config.max_new_tokens) * (n_evaluations - evaluated)
    yield f"evaluations: {n_evaluations}{_cached(evaluated)}", seconds
    if config.strength_curve:
        n_more, n_known = _over_strengths(run)
        seconds = _perplexity_seconds(run, rates) + _probe_seconds(run, rates, config.max_new_tokens)
        counted = f"at most {n_more} generations and evaluations{_cached(n_known)}"
        yield f"over strengths: {counted}", (n_more - n_known) * (rates.text + seconds)
    if config.n_turns > 1:
        n_later, n_known, seconds = _over_turns(run, rates)
        counted = f"at most {n_later} generations and evaluations{_cached(n_known)}"
        of_turns = f"{len(inputs.conversations)} conversations of {config.n_turns} turns"
        yield f"over turns: {counted}, {of_turns}, the first in the grid", (n_later - n_known) * seconds
    n_vectors = sum(map(len, map(vector_names, config.steered_conditions))) * len(inputs.personas)
    n_tokens = _n_tokens(inputs.target.tokenizer, _plain_texts(run))
    yield f"plain text under {n_vectors} vectors", (n_vectors + 1) * n_tokens * rates.target_token
    if config.n_capability_questions:
        answered = {ORACLE, MAPPED, RANDOM} & set(config.steered_conditions)
        n_vectors = len(answered) + bool(set(LEXICAL_CONTROLS) & set(config.steered_conditions))
        n_vectors *= len(inputs.personas)
        questions = [each.text for each in load_questions(config.n_capability_questions)]
        n_tokens = _n_tokens(inputs.target.tokenizer, questions)
        what = f"{len(questions)} questions under {n_vectors} vectors"
        yield what, (n_vectors + 1) * n_tokens * rates.target_token


def _cached_rows(run: Run) -> tuple[int, int, int]:
    """Return how many texts and evaluations of the grid are cached, and how many texts are yet to be read."""
    if run.folder.fresh or not _has_alphas(run):
        return 0, 0, 0
    texts = rows_of(run.folder.path / "generation_journal.jsonl")
    planned = grid_rows(run, required_alphas(run))
    generated = [{**row, **texts[row["key"]]} for row in planned if row["key"] in texts]
    if not generated:
        return 0, 0, 0
    done = rows_of(run.folder.path / "evaluation_journal.jsonl")
    evaluations = planned_evaluations(run, generated)
    new = [row for row in evaluations if row["key"] not in done]
    unread = {row["perplexity_key"] for row in new} - {row["perplexity_key"] for row in done.values()}
    return len(generated), len(evaluations) - len(new), len(unread)


def _over_strengths(run: Run) -> tuple[int, int]:
    """Return how many texts strength curves add to the grid at most, and how many of them are cached."""
    is_known = _is_current(ALPHA_SEARCH, run)
    alphas = compared_alphas(run) if is_known else dict.fromkeys(run.config.persona_names, 1.0)
    rows = [row for row in texts_over_strengths(run, alphas) if row["alpha"] != alphas[row["persona"]]]
    texts = rows_of(run.folder.path / "generation_journal.jsonl") if is_known else {}
    return len(rows), sum(row["key"] in texts for row in rows)


def _over_turns(run: Run, rates: Rates) -> tuple[int, int, float]:
    """Return how many texts later turns of conversations are, how many are cached, and the seconds of one."""
    config, n_turns = run.config, run.config.n_turns
    cells = conversing_cells(run, dict.fromkeys(config.persona_names, 1.0))
    n = len(cells) * len(run.inputs.conversations) * (n_turns - 1)
    journal = {} if run.folder.fresh else rows_of(run.folder.path / "generation_journal.jsonl")
    n_known = min(sum(bool(row.get("earlier")) for row in journal.values()), n)
    # Both models read the turns before, half of them on average, with their questions.
    n_read = config.max_new_tokens * (1 + PROMPT_SHARE) * n_turns / 2
    seconds = rates.text + n_read * (rates.source_token + rates.target_token)
    seconds += _perplexity_seconds(run, rates, run.inputs.perplexity_sides[-1:])
    return n, n_known, seconds + _probe_seconds(run, rates, config.max_new_tokens)


def _validation(run: Run, rates: Rates) -> Iterator[Step]:
    inputs, seconds = run.inputs, _probe_seconds(run, rates, VALIDATION_TOKENS)
    missing = untrained(inputs.personas, inputs.language_model) if run.config.probe else []
    if missing:
        n_texts = sum(map(n_training_texts, missing))
        yield f"scorers to train: of {len(missing)} personas, on {n_texts} texts", n_texts * seconds
    if not _is_validated(run):
        n_generated = (N_SEEDS + N_DRAWS) * len(inputs.development_prompts)
        sets = [sets_of(run, persona) for persona in inputs.personas]
        n_read = sum(len(texts_of(each)) + n_generated for each in sets if each)
        what = f"validation of the scorers: {n_read} texts, {n_generated} generations"
        yield what, n_generated * rates.text + n_read * seconds
    if n := _n_resampled(run) * len(inputs.personas):
        journal = run.folder.path / "generation_journal.jsonl"
        known = {} if run.folder.fresh else rows_of(journal)
        n_known = min(sum(RESAMPLED in row["condition"] for row in known.values()), n)
        seconds = rates.text + _probe_seconds(run, rates, run.config.max_new_tokens)
        yield f"vectors of resampled texts: {n} generations{_cached(n_known)}", (n - n_known) * seconds


def _n_resampled(run: Run) -> int:
    """Return how many texts vectors of resampled extraction texts steer for a persona."""
    n_vectors = sum(name in run.config.conditions for name in (MAPPED, ORACLE))
    n_prompts = min(N_QUESTIONS, len(run.inputs.development_prompts))
    return n_vectors * run.config.extraction_resamples * n_prompts


def _has_alphas(run: Run) -> bool:
    """Whether the alphas of the grid are known: listed, or searched by an earlier run."""
    return run.config.alpha_values != "auto" or _is_current(ALPHA_SEARCH, run)


def _is_validated(run: Run) -> bool:
    return _has_alphas(run) and _is_current(SCORER_VALIDATION, run)


def _judge(run: Run, rates: Rates) -> tuple[str, float]:
    """Return a line on what a judge is asked and costs, and the seconds of one that runs here."""
    config, settings = run.config, run.config.judge
    if not config.use_gpt4:
        return "judgements: 0, about 0.00 USD", 0.0
    n_per_cell = len(run.inputs.prompts) * config.n_seeds
    n_judged = min(n_per_cell, settings.texts_per_cell or n_per_cell)
    # The coherence of an unsteered text is asked once, its trait for each persona.
    n = (2 * config.n_cells - 1 + len(run.inputs.personas)) * n_judged
    if run.inputs.responding_personas and not _is_current(EXTRACTION_RESPONSES, run):
        n += _n_responses(run)
    if not _is_validated(run):
        sets = [at_most(sets_of(run, persona), JUDGED_A_SIDE) for persona in run.inputs.personas]
        # Unsteered texts and those under random directions are two more sets.
        n += sum(len(texts_of(each)) + 2 * JUDGED_A_SIDE + N_REPEATED for each in sets if each)
    # Where no other scorer is validated, the judge reads what vectors of resampled texts steer, too.
    n += _n_resampled(run) * sum(not persona.labelled_positive for persona in run.inputs.personas)
    journal = run.folder.path / "judgements_journal.jsonl"
    n_known = 0 if run.folder.fresh else min(len(rows_of(journal)), n)
    counted = f"judgements: {n}{_cached(n_known)}"
    if settings.kind == "local":
        seconds = (n - n_known) * TOKENS_PER_JUDGEMENT * rates.target_token
        return f"{counted}, about {seconds / 60:.1f} min", seconds
    price, n_tokens = settings.usd_per_million_tokens, TOKENS_PER_JUDGEMENT + settings.max_answer_tokens - 1
    cap = f", at most {settings.max_usd:g} USD" if settings.max_usd else ""
    cost = f"about {(n - n_known) * n_tokens * price / 1e6:.2f} USD at {price:g} USD per million tokens"
    return f"{counted}, {cost} and {n_tokens} tokens each{cap}", 0.0


def _perplexity_seconds(run: Run, rates: Rates, sides: tuple[str, ...] = ()) -> float:
    """Return what the perplexities of a text of full length take, by default by all models that give them."""
    tokens = run.config.max_new_tokens * (1 + PROMPT_SHARE)
    by_side = {"source": rates.source_token, "target": rates.target_token}
    return tokens * sum(by_side[side] for side in sides or run.inputs.perplexity_sides)


def _probe_seconds(run: Run, rates: Rates, n_tokens: int) -> float:
    """Return what a probe takes for a text; its model is about as large as the smaller of these."""
    share = PROBE_SHARE * run.config.probe
    return n_tokens * share * min(rates.source_token, rates.target_token)


def _plain_texts(run: Run) -> list[str]:
    return [item.text for item in run.inputs.neutral_texts[:N_PLAIN_TEXTS]]


def _n_tokens(tokenizer: Any, texts: list[str]) -> int:
    return sum(map(len, encode(tokenizer, texts)))


def _measure(run: Run) -> Rates:
    """Return the rates of this process and these models."""
    texts = _plain_texts(run)[:N_TIMED]

    def seconds_of_token(name: str) -> float:
        side = run.inputs.side(name)
        of_side = (side.model, side.tokenizer)

        def read(passages: list[str]) -> Any:
            return continuation_perplexities(*of_side, [""] * len(passages), passages, N_TIMED)

        return _seconds(read, texts[:1], texts) / _n_tokens(side.tokenizer, texts)

    square = torch.randn(SMALL_WIDTH, SMALL_WIDTH, dtype=torch.float64)
    square = square.to(algebra_device(run.inputs.target.model.device))
    square = square @ square.T
    width = max(side.d_model for side in run.inputs.sides)
    decomposition = _seconds(torch.linalg.eigh, square[:9, :9], square) * (width / SMALL_WIDTH) ** 3
    reading = seconds_of_token("source"), seconds_of_token("target")
    product = decomposition / PRODUCTS_OF_DECOMPOSITION
    return Rates(*reading, _seconds_of_text(run), decomposition, product)


def _seconds_of_text(run: Run) -> float:
    """Return the seconds of a generated text of full length, in a batch as large as a run's."""
    config, inputs = run.config, run.inputs
    settings = GenerationSettings.of(inputs, [1.0] * len(inputs.layer_pairs))
    generator = settings.generator(inputs.target)
    shown = [inputs.prompting.prompt("target", prompt) for prompt in inputs.prompts]
    n_rows = min(config.generation_batch_size, len(shown) * config.n_cells * config.n_seeds)
    prompts = list(islice(cycle(shown), n_rows))
    few, more = (min(n, config.max_new_tokens) for n in TIMED_TOKENS)
    short, long = (
        _seconds(lambda asked, n=n: generator.generate_batch(asked, n), prompts[:1], prompts)
        for n in (few, more)
    )
    token = (long - short) / (more - few) if more > few and long > short else long / more
    return (long + token * (config.max_new_tokens - more)) / n_rows


def _seconds(work: Callable[[Any], Any], little: Any, much: Any) -> float:
    """Return the seconds of `work(much)`, after `work(little)`, which pays for weights that are paged in."""
    work(little)
    started = time.perf_counter()
    work(much)
    return time.perf_counter() - started

"""Say what a run would do and cost, from counts and a short timing; writes nothing.

What the journals and artifacts of the output directory hold already is counted and costs nothing. The times
are extrapolated from a few seconds of each kind of work in this process, without loading; a Ray cluster is
not asked. A judge's cost is computed from a price and a length a judgement. Texts that a model ends early
cost less than is said here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from evaluation import Evaluator, continuation_perplexities
from experiment.inputs import N_PLAIN_TEXTS, Inputs
from experiment.plan import (
    Row,
    doses_fingerprint,
    evaluations_journal_fingerprint,
    grid_texts,
    judge_settings,
    licences_fingerprint,
    mapping_fingerprint,
    neutral_responses_fingerprint,
    personas_fingerprint,
    planned_evaluations,
    planned_responses,
    preflight_fingerprint,
    texts_journal_fingerprint,
)
from phases.choose_alphas import preflight_depths
from phases.collect_responses import ANSWERS, NEUTRAL_ANSWERS, all_responses_fingerprint
from phases.validate_scorers import JUDGED_A_SIDE, N_SEEDS, sets_of
from scoring.cached_judge import N_REPEATED, TOKENS_PER_JUDGEMENT
from scoring.likelihood_ratio import (
    N_EXAMPLES,
    N_TRAINING,
    N_WINDOWS,
    WINDOW,
    are_remembered,
    likelihood_features,
    load_scoring_model,
    untrained_likelihood_ratios,
)
from scoring.local_judge import LocalJudge
from scoring.validation import at_most, texts_of
from support.artifacts import fingerprint
from support.journal import rows_of
from support.pair_statistics import DEFAULT_SAMPLE
from support.run_folder import RunFolder
from support.tiny_models import tiny_model, tiny_tokenizer
from support.vocabulary import DRAWS, MAP_KINDS, vector_names
from texts.encoding import encode

N_TEXTS = 8
N_TOKENS = (2, 8)
N_RATIO_TEXTS, N_RATIO_WORDS = 6, 54
EXAMINED_TOKENS = 25  # of a text of an validation, in the mean
N_TRAINED_ON = 12 * N_TRAINING  # texts on which a likelihood ratio is trained, shuffled ones among them


@dataclass(frozen=True)
class Costs:
    """Seconds of each kind of work: a text for the map in both models, a full-length text that is written,
    its perplexities, its likelihood ratio, that of a text of an validation, plain text read under one
    steering, a judgement here, and an eigendecomposition."""

    mapping_data: float
    writing: float
    perplexities: float
    ratio: float
    examined: float
    plain: float
    judging: float
    decomposition: float


def describe_run(inputs: Inputs, folder: RunFolder) -> str:
    """Return counts, tokens, estimated minutes and judging cost of all five phases, as lines of text.

    folder: whose journals and artifacts are counted. What a run would refuse, `experiment.inputs.load_inputs`
    has refused before.
    """
    config = inputs.config
    n_per_cell = len(inputs.prompts) * config.n_seeds
    n_generations = config.n_cells * n_per_cell
    n_evaluations = (config.n_cells - 1 + len(inputs.personas)) * n_per_cell
    written, evaluated, read = _already_there(inputs, folder)
    costs, tokens = _measured(inputs, min(config.generation_batch_size, n_generations))
    lines = _describe_search(inputs) if config.layer_idx == "auto" else []
    lines += _describe_band(inputs)
    minutes = {}

    is_mapped = _has(inputs, folder, "persona_vectors.pt", personas_fingerprint)
    is_mapped = is_mapped or _has(inputs, folder, "ridge_mapping.pt", mapping_fingerprint)
    n_maps = 1 + sum(len(vector_names(kind)) for kind in MAP_KINDS)
    n_decompositions = len(inputs.layer_pairs) * (config.n_folds + 1) * n_maps
    minutes["map"] = (
        0.0
        if is_mapped
        else (costs.mapping_data * config.n_training_samples + costs.decomposition * n_decompositions) / 60
    )
    there = ", already mapped" if is_mapped else ""
    of_passages = f", {tokens['source']} source and {tokens['target']} target tokens"
    lines.append(
        f"texts for the map: {config.n_training_samples} {config.mapping_data.replace('_', ' ')}"
        f"{'' if inputs.neutral_questions else of_passages}{there}, about {minutes['map']:.1f} min"
    )

    n_answers = _describe_preparation(inputs, folder, costs, lines, minutes)
    minutes["writing"] = costs.writing * (n_generations - written) / 60
    lines.append(
        f"generations: {n_generations} ({config.n_cells - 1} steered cells and 1 baseline, "
        f"{len(inputs.prompts)} prompts x {config.n_seeds} seeds each), {_there(written)}at most "
        f"{n_generations * config.max_new_tokens} tokens, about {minutes['writing']:.1f} min"
    )
    n_new = n_evaluations - evaluated
    # An unsteered text is read once for all personas.
    minutes["evaluation"] = (costs.perplexities * (n_generations - read) + costs.ratio * n_new) / 60
    lines.append(f"evaluations: {n_evaluations}, {_there(evaluated)}about {minutes['evaluation']:.1f} min")

    untrained = untrained_likelihood_ratios(config.persona_names, inputs.labelled_personas)
    if config.likelihood_ratio and untrained:
        minutes["training"] = len(untrained) * N_TRAINED_ON * costs.examined / 60
        lines.append(f"likelihood ratios to train: {len(untrained)}, about {minutes['training']:.1f} min")

    n_development = len(inputs.development_prompts)
    n_examined, n_of_target, n_judged_examined = _examined(inputs)
    is_examined = _has(inputs, folder, "scorer_validation.json", licences_fingerprint)
    if not is_examined:
        n_written = n_development * (N_SEEDS + DRAWS)
        reading = n_examined * costs.examined + n_of_target * costs.ratio
        minutes["validation"] = (n_written * costs.writing + reading) / 60
        lines.append(
            f"validation of the scorers: {n_examined + n_of_target} texts, {n_written} generations, about "
            f"{minutes['validation']:.1f} min"
        )
        steered = [name for method in config.methods if method != "prompted" for name in vector_names(method)]
        n_steered = len(steered) * len(inputs.personas)
        minutes["plain"] = (n_steered + 1) * costs.plain / 60
        lines.append(f"plain text under {n_steered} steerings: about {minutes['plain']:.1f} min")
    if config.use_gpt4:
        minutes["judge"] = _describe_judge(
            inputs, folder, lines, n_answers + (0 if is_examined else n_judged_examined), costs.judging
        )
    else:
        lines.append("judgements: 0, about 0.00 USD")
    lines.append(
        f"total: about {sum(minutes.values()):.0f} min on {inputs.target.model.device}, beside loading"
    )
    return "\n".join(lines)


def _describe_preparation(
    inputs: Inputs, folder: RunFolder, costs: Costs, lines: list[str], minutes: dict[str, float]
) -> int:
    """Append what comes before the grid: answers, preflight and searched alphas; return how many answers."""
    config, n_development, n_answers = inputs.config, len(inputs.development_prompts), 0
    if inputs.neutral_questions and not _has(inputs, folder, NEUTRAL_ANSWERS, neutral_responses_fingerprint):
        minutes["neutral answers"] = config.n_training_samples * costs.writing / 60
        lines.append(
            f"answers that the map is learnt from: {config.n_training_samples}, about "
            f"{minutes['neutral answers']:.1f} min"
        )
    if inputs.answering and not _has(inputs, folder, ANSWERS, all_responses_fingerprint):
        writers = dict.fromkeys(inputs.writers.values())
        asked = [persona for persona in inputs.personas if persona.name in inputs.answering]
        n_answers = sum(
            len(planned_responses(inputs, persona, name)) for persona in asked for name in writers
        )
        share = config.extraction.max_new_tokens / config.max_new_tokens
        minutes["answers"] = n_answers * costs.writing * share / 60
        lines.append(f"answers that vectors are made from: {n_answers}, about {minutes['answers']:.1f} min")
    if not _has(inputs, folder, "preflight.json", preflight_fingerprint):
        n_cells = 1 + sum(len(preflight_depths(inputs, persona.name)) for persona in inputs.personas)
        minutes["preflight"] = n_cells * n_development * costs.writing / 60
        lines.append(
            f"preflight: {n_cells * n_development} generations, about {minutes['preflight']:.1f} min"
        )
    if config.alpha_values == "auto" and not _has(inputs, folder, "alpha_search.json", doses_fingerprint):
        n_conditions = len(inputs.personas) * len(config.steering_methods)
        n_dose = (
            n_development
            * config.alpha_search.n_seeds
            * (1 + n_conditions * config.alpha_search.n_evaluations)
        )
        minutes["alphas"] = (costs.writing + costs.perplexities) * n_dose / 60
        lines.append(
            f"dose search: {n_dose} generations and evaluations on development prompts, about "
            f"{minutes['alphas']:.1f} min"
        )
    return n_answers


def _there(n: int) -> str:
    return f"{n} of them already there, " if n else ""


def _has(inputs: Inputs, folder: RunFolder, name: str, cache_key: Callable[[Inputs], str]) -> bool:
    return folder.current(name, cache_key(inputs)) is not None


def _already_there(inputs: Inputs, folder: RunFolder) -> tuple[int, int, int]:
    """Return how many texts of the grid and evaluations the journals hold, and texts that are read no more.

    Of searched alphas, none.
    """
    if inputs.config.alpha_values == "auto" or folder.fresh:
        return 0, 0, 0
    texts = rows_of(folder.path / "generation_journal.jsonl", texts_journal_fingerprint(inputs))
    planned = grid_texts(inputs, inputs.config.alpha_values)
    written: list[Row] = [{**row, **texts[row["key"]]} for row in planned if row["key"] in texts]
    done = rows_of(folder.path / "evaluation_journal.jsonl", evaluations_journal_fingerprint(inputs))
    evaluations = planned_evaluations(inputs, written) if written and done else []
    new = [row for row in evaluations if row["key"] not in done]
    unread = {row["perplexity_key"] for row in new} - {row.get("perplexity_key") for row in done.values()}
    n_read = len(written) - len(unread) if evaluations else 0
    return len(written), len(evaluations) - len(new), n_read


def _describe_band(inputs: Inputs) -> list[str]:
    if not inputs.band:
        return []
    width = sum(side.extractor.d_model for side in inputs.sides)
    of_pair = (inputs.config.n_folds * width**2 * 8 + DEFAULT_SAMPLE * width * 4) / 2**30
    return [
        f"band: {len(inputs.band)} layer pairs from one pass over the texts, whose sums take "
        f"{of_pair * len(inputs.band):.1f} GiB while the maps are learnt"
    ]


def _examined(inputs: Inputs) -> tuple[int, int, int]:
    """Return how many texts the scorers of all personas are examined on, and those of them by the target.

    Third, how many a judge is. What the likelihood ratios have read in an earlier run is left out.
    """
    n_scored = n_of_target = n_judged = 0
    made_up = [f"unsteered text {n}" for n in range(N_SEEDS * len(inputs.development_prompts))]
    steered = [f"broken text {n}" for n in range(DRAWS * len(inputs.development_prompts))]
    for persona in inputs.personas:
        sets, of_any_run = sets_of(inputs, persona, made_up, steered), texts_of(sets_of(inputs, persona))
        if persona.labelled_positive and sets:
            n_of_target += len(made_up) + len(steered)
            if not are_remembered(persona.name, inputs.labelled_personas, of_any_run):
                n_scored += len(of_any_run)
        n_judged += len(texts_of(at_most(sets, JUDGED_A_SIDE))) + N_REPEATED * bool(sets)
    return n_scored, n_of_target, n_judged


def _describe_judge(
    inputs: Inputs, folder: RunFolder, lines: list[str], n_others: int, seconds: float
) -> float:
    """Append what a judge is asked and costs, and return the minutes of one that runs here.

    n_others: texts beside those of the grid. What the journal of judgements holds costs nothing again.
    """
    config, settings = inputs.config, inputs.config.judge
    n_cells = config.n_cells - 1 + len(inputs.personas)
    n_per_cell = len(inputs.prompts) * config.n_seeds
    n_judged = min(n_per_cell, settings.texts_per_cell or n_per_cell)
    # The coherence of an unsteered text is asked once, its trait for each persona.
    n_planned = config.n_cells * n_judged + n_cells * n_judged + n_others
    held = rows_of(folder.path / "judgements_journal.jsonl", fingerprint(judge_settings(settings)))
    n_known = 0 if folder.fresh else min(len(held), n_planned)
    n_judgements = n_planned - n_known
    if settings.kind == "local":
        lines.append(f"judgements: {n_planned}, {_there(n_known)}about {n_judgements * seconds / 60:.1f} min")
        return n_judgements * seconds / 60
    price = settings.usd_per_million_tokens
    n_tokens = TOKENS_PER_JUDGEMENT + settings.max_answer_tokens - 1
    cap = f", at most {settings.max_usd:g} USD" if settings.max_usd else ""
    lines.append(
        f"judgements: {n_planned}, {_there(n_known)}about {n_judgements * n_tokens * price / 1e6:.2f} USD "
        f"at {price:g} USD per million tokens and {n_tokens} tokens each{cap}"
    )
    return 0.0


def _describe_search(inputs: Inputs) -> list[str]:
    """Return a line on the layer search, from the time of reading all layers and of a matrix product."""
    config = inputs.config
    reading, widths = 0.0, []
    for side, layers in (
        (inputs.source, config.search_source_layers),
        (inputs.target, config.search_target_layers),
    ):
        extractor = side.extractor
        wanted = extractor.check_layers(layers or range(len(extractor.blocks)))
        widths.append(len(wanted) * extractor.d_model)
        sample = [item.text for item in inputs.neutral_texts[:N_TEXTS]]
        n_tokens = sum(map(len, encode(side.tokenizer, sample)))
        spent = _seconds(partial(extractor.extract_layers, layers=wanted), sample[:1], sample)
        reading += spent / n_tokens * config.search_tokens
    square = torch.ones(1024, 1024)
    products = _seconds(square.mm, square, square) / 1024**3 * config.search_tokens * widths[0] * widths[1]
    return [
        f"layer search: {widths[0]} x {widths[1]} dimensions on {config.search_tokens} tokens, about "
        f"{(reading + products) / 60:.1f} min, not in the total"
    ]


def _measured(inputs: Inputs, n_rows: int) -> tuple[Costs, dict[str, int]]:
    """Return what each kind of work takes, and the tokens of the neutral texts in each model."""
    extraction, tokens = _time_extraction(inputs)
    pairs, writing = _time_generation(inputs, n_rows)
    width = max(side.extractor.d_model for side in inputs.sides)
    square = torch.randn(width, width, dtype=torch.float64)
    ratio, judging = _time_ratio(inputs), 0.0
    if isinstance(inputs.judge, LocalJudge):
        asked = ["Rate this. " * 60] * N_RATIO_TEXTS
        judging = _seconds(inputs.judge.judge, asked[:1], asked) / N_RATIO_TEXTS
    costs = Costs(
        extraction,
        writing,
        _time_evaluation(inputs, pairs),
        ratio * min(inputs.config.max_new_tokens, N_WINDOWS * WINDOW),
        ratio * EXAMINED_TOKENS,
        _time_plain(inputs),
        judging,
        _seconds(torch.linalg.eigh, square[:9, :9] @ square[:9, :9].T, square @ square.T),
    )
    return costs, tokens


def _time_extraction(inputs: Inputs) -> tuple[float, dict[str, int]]:
    """Return the seconds that a text for the map takes in both models, and the passages' tokens in each.

    Responses are not written yet, and taken to be as long as they may be.
    """
    texts = [item.text for item in inputs.neutral_texts]
    sample = texts[:N_TEXTS]
    seconds, tokens = 0.0, {}
    for number, side in enumerate(inputs.sides):
        counts = [len(ids) for ids in encode(side.tokenizer, texts)]
        tokens[side.name] = sum(counts)
        layers = [pair[number] for pair in inputs.layer_pairs]
        read = partial(side.extractor.extract_layers, layers=sorted(set(layers)))
        n_read = sum(counts)
        if inputs.neutral_questions:
            asked = inputs.shown_question(side.name, inputs.neutral_questions[0], inputs.config.system_prompt)
            (prompt,) = encode(side.tokenizer, [asked])
            n_read = len(texts) * (len(prompt) + inputs.config.max_new_tokens)
        seconds += _seconds(read, sample[:1], sample) * n_read / sum(counts[:N_TEXTS])
    return seconds / len(texts), tokens


def _time_generation(inputs: Inputs, n_rows: int) -> tuple[list[tuple[str, str]], float]:
    """Return (prompt, output) of one short batch and the seconds that a full-length text takes.

    Two lengths tell what the prompt takes from what a token takes.
    """
    config, generator = inputs.config, inputs.generator()
    shown = [inputs.shown_prompt("target", prompt) for prompt in inputs.prompts]
    prompts = list(islice(cycle(shown), n_rows))
    outputs: list[str] = []
    spent = []
    lengths = [min(n, config.max_new_tokens) for n in N_TOKENS]
    generator.generate_batch(prompts[:1], 1)
    for n_tokens in lengths:
        started = time.perf_counter()
        outputs[:] = generator.generate_batch(prompts, n_tokens)
        spent.append(time.perf_counter() - started)
    more = lengths[1] - lengths[0]
    each = (spent[1] - spent[0]) / more if more and spent[1] > spent[0] else spent[1] / lengths[1]
    whole = spent[1] + each * (config.max_new_tokens - lengths[1])
    return list(zip(prompts, outputs, strict=True)), whole / len(prompts)


def _time_evaluation(inputs: Inputs, pairs: list[tuple[str, str]]) -> float:
    """Return the seconds that the perplexities of a full-length text take."""
    length = max(1, inputs.config.max_new_tokens // N_TOKENS[1])
    # Numbered, since texts that are equal are evaluated once.
    pairs = pairs[:N_TEXTS]
    rows = [
        {"prompt": prompt, "output": f"{output} {index}" * length, "condition": "baseline"}
        for index, (prompt, output) in enumerate(pairs)
    ]
    model, tokenizer = inputs.target.model, inputs.target.tokenizer
    evaluator = Evaluator(model, tokenizer, independent=inputs.independent)
    return _seconds(evaluator.evaluate_batch, rows[:1], rows) / len(rows)


def _time_ratio(inputs: Inputs) -> float:
    """Return the seconds that the likelihood ratio takes to read a token; 0 without that scorer."""
    labelled = [persona for persona in inputs.personas if persona.labelled_positive]
    if not inputs.config.likelihood_ratio or not labelled:
        return 0.0
    scorer = load_scoring_model()
    sides = (labelled[0].labelled_positive, labelled[0].labelled_negative, labelled[-1].labelled_positive)
    examples = tuple("\n\n".join(side[:N_EXAMPLES]) for side in sides)
    words = inputs.neutral_texts[0].text.split() * 4
    texts = [f"{number} {' '.join(words[:N_RATIO_WORDS])}" for number in range(N_RATIO_TEXTS)]
    n_read = sum(min(len(ids), N_WINDOWS * WINDOW) for ids in encode(scorer[1], texts))
    # What stands before the texts is read with the first, and kept.
    return _seconds(partial(likelihood_features, scorer, examples), texts[:1], texts) / n_read


def _time_plain(inputs: Inputs) -> float:
    """Return the seconds in which the target reads the passages on which a steering's cost is measured."""
    texts = [item.text for item in inputs.neutral_texts[:N_PLAIN_TEXTS]]
    size = inputs.config.evaluation_batch_size

    def read(passages: list[str]) -> object:
        nothing = [""] * len(passages)
        return continuation_perplexities(
            inputs.target.model, inputs.target.tokenizer, nothing, passages, size
        )

    half = texts[: max(1, len(texts) // 2)]
    return _seconds(read, half[:1], half) * len(texts) / len(half)


def _seconds(work: Callable[[Any], object], little: Any, much: Any) -> float:
    """Return the seconds of `work(much)`, after `work(little)`, which pays for weights that are paged in."""
    work(little)
    started = time.perf_counter()
    work(much)
    return time.perf_counter() - started


def main() -> None:
    """Check that the time of a forward pass is positive and sane."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokens = tokenizer("A short text.", return_tensors="pt")["input_ids"]
    assert 0 < _seconds(model, tokens, tokens) < 60
    print("dry_run OK: work is timed; `run_experiment.py --dry-run` checks the rest")


if __name__ == "__main__":
    main()

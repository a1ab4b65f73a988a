"""Say what a run would do and cost, from counts and a short timing; writes nothing.

The times are extrapolated from a few seconds of each kind of work in this process, without
loading and preflight; a Ray cluster is not asked. A judge's cost is computed from a price and a
length a judgement.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice

import torch

from evaluation import Evaluator
from experiment.grid import planned_answers
from experiment.inputs import Inputs
from scoring.paid_once import TOKENS_PER_JUDGEMENT
from support.pair_statistics import DEFAULT_SAMPLE
from support.tiny_models import tiny_model, tiny_tokenizer
from texts.encoding import encode

N_TEXTS = 16
N_TOKENS = 8


def describe_run(inputs: Inputs) -> str:
    """Return counts, tokens, estimated minutes and judging cost of all five phases, as lines of text.

    What a run would refuse, `experiment.inputs.load_inputs` has refused before.
    """
    config = inputs.config
    n_conditions = len(inputs.personas) * len(config.steering_methods)
    is_auto = config.alpha_values == "auto"
    n_cells = config.n_cells
    n_per_cell = len(inputs.prompts) * config.n_seeds
    n_generations = n_cells * n_per_cell
    n_evaluations = (n_cells - 1 + len(inputs.personas)) * n_per_cell
    extraction, tokens = _time_extraction(inputs)
    pairs, generation = _time_generation(inputs, min(config.generation_batch_size, n_generations))
    evaluation = _time_evaluation(inputs, pairs)
    minutes = [extraction / 60, generation * n_generations / 60, evaluation * n_generations / 60]
    search = _describe_search(inputs) if config.layer_idx == "auto" else []
    if inputs.band:
        width = sum(side.extractor.d_model for side in inputs.sides)
        of_pair = (config.n_folds * width**2 * 8 + DEFAULT_SAMPLE * width * 4) / 2**30
        search.append(
            f"band: {len(inputs.band)} layer pairs from one pass over the texts, whose sums take "
            f"{of_pair * len(inputs.band):.1f} GiB while the maps are learnt"
        )
    if is_auto:
        n_texts = len(inputs.development_prompts) * config.dose.n_seeds
        n_dose = n_texts * (1 + n_conditions * config.dose.n_evaluations)
        minutes.append((generation + evaluation) * n_dose / 60)
        search.append(
            f"dose search: {n_dose} generations and evaluations on development prompts, about "
            f"{minutes[-1]:.1f} min"
        )
    n_answers = 0
    if asked := [persona for persona in inputs.personas if persona.name in inputs.answering]:
        writers = dict.fromkeys(inputs.writers.values())
        planned = [planned_answers(inputs, persona, name) for persona in asked for name in writers]
        n_answers = sum(map(len, planned))
        minutes.append(n_answers * generation * config.extraction.max_new_tokens / config.max_new_tokens / 60)
        search.append(f"answers that vectors are made from: {n_answers}, about {minutes[-1]:.1f} min")
    n_judgements = n_generations + n_evaluations + n_answers if config.use_gpt4 else 0
    price = config.judge.usd_per_million_tokens
    n_tokens = TOKENS_PER_JUDGEMENT + config.judge.max_answer_tokens - 1
    cost = n_judgements * n_tokens * price / 1e6
    return "\n".join(
        [
            *search,
            f"neutral texts: {config.n_training_samples}, {tokens['source']} source and {tokens['target']} "
            f"target tokens, about {minutes[0]:.1f} min",
            f"generations: {n_generations} ({n_cells - 1} steered cells and 1 baseline, "
            f"{len(inputs.prompts)} prompts x {config.n_seeds} seeds each), at most "
            f"{n_generations * config.max_new_tokens} tokens, about {minutes[1]:.1f} min",
            f"evaluations: {n_evaluations}, about {minutes[2]:.1f} min",
            f"judgements: {n_judgements}, about {cost:.2f} USD at {price:g} USD per million tokens and "
            f"{n_tokens} tokens each",
            f"total: about {sum(minutes):.0f} min on {inputs.target.model.device}, beside loading and "
            "preflight",
        ]
    )


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
        spent = _seconds(partial(extractor.extract_layers, sample, wanted))
        reading += spent / n_tokens * config.search_tokens
    square = torch.ones(1024, 1024)
    products = _seconds(lambda: square @ square) / 1024**3 * config.search_tokens * widths[0] * widths[1]
    return [
        f"layer search: {widths[0]} x {widths[1]} dimensions on {config.search_tokens} tokens, about "
        f"{(reading + products) / 60:.1f} min, not in the total"
    ]


def _time_extraction(inputs: Inputs) -> tuple[float, dict[str, int]]:
    """Return the seconds for all neutral texts in both models, and the tokens in each."""
    texts = [item.text for item in inputs.neutral_texts]
    sample = texts[:N_TEXTS]
    seconds, tokens = 0.0, {}
    for side in inputs.sides:
        counts = [len(ids) for ids in encode(side.tokenizer, texts)]
        tokens[side.name] = sum(counts)
        spent = _seconds(lambda side=side: side.extractor.extract_batch(sample))
        seconds += spent * sum(counts) / sum(counts[:N_TEXTS])
    return seconds, tokens


def _time_generation(inputs: Inputs, n_rows: int) -> tuple[list[tuple[str, str]], float]:
    """Return (prompt, output) of one short batch and the seconds that a full-length text takes."""
    config = inputs.config
    shown = [inputs.shown_prompt("target", prompt) for prompt in inputs.prompts]
    prompts = list(islice(cycle(shown), n_rows))
    n_tokens = min(N_TOKENS, config.max_new_tokens)
    outputs: list[str] = []
    generator = inputs.generator()

    def generate() -> None:
        outputs[:] = generator.generate_batch(prompts, n_tokens)

    spent = _seconds(generate)
    pairs = list(zip(prompts, outputs, strict=True))
    return pairs, spent / n_tokens * config.max_new_tokens / len(prompts)


def _time_evaluation(inputs: Inputs, pairs: list[tuple[str, str]]) -> float:
    """Return the seconds that the perplexities of a full-length text take."""
    length = max(1, inputs.config.max_new_tokens // N_TOKENS)
    # Numbered, since texts that are equal are evaluated once.
    pairs = pairs[:N_TEXTS]
    rows = [
        {"prompt": prompt, "output": f"{output} {index}" * length, "condition": "baseline"}
        for index, (prompt, output) in enumerate(pairs)
    ]
    model, tokenizer = inputs.target.model, inputs.target.tokenizer
    evaluator = Evaluator(model, tokenizer, independent=inputs.independent)
    return _seconds(lambda: evaluator.evaluate_batch(rows)) / len(rows)


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds of a second call; the first one pays for weights that are paged in."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Check that the time of a forward pass is positive and sane."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    inputs = tokenizer("A short text.", return_tensors="pt")
    assert 0 < _seconds(lambda: model(input_ids=inputs["input_ids"])) < 60
    print("dry_run OK: work is timed; `run_experiment.py --dry-run` checks the rest")


if __name__ == "__main__":
    main()

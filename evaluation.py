"""Measure steered text: fluency, repetition, trait strength (phase 5).

A metric of a text may be missing (None): of a judgement that failed, of a persona without a trait scorer. An
empty text shows no trait and has collapsed; a judge is not asked and its scores are the lowest; what it has
no value of, such as a perplexity, is missing. The target's own perplexity rewards repetition loops, so it is
to be read beside the repetition rate and the perplexity of an independent model.
"""

import logging
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, fields
from itertools import chain, compress, count
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.batching import run_in_batches
from decoding.output_head import narrowed_head, token_log_likelihoods
from decoding.steering_hooks import unsteered
from judging.gpt_judge import COHERENCE_PROMPT, GPTJudge, trait_prompt
from judging.judge_answers import Judge, Judgement
from model_loading import context_length, evaluation_mode, filler_token_id, pad_tokens, plain_model
from scoring.degenerate_text import (
    COLLAPSE_THRESHOLD,
    REPETITION_N,
    distinct_share,
    non_word_share,
    units,
    word_count,
)
from support.errors import InputError
from texts.chat import Prompt, plain_text, prompt_text
from texts.encoding import encode_continuations

logger = logging.getLogger(__name__)

SHARE = (0.0, 1.0)
# Metric -> the lowest and the highest value that it can have, where an interval ends.
METRICS = {
    "perplexity": (0.0, math.inf),
    "independent_perplexity": (0.0, math.inf),
    "repetition": SHARE,
    "is_collapsed": SHARE,
    "distinct_1": SHARE,
    "distinct_2": SHARE,
    "non_words": SHARE,
    "n_words": (0.0, math.inf),
    "n_characters": (0.0, math.inf),
    "gpt4_coherence_score": (1.0, 5.0),
    "gpt4_trait_score": (1.0, 5.0),
    "trait_change": (-1.0, 1.0),
}
TRAIT_SUFFIX = "_probability"  # a trait scorer's column ends so, which is how `aggregate` finds it
TRAIT_COLUMN = "trait_probability"
CONFIDENCE = 0.95

OF_EMPTY = (Judgement(1.0), Judgement(1.0))  # coherence and trait of a text that no judge is asked about
Row = Mapping[str, Any]  # of a table: a text, what is known of it, and its metrics


@dataclass(frozen=True)
class EvaluationResult:
    """All metrics of one text; None means missing."""

    condition: str
    persona: str | None
    alpha: float | None
    perplexity: float | None  # of the text given its prompt, by the evaluated model without steering
    independent_perplexity: float | None  # the same by another model with its own tokenizer
    repetition: float | None  # share of 3-grams of words and marks that occurred before in the text
    is_collapsed: bool | None  # repetition above 0.5, or no word at all
    distinct_1: float | None  # different words and marks / all of them (Li et al. 2016)
    distinct_2: float | None  # the same of pairs
    non_words: float | None  # share of words that do not exist
    n_words: int
    n_characters: int
    trait_scores: dict[str, float | None]  # column of a scorer -> score for the trait of the text's persona
    trait_probabilities: dict[str, float | None]  # persona -> score for its trait, by one of the scorers
    classifier_auc: float | None  # cross-validated AUC of that scorer, if it has one
    gpt4_coherence_score: float | None  # 1 to 5
    gpt4_trait_score: float | None  # 1 to 5
    gpt4_failure: str | None  # why one of the two is missing

    def row(self) -> dict[str, Any]:
        """Return all fields as a row of a table, each trait score under its column."""
        row = {each.name: getattr(self, each.name) for each in fields(self)}
        return row | row.pop("trait_scores")


@dataclass
class Evaluator:
    """Evaluate texts that a model wrote.

    model, tokenizer: the target, without steering; gives `perplexity`.
    use_gpt4: ask `judge` (by default a GPTJudge that reads OPENAI_API_KEY) for both scores.
    scorers: column -> persona -> trait scorer, such as a TraitClassifier; a column ends in `_probability`.
    descriptions: persona -> description for the judge. eval_prompts: persona -> judging prompt that replaces
        ours, with the places {question} and {answer}.
    independent: (model, tokenizer) for `independent_perplexity`.
    batch_size: texts in a batch for perplexity; halved when memory runs out.
    every_persona: the column whose scorers score every text for every persona.
    allowed_words: what `degenerate_text.words_of` returned of texts whose words all exist.
    Raises InputError: use_gpt4 without a judge and without a key. ValueError: a wrong column.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    use_gpt4: bool = False
    judge: Judge | None = None
    scorers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    descriptions: Mapping[str, str] = field(default_factory=dict)
    eval_prompts: Mapping[str, str] = field(default_factory=dict)
    independent: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
    batch_size: int = 8
    every_persona: str = TRAIT_COLUMN
    allowed_words: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.judge = (self.judge or GPTJudge()) if self.use_gpt4 else None
        for column in self.scorers:
            if not column.endswith(TRAIT_SUFFIX):
                raise ValueError(
                    f"scorers has the column {column!r}, expected a name that ends in {TRAIT_SUFFIX}"
                )

    def evaluate_single(
        self,
        prompt: Prompt,
        output: str,
        condition: str,
        persona: str | None = None,
        alpha: float | None = None,
    ) -> EvaluationResult:
        """Return the metrics of one continuation; see `evaluate_batch`."""
        row = {"prompt": prompt, "output": output, "condition": condition, "persona": persona, "alpha": alpha}
        return self.evaluate_batch([row])[0]

    def evaluate_batch(self, rows: Sequence[Row]) -> list[EvaluationResult]:
        """Return the metrics of each row, in order.

        rows: `prompt` (a text or messages), `output` (the continuation without the prompt), `condition`, and
        optionally `persona` (whose trait is scored) and `alpha`.
        """
        texts = [row["prompt"] for row in rows], [row["output"] for row in rows]
        own = continuation_perplexities(self.model, self.tokenizer, *texts, self.batch_size)
        if self.independent is None:
            return self.score(rows, own, [None] * len(rows))
        return self.score(rows, own, continuation_perplexities(*self.independent, *texts, self.batch_size))

    def score(
        self,
        rows: Sequence[Row],
        perplexities: Sequence[float | None],
        independent: Sequence[float | None],
    ) -> list[EvaluationResult]:
        """Return the metrics of each row whose perplexities are known; see `evaluate_batch`."""
        scored = dict(chain.from_iterable(self.score_each(rows, perplexities, independent)))
        return [scored[index] for index in range(len(rows))]

    def score_each(
        self,
        rows: Sequence[Row],
        perplexities: Sequence[float | None],
        independent: Sequence[float | None],
        wanted: Sequence[int] | None = None,
    ) -> Iterator[list[tuple[int, EvaluationResult]]]:
        """Yield (index of the row, metrics) in groups: as they are judged; without a judge, one group.

        wanted: indices of the rows to yield; all by default. The other rows only share the batches in which
        traits are scored. The judge is asked about the wanted rows whose `is_judged` is true or missing, and
        not about empty texts.
        """
        wanted = range(len(rows)) if wanted is None else wanted
        by_column = {column: self._trait_scores(column, rows) for column in self.scorers}
        for_every = self.scorers.get(self.every_persona, {})

        def result(index: int, judgements: Sequence[Judgement] = ()) -> EvaluationResult:
            row, persona = rows[index], rows[index].get("persona")
            coherence, trait = (*judgements, Judgement(None), Judgement(None))[:2]
            return EvaluationResult(
                condition=row["condition"],
                persona=persona,
                alpha=row.get("alpha"),
                perplexity=perplexities[index] if row["output"].strip() else None,
                independent_perplexity=independent[index] if row["output"].strip() else None,
                **repetition_metrics(row["output"]),
                non_words=non_word_share(row["output"], self.allowed_words),
                n_characters=len(row["output"].strip()),
                trait_scores={column: scores[index].get(persona) for column, scores in by_column.items()},
                trait_probabilities=by_column[self.every_persona][index] if for_every else {},
                classifier_auc=getattr(for_every.get(persona), "auc", None),
                gpt4_coherence_score=coherence.score,
                gpt4_trait_score=trait.score,
                gpt4_failure=coherence.failure or trait.failure,
            )

        to_judge = {index for index in wanted if self.judge and rows[index].get("is_judged", True)}
        asked = [index for index in wanted if index in to_judge and rows[index]["output"].strip()]
        if others := sorted(set(wanted) - set(asked)):
            yield [(index, result(index, OF_EMPTY if index in to_judge else ())) for index in others]
        with closing(self._judged([rows[index] for index in asked])) as judged:
            for group in judged:
                yield [(asked[index], result(asked[index], found)) for index, found in group]

    def aggregate(self, results: Sequence[EvaluationResult]) -> list[dict[str, Any]]:
        """Return metrics by condition, persona and alpha; see `aggregate`."""
        return aggregate([result.row() for result in results])

    def _trait_scores(self, column: str, rows: Sequence[Row]) -> list[dict[str, float | None]]:
        """Return persona -> score of each row's text, for the row's persona or for every persona."""
        scores: list[dict[str, float | None]] = [{} for _ in rows]
        for persona, scorer in self.scorers[column].items():
            is_read = [column == self.every_persona or row.get("persona") == persona for row in rows]
            found = scorer.score([row["output"] for row in compress(rows, is_read)])
            for of_row, score in zip(compress(scores, is_read), found, strict=True):
                of_row[persona] = score
        return scores

    def _judged(self, rows: Sequence[Row]) -> Iterator[list[tuple[int, list[Judgement]]]]:
        """Yield (index of the row, its judgements) of the rows that a new judgement completes.

        A row's prompts are asked one after the other, and equal prompts once.
        """
        asked = [self._judging_prompts(row) for row in rows]
        waiting: dict[str, list[int]] = {}
        for index, prompts in enumerate(asked):
            for prompt in prompts:
                waiting.setdefault(prompt, []).append(index)
        if not waiting:
            return
        unique, known = list(waiting), {}
        with closing(self.judge.judge_each(unique)) as judgements:
            for number, judgement in judgements:
                known[unique[number]] = judgement
                complete = [index for index in waiting[unique[number]] if known.keys() >= set(asked[index])]
                if complete:
                    yield [(index, [known[prompt] for prompt in asked[index]]) for index in complete]
        if n_failed := sum(len(waiting[prompt]) for prompt, found in known.items() if found.failure):
            logger.warning("%d judgements failed and are missing", n_failed)

    def _judging_prompts(self, row: Row) -> list[str]:
        """Return the judging prompts for coherence and, if the row has a persona, for its trait."""
        prompt, output, name = plain_text(row["prompt"]), row["output"], row.get("persona")
        coherence = COHERENCE_PROMPT.format(prompt=prompt, output=output)
        if not name:
            return [coherence]
        own = self.descriptions.get(name, ""), self.eval_prompts.get(name, "")
        return [coherence, trait_prompt(name, *own, prompt, output)]


def continuation_perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    outputs: Sequence[str],
    batch_size: int = 8,
    is_steered: bool = False,
) -> list[float | None]:
    """Return exp(mean negative log-likelihood) of each continuation's tokens given what precedes them.

    prompts: texts, or lists of messages, rendered by the tokenizer's chat template; see `texts.chat`.
    `texts.encoding.encode_continuations` decides which tokens belong to a continuation. The result is None
    where no token can be scored. Texts longer than the context lose their beginning. Equal pairs of prompt
    and output are scored once. Steering is switched off meanwhile, unless `is_steered`.
    """
    model = plain_model(model)
    if len(prompts) != len(outputs):
        raise InputError(f"got {len(prompts)} prompts and {len(outputs)} outputs; give one output a prompt")
    texts = [prompt_text(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
    pairs = list(zip(texts, outputs, strict=True))
    unique = list(dict.fromkeys(pairs))  # the unsteered text is one row for each persona
    if not unique:
        return []
    limit = context_length(model, tokenizer)
    whole = encode_continuations(tokenizer, unique, model)
    if n_cut := sum(len(tokens) > limit for tokens, _ in whole):
        logger.warning("%d texts exceed the context of %d tokens and lost their beginning", n_cut, limit)
    cut = [(tokens[-limit:], max(1, start - max(0, len(tokens) - limit))) for tokens, start in whole]
    scored = {pair: each for pair, each in zip(unique, cut, strict=True) if each[1] < len(each[0])}
    with nullcontext() if is_steered else unsteered(model):
        values = _perplexities(model, list(scored.values()), batch_size)
    known = dict(zip(scored, values, strict=True))
    return [known.get(pair) for pair in pairs]


@torch.inference_mode()
def _perplexities(
    model: PreTrainedModel, texts: Sequence[tuple[list[int], int]], batch_size: int
) -> list[float]:
    """Return the perplexity of each text; texts: (tokens, index of the first scored token, 1 or more).

    A text's last token need not be read, so texts that differ in it alone share a row of a batch.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, (ids, _) in enumerate(texts):
        sharing.setdefault(tuple(ids[:-1]), []).append(index)
    read = list(sharing)
    # Rows and columns of the tokens before the scored ones, (scored,) each. A mask would have to be read for
    # how many they are, and an accelerator is waited for then.
    rows = columns = torch.empty(0)

    def before_scored(values: Tensor) -> Tensor:
        return values[rows.to(values.device), columns.to(values.device)]

    def run(indices: list[int]) -> list[list[float]]:
        nonlocal rows, columns
        batch = [read[index] for index in indices]
        # With padding on the right causality hides it, and no mask is needed.
        tokens, _ = pad_tokens(batch, filler_token_id(model), "right", model.device)
        of_batch = [(row, *texts[index]) for row, ids in enumerate(batch) for index in sharing[ids]]
        scored = [(row, i - 1, ids[i]) for row, ids, start in of_batch for i in range(start, len(ids))]
        rows, columns, following = torch.tensor(scored, device=model.device).unbind(1)
        logits = model(input_ids=tokens, use_cache=False).logits
        # A model whose head cannot be narrowed returns the logits of all tokens.
        logits = before_scored(logits) if logits.shape[:2] == tokens.shape else logits[0]
        likelihood = token_log_likelihoods(logits, following.to(logits.device))
        parts = likelihood.split([len(ids) - start for _, ids, start in of_batch])
        values = iter(torch.stack([part.mean() for part in parts]).tolist())
        return [[math.exp(-next(values)) for _ in sharing[ids]] for ids in batch]

    # Logits at the prompt's tokens would take most of the memory, and they are not needed.
    with evaluation_mode(model), narrowed_head(model, lambda hidden: before_scored(hidden)[None]):
        found = run_in_batches(run, [len(ids) for ids in read], batch_size, "perplexity", model)
    by_index = {
        index: value
        for indices, values in zip(sharing.values(), found, strict=True)
        for index, value in zip(indices, values, strict=True)
    }
    return [by_index[index] for index in range(len(texts))]


def repetition_metrics(text: str) -> dict[str, Any]:
    """Return repetition, is_collapsed, distinct_1, distinct_2 and n_words of a text.

    Units are words and punctuation marks, lower case. A rate is None where the text has too few units; a text
    without any has collapsed.
    """
    found = units(text)
    repetition = None if (ratio := distinct_share(found, REPETITION_N)) is None else 1 - ratio
    return {
        "repetition": repetition,
        "is_collapsed": not found or (None if repetition is None else repetition > COLLAPSE_THRESHOLD),
        "distinct_1": distinct_share(found, 1),
        "distinct_2": distinct_share(found, 2),
        "n_words": word_count(text),
    }


def aggregate(
    rows: Sequence[Row], by: Sequence[str] = ("condition", "draw", "persona", "alpha")
) -> list[dict[str, Any]]:
    """Group rows by these columns, in the order in which groups first appear.

    rows: as `EvaluationResult.row` returns them, with `prompt_idx`, `seed` and `has_ended` where they are
    known; without `prompt_idx`, each row of a condition, draw, persona and alpha has a prompt of its own.
    `n` counts texts and `n_empty` those without a word.
    Each of METRICS, each trait score and `has_ended` becomes {mean, std, std_prompts, std_seeds, median, n,
    missing, low, high}: std is the sample's (n - 1) over texts, the other two that of the means of prompts
    and of seeds; n counts values and `missing` the rows without one; low and high are the 95 % interval of
    the mean, where all texts of a prompt count as one. Perplexities are averaged as logarithms: their mean
    is geometric, and their deviations are factors. `trait_change` is the difference of `trait_probability`
    to the unsteered text of the same prompt, seed and persona. None where there are too few values.
    """
    rows = _with_changes(rows)
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    trait_columns = dict.fromkeys(name for row in rows for name in row if name.endswith(TRAIT_SUFFIX))
    table = []
    for place, members in groups.items():
        n_empty = sum(row.get("n_characters") == 0 for row in members)
        entry = {**dict(zip(by, place, strict=True)), "n": len(members), "n_empty": n_empty}
        if "persona" in by:
            entry["classifier_auc"] = members[0]["classifier_auc"]
        entry |= {name: _summary(members, name) for name in (*METRICS, *trait_columns, "has_ended")}
        table.append(entry)
    return table


def aggregated_tables(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Return what `aggregated_results.json` holds: `conditions` by cell, `by_condition` alone, and `by_seed`.

    A cell is a condition, draw, persona and alpha; an unsteered text counts once for each persona.
    """
    cell = ("condition", "draw", "persona", "alpha")
    by = {"conditions": cell, "by_condition": cell[:1], "by_seed": (*cell, "seed")}
    return {name: aggregate(rows, columns) for name, columns in by.items()}


def _with_changes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows with `prompt_idx`, and with `trait_change`, which unsteered rows lack."""
    counters: dict[tuple, Iterator[int]] = defaultdict(count)
    cells = ((row["condition"], row.get("draw"), row["persona"], row["alpha"]) for row in rows)
    rows = [{"prompt_idx": next(counters[cell]), **row} for cell, row in zip(cells, rows, strict=True)]
    unsteered = {
        (row["persona"], row["prompt_idx"], row.get("seed")): row.get(TRAIT_COLUMN)
        for row in rows
        if row["condition"] == "baseline"
    }

    def change(row: Row) -> float | None:
        before = unsteered.get((row["persona"], row["prompt_idx"], row.get("seed")))
        after = None if row["condition"] == "baseline" else row.get(TRAIT_COLUMN)
        return None if None in (before, after) else after - before

    return [{**row, "trait_change": change(row)} for row in rows]


def _summary(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    scaled, plain = (math.log, _exp) if metric.endswith("perplexity") else (float, float)
    values = [row.get(metric) for row in rows]
    present = {
        index: scaled(value)
        for index, value in enumerate(values)
        if value is not None and math.isfinite(value)
    }
    prompts, seeds = (_means(rows, present, place) for place in ("prompt_idx", "seed"))
    found = {
        "mean": statistics.fmean(present.values()) if present else None,
        "std": _deviation(list(present.values())),
        "std_prompts": _deviation(prompts),
        "std_seeds": _deviation(seeds),
        "median": statistics.median(present.values()) if present else None,
    }
    found |= dict(zip(("low", "high"), _interval(prompts), strict=True))
    found = {name: None if value is None else plain(value) for name, value in found.items()}
    lowest, highest = METRICS.get(metric, SHARE)
    if found["low"] is not None:
        found |= {"low": max(lowest, found["low"]), "high": min(highest, found["high"])}
    return {**found, "n": len(present), "missing": len(rows) - len(present)}


def _exp(value: float) -> float:
    """Return e^value, or infinity where that is no float."""
    return math.exp(value) if value < math.log(sys.float_info.max) else math.inf


def _means(rows: Sequence[Row], values: Mapping[int, float], place: str) -> list[float]:
    """Return the mean of each prompt or seed. values: index of a row -> value; place: the column."""
    by_place: dict[Any, list[float]] = {}
    for index, value in values.items():
        by_place.setdefault(rows[index].get(place), []).append(value)
    return list(map(statistics.fmean, by_place.values()))


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return Student's 95 % interval of the mean of independent values, None with fewer than two."""
    if len(values) < 2:
        return None, None
    mean, error = statistics.fmean(values), float(stats.sem(values))
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, error)
    return float(low), float(high)


def main() -> None:
    """Check on a tiny model that batched perplexity equals one by one, and that a loop has collapsed."""
    from support.tiny_models import tiny_model, tiny_tokenizer

    given = (tiny_model(), tiny_tokenizer(), ["The sea is", "Rain"], [" blue and wide.", " falls."])
    together, alone = (continuation_perplexities(*given, batch_size=size) for size in (2, 1))
    assert all(abs(a - b) < 1e-3 * b for a, b in zip(together, alone, strict=True))
    loop = Evaluator(*given[:2]).evaluate_single("He said", " no no no no no no no no", "baseline")
    assert loop.is_collapsed
    print(f"evaluation OK: perplexity {together[0]:.1f}, loop repetition {loop.repetition:.2f}")


if __name__ == "__main__":
    main()

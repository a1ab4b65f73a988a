"""Measure steered text: fluency, repetition, trait strength (phase 5).

Every metric of every text may be missing (an empty text, a judgement that failed, a persona
without classifier). Missing is None, never a default, and is counted in the aggregation.

The target's own perplexity rewards repetition loops; read it beside the repetition rate and
the perplexity of an independent model.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.batching import run_in_batches
from decoding.output_head import narrowed_head, token_log_likelihoods
from decoding.steering_hooks import unsteered
from model_loading import context_length, filler_token_id, pad_tokens, plain_model
from scoring.cached_judge import CachedJudge
from scoring.degenerate_text import COLLAPSE_THRESHOLD, REPETITION_N, distinct_share, units, word_count
from scoring.gpt_judge import COHERENCE_PROMPT, GPTJudge, trait_prompt
from scoring.judge_answers import Judgement
from scoring.likelihood_ratio import LikelihoodRatio
from scoring.local_judge import LocalJudge
from scoring.trait_classifier import TraitClassifier, score_texts
from support.errors import InputError
from support.intervals import student_interval
from texts.chat import Prompt, plain_text, prompt_text
from texts.encoding import encode_continuations

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Value = TypeVar("Value")

METRICS = (
    "perplexity",
    "independent_perplexity",
    "repetition",
    "is_collapsed",
    "distinct_1",
    "distinct_2",
    "n_words",
    "n_characters",
    "trait_probability",
    "likelihood_probability",
    "gpt4_coherence_score",
    "gpt4_trait_score",
)


@dataclass(frozen=True)
class EvaluationResult:
    """All metrics of one text; None means missing.

    perplexity: of the continuation given its prompt, by the evaluated model, unsteered.
    independent_perplexity: the same by another model with its own tokenizer.
    repetition: share of 3-grams of words and marks that occurred before in the text, 0 to 1.
    is_collapsed: repetition over 0.5.
    distinct_1, distinct_2: different uni- and bigrams / all of them (Li et al. 2016).
    trait_probability: by the persona's classifier; classifier_auc is its cross-validated AUC.
    trait_probabilities: persona -> the same by the classifier of each, also of those not steered for.
    likelihood_probability: of the persona's trait, by the likelihood ratio of a language model.
    gpt4_coherence_score, gpt4_trait_score: 1 to 5; gpt4_failure says why one is missing.
    """

    condition: str
    persona: str | None
    alpha: float | None
    perplexity: float | None
    independent_perplexity: float | None
    repetition: float | None
    is_collapsed: bool | None
    distinct_1: float | None
    distinct_2: float | None
    n_words: int
    n_characters: int
    trait_probability: float | None
    trait_probabilities: dict[str, float | None]
    likelihood_probability: float | None
    classifier_auc: float | None
    gpt4_coherence_score: float | None
    gpt4_trait_score: float | None
    gpt4_failure: str | None


class Evaluator:
    """Evaluate texts that a model wrote.

    model, tokenizer: the target, without steering; gives `perplexity`.
    use_gpt4: ask `judge` (by default a GPTJudge that reads OPENAI_API_KEY) for both scores.
    classifiers: persona -> TraitClassifier. likelihood_ratios: persona -> LikelihoodRatio.
    descriptions: persona -> text for the trait judge.
    eval_prompts: persona -> what the trait judge is asked instead, with the places {question} and {answer}.
    independent: (model, tokenizer) for `independent_perplexity`.
    batch_size: texts a batch for perplexity; halved when memory runs out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        use_gpt4: bool = False,
        judge: GPTJudge | LocalJudge | CachedJudge | None = None,
        classifiers: Mapping[str, TraitClassifier] | None = None,
        descriptions: Mapping[str, str] | None = None,
        eval_prompts: Mapping[str, str] | None = None,
        independent: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
        likelihood_ratios: Mapping[str, LikelihoodRatio] | None = None,
        batch_size: int = 8,
    ) -> None:
        """Raises InputError: use_gpt4 without a judge and without a key."""
        self.model = model
        self.tokenizer = tokenizer
        self.judge = (judge or GPTJudge()) if use_gpt4 else None
        self.classifiers = dict(classifiers or {})
        self.descriptions = dict(descriptions or {})
        self.eval_prompts = dict(eval_prompts or {})
        self.independent = independent
        self.likelihood_ratios = dict(likelihood_ratios or {})
        self.batch_size = batch_size

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

    def evaluate_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[EvaluationResult]:
        """Return the metrics of each row, in order.

        rows: `prompt` (a text or messages), `output` (the continuation without the prompt), `condition`, and
        optionally `persona` (whose trait is scored) and `alpha`.
        """
        prompts, outputs = [row["prompt"] for row in rows], [row["output"] for row in rows]
        perplexities = self._perplexities((self.model, self.tokenizer), prompts, outputs)
        return self.score(rows, perplexities, self._perplexities(self.independent, prompts, outputs))

    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        perplexities: Sequence[float | None],
        independent: Sequence[float | None],
    ) -> list[EvaluationResult]:
        """Return the metrics of each row whose perplexities are known; see `evaluate_batch`."""
        scored = dict(chain.from_iterable(self.score_each(rows, perplexities, independent)))
        return [scored[index] for index in range(len(rows))]

    def score_each(
        self,
        rows: Sequence[Mapping[str, Any]],
        perplexities: Sequence[float | None],
        independent: Sequence[float | None],
        wanted: Sequence[int] | None = None,
    ) -> Iterator[list[tuple[int, EvaluationResult]]]:
        """Yield (index of the row, metrics) in groups: as they are judged; without a judge, one group.

        wanted: indices of the rows to yield; all by default. The others are the company in which the trait
        is scored. A judge is asked about those of them whose `is_judged` is true or missing.
        """
        wanted = range(len(rows)) if wanted is None else wanted
        traits = self._trait_probabilities(rows)
        likelihoods = self._likelihood_probabilities(rows)

        def result(index: int, coherence: Judgement, trait: Judgement) -> EvaluationResult:
            row = rows[index]
            classifier = self.classifiers.get(row.get("persona"))
            return EvaluationResult(
                condition=row["condition"],
                persona=row.get("persona"),
                alpha=row.get("alpha"),
                perplexity=perplexities[index],
                independent_perplexity=independent[index],
                **repetition_metrics(row["output"]),
                n_characters=len(row["output"].strip()),
                trait_probability=traits[index].get(row.get("persona")),
                trait_probabilities=traits[index],
                likelihood_probability=likelihoods[index],
                classifier_auc=classifier.auc if classifier else None,
                gpt4_coherence_score=coherence.score,
                gpt4_trait_score=trait.score,
                gpt4_failure=coherence.failure or trait.failure,
            )

        asked = [index for index in wanted if self.judge and rows[index].get("is_judged", True)]
        if others := [index for index in wanted if index not in set(asked)]:
            yield [(index, result(index, Judgement(None), Judgement(None))) for index in others]
        with closing(self._judged([rows[index] for index in asked])) as judged:
            for group in judged:
                yield [(asked[index], result(asked[index], *both)) for index, both in group]

    def aggregate(self, results: Sequence[EvaluationResult]) -> list[dict[str, Any]]:
        """Return metrics by condition, persona and alpha; see `aggregate`."""
        return aggregate([asdict(result) for result in results])

    def _perplexities(
        self,
        scorer: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
        prompts: list[str],
        outputs: list[str],
    ) -> list[float | None]:
        if scorer is None:
            return [None] * len(prompts)
        return continuation_perplexities(*scorer, prompts, outputs, self.batch_size)

    def _trait_probabilities(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float | None]]:
        """Return persona -> score of each row's text, by the classifiers of all personas."""
        scores = score_texts(list(self.classifiers.values()), [row["output"] for row in rows])
        return [
            {name: found[index] for name, found in zip(self.classifiers, scores, strict=True)}
            for index in range(len(rows))
        ]

    def _likelihood_probabilities(self, rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        scores: list[float | None] = [None] * len(rows)
        for persona, scorer in self.likelihood_ratios.items():
            indices = [index for index, row in enumerate(rows) if row.get("persona") == persona]
            of_persona = scorer.score([rows[index]["output"] for index in indices])
            for index, score in zip(indices, of_persona, strict=True):
                scores[index] = score
        return scores

    def _judged(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[tuple[int, list[Judgement]]]]:
        """Yield (index of the row, judgements of coherence and trait) of the rows that an answer completes.

        A row's prompts are asked one after the other, and those that are equal once.
        """
        asked = [self._judging_prompts(row) for row in rows]
        waiting: dict[str, list[int]] = {}
        for index, texts in enumerate(asked):
            for text in texts:
                waiting.setdefault(text, []).append(index)
        if not asked:
            return
        prompts, known, failed = list(waiting), {}, 0
        with closing(self.judge.judge_each(prompts)) as answers:
            for number, judgement in answers:
                text = prompts[number]
                known[text] = judgement
                failed += len(waiting[text]) * (judgement.failure is not None)
                complete = [index for index in waiting[text] if known.keys() >= set(asked[index])]
                both = [[*(known[text] for text in asked[index]), Judgement(None)][:2] for index in complete]
                if complete:
                    yield list(zip(complete, both, strict=True))
        if failed:
            logger.warning("%d judgements failed and are missing", failed)

    def _judging_prompts(self, row: Mapping[str, Any]) -> list[str]:
        """Return the prompts for coherence and, with a persona, its trait."""
        texts = {"prompt": plain_text(row["prompt"]), "output": row["output"]}
        prompts = [COHERENCE_PROMPT.format(**texts)]
        if row.get("persona"):
            name = row["persona"]
            described = self.descriptions.get(name, ""), self.eval_prompts.get(name, "")
            prompts.append(trait_prompt(name, *described, **texts))
        return prompts


def _once_each(compute: Callable[[list[Item]], Sequence[Value]], items: Sequence[Item]) -> list[Value]:
    """Return `compute`'s value for each item, asking once for items that are equal.

    The unsteered text is one row a persona, and costs as much as one.
    """
    unique = list(dict.fromkeys(items))
    values = dict(zip(unique, compute(unique), strict=True)) if unique else {}
    return [values[item] for item in items]


def continuation_perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    outputs: Sequence[str],
    batch_size: int = 8,
    is_steered: bool = False,
) -> list[float | None]:
    """Return exp(mean negative log-likelihood) of each continuation's tokens given what precedes them.

    prompts: texts, or lists of messages, shown in the tokenizer's chat template; see `texts.chat`.
    Which tokens are a continuation's, `texts.encoding.encode_continuations` says. None where
    no token is left to score. Texts longer than the context lose their beginning. Texts that are there twice
    are scored once. What steers the model is switched off for the while, unless `is_steered`.
    """
    model = plain_model(model)
    if len(prompts) != len(outputs):
        raise InputError(f"got {len(prompts)} prompts and {len(outputs)} outputs; give one output a prompt")

    def compute(unique: list[tuple[str, str]]) -> list[float | None]:
        return _unique_perplexities(model, tokenizer, unique, batch_size)

    texts = [prompt_text(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
    with nullcontext() if is_steered else unsteered(model):
        return _once_each(compute, list(zip(texts, outputs, strict=True)))


def _unique_perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[tuple[str, str]],
    batch_size: int,
) -> list[float | None]:
    limit = context_length(model, tokenizer)
    whole = encode_continuations(tokenizer, texts, model)
    n_cut = sum(len(tokens) > limit for tokens, _ in whole)
    pairs = [(tokens[-limit:], max(1, start - max(0, len(tokens) - limit))) for tokens, start in whole]
    scored = [index for index, (tokens, start) in enumerate(pairs) if start < len(tokens)]
    if n_cut:
        logger.warning("%d texts exceed the context of %d tokens and lost their beginning", n_cut, limit)

    before_scored = torch.empty(0)

    def run(indices: list[int]) -> list[float]:
        nonlocal before_scored
        batch = [pairs[scored[index]] for index in indices]
        # Padding stands on the right, so that causality hides it and no mask is needed.
        tokens, _ = pad_tokens([ids for ids, _ in batch], filler_token_id(model), "right", model.device)
        before_scored = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (ids, start) in enumerate(batch):
            before_scored[row, start - 1 : len(ids) - 1] = True
        likelihood = _log_likelihoods(model, tokens, before_scored)
        parts = likelihood.split([len(ids) - start for ids, start in batch])
        return [math.exp(-part.mean().item()) for part in parts]

    lengths = [len(pairs[index][0]) for index in scored]
    # Logits of the prompt's tokens would take most of the memory and nobody reads them.
    with narrowed_head(model, lambda hidden: hidden[before_scored.to(hidden.device)][None]):
        values = run_in_batches(run, lengths, batch_size, "perplexity")
    perplexities: list[float | None] = [None] * len(pairs)
    for index, value in zip(scored, values, strict=True):
        perplexities[index] = value
    return perplexities


@torch.inference_mode()
def _log_likelihoods(model: PreTrainedModel, tokens: Tensor, before_scored: Tensor) -> Tensor:
    """Return log p of each token that stands behind a position in `before_scored`, (positions,) float64.

    tokens, before_scored: (rows, positions). The head may give the logits of those positions alone.
    """
    logits = model(input_ids=tokens, use_cache=False).logits
    logits = logits[before_scored.to(logits.device)] if logits.shape[:2] == tokens.shape else logits[0]
    following = tokens.roll(-1, dims=1)[before_scored]
    return token_log_likelihoods(logits, following.to(logits.device))


def repetition_metrics(text: str) -> dict[str, Any]:
    """Return repetition, is_collapsed, distinct_1, distinct_2 and n_words of a text.

    Units are words and punctuation marks, lower case. A rate is None where the text has too
    few units for it.
    """
    found = units(text)
    repetition = None if (ratio := distinct_share(found, REPETITION_N)) is None else 1 - ratio
    return {
        "repetition": repetition,
        "is_collapsed": None if repetition is None else repetition > COLLAPSE_THRESHOLD,
        "distinct_1": distinct_share(found, 1),
        "distinct_2": distinct_share(found, 2),
        "n_words": word_count(text),
    }


def aggregate(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Group rows by condition, persona and alpha, in the order in which groups first appear.

    Each metric becomes {mean, std, median, n, missing, low, high}: the sample standard deviation (n - 1),
    None with fewer than two values; n counts values and `missing` the rows without one; low and high are the
    95 % interval of the mean, texts of a prompt (`prompt_idx`) counting as one, None with fewer than two.
    `has_ended`, whether the model ended the text before the limit, is known of rows that say so.
    `trait_change` is the difference of `trait_probability` to the unsteered text of the same prompt and
    persona, {mean, low, high, n} over prompts; None where either is missing.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["condition"], row["persona"], row["alpha"]), []).append(row)
    table = []
    for (condition, persona, alpha), members in groups.items():
        entry = {"condition": condition, "persona": persona, "alpha": alpha, "n": len(members)}
        entry["classifier_auc"] = members[0]["classifier_auc"]
        entry |= {metric: _summary(members, metric) for metric in METRICS}
        entry["has_ended"] = _summary(members, "has_ended")
        entry["trait_change"] = _change(members, groups.get(("baseline", persona, None), []))
        table.append(entry)
    return table


def _summary(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    values = [row.get(metric) for row in rows]
    present = [float(value) for value in values if value is not None and math.isfinite(value)]
    low, high = _interval(list(prompt_means(rows, metric).values()))
    return {
        "mean": statistics.fmean(present) if present else None,
        "std": statistics.stdev(present) if len(present) > 1 else None,
        "median": statistics.median(present) if present else None,
        "n": len(present),
        "missing": len(values) - len(present),
        "low": low,
        "high": high,
    }


def _change(steered: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    with_vector, without = (prompt_means(rows, "trait_probability") for rows in (steered, baseline))
    if steered and steered[0]["condition"] == "baseline":
        without = {}
    changes = [with_vector[prompt] - without[prompt] for prompt in with_vector.keys() & without.keys()]
    low, high = _interval(changes)
    return {
        "mean": statistics.fmean(changes) if changes else None,
        "low": low,
        "high": high,
        "n": len(changes),
    }


def prompt_means(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """Return prompt -> mean over its texts; rows that do not say which prompt is theirs have one each."""
    by_prompt: dict[int, list[float]] = {}
    for index, row in enumerate(rows):
        value = row.get(metric)
        if value is not None and math.isfinite(value):
            by_prompt.setdefault(row.get("prompt_idx", index), []).append(float(value))
    return {prompt: statistics.fmean(values) for prompt, values in by_prompt.items()}


def _interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return Student's 95 % interval of the mean of independent values, None with fewer than two."""
    if len(values) < 2:
        return None, None
    return student_interval(values)


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

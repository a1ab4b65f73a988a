"""Find how strongly a vector can be added before the text stops being coherent (phase 4).

With `"alpha_values": "auto"`, the strongest alpha at which the native vector's texts on the development
prompts stay within a stated bound of the unsteered ones is searched for by bisection on log alpha, for all
personas side by side, so that a round is one batch of generations. The trait is reported and never used to
choose. Of listed alphas, the strongest coherent one is chosen in the same way, on the same texts.

Some traits raise perplexity by themselves: text that talks like a pirate is less predictable than text that
does not. The bound is on what exceeds the trait's own perplexity ratio, if that is given.

After k midpoints the bracket is left (high / low) ** (1 / 2**k) wide: 5 evaluations between 0.05 and 2 come
within 12 % of a threshold. Coherence need not fall steadily with alpha: an alpha that is called coherent was
measured to be, and the next stronger one measured is not, but others can go unseen. Few prompts make a noisy
ratio, and an alpha chosen by it looks a little more coherent here than on other prompts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from types import MappingProxyType
from typing import Any, Literal

import pandas as pd

from analysis.results_table import perplexity_ratio
from support.errors import InputError
from support.progress import each

AlphaKey = tuple[str, str]  # (persona, method)


@dataclass(frozen=True)
class ScoredText:
    """Metrics of one text; None means missing.

    perplexity: of the continuation by an independent model; None of an empty text; infinite or NaN is a text
        that is not coherent.
    repetition: share of repeated 3-grams. non_words: share of words that do not exist. trait_probability: by
        the persona's classifier.
    """

    perplexity: float | None
    repetition: float | None
    trait_probability: float | None = None
    non_words: float | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ScoredText":
        """Return the metrics of a row; a perplexity that a text of some words lacks counts as infinite."""
        names = ("independent_perplexity", "repetition", "trait_probability", "non_words")
        perplexity, *others = (None if pd.isna(row.get(name)) else row[name] for name in names)
        if perplexity is None and row["output"].strip():
            perplexity = math.inf  # JSON holds no such number
        return cls(perplexity, *others)

    @property
    def is_finite(self) -> bool:
        """Whether there is a perplexity to compare."""
        return self.perplexity is not None and math.isfinite(self.perplexity)

    @property
    def is_infinite(self) -> bool:
        """Whether the perplexity says that the text is not coherent."""
        return self.perplexity is not None and not self.is_finite


@dataclass(frozen=True)
class CoherenceBound:
    """How far steered text may be from the unsteered text and still count as coherent.

    max_perplexity_ratio: see `results_table.perplexity_ratio`. max_repetition_increase: of the mean rate.
    max_non_words_increase: of the mean share of words that do not exist.
    More empty texts than unsteered are never coherent, nor is a perplexity that is not finite.
    """

    max_perplexity_ratio: float = 1.5
    max_repetition_increase: float = 0.05
    max_non_words_increase: float = 0.02

    def of_trait(self, cost: float) -> "CoherenceBound":
        """Return the bound of text that shows a trait which is `cost` times as perplexing by itself."""
        return replace(self, max_perplexity_ratio=self.max_perplexity_ratio * max(1.0, cost))


DEFAULT_BOUND = CoherenceBound()


@dataclass(frozen=True)
class AlphaPoint:
    """What one alpha does to the texts of one persona and method.

    perplexity_ratio: over pairs, which are the same prompt and seed with both perplexities finite; None
        without pairs.
    repetition_increase, non_words_increase: difference of means over the texts where both rates exist, or
        None.
    n_pairs: behind the ratio. n_missing: steered texts without a finite perplexity.
    reason: every bound that failed, or None. is_coherent: none did.
    trait_probability: mean over the steered texts that have one, or None.
    """

    alpha: float
    perplexity_ratio: float | None
    repetition_increase: float | None
    n_pairs: int
    n_missing: int
    is_coherent: bool
    reason: str | None
    trait_probability: float | None = None
    non_words_increase: float | None = None


@dataclass(frozen=True)
class ChosenAlpha:
    """The strongest coherent alpha of a persona and method, and everything measured on the way.

    is_coherent: False only if nothing was, not even the lowest alpha, which is then given as `alpha`.
    at: `highest` or `lowest` if `alpha` is that end of the bracket, else `inside`; `listed` without a search.
    curve: sorted by the size of alpha.
    """

    alpha: float
    is_coherent: bool
    at: Literal["inside", "highest", "lowest", "listed"]
    curve: list[AlphaPoint]

    @property
    def point(self) -> AlphaPoint:
        """The point of the curve that was chosen."""
        return next(point for point in self.curve if point.alpha == self.alpha)


Measure = Callable[[list[tuple[AlphaKey, float]]], Sequence[Sequence[ScoredText]]]


def search_alphas(
    keys: Sequence[AlphaKey],
    measure: Measure,
    unsteered: Sequence[ScoredText],
    bracket: tuple[float, float],
    bound: CoherenceBound = DEFAULT_BOUND,
    n_evaluations: int = 7,
    trait_costs: Mapping[str, float] = MappingProxyType({}),
) -> dict[AlphaKey, ChosenAlpha]:
    """Return the strongest coherent alpha of each key.

    measure: called once a round with (key, alpha) pairs, one for each key; returns a list
        of texts for each pair, for the prompts and seeds of `unsteered` and in its order.
    bracket: (low, high), 0 < low < high. The ends are measured only if all midpoints point to them:
        the last evaluation is of low if no midpoint was coherent, of high if all were.
    n_evaluations: for each key, 2 or more.
    trait_costs: persona -> how many times as perplexing a text is for showing the trait. A persona's bound is
        this many times `max_perplexity_ratio`; a cost below 1, as 1, never makes it stricter.
    Raises InputError: unsteered texts without any finite perplexity or any repetition rate. ValueError:
    `measure` returned another number of texts.
    """
    _check_unsteered(unsteered)
    curves: dict[AlphaKey, list[AlphaPoint]] = {key: [] for key in keys}
    bounds = {persona: bound.of_trait(trait_costs.get(persona, 1.0)) for persona, _ in keys}
    rounds = range(n_evaluations)
    for number in each(rounds, "alpha search", "round", leave=False):
        asked = [(key, _next_alpha(curve, bracket, number == rounds[-1])) for key, curve in curves.items()]
        for (key, alpha), texts in zip(asked, measure(asked), strict=True):
            curves[key].append(compare(alpha, texts, unsteered, bounds[key[0]]))
    return {key: _choose(curve, bracket) for key, curve in curves.items()}


def choose_listed(
    listed: Mapping[AlphaKey, Sequence[float]],
    measure: Measure,
    unsteered: Sequence[ScoredText],
    bound: CoherenceBound = DEFAULT_BOUND,
    trait_costs: Mapping[str, float] = MappingProxyType({}),
) -> dict[AlphaKey, ChosenAlpha]:
    """Return the strongest coherent one of each key's listed alphas, or the weakest.

    All are measured at once. The other arguments are those of `search_alphas`.
    """
    asked = [(key, alpha) for key, alphas in listed.items() for alpha in alphas]
    curves: dict[AlphaKey, list[AlphaPoint]] = {key: [] for key in listed}
    for (key, alpha), texts in zip(asked, measure(asked), strict=True):
        of_persona = bound.of_trait(trait_costs.get(key[0], 1.0))
        curves[key].append(compare(alpha, texts, unsteered, of_persona))
    return {key: _choose(curve) for key, curve in curves.items()}


def _check_unsteered(unsteered: Sequence[ScoredText]) -> None:
    none = f"none of the {len(unsteered)} unsteered texts has a"
    if not any(text.is_finite for text in unsteered):
        raise InputError(f"{none} finite perplexity; give development prompts that the model continues")
    if all(text.repetition is None for text in unsteered):
        raise InputError(f"{none} repetition rate, which takes three words or marks; raise max_new_tokens")


def _next_alpha(curve: Sequence[AlphaPoint], bracket: tuple[float, float], is_last: bool) -> float:
    """Return the middle of what is left; last of all an end of the bracket if every middle points to it."""
    coherent = [point.alpha for point in curve if point.is_coherent]
    incoherent = [point.alpha for point in curve if not point.is_coherent]
    low, high = max(coherent, default=bracket[0]), min(incoherent, default=bracket[1])
    if is_last and not coherent:
        return low
    if is_last and not incoherent:
        return high
    return math.sqrt(low) * math.sqrt(high)


def _choose(curve: Sequence[AlphaPoint], bracket: tuple[float, float] | None = None) -> ChosenAlpha:
    """Return the strongest coherent alpha, or the weakest, which a search without any measured last.

    bracket: of the search; None of a list.
    """
    curve = sorted(curve, key=lambda point: abs(point.alpha))
    best = next((point for point in reversed(curve) if point.is_coherent), curve[0])
    ends = dict(zip(bracket, ("lowest", "highest"), strict=True)) if bracket else {best.alpha: "listed"}
    return ChosenAlpha(best.alpha, best.is_coherent, ends.get(best.alpha, "inside"), curve)


def compare(
    alpha: float,
    steered: Sequence[ScoredText],
    unsteered: Sequence[ScoredText],
    bound: CoherenceBound = DEFAULT_BOUND,
) -> AlphaPoint:
    """Return what an alpha does to texts, and whether they are coherent.

    unsteered: of the same prompts and seeds as `steered`, in the same order.
    Raises ValueError: another number of texts.
    """
    pairs = list(zip(steered, unsteered, strict=True))
    ratio = perplexity_ratio(*([text.perplexity for text in texts] for texts in (steered, unsteered)))
    increase = _increase((text.repetition, before.repetition) for text, before in pairs)
    non_words = _increase((text.non_words, before.non_words) for text, before in pairs)
    n_missing = sum(not text.is_finite for text in steered)
    n_empty = sum(text.perplexity is None for text in steered)
    failed = {
        # One such text makes the geometric mean infinite, unless the prompt is to blame.
        "perplexity not finite": any(text.is_infinite and not before.is_infinite for text, before in pairs),
        "texts empty": n_empty > sum(before.perplexity is None for before in unsteered),
        "no perplexity to compare": ratio is None,
        "perplexity": ratio is not None and ratio > bound.max_perplexity_ratio,
        "no repetition to compare": increase is None,
        "repetition": increase is not None and increase > bound.max_repetition_increase,
        "non-words": non_words is not None and non_words > bound.max_non_words_increase,
    }
    reason = ", ".join(name for name, is_failed in failed.items() if is_failed) or None
    n_pairs = sum(text.is_finite and before.is_finite for text, before in pairs)
    traits = [text.trait_probability for text in steered if text.trait_probability is not None]
    trait = fmean(traits) if traits else None
    return AlphaPoint(alpha, ratio, increase, n_pairs, n_missing, reason is None, reason, trait, non_words)


def _increase(rates: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the difference of means over the pairs of (steered, unsteered) where both rates exist."""
    known = [both for both in rates if None not in both]
    return fmean(rate for rate, _ in known) - fmean(rate for _, rate in known) if known else None


def alphas_content(
    alphas: Mapping[AlphaKey, ChosenAlpha], bound: CoherenceBound, trait_costs: Mapping[str, float]
) -> dict[str, Any]:
    """Return everything as numbers, strings, lists and dictionaries, as `alpha_search.json` holds it."""
    entries = [
        {"persona": persona, "method": method, **asdict(chosen)}
        for (persona, method), chosen in alphas.items()
    ]
    return {"bound": asdict(bound), "trait_costs": dict(trait_costs), "alphas": entries}


def alphas_from_content(content: Mapping[str, Any]) -> dict[AlphaKey, ChosenAlpha]:
    """Return the alphas of what `alphas_content` returned."""
    alphas = {}
    for entry in content["alphas"]:
        curve = [AlphaPoint(**point) for point in entry["curve"]]
        chosen = ChosenAlpha(entry["alpha"], entry["is_coherent"], entry["at"], curve)
        alphas[entry["persona"], entry["method"]] = chosen
    return alphas

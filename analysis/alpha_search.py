"""Find how strongly each vector can be added before the text falls apart (`"alpha_values": "auto"`).

For each persona and method: the strongest alpha whose texts on the development prompts stay
within a stated bound of the unsteered ones, by bisection on log alpha. All are searched side
by side, so that a round is one batch of generations. The trait is reported and never used to choose.

Some traits cost perplexity by being there: who talks like a pirate is less predictable than who does not. So
the bound is on what exceeds the trait's own cost, if that is given.

After k midpoints the bracket is left (high / low) ** (1 / 2**k) wide: 7 evaluations between 0.5 and 10
come within 5 % of a threshold. Coherence need not fall steadily with alpha. What holds in any case: a dose
called coherent was measured to be, and the next stronger alpha measured is not, unless the dose is the top
of the bracket. Coherent alphas further up, and incoherent ones below the dose, can go unseen. Few prompts
make a noisy ratio, and a dose chosen by it looks a little more coherent here than on other prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from reporting.tables import markdown_table
from support.errors import InputError
from support.progress import HIDDEN, tqdm

AlphaKey = tuple[str, str]  # (persona, method)

MAX_EVALUATIONS = 8
PLACES = ("inside", "highest", "lowest")
HEADER = ("persona", "method", "alpha", "perplexity ratio", "repetition increase", "note")


@dataclass(frozen=True)
class DevelopmentText:
    """Metrics of one text on a development prompt; None means missing.

    perplexity: of the continuation by an independent model; infinite or NaN is a text that is not coherent.
    repetition: share of repeated 3-grams. trait_probability: by the persona's classifier.
    """

    perplexity: float | None
    repetition: float | None
    trait_probability: float | None = None

    def __post_init__(self) -> None:
        if self.perplexity is not None and self.perplexity <= 0:
            raise ValueError(
                f"perplexity is {self.perplexity}, expected a number above 0, or None if missing"
            )
        for name in ("repetition", "trait_probability"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected 0 to 1, or None if missing")


@dataclass(frozen=True)
class CoherenceBound:
    """How far steered text may be from the unsteered text and still count as coherent.

    max_perplexity_ratio: geometric mean of steered / unsteered perplexity.
    max_repetition_increase: of the mean repetition rate.
    max_missing_increase: of the share of texts without a finite perplexity; an empty text is no
        sign of coherence.
    """

    max_perplexity_ratio: float = 1.5
    max_repetition_increase: float = 0.05
    max_missing_increase: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.max_perplexity_ratio < math.inf:
            raise InputError(
                f"max_perplexity_ratio is {self.max_perplexity_ratio}, expected a finite number from 1, "
                "which is the unsteered text's"
            )
        for name in ("max_repetition_increase", "max_missing_increase"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")

    def of_trait(self, cost: float) -> "CoherenceBound":
        """Return the bound of text that shows a trait which costs this many times the perplexity."""
        return replace(self, max_perplexity_ratio=self.max_perplexity_ratio * max(1.0, cost))


DEFAULT_BOUND = CoherenceBound()


@dataclass(frozen=True)
class AlphaPoint:
    """What one alpha does to the texts of one persona and method.

    perplexity_ratio: exp of the mean over pairs of log steered - log unsteered perplexity, so the
        geometric mean of the ratios; a pair is the same prompt and seed with both perplexities
        finite. None without pairs.
    repetition_increase: difference of means over the texts where both rates exist, or None.
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


@dataclass(frozen=True)
class ChosenAlpha:
    """The strongest coherent alpha of a persona and method, and everything measured on the way.

    is_coherent: False only if nothing was, not even the lowest alpha, which is then given as `alpha`.
    at: `highest` or `lowest` if `alpha` is that end of the bracket, else `inside`.
    curve: sorted by alpha.
    """

    alpha: float
    is_coherent: bool
    at: Literal["inside", "highest", "lowest"]
    curve: list[AlphaPoint]

    @property
    def point(self) -> AlphaPoint:
        """The point of the curve that was chosen."""
        return next(point for point in self.curve if point.alpha == self.alpha)


Measure = Callable[[list[tuple[AlphaKey, float]]], Sequence[Sequence[DevelopmentText]]]


def search_alphas(
    keys: Sequence[AlphaKey],
    measure: Measure,
    unsteered: Sequence[DevelopmentText],
    bracket: tuple[float, float],
    bound: CoherenceBound = DEFAULT_BOUND,
    n_evaluations: int = 7,
    trait_costs: Mapping[str, float] | None = None,
) -> dict[AlphaKey, ChosenAlpha]:
    """Return the strongest coherent alpha of each key.

    measure: asked once a round for (key, alpha) pairs, one for each key; returns a list
        of texts for each pair, for the prompts and seeds of `unsteered` and in its order.
    bracket: (low, high), both above 0. The ends are measured only if all midpoints point to them:
        the last evaluation is of low if no midpoint was coherent, of high if all were.
    n_evaluations: for each key, 2 to 8.
    trait_costs: persona -> how many times as perplexing a text is for showing the trait. A persona's bound is
        this many times `max_perplexity_ratio`; a cost below 1, as 1, never makes it stricter.
    Raises InputError: a bracket or n_evaluations out of range, or unsteered texts without any finite
    perplexity or any repetition rate. ValueError: `measure` returned another number of texts.
    """
    low, high = map(float, bracket)
    if not 0 < low < high < math.inf:
        raise InputError(f"bracket is ({low}, {high}), expected two finite alphas, 0 < low < high")
    if not 2 <= n_evaluations <= MAX_EVALUATIONS:
        raise InputError(f"n_evaluations is {n_evaluations}, expected 2 to {MAX_EVALUATIONS}")
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"keys are {list(keys)}, expected one or more, each once")
    _check_unsteered(unsteered)
    bounds = {persona: bound.of_trait((trait_costs or {}).get(persona, 1.0)) for persona, _ in keys}
    curves: dict[AlphaKey, list[AlphaPoint]] = {key: [] for key in keys}
    for round_idx in tqdm(
        range(n_evaluations), desc="dose search", unit="round", disable=HIDDEN, leave=False
    ):
        is_last = round_idx == n_evaluations - 1
        asked = [(name, _next_alpha(curve, (low, high), is_last)) for name, curve in curves.items()]
        measured = measure(asked)
        _check_measured(measured, asked, len(unsteered))
        for (key, alpha), texts in zip(asked, measured, strict=True):
            curves[key].append(_compare(alpha, texts, unsteered, bounds[key[0]]))
    return {key: _choose(curve, (low, high)) for key, curve in curves.items()}


def _check_unsteered(unsteered: Sequence[DevelopmentText]) -> None:
    if not any(_is_finite(text) for text in unsteered):
        raise InputError(
            f"none of the {len(unsteered)} unsteered texts has a finite perplexity to compare with; give "
            "development prompts that the model continues, and a model that scores the texts"
        )
    if all(text.repetition is None for text in unsteered):
        raise InputError(
            f"none of the {len(unsteered)} unsteered texts has a repetition rate to compare with, which "
            "takes three words or marks; raise max_new_tokens"
        )


def _check_measured(
    measured: Sequence[Sequence[DevelopmentText]], asked: Sequence[tuple[AlphaKey, float]], n: int
) -> None:
    if len(measured) != len(asked):
        raise ValueError(f"measure returned {len(measured)} lists of texts, expected {len(asked)}")
    for (key, alpha), texts in zip(asked, measured, strict=True):
        if len(texts) != n:
            raise ValueError(
                f"measure returned {len(texts)} texts of {key} at alpha {alpha:g}, expected {n}: "
                "one for each unsteered text, in their order"
            )


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


def _compare(
    alpha: float,
    steered: Sequence[DevelopmentText],
    unsteered: Sequence[DevelopmentText],
    bound: CoherenceBound,
) -> AlphaPoint:
    pairs = list(zip(steered, unsteered, strict=True))
    logs = [
        math.log(text.perplexity) - math.log(before.perplexity)
        for text, before in pairs
        if _is_finite(text) and _is_finite(before)
    ]
    ratio = math.exp(fmean(logs)) if logs else None
    rates = [
        (text.repetition, before.repetition)
        for text, before in pairs
        if text.repetition is not None and before.repetition is not None
    ]
    increase = fmean(rate for rate, _ in rates) - fmean(rate for _, rate in rates) if rates else None
    n_missing = sum(not _is_finite(text) for text in steered)
    more_missing = n_missing - sum(not _is_finite(text) for text in unsteered)
    failed = {
        # One such text makes the geometric mean infinite, unless the prompt is to blame.
        "perplexity not finite": any(_is_broken(text) and not _is_broken(before) for text, before in pairs),
        "texts missing": more_missing / len(pairs) > bound.max_missing_increase,
        "no perplexity to compare": ratio is None,
        "perplexity": ratio is not None and ratio > bound.max_perplexity_ratio,
        "no repetition to compare": increase is None,
        "repetition": increase is not None and increase > bound.max_repetition_increase,
    }
    reason = ", ".join(name for name, is_failed in failed.items() if is_failed) or None
    traits = [text.trait_probability for text in steered if text.trait_probability is not None]
    return AlphaPoint(
        alpha=alpha,
        perplexity_ratio=ratio,
        repetition_increase=increase,
        n_pairs=len(logs),
        n_missing=n_missing,
        is_coherent=reason is None,
        reason=reason,
        trait_probability=fmean(traits) if traits else None,
    )


def _is_finite(text: DevelopmentText) -> bool:
    return text.perplexity is not None and math.isfinite(text.perplexity)


def _is_broken(text: DevelopmentText) -> bool:
    return text.perplexity is not None and not math.isfinite(text.perplexity)


def _choose(curve: Sequence[AlphaPoint], bracket: tuple[float, float]) -> ChosenAlpha:
    """Return the largest coherent alpha, or the lowest, which a search without any measured last."""
    curve = sorted(curve, key=lambda point: point.alpha)
    best = max((point for point in curve if point.is_coherent), key=lambda p: p.alpha, default=curve[0])
    at = {bracket[0]: "lowest", bracket[1]: "highest"}.get(best.alpha, "inside")
    return ChosenAlpha(best.alpha, best.is_coherent, at, curve)


def alphas_content(
    alphas: Mapping[AlphaKey, ChosenAlpha],
    bound: CoherenceBound,
    trait_costs: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return everything as numbers, strings, lists and dictionaries, as `alpha_search.json` holds it."""
    entries = [
        {"persona": persona, "method": method, **asdict(dose)} for (persona, method), dose in alphas.items()
    ]
    return {"bound": asdict(bound), "trait_costs": dict(trait_costs or {}), "alphas": entries}


def alphas_from_content(content: Mapping[str, Any], name: str = "content") -> dict[AlphaKey, ChosenAlpha]:
    """Return the alphas of what `alphas_content` made; other entries are left alone.

    Raises InputError: an entry is missing, unknown, of the wrong type, or contradicts another.
    """
    alphas: dict[AlphaKey, ChosenAlpha] = {}
    try:
        CoherenceBound(**content["bound"])
        for entry in content["alphas"]:
            key, dose = _read_dose(**entry)
            if key in alphas:
                raise ValueError(f"{key} is there twice")
            alphas[key] = dose
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} does not hold alphas ({error}); delete it to search for them again"
        ) from error
    return alphas


def _read_dose(
    persona: str, method: str, alpha: float, is_coherent: bool, at: str, curve: list[dict[str, Any]]
) -> tuple[AlphaKey, ChosenAlpha]:
    where = f"{persona}, {method}"
    points = [_read_point(where, entry) for entry in curve]
    alphas = [point.alpha for point in points]
    coherent = [point.alpha for point in points if point.is_coherent]
    if not (isinstance(persona, str) and isinstance(method, str)):
        raise ValueError(f"persona and method are {where}, expected two strings")
    if not points or alphas != sorted(alphas):
        raise ValueError(f"the curve of {where} is over alpha {alphas}, expected one or more, ascending")
    if at not in PLACES:
        raise ValueError(f"{where} is at {at!r}, expected one of {PLACES}")
    if alpha != max(coherent, default=alphas[0]) or is_coherent is not bool(coherent):
        raise ValueError(f"alpha {alpha} of {where} is not the strongest coherent one of its curve")
    return (persona, method), ChosenAlpha(float(alpha), is_coherent, at, points)


def _read_point(where: str, entry: Mapping[str, Any]) -> AlphaPoint:
    point = AlphaPoint(**entry)
    optional = (point.perplexity_ratio, point.repetition_increase, point.trait_probability)
    numbers = [point.alpha, *(value for value in optional if value is not None)]
    valid = (
        all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
        and all(type(value) is int and value >= 0 for value in (point.n_pairs, point.n_missing))
        and (point.reason is None or isinstance(point.reason, str))
        and point.is_coherent is (point.reason is None)
        and point.alpha > 0
        and (point.perplexity_ratio is None or point.perplexity_ratio > 0)
    )
    if not valid:
        raise ValueError(f"the curve of {where} has the point {dict(entry)}")
    return point


def format_alphas(alphas: Mapping[AlphaKey, ChosenAlpha]) -> str:
    """Return a Markdown table: each dose, and where its search met an end of the bracket."""
    rows = [_cells(key, dose) for key, dose in alphas.items()]
    return markdown_table(HEADER, rows, left=("persona", "method", "note"))


def _cells(key: AlphaKey, dose: ChosenAlpha) -> tuple[str, ...]:
    ratio, increase = dose.point.perplexity_ratio, dose.point.repetition_increase
    notes = {"inside": "", "highest": "at the top of the bracket", "lowest": "at the bottom of the bracket"}
    note = notes[dose.at] if dose.is_coherent else f"not coherent even there: {dose.point.reason}"
    return (
        *key,
        f"{dose.alpha:.4g}",
        "–" if ratio is None else f"{ratio:.2f}",
        "–" if increase is None else f"{increase:+.3f}",
        note,
    )


def main() -> None:
    """Check that the dose is found at which a made-up perplexity leaves the bound, 7.3."""
    of_baseline, key = [DevelopmentText(20.0, 0.1)], ("check", "ridge_mapped")

    def measure(asked: list[tuple[AlphaKey, float]]) -> list[list[DevelopmentText]]:
        return [[DevelopmentText(20.0 * 1.5 ** ((alpha / 7.3) ** 2), 0.1)] for _, alpha in asked]

    alphas = search_alphas([key], measure, of_baseline, (0.5, 10.0))
    assert alphas[key].alpha <= 7.3 < 1.05 * alphas[key].alpha
    print(format_alphas(alphas), "alpha_search OK: a known threshold is found within 5%", sep="\n")


if __name__ == "__main__":
    main()

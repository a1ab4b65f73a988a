"""Calibrate the verdict: what it says where the truth is known, and how often its interval covers.

    python benchmarks/bench_verdict.py --run results/gemma_to_smol
    python benchmarks/bench_verdict.py --synthetic

Experiments are made by resampling prompts, the conditions of a prompt together: those of a finished run, of
each persona and scorer whose native effect is there, or of made-up populations of 4,000 prompts. Their scores
are logistic(base + prompt + push + text), where prompts vary by 1, texts by 1.3 and a push by a third of its
size: beta-like, and close to 1 where the push is strong.

A truth of r: the mapped vector does r times what the native one does. Nulls, which must not be claimed:
`unsteered`, texts without a vector in the place of the mapped vector's; `shuffled`, those of the shuffled
pairs; `a control as good`, where one draw of a control has the distribution of mapped, and both do what
native does; `empty`, where mapped does so and is empty on four prompts of five; `words do all`, where mapped
does what native does and a lexical control does so, too, and `words do just too much`, where it does so less
the margin that a transfer needs. `ceiling` must not be equivalent: native texts are close to 1, and mapped
pushes their log-odds by 70 % as much.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.results_table import at_alphas, prompt_means, results_table
from analysis.significance import mean_interval, recovery
from analysis.verdict import (
    BEYOND_WORDS,
    CEILING,
    HIGH_SCORE,
    LOWEST_SCORE,
    NATIVE_WORKS,
    VERDICTS,
    adjusted_p,
    control_p,
    decide,
    lexical_p,
)
from experiment.conditions import (
    DECIDING_CONTROLS,
    LEXICAL_CONTROLS,
    MAPPED,
    ORACLE,
    SCORERS,
    UNSTEERED,
    drawn_name,
    draws_of,
)
from reporting.tables import markdown_table
from support.artifacts import load_json

SIZES = (8, 16, 30, 60)
TRUTHS = (1.0, 0.6, 0.3, 0.2)
# What a lexical control does of the native effect where mapped does all of it; the first two are nulls.
WORDS = {
    "words do all": 1.0,
    "words do just too much": 1 - BEYOND_WORDS,
    "words do 70%": 0.7,
    "words do 50%": 0.5,
}
NULLS = ("unsteered", "shuffled", "a control as good", "empty")
KINDS = (*NULLS, "ceiling", *TRUTHS, *WORDS)
EMPTY = 4, 1  # prompts with an empty text to others
CEILING_PUSH = 0.7  # of the native push, in log-odds
POPULATION = 4000  # prompts
BASE, OF_PROMPT, OF_TEXT, OF_PUSH = -3.0, 1.0, 1.3, 1 / 3  # log-odds; the last as a share of the push
PUSHES = (2.5, 3.5, 5.0, 7.0)  # native, in log-odds
CONTROL_PUSH = 0.1  # of the native push, at most

Population = dict[str, np.ndarray]  # compared name -> score at each prompt, (prompts,)


def of_run(folder: Path) -> list[Population]:
    """Return the scores of every persona and scorer whose native effect is there."""
    table = results_table(load_json(folder / "eval_results.json")["rows"])
    found = []
    for persona, of_persona in load_json(folder / "verdict.json")["personas"].items():
        texts = at_alphas(table, persona, of_persona["alphas"])
        for scorer in of_persona["scorers"]:
            means = prompt_means(texts, SCORERS[scorer].column).dropna()
            conditions = {name.partition(":")[0] for name in means}
            is_whole = {UNSTEERED, ORACLE, MAPPED, *DECIDING_CONTROLS} <= conditions and len(means) > 1
            if is_whole and mean_interval(means[ORACLE] - means[UNSTEERED]).low > NATIVE_WORKS:
                found.append({name: means[name].to_numpy() for name in means})
    return found


def made_up(generator: np.random.Generator) -> list[Population]:
    """Return a population for each native push, in which mapped does what native does."""
    others = list("abc")  # personas
    draws = [(name, draw) for name in DECIDING_CONTROLS for draw in draws_of(name, others).values()]
    controls = [drawn_name(*each) for each in draws]
    populations = []
    for push in PUSHES:
        prompts = generator.normal(BASE, OF_PROMPT, POPULATION)
        pushes = dict.fromkeys((MAPPED, ORACLE), push) | {UNSTEERED: 0.0}
        pushes |= {name: push * CONTROL_PUSH * generator.uniform(-1, 1) for name in controls}
        populations.append({name: _scores(prompts, of_name, generator) for name, of_name in pushes.items()})
    return populations


def _scores(prompts: np.ndarray, push: float, generator: np.random.Generator) -> np.ndarray:
    pushed = push * generator.normal(1, OF_PUSH, len(prompts))
    return expit(prompts + pushed + generator.normal(0, OF_TEXT, len(prompts)))


def with_truth(real: Population, kind: str | float) -> Population | None:
    """Return the population in which the truth is of this kind, None where it can't be.

    What chance would decide at a prompt, the population has in all ways, so that the truth is exact however
    few prompts a run has.
    """
    made, recovered = dict(real), recovering(real, 1.0 if isinstance(kind, str) else kind)
    if recovered is None:
        return None
    shuffled, random = (_first(real, condition) for condition in ("shuffled_pairs", "random_direction"))
    if kind == "unsteered":
        made[MAPPED] = real[random] - real[random].mean() + real[UNSTEERED].mean()
    elif kind == "shuffled":
        made[MAPPED], made[shuffled] = real[shuffled], real[random]
    elif kind == "a control as good":
        both = [recovered, real[ORACLE]]
        made = {name: np.tile(values, 2) for name, values in real.items()}
        made[MAPPED], made[shuffled] = np.concatenate(both), np.concatenate(both[::-1])
    elif kind == "empty":
        made = {name: np.tile(values, sum(EMPTY)) for name, values in real.items()}
        made[MAPPED] = np.concatenate([np.zeros_like(recovered)] * EMPTY[0] + [recovered] * EMPTY[1])
    elif kind in WORDS:
        words = [recovering(real, WORDS[kind], name) for name in (ORACLE, MAPPED)]
        if words[1] is None:
            return None
        made = {name: np.tile(values, 2) for name, values in real.items()}
        made[MAPPED] = np.concatenate([recovered, real[ORACLE]])
        made[LEXICAL_CONTROLS[-1]] = np.concatenate(words)
    elif kind == "ceiling":
        if np.mean(real[ORACLE] > HIGH_SCORE) <= CEILING:
            return None
        before, native, start, mapped = (_logit(real[name]) for name in (UNSTEERED, ORACLE, random, MAPPED))
        share = CEILING_PUSH * np.mean(native - before) / np.mean(mapped - start)
        made[MAPPED] = expit(start + share * (mapped - start))
    else:
        made[MAPPED] = recovered
    return made


def recovering(real: Population, share: float, of: str = MAPPED) -> np.ndarray | None:
    """Return scores whose mean effect is this share of the native one, None where none of a run's have it.

    They lie between those of a random direction and of a condition (`of`), in log-odds, or beyond the latter.
    """
    start, mapped = _logit(real[_first(real, "random_direction")]), _logit(real[of])
    before, wanted = real[UNSTEERED].mean(), share * (real[ORACLE] - real[UNSTEERED]).mean()

    def excess(part: float) -> float:
        return expit(start + part * (mapped - start)).mean() - before - wanted

    if excess(-9) * excess(9) > 0:
        return None
    return expit(start + brentq(excess, -9, 9) * (mapped - start))


def _first(real: Population, condition: str) -> str:
    return next(name for name in real if name.startswith(condition))


def _logit(scores: np.ndarray) -> np.ndarray:
    return logit(np.clip(scores, LOWEST_SCORE, 1 - LOWEST_SCORE))


def verdict_on(made: Population, chosen: np.ndarray) -> str:
    """Return the verdict on the chosen prompts."""
    scores = {name: values[chosen] for name, values in made.items()}
    differences, log_odds = (
        {name: of(values) - of(scores[UNSTEERED]) for name, values in scores.items() if name != UNSTEERED}
        for of in (np.array, _logit)
    )
    key, p_values = ("made up", "scorer"), control_p(differences)
    near_one = float(np.mean(scores[ORACLE] > HIGH_SCORE))
    adjusted = adjusted_p({key: p_values})[key]
    beyond_words = adjusted_p({key: p_values}, {key: lexical_p(differences)})[key]
    return decide(differences, p_values, adjusted, beyond_words, log_odds, share_near_one=near_one).verdict


def verdict_shares(real: list[Population], n: int, generator: np.random.Generator) -> list[tuple[str, ...]]:
    """Return a row for each truth and number of prompts: the share of the first two verdicts, and of each."""
    rows = []
    for kind in KINDS:
        made = [each for each in (with_truth(one, kind) for one in real) if each]
        for size in SIZES if made else ():
            words = Counter(
                verdict_on(each, generator.integers(0, len(each[ORACLE]), size))
                for each in (made[index % len(made)] for index in range(n))
            )
            counts = [sum(words[word] for word in VERDICTS[:2]), *(words[word] for word in VERDICTS)]
            shares = [f"{count / n:.1%}" for count in counts]
            rows.append((kind if isinstance(kind, str) else f"{kind:.0%}", str(size), *shares))
    return rows


def coverage(real: list[Population], n: int, generator: np.random.Generator) -> list[tuple[str, ...]]:
    """Return a row for each true recovery: how often its 95 % interval holds it, by number of prompts.

    Intervals count where the native effect is sure, as where a verdict reads them.
    """
    rows = []
    for truth in TRUTHS:
        made = [each for each in (with_truth(one, truth) for one in real) if each]
        cells = []
        for size in SIZES:
            held = []
            for index in range(n):
                each = made[index % len(made)]
                chosen = generator.integers(0, len(each[ORACLE]), size)
                native, mapped = (each[name][chosen] - each[UNSTEERED][chosen] for name in (ORACLE, MAPPED))
                if mean_interval(native).low > NATIVE_WORKS:
                    found = recovery(mapped, native)
                    held.append(found.low <= truth <= found.high)
            cells.append(f"{np.mean(held):.1%} of {len(held)}")
        rows.append((f"{truth:.0%}", *cells))
    return rows


def main() -> None:
    """Print the shares of verdicts, and the coverage of the recovery's interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--run", type=Path, help="folder of a finished run with all controls")
    given.add_argument("--synthetic", action="store_true", help="made-up scores instead of a run's")
    parser.add_argument("--n", type=int, default=300, help="experiments of each kind; 300 take a minute")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    real = made_up(generator) if options.synthetic else of_run(options.run)
    if not real:
        parser.error(f"{options.run}: no persona has a native effect and all controls")
    print(f"{len(real)} populations of scores, {options.n} experiments a cell\n")
    print(
        markdown_table(
            ("truth", "prompts", "either of the first two", *VERDICTS),
            verdict_shares(real, options.n, generator),
        )
    )
    print("\nCoverage of the recovery's 95 % interval, by number of prompts\n")
    print(markdown_table(("true recovery", *map(str, SIZES)), coverage(real, options.n, generator)))


if __name__ == "__main__":
    main()

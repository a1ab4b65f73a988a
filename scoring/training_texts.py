"""Lay out the texts on which scorers and their encoders are trained (phase 5).

They are the labelled texts of personas, texts that resemble a trait and lack it, texts by kind
(`prompts/kinds_training.json`), some of which show a trait, ordinary texts, parts of all these, and
degenerate texts that are made from them: loops, shuffled words, random words and chains of words.
"""

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import chain
from operator import attrgetter

from scoring.degenerate_text import any_cut, can_be_corrupted, loop, shuffled, word_chains, word_salad
from support.artifacts import fingerprint
from texts.personas import Persona, load_persona, load_prompts, load_training_kinds, shipped_personas

LOOPED, SHUFFLED = 1 / 16, 1 / 2  # shares of the whole texts that are also turned into these
N_SALADS = 60
N_JOINED = 40  # long texts of each persona and kind, of three texts each
N_CHAINS = 240  # chains of the words of each persona's positive texts, and as many of all texts
VERSION = 2  # must be raised when what is made of the same texts changes


@dataclass(frozen=True)
class Row:
    """A text to train on.

    kind: positive, negative, resembling, ordinary or degenerate. persona: whose text it is, None of all.
    group: rows of a group share a fold. whole: whether it is a labelled text as it was given. may_show:
    personas whose trait it may show, which it teaches nothing.
    """

    text: str
    kind: str
    persona: str | None
    group: str
    whole: bool = False
    may_show: tuple[str, ...] = ()


def training_rows(whole: Sequence[Row], seed: int = 0) -> list[Row]:
    """Return texts with parts of them and degenerate texts that are made from them.

    whole: from `natural_rows`. A seed draws other parts, and makes other degenerate texts.
    """
    long = [replace(row, whole=False) for row in whole if can_be_corrupted(row.text)]
    cuts = [replace(row, text=any_cut(row.text, _drawing(seed, "cut", row.text))) for row in long]
    for key, of_kind in _by_kind(long).items():
        generator = _drawing(seed, "joined", *key)
        parts = [generator.sample(of_kind, min(len(of_kind), 3)) for _ in range(N_JOINED)]
        cuts += [replace(rows[0], text=" ".join(row.text for row in rows)) for rows in parts]
    degenerate = []
    for row in long:
        generator = _drawing(seed, "degenerate", row.text)
        if generator.random() < LOOPED:
            degenerate.append(replace(row, text=loop(row.text, generator)))
        if generator.random() < SHUFFLED and (text := shuffled(row.text, generator)) != row.text:
            degenerate.append(replace(row, text=text, group=f"shuffled/{row.group}"))
    generator, words = _drawing(seed, "salad"), [word for row in long for word in row.text.split()]
    salads = [word_salad(words, generator) for _ in range(N_SALADS)] if words else []
    degenerate += [Row(text, "", None, f"salad/{index}") for index, text in enumerate(salads)]
    for persona in dict.fromkeys([*(row.persona for row in long), None]):
        texts = [
            row.text for row in long if persona is None or (row.persona, row.kind) == (persona, "positive")
        ]
        chains = word_chains(texts, _drawing(seed, "chain", persona), N_CHAINS)
        degenerate += [
            Row(text, "", persona, f"chain/{persona}/{index}") for index, text in enumerate(chains)
        ]
    return [*whole, *cuts, *(replace(row, kind="degenerate", may_show=()) for row in degenerate)]


def _drawing(seed: int, *key: object) -> random.Random:
    """Return what draws for one text or kind, so that a new text changes nothing of what others give."""
    return random.Random(f"{seed}/{key}")


def _by_kind(rows: Sequence[Row]) -> dict[tuple[str | None, str, tuple[str, ...]], list[Row]]:
    found: dict[tuple[str | None, str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        found.setdefault((row.persona, row.kind, row.may_show), []).append(row)
    return found


def labelled_rows(persona: Persona) -> list[Row]:
    """Return the labelled texts of a persona; the texts of a pair share a group."""
    sides = {
        "positive": persona.labelled_positive,
        "negative": persona.labelled_negative,
        "resembling": persona.resembling,
    }
    paired = len(persona.labelled_positive) == len(persona.labelled_negative)
    return [
        Row(
            text,
            kind,
            persona.name,
            f"{persona.name}/{index}/{'' if paired and kind != 'resembling' else kind}",
            True,
        )
        for kind, texts in sides.items()
        for index, text in enumerate(texts)
    ]


def natural_rows(personas: Sequence[Persona]) -> list[Row]:
    """Return whole texts: the labelled ones of personas, and those on which every scorer is trained.

    A persona of a shipped one's name and with other labelled texts learns nothing of what shows the latter.
    """
    labelled = [persona for persona in personas if persona.labelled_positive]
    shipped = {name: load_persona(name).labelled_positive for name in shipped_personas()}
    other = {each.name for each in labelled if shipped.get(each.name) not in (None, each.labelled_positive)}
    rows = list(chain.from_iterable(map(labelled_rows, labelled)))
    ordinary = load_prompts("ordinary_training")
    rows += [Row(text, "ordinary", None, f"/{index}") for index, text in enumerate(ordinary)]
    for kind in load_training_kinds():
        name = kind.shows or kind.lacks
        what = "ordinary" if name is None or name in other else "positive" if kind.shows else "negative"
        whose = None if what == "ordinary" else name
        may_show = (*kind.may_show, *other.intersection([name]))
        rows += [
            Row(text, what, whose, f"{kind.name}/{index}", may_show=may_show)
            for index, text in enumerate(kind.texts)
        ]
    return rows


def training_pool(persona: Persona) -> list[Persona]:
    """Return a persona and the shipped ones of other names, whose texts train its scorer, ordered by name."""
    others = [load_persona(name) for name in shipped_personas() if name != persona.name]
    return sorted([persona, *others], key=attrgetter("name"))


def pool_key(personas: Sequence[Persona]) -> str:
    """Return what `training_rows` of these personas depend on."""
    rows = list(map(astuple, natural_rows(personas)))
    return fingerprint(VERSION, LOOPED, SHUFFLED, N_SALADS, N_JOINED, N_CHAINS, rows)


@cache
def training_key(persona: Persona) -> str:
    """Return what the texts depend on that train a persona's scorer."""
    return pool_key(training_pool(persona))

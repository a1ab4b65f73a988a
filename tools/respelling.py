"""Respell plain texts as a pirate or as other dialects say them, to train the scorer of *pirate*.

    python -m tools.respelling

Writes the kinds `pirate_respelled` and `dialects_respelled` of `prompts/kinds_training.json` anew. A scorer
that has only seen texts by a writer takes any respelling for a pirate's; the same plain texts in every
dialect leave it nothing but what is a pirate's own.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from support.artifacts import save_text
from texts.personas import (
    KINDS_TRAINING,
    load_persona,
    load_prompts,
    shipped_personas,
)

SEED = 0
N_PIRATE, N_OF_DIALECT = 320, 40
SHOUT_SHARES = (0.0, 0.35)  # of sentences that a shout follows, drawn for each text
LEAST_RULES = 0.5  # share of a dialect's rules that a text is respelled by; others keep their spelling
FEWEST_CHANGED = 3  # words of a respelled text that the plain one lacks, shouts included
ENDINGS = (r"ing\b", "in'")


@dataclass(frozen=True)
class Dialect:
    """Rules (a pattern of a regular expression, what takes its place), in order; and shouts."""

    rules: tuple[tuple[str, str], ...]
    shouts: tuple[str, ...]


def words(**spellings: str) -> tuple[tuple[str, str], ...]:
    """Return a rule for each whole word."""
    return tuple((rf"\b{word.strip('_')}\b", spelling) for word, spelling in spellings.items())


PIRATE = Dialect(
    (
        *words(the="th'", my="me", you="ye", your="yer", is_="be", are="be", am="be", of="o'", and_="an'"),
        *words(for_="fer", yes="aye", hello="ahoy", money="doubloons", friends="hearties", friend="matey"),
        *words(to="t'", there="thar", people="landlubbers", over="o'er", never="ne'er", old="auld"),
        (r"(?<=[aeiou])r(?=[a-z])", "rrr"),
        ENDINGS,
    ),
    ("Arr!", "Avast!", "Shiver me timbers!", "Ye scurvy dog!", "Yo ho ho!", "Aye, me hearty!", "Yarr!"),
)
DIALECTS = {
    "scots": Dialect(
        (
            (r"n't\b", "nae"),
            *words(small="wee", little="wee", know="ken", to="tae", of="o'", you="ye", do="dae", no="nae"),
            *words(and_="an'", child="bairn", old="auld", yes="aye", from_="frae", the="th'", have="hae"),
            ENDINGS,
        ),
        ("Och aye!", "Hoots!", "Aye, laddie.", "Ken?", "Haud yer wheesht!"),
    ),
    "cockney": Dialect(
        (
            (r"\bh(?=\w\w)", "'"),
            (r"\bth(?=[aeiou])", "v"),
            (r"th\b", "f"),
            *words(my="me", isn_t="ain't", of="o'", and_="an'", you="yer"),
            ENDINGS,
        ),
        ("Cor blimey!", "Innit?", "Right, guv.", "Know what I mean?", "Gor blimey, mate!"),
    ),
    "new york": Dialect(
        (
            *words(the="da", this="dis", that="dat", them="dem", these="dese", with_="wit", you="youse"),
            *words(of="a", your="ya", think="tink", girl="goil", because="cuz"),
            (r"er\b", "uh"),
            ENDINGS,
        ),
        ("Ya know?", "Fuhgeddaboudit!", "Badda bing!", "Capisce?", "Hey!"),
    ),
    "german": Dialect(
        (
            (r"\bw", "v"),
            *words(the="ze", and_="und", is_="ist", my="mein", good="gut", not_="nicht", old="alt"),
            (r"th", "z"),
        ),
        ("Ja?", "Ach!", "Mein Gott!", "Nein!", "Jawohl!"),
    ),
    "west country": Dialect(
        (
            *words(is_="be", are="be", am="be", of="o'", him="'un", you="'ee", my="moi", i="oi", your="yer"),
            (r"\bs(?=[aeiou])", "z"),
            (r"\bf(?=[aeiou])", "v"),
            ENDINGS,
        ),
        ("Oo arr!", "My lover!", "Proper job.", "That it be.", "Gurt lush!"),
    ),
    "chef": Dialect(
        ((r"\bw", "v"), *words(the="zee", and_="und", of="ooff"), (r"tion\b", "shun"), (r"o(?=\w)", "oo")),
        ("Bork bork bork!", "Hurdy gurdy!", "Bork!"),
    ),
    "irish": Dialect(
        (
            (r"\bth(?=[a-z])", "t'"),
            (r"\bit is\b", "'tis"),
            (r"\bit was\b", "'twas"),
            (r"(?<=[a-z])i(?=[a-z]e\b)", "oi"),
            *words(my="me", you="ye", your="yer", of="o'", old="auld", any_="anny", and_="an'"),
            ENDINGS,
        ),
        ("Begorrah!", "To be sure!", "Ah, grand.", "So it is.", "God love ye."),
    ),
    "yorkshire": Dialect(
        (
            (r"\bthe (?=\w)", "t'"),
            (r"\bh(?=\w\w)", "'"),
            (r"ed\b", "'d"),
            *words(nothing="nowt", something="summat", you="tha", your="thi", my="mi", were="wor"),
            *words(with_="wi'", not_="nay", always="allus", make="mek", take="tek", of="o'", was="wor"),
            ENDINGS,
        ),
        ("Ee, by gum!", "Aye, lad.", "'Appen.", "Nah then!", "That's reet."),
    ),
    "clipped": Dialect(
        (
            (r"\b(?:be|a|e|ex)(?=[bcdfglmnpst]\w{3})", "'"),
            (r"en\b", "'n"),
            (r"ed\b", "'d"),
            (r"le\b", "'l"),
            *words(the="tha", that="tha'", and_="an'", with_="wit'", for_="fer", to="ta", of="o'", not_="na"),
            *words(about="'bout", is_="be", are="be", one="'un", this="'tis", them="'em", have="hae"),
            ENDINGS,
        ),
        ("Eh?", "Hoots!", "Aye.", "There now!"),
    ),
    "island": Dialect(
        (
            (r"\bth(?=[aeiou])", "d"),
            (r"th\b", "t"),
            *words(
                my="mi", i="mi", me="mi", you="yuh", your="yuh", is_="a", are="a", with_="wid", not_="nuh"
            ),
            *words(to="fi", them="dem", going="gwan", little="likkle", what="wah", can_t="cyaan"),
            ENDINGS,
        ),
        ("Ya mon!", "Irie!", "Wah gwan?", "Seen?", "Big up!"),
    ),
    "south": Dialect(
        (
            *words(you="y'all", your="yer", of="o'", to="ta", for_="fer", them="them thar", my="mah", i="Ah"),
            *words(was="wuz", get="git", there="thar", can="kin", is_="is plumb"),
            ENDINGS,
        ),
        ("Yee-haw!", "I reckon.", "Well, shucks.", "Howdy!", "Dagnabbit!"),
    ),
}


def respelled(text: str, dialect: Dialect, generator: random.Random) -> str:
    """Return a text by a random part of a dialect's rules, with shouts after some of its sentences."""
    n = generator.randint(round(LEAST_RULES * len(dialect.rules)), len(dialect.rules))
    chosen = sorted(generator.sample(range(len(dialect.rules)), n))
    for pattern, spelling in map(dialect.rules.__getitem__, chosen):
        text = re.sub(pattern, lambda found, to=spelling: _like(found.group(), to), text, flags=re.IGNORECASE)
    share, sentences = generator.choice(SHOUT_SHARES), re.split(r"(?<=[.!?])\s+", text)
    return " ".join(
        f"{sentence} {generator.choice(dialect.shouts)}" if generator.random() < share else sentence
        for sentence in sentences
    )


def _like(found: str, spelling: str) -> str:
    """Return a spelling with a capital where what it replaces has one."""
    return spelling[:1].upper() + spelling[1:] if found[:1].isupper() else spelling


def respelled_kinds() -> dict[str, list[str]]:
    """Return the texts of both kinds, made of the plain texts on which scorers are trained."""
    generator = random.Random(SEED)
    others = (load_persona(name) for name in shipped_personas() if name != "pirate")
    plain = [text for persona in others for text in persona.labelled_negative]
    plain += load_prompts("ordinary_training")
    plain = generator.sample(plain, len(plain))
    return {
        "pirate_respelled": _drawn(plain, PIRATE, N_PIRATE, generator),
        "dialects_respelled": [
            text for each in DIALECTS.values() for text in _drawn(plain, each, N_OF_DIALECT, generator)
        ],
    }


def _drawn(texts: Sequence[str], dialect: Dialect, n: int, generator: random.Random) -> list[str]:
    """Return the first n texts in a dialect that have enough words that are not as they were."""
    made = ((text, respelled(text, dialect, generator)) for text in texts)
    return list(islice((new for text, new in made if _n_changed(text, new) >= FEWEST_CHANGED), n))


def _n_changed(text: str, new: str) -> int:
    return (Counter(new.split()) - Counter(text.split())).total()


def main() -> None:
    """Write both kinds."""
    content = json.loads(KINDS_TRAINING.read_text(encoding="utf-8"))
    for name, texts in respelled_kinds().items():
        shows, lacks = ("pirate", None) if name == "pirate_respelled" else (None, "pirate")
        content[name] = {"shows": shows, "lacks": lacks, "may_show": ["formal", "cheerful"], "texts": texts}
    save_text(KINDS_TRAINING, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()

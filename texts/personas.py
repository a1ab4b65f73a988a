"""Load personas: the texts that define a trait and the labelled texts that score it (phase 3).

A persona file in `personas/` holds extraction pairs, from which the vector is made, and labelled pairs on
other subjects, on which the trait classifier is trained. The two never mix. It also holds, in the form of
the trait files of persona_vectors (arXiv 2507.21509), system prompts for and against the trait
(`instruction`) and `questions`; the vector may be made from the responses to these instead, or from the
prompts themselves. A configuration may define a persona too, as lists of texts or as a trait file.
"""

import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.errors import InputError, shown
from support.text_files import check_characters, parse_json, read_text

PERSONA_FOLDER = Path(__file__).parent.parent / "personas"
PROMPT_FOLDER = Path(__file__).parent.parent / "prompts"
KINDS_TRAINING, KINDS_VALIDATION = (PROMPT_FOLDER / f"kinds_{use}.json" for use in ("training", "validation"))
LONGEST_NAME = 100  # characters
# Overrides and isolates of the direction of writing, which turn around the rest of a line.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Persona:
    """Hold the texts of a trait.

    positive_texts, negative_texts: for extraction; text i of both sides has the same content
        if the persona was given as pairs.
    labelled_positive, labelled_negative: for training scorers; empty if the persona has none.
    resembling: for training scorers too: texts that have words of the trait, and lack it.
    instructions: pairs of system prompts, for and against the trait. questions: asked under both.
    eval_prompt: asks a judge how strongly a response shows the trait, 0 to 100, with the places {question}
        and {answer}.
    validation: the validation set: texts that show the trait in other genres and lengths. Scorers are
        validated on it and never trained.
    direct_measure: `brevity` if the trait is to write little, which can be counted where texts end; else "".
    is_scored_as_shipped: the labelled and validation texts are those of the shipped persona of this name.
    """

    name: str
    description: str
    positive_texts: tuple[str, ...]
    negative_texts: tuple[str, ...]
    labelled_positive: tuple[str, ...] = ()
    labelled_negative: tuple[str, ...] = ()
    resembling: tuple[str, ...] = ()
    instructions: tuple[tuple[str, str], ...] = ()
    questions: tuple[str, ...] = ()
    eval_prompt: str = ""
    validation: tuple[str, ...] = ()
    direct_measure: str = ""
    is_scored_as_shipped: bool = False

    @property
    def all_texts(self) -> list[str]:
        """Every text for extraction or scoring, for overlap checks."""
        extraction = self.positive_texts + self.negative_texts
        return [*extraction, *self.scoring_texts, *self.validation]

    @property
    def scoring_texts(self) -> list[str]:
        """Every text on which scorers are trained."""
        return [*self.labelled_positive, *self.labelled_negative, *self.resembling]


def shipped_personas() -> list[str]:
    """Return the names of the personas in `personas/`."""
    return sorted(path.stem for path in PERSONA_FOLDER.glob("*.json"))


def check_name(name: str) -> str:
    """Return the name if it fits in a log line, a table and a figure.

    Raises InputError: nothing visible, more than 100 characters, or a character that breaks a line.
    """
    expected = f"expected a persona's name of 1 to {LONGEST_NAME} characters in one line"
    if len(name) > LONGEST_NAME:
        raise InputError(f"{expected}; got {len(name)}, shorten it")
    for place, character in enumerate(name, start=1):
        # Control characters, surrogates, line and paragraph separators.
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS:
            raise InputError(f"{expected}; character {place} is {character!a}, leave it out")
    if all(unicodedata.category(character)[0] in "CMZ" for character in name):
        raise InputError(f"{expected}; nothing in it is visible, name the trait")
    return name


def check_names_differ(names: Sequence[str]) -> None:
    """Raise InputError: two names that look the same in tables and figures."""
    seen: dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        other = seen.setdefault(" ".join(folded.split()), name)
        if other != name:
            raise InputError(
                f"personas {other!a} and {name!a} differ in capitals, spaces or the spelling of accents "
                "alone; rename one"
            )


def load_persona(name: str, definition: Mapping[str, Any] | None = None) -> Persona:
    """Return a persona from its file, or from a definition in the configuration.

    definition: `description`, `positive_texts` and `negative_texts`, or `instruction` (pairs {"pos": ...,
        "neg": ...}), `questions` and `eval_prompt` as in a trait file. `labelled_positive_texts` and
        `labelled_negative_texts` train scorers, with `resembling_texts` as further negatives, and
        `validation_texts` validate them. Without labelled
        texts, a definition with a shipped persona's name gets those of that persona.
    Raises InputError: unknown name, a damaged file, or a side without texts.
    """
    persona = _read_persona(name) if definition is None else _make_persona(name, definition)
    if name in shipped_personas() and not (persona.labelled_positive or persona.labelled_negative):
        shipped = _read_persona(name)
        scoring = ("labelled_positive", "labelled_negative", "resembling", "validation", "direct_measure")
        taken = {key: getattr(persona, key) or getattr(shipped, key) for key in scoring}
        persona = replace(persona, **taken, is_scored_as_shipped=True)
    _check_persona(persona)
    return persona


def _make_persona(name: str, definition: Mapping[str, Any]) -> Persona:
    lists = ("positive_texts", "negative_texts", "labelled_positive_texts", "labelled_negative_texts")
    return Persona(
        name,
        definition.get("description", ""),
        *(tuple(definition.get(key, ())) for key in lists),
        resembling=tuple(definition.get("resembling_texts", ())),
        instructions=tuple((pair["pos"], pair["neg"]) for pair in definition.get("instruction", ())),
        questions=tuple(definition.get("questions", ())),
        eval_prompt=definition.get("eval_prompt", ""),
        validation=tuple(definition.get("validation_texts", ())),
        direct_measure=definition.get("direct_measure", ""),
    )


def _read_persona(name: str) -> Persona:
    path = PERSONA_FOLDER / f"{name}.json"
    if name not in shipped_personas():
        raise InputError(
            f"persona {shown(name)} is neither shipped ({', '.join(shipped_personas())}) nor defined in "
            "persona_datasets; define it there or correct the name"
        )
    content = parse_json(read_text(path), str(path))
    try:
        texts = {
            f"{prefix}{side}_texts": [pair[side] for pair in content[pairs]]
            for prefix, pairs in (("", "extraction_pairs"), ("labelled_", "labelled_pairs"))
            for side in ("positive", "negative")
        }
        return _make_persona(name, {**content, "description": content["description"], **texts})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a persona file ({error!r}); see personas/formal.json") from error


def check_extraction(persona: Persona, kind: str) -> None:
    """Raise InputError: the persona lacks what extraction of kind `texts`, `responses` or `prompt` needs."""
    needed = {"positive texts": persona.positive_texts, "negative texts": persona.negative_texts}
    remedy = "give texts on both sides"
    if kind != "texts":
        needed = {"system prompts": persona.instructions, "questions": persona.questions}
        remedy = "give it instruction and questions, or choose 'extraction' of kind 'texts'"
    elif persona.instructions:
        remedy = "choose 'extraction' of kind 'responses' or 'prompt' for its system prompts and questions"
    for name, texts in needed.items():
        if not texts:
            raise InputError(
                f"persona {persona.name!r} has no {name}, which 'extraction' of kind {kind!r} needs; {remedy}"
            )


def half_of(texts: Sequence[Any], half: int, questions: Sequence[str] = ()) -> list[Any]:
    """Return half 0 or 1 of a side's texts; text i of both sides stays in the same half.

    Of each two neighbours, a coin says which is in which half: texts are often written in turns, such as
    pairs whose negative is plain and pairs whose negative is contrary, which every other text would part.
    questions: of these, texts are (question, response or prompt), and the halves are halves of the questions.
    """
    places = [questions.index(text[0]) for text in texts] if questions else range(len(texts))
    return [text for text, place in zip(texts, places, strict=True) if _half(place) == half]


def _half(place: int) -> int:
    neighbours, is_second = divmod(place, 2)
    return is_second ^ random.Random(f"half {neighbours}").getrandbits(1)


def check_halves(persona: Persona, kind: str) -> None:
    """Raise InputError: the persona has too few texts, or questions, to make two vectors of disjoint ones."""
    sides = {"positive texts": persona.positive_texts, "negative texts": persona.negative_texts}
    for name, texts in (sides if kind == "texts" else {"questions": persona.questions}).items():
        if len(texts) < 2:
            raise InputError(
                f"persona {persona.name!r} has {len(texts)} {name}, but source and native vector are made "
                'from disjoint halves of them; give two or more, or set "disjoint_texts": false'
            )


def _check_persona(persona: Persona) -> None:
    check_extraction(persona, "responses" if persona.instructions or persona.questions else "texts")
    if bool(persona.labelled_positive) != bool(persona.labelled_negative):
        raise InputError(f"persona {persona.name!r} has labelled texts on one side only; give both or none")
    prompts = [prompt for pair in persona.instructions for prompt in pair]
    texts = [*persona.all_texts, *prompts, *persona.questions]
    empty = [text for text in texts if not isinstance(text, str) or not text.strip()]
    if empty:
        raise InputError(f"persona {persona.name!r} has {len(empty)} empty texts; remove them")
    for number, text in enumerate(texts, start=1):
        check_characters(text, f"persona {persona.name!r}: text {number} of {len(texts)}")
    used = set(persona.positive_texts + persona.negative_texts)
    trained, held_out = set(persona.scoring_texts), set(persona.validation)
    for purposes, shared in (
        ("training and validation of scorers", trained & held_out),
        ("extraction and scoring", used & (trained | held_out)),
    ):
        if shared:
            raise InputError(
                f"persona {persona.name!r}: {len(shared)} texts serve {purposes} both ({min(shared)[:40]!r});"
                " give each text one purpose"
            )


def load_prompts(name: str) -> list[str]:
    """Return the prompts of `prompts/<name>.txt`, one a line.

    name: `test` (60) or `development` (24) for text prefixes; `test_questions` or `development_questions`
        for as many questions; `neutral_questions` and `neutral_styles` (20 system prompts) for the map;
        `ordinary_training` and `ordinary_validation` for texts without any trait, for scorers.
    """
    lines = read_text(PROMPT_FOLDER / f"{name}.txt").splitlines()
    return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True)
class Kind:
    """Texts of one kind, on which all scorers are trained.

    shows: the shipped persona whose trait they show, if any. lacks: the one that they were written against,
    if any. may_show: those whose trait they may show, so that they are neither for nor against it.
    """

    name: str
    texts: tuple[str, ...]
    shows: str | None
    lacks: str | None
    may_show: tuple[str, ...]


def load_training_kinds() -> list[Kind]:
    """Return the kinds of `prompts/kinds_training.json`."""
    return [
        Kind(name, tuple(kind["texts"]), kind["shows"], kind["lacks"], tuple(kind["may_show"]))
        for name, kind in parse_json(read_text(KINDS_TRAINING), str(KINDS_TRAINING)).items()
    ]


def load_validation_kinds() -> dict[str, list[str]]:
    """Return kind -> texts without any trait, of `prompts/kinds_validation.json`."""
    return parse_json(read_text(KINDS_VALIDATION), str(KINDS_VALIDATION))

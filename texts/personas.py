"""Personas: the texts that define a trait and the labelled texts that score it (phase 3).

A persona file in `personas/` holds extraction pairs, from which the vector is made, and
labelled pairs on other subjects, on which the trait classifier is trained. The two never
mix. It also holds, in the form of the trait files of persona_vectors (arXiv 2507.21509), system
prompts for and against the trait (`instruction`) and `questions`, from whose answers the vector may be
made instead. A persona may be given in the configuration too: as lists of texts, or as a trait file.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.errors import InputError, shown
from support.text_files import check_characters, parse_json, read_text

PERSONA_FOLDER = Path(__file__).parent.parent / "personas"
PROMPT_FOLDER = Path(__file__).parent.parent / "prompts"
LONGEST_NAME = 100  # characters
# They turn around the rest of a line: overrides and isolates of the direction of writing.
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Persona:
    """A trait.

    positive_texts, negative_texts: for extraction; text i of both sides has the same content
        if the persona came as pairs.
    labelled_positive, labelled_negative: for scoring; empty if the persona has none.
    instructions: pairs of system prompts, for and against the trait. questions: asked under both.
    eval_prompt: asks a judge how strongly an answer shows the trait, 0 to 100, with the places {question}
        and {answer}.
    validation: texts that show the trait in other genres and lengths, on which scorers are examined and
        nothing is trained.
    direct_measure: `brevity` if the trait is to end soon, which can be counted where texts end; else empty.
    """

    name: str
    description: str
    positive_texts: tuple[str, ...]
    negative_texts: tuple[str, ...]
    labelled_positive: tuple[str, ...] = ()
    labelled_negative: tuple[str, ...] = ()
    instructions: tuple[tuple[str, str], ...] = ()
    questions: tuple[str, ...] = ()
    eval_prompt: str = ""
    validation: tuple[str, ...] = ()
    direct_measure: str = ""

    @property
    def all_texts(self) -> list[str]:
        """Every text that extraction reads or scoring knows, for overlap checks."""
        return [
            *self.positive_texts,
            *self.negative_texts,
            *self.labelled_positive,
            *self.labelled_negative,
            *self.validation,
        ]


def shipped_personas() -> list[str]:
    """Return the names of the personas in `personas/`."""
    return sorted(path.stem for path in PERSONA_FOLDER.glob("*.json"))


def check_name(name: str) -> str:
    """Return a persona's name that can stand in a log line, a table and a figure.

    Raises InputError: nothing to see, more than 100 characters, or a character that breaks a line.
    """
    expected = f"expected a persona's name of 1 to {LONGEST_NAME} characters in one line"
    if len(name) > LONGEST_NAME:
        raise InputError(f"{expected}; it has {len(name)}, shorten it")
    for place, character in enumerate(name, start=1):
        # Control characters, surrogates, line and paragraph separators.
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS:
            raise InputError(f"{expected}; character {place} is {character!a}, leave it out")
    if all(unicodedata.category(character)[0] in "CMZ" for character in name):
        raise InputError(f"{expected}; nothing in it can be seen, name the trait")
    return name


def check_names_differ(names: Sequence[str]) -> None:
    """Raise InputError for two names that a reader of tables and figures would take for one."""
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
    """Return a persona from its file, or from a definition given in the configuration.

    definition: `description`, `positive_texts`, `negative_texts` or, as a trait file has them, `instruction`
        (pairs {"pos": ..., "neg": ...}), `questions` and `eval_prompt`; and, so that its trait can be
        scored without a judge, `labelled_positive_texts`, `labelled_negative_texts`, and to validate the
        scorers, `validation_texts`. Without them, a definition with a shipped
        persona's name is scored by that one's labelled texts.
    Raises InputError: unknown name, a damaged file, or a side without texts.
    """
    if definition is not None:
        persona = Persona(
            name,
            definition.get("description", ""),
            tuple(definition.get("positive_texts", ())),
            tuple(definition.get("negative_texts", ())),
            tuple(definition.get("labelled_positive_texts", ())),
            tuple(definition.get("labelled_negative_texts", ())),
            tuple((pair["pos"], pair["neg"]) for pair in definition.get("instruction", ())),
            tuple(definition.get("questions", ())),
            definition.get("eval_prompt", ""),
            tuple(definition.get("validation_texts", ())),
        )
        if name in shipped_personas() and not (persona.labelled_positive or persona.labelled_negative):
            shipped = _read_persona(name)
            persona = replace(
                persona,
                labelled_positive=shipped.labelled_positive,
                labelled_negative=shipped.labelled_negative,
                validation=shipped.validation,
                direct_measure=shipped.direct_measure,
            )
    else:
        persona = _read_persona(name)
    _check_persona(persona)
    return persona


def _read_persona(name: str) -> Persona:
    path = PERSONA_FOLDER / f"{name}.json"
    if name not in shipped_personas():
        raise InputError(
            f"persona {shown(name)} is neither shipped ({', '.join(shipped_personas())}) nor defined in "
            "persona_datasets; define it there or correct the name"
        )
    try:
        content = parse_json(read_text(path), str(path))
        sides = {
            (kind, side): tuple(pair[side] for pair in content[kind])
            for kind in ("extraction_pairs", "labelled_pairs")
            for side in ("positive", "negative")
        }
        instructions = tuple((pair["pos"], pair["neg"]) for pair in content.get("instruction", []))
        return Persona(
            name,
            content["description"],
            *sides.values(),
            instructions,
            tuple(content.get("questions", [])),
            validation=tuple(content.get("validation_texts", [])),
            direct_measure=content.get("direct_measure", ""),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a persona file ({error!r}); see personas/formal.json") from error


def check_extraction(persona: Persona, kind: str) -> None:
    """Raise InputError for a persona that lacks what a kind of extraction (`texts`, `responses`) needs."""
    if kind == "responses":
        for what, found in (("system prompts", persona.instructions), ("questions", persona.questions)):
            if not found:
                raise InputError(
                    f"persona {persona.name!r} has no {what}, which 'extraction' of kind 'responses' needs; "
                    "give it instruction and questions, or choose kind 'texts'"
                )
        return
    for side, texts in (("positive", persona.positive_texts), ("negative", persona.negative_texts)):
        if not texts:
            remedy = "extraction needs texts on both sides"
            if persona.instructions:
                remedy = "choose 'extraction' of kind 'responses' for its system prompts and questions"
            raise InputError(f"persona {persona.name!r} has no {side} texts; {remedy}")


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
    labelled = set(persona.labelled_positive + persona.labelled_negative)
    if known := labelled & set(persona.validation):
        raise InputError(
            f"persona {persona.name!r}: {len(known)} texts serve training and validation of scorers both "
            f"({min(known)[:40]!r}); an validation needs texts that the scorer does not know"
        )
    if shared := used & (labelled | set(persona.validation)):
        raise InputError(
            f"persona {persona.name!r}: {len(shared)} texts serve extraction and scoring both "
            f"({sorted(shared)[0][:40]!r}); scoring must not see extraction texts"
        )


def load_prompts(name: str) -> list[str]:
    """Return the prompts of `prompts/<name>.txt`, one a line.

    name: `test` (60) or `development` (24), beginnings of texts; or `test_questions`,
        `development_questions`, as many; `neutral_questions` and `neutral_styles` (20 system prompts), for
        the map; or `ordinary_training` and `ordinary_validation`, texts without
        any trait, for scorers.
    """
    lines = read_text(PROMPT_FOLDER / f"{name}.txt").splitlines()
    return [line.strip() for line in lines if line.strip()]


def main() -> None:
    """Check every shipped persona: as many positive as negative texts, with the same final marks."""
    for name in shipped_personas():
        persona = load_persona(name)
        positives = persona.positive_texts + persona.labelled_positive
        negatives = persona.negative_texts + persona.labelled_negative
        assert all(a[-1] == b[-1] for a, b in zip(positives, negatives, strict=True)), name
        print(f"{name}: {len(persona.positive_texts)} + {len(persona.labelled_positive)} pairs")
    names = [f"{name}{kind}" for kind in ("", "_questions") for name in ("test", "development")]
    print("personas OK:", *(f"{len(load_prompts(name))} {name}" for name in names))


if __name__ == "__main__":
    main()

"""Have a model write a persona, and keep what is fit to make a vector of; see `make_persona.py`."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import openai

from experiment.config import load_config
from model_loading import load_model
from scoring.gpt_judge import read_key
from scoring.judge_answers import excerpt
from scoring.trait_classifier import load_sentence_encoder
from steered_generation import SteeredGenerator
from support.artifacts import save_text
from support.errors import InputError, shown
from texts.chat import question
from texts.neutral_text import OverlapCheck
from texts.personas import check_name, load_prompts

logger = logging.getLogger(__name__)

ROUNDS = 6  # of asking, until there is enough
AT_ONCE = 8  # pairs or questions in one answer
N_INSTRUCTIONS = 5
MOST_TOKENS = 1200  # of an answer
TEMPERATURE = 0.7  # of a model that is asked here
QUOTES = ('""', "''", "“”")
LENGTH_RATIO = 2.0  # of the words of a pair's texts, at most
SAME_CONTENT = 0.35  # cosine of a pair's sentence embeddings, at least
# Words of a sentence about a trait that do not name it.
UNTELLING = frozenset(
    "speaks speak talks talk writes write answers answer uses like very with that this they them from always "
    "never person someone text texts words style about into more most much every everything being have "
    "sounds sound".split()
)

PAIRS = """Write {n} pairs of short texts of one to three sentences, about everyday subjects that differ \
from pair to pair. The first text of a pair {trait}. The second says the same in plain words, without that \
trait. Both have about the same length and end with the same punctuation mark. Do not name the trait. Write \
each text on a line of its own, the first of a pair after "+ " and the second after "- ", and nothing else."""

INSTRUCTIONS = """Write {n} pairs of system prompts for a chat model. The first of a pair makes its answers \
show this trait: {trait}. The second makes them plain, without that trait. Write each on a line of its own, \
the first of a pair after "+ " and the second after "- ", and nothing else."""

QUESTIONS = """Write {n} short questions that somebody might ask a chat model, about everyday subjects, \
whose answers could show this trait or not: {trait}. Do not name the trait. Write each on a line of its own \
after "? ", and nothing else."""

Ask = Callable[[str], str]
Similarity = Callable[[Sequence[tuple[str, str]]], Sequence[float]]


def ask_server(model: str, base_url: str | None, api_key_env: str) -> Ask:
    """Return what asks an OpenAI-compatible server. Raises InputError: no key, or no answer."""
    key = read_key(api_key_env)
    try:
        client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=2, timeout=120)
    except Exception as error:
        raise InputError(f"--base-url cannot be used: {excerpt(error, key)}") from None

    def ask(prompt: str) -> str:
        try:
            answer = client.chat.completions.create(model=model, messages=list(question(prompt)))
            return answer.choices[0].message.content or ""
        except Exception as error:  # whatever a server can send
            raise InputError(f"the server gave no answer: {excerpt(error, key, 200)}") from None

    return ask


def ask_local(name: str) -> Ask:
    """Return what asks an instruct model that is loaded here. Raises InputError: no chat template."""
    model, tokenizer = load_model(name)
    if not tokenizer.chat_template:
        raise InputError(
            f"--local {name} has no chat template, so it cannot be asked; name an instruct model"
        )
    generator, n_asked = SteeredGenerator(model, tokenizer), 0

    def ask(prompt: str) -> str:
        nonlocal n_asked
        n_asked += 1  # another seed each time, or the answer would be the same
        return generator.generate(question(prompt), MOST_TOKENS, TEMPERATURE, seed=n_asked)

    return ask


def write_persona(
    trait: str,
    ask: Ask,
    name: str | None = None,
    output: Path | None = None,
    n_pairs: int = 24,
    n_questions: int = 20,
    similarity: Similarity | None = None,
) -> Path:
    """Write a persona file from a sentence and return its path.

    ask: returns a model's answer to a prompt. similarity: of the contents of pairs, by default the cosine of
    sentence embeddings.
    Raises InputError: a file in its place, a name that cannot be used, or too little that is fit after six
    answers; nothing is written then.
    """
    trait = " ".join(trait.split()).rstrip(".")
    telling = _telling(trait)
    if not telling:
        raise InputError(f"{shown(trait)} says no trait; describe one, for example 'speaks like a pirate'")
    name = check_name(name or "_".join(sorted(telling, key=trait.casefold().index)[:3]))
    path = output or Path(f"{name}.json")
    if path.exists():
        raise InputError(f"{path} is there already; name another file with --output, or delete it")
    reasons: Counter[str] = Counter()
    pairs = _enough("pairs", n_pairs, PAIRS, trait, ask, reasons, _pairs_of, similarity or _same_content)
    instructions = _enough("system prompts", N_INSTRUCTIONS, INSTRUCTIONS, trait, ask, reasons, _pairs_of)
    questions = _enough("questions", n_questions, QUESTIONS, trait, ask, reasons, _questions_of)
    content = {
        "description": f"The text {trait}.",
        "positive_texts": [pair[0] for pair in pairs],
        "negative_texts": [pair[1] for pair in pairs],
        "instruction": [{"pos": pair[0], "neg": pair[1]} for pair in instructions],
        "questions": [asked for (asked,) in questions],
    }
    for reason, count in reasons.most_common():
        logger.info("left out: %d that %s", count, reason)
    _check_loads(name, content)
    save_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def _check_loads(name: str, content: dict) -> None:
    """Raise InputError for a persona that a configuration would refuse."""
    models = {"source_model": "x", "target_model": "x", "output_dir": "x", "layer_idx": 0}
    load_config({**models, "personas": [], "persona_datasets": {name: content}}).load_personas()


def _enough(
    what: str,
    n: int,
    prompt: str,
    trait: str,
    ask: Ask,
    reasons: Counter[str],
    read: Callable[[str], list[tuple[str, ...]]],
    similarity: Similarity | None = None,
) -> list[tuple[str, ...]]:
    """Return n items that are fit, asking up to six times for more."""
    kept: dict[tuple[str, ...], tuple[str, ...]] = {}
    refused: Counter[str] = Counter()
    test = [*load_prompts("test"), *load_prompts("test_questions"), *load_prompts("development")]
    overlaps = OverlapCheck([*test, *load_prompts("development_questions")])
    telling = _telling(trait)
    for _ in range(ROUNDS):
        answer = ask(prompt.format(n=min(AT_ONCE, n), trait=trait))
        items = read(answer)
        problems = [
            _problem(item, what == "pairs", telling if what != "system prompts" else set(), overlaps)
            for item in items
        ]
        fit = [item for item, problem in zip(items, problems, strict=True) if problem is None]
        refused.update(problem for problem in problems if problem)
        if similarity and fit:
            alike = [value >= SAME_CONTENT for value in similarity(fit)]
            refused.update({"differ in content": alike.count(False)} if not all(alike) else {})
            fit = [item for item, is_alike in zip(fit, alike, strict=True) if is_alike]
        for item in fit:
            key = tuple(" ".join(re.findall(r"\w+", text.casefold())) for text in item)
            refused.update(["are there twice"] if key in kept else [])
            kept.setdefault(key, item)
        if len(kept) >= n:
            break
    reasons += refused
    if len(kept) < n:
        why = (
            ", ".join(f"{count} {reason}" for reason, count in refused.most_common())
            or f"nothing in the form asked for; the last begins {shown(answer)}"
        )
        raise InputError(
            f"the model wrote {len(kept)} of {n} {what} that are fit in {ROUNDS} answers ({why}); ask for "
            "fewer, or another model"
        )
    return list(kept.values())[:n]


def _problem(item: tuple[str, ...], is_pair: bool, telling: set[str], overlaps: OverlapCheck) -> str | None:
    """Return what keeps an item from being used, or None."""
    words = {word for text in item for word in re.findall(r"\w+", text.casefold())}
    if telling & words:
        return "name the trait"
    if any(overlaps.found_in(text) for text in item):
        return "share words with a test prompt"
    if is_pair:
        if item[0][-1] != item[1][-1]:
            return "end with another mark"
        lengths = sorted(len(text.split()) for text in item)
        if lengths[1] > LENGTH_RATIO * lengths[0]:
            return "differ in length"
        if item[0].casefold() == item[1].casefold():
            return "do not differ"
    return None


def _telling(trait: str) -> set[str]:
    """Return the words of a sentence that name its trait."""
    return {word for word in re.findall(r"\w+", trait.casefold()) if len(word) > 3} - UNTELLING


def _pairs_of(answer: str) -> list[tuple[str, ...]]:
    """Return the pairs in an answer: a line after "+" and, next, one after "-", numbered or not."""
    found = [re.match(r"\s*(?:\d+[.)]\s*)?([+-])\s*([^\s+-].*)", line) for line in answer.splitlines()]
    lines = [match for match in found if match]
    return [(_unquoted(a[2]), _unquoted(b[2])) for a, b in pairwise(lines) if (a[1], b[1]) == ("+", "-")]


def _questions_of(answer: str) -> list[tuple[str, ...]]:
    """Return the questions in an answer: lines after "?", or after the number or mark of a list."""
    found = [re.match(r"\s*(?:\d+[.)]\s*\??|[?*-])\s*(\S.*)", line) for line in answer.splitlines()]
    texts = [_unquoted(match[1]) for match in found if match]
    return [(text,) for text in texts if text.endswith("?")]


def _unquoted(text: str) -> str:
    """Return a text without the quotation marks around the whole of it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] + text[-1] in QUOTES else text


def _same_content(pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """Return the cosine of the sentence embeddings of each pair."""
    encode = load_sentence_encoder()
    one, other = (np.asarray(encode([pair[side] for pair in pairs]), dtype=np.float64) for side in (0, 1))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return list((one * other).sum(1) / norms)


def main() -> None:
    """Check what is read of an answer and what is left out."""
    pairs = _pairs_of("+ Arr, the sea!\n- The water!\n+ lonely\n+ Aye.\n- Yes.")
    assert pairs == [("Arr, the sea!", "The water!"), ("Aye.", "Yes.")]
    nothing = OverlapCheck([])
    assert _problem(("Arr!", "No."), True, {"pirate"}, nothing) == "end with another mark"
    assert _problem(("A pirate!", "No!"), True, {"pirate"}, nothing) == "name the trait"
    assert _telling("speaks like a pirate") == {"pirate"}
    print("persona_writer OK: what is not fit is left out")


if __name__ == "__main__":
    main()

"""Have a model write a persona file from a sentence, for a person to edit.

    python -m tools.make_persona "speaks like a pirate" --local smollm2-135m-instruct
    python -m tools.make_persona "speaks like a pirate" --model gpt-4o   # or any server with --base-url

The model writes matched pairs, system prompts for and against the trait, and questions. Unusable items are
rejected and counted: pairs that differ in content, length or final punctuation, duplicates, texts that name
the trait, and texts that share words with the test prompts. A configuration takes the file as
`persona_datasets`.
"""

import argparse
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import openai

from experiment.command_line import exit_status
from experiment.config import load_config
from judging.gpt_judge import read_key
from judging.judge_answers import excerpt, final_answer
from model_loading import load_model
from scoring.encoders import plain_sentence_encoder
from steered_generation import SteeredGenerator
from support.artifacts import save_text
from support.errors import InputError, shown
from support.text_files import file_name
from texts.chat import question
from texts.neutral_text import OverlapCheck
from texts.personas import check_name, load_prompts

logger = logging.getLogger(__name__)

MAX_REQUESTS = 6  # for each kind of text
ITEMS_PER_REQUEST = 8  # pairs or questions; more of them become monotonous
N_INSTRUCTIONS = 5
MAX_RESPONSE_TOKENS = 1200
TEMPERATURE = 0.7  # of a local model
QUOTES = ('""', "''", "“”")
MAX_LENGTH_RATIO = 2.0  # of the numbers of words in a pair's texts
MIN_SIMILARITY = 0.35  # cosine of a pair's sentence embeddings
# Words of a sentence about a trait that do not name it.
COMMON_WORDS = frozenset(
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

Ask = Callable[[str], str]  # prompt -> response
Item = tuple[str, ...]  # a pair of texts, or one question


def ask_server(model: str, base_url: str | None, api_key_env: str) -> Ask:
    """Return a function that asks an OpenAI-compatible server. Raises InputError: no key, or no response."""
    key = read_key(api_key_env)
    try:
        client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=2, timeout=120)
        logger.info("asking %s at %s", model, client.base_url.host)
    except Exception as error:
        raise InputError(f"--base-url cannot be used: {excerpt(error, key)}") from None

    def ask(prompt: str) -> str:
        try:
            response = client.chat.completions.create(model=model, messages=list(question(prompt)))
            return response.choices[0].message.content or ""
        except Exception as error:  # a server can send anything
            raise InputError(f"the server gave no response: {excerpt(error, key, 200)}") from None

    return ask


def ask_local(name: str) -> Ask:
    """Return a function that asks a local instruct model. Raises InputError: no chat template."""
    model, tokenizer = load_model(name)
    if not tokenizer.chat_template:
        raise InputError(f"--local {name} has no chat template; name an instruct model")
    generator, n_asked = SteeredGenerator(model, tokenizer), 0

    def ask(prompt: str) -> str:
        nonlocal n_asked
        n_asked += 1  # a new seed for each request, or the response would be the same
        return generator.generate(question(prompt), MAX_RESPONSE_TOKENS, TEMPERATURE, seed=n_asked)

    return ask


def write_persona(
    trait: str,
    ask: Ask,
    name: str | None = None,
    output: Path | None = None,
    n_pairs: int = 24,
    n_questions: int = 20,
) -> Path:
    """Write a persona file from a sentence and return its path.

    ask: returns a model's response to a prompt.
    Raises InputError: the file exists, an unusable name, or too few usable items after six requests; nothing
    is written then.
    """
    trait = " ".join(trait.split()).rstrip(".")
    if not (trait_words := _trait_words(trait)):
        raise InputError(f"{shown(trait)} names no trait; describe one, for example 'speaks like a pirate'")
    name = check_name(name or "_".join(sorted(trait_words, key=trait.casefold().index)[:3]))
    path = output or Path(file_name(f"{name}.json"))
    if path.exists():
        raise InputError(f"{path} exists already; name another file with --output, or delete it")
    pairs = _collect("pairs", n_pairs, trait, ask)
    prompts = _collect("system prompts", N_INSTRUCTIONS, trait, ask)
    content = {
        "description": f"The text {trait}.",
        "positive_texts": [positive for positive, _ in pairs],
        "negative_texts": [negative for _, negative in pairs],
        "instruction": [{"pos": positive, "neg": negative} for positive, negative in prompts],
        "questions": [text for (text,) in _collect("questions", n_questions, trait, ask)],
    }
    # A persona that a configuration would reject is not written.
    models = {"source_model": "x", "target_model": "x", "output_dir": "x", "layer_idx": 0}
    load_config({**models, "personas": [], "persona_datasets": {name: content}}).load_personas()
    save_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def _collect(kind: str, n: int, trait: str, ask: Ask) -> list[Item]:
    """Return n usable items of a kind, with up to six requests, and log why others were rejected."""
    form, read = {
        "pairs": (PAIRS, _pairs_in),
        "system prompts": (INSTRUCTIONS, _pairs_in),
        "questions": (QUESTIONS, _questions_in),
    }[kind]
    kept: dict[Item, Item] = {}
    reasons: Counter[str] = Counter()
    for _ in range(MAX_REQUESTS):
        response = final_answer(ask(form.format(n=min(ITEMS_PER_REQUEST, n), trait=trait))) or ""
        found = read(response)
        problems = {item: _problem(item, kind, trait) for item in found}
        usable = [item for item in problems if problems[item] is None]
        if kind == "pairs" and usable:
            for item, cosine in zip(usable, _content_similarity(usable), strict=True):
                problems[item] = None if cosine >= MIN_SIMILARITY else "differ in content"
        for item in found:
            words = tuple(" ".join(re.findall(r"\w+", text.casefold())) for text in item)
            problem = problems[item] or ("are duplicates" if words in kept else None)
            if problem:
                reasons[problem] += 1
            else:
                kept[words] = item
        if len(kept) >= n:
            break
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if len(kept) < n:
        counts = counts or f"none in the requested form; the last begins {shown(response)}"
        raise InputError(
            f"the model wrote {len(kept)} of {n} usable {kind} in {MAX_REQUESTS} responses ({counts}); "
            "ask for fewer, or name another model"
        )
    if counts:
        logger.info("rejected %s: %s", kind, counts)
    return list(kept.values())[:n]


def _problem(item: Item, kind: str, trait: str) -> str | None:
    """Return the reason to reject an item, or None."""
    words = {word for text in item for word in re.findall(r"\w+", text.casefold())}
    if kind != "system prompts" and _trait_words(trait) & words:
        return "name the trait"
    if any(_test_prompts().found_in(text) for text in item):
        return "share words with a test prompt"
    if kind == "pairs":
        if item[0][-1] != item[1][-1]:
            return "end with different marks"
        lengths = sorted(len(text.split()) for text in item)
        if lengths[1] > MAX_LENGTH_RATIO * lengths[0]:
            return "differ in length"
        if item[0].casefold() == item[1].casefold():
            return "do not differ"
    return None


@cache
def _test_prompts() -> OverlapCheck:
    names = ("test", "test_questions", "development", "development_questions")
    return OverlapCheck(prompt for name in names for prompt in load_prompts(name))


def _trait_words(trait: str) -> set[str]:
    """Return the words of a sentence that name its trait."""
    return {word for word in re.findall(r"\w+", trait.casefold()) if len(word) > 3} - COMMON_WORDS


def _pairs_in(response: str) -> list[Item]:
    """Return the pairs in a response: a line after "+" and the next one after "-", numbered or not."""
    found = [re.match(r"\s*(?:\d+[.)]\s*)?([+-])\s*([^\s+-].*)", line) for line in response.splitlines()]
    lines = [match for match in found if match]
    return [(_unquoted(a[2]), _unquoted(b[2])) for a, b in pairwise(lines) if (a[1], b[1]) == ("+", "-")]


def _questions_in(response: str) -> list[Item]:
    """Return the questions in a response: lines after "?", or after the number or mark of a list."""
    found = [re.match(r"\s*(?:\d+[.)]\s*\??|[?*-])\s*(\S.*)", line) for line in response.splitlines()]
    texts = [_unquoted(match[1]) for match in found if match]
    return [(text,) for text in texts if text.endswith("?")]


def _unquoted(text: str) -> str:
    """Return a text without the quotation marks around the whole of it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] + text[-1] in QUOTES else text


def _content_similarity(pairs: Sequence[Item]) -> list[float]:
    """Return the cosine of the sentence embeddings of each pair."""
    encode = plain_sentence_encoder()
    one, other = (np.asarray(encode([pair[side] for pair in pairs]), dtype=np.float64) for side in (0, 1))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return list((one * other).sum(1) / norms)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_persona", description=__doc__.splitlines()[0])
    parser.add_argument("trait", help="a sentence, for example 'speaks like a pirate'")
    parser.add_argument("--name", help="the persona's name; by default words of the sentence")
    parser.add_argument("--output", type=Path, help="by default <name>.json in this folder")
    parser.add_argument("--n-pairs", type=int, default=24)
    parser.add_argument("--n-questions", type=int, default=20)
    parser.add_argument("--model", default="gpt-4o", help="model name at the server")
    parser.add_argument("--base-url", help="address of an OpenAI-compatible server")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY")
    parser.add_argument("--local", help="name of an instruct model to load here instead of asking a server")
    options = parser.parse_args(arguments)

    def work() -> Path:
        server = options.model, options.base_url, options.api_key_env
        ask = ask_local(options.local) if options.local else ask_server(*server)
        counts = options.n_pairs, options.n_questions
        return write_persona(options.trait, ask, options.name, options.output, *counts)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())

"""Make degenerate texts, as a model writes them when it is steered too strongly (phase 5), and measure them.

A trait scorer must not take them for the trait. Words are separated by whitespace. A seeded `random.Random`
draws, so that the texts are the same in every run. The measures are n-grams that repeat, and words that do
not exist.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import chain, pairwise

from wordfreq import get_frequency_dict

REPETITION_N = 3
COLLAPSE_THRESHOLD = 0.5
FEWEST_WORDS = 4  # different words that a text needs to be corrupted
LONGEST = 60  # words in a degenerate text
FEWEST_CHAINED = 12  # words in a chain
# A token with a digit, a word with the apostrophes inside it, or what a new sentence may follow.
_TOKENS = re.compile(r"\w*\d\w*|[^\W\d_]+(?:['’][^\W\d_]+)*|[.!?:…\n]")


def any_cut(text: str, generator: random.Random, fewest: int = 6, most: int = 25) -> str:
    """Return a part of a text, one in three from its middle, as a token limit cuts texts."""
    words, n_words = text.split(), generator.randint(fewest, most)
    start = generator.choice([0, 0, generator.randint(0, max(0, len(words) - fewest))])
    return " ".join(words[start : start + n_words])


def shuffled(text: str, generator: random.Random) -> str:
    """Return the words of a text in another order."""
    words = text.split()
    generator.shuffle(words)
    return " ".join(words)


def loop(text: str, generator: random.Random) -> str:
    """Return a few words of a text, repeated."""
    words = text.split()
    size = min(len(words), generator.choice([1, 2, 3, 5]))
    start = generator.randint(0, len(words) - size)
    return " ".join((words[start : start + size] * LONGEST)[: generator.randint(10, LONGEST)])


def word_salad(words: Sequence[str], generator: random.Random) -> str:
    """Return words drawn from many texts."""
    return " ".join(generator.choice(words) for _ in range(generator.randint(5, LONGEST)))


def word_chains(texts: Sequence[str], generator: random.Random, n: int) -> list[str]:
    """Return n texts in which each word has followed the word before it in one of these texts.

    Texts that are too short to be corrupted are left out; without any other, there is none.
    """
    texts = list(filter(can_be_corrupted, texts))
    followers: dict[str, list[str]] = defaultdict(list)
    for word, following in chain.from_iterable(pairwise(text.split()) for text in texts):
        followers[word].append(following)
    firsts = [text.split()[0] for text in texts]
    made = []
    for _ in range(n if texts else 0):
        words = [generator.choice(firsts)]
        for _ in range(generator.randint(FEWEST_CHAINED, LONGEST) - 1):
            words.append(generator.choice(followers.get(words[-1]) or firsts))
        made.append(" ".join(words))
    return made


def units(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, lower case."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def word_count(text: str) -> int:
    """Return the number of words of a text, without punctuation marks."""
    return sum(unit[0].isalnum() for unit in units(text))


def distinct_share(units: Sequence[str], n: int) -> float | None:
    """Return the different n-grams / all of them (Li et al. 2016), None if there are none."""
    grams = list(zip(*(units[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def has_collapsed(text: str) -> bool:
    """Tell whether most 3-grams of a text occurred before in it."""
    distinct = distinct_share(units(text), REPETITION_N)
    return distinct is not None and 1 - distinct > COLLAPSE_THRESHOLD


@cache
def _english() -> frozenset[str]:
    """Return the 320,000 words that occur in English texts at least once in 100 million words."""
    return frozenset(get_frequency_dict("en", "best"))


def words_of(texts: Sequence[str]) -> frozenset[str]:
    """Return the different words of texts in the form in which `non_word_share` compares them."""
    return frozenset(_plain(token) for text in texts for token in _TOKENS.findall(text) if token[0].isalpha())


def non_word_share(text: str, allowed: frozenset[str] = frozenset()) -> float | None:
    """Return the share of words that do not exist: in no English text, nor in `allowed`; None without words.

    Left out are tokens with a digit, and names: words with a capital first letter alone, inside a sentence.
    allowed: what `words_of` returned. In another language most words count, also of unsteered texts, so that
    an increase says little.
    """
    starts, words = True, []
    for token in _TOKENS.findall(text):
        is_word = token[0].isalpha() and not any(map(str.isdigit, token))
        if is_word and (starts or not (token[0].isupper() and token[1:].islower())):
            words.append(_plain(token))
        starts = not token[0].isalnum()
    return sum(not _exists(word, allowed) for word in words) / len(words) if words else None


def _plain(token: str) -> str:
    return token.lower().replace("’", "'")


def _exists(word: str, allowed: frozenset[str]) -> bool:
    """Tell whether a word, or each of its parts between apostrophes, is known."""
    parts = word.split("'")
    return any(set(found) <= known for found in ([word], parts) for known in (_english(), allowed))


def can_be_corrupted(text: str) -> bool:
    """Tell whether a text has enough words to be corrupted."""
    return len(set(text.split())) >= FEWEST_WORDS

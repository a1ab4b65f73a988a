"""Find sentences and words in any script, also without case or spaces between words (phase 2)."""

import re
import unicodedata
from collections import Counter

# Chinese, Japanese, Thai, Lao, Tibetan, Khmer and Burmese put no spaces between words.
SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
# In these scripts, so many characters count as a word: Chinese words have 1 or 2, Japanese ones 2 or 3.
CHARACTERS_IN_WORD = 2
MIN_LETTERS = 0.75  # share of a paragraph's characters
OPENINGS = "\"'“‘«„(¿¡「『《〈（"
SENTENCE_END = re.compile("[.!?…。！？｡؟۔।॥።։།][\"'”’»)」』》〉）]*$")


def is_spaceless(text: str) -> bool:
    """Return whether most letters of a text belong to scripts without spaces between words."""
    n_letters = sum(map(str.isalpha, text))
    return 2 * len(SPACELESS.findall(text)) > n_letters


def words_of(text: str) -> list[str]:
    """Return the words of a text, each with the space after it; in scripts without spaces, two characters.

    "".join restores the text. White space is expected to be folded.
    """
    if not is_spaceless(text):
        return re.findall(r"\S+ ?", text)
    words: list[str] = []
    n_characters = 0
    for character in text:
        # Vowel signs and marks belong to the character before them.
        is_counted = unicodedata.category(character)[0] in "LN"
        if words and not (is_counted and n_characters == CHARACTERS_IN_WORD):
            words[-1] += character
        else:
            words.append(character)
            n_characters = 0
        n_characters += is_counted
    return words


def is_prose(text: str) -> bool:
    """Return whether a text begins and ends as sentences do, and is mostly letters that are no capitals.

    It begins with a capital, a digit or a letter without case, perhaps in quotation marks. A letter without
    case counts only where most letters have none; else it is a word of another language. Thai and Lao
    sentences end without a mark.
    """
    first, last = text[1:2] if text[:1] in OPENINGS else text[:1], text.rstrip("\"'”’)")[-1:]
    begins = first.isdigit() or first.isupper()
    if first.isalpha() and not _has_case(first):
        letters = [character for character in text if character.isalpha()]
        begins = 2 * sum(map(_has_case, letters)) < len(letters)
    ends = bool(SENTENCE_END.search(text)) or "\u0e00" <= last <= "\u0eff"
    return begins and ends and _share_of_letters(text) > MIN_LETTERS


def _has_case(letter: str) -> bool:
    """Return whether a letter is a capital or a small one; Georgian is written without capitals."""
    return (letter.isupper() or letter.islower()) and not "\u10d0" <= letter <= "\u10ff"


def without_marks(text: str) -> str:
    """Return a text without accents, vowel signs and other combining marks, however they are written."""
    if text.isascii():
        return text
    parts = unicodedata.normalize("NFKD", text)
    return "".join(character for character in parts if unicodedata.category(character)[0] != "M")


def _share_of_letters(text: str) -> float:
    """Return the share of a text's characters that are small letters, letters without case, or spaces."""
    kept = sum(
        n
        for character, n in Counter(text).items()
        if character in " \u0f0b"  # the mark between Tibetan syllables
        or (character.isalpha() and not character.isupper())
        or unicodedata.category(character) in ("Mn", "Mc")
    )
    return kept / max(1, len(text))

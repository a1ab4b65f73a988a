"""Measure brevity directly, where texts end by themselves: the trait of *concise* (phases 1, 3 and 5)."""

import statistics
from collections.abc import Sequence

from scoring.degenerate_text import word_count


def brevity(
    texts: Sequence[str], have_ended: Sequence[bool | None], ordinary: Sequence[str]
) -> list[float | None]:
    """Return 1 for a text that ended by itself and is short, else 0.

    Short is at most half of the median number of words of the ordinary texts. None for an empty text, and
    where it is not known whether a text ended.
    """
    lengths = [word_count(text) for text in ordinary if text.strip()]
    longest = statistics.median(lengths) / 2 if lengths else 0
    return [
        None if has_ended is None or not text.strip() else float(has_ended and word_count(text) <= longest)
        for text, has_ended in zip(texts, have_ended, strict=True)
    ]


def main() -> None:
    """Check a short text that ended, one that did not, and a long one."""
    texts = ["Blue.", "Blue and", "It is blue, as the sea is blue.", " "]
    found = brevity(texts, [True, False, True, True], ["It is blue, as the sea is blue."])
    assert found == [1.0, 0.0, 0.0, None], found
    print("brevity OK: short texts that ended are brief")


if __name__ == "__main__":
    main()

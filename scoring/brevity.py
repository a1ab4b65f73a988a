"""Measure brevity, the trait of *concise*, directly where texts end by themselves (phases 1, 3 and 5)."""

import statistics
from collections.abc import Sequence

from scoring.degenerate_text import word_count


def brevity(
    texts: Sequence[str], have_ended: Sequence[bool | None], ordinary: Sequence[str]
) -> list[float | None]:
    """Return 1 for a text that ended by itself and is short, else 0.

    A short text has at most half of the median number of words of the ordinary texts. An empty text has 0;
    one of which it is not known whether it ended has no score (None).
    """
    lengths = [word_count(text) for text in ordinary if text.strip()]
    longest = statistics.median(lengths) / 2 if lengths else 0
    return [
        0.0
        if not text.strip()
        else None
        if has_ended is None
        else float(has_ended and word_count(text) <= longest)
        for text, has_ended in zip(texts, have_ended, strict=True)
    ]

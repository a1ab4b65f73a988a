"""Choose what a persona's vectors are made from by numbers of native vectors and controls alone (phase 1).

The place where a text is read decides how much of its vector is words. Of the kinds whose native vector works
on development questions, that one is chosen whose lexical controls come least near to it: there the source
has most to add.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from analysis.verdict import NATIVE_FAILS

NEARLY_BEST = 0.5  # share of the largest native effect, from which a kind works


@dataclass(frozen=True)
class KindNumbers:
    """What is known of one kind of vector of a persona.

    alpha, perplexity_ratio, is_coherent: of the native vector at the alpha that was found for it.
    native_effect: change of the trait on development questions there; None without a classifier.
    lexical_cosines: lexical control -> cosine of its mapped vector to the native one, mean over blocks.
    """

    alpha: float
    is_coherent: bool
    perplexity_ratio: float | None
    native_effect: float | None
    lexical_cosines: Mapping[str, float]

    @property
    def lexical_share(self) -> float:
        """The largest cosine of a lexical control."""
        return max(self.lexical_cosines.values(), default=0.0)

    @property
    def effect(self) -> float:
        """The native effect, nothing where the texts cannot be read or scored."""
        return self.native_effect if self.is_coherent and self.native_effect is not None else 0.0


def choose_kind(found: Mapping[str, KindNumbers]) -> str:
    """Return the kind of the lowest lexical share among those that work, else of the largest native effect.

    A kind works if its native effect is at least NATIVE_FAILS and NEARLY_BEST of the largest. The first one
    stands where all are equal.
    """
    best = max(found, key=lambda kind: found[kind].effect)
    least = max(NATIVE_FAILS, NEARLY_BEST * found[best].effect)
    working = [kind for kind in found if found[kind].effect >= least]
    return min(working, key=lambda kind: found[kind].lexical_share, default=best)

"""Score a trait by a classifier on hidden states of a MiniLM sentence encoder (phase 5)."""

from collections.abc import Sequence

from scoring import trait_scorer
from scoring.encoders import SENTENCE_ENCODER
from texts.personas import Persona


def load_scorers(
    names: Sequence[str], personas: Sequence[Persona], language_model: str, device: str = "auto"
) -> dict[str, trait_scorer.TraitScorer]:
    """Return persona -> scorer; see `trait_scorer.load_scorers`. language_model: is not read."""
    return trait_scorer.load_scorers(names, personas, SENTENCE_ENCODER, device)


def scorer_key(persona: Persona, language_model: str) -> str:
    """Return what a persona's scorer depends on."""
    return trait_scorer.scorer_key(persona, SENTENCE_ENCODER)

"""Score a trait by a probe on hidden states of a packaged language model (phase 5).

It is another model than the target, see `encoders.independent_model`, and than the classifier's encoder.
"""

from collections.abc import Sequence

from scoring import trait_scorer
from texts.personas import Persona


def load_scorers(
    names: Sequence[str], personas: Sequence[Persona], language_model: str, device: str = "auto"
) -> dict[str, trait_scorer.TraitScorer]:
    """Return persona -> scorer; see `trait_scorer.load_scorers`. language_model: the packaged one."""
    return trait_scorer.load_scorers(names, personas, language_model, device)


def scorer_key(persona: Persona, language_model: str) -> str:
    """Return what a persona's scorer depends on."""
    return trait_scorer.scorer_key(persona, language_model)

"""Name the values that a configuration chooses from and that components check; imports nothing heavy.

The names of conditions are in `experiment.conditions`.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

LambdaUnit = Literal["absolute", "relative"]
LambdaCriterion = Literal["pooled", "standardised"]
Quantization = Literal["none", "8bit", "4bit"]
AlphaUnit = Literal["absolute", "residual_norm"]
PromptFormat = Literal["raw", "chat", "auto"]
# Three settings are easy to confuse. The first says at which tokens of a text the map's pairs are taken,
PairPositions = Literal["aligned", "last"]
# the second which tokens of a labelled text give its activation,
PersonaPosition = Literal["last", "mean", "response"]
# the third where the vector is added: also to the prompt, or from the prompt's last token on.
SteerPositions = Literal["all", "response"]

PROMPT_MAPS = "prompt_maps"  # the folder of the maps of vectors from prompts, in a run's
EMBEDDINGS = -1  # in the place of a decoder block: what enters the first one
FIRST_DAY = "2026-01-01"  # what templates are told that ask for today's date
LOWEST_TEMPERATURE = 1e-6  # below it, logits / temperature can overflow
LAMBDA_UNITS: tuple[str, ...] = get_args(LambdaUnit)
LAMBDA_CRITERIA: tuple[str, ...] = get_args(LambdaCriterion)
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
ALPHA_UNITS: tuple[str, ...] = get_args(AlphaUnit)
PAIR_POSITIONS: tuple[str, ...] = get_args(PairPositions)
PERSONA_POSITIONS: tuple[str, ...] = get_args(PersonaPosition)
STEER_POSITIONS: tuple[str, ...] = get_args(SteerPositions)


def model_name(given: str | Mapping[str, Any]) -> str:
    """Return the name of a model as config.json has it: a name, or an object that holds it."""
    return given if isinstance(given, str) else given["name"]

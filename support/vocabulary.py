"""The names that a configuration chooses from, each spelled once; imports nothing heavy."""

from typing import Literal, get_args

Transfer = Literal["zero_pad", "interpolate", "random_proj", "ridge_mapped", "oracle"]
MapKind = Literal["procrustes", "reduced_rank", "shuffled_pairs"]
# Other personas' mapped vectors: what steering by any such vector does to a trait that is not its own.
# A random direction of the same norm; and no vector at all, but the persona asked for in words.
Method = Literal[Transfer, MapKind, "other_persona", "random_direction", "prompted"]
LambdaUnit = Literal["absolute", "relative"]
LambdaCriterion = Literal["pooled", "standardised"]
Quantization = Literal["none", "8bit", "4bit"]
AlphaUnit = Literal["absolute", "residual_norm"]
# Three things that look alike: at which tokens of neutral text the pairs for the map are taken,
PairPositions = Literal["aligned", "last"]
# which tokens of a persona's text make its activation,
PersonaPosition = Literal["last", "mean", "response"]
# and where the vector is added while the target writes: also to the prompt, or from its last token on.
SteerPositions = Literal["all", "response"]
PromptFormat = Literal["raw", "chat", "auto"]

LOWEST_TEMPERATURE = 1e-6  # of sampling; below, logits / temperature can overflow
METHODS: tuple[str, ...] = get_args(Transfer)
MAP_KINDS: tuple[str, ...] = get_args(MapKind)
DRAWS = 3  # vectors of a control of which there are many; its texts take them in turn, prompt by prompt
DRAWN: tuple[Method, ...] = ("random_direction", "shuffled_pairs", "other_persona")
LAMBDA_UNITS: tuple[str, ...] = get_args(LambdaUnit)
LAMBDA_CRITERIA: tuple[str, ...] = get_args(LambdaCriterion)
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
ALPHA_UNITS: tuple[str, ...] = get_args(AlphaUnit)
PAIR_POSITIONS: tuple[str, ...] = get_args(PairPositions)
PERSONA_POSITIONS: tuple[str, ...] = get_args(PersonaPosition)
STEER_POSITIONS: tuple[str, ...] = get_args(SteerPositions)


def vector_names(method: str) -> tuple[str, ...]:
    """Return what `persona_vectors.pt` calls a method's vectors: one, or DRAWS of them."""
    return tuple(f"{method}_{draw + 1}" for draw in range(DRAWS)) if method in DRAWN else (method,)


def method_of(vector_name: str) -> str:
    """Return the method that a vector of this name belongs to."""
    return next((method for method in DRAWN if vector_name in vector_names(method)), vector_name)

"""Train the scorers of the shipped personas, and write what ships: their numbers and their validation scores.

    python -m scoring.train [ENCODER ...]

Writes `scoring/trained/` anew, in about an hour on two cores, or what belongs to the named encoders. A run
whose personas have other labelled texts trains scorers of its own on the same encoders; see
`scoring.trait_scorer`.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from scoring.encoders import ENCODERS, TRAINED_FOLDER, encoder, tuned_file
from scoring.training_texts import natural_rows
from scoring.trait_scorer import save_scorers, scorer_key, train_scorers, trained_file
from scoring.tune_encoder import tune
from scoring.validation import shared_validation_texts, texts_of, validation_scores_name, validation_sets
from texts.personas import load_persona, shipped_personas

DIGITS = 4  # of a stored score, significant ones: decimals would make equal what is near 0


def write_trained(encoder_name: str, folder: Path = TRAINED_FOLDER) -> None:
    """Write the shipped personas' scorers on the features of an encoder, and their validation scores."""
    personas = list(map(load_persona, shipped_personas()))
    scorers = train_scorers(shipped_personas(), natural_rows(personas), encoder(encoder_name))
    keys = {persona.name: scorer_key(persona, encoder_name) for persona in personas}
    save_scorers(trained_file(encoder_name, folder), keys, scorers)
    for persona in personas:
        texts = texts_of(validation_sets(persona, *shared_validation_texts(persona)))
        scores = [float(f"{score:.{DIGITS}g}") for score in scorers[persona.name].score(texts)]
        path = folder / f"{validation_scores_name(keys[persona.name], texts)}.json"
        path.write_text(json.dumps(scores), encoding="utf-8")


def main() -> None:
    """Write everything anew."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)
    for name in sys.argv[1:] or ENCODERS:
        save_file(tune(name), tuned_file(name))
        write_trained(name)


if __name__ == "__main__":
    main()

"""Train the scorers of the shipped personas, and write what ships: their numbers and their validation scores.

    python -m scoring.train

Writes `scoring/trained/` anew, in ten minutes on two cores. A run whose personas have other texts than these
trains scorers of its own; see `scoring.trait_scorer`.
"""

import json
from pathlib import Path

from scoring.encoders import ENCODERS, encoder
from scoring.trait_scorer import (
    TRAINED_FOLDER,
    ordinary_texts,
    save_scorers,
    scorer_key,
    train_scorers,
    trained_file,
)
from scoring.validation import shared_validation_texts, texts_of, validation_scores_name, validation_sets
from texts.personas import load_persona, shipped_personas

DIGITS = 4  # of a stored score


def write_trained(encoder_name: str, folder: Path = TRAINED_FOLDER) -> None:
    """Write the shipped personas' scorers on the features of an encoder, and their validation scores."""
    personas = list(map(load_persona, shipped_personas()))
    scorers = train_scorers(shipped_personas(), personas, encoder(encoder_name), ordinary_texts())
    keys = {persona.name: scorer_key(persona, encoder_name) for persona in personas}
    save_scorers(trained_file(encoder_name, folder), keys, scorers)
    for persona in personas:
        texts = texts_of(validation_sets(persona, *shared_validation_texts(persona)))
        scores = [round(score, DIGITS) for score in scorers[persona.name].score(texts)]
        path = folder / f"{validation_scores_name(keys[persona.name], texts)}.json"
        path.write_text(json.dumps(scores), encoding="utf-8")


def main() -> None:
    """Write everything anew."""
    for path in TRAINED_FOLDER.glob("*"):
        path.unlink()
    for name in ENCODERS:
        print(f"training on features of {name}", flush=True)
        write_trained(name)


if __name__ == "__main__":
    main()

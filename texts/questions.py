"""Load short questions with one right continuation of four, which measure what steering costs (phase 5)."""

from dataclasses import dataclass
from pathlib import Path

from support.text_files import parse_json, read_text

PATH = Path(__file__).parents[1] / "prompts" / "capability.json"
N_QUESTIONS = 120  # in the file


@dataclass(frozen=True)
class Question:
    """Hold a text prefix and its continuations; kind: everyday, science, sense, language or arithmetic."""

    kind: str
    text: str
    continuations: tuple[str, ...]
    right: str


def load_questions(n: int = N_QUESTIONS) -> list[Question]:
    """Return the first n questions; kinds and places of the right continuation alternate in their order."""
    rows = parse_json(read_text(PATH), PATH.name)["questions"]
    return [Question(**{**row, "continuations": tuple(row["continuations"])}) for row in rows[:n]]

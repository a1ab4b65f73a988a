"""Write a persona file from a sentence, for a person to edit.

    python make_persona.py "speaks like a pirate" --local smollm2-135m-instruct
    python make_persona.py "speaks like a pirate" --model gpt-4o   # or any server with --base-url

A model writes matched pairs, system prompts for and against the trait, and questions. What is not fit is
left out and counted: pairs that differ in content, length or final punctuation, duplicates, texts that name
the trait, and whatever shares words with the test prompts. A configuration takes the file as
`persona_datasets`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiment.command_line import refusal
from support.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trait", help="a sentence, for example 'speaks like a pirate'")
    parser.add_argument("--name", help="of the persona; by default made of the sentence")
    parser.add_argument("--output", type=Path, help="by default <name>.json in this folder")
    parser.add_argument("--n-pairs", type=int, default=24)
    parser.add_argument("--n-questions", type=int, default=20)
    parser.add_argument("--model", default="gpt-4o", help="name at the server")
    parser.add_argument("--base-url", help="of an OpenAI-compatible server")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY")
    parser.add_argument("--local", help="instruct model that is loaded here instead of asking a server")
    options = parser.parse_args(arguments)
    from tools.persona_writer import ask_local, ask_server, write_persona

    try:
        if options.local:
            ask = ask_local(options.local)
        else:
            ask = ask_server(options.model, options.base_url, options.api_key_env)
        counts = options.n_pairs, options.n_questions
        print(write_persona(options.trait, ask, options.name, options.output, *counts))
    except (InputError, OSError, KeyboardInterrupt) as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write a steering vector of a finished run for another tool.

    python export_vectors.py --run results/gemma_to_smol_chat --persona formal --method ridge_mapped --format
    gguf

gguf is a control vector for llama.cpp and repeng (`llama-cli --control-vector FILE`); safetensors and pt
hold the same with what is known of it. Strength 1 adds what the run's verdict compares.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiment.command_line import refusal
from support.errors import InputError
from support.vector_files import FORMATS
from tools.vector_export import export_vector


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output_dir of a finished run")
    parser.add_argument("--persona", required=True)
    parser.add_argument("--method", default="ridge_mapped", help="for example ridge_mapped or oracle")
    parser.add_argument("--format", choices=FORMATS, default="gguf")
    parser.add_argument("--output", type=Path, help="file to write; by default beside the run's artifacts")
    parser.add_argument("--alpha", type=float, help="the dose at strength 1, instead of the run's")
    options = parser.parse_args(arguments)
    try:
        given = options.run, options.persona, options.method, options.format, options.output, options.alpha
        print(export_vector(*given))
    except (InputError, OSError) as error:
        return refusal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

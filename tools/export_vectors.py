"""Write a steering vector of a finished run for another tool.

    python -m tools.export_vectors --run results/gemma_to_smol --persona formal --method ridge_mapped

A .gguf file is a control vector for llama.cpp and repeng (`llama-cli --control-vector FILE`); .safetensors
and .pt files hold the same vectors with metadata. Strength 1 of the file steers as the run's verdict does.
With `--format lm-eval`, the file is what `lm_eval --model steered` takes as steer_path.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.command_line import exit_status
from experiment.conditions import condition_of
from model_loading import blocks_in_base
from support.artifacts import load_json, load_tensors
from support.errors import InputError, shown
from support.run_folder import load_finished
from support.text_files import file_name
from support.vector_files import FORMATS, LM_EVAL, write_hookpoints, write_vectors
from support.vocabulary import PROMPT_MAPS, model_name

VECTORS = "persona_vectors.pt"


def export_vector(
    folder: Path, persona: str, method: str, form: str, output: Path | None = None, alpha: float | None = None
) -> Path:
    """Write a vector of a run to a file for another tool, and return its path.

    method: name of the vector in `persona_vectors.pt`. form: gguf, safetensors, pt or lm-eval. output: by
    default `<persona>_<method>.<form>` in the run's folder, with `.pt` behind lm-eval. alpha: steering
    strength at strength 1 of the file, by default the verdict's.
    Raises InputError: no finished run, an unknown persona, method, format or alpha, or layer 0 as GGUF.
    """
    _check_has("format", form, (*FORMATS, LM_EVAL))
    config, verdict = load_finished(folder, "config.json", "verdict.json", others=(VECTORS,))
    content = load_tensors(folder / VECTORS)
    _check_has(f"{folder}: persona", persona, content["vectors"])
    _check_has(f"{folder}: method", method, content["vectors"][persona])
    decided = verdict["personas"].get(persona, {})
    if alpha is None:
        alpha = decided.get("alphas", {}).get(condition_of(method))
    if alpha is None:
        raise InputError(f"{folder} has no alpha for {persona}, {method}; give one with --alpha")
    is_relative = config["alpha_unit"] == "residual_norm"
    units = [norm["median"] if is_relative else 1.0 for norm in content["residual_norms"]]
    directions = {
        target: alpha * unit * vector
        for (_, target), unit, vector in zip(
            content["layer_pairs"], units, content["vectors"][persona][method], strict=True
        )
    }
    path = output or folder / file_name(f"{persona}_{method}.{form}" + (".pt" if form == LM_EVAL else ""))
    if form == LM_EVAL:
        write_hookpoints(path, directions, _blocks_of(config))
        return path
    is_of_prompts = content.get("kinds", {}).get(persona) == "prompt"
    metadata = {
        "persona": persona,
        "method": method,
        "alpha": alpha,
        "alpha_unit": config["alpha_unit"],
        "layer_pairs": content["layer_pairs"],
        "maps_by_target_layer": _describe_maps(
            folder / PROMPT_MAPS if is_of_prompts else folder, content["layer_pairs"]
        ),
        "verdict": decided.get("verdict", ""),
        "recovery_by_scorer": {
            name: scorer["recovery"]
            for name, scorer in decided.get("scorers", {}).items()
            if scorer.get("recovery")
        },
        "models": content["models"],
        "fingerprint": content["fingerprint"],
    }
    write_vectors(path, form, directions, content["models"]["target"]["model_type"], metadata)
    return path


def _check_has(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise InputError(f"{what} {shown(name)} is unknown; choose {', '.join(known)}")


def _blocks_of(config: Mapping[str, Any]) -> str:
    """Return where lm-evaluation-harness finds the target's blocks."""
    options = {"trust_remote_code": config.get("trust_remote_code", False)}
    options |= {"revision": revision} if (revision := config.get("target_revision")) else {}
    return blocks_in_base(model_name(config["target_model"]), config.get("target_block_path"), **options)


def _describe_maps(folder: Path, layer_pairs: Sequence[tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """Return target layer -> lambda and held-out R2 of its map."""
    maps = {}
    for index, (source, target) in enumerate(layer_pairs):
        is_middle = index == len(layer_pairs) // 2  # its maps are in the folder itself
        place = folder if is_middle else folder / "layers" / f"{source}_{target}"
        cv = load_json(place / "cv_results.json")
        maps[str(target)] = {"lambda": cv["best_lambda"], "r2": cv["best_r2"]}
    return maps


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.export_vectors", description=about)
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="output_dir of a finished run")
    parser.add_argument("--persona", required=True)
    parser.add_argument("--method", default="ridge_mapped", help="for example ridge_mapped or oracle")
    parser.add_argument("--format", dest="form", choices=(*FORMATS, LM_EVAL), default="gguf")
    parser.add_argument("--output", type=Path, help="file to write; by default beside the run's artifacts")
    parser.add_argument("--alpha", type=float, help="steering strength at strength 1, instead of the run's")
    options = parser.parse_args(arguments)
    return exit_status(lambda: export_vector(**vars(options)))


if __name__ == "__main__":
    sys.exit(main())

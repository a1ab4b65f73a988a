"""Take a finished run's steering vector along, scaled to the run's dose; see `export_vectors.py`."""

from pathlib import Path
from typing import Any

from torch import Tensor

from phases.make_vectors import SteeringVectors
from support.artifacts import load_json, load_tensors
from support.errors import InputError, shown
from support.vector_files import FORMATS, write_vectors
from support.vocabulary import method_of

NEEDED = ("config.json", "persona_vectors.pt", "verdict.json")


def export_vector(
    folder: Path, persona: str, method: str, form: str, output: Path | None = None, alpha: float | None = None
) -> Path:
    """Write a vector of a run to a file that another tool reads, and return its path.

    form: gguf, safetensors or pt. output: by default `<persona>_<method>.<form>` in the run's folder. alpha:
    the dose, by default the one at which the verdict compares; strength 1 of the file adds it.
    Raises InputError: a folder that is no finished run, a persona, method or format that it lacks, a dose
    that is not known, or layer 0 as GGUF.
    """
    if form not in FORMATS:
        raise InputError(f"format is {shown(form)}, expected one of {', '.join(FORMATS)}")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is no finished run: {missing[0]} is missing; name its output_dir")
    config, verdict = (load_json(folder / name) for name in ("config.json", "verdict.json"))
    content = load_tensors(folder / "persona_vectors.pt")
    if "models" not in content:
        raise InputError(
            f"{folder}/persona_vectors.pt is of an earlier version; delete it and run the experiment again, "
            "which keeps its texts"
        )
    vectors = content["vectors"]
    _check_has(folder, "persona", persona, list(vectors))
    _check_has(folder, "method", method, list(vectors[persona]))
    judged = verdict["personas"].get(persona, {})
    dose = alpha if alpha is not None else judged.get("alphas", {}).get(method_of(method))
    if dose is None:
        raise InputError(f"{folder} has no dose for {persona}, {method}; give one with --alpha")
    steering = SteeringVectors.from_content(content)
    units = steering.medians if config["alpha_unit"] == "residual_norm" else [1.0] * len(steering.norms)
    layers = [target for _, target in content["layer_pairs"]]
    directions: dict[int, Tensor] = {
        layer: dose * unit * vector
        for layer, unit, vector in zip(layers, units, steering.vectors[persona][method], strict=True)
    }
    path = output or folder / f"{persona}_{method}.{form}"
    target = content["models"]["target"]
    known = _metadata(folder, content, config, judged, persona, method, dose)
    write_vectors(path, form, directions, target["model_type"], known)
    return path


def _check_has(folder: Path, what: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise InputError(
            f"{folder} has no {what} {shown(name)}, only {', '.join(known)}; choose one of these"
        )


def _metadata(
    folder: Path,
    content: dict[str, Any],
    config: dict[str, Any],
    judged: dict[str, Any],
    persona: str,
    method: str,
    dose: float,
) -> dict[str, Any]:
    """Return what is known of a vector, as plain values."""
    maps = {}
    for source, target in content["layer_pairs"]:
        for place in (folder / "layers" / f"{source}_{target}", folder):
            if (place / "cv_results.json").is_file():
                cv = load_json(place / "cv_results.json")
                maps[str(target)] = {"lambda": cv["best_lambda"], "r2": cv["best_r2"]}
                break
    return {
        "persona": persona,
        "method": method,
        "alpha": dose,
        "alpha_unit": config["alpha_unit"],
        "layer_pairs": content["layer_pairs"],
        "maps_by_target_layer": maps,
        "verdict": judged.get("verdict", ""),
        "recovery_by_scorer": {
            scorer: decided["recovery"]
            for scorer, decided in judged.get("scorers", {}).items()
            if decided.get("recovery")
        },
        "models": content["models"],
        "fingerprint": content["fingerprint"],
    }


def main() -> None:
    """Check that a folder that is no run is refused."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            export_vector(Path(folder), "formal", "oracle", "gguf")
        except InputError as error:
            print("vector_export OK:", str(error).rpartition("/")[2])


if __name__ == "__main__":
    main()

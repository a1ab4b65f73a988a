"""A run's vector leaves it at the strength of the verdict; what a folder does not have is not exported."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_runs import error_lines, run, tiny_settings

from ridge_mapping import RidgeMapping
from support.artifacts import load_json, load_tensors, save_json, save_tensors, sealed
from support.vector_files import FORMATS, read_vectors
from tools import export_vectors

LAYER_PAIRS = [[3, 1], [6, 2], [9, 4]]
MEDIANS = [2.0, 5.0, 7.0]
VECTORS = {"loud": {"ridge_mapped": torch.randn(3, 8), "random_direction_1": torch.randn(3, 8)}}
MODEL = {"name": "tiny", "model_type": "gpt2", "n_blocks": 6, "d_model": 8, "fingerprint": "m"}


def finished_run(folder, n_pairs=3, alpha_unit="residual_norm"):
    """Write of a finished run what is exported: one layer pair, or a band of three."""
    pairs = LAYER_PAIRS[:n_pairs]
    vectors = {name: vector[:n_pairs] for name, vector in VECTORS["loud"].items()}
    content = {
        "fingerprint": "f",
        "layer_pairs": pairs,
        "vectors": {"loud": vectors},
        "residual_norms": [
            {"median": median, "median_with_massive": 9.0, "massive_dimensions": []}
            for median in MEDIANS[:n_pairs]
        ],
        "models": {"source": MODEL, "target": MODEL},
    }
    alphas = {"ridge_mapped": 0.5, "random_direction": 0.25}
    scorers = {"classifier": {"recovery": {"ratio": 0.9}}, "judge": {"recovery": None}}
    verdict = {"verdict": "partial transfer", "alphas": alphas, "scorers": scorers}
    folder.mkdir()
    save_tensors(folder / "persona_vectors.pt", content)
    save_json(folder / "config.json", sealed({"alpha_unit": alpha_unit}))
    save_json(folder / "verdict.json", sealed({"personas": {"loud": verdict}}))
    for index, (source, target) in enumerate(pairs):
        place = folder if index == n_pairs // 2 else folder / "layers" / f"{source}_{target}"
        place.mkdir(parents=True, exist_ok=True)
        save_json(place / "cv_results.json", sealed({"best_lambda": 10.0**index, "best_r2": 0.5}))
    return folder


def export(folder, output, *more):
    given = ["--run", str(folder), "--persona", "loud", "--output", str(output)]
    return export_vectors.main([*given, "--format", output.suffix[1:], *more])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("n_pairs", [1, 3])
@pytest.mark.parametrize(
    ("alpha_unit", "options", "name", "alpha"),
    [
        ("residual_norm", [], "ridge_mapped", 0.5),
        ("absolute", ["--method", "random_direction_1"], "random_direction_1", 0.25),
        ("absolute", ["--alpha", "3"], "ridge_mapped", 3.0),
    ],
)
def test_strength_1_is_the_alpha_of_the_verdict_at_each_block(
    tmp_path, capsys, form, n_pairs, alpha_unit, options, name, alpha
):
    path = tmp_path / f"loud.{form}"
    assert export(finished_run(tmp_path / "run", n_pairs, alpha_unit), path, *options) == 0
    assert capsys.readouterr().out.strip() == str(path)
    found = read_vectors(path)
    assert found.model_hint == "gpt2"
    assert list(found.by_layer) == [target for _, target in LAYER_PAIRS[:n_pairs]]
    for vector, expected, median in zip(
        found.by_layer.values(), VECTORS["loud"][name], MEDIANS, strict=False
    ):
        unit = median if alpha_unit == "residual_norm" else 1.0
        assert torch.allclose(vector, alpha * unit * expected)


def test_metadata_name_the_run_and_the_map_of_each_layer(tmp_path):
    assert export(finished_run(tmp_path / "run"), tmp_path / "loud.safetensors") == 0
    with safe_open(tmp_path / "loud.safetensors", "pt") as file:
        known = {key: json.loads(value) for key, value in file.metadata().items() if key != "model_hint"}
    assert known["layer_pairs"] == LAYER_PAIRS
    assert {layer: of_map["lambda"] for layer, of_map in known["maps_by_target_layer"].items()} == {
        "1": 1.0,
        "2": 10.0,
        "4": 100.0,
    }
    assert (known["alpha"], known["alpha_unit"]) == (0.5, "residual_norm")
    assert (known["verdict"], known["fingerprint"]) == ("partial transfer", "f")
    assert known["recovery_by_scorer"] == {"classifier": {"ratio": 0.9}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--persona", "calm"], "persona 'calm' is unknown; choose loud"),
        (["--method", "magic"], "method 'magic' is unknown; choose ridge_mapped, random_direction_1"),
    ],
)
def test_what_a_run_does_not_have_is_not_exported(change, message, tmp_path, capsys):
    assert export(finished_run(tmp_path / "run"), tmp_path / "x.gguf", *change) == 2
    assert message in error_lines(capsys)[0]
    assert not (tmp_path / "x.gguf").exists()


def test_a_vector_without_an_alpha_needs_one_on_the_command_line(tmp_path, capsys):
    folder = finished_run(tmp_path / "run")
    save_json(folder / "verdict.json", sealed({"personas": {}}))
    assert export(folder, tmp_path / "x.gguf") == 2
    assert "has no alpha for loud, ridge_mapped; give one with --alpha" in error_lines(capsys)[0]
    assert export(folder, tmp_path / "x.gguf", "--alpha", "0.1") == 0


def test_a_folder_that_is_no_run_exports_nothing(tmp_path, capsys):
    assert export_vectors.main(["--run", str(tmp_path), "--persona", "loud"]) == 2
    assert "is no finished run: config.json is missing" in error_lines(capsys)[0]
    assert not list(tmp_path.iterdir())


def test_a_finished_run_exports_its_mapped_vector_and_its_map_names_layers_and_models(
    model_folders, tmp_path
):
    out = tmp_path / "out"
    assert run(out, {**tiny_settings(model_folders, tmp_path), "alpha_unit": "residual_norm"}) == 0
    assert export(out, tmp_path / "loud.gguf") == 0
    content = load_tensors(out / "persona_vectors.pt")
    alpha = load_json(out / "verdict.json")["personas"]["loud"]["alphas"]["ridge_mapped"]
    expected = alpha * content["residual_norms"][0]["median"] * content["vectors"]["loud"]["ridge_mapped"][0]
    assert torch.allclose(read_vectors(tmp_path / "loud.gguf").by_layer[2], expected.float())
    ridge = RidgeMapping.load(out / "ridge_mapping.pt")
    assert (ridge.source_layer, ridge.target_layer) == (1, 2)
    assert [ridge.source_model, ridge.target_model] == list(model_folders.values())


def test_a_persona_that_is_called_like_a_path_stays_in_the_folder(tmp_path, capsys):
    folder, persona = finished_run(tmp_path / "run"), "../../x"
    content = load_tensors(folder / "persona_vectors.pt")
    content["vectors"][persona] = content["vectors"]["loud"]
    save_tensors(folder / "persona_vectors.pt", content)
    options = ["--run", str(folder), "--persona", persona, "--format", "pt", "--alpha", "1"]
    assert export_vectors.main(options) == 0
    (written,) = set(folder.glob("*x_ridge_mapped.pt"))
    assert capsys.readouterr().out.strip() == str(written)
    assert not [path for path in tmp_path.iterdir() if path != folder]

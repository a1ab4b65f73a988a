"""A run's vector leaves it at the strength of the verdict; what a folder does not have is not exported."""

import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open
from tiny_runs import error_lines

from evaluation import continuation_perplexities
from model_loading import load_model
from ridge_mapping import RidgeMapping
from steered_generation import SteeredGenerator
from support.artifacts import load_json, load_tensors, save_json, save_tensors, sealed
from support.vector_files import FORMATS, read_vectors
from texts.encoding import encode_continuations
from tools import export_vectors


def export(folder, output, *more):
    given = ["--run", str(folder), "--persona", "loud", "--output", str(output)]
    return export_vectors.main([*given, "--format", output.suffix[1:], *more])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("alpha_unit", ["absolute", "residual_norm"])
@pytest.mark.parametrize(
    ("vector", "condition", "options"),
    [
        ("ridge_mapped", "ridge_mapped", []),
        ("shuffled_pairs_2", "shuffled_pairs", ["--method", "shuffled_pairs_2"]),
        ("oracle", None, ["--method", "oracle", "--alpha", "3"]),
    ],
)
def test_strength_1_is_the_alpha_of_the_verdict_at_each_block(
    form, alpha_unit, vector, condition, options, finished_band, tmp_path, capsys
):
    folder, path = shutil.copytree(finished_band, tmp_path / "run"), tmp_path / f"loud.{form}"
    save_json(folder / "config.json", sealed({"alpha_unit": alpha_unit}))
    assert export(folder, path, *options) == 0
    assert capsys.readouterr().out.strip() == str(path)
    content, found = load_tensors(folder / "persona_vectors.pt"), read_vectors(path)
    assert found.model_hint == "gpt2"
    assert list(found.by_layer) == [1, 3]
    alpha = load_json(folder / "verdict.json")["personas"]["loud"]["alphas"].get(condition, 3.0)
    for exported, expected, norm in zip(
        found.by_layer.values(), content["vectors"]["loud"][vector], content["residual_norms"], strict=True
    ):
        unit = norm["median"] if alpha_unit == "residual_norm" else 1.0
        assert torch.allclose(exported, alpha * unit * expected.float())


def test_lm_eval_steers_as_we_do(finished_band, band, tmp_path):
    """Log-likelihoods under its steering are ours, and differ from unsteered ones."""
    path = tmp_path / "loud.pt"
    options = ["--run", str(finished_band), "--persona", "loud", "--output", str(path)]
    assert export_vectors.main([*options, "--format", "lm-eval"]) == 0
    assert list(torch.load(path, weights_only=True)) == ["h.1", "h.3"]
    reason = "lm-evaluation-harness is not installed: pip install lm-eval"
    steered = pytest.importorskip("lm_eval.models.hf_steered", reason=reason)
    from lm_eval.api.instance import Instance

    asked = [("The sea is", " blue and wide."), ("Rain", " falls on the old roof."), ("He", " no")]
    model, tokenizer = load_model(band["target_model"])
    options = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    theirs = steered.SteeredModel(band["target_model"], str(path), **options)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    found = [likelihood for likelihood, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    encoded = encode_continuations(tokenizer, asked)

    def likelihoods():
        values = continuation_perplexities(model, tokenizer, *zip(*asked, strict=True), is_steered=True)
        lengths = [len(tokens) - start for tokens, start in encoded]
        return [-math.log(value) * n for value, n in zip(values, lengths, strict=True)]

    plain = likelihoods()
    content = load_tensors(finished_band / "persona_vectors.pt")
    norms = {layer: norm["median"] for layer, norm in zip((1, 3), content["residual_norms"], strict=True)}
    alpha = load_json(finished_band / "verdict.json")["personas"]["loud"]["alphas"]["ridge_mapped"]
    unit = band.get("alpha_unit", "absolute")
    with SteeredGenerator(model, tokenizer, alpha_unit=unit, residual_norms=norms) as generator:
        for layer, vector in zip((1, 3), content["vectors"]["loud"]["ridge_mapped"], strict=True):
            generator.register_steering(layer, vector, alpha)
        assert found == pytest.approx(likelihoods(), rel=1e-4)
    assert found != pytest.approx(plain, rel=1e-2)


def test_metadata_name_the_run_and_the_map_of_each_layer(finished_band, tmp_path):
    assert export(finished_band, tmp_path / "loud.safetensors") == 0
    with safe_open(tmp_path / "loud.safetensors", "pt") as file:
        known = {key: json.loads(value) for key, value in file.metadata().items() if key != "model_hint"}
    assert known["layer_pairs"] == [[0, 1], [2, 3]]
    for layer, place in (("1", "layers/0_1"), ("3", ".")):
        cv = load_json(finished_band / place / "cv_results.json")
        assert known["maps_by_target_layer"][layer] == {"lambda": cv["best_lambda"], "r2": cv["best_r2"]}
    decided = load_json(finished_band / "verdict.json")["personas"]["loud"]
    assert (known["alpha"], known["verdict"]) == (decided["alphas"]["ridge_mapped"], decided["verdict"])
    assert known["fingerprint"] == load_tensors(finished_band / "persona_vectors.pt")["fingerprint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--persona", "calm"], "persona 'calm' is unknown; choose loud, numeric"),
        (["--method", "magic"], "method 'magic' is unknown; choose "),
        (
            ["--method", "random_direction_1"],
            "has no alpha for loud, random_direction_1; give one with --alpha",
        ),
        (["--run", "nowhere"], "is no finished run: config.json is missing"),
    ],
)
def test_what_a_run_does_not_have_is_not_exported(change, message, finished, tmp_path, capsys):
    assert export(finished, tmp_path / "x.gguf", *change) == 2
    assert message in error_lines(capsys)[0]
    assert not (tmp_path / "x.gguf").exists()


def test_the_map_of_a_run_names_its_layers_and_models(model_folders, finished):
    ridge = RidgeMapping.load(finished / "ridge_mapping.pt")
    assert (ridge.source_layer, ridge.target_layer) == (1, 2)
    assert [ridge.source_model, ridge.target_model] == list(model_folders.values())


def test_a_persona_that_is_called_like_a_path_stays_in_the_folder(finished, tmp_path, capsys):
    folder, persona = shutil.copytree(finished, tmp_path / "run"), "../../x"
    content = load_tensors(folder / "persona_vectors.pt")
    content["vectors"][persona] = content["vectors"]["loud"]
    save_tensors(folder / "persona_vectors.pt", content)
    options = ["--run", str(folder), "--persona", persona, "--format", "pt", "--alpha", "1"]
    assert export_vectors.main(options) == 0
    (written,) = set(folder.glob("*x_ridge_mapped.pt"))
    assert capsys.readouterr().out.strip() == str(written)
    assert not [path for path in tmp_path.iterdir() if path != folder]

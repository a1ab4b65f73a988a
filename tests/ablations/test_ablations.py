"""Ablations of layers, samples and blocks: what they compare, and that a second run makes nothing."""

from itertools import product

import pytest
import torch
from matplotlib.figure import Figure
from tiny_runs import artifacts, is_close, rows, run

from ablations import blocks, layers, samples
from ablations.samples import POSITIONS
from run_experiment import PersonaTransferExperiment
from support.artifacts import load_json
from support.errors import InputError
from support.journal import rows_of
from support.run_folder import RunFolder
from texts.personas import load_prompts

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    for module, name in ((blocks, "block"), (layers, "layer"), (samples, "sample")):
        monkeypatch.setattr(module, f"{name}_ablation_figure", lambda *arguments: Figure(figsize=(1, 1)))


def contents(folder):
    return artifacts(folder), {path: path.read_bytes() for path in folder.rglob("*.jsonl")}


def test_layers_are_compared_on_development_prompts_and_once(tiny, tmp_path):
    out = tmp_path / "out"
    settings = {
        **tiny,
        "ablation_layer_pairs": [[0, 3], [2, 1]],
        "methods": ["ridge_mapped", "shuffled_pairs"],
    }
    assert run(out, settings, "--ablate", "layers") == 0
    found = load_json(out / "ablation_layers.json")["layer_pairs"]
    assert [(entry["source_layer"], entry["target_layer"]) for entry in found] == [(0, 3), (2, 1)]
    assert found[0]["best_r2"] != found[1]["best_r2"]
    for entry in found:
        conditions = {(row["condition"], row["alpha"]) for row in entry["conditions"]}
        assert conditions == {("baseline", None), ("ridge_mapped", 1.0), ("shuffled_pairs", 1.0)}
    for name in ("0_3", "2_1"):
        asked = {row["prompt"] for row in rows(out / "ablation_layers" / name)}
        assert asked == set(load_prompts("development"))
    assert (out / "figure2.png").exists()
    before = contents(out)
    assert run(out, settings, "--ablate", "layers") == 0
    assert contents(out) == before


def test_amounts_of_text_are_compared_and_a_stopped_run_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "N_HELD_OUT", 20)
    settings = {**tiny, "ablation_samples": [30, 60, 90]}
    assert run(tmp_path / "whole", settings, "--ablate", "samples") == 0
    whole = load_json(tmp_path / "whole" / "ablation_samples.json")
    found = [(point["n_texts"], point["positions"]) for point in whole["points"]]
    assert found == list(product((30, 60, 90), ("last", "aligned")))
    assert [point["n_pairs"] for point in whole["points"]][::2] == [30, 60, 90]

    save, n_saved = RunFolder.save, 0

    def stopping(folder, name, *arguments):
        nonlocal n_saved
        n_saved += name == "ablation_samples.pt"
        if n_saved == 4:
            raise KeyboardInterrupt
        return save(folder, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stopping)
        assert run(tmp_path / "stopped", settings, "--ablate", "samples") == 130
    read, paired = [], samples.paired_activations

    def reading(source, target, texts):
        texts = list(texts)
        read.extend(texts)
        return paired(source, target, texts)

    monkeypatch.setattr(samples, "paired_activations", reading)
    assert run(tmp_path / "stopped", settings, "--ablate", "samples") == 0
    assert len(read) < 90
    assert is_close(load_json(tmp_path / "stopped" / "ablation_samples.json"), whole)


def test_a_map_of_responses_is_fitted_on_more_and_more_of_them(band, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "N_HELD_OUT", 20)
    settings = {**band, "ablation_samples": [20, 40], "max_new_tokens": 8}
    assert run(tmp_path / "out", settings, "--ablate", "samples") == 0
    found = load_json(tmp_path / "out" / "ablation_samples.json")
    last, aligned = ([point for point in found["points"] if point["positions"] == name] for name in POSITIONS)
    assert [point["n_pairs"] for point in last] == [20, 40]
    responses = rows_of(tmp_path / "out" / "responses_target_journal.jsonl").values()
    assert len(responses) == 60
    # What stands before a response gives no pairs.
    assert 40 < aligned[1]["n_pairs"] <= sum(len(row["output"]) for row in responses)
    assert found["layers"] == [2, 3]
    state = torch.load(tmp_path / "out" / "ablation_samples.pt", weights_only=True)
    assert (state["layer_pairs"], state["models"]["source"]["name"]) == ([[2, 3]], band["source_model"])


def test_amounts_of_text_need_fast_tokenizers(tiny, tmp_path, monkeypatch):
    experiment = PersonaTransferExperiment({**tiny, "output_dir": str(tmp_path / "out")})
    monkeypatch.setattr(type(experiment.inputs.target.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="needs fast tokenizers on both sides"):
        experiment.ablate("samples")


def test_more_and_more_blocks_are_steered_at_the_native_vectors_alpha(tiny, tmp_path):
    out = tmp_path / "out"
    unbounded = {"max_perplexity_ratio": 1e6, "max_repetition_increase": 1, "max_non_words_increase": 1}
    settings = {**tiny, "methods": ["shuffled_pairs", "oracle"], "alpha_unit": "residual_norm"}
    settings["alpha_search"] = {"n_evaluations": 2, "n_seeds": 1, **unbounded}
    assert run(out, settings, "--ablate", "blocks") == 0
    points = load_json(out / "ablation_blocks.json")["points"]
    cells = product(([1], [0, 1, 2], [0, 1, 2, 3]), ("loud", "numeric"), ("shuffled_pairs", "oracle"))
    found = [(point["target_layers"], point["persona"], point["method"]) for point in points]
    assert found == list(cells)
    for point in points:
        # Every text is within the bound, so that the strongest alpha is found, which a band shares.
        assert point["alpha"] == pytest.approx(2.0 / len(point["target_layers"]))
        assert point["perplexity_ratio"] > 0
    assert (out / "figure4.png").exists()
    before = contents(out)
    assert run(out, settings, "--ablate", "blocks") == 0
    assert contents(out) == before


@pytest.mark.parametrize("flags", [("--phase", "2"), ("--dry-run",)])
def test_an_ablation_runs_instead_of_the_phases(flags, tiny, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", tiny, "--ablate", "layers", *flags)

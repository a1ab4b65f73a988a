"""What the texts of a run were steered with, and at which strength."""

import math
from itertools import product
from statistics import fmean

import pytest
import torch
from tiny_runs import LOUD, N_PROMPTS, N_SEEDS, NUMERIC, rows, run, visible_files

from baseline_methods import METHODS
from evaluation import continuation_perplexities
from experiment.conditions import vector_names
from experiment.run import Run
from model_loading import load_model
from phases.choose_alphas import trait_costs
from run_experiment import PersonaTransferExperiment
from steered_generation import SteeredGenerator
from support.artifacts import load_json, load_tensors, save_tensors
from support.journal import rows_of
from texts.personas import load_prompts

pytestmark = pytest.mark.usefixtures("no_drawing")
N_PER_CELL = N_PROMPTS * N_SEEDS
# The tensor files that are of all layer pairs.
OF_ALL = {"native_vectors.pt", "persona_vectors.pt", "resampled_vectors.pt"}


def outputs(folder):
    return [row["output"] for row in rows(folder)]


def steered_by_hand(settings, folder, chosen):
    """Return the texts of rows that are steered by the folder's vectors, one at a time."""
    content, found = load_tensors(folder / "persona_vectors.pt"), []
    model, tokenizer = load_model(settings["target_model"])
    norms = {
        target: norm["median"]
        for (_, target), norm in zip(content["layer_pairs"], content["residual_norms"], strict=True)
    }
    unit = settings.get("alpha_unit", "absolute")
    for row in chosen:
        vectors = content["vectors"][row["persona"]][row["vector"]]
        with SteeredGenerator(model, tokenizer, alpha_unit=unit, residual_norms=norms) as generator:
            for (_, layer), vector in zip(content["layer_pairs"], vectors, strict=True):
                generator.register_steering(layer, vector, row["alpha"])
            shown = row["prompt"]
            if "system_prompt" in settings:
                turns = (("system", settings["system_prompt"]), ("user", shown))
                chat = [{"role": role, "content": text} for role, text in turns]
                shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            found.append(generator.generate(shown, settings["max_new_tokens"], seed=row["seed"]))
    return found


def test_texts_are_those_of_the_stored_vectors_at_all_blocks(tiny, finished, band, finished_band):
    for settings, folder, nth in ((tiny, finished, N_PER_CELL - 1), (band, finished_band, 5)):
        chosen = [row for row in rows(folder) if row["alpha"]][::nth]
        assert {row["condition"] for row in chosen} == set(settings.get("methods", METHODS))
        assert steered_by_hand(settings, folder, chosen) == [row["output"] for row in chosen]


def test_all_vectors_have_unit_norm_and_the_targets_width(finished):
    content = load_tensors(finished / "persona_vectors.pt")
    drawn = [name for condition in ("other_persona", "random_direction") for name in vector_names(condition)]
    assert set(content["vectors"]) == set(content["source_vectors"]) == {"loud", "numeric"}
    for persona, by_name in content["vectors"].items():
        assert set(by_name) == {*METHODS, *drawn}
        assert content["source_vectors"][persona].shape == (1, 32)
        for vector in by_name.values():
            assert vector.shape == (1, 48)
            assert vector.norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["random_direction", "shuffled_pairs"])
def test_every_draw_of_a_control_writes_on_every_prompt(method, tiny, out):
    settings = {**tiny, "methods": [method, "oracle"], "alpha_values": [40.0]}
    assert [run(out, settings, "--phase", phase) for phase in "23"] == [0, 0]
    content = load_tensors(out / "persona_vectors.pt")
    for vectors in content["vectors"].values():
        for draw in (1, 3):
            vectors[f"{method}_{draw}"].zero_()
    save_tensors(out / "persona_vectors.pt", content)
    assert run(out, settings, "--phase", "4") == 0
    written = rows(out)
    unsteered, *cells = (written[start : start + N_PER_CELL] for start in range(0, len(written), N_PER_CELL))
    drawn = {(cell[0]["persona"], cell[0]["draw"]): cell for cell in cells if cell[0]["condition"] == method}
    assert sorted(drawn) == sorted(product(("loud", "numeric"), "123"))
    for (_, draw), cell in drawn.items():
        is_changed = [row["output"] != before["output"] for row, before in zip(cell, unsteered, strict=True)]
        assert any(is_changed) == (draw == "2")


def test_residual_norm_is_the_unit_of_alpha(tiny, finished, out):
    (norm,) = load_json(finished / "persona_similarities.json")["residual_norms"]
    alphas = [alpha / norm["median"] for alpha in tiny["alpha_values"]]
    unit = {**tiny, "alpha_values": alphas, "alpha_unit": "residual_norm"}
    assert run(out, unit, "--phase", "4") == 0
    assert outputs(out) == outputs(finished)
    assert run(out, unit, "--phase", "5") == 0
    assert "has length" not in (out / "experiment.log").read_text()


def test_other_personas_are_their_mapped_vectors_at_the_personas_own_alphas(tiny, out):
    alphas = {"loud": [4.0], "numeric": [1.0, 4.0]}
    settings = {**tiny, "methods": ["other_persona", "ridge_mapped"], "alpha_values": alphas}
    assert run(out, settings, "--phase", "4") == 0
    vectors = load_tensors(out / "persona_vectors.pt")["vectors"]
    cells = {}
    for row in rows(out):
        cells.setdefault((row["persona"], row["condition"], row["alpha"]), []).append(row["output"])
    for name, other in (("loud", "numeric"), ("numeric", "loud")):
        assert {row["draw"] for row in rows(out) if row["persona"] == name} == {other, None}
        for drawn in vector_names("other_persona"):
            assert torch.equal(vectors[name][drawn], vectors[other]["ridge_mapped"])
        assert cells[name, "other_persona", 4.0] == cells[other, "ridge_mapped", 4.0]
    assert cells["loud", "other_persona", 4.0] != cells["loud", "ridge_mapped", 4.0]


def test_of_a_list_the_alpha_that_is_compared_is_chosen_on_development_prompts(tiny, finished):
    development = load_prompts("development")
    assert not {row["prompt"] for row in rows(finished)} & set(development)
    for entry in load_json(finished / "alpha_search.json")["alphas"]:
        assert [point["alpha"] for point in entry["curve"]] == tiny["alpha_values"]
        assert all(point["n_pairs"] <= len(development) for point in entry["curve"])
        compared = load_json(finished / "verdict.json")["personas"][entry["persona"]]["alphas"]
        assert set(compared.values()) == {entry["alpha"]}
    written = rows_of(finished / "evaluation_journal.jsonl").values()
    tried = {(row["condition"], row["alpha"]) for row in written if row["prompt"] in development}
    assert tried == {("baseline", None), *(("oracle", alpha) for alpha in tiny["alpha_values"])}


def test_plain_text_is_read_under_every_steering(finished):
    found = load_json(finished / "side_effects.json")["personas"]
    assert found == load_json(finished / "verdict.json")["plain_text_perplexity_ratios"]
    assert set(found) == {"loud", "numeric"}
    assert all(set(ratios) == set(METHODS) for ratios in found.values())
    ratios = {round(ratio, 6) for of_persona in found.values() for ratio in of_persona.values()}
    assert len(ratios) == 2 * len(METHODS)
    assert all(0.2 < ratio < 50 for ratio in ratios)


def test_what_a_trait_costs_is_the_perplexity_ratio_of_its_labelled_texts(tiny, tmp_path):
    labelled = {
        f"labelled_{name}": [f"{number} {text}" for number in range(5) for text in texts]
        for name, texts in LOUD.items()
    }
    datasets = {"loud": {**LOUD, **labelled}, "numeric": NUMERIC}
    config = {**tiny, "persona_datasets": datasets, "output_dir": str(tmp_path / "out")}
    experiment = PersonaTransferExperiment(config)
    source = experiment.inputs.source
    found = trait_costs(Run(experiment.inputs, experiment.folder, experiment.executor))
    experiment.close()
    positive, negative = (
        fmean(map(math.log, continuation_perplexities(source.model, source.tokenizer, [""] * 20, texts)))
        for texts in labelled.values()
    )
    assert found == {"loud": pytest.approx(math.exp(positive - negative), rel=1e-4)}


# Searched alphas


def test_every_condition_is_tested_at_the_strongest_alpha_that_leaves_native_texts_coherent(finished_band):
    methods = ("ridge_mapped", "shuffled_pairs", "oracle")
    search = load_json(finished_band / "alpha_search.json")["alphas"]
    found = {entry["persona"]: entry for entry in search}
    assert [entry["method"] for entry in search] == ["oracle"] * 2
    assert list(found) == ["loud", "numeric"]
    middle = load_json(finished_band / "persona_similarities.json")["residual_norms"][1]["median"]
    for entry in search:
        tried = [point["alpha"] for point in entry["curve"]]
        assert 1 < len(tried) <= 3
        # The bracket is shared among the two blocks.
        assert all(0.0999 * middle / 2 <= alpha <= 2.001 * middle / 2 for alpha in tried)
        chosen = next(point for point in entry["curve"] if point["alpha"] == entry["alpha"])
        assert chosen["is_coherent"] is entry["is_coherent"]
        assert not any(point["is_coherent"] for point in entry["curve"] if point["alpha"] > entry["alpha"])
    cells = {(row["persona"], row["condition"], row["alpha"]) for row in rows(finished_band)}
    one_alpha = {(name, method, found[name]["alpha"]) for name in found for method in methods}
    assert cells == {(None, "baseline", None), *one_alpha}
    verdict = load_json(finished_band / "verdict.json")
    for name, method, alpha in one_alpha:
        assert verdict["personas"][name]["alphas"][method] == alpha


def test_alphas_are_searched_on_development_prompts_alone(finished_band):
    prompts = {row["prompt"] for row in rows_of(finished_band / "generation_journal.jsonl").values()}
    tested = {row["prompt"] for row in rows(finished_band)}
    of_source = load_prompts("development")  # a base model, which goes on from beginnings of texts
    assert prompts - tested == {*load_prompts("development_questions"), *of_source}
    assert not tested & set(load_prompts("development_questions"))


def test_the_ratio_at_an_alpha_is_that_of_its_texts(finished_band):
    evaluated = {}
    for row in rows_of(finished_band / "evaluation_journal.jsonl").values():
        if row["prompt"] in load_prompts("development_questions"):
            cell = row["condition"], row["persona"], row["alpha"]
            evaluated.setdefault(cell, {})[row["prompt"], row["seed"]] = row["independent_perplexity"]
    (unsteered,) = (found for (condition, _, _), found in evaluated.items() if condition == "baseline")
    for entry in load_json(finished_band / "alpha_search.json")["alphas"]:
        for point in entry["curve"]:
            steered = evaluated[entry["method"], entry["persona"], point["alpha"]]
            pairs = [(steered[text], unsteered[text]) for text in steered]
            logs = [math.log(one / other) for one, other in pairs if None not in (one, other)]
            assert len(logs) == point["n_pairs"] > 0
            assert math.exp(fmean(logs)) == pytest.approx(point["perplexity_ratio"])


def test_a_band_has_phase_twos_files_in_its_folder_and_lists_all_at_the_end(finished_band):
    of_maps = {"ridge_mapping.pt", "comparison_maps.pt", "cv_results.json"}
    assert visible_files(finished_band) >= {*of_maps, "training_data.pt", "mapping_analysis.png"}
    assert visible_files(finished_band / "layers" / "0_1") == of_maps
    log = (finished_band / "experiment.log").read_text()
    listed = set(log.rpartition("artifacts\n")[2].split("\n"))
    written = [path for path in finished_band.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert {f"  {path}" for path in written} <= listed


@pytest.mark.parametrize(("name", "all_pairs"), [("tiny", [[1, 2]]), ("band", [[0, 1], [2, 3]])])
def test_every_tensor_file_says_what_it_holds_and_of_which_models_and_layers(name, all_pairs, request):
    settings = request.getfixturevalue(name)
    folder = request.getfixturevalue({"tiny": "finished", "band": "finished_band"}[name])
    paths = list(folder.rglob("*.pt"))
    assert len(paths) == {"tiny": 7, "band": 8}[name]
    models = [settings["source_model"], settings["target_model"]]
    for path in paths:
        content = torch.load(path, weights_only=True)
        pairs = all_pairs if path.name in OF_ALL else all_pairs[:1] if "0_1" in path.parts else all_pairs[-1:]
        if path.name == "ridge_mapping.pt":
            assert [content["source_model"], content["target_model"]] == models
            assert [[content["source_layer"], content["target_layer"]]] == pairs
        else:
            assert [content["models"][side]["name"] for side in ("source", "target")] == models
            assert content["layer_pairs"] == pairs
        named = content.keys() - {"fingerprint", "about", "models", "source_model", "target_model"}
        assert {entry for entry in named if entry not in content["about"]} == set(), path


def test_a_band_has_the_maps_and_norms_of_its_layer_pairs(finished_band):
    content = load_tensors(finished_band / "persona_vectors.pt")
    assert content["layer_pairs"] == [[0, 1], [2, 3]]
    for index, folder in enumerate((finished_band / "layers" / "0_1", finished_band)):
        mapping, results = load_tensors(folder / "ridge_mapping.pt"), load_json(folder / "cv_results.json")
        assert [mapping["source_layer"], mapping["target_layer"]] == content["layer_pairs"][index]
        assert content["residual_norms"][index] == results["target_residual_norm"]
        for persona, vectors in content["vectors"].items():
            mapped = content["source_vectors"][persona][index] @ mapping["W"].float()
            assert torch.allclose(vectors["ridge_mapped"][index], mapped / mapped.norm(), atol=1e-5)

"""The key of an artifact or a text holds what it depends on: a changed setting recomputes that and no more.

For every field of the configuration, a run with this field changed is compared with one without. What has the
same key in both must be the same (else the key lacks the field), and nothing but what is listed here may have
another key (else a key holds too much).
"""

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from chat_models import TEMPLATE, chatting, saved
from chat_server import chat_server, completion
from pydantic import BaseModel
from tiny_runs import (
    ASKED,
    LOUD,
    NUMERIC,
    artifacts,
    band_settings,
    blank_figures,
    is_close,
    rows,
    score_by_characters,
    tiny_settings,
)

import experiment.inputs
import run_experiment
from experiment.config import ExperimentConfig, PersonaDefinition
from experiment.models import SIDES
from experiment.run import Run
from model_loading import load_model
from phases import side_effects, validate_scorers
from phases.check_setup import PREFLIGHT
from phases.choose_alphas import ALPHA_SEARCH
from phases.validate_scorers import SCORER_VALIDATION
from run_experiment import PersonaTransferExperiment
from support.journal import rows_of
from support.tiny_models import tiny_model

WORDS = {"labelled_positive_texts": "YES", "labelled_negative_texts": "no", "validation_texts": "OH"}
LABELLED = {name: [f"{word} {number} of them." for number in range(10)] for name, word in WORDS.items()}
BASES = ("pair", "judged", "chat", "band", "auto")
UNNAMED_LAYERS = {"source_layer_idx": None, "target_layer_idx": None}
PERSONAS = {"loud": {**LOUD, **LABELLED}, "numeric": NUMERIC}

TOLD = "{{ tone or '' }}{{ strftime_now('%d %b') }}"  # what a template may be told

SCORED = {"eval_results.json", "aggregated_results.json", "verdict.json", "figure1.png", "headline.png"}
SCORED |= {"off_target.png", "effect_spread.json"}
RESAMPLED = {"resampled_vectors.pt", "extraction_spread.json"}
GRID = SCORED | {"generation_results.json", "protocol.json"}
COSTS = {"side_effects.json", "capability.json"}
STEERED = GRID | COSTS
SEARCHED = STEERED | {"alpha_search.json"}
READ_AGAIN = SEARCHED - {"generation_results.json"}  # other perplexities may choose another listed alpha
CHECKED = {"preflight.json", "scorer_validation.json"}
WRITTEN = CHECKED | SEARCHED - COSTS  # sampled text, whoever reads it
CARRIED = STEERED | RESAMPLED | {"persona_vectors.pt", "persona_similarities.json"}
CARRIED |= {"detection.json"}
NATIVE = CARRIED | SEARCHED | CHECKED | {"native_vectors.pt"}  # random directions are native ones, rotated
MAPS = ("ridge_mapping.pt", "comparison_maps.pt", "cv_results.json", "control_maps.pt")
RESPONDED = NATIVE | {"extraction_responses.json"}
FITTED = CARRIED | {*MAPS, *(f"layers/0_1/{name}" for name in MAPS), "mapping_analysis.png"}
COMPARED = CARRIED - RESAMPLED | {"comparison_maps.pt", "cv_results.json", "mapping_analysis.png"}
PAIRED = FITTED | {"pair_statistics.pt", "training_data.pt"}
READ = PAIRED | SEARCHED | CHECKED  # where the map's texts change, so does the norm that is the unit of alpha
OF_BLOCKS = {"ridge_mapped", "other_persona"}  # of the conditions below
MAPPED = {"first_block", *OF_BLOCKS}
TRANSFERRED = {"random_proj", *MAPPED}
STEERED_HERE = {"oracle", *TRANSFERRED}
PLACES = {
    "condition",
    "draw",
    "vector",
    "persona",
    "prompt_idx",
    "alpha",
    "instruction",
}  # of a text in a plan, not in its key


@dataclass(frozen=True)
class Change:
    """What is changed in a base run; which artifacts may change then (None for all), and whose texts.

    @name in a value stands for a path.
    """

    base: str
    values: dict
    artifacts: set | None
    conditions: set | None = None


def within(name, base, artifacts, **values):
    """Return a change for each of these values of keys in the object `name`."""
    return {f"{name}.{key}": Change(base, {name: {key: value}}, artifacts) for key, value in values.items()}


def of_loud(base, artifacts, **values):
    """Return a change for each of these values of keys of a persona's definition."""
    loud = {**LOUD, **LABELLED, **(ASKED if base == "band" else {})}
    return {
        f"persona_datasets.{key}": Change(
            base, {"persona_datasets": {**PERSONAS, "loud": {**loud, key: value}}}, artifacts
        )
        for key, value in values.items()
    }


def of_pair(artifacts, conditions=None, **values):
    """Return a change of the run of a layer pair for each of these values of keys."""
    return {key: Change("pair", {key: value}, artifacts, conditions) for key, value in values.items()}


OTHER_METHODS = ["procrustes", "prompted", "shuffled_pairs"]
UNREAD = ["embedding_source", "untrained_source"]
OTHER_LABELLED = [f"AH {number}." for number in range(10)]
ASKED_MORE = {
    "instruction": [{"pos": "Roar.", "neg": "Hush."}, *ASKED["instruction"]],
    "questions": [*ASKED["questions"], "Is it?"],
}
CHANGES = {
    **of_pair(None, TRANSFERRED, source_model="@other_source", source_block_path="model.layers"),
    **of_pair(None, target_model="@other", target_block_path="transformer.h", dtype="bfloat16"),
    "layer_idx": Change("pair", {**UNNAMED_LAYERS, "layer_idx": "band"}, None),
    **of_pair(PAIRED | NATIVE, {"random_proj", *OF_BLOCKS}, source_layer_idx=2),
    **of_pair(PAIRED | NATIVE | CHECKED, target_layer_idx=1),
    "search_source_layers": Change("auto", {"search_source_layers": [0, 1]}, None),
    "search_target_layers": Change("auto", {"search_target_layers": [1, 2, 3]}, None),
    "search_tokens": Change("auto", {"search_tokens": 800}, None),
    **of_pair(READ, MAPPED, neutral_text="@other.txt", mapping_positions="last"),
    "n_training_samples": Change("band", {"n_training_samples": 12}, READ | {"neutral_responses.json"}),
    "mapping_data": Change("band", {"mapping_data": "responses"}, READ | {"neutral_responses.json"}),
    **of_pair(FITTED, MAPPED, lambda_values=[0.5, 5.0], lambda_unit="absolute"),
    **of_pair(FITTED, MAPPED, lambda_criterion="standardised"),
    **of_pair(PAIRED, MAPPED, n_folds=3),
    "prompt_format": Change("chat", {"prompt_format": "raw"}, WRITTEN),
    "source_prompt_format": Change("chat", {"source_prompt_format": "raw"}, READ_AGAIN | {"preflight.json"}),
    "target_prompt_format": Change("chat", {"target_prompt_format": "raw"}, WRITTEN),
    "system_prompt": Change("chat", {"system_prompt": "Be kind."}, WRITTEN),
    "chat_template_kwargs": Change("chat", {"chat_template_kwargs": {"tone": "dry"}}, WRITTEN),
    "chat_template_date": Change("chat", {"chat_template_date": "2026-02-03"}, WRITTEN),
    **of_pair(CARRIED | NATIVE | CHECKED | {"trait_costs.json"}, personas=["formal"]),
    **of_loud("judged", SCORED | CHECKED, description="Shouting.", eval_prompt="Loud? {question} {answer}"),
    **of_loud(
        "pair", NATIVE, positive_texts=["WHAT A DAY.", "COME."], negative_texts=["what a day.", "come."]
    ),
    **of_loud(
        "pair",
        READ_AGAIN | CHECKED | {"trait_costs.json", "detection.json"},
        labelled_positive_texts=OTHER_LABELLED,
        labelled_negative_texts=OTHER_LABELLED,
        resembling_texts=["WELL, it is as it is."],
    ),
    **of_loud(
        "pair",
        {"scorer_validation.json", "effect_spread.json", "verdict.json"},
        validation_texts=["WOW it is."] * 9,
    ),
    **of_loud("band", RESPONDED, **ASKED_MORE),
    **of_pair(NATIVE, TRANSFERRED, vectors={"loud": "@vector.npy"}),
    **of_pair(NATIVE, persona_position="mean"),
    **within("extraction", "band", NATIVE, kind="texts", from_texts=["numeric", "loud"]),
    **within("extraction", "band", NATIVE | CHECKED, by_persona={"loud": "mean"}),
    **within("extraction", "band", RESPONDED, n_questions=3, n_seeds=2, max_new_tokens=6),
    **of_pair(RESAMPLED | {"effect_spread.json", "verdict.json"}, set(), extraction_resamples=2),
    **of_pair(NATIVE, STEERED_HERE, disjoint_texts=True),
    **of_pair(COMPARED, set(OTHER_METHODS), methods=["random_proj", "oracle", "first_block", *OTHER_METHODS]),
    **of_pair(
        COMPARED | {"control_maps.pt"},
        {"random_direction", *UNREAD},
        controls=["random_direction", *UNREAD],
    ),
    **of_pair({"preflight.json", "verdict.json"}, set(), check_source_vectors=False),
    **of_pair(GRID, n_test_prompts=3, test_prompts=["It is the", "Who would"], n_seeds=2),
    **of_pair(SEARCHED | CHECKED, alpha_values=[3.0, 2.0], alpha_unit="residual_norm"),
    **of_pair({"protocol.json", "verdict.json"}, set(), strength_curve=True),
    **of_pair({"capability.json"}, set(), n_capability_questions=3),
    "n_turns": Change("chat", {"n_turns": 2}, {"protocol.json", "turns.json", "verdict.json"}, set()),
    **within("alpha_search", "band", SEARCHED, bound="plain"),
    **within("alpha_search", "band", SEARCHED | CHECKED, bracket=[0.2, 1.0], n_evaluations=3, n_seeds=2),
    **within("alpha_search", "band", SEARCHED | CHECKED, max_perplexity_ratio=1.01),
    **within("alpha_search", "band", SEARCHED | CHECKED, max_repetition_increase=0.3),
    **within("alpha_search", "band", SEARCHED | CHECKED, max_non_words_increase=0.9),
    **of_pair(WRITTEN, STEERED_HERE, steer_positions="response"),
    **of_pair(READ, seed=1),
    **of_pair(WRITTEN, max_new_tokens=4, temperature=0.5, top_k=5, top_p=0.5),
    **of_pair(SCORED | CHECKED, set(), use_gpt4=True, probe=False),
    **within("judge", "judged", SCORED | CHECKED, model="other", max_answer_tokens=9),
    **within("judge", "judged", SCORED | CHECKED, request_options={"seed": 1}),
    **within("judge", "judged", SCORED, texts_per_cell=1),
    **of_pair(READ_AGAIN | {"preflight.json"}, set(), independent_perplexity=False),
    **of_pair(READ_AGAIN | {"trait_costs.json"}, set(), evaluation_dtype="bfloat16"),
}
# What says where, how fast and how dearly a run computes, or what an ablation does, changes nothing.
INERT = {
    "trust_remote_code": True,
    "device": "cpu",
    "ablation_layer_pairs": [[0, 1]],
    "ablation_samples": [10, 20],
    "extraction_batch_size": 3,
    "generation_batch_size": 2,
    "evaluation_batch_size": 3,
    "judge.max_workers": 2,
    "judge.api_key_env": "OTHER_KEY",
    "judge.usd_per_million_tokens": 9.0,
    "judge.max_usd": 50.0,
    "output_dir": "",  # each run of this file has its own
}
# What cannot be changed on two tiny models in this process.
ELSEWHERE = (
    "source_revision target_revision quantization device_map cuda_graphs executor.kind executor.address "
    "executor.n_workers executor.gpus_per_worker judge.kind judge.base_url".split()
)


def test_every_field_has_a_changed_value_here():
    fields = set()
    for name, field in ExperimentConfig.model_fields.items():
        nested = PersonaDefinition if name == "persona_datasets" else field.annotation
        is_model = isinstance(nested, type) and issubclass(nested, BaseModel)
        fields |= {f"{name}.{key}" for key in nested.model_fields} if is_model else {name}
    assert fields == {*CHANGES, *INERT, *ELSEWHERE}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Everything that takes long and that no key depends on is small."""
    load = experiment.inputs.load_prompts

    def fewer_prompts(name):
        return load(name)[: 2 if name.startswith("development") else None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.inputs, "load_prompts", fewer_prompts)
        patch.setattr(experiment.inputs, "shipped_personas", lambda: ["formal"])
        patch.setattr(validate_scorers, "load_prompts", lambda name: load(name)[::9])
        patch.setattr(validate_scorers, "JUDGED_A_SIDE", 4)
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(side_effects, "N_PLAIN_TEXTS", 2)
        patch.setattr(run_experiment, "write_report", lambda folder: folder)
        patch.setenv("PERSONA_TRANSFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("LOCAL_KEY", "any")
        patch.setenv("OTHER_KEY", "any")
        score_by_characters(patch)
        blank_figures(patch)
        yield


@pytest.fixture(scope="module")
def paths(model_folders, tmp_path_factory):
    """Name -> path of a tiny model, a text or a vector."""
    folder = tmp_path_factory.mktemp("paths")
    saved(tiny_model("gpt2", seed=1, n_embd=48), folder / "chat", chatting(TOLD + TEMPLATE))
    saved(tiny_model("llama"), folder / "chat_source", chatting())
    saved(tiny_model("gpt2", seed=2, n_embd=48), folder / "other")
    saved(tiny_model("llama", seed=5), folder / "other_source")
    tiny_settings(model_folders, folder)
    paragraphs = (folder / "neutral.txt").read_text().split("\n\n")
    (folder / "other.txt").write_text("\n\n".join(paragraphs[::-1]))
    np.save(folder / "vector.npy", np.random.default_rng(0).normal(size=32).astype("float32"))
    return {**model_folders, **{path.name: str(path) for path in folder.iterdir()}}


def judged(request):
    asked = request["messages"][-1]["content"] + request["model"]
    return completion(str(1 + zlib.crc32(asked.encode()) % 5))


@pytest.fixture(scope="module")
def bases(small, paths, tmp_path_factory):
    """Name of a kind of run -> its configuration, without output_dir."""
    with chat_server(judged, reads="request") as server:
        pair = {
            **tiny_settings(paths, tmp_path_factory.mktemp("text")),
            "n_training_samples": 20,
            "lambda_values": [0.1, 1.0],
            "n_folds": 2,
            "persona_datasets": PERSONAS,
            "methods": ["random_proj", "ridge_mapped", "other_persona", "first_block", "oracle"],
            "disjoint_texts": False,
            "n_test_prompts": 2,
            "n_seeds": 1,
            "alpha_values": [2.0],
            "max_new_tokens": 3,
            "judge": {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"},
        }
        band = {
            **band_settings(pair, paths["chat"]),
            "persona_datasets": {**PERSONAS, "loud": {**LOUD, **LABELLED, **ASKED}},
            "methods": ["ridge_mapped", "oracle"],
            "alpha_search": {"n_evaluations": 2, "n_seeds": 1, "max_perplexity_ratio": 1.2},
        }
        searched = {"search_source_layers": [1, 2], "search_target_layers": [1, 2], "search_tokens": 400}
        yield {
            "pair": pair,
            "judged": {**pair, "use_gpt4": True},
            "chat": {**pair, "source_model": paths["chat_source"], "target_model": paths["chat"]},
            "band": band,
            "auto": {**pair, **UNNAMED_LAYERS, "layer_idx": "auto", **searched},
        }


@cache
def loaded(name, dtype):
    return load_model(name, dtype=dtype)


def experiment_of(config, output_dir):
    """Return an experiment on models that are loaded once for all tests here."""
    sides = {side: loaded(config[f"{side}_model"], config.get("dtype", "auto")) for side in SIDES}
    return PersonaTransferExperiment({**config, "output_dir": str(output_dir)}, **sides)


@pytest.fixture(scope="module")
def finished_base(bases, tmp_path_factory):
    """A function from the name of a base to its folder and artifacts, made at the first call."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def finished(name):
        experiment_of(bases[name], folder / name).run()
        return folder / name, artifacts(folder / name)

    return finished


def changed(base, values, paths):
    """Return a base's configuration with changed values; those of a nested object are changed one by one."""
    text = json.dumps(values)
    for name, path in paths.items():
        text = text.replace(f'"@{name}"', json.dumps(path))
    found = json.loads(text)
    for name in {"judge", "alpha_search", "extraction"} & found.keys():
        found[name] = found[name] if "kind" in found[name] else {**base[name], **found[name]}
    return {**base, **found}


def by_key(folder, found):
    """Return (name, key) -> what a run has made under this key: artifacts, texts, scores, perplexities."""
    made = {(name, content["fingerprint"]): content for name, content in found.items()}
    for path in folder.glob("*.jsonl"):
        for key, row in rows_of(path).items():
            made[path.name, key] = {name: row[name] for name in row.keys() - PLACES}
            if "perplexity_key" in row:
                made["perplexity", row["perplexity_key"]] = [row["perplexity"], row["independent_perplexity"]]
    return made


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_setting_changes_the_keys_of_what_depends_on_it_alone(
    field, bases, finished_base, paths, tmp_path
):
    change = CHANGES[field]
    folder, before = finished_base(change.base)
    experiment_of(changed(bases[change.base], change.values, paths), tmp_path).run()
    found = artifacts(tmp_path)
    made, known = by_key(tmp_path, found), by_key(folder, before)
    for name in made.keys() & known.keys():
        assert is_close(made[name], known[name]), name
    remade = {name for name, _ in made.keys() - known.keys()} & found.keys()
    assert remade
    assert change.artifacts is None or remade <= change.artifacts
    new = {
        row["condition"] for row in rows(tmp_path) if ("generation_journal.jsonl", row["key"]) not in known
    }
    assert change.conditions is None or new <= change.conditions


def test_where_and_how_fast_a_run_computes_changes_nothing(bases, finished_base, paths, tmp_path):
    folder, before = finished_base("judged")
    nested = {name.split(".")[1]: value for name, value in INERT.items() if name.startswith("judge.")}
    values = {name: value for name, value in INERT.items() if "." not in name}
    config = changed(bases["judged"], {**values, "judge": nested}, paths)
    shutil.copytree(folder, tmp_path / "out")
    experiment_of(config, tmp_path / "out").run()
    assert artifacts(tmp_path / "out") == before
    for path in folder.glob("*.jsonl"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("base", BASES)
def test_a_second_run_makes_nothing(base, bases, finished_base, tmp_path):
    folder, _ = finished_base(base)
    out = shutil.copytree(folder, tmp_path / "out")
    experiment_of({**bases[base]}, out).run()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if path.name not in ("experiment.log", "config.json"):
            assert (out / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def test_a_layer_pair_is_a_band_of_one(bases, finished_base, tmp_path):
    _, pair = finished_base("pair")
    config = {**bases["pair"], "source_layer_idx": [1], "target_layer_idx": [2]}
    experiment_of(config, tmp_path / "out").run()
    assert artifacts(tmp_path / "out") == pair


ORACLE = {"methods": ["oracle"]}  # the source has no part in its vector
BY_NORM = {"alpha_unit": "residual_norm"}


@pytest.mark.parametrize(
    ("artifact", "base", "change"),
    [
        (SCORER_VALIDATION, BY_NORM, {"mapping_positions": "last"}),
        (PREFLIGHT, ORACLE, {"independent_perplexity": False}),
        (PREFLIGHT, ORACLE, {"source_model": "@other_source"}),
        (ALPHA_SEARCH, {**ORACLE, "alpha_values": "auto"}, {"source_model": "@other_source"}),
        (ALPHA_SEARCH, {**ORACLE, "alpha_values": "auto"}, {"evaluation_dtype": "bfloat16"}),
    ],
)
def test_a_key_holds_how_degenerate_texts_were_steered_and_what_scores_fluency(
    artifact, base, change, bases, paths, tmp_path
):
    config = {**bases["pair"], **base}
    keys = []
    for values in ({}, {}, change):
        experiment = experiment_of(changed(config, values, paths), tmp_path)
        keys.append(artifact.key(Run(experiment.inputs, experiment.folder, experiment.executor)))
    assert keys[0] == keys[1] != keys[2]

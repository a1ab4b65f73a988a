"""The key of an artifact holds what the artifact depends on: a changed setting recomputes that and no more.

For every field of the configuration, a finished run is continued with this field changed. It must then hold
what a fresh run of the changed configuration makes (else a key lacks the field), and may have recomputed
nothing but what is listed here (else a key holds too much).
"""

import json
import os
import shutil
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from chat_models import TEMPLATE, chatting
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
from experiment.run import Run
from model_loading import load_model
from phases import side_effects, validate_scorers
from phases.check_setup import PREFLIGHT
from phases.choose_alphas import ALPHA_SEARCH
from phases.validate_scorers import SCORER_VALIDATION
from run_experiment import PersonaTransferExperiment
from support.tiny_models import tiny_model, tiny_tokenizer

LABELLED = {
    name: [f"{word} {number} of them." for number in range(10)]
    for name, word in (
        ("labelled_positive_texts", "YES"),
        ("labelled_negative_texts", "no"),
        ("validation_texts", "OH"),
    )
}
PERSONAS = {"loud": {**LOUD, **LABELLED}, "numeric": NUMERIC}

TOLD = "{{ tone or '' }}{{ strftime_now('%d %b') }}"  # what a template may be told

SCORED = frozenset(
    "eval_results.json aggregated_results.json verdict.json figure1.png recovery.png off_target.png "
    "effect_perplexity.png".split()
)
GRID = SCORED | {"generation_results.json"}
STEERED = GRID | {"side_effects.json"}
SEARCHED = STEERED | {"alpha_search.json", "alpha_search.png"}
CHECKED = frozenset({"preflight.json", "scorer_validation.json"})
WRITTEN = CHECKED | SEARCHED - {"side_effects.json"}  # sampled text, whoever reads it
CARRIED = STEERED | {"persona_vectors.pt", "persona_similarities.json"}
NATIVE = CARRIED | SEARCHED | {"native_vectors.pt", "preflight.json"}
FITTED = CARRIED | {
    *("ridge_mapping.pt", "comparison_maps.pt", "cv_results.json", "mapping_analysis.png"),
    *("layers/0_1/ridge_mapping.pt", "layers/0_1/comparison_maps.pt", "layers/0_1/cv_results.json"),
}
PAIRED = FITTED | {"pair_statistics.pt", "training_data.pt"}
READ = PAIRED | SEARCHED | CHECKED  # where the map's texts change, so does the norm that is the unit of alpha
MAPPED = {"ridge_mapped", "other_persona"}  # of the conditions below
TRANSFERRED = {"random_proj", *MAPPED}


@dataclass(frozen=True)
class Change:
    """What is changed in a base run, which artifacts may change then, and the texts of which conditions.

    artifacts: None for all of them. @name in a value stands for a path.
    """

    base: str
    values: dict
    artifacts: frozenset | set | None
    conditions: set | None = None


def in_persona(base, artifacts, **values):
    datasets = {**PERSONAS, "loud": {**PERSONAS["loud"], **(ASKED if base == "band" else {}), **values}}
    return Change(base, {"persona_datasets": datasets}, artifacts)


CHANGES = {
    "source_model": Change("pair", {"source_model": "@other_source"}, None, TRANSFERRED),
    "target_model": Change("pair", {"target_model": "@other"}, None),
    "layer_idx": Change(
        "pair", {"layer_idx": "band", "source_layer_idx": None, "target_layer_idx": None}, None
    ),
    "source_layer_idx": Change("pair", {"source_layer_idx": 2}, PAIRED | NATIVE, TRANSFERRED),
    "target_layer_idx": Change("pair", {"target_layer_idx": 1}, PAIRED | NATIVE | CHECKED),
    "search_source_layers": Change("auto", {"search_source_layers": [0, 1]}, None),
    "search_target_layers": Change("auto", {"search_target_layers": [1, 2, 3]}, None),
    "search_tokens": Change("auto", {"search_tokens": 800}, None),
    "source_block_path": Change("pair", {"source_block_path": "model.layers"}, None, TRANSFERRED),
    "target_block_path": Change("pair", {"target_block_path": "transformer.h"}, None),
    "dtype": Change("pair", {"dtype": "bfloat16"}, None),
    "neutral_text": Change("pair", {"neutral_text": "@other.txt"}, READ, MAPPED),
    "n_training_samples": Change("band", {"n_training_samples": 12}, READ | {"neutral_responses.json"}),
    "mapping_data": Change("band", {"mapping_data": "responses"}, READ | {"neutral_responses.json"}),
    "mapping_positions": Change("pair", {"mapping_positions": "last"}, READ, MAPPED),
    "lambda_values": Change("pair", {"lambda_values": [0.5, 5.0]}, FITTED, MAPPED),
    "lambda_unit": Change("pair", {"lambda_unit": "absolute"}, FITTED, MAPPED),
    "lambda_criterion": Change("pair", {"lambda_criterion": "standardised"}, FITTED, MAPPED),
    "n_folds": Change("pair", {"n_folds": 3}, PAIRED, MAPPED),
    "prompt_format": Change("chat", {"prompt_format": "raw"}, WRITTEN),
    "source_prompt_format": Change("chat", {"source_prompt_format": "raw"}, SCORED | {"preflight.json"}),
    "target_prompt_format": Change("chat", {"target_prompt_format": "raw"}, WRITTEN),
    "system_prompt": Change("chat", {"system_prompt": "Be kind."}, WRITTEN),
    "chat_template_kwargs": Change("chat", {"chat_template_kwargs": {"tone": "dry"}}, WRITTEN),
    "chat_template_date": Change("chat", {"chat_template_date": "2026-02-03"}, WRITTEN),
    "personas": Change("pair", {"personas": ["formal"]}, CARRIED | NATIVE | CHECKED | {"trait_costs.json"}),
    "persona_datasets.description": in_persona("judged", SCORED | CHECKED, description="Shouting."),
    "persona_datasets.positive_texts": in_persona("pair", NATIVE, positive_texts=["WHAT A DAY.", "COME."]),
    "persona_datasets.negative_texts": in_persona("pair", NATIVE, negative_texts=["what a day.", "come."]),
    **{
        f"persona_datasets.{name}": in_persona(
            "pair", SCORED | CHECKED | {"trait_costs.json"}, **{name: [f"AH {n}." for n in range(10)]}
        )
        for name in ("labelled_positive_texts", "labelled_negative_texts")
    },
    "persona_datasets.validation_texts": in_persona(
        "pair", {"scorer_validation.json", "verdict.json"}, validation_texts=["WOW it is."] * 9
    ),
    "persona_datasets.instruction": in_persona(
        "band",
        NATIVE | {"extraction_responses.json"},
        instruction=[{"pos": "Roar.", "neg": "Hush."}, *ASKED["instruction"]],
    ),
    "persona_datasets.questions": in_persona(
        "band", NATIVE | {"extraction_responses.json"}, questions=[*ASKED["questions"], "Is it?"]
    ),
    "persona_datasets.eval_prompt": in_persona(
        "judged", SCORED | CHECKED, eval_prompt="How loud is this? {question} {answer}"
    ),
    "vectors": Change("pair", {"vectors": {"loud": "@vector.npy"}}, NATIVE, TRANSFERRED),
    "persona_position": Change("pair", {"persona_position": "mean"}, NATIVE),
    "extraction.kind": Change("band", {"extraction": {"kind": "texts"}}, NATIVE),
    "extraction.from_texts": Change(
        "band", {"extraction": {"kind": "texts", "from_texts": ["numeric", "loud"]}}, NATIVE
    ),
    **{
        f"extraction.{name}": Change(
            "band", {"extraction": {name: value}}, NATIVE | {"extraction_responses.json"}
        )
        for name, value in {"n_questions": 3, "n_seeds": 2, "max_new_tokens": 6}.items()
    },
    "methods": Change(
        "pair",
        {"methods": ["random_proj", "oracle", "procrustes", "prompted", "shuffled_pairs"]},
        STEERED,
        {"procrustes", "prompted", "shuffled_pairs"},
    ),
    "n_test_prompts": Change("pair", {"n_test_prompts": 3}, GRID),
    "test_prompts": Change("pair", {"test_prompts": ["It is the", "Who would"]}, GRID),
    "alpha_values": Change("pair", {"alpha_values": [3.0, 2.0]}, STEERED | CHECKED),
    "alpha_unit": Change("pair", {"alpha_unit": "residual_norm"}, STEERED | CHECKED),
    "alpha_search.bound": Change("band", {"alpha_search": {"bound": "plain"}}, SEARCHED),
    "alpha_search.bracket": Change("band", {"alpha_search": {"bracket": [0.2, 1.0]}}, SEARCHED | CHECKED),
    **{
        f"alpha_search.{name}": Change("band", {"alpha_search": {name: value}}, SEARCHED | CHECKED)
        for name, value in {
            "max_perplexity_ratio": 1.01,
            "max_repetition_increase": 0.3,
            "n_evaluations": 3,
            "n_seeds": 2,
        }.items()
    },
    "steer_positions": Change("pair", {"steer_positions": "response"}, WRITTEN),
    "n_seeds": Change("pair", {"n_seeds": 2}, GRID),
    "seed": Change("pair", {"seed": 1}, READ),
    **{
        name: Change("pair", {name: value}, WRITTEN)
        for name, value in {"max_new_tokens": 4, "temperature": 0.5, "top_k": 5, "top_p": 0.5}.items()
    },
    "use_gpt4": Change("pair", {"use_gpt4": True}, SCORED | CHECKED, set()),
    "judge.model": Change("judged", {"judge": {"model": "other"}}, SCORED | CHECKED, set()),
    "judge.max_answer_tokens": Change("judged", {"judge": {"max_answer_tokens": 9}}, SCORED | CHECKED, set()),
    "judge.texts_per_cell": Change("judged", {"judge": {"texts_per_cell": 1}}, SCORED, set()),
    "independent_perplexity": Change(
        "pair", {"independent_perplexity": False}, SCORED | {"preflight.json"}, set()
    ),
    "likelihood_ratio": Change("pair", {"likelihood_ratio": False}, SCORED | CHECKED, set()),
    "evaluation_dtype": Change(
        "pair", {"evaluation_dtype": "bfloat16"}, SCORED | {"trait_costs.json"}, set()
    ),
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
    "source_revision target_revision quantization device_map executor.kind executor.address "
    "executor.n_workers judge.kind judge.base_url".split()
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
    with pytest.MonkeyPatch.context() as patch:
        load = experiment.inputs.load_prompts
        patch.setattr(
            experiment.inputs,
            "load_prompts",
            lambda name: load(name)[: 2 if name.startswith("development") else None],
        )
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
    for name, model, tokenizer in (
        ("chat", tiny_model("gpt2", seed=1, n_embd=48), chatting(TOLD + TEMPLATE)),
        ("chat_source", tiny_model("llama"), chatting()),
        ("other", tiny_model("gpt2", seed=2, n_embd=48), tiny_tokenizer()),
        ("other_source", tiny_model("llama", seed=5), tiny_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
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
            "methods": ["random_proj", "ridge_mapped", "other_persona", "oracle"],
            "n_test_prompts": 2,
            "n_seeds": 1,
            "alpha_values": [2.0],
            "max_new_tokens": 3,
            "judge": {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"},
        }
        band = {
            **band_settings(pair, paths["chat"]),
            "persona_datasets": {**PERSONAS, "loud": {**PERSONAS["loud"], **ASKED}},
            "methods": ["ridge_mapped", "oracle"],
            "alpha_search": {"n_evaluations": 2, "n_seeds": 1, "max_perplexity_ratio": 1.2},
        }
        searched = {"layer_idx": "auto", "source_layer_idx": None, "target_layer_idx": None}
        layers = {"search_source_layers": [1, 2], "search_target_layers": [1, 2], "search_tokens": 400}
        yield {
            "pair": pair,
            "judged": {**pair, "use_gpt4": True},
            "chat": {**pair, "source_model": paths["chat_source"], "target_model": paths["chat"]},
            "band": band,
            "auto": {**pair, **searched, **layers},
        }


@cache
def loaded(name, dtype):
    return load_model(name, dtype=dtype)


def experiment_of(config, output_dir):
    """Return an experiment on models that are loaded once for all tests here."""
    sides = {
        side: loaded(config[f"{side}_model"], config.get("dtype", "auto")) for side in ("source", "target")
    }
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


def fingerprints(found):
    return {name: each["fingerprint"] for name, each in found.items()}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_setting_recomputes_what_depends_on_it_alone(field, bases, finished_base, paths, tmp_path):
    change = CHANGES[field]
    folder, before = finished_base(change.base)
    config = changed(bases[change.base], change.values, paths)
    shutil.copytree(folder, tmp_path / "resumed")
    for name in ("resumed", "fresh"):
        experiment_of(config, tmp_path / name).run()
    resumed, fresh = artifacts(tmp_path / "resumed"), artifacts(tmp_path / "fresh")
    assert resumed.keys() >= fresh.keys()
    for name, found in fresh.items():
        assert resumed[name]["fingerprint"] == found["fingerprint"], name
        assert is_close(resumed[name], found), name
    remade = {
        name for name, key in fingerprints(fresh).items() if before.get(name, {}).get("fingerprint") != key
    }
    assert remade
    if change.artifacts is not None:
        assert remade <= change.artifacts
    known = {row["key"] for row in rows(folder)}
    new = {row["condition"] for row in rows(tmp_path / "fresh") if row["key"] not in known}
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


@pytest.mark.parametrize("base", ["pair", "judged", "band", "auto"])
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


# Keys that once lacked something


def key(artifact, config, folder):
    experiment = experiment_of(config, folder)
    return artifact.key(Run(experiment.inputs, experiment.folder, experiment.executor))


@pytest.mark.parametrize(
    "values",
    [
        {"target_layer_idx": 1},
        {"alpha_values": [2.0, 5.0]},
        {"alpha_unit": "residual_norm"},
        {"alpha_unit": "residual_norm", "mapping_positions": "last"},
    ],
    ids=["layers", "alphas", "unit of alpha", "norm that is the unit"],
)
def test_the_validation_of_scorers_depends_on_how_its_degenerate_texts_were_steered(values, bases, tmp_path):
    base = {**bases["pair"], **({"alpha_unit": "residual_norm"} if "mapping_positions" in values else {})}
    keys = [key(SCORER_VALIDATION, {**base, **more}, tmp_path) for more in ({}, {}, values)]
    assert keys[0] == keys[1] != keys[2]


AUTO = {"alpha_values": "auto"}


@pytest.mark.parametrize(
    ("artifact", "more", "values"),
    [
        (PREFLIGHT, {}, {"independent_perplexity": False}),
        (PREFLIGHT, {}, {"source_model": "@other_source"}),
        (ALPHA_SEARCH, AUTO, {"source_model": "@other_source"}),
        (ALPHA_SEARCH, AUTO, {"evaluation_dtype": "bfloat16"}),
    ],
    ids=["preflight, model", "preflight, source", "alphas, model", "alphas, dtype"],
)
def test_fluency_depends_on_the_model_and_dtype_that_score_it(artifact, more, values, bases, paths, tmp_path):
    base = {**bases["pair"], "methods": ["oracle"], **more}  # the source has no part in the oracle's vector
    assert key(artifact, base, tmp_path) != key(artifact, changed(base, values, paths), tmp_path)

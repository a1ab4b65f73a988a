"""Every vector is a detector of its persona's trait in the target, and what is not tested is said."""

import numpy as np
import pytest
import torch
from chat_models import chatting, saved
from tiny_runs import ASKED, LOUD, NUMERIC, run, score_by_characters

from activation_extractor import ActivationExtractor
from experiment.conditions import condition_of
from model_loading import load_model
from phases import detect_traits
from support.artifacts import load_json
from support.package_cache import CACHE_VARIABLE
from support.tiny_models import tiny_model
from texts.personas import half_of

LABELLED = {
    "labelled_positive_texts": [f"YES {number} OF THEM." for number in range(12)],
    "labelled_negative_texts": [f"no {number} of them." for number in range(12)],
}
CONTROLS = ["shuffled_pairs", "other_persona", "random_direction", "embedding_source", "first_block"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        score_by_characters(patch)
        yield


@pytest.fixture(scope="module")
def planted(tiny, small, tmp_path_factory):
    """The folder of a run whose native vector of `loud` parts the labelled texts by construction."""
    folder = tmp_path_factory.mktemp("planted")
    extractor = ActivationExtractor(*load_model(tiny["target_model"]), 2)
    sides = [LABELLED[f"labelled_{sign}_texts"] for sign in ("positive", "negative")]
    read = extractor.extract_batch([*sides[0], *sides[1]], "last").double()
    signs = torch.tensor([1.0] * 12 + [-1.0] * 12, dtype=torch.float64)
    # The shortest direction by which all are 1 or -1 from their mean.
    direction = torch.linalg.pinv(read - read.mean(0)) @ (signs - signs.mean())
    np.save(folder / "planted.npy", direction.float().numpy())
    settings = {
        **tiny,
        "persona_datasets": {"loud": {**LOUD, **LABELLED}, "numeric": NUMERIC},
        "vectors": {"loud": {"target": str(folder / "planted.npy")}},
        "controls": CONTROLS,
        "n_test_prompts": 8,
        "alpha_values": [1.0],
    }
    assert run(folder / "out", settings) == 0
    return folder / "out", settings


def test_a_run_has_a_detector_of_every_vector_and_says_what_it_does_not_test(planted):
    found = load_json(planted[0] / "detection.json")
    assert found["layer_pairs"] == [[1, 2]]
    assert set(found["personas"]) == {"loud", "numeric"}
    labelled = found["personas"]["loud"]["labelled"]
    assert (labelled["position"], labelled["n_positive"], labelled["n_negative"]) == ("last", 12, 12)
    assert labelled["auroc"]["oracle"][0]["estimate"] == 1.0
    assert {*CONTROLS, "oracle", "ridge_mapped"} <= set(map(condition_of, labelled["auroc"]))
    assert {"random_direction: 1", "random_direction: 3", "other_persona: numeric"} <= labelled[
        "auroc"
    ].keys()
    assert all(len(each) == 1 for each in labelled["auroc"].values())
    reasons = {
        (persona, name): each["not_measured"]
        for persona, sets in found["personas"].items()
        for name, each in sets.items()
    }
    assert reasons == {
        ("loud", "labelled"): None,
        ("loud", "responses"): "the run collects none",
        ("numeric", "labelled"): "there are none",
        ("numeric", "responses"): "the run collects none",
    }
    log = (planted[0] / "experiment.log").read_text()
    assert "3 of 4 sets are not measured: loud, responses; numeric, responses (the run collects none)" in log
    assert "Reading: AUROC of projections" in (planted[0] / "report.html").read_text()


def test_a_second_run_reads_nothing_again(planted, monkeypatch):
    folder, settings = planted
    before = (folder / "detection.json").read_bytes()
    monkeypatch.setattr(detect_traits, "detect", None)
    assert run(folder, settings) == 0
    assert (folder / "detection.json").read_bytes() == before


QUESTIONS = [f"What is number {number} of them?" for number in range(20)]


@pytest.mark.parametrize("halves", [True, False])
def test_a_vector_is_not_tested_on_responses_that_it_is_made_from(halves, band, small, no_drawing, tmp_path):
    asked = {**LOUD, **ASKED, "questions": QUESTIONS}
    settings = {
        **band,
        "source_model": saved(tiny_model("llama"), tmp_path / "chat", chatting()),
        "persona_datasets": {"loud": asked, "numeric": NUMERIC},
        "disjoint_texts": halves,
        "n_test_prompts": 2,
        "n_seeds": 1,
    }
    assert run(tmp_path / "out", settings) == 0
    found = load_json(tmp_path / "out" / "detection.json")["personas"]["loud"]["responses"]
    if not halves:
        assert found["not_measured"] == "its vectors are made from them"
        return
    rows = load_json(tmp_path / "out" / "extraction_responses.json")["rows"]
    unread = half_of([(text,) for text in QUESTIONS], 0, QUESTIONS)
    of_target = [row for row in rows if row["responder"] == "target" and (row["prompt"],) in unread]
    sides = [[row for row in of_target if row["is_positive"] is sign] for sign in (True, False)]
    counts = [sum(bool(row["output"].strip()) for row in side) for side in sides]
    assert min(counts) >= 10
    assert [found["n_positive"], found["n_negative"]] == counts
    assert found["position"] == "response"
    assert len(found["auroc"]["oracle"]) == 2  # a block of the band each

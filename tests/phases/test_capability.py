"""Questions with one right continuation of four are balanced, apart from prompts, and answered steered."""

import shutil
from collections import Counter
from statistics import fmean

import pytest
from tiny_runs import run

from evaluation import continuation_perplexities
from experiment.conditions import MAPPED, ORACLE, RANDOM
from model_loading import load_model
from steered_generation import SteeredGenerator
from support.artifacts import load_json, load_tensors
from texts.neutral_text import OverlapCheck
from texts.personas import load_persona, load_prompts, shipped_personas
from texts.questions import N_QUESTIONS, load_questions

QUESTIONS = load_questions()
SMALL = 4  # as `tiny_settings` has it


def test_questions_are_balanced_and_no_answer_stands_out():
    assert len(QUESTIONS) == len({each.text for each in QUESTIONS}) == N_QUESTIONS
    assert set(Counter(each.kind for each in QUESTIONS).values()) == {N_QUESTIONS // 5}
    assert len({each.kind for each in QUESTIONS[:5]}) == 5
    places = [each.continuations.index(each.right) for each in QUESTIONS]
    assert all(sorted(places[start : start + 4]) == [0, 1, 2, 3] for start in range(0, N_QUESTIONS, 4))
    for each in QUESTIONS:
        assert len(set(each.continuations)) == 4
        assert all(text[0] == " " and len(text.split()) == 1 for text in each.continuations)
        assert each.text == each.text.strip()
    right = fmean(len(each.right) for each in QUESTIONS)
    assert right == pytest.approx(
        fmean(len(text) for each in QUESTIONS for text in each.continuations), rel=0.05
    )


def test_questions_share_no_words_with_prompts_or_personas():
    names = ("test", "development", "test_questions", "development_questions", "fresh_questions")
    prompts = [text for name in (*names, "last_questions") for text in load_prompts(name)]
    texts = [text for name in shipped_personas() for text in load_persona(name).all_texts]
    asked = [each.text + text for each in QUESTIONS for text in each.continuations]
    assert not [text for text in asked if OverlapCheck([*prompts, *texts]).found_in(text)]
    assert not [text for text in prompts if OverlapCheck(asked).found_in(text)]


def answers(model, tokenizer):
    """Return for each question whether the right continuation is the most likely, scored one by one."""
    right = []
    for each in QUESTIONS[:SMALL]:
        scores = {
            text: continuation_perplexities(model, tokenizer, [each.text], [text], is_steered=True)[0]
            for text in each.continuations
        }
        right.append(min(scores, key=scores.get) == each.right)
    return right


def test_accuracy_is_that_of_single_passes_under_the_vectors_of_the_verdict(tiny, out):
    settings = {**tiny, "controls": [RANDOM, "first_block"]}
    assert run(out, settings) == 0
    found, verdict = load_json(out / "capability.json"), load_json(out / "verdict.json")
    vectors, loaded = load_tensors(out / "persona_vectors.pt")["vectors"], load_model(tiny["target_model"])
    assert found["n_questions"] == SMALL
    assert found["unsteered"] == fmean(answers(*loaded))
    assert list(found["personas"]) == ["loud", "numeric"]
    names = {ORACLE: ORACLE, MAPPED: MAPPED, "first_block": "first_block", RANDOM: f"{RANDOM}_1"}
    for persona, by_condition in found["personas"].items():
        assert list(by_condition) == list(names)
        for condition, each in by_condition.items():
            with SteeredGenerator(*loaded) as generator:
                alpha = verdict["personas"][persona]["alphas"][condition]
                vector = vectors[persona][names[condition]][0]
                generator.register_steering(tiny["target_layer_idx"], vector, alpha)
                assert each["accuracy"] == fmean(answers(*loaded))
            assert each["change"]["estimate"] == each["accuracy"] - found["unsteered"]
    for shown in ("Short questions answered right", "loud: native", "numeric: random"):
        assert shown in (out / "report.html").read_text()
    written = (out / "capability.json").stat()
    assert run(out, settings) == 0
    assert (out / "capability.json").stat().st_mtime_ns == written.st_mtime_ns


def test_without_questions_nothing_is_asked_or_shown(tiny, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    assert "Short questions" in (folder / "report.html").read_text()
    assert run(folder, {**tiny, "n_capability_questions": 0}, "--phase", "1") == 0
    assert run(folder, {**tiny, "n_capability_questions": 0}, "--phase", "5") == 0
    assert "Short questions" not in (folder / "report.html").read_text()

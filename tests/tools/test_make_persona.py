"""A persona from a sentence: what a model writes is checked, counted and written whole or not at all."""

import json
import logging

import pytest
from chat_server import chat_server, completion, error
from tiny_runs import error_lines

from experiment.config import load_config
from support.errors import InputError
from texts.personas import load_prompts
from tools import make_persona
from tools.make_persona import write_persona

SUBJECTS = "boats lamps shoes roads cakes stamps clocks birds chairs rivers coats bells kites jars".split()
PAIRS = [f"+ Arr, the {each} be fine!\n- The {each} are fine!" for each in SUBJECTS]
MODELS = {"source_model": "x", "target_model": "x", "output_dir": "x", "layer_idx": 0, "personas": []}


def writing(pairs=None, questions=None):
    """Return a function that responds like an obedient model."""
    pairs = pairs or PAIRS
    questions = questions or [f"? Where do I find {each}?" for each in SUBJECTS]

    def ask(prompt):
        if "system prompts" in prompt:
            return "\n".join(f"+ Talk of {each}, arr.\n- Talk of {each}." for each in SUBJECTS[:5])
        return "Of course!\n" + "\n".join(questions if "questions that" in prompt else pairs)

    return ask


@pytest.fixture(autouse=True)
def alike(monkeypatch):
    """All pairs are alike in content, but those about kites."""

    def similarity(pairs):
        return [0.1 if "kites" in pair[0] else 0.9 for pair in pairs]

    monkeypatch.setattr("tools.make_persona._content_similarity", similarity)


def made(tmp_path, ask=None):
    path = tmp_path / "pirate.json"
    return write_persona("speaks like a pirate", ask or writing(), "pirate", path, 10, 8)


def test_the_file_is_a_persona_that_a_configuration_takes(tmp_path):
    path = made(tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["description"] == "The text speaks like a pirate."
    assert len(content["positive_texts"]) == len(content["negative_texts"]) == 10
    (persona,) = load_config({**MODELS, "persona_datasets": {"buccaneer": str(path)}}).load_personas()
    assert persona.positive_texts[0] == "Arr, the boats be fine!"
    assert len(persona.instructions) == 5
    assert len(persona.questions) == 8


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("+ I am a pirate!\n- I am a person!", "name the trait"),
        ("+ Arr, the sea!\n- The sea.", "end with different marks"),
        ("+ Arr!\n- The sea is very wide and deep today!", "differ in length"),
        ("+ The sea!\n- The sea!", "do not differ"),
        (f"+ {load_prompts('test_questions')[0]}\n- What is that?", "share words with a test prompt"),
        ("+ Arr, the boats be fine!\n- The boats are fine!", "are duplicates"),
        ("+ Arr, the kites fly!\n- The kites fly!", "differ in content"),
    ],
)
def test_unusable_items_are_rejected_and_counted(bad, reason, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    content = json.loads(made(tmp_path, writing([bad, *PAIRS, bad])).read_text("utf-8"))
    first = bad.split("\n")[0].removeprefix("+ ")
    assert content["positive_texts"].count(first) == (reason == "are duplicates")
    assert reason in caplog.text


def test_numbers_and_quotation_marks_around_a_line_are_no_part_of_the_text(tmp_path):
    pairs = [f'{n}. + "Arr, the {each}!"\n---\n   - "The {each}!"' for n, each in enumerate(SUBJECTS, 1)]
    questions = [f"{n}) “Where are {each}?”" for n, each in enumerate(SUBJECTS, 1)]
    content = json.loads(made(tmp_path, writing(pairs, [*questions, "Which ones?"])).read_text("utf-8"))
    assert content["positive_texts"] == [f"Arr, the {each}!" for each in SUBJECTS[:10]]
    assert content["negative_texts"] == [f"The {each}!" for each in SUBJECTS[:10]]
    assert content["questions"] == [f"Where are {each}?" for each in SUBJECTS[:8]]


def test_lines_of_the_models_reasoning_are_no_items(tmp_path):
    write, reasoning = writing(), "<think>\n+ A draft!\n- Drafts!\n? Drafts?\n</think>\n"
    path = made(tmp_path, lambda prompt: reasoning + write(prompt))
    assert "raft" not in path.read_text()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["Sorry, I cannot."], r"0 of 10 usable pairs.*the last begins 'Of course!.nSorry, "),
        (PAIRS[:5], r"wrote 5 of 10 usable pairs in 6 responses \(25 are duplicates"),
    ],
)
def test_too_few_pairs_are_an_error_that_says_why_and_nothing_is_written(pairs, message, tmp_path):
    with pytest.raises(InputError, match=message):
        made(tmp_path, writing(pairs))
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "pirate.json").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        made(tmp_path)
    assert (tmp_path / "pirate.json").read_text() == "mine"


def test_a_server_is_asked_and_its_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_KEY", "any")
    path = tmp_path / "pirate.json"
    asked = ["speaks like a pirate", "--n-pairs", "10", "--n-questions", "8", "--api-key-env", "LOCAL_KEY"]
    asked += ["--output", str(path), "--base-url"]
    with chat_server(lambda prompt: completion(writing()(prompt))) as server:
        assert make_persona.main([*asked, server.base_url]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    path.unlink()
    with chat_server(lambda prompt: error("no model", 404)) as server:
        assert make_persona.main([*asked, server.base_url]) == 2
    (line,) = error_lines(capsys)
    assert "the server gave no response" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trait", ["speaks like this", "  "])
def test_a_sentence_without_a_trait_is_rejected(trait, tmp_path):
    with pytest.raises(InputError, match="names no trait"):
        write_persona(trait, writing(), None, tmp_path / "x.json")

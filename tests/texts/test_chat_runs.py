"""A run with a chat model: its questions, its responses as data for vectors and maps, and real models."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from chat_models import chatting
from chat_server import chat_server, completion, error
from tiny_runs import NUMERIC, error_lines, run, tiny_settings

from activation_extractor import paired_activations
from evaluation import continuation_perplexities
from experiment.config import load_config
from experiment.inputs import load_inputs, start_executor
from experiment.plan import grid_texts, neutral_responses_fingerprint
from phases.collect_responses import with_responses
from ridge_mapping import RidgeMapping
from run_experiment import PersonaTransferExperiment
from scoring.gpt_judge import ONE_DIGIT
from support.artifacts import load_json, load_tensors
from support.run_folder import RunFolder
from support.tiny_models import tiny_model
from texts.chat import prompt_text, question
from texts.encoding import encode
from texts.personas import load_prompts

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def chat_folders(model_folders, tmp_path_factory):
    """The tiny pair, whose target has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_model("gpt2", seed=1, n_embd=48).save_pretrained(folder / "target")
    chatting().save_pretrained(folder / "target")
    return {"source": model_folders["source"], "target": str(folder / "target")}


@pytest.fixture(scope="module")
def settings(chat_folders, tmp_path_factory):
    return tiny_settings(chat_folders, tmp_path_factory.mktemp("settings"))


def test_a_prompted_persona_is_asked_for_in_words_and_random_directions_are_rotated(settings, tmp_path):
    asked = {
        **settings,
        "methods": ["prompted", "random_direction", "oracle"],
        "n_seeds": 1,
        "alpha_values": [4.0],
    }
    assert run(tmp_path / "out", asked) == 0
    inputs = load_inputs(load_config({**asked, "output_dir": str(tmp_path / "out")}))
    rows = load_json(tmp_path / "out" / "generation_results.json")["rows"]
    vectors = load_tensors(tmp_path / "out" / "persona_vectors.pt")["vectors"]
    plain, layer = inputs.generator(), inputs.layers[1]
    prompted = [row for row in rows if row["condition"] == "prompted"]
    assert len(prompted) == 2 * 3
    for row in prompted:
        assert row["alpha"] is None
        words = question(row["prompt"], f"Answer in this style. {row['persona']}")
        assert plain.generate(words, 6, seed=row["seed"]) == row["output"]
    for row in rows:
        if row["condition"] == "random_direction":
            direction = vectors[row["persona"]][f"random_direction_{row['prompt_idx'] % 3 + 1}"]
            shown = inputs.shown_prompt("target", row["prompt"])
            (steered,) = plain.generate_batch(
                [shown], 6, seeds=[row["seed"]], steering_vectors={layer: direction}, alphas=[4.0]
            )
            assert steered.text == row["output"]
    scored = load_json(tmp_path / "out" / "eval_results.json")["rows"]
    assert {row["condition"] for row in scored} == {"baseline", "prompted", "random_direction", "oracle"}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert run(folder, {**settings, "system_prompt": "Be kind."}) == 0
    return folder


def test_a_chat_target_is_asked_questions_in_its_template(settings, finished):
    inputs = load_inputs(load_config({**settings, "system_prompt": "Be kind.", "output_dir": str(finished)}))
    assert inputs.chat_sides == ("target",)
    rows = load_json(finished / "generation_results.json")["rows"]
    questions = load_prompts("test_questions")[:3]
    assert {row["prompt"] for row in rows} == set(questions)
    generator = inputs.generator()
    for row in rows:
        if row["condition"] == "baseline":
            asked = question(row["prompt"], "Be kind.")
            assert generator.generate(asked, 6, seed=row["seed"]) == row["output"]
    scored = load_json(finished / "eval_results.json")["rows"]
    row = next(row for row in scored if row["output"].strip())
    own, other = (
        continuation_perplexities(side.model, side.tokenizer, [prompt], [row["output"]])[0]
        for side, prompt in (
            (inputs.target, question(row["prompt"], "Be kind.")),
            (inputs.source, row["prompt"] + "\n\n"),
        )
    )
    assert row["perplexity"] == pytest.approx(own, rel=1e-4)
    assert row["independent_perplexity"] == pytest.approx(other, rel=1e-4)
    assert math.isfinite(own)


def test_a_finished_chat_run_is_finished_and_another_format_is_another_text(settings, finished, caplog):
    before = {path.name: path.read_bytes() for path in finished.glob("*.json")}
    caplog.set_level(logging.INFO)
    assert run(finished, {**settings, "system_prompt": "Be kind."}) == 0
    assert "0 new texts" in caplog.text
    assert {path.name: path.read_bytes() for path in finished.glob("*.json")} == before


def rows_of(settings, folder, **changes):
    inputs = load_inputs(load_config({**settings, "output_dir": str(folder), **changes}))
    return {row["key"] for row in grid_texts(inputs, [1.0])}


def test_texts_of_another_format_or_system_prompt_have_other_keys(settings, tmp_path):
    keys = [
        rows_of(settings, tmp_path, **changes)
        for changes in (
            {},
            {"prompt_format": "raw"},
            {"target_prompt_format": "raw"},
            {"system_prompt": "Hm."},
        )
    ]
    assert keys[1] == keys[2]
    assert not keys[0] & (keys[1] | keys[3])


TRAIT = {
    "instruction": [{"pos": "Shout.", "neg": "Whisper."}, {"pos": "Be loud.", "neg": "Be quiet."}],
    "questions": ["What is that noise?", "Who is at the door?", "Where is my hat?"],
    "eval_prompt": "How loud is it? {question} {answer}",
}


@pytest.fixture(scope="module")
def responses(settings, tmp_path_factory):
    """A finished run whose vectors come from responses to the questions of a trait file."""
    folder = tmp_path_factory.mktemp("responses")
    (folder / "loud.json").write_text(json.dumps(TRAIT))
    changed = {
        **settings,
        "persona_datasets": {"loud": str(folder / "loud.json")},
        "extraction": {"kind": "responses", "n_questions": 2, "max_new_tokens": 9},
    }
    assert run(folder / "out", changed) == 0
    return folder / "out", changed


def test_vectors_are_made_from_responses_to_contrasting_system_prompts(responses):
    folder, changed = responses
    rows = load_json(folder / "extraction_responses.json")["rows"]
    assert len(rows) == 2 * 2 * 2
    assert {row["writer"] for row in rows} == {"target"}
    inputs = load_inputs(load_config({**changed, "output_dir": str(folder)}))
    generator = inputs.generator()
    for row in rows:
        asked = question(row["prompt"], row["system_prompt"])
        assert generator.generate(asked, 9, seed=row["seed"]) == row["output"]
        assert row["is_kept"] == bool(row["output"].strip())
    vectors = load_tensors(folder / "persona_vectors.pt")
    for side, found in (("source", vectors["source_vectors"]), ("target", vectors["vectors"])):
        extractor = getattr(inputs, side).extractor
        means = []
        for is_positive in (True, False):
            kept = [row for row in rows if row["is_kept"] and row["is_positive"] is is_positive]
            # The source has no template, and reads the target's answers as plain text.
            read = [
                (question(row["prompt"]) if side == "target" else row["prompt"] + "\n\n", row["output"])
                for row in kept
            ]
            means.append(extractor.extract_batch(read, "response").mean(0))
        expected = (means[0] - means[1]) / (means[0] - means[1]).norm()
        vector = (found["loud"] if side == "source" else found["loud"]["oracle"])[0]
        assert torch.allclose(vector, expected, atol=1e-4)


def test_responses_are_journalled_and_not_asked_for_again(responses, caplog):
    folder, changed = responses
    (folder / "extraction_responses.json").unlink()
    caplog.set_level(logging.INFO)
    assert run(folder, changed) == 0
    assert "8 answers by the target model, 8 of them already there" in caplog.text
    assert "no classifier and no judge has looked at its answers" in caplog.text


def test_other_questions_make_other_vectors_and_texts(responses):
    folder, changed = responses
    fewer = {**changed["extraction"], "n_questions": 1}
    assert not rows_of(changed, folder) <= rows_of(changed, folder, extraction=fewer)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"persona_datasets": {"loud": {**TRAIT, "instruction": []}}}, "no system prompts"),
        ({"persona_datasets": {"loud": {**TRAIT, "questions": []}}}, "no questions"),
        ({"extraction": {"kind": "texts"}}, "choose 'extraction' of kind 'responses'"),
        ({"persona_position": "mean"}, "leave persona_position out"),
        (
            {"layer_idx": "auto", "source_layer_idx": None, "target_layer_idx": None},
            "searches with text pairs",
        ),
        ({"prompt_format": "raw"}, "neither model is one"),
        ({"extraction": {"kind": "responses", "from_texts": ["loud"]}}, "has no positive texts"),
        ({"extraction": {"kind": "responses", "from_texts": ["shy"]}}, "names 'shy', which is no persona"),
        ({"source_prompt_format": "chat"}, "tokenizer of the source model has no chat template"),
        ({"prompt_format": "raw", "extraction": {}, "system_prompt": "Hm."}, "system_prompt is of use"),
        (
            {"extraction": {"kind": "texts"}, "persona_position": "response"},
            "always read at the response's tokens",
        ),
        ({"persona_datasets": {"loud": "no/such/file.json"}}, "no/such/file.json"),
        ({"persona_datasets": {"loud": {**TRAIT, "instruction": [{"pos": "Shout."}]}}}, "instruction.0.neg"),
    ],
    ids=str,
)
def test_what_responses_cannot_be_made_from_is_rejected_before_anything_is_written(
    responses, tmp_path, capsys, change, named
):
    _, changed = responses
    if "extraction" in change and change["extraction"] == {}:
        change = {**change, "persona_datasets": {"loud": {"positive_texts": ["A"], "negative_texts": ["a"]}}}
    assert run(tmp_path / "out", {**changed, **change}) == 2
    lines = error_lines(capsys)
    assert len(lines) <= 2
    assert named in " ".join(lines)
    assert not (tmp_path / "out").exists()


def test_responses_that_are_all_rejected_are_counted(responses, tmp_path, capsys, monkeypatch):
    _, changed = responses
    monkeypatch.setattr(
        "phases.collect_responses._is_kept", lambda row, score, middle: not row["is_positive"]
    )
    assert run(tmp_path / "out", changed) == 2
    (line,) = error_lines(capsys)
    assert "none of the 4 positive answers of the target model show the trait" in line
    assert "extraction.n_seeds" in line


def test_a_judge_is_asked_a_trait_files_question_and_once(responses, tmp_path, capsys, monkeypatch, caplog):
    _, changed = responses
    monkeypatch.setenv("OPENAI_API_KEY", "sk-check")
    rows, is_down = [], True

    def judge(prompt):
        if is_down and "hat?" in prompt:
            return error("overloaded", 400, code="content_filter")
        return completion("4" if any(row["output"] in prompt and row["is_positive"] for row in rows) else "1")

    changed = {**changed, "extraction": {**changed["extraction"], "n_questions": 3}, "use_gpt4": True}
    with chat_server(judge) as server:
        changed["judge"] = {"base_url": server.base_url, "max_workers": 1}
        planned_inputs = load_inputs(load_config({**changed, "output_dir": str(tmp_path / "out")}))
        assert run(tmp_path / "out", changed) == 2
        (line,) = error_lines(capsys)
        assert "4 of 12 answers of the target model lack a judgement (first reason: " in line
        assert "run again" in line
        assert not (tmp_path / "out" / "extraction_responses.json").exists()
        journal = (tmp_path / "out" / "answers_target_journal.jsonl").read_text().splitlines()[1:]
        rows += [json.loads(line)["row"] for line in journal]
        n_asked, is_down = len(server.prompts), False
        inputs = with_responses(planned_inputs, RunFolder(tmp_path / "out"), start_executor(planned_inputs))
        asked = server.prompts[n_asked:]
        assert len(asked) == 4  # what was judged is not paid for again
        assert all("How loud is it? Where is my hat?" in prompt for prompt in asked)
        assert all(prompt.endswith(ONE_DIGIT) for prompt in asked)
    content = load_json(tmp_path / "out" / "extraction_responses.json")["rows"]
    later = [row for row in content if row["prompt"] == "Where is my hat?"]
    assert [row["trait"] for row in later] == [4 if row["is_positive"] else 1 for row in later]
    assert all(row["is_kept"] for row in later)
    assert {asked for asked, _ in inputs.answers["target"]["loud"][1]} >= {"Where is my hat?"}


def test_some_personas_may_be_made_from_texts_and_others_from_responses(responses, tmp_path):
    _, changed = responses
    both = {"loud": changed["persona_datasets"]["loud"], "numeric": NUMERIC}
    extraction = {**changed["extraction"], "from_texts": ["numeric"]}
    settings = {**changed, "persona_datasets": both, "extraction": extraction, "persona_position": "mean"}
    assert run(tmp_path / "out", settings) == 0
    rows = load_json(tmp_path / "out" / "extraction_responses.json")["rows"]
    assert {row["persona"] for row in rows} == {"loud"}
    inputs = load_inputs(load_config({**settings, "output_dir": str(tmp_path / "out")}))
    texts = (NUMERIC["positive_texts"], NUMERIC["negative_texts"])
    expected = inputs.target.extractor.extract_persona_vector(*texts, "mean")
    found = load_tensors(tmp_path / "out" / "persona_vectors.pt")["vectors"]["numeric"]["oracle"][0]
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_map_may_be_learnt_from_responses_as_each_model_reads_them(settings, tmp_path, caplog):
    changed = {
        **settings,
        "mapping_data": "responses",
        "n_training_samples": 310,
        "system_prompt": "Be kind.",
    }
    caplog.set_level(logging.INFO)
    assert run(tmp_path / "out", changed, "--phase", "1") == 0
    assert run(tmp_path / "out", changed, "--phase", "2") == 0
    assert caplog.text.count("310 answers by the target model, 0 of them already there") == 1
    kept = load_json(tmp_path / "out" / "neutral_responses.json")
    asked = load_prompts("neutral_questions")
    assert [row["prompt"] for row in kept["rows"]] == [*asked, *asked[:10]]
    assert [row["seed"] for row in kept["rows"]] == [0] * 300 + [1] * 10
    inputs = load_inputs(load_config({**changed, "output_dir": str(tmp_path / "out")}))
    generator = inputs.generator()
    for row in kept["rows"][:3]:
        said = question(row["prompt"], "Be kind.")
        assert generator.generate(said, changed["max_new_tokens"], seed=row["seed"]) == row["output"]
    texts = [
        (row["prompt"] + "\n\n", prompt_text(inputs.target.tokenizer, said), row["output"])
        for row in kept["rows"]
        if row["output"].strip()
        for said in [question(row["prompt"], "Be kind.")]
    ]
    batches = list(paired_activations(inputs.source.extractor, inputs.target.extractor, texts))
    sides = [
        torch.cat([batch.H_source[inputs.layers[0]] for batch in batches]),
        torch.cat([batch.H_target[inputs.layers[1]] for batch in batches]),
    ]
    found = RidgeMapping.load(tmp_path / "out" / "ridge_mapping.pt")
    expected = RidgeMapping(*(side.shape[1] for side in sides), "relative").fit(*sides, found.lambda_)
    assert torch.allclose(found.W, expected.W, atol=1e-6)
    assert load_json(tmp_path / "out" / "cv_results.json")["n_groups"] <= 300

    (tmp_path / "out" / "neutral_responses.json").unlink()
    assert run(tmp_path / "out", changed, "--phase", "1") == 0
    assert "310 answers by the target model, 310 of them already there" in caplog.text


def test_responses_for_the_map_may_be_in_other_styles_that_are_no_personas(settings, tmp_path, caplog):
    changed = {
        **settings,
        "mapping_data": "styled_responses",
        "n_training_samples": 310,
        "system_prompt": "Be kind.",
    }
    assert run(tmp_path / "out", changed, "--phase", "1") == 0
    rows = load_json(tmp_path / "out" / "neutral_responses.json")["rows"]
    asked, styles = load_prompts("neutral_questions"), load_prompts("neutral_styles")
    assert [row["prompt"] for row in rows] == [*asked, *asked[:10]]
    in_turn = [f"Be kind.\n\n{styles[number % len(styles)]}" for number in range(300)]
    in_turn += [f"Be kind.\n\n{styles[number + 1]}" for number in range(10)]
    assert [row["system_prompt"] for row in rows] == in_turn
    inputs = load_inputs(load_config({**changed, "output_dir": str(tmp_path / "out")}))
    generator = inputs.generator()
    for row in rows[:3]:
        said = question(row["prompt"], row["system_prompt"])
        assert generator.generate(said, changed["max_new_tokens"], seed=row["seed"]) == row["output"]
    read = with_responses(inputs, RunFolder(tmp_path / "out"), start_executor(inputs)).map_texts
    shown = prompt_text(inputs.target.tokenizer, question(read[0].document, "Be kind."))
    assert read[0].prompts == (read[0].document + "\n\n", shown)  # without the style

    plain = {**changed, "mapping_data": "responses", "output_dir": str(tmp_path / "out")}
    assert neutral_responses_fingerprint(load_inputs(load_config(plain))) != neutral_responses_fingerprint(
        inputs
    )

    robot = {"loud": settings["persona_datasets"]["loud"], "robot": settings["persona_datasets"]["loud"]}
    of_robot = {**changed, "persona_datasets": robot, "output_dir": str(tmp_path / "other")}
    caplog.clear()
    kept = load_inputs(load_config(of_robot)).neutral_styles
    assert kept == tuple(style for style in styles if "robot" not in style)
    assert "refused 1 neutral styles that are a persona's" in caplog.text


def test_neutral_questions_that_a_test_asks_are_left_out(settings, tmp_path, caplog):
    asked = load_prompts("neutral_questions")
    changed = {**settings, "mapping_data": "responses", "test_prompts": asked[:7], "n_test_prompts": 7}
    changed["output_dir"] = str(tmp_path)
    inputs = load_inputs(load_config(changed))
    assert inputs.neutral_questions == tuple(asked[7:])
    assert "refused 7 neutral questions" in caplog.text


def test_responses_for_the_map_need_a_model_that_can_be_asked(settings, tmp_path, capsys):
    changed = {**settings, "mapping_data": "responses", "prompt_format": "raw"}
    assert run(tmp_path / "out", changed) == 2
    assert "mapping_data 'responses' asks a chat model, but neither model is one" in error_lines(capsys)[0]
    assert run(tmp_path / "out", {**settings, "mapping_data": "responses"}, "--ablate", "samples") == 2
    assert "choose mapping_data 'neutral_text'" in error_lines(capsys)[0]
    few = {**settings, "mapping_data": "responses", "n_training_samples": 10, "n_folds": 11}
    assert not list(tmp_path.glob("out/*journal*"))
    assert run(tmp_path / "few", few) == 2
    assert "n_folds is 11, but the map is learnt from answers to 10 questions" in error_lines(capsys)[0]
    assert not (tmp_path / "few").exists()


# Real models


@pytest.fixture(scope="module")
def packaged(all_threads, tmp_path_factory):
    """The example run, reduced to two blocks and two personas, and its inputs."""
    reduced = {
        "layers": None,
        "source_layer_idx": [6, 8],
        "target_layer_idx": [11, 14],
        "n_training_samples": 60,
        "personas": ["formal", "pirate"],
        "extraction": {"kind": "responses", "from_texts": ["formal"], "n_questions": 4, "max_new_tokens": 32},
        "n_test_prompts": 12,
        "alpha_values": {"formal": [0.16], "pirate": [0.12]},
        "max_new_tokens": 32,
        "output_dir": str(tmp_path_factory.mktemp("packaged") / "out"),
    }
    experiment = PersonaTransferExperiment({**load_json(ROOT / "example_config.json"), **reduced})
    return experiment.inputs, experiment.run()


@pytest.mark.real_models
def test_of_the_packaged_pair_the_instruct_model_is_shown_a_template(packaged):
    inputs, _ = packaged
    assert inputs.chat_sides == ("target",)
    generator = inputs.generator()
    assert "Paris" in generator.generate(question("What is the capital of France?"), 24, temperature=0)
    shown = inputs.shown_prompt("target", "Why?")
    (ids,) = encode(inputs.target.tokenizer, [shown])
    assert inputs.target.tokenizer.decode(ids) == shown
    assert shown.count("assistant") == 2  # the name in its own system prompt, and the open turn
    assert inputs.shown_prompt("source", "Why?") == "Why?\n\n"


@pytest.mark.real_models
def test_responses_that_do_not_show_the_requested_trait_are_left_out(packaged):
    inputs, _ = packaged
    rows = load_json(Path(inputs.config.output_dir) / "extraction_responses.json")["rows"]
    assert len(rows) == 2 * 5 * 4
    assert {row["persona"] for row in rows} == {"pirate"}
    scores = inputs.classifiers["pirate"].score([row["output"] for row in rows])
    for row, score in zip(rows, scores, strict=True):
        assert row["trait"] == pytest.approx(score, abs=1e-4)
        assert row["is_kept"] is ((score >= 0.5) is row["is_positive"])
    kept = {sign: sum(row["is_kept"] for row in rows if row["is_positive"] is sign) for sign in (True, False)}
    assert 0 < kept[True] < 20
    assert kept[False] > 10


@pytest.mark.real_models
def test_a_mapped_persona_shows_in_a_chat_models_responses(packaged):
    _, table = packaged
    trait = {(entry["persona"], entry["condition"]): entry["trait_probability"]["mean"] for entry in table}
    for condition in ("ridge_mapped", "oracle"):
        assert trait["formal", condition] > trait["formal", "baseline"] + 0.2, trait
        assert trait["formal", condition] > trait["formal", "other_persona"] + 0.2

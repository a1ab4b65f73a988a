"""A run with a chat model: its questions, its responses as data for vectors and maps, and real models."""

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_models import chatting
from chat_server import chat_server, completion, error
from tiny_runs import NUMERIC, error_lines, run, tiny_settings

from activation_extractor import paired_activations
from evaluation import continuation_perplexities
from experiment.config import load_config
from experiment.executor import GenerationSettings, start_executor
from experiment.inputs import load_inputs
from experiment.plan import UNSTEERED_CELL, text_rows
from experiment.run import Run
from phases.collect_responses import collect_responses, neutral_responses_key, persona_responses_key
from ridge_mapping import RidgeMapping
from run_experiment import PersonaTransferExperiment
from scoring.gpt_judge import ONE_DIGIT
from support.artifacts import load_json, load_tensors
from support.journal import rows_of
from support.run_folder import RunFolder
from support.tiny_models import tiny_model
from texts.chat import prompt_text, question
from texts.encoding import encode
from texts.personas import load_prompts

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def settings(model_folders, tmp_path_factory):
    """The tiny run, whose target has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_model("gpt2", seed=1, n_embd=48).save_pretrained(folder / "target")
    chatting().save_pretrained(folder / "target")
    return tiny_settings({"source": model_folders["source"], "target": str(folder / "target")}, folder)


def inputs_of(settings, folder):
    return load_inputs(load_config({**settings, "output_dir": str(folder)}))


def run_on(inputs):
    return Run(inputs, RunFolder(Path(inputs.config.output_dir)), start_executor(inputs))


def collected(inputs):
    """Return the inputs with their responses."""
    found = run_on(inputs)
    with closing(found.folder):
        return collect_responses(found).inputs


def generator_of(inputs):
    norms = [1.0] * len(inputs.layer_pairs)
    return GenerationSettings.of(inputs, norms).generator(inputs.target)


def rows_in(folder, name):
    return load_json(folder / name)["rows"]


def says_what_the_target_says(inputs, row, system_prompt, max_new_tokens=6):
    asked = question(row["prompt"], system_prompt)
    return generator_of(inputs).generate(asked, max_new_tokens, seed=row["seed"]) == row["output"]


def test_a_prompted_persona_is_asked_for_in_words_and_random_directions_are_rotated(settings, tmp_path):
    methods = ["prompted", "random_direction", "oracle"]
    asked = {**settings, "methods": methods, "n_seeds": 1, "alpha_values": [4.0]}
    assert run(tmp_path / "out", asked) == 0
    inputs, rows = inputs_of(asked, tmp_path), rows_in(tmp_path / "out", "generation_results.json")
    vectors = load_tensors(tmp_path / "out" / "persona_vectors.pt")["vectors"]
    prompted = [row for row in rows if row["condition"] == "prompted"]
    assert len(prompted) == 2 * 3
    for row in prompted:
        assert row["alpha"] is None
        assert says_what_the_target_says(inputs, row, f"Answer in this style. {row['persona']}")
    for row in (row for row in rows if row["condition"] == "random_direction"):
        direction = vectors[row["persona"]][f"random_direction_{row['prompt_idx'] % 3 + 1}"]
        (steered,) = generator_of(inputs).generate_batch(
            [inputs.prompting.prompt("target", row["prompt"])],
            6,
            seeds=[row["seed"]],
            steering_vectors={inputs.middle_pair[1]: direction},
            alphas=[4.0],
        )
        assert steered.text == row["output"]
    scored = rows_in(tmp_path / "out", "eval_results.json")
    assert {row["condition"] for row in scored} == {"baseline", *methods}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    assert run(folder, {**settings, "system_prompt": "Be kind."}) == 0
    return folder


def test_a_chat_target_is_asked_questions_in_its_template(settings, finished):
    inputs = inputs_of({**settings, "system_prompt": "Be kind."}, finished)
    assert inputs.prompting.chat_sides == ("target",)
    rows = rows_in(finished, "generation_results.json")
    assert {row["prompt"] for row in rows} == set(load_prompts("test_questions")[:3])
    plain = [row for row in rows if row["condition"] == "baseline"]
    assert all(says_what_the_target_says(inputs, row, "Be kind.") for row in plain)
    row = next(row for row in rows_in(finished, "eval_results.json") if row["output"].strip())
    shown = {"target": question(row["prompt"], "Be kind."), "source": row["prompt"] + "\n\n"}
    own, other = (
        continuation_perplexities(side.model, side.tokenizer, [shown[side.name]], [row["output"]])[0]
        for side in (inputs.target, inputs.source)
    )
    assert row["perplexity"] == pytest.approx(own, rel=1e-4)
    assert row["independent_perplexity"] == pytest.approx(other, rel=1e-4)
    assert math.isfinite(own)


def test_a_second_chat_run_makes_nothing(settings, finished):
    before = {path.name: path.read_bytes() for path in finished.glob("*.json*")}
    assert run(finished, {**settings, "system_prompt": "Be kind."}) == 0
    assert {path.name: path.read_bytes() for path in finished.glob("*.json*")} == before


def test_texts_of_another_format_or_system_prompt_have_other_keys(settings, tmp_path):
    def keys(**changes):
        inputs = inputs_of({**settings, **changes}, tmp_path)
        return {row["key"] for row in text_rows(inputs, [UNSTEERED_CELL], inputs.prompts, [0])}

    raw = keys(prompt_format="raw")
    assert raw == keys(target_prompt_format="raw")
    assert not keys() & (raw | keys(system_prompt="Hm."))


TRAIT = {
    "instruction": [{"pos": "Shout.", "neg": "Whisper."}, {"pos": "Be loud.", "neg": "Be quiet."}],
    "questions": ["What is that noise?", "Who is at the door?", "Where is my hat?"],
    "eval_prompt": "How loud is it? {question} {answer}",
}


@pytest.fixture(scope="module")
def responses(settings, tmp_path_factory):
    """A finished run whose vectors are made from responses, of a trait file."""
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
    rows, inputs = rows_in(folder, "extraction_responses.json"), inputs_of(changed, folder)
    assert len(rows) == 2 * 2 * 2
    assert {row["responder"] for row in rows} == {"target"}
    for row in rows:
        assert says_what_the_target_says(inputs, row, row["system_prompt"], 9)
        assert row["is_kept"] == bool(row["output"].strip())
    content = load_tensors(folder / "persona_vectors.pt")
    found = {"source": content["source_vectors"]["loud"], "target": content["vectors"]["loud"]["oracle"]}
    for side in inputs.sides:
        means = []
        for is_positive in (True, False):
            # The source has no template, and reads the target's responses as plain text.
            read = [
                (question(row["prompt"]) if side.name == "target" else row["prompt"] + "\n\n", row["output"])
                for row in rows
                if row["is_kept"] and row["is_positive"] is is_positive
            ]
            means.append(side.extractor.extract_batch(read, "response").mean(0))
        expected = (means[0] - means[1]) / (means[0] - means[1]).norm()
        assert torch.allclose(found[side.name][0], expected, atol=1e-4)


def test_responses_are_journalled_and_not_generated_again(responses):
    folder, changed = responses
    lost, journal = folder / "extraction_responses.json", folder / "responses_target_journal.jsonl"
    before = lost.read_bytes(), journal.read_bytes()
    lost.unlink()
    assert run(folder, changed) == 0
    assert (lost.read_bytes(), journal.read_bytes()) == before


def test_other_questions_make_other_responses(responses):
    folder, changed = responses
    fewer = {**changed, "extraction": {**changed["extraction"], "n_questions": 1}}
    found = [run_on(inputs_of(each, folder)) for each in (changed, fewer)]
    keys = {persona_responses_key(each, each.inputs.personas[0]) for each in found}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"persona_datasets": {"loud": {**TRAIT, "instruction": []}}}, "no system prompts"),
        ({"persona_datasets": {"loud": {**TRAIT, "questions": []}}}, "no questions"),
        ({"persona_datasets": {"loud": "no/such/file.json"}}, "no/such/file.json"),
        ({"persona_datasets": {"loud": {**TRAIT, "instruction": [{"pos": "Shout."}]}}}, "instruction.0.neg"),
        ({"extraction": {"kind": "texts"}}, "choose 'extraction' of kind 'responses'"),
        ({"extraction": {"kind": "responses", "from_texts": ["loud"]}}, "has no positive texts"),
        ({"persona_position": "mean"}, "leave persona_position out"),
        (
            {"layer_idx": "auto", "source_layer_idx": None, "target_layer_idx": None},
            "searches with text pairs",
        ),
        ({"prompt_format": "raw"}, "neither model is one"),
    ],
    ids=str,
)
def test_what_responses_cannot_be_made_from_is_an_error_before_anything_is_written(
    responses, tmp_path, capsys, change, named
):
    _, changed = responses
    assert run(tmp_path / "out", {**changed, **change}) == 2
    lines = error_lines(capsys)
    assert len(lines) <= 2
    assert named in " ".join(lines)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def judged(responses, monkeypatch):
    """Takes a judge's answer, and gives a server and the settings of a run that asks it about responses."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-check")
    _, changed = responses
    extraction = {**changed["extraction"], "n_questions": 3}

    def settings_of(server):
        judge = {"base_url": server.base_url, "max_workers": 1}
        return {**changed, "extraction": extraction, "use_gpt4": True, "judge": judge}

    return settings_of


def test_responses_that_do_not_show_their_trait_are_counted(judged, tmp_path, capsys):
    with chat_server(lambda prompt: completion("1")) as server:
        assert run(tmp_path / "out", judged(server)) == 2
    (line,) = error_lines(capsys)
    assert "none of the 6 positive responses of the target model show the trait" in line
    assert "extraction.n_seeds" in line


def test_a_judge_is_asked_a_trait_files_question_and_once(judged, tmp_path, capsys):
    folder, rows, is_down = tmp_path / "out", [], True

    def judge(prompt):
        if is_down and "hat?" in prompt:
            return error("overloaded", 400, code="content_filter")
        return completion("4" if any(row["output"] in prompt and row["is_positive"] for row in rows) else "1")

    with chat_server(judge) as server:
        changed = judged(server)
        assert run(folder, changed) == 2
        (line,) = error_lines(capsys)
        assert "4 of 12 responses of the target model lack a judgement (first reason: " in line
        assert "run again" in line
        assert not (folder / "extraction_responses.json").exists()
        rows += rows_of(folder / "responses_target_journal.jsonl").values()
        n_asked, is_down = len(server.prompts), False
        found = collected(inputs_of(changed, folder)).responses["target"]["loud"]
        asked = server.prompts[n_asked:]
    assert len(asked) == 4  # what was judged is not paid for again
    assert all("How loud is it? Where is my hat?" in prompt for prompt in asked)
    assert all(prompt.endswith(ONE_DIGIT) for prompt in asked)
    later = [
        row for row in rows_in(folder, "extraction_responses.json") if row["prompt"] == "Where is my hat?"
    ]
    assert [row["trait"] for row in later] == [4 if row["is_positive"] else 1 for row in later]
    assert all(row["is_kept"] for row in later)
    assert "Where is my hat?" in {asked for asked, _ in found[1]}


def test_some_personas_may_be_made_from_texts_and_others_from_responses(responses, tmp_path):
    _, changed = responses
    both = {"loud": changed["persona_datasets"]["loud"], "numeric": NUMERIC}
    extraction = {**changed["extraction"], "from_texts": ["numeric"]}
    settings = {**changed, "persona_datasets": both, "extraction": extraction, "persona_position": "mean"}
    experiment = PersonaTransferExperiment({**settings, "output_dir": str(tmp_path / "out")})
    experiment.run(2)
    experiment.run(3)
    assert {row["persona"] for row in rows_in(tmp_path / "out", "extraction_responses.json")} == {"loud"}
    texts = (NUMERIC["positive_texts"], NUMERIC["negative_texts"])
    expected = experiment.inputs.target.extractor.extract_persona_vector(*texts, "mean")
    (found,) = load_tensors(tmp_path / "out" / "persona_vectors.pt")["vectors"]["numeric"]["oracle"]
    assert torch.allclose(found, expected, atol=1e-4)


MAPPED = {"mapping_data": "responses", "n_training_samples": 310, "system_prompt": "Be kind."}


def test_a_map_may_be_learnt_from_responses_as_each_model_reads_them(settings, tmp_path):
    folder, changed = tmp_path / "out", {**settings, **MAPPED}
    assert run(folder, changed, "--phase", "2") == 0
    rows, asked = rows_in(folder, "neutral_responses.json"), load_prompts("neutral_questions")
    assert [row["prompt"] for row in rows] == [*asked, *asked[:10]]
    assert [row["seed"] for row in rows] == [0] * 300 + [1] * 10
    inputs = inputs_of(changed, folder)
    assert all(says_what_the_target_says(inputs, row, "Be kind.") for row in rows[:3])
    said = {
        row["prompt"]: prompt_text(inputs.target.tokenizer, question(row["prompt"], "Be kind."))
        for row in rows
    }
    texts = [
        (row["prompt"] + "\n\n", said[row["prompt"]], row["output"]) for row in rows if row["output"].strip()
    ]
    batches = list(paired_activations(inputs.source.extractor, inputs.target.extractor, texts))
    source_layer, target_layer = inputs.middle_pair
    H_source = torch.cat([batch.H_source[source_layer] for batch in batches])
    H_target = torch.cat([batch.H_target[target_layer] for batch in batches])
    found = RidgeMapping.load(folder / "ridge_mapping.pt")
    widths = H_source.shape[1], H_target.shape[1]
    expected = RidgeMapping(*widths, "relative").fit(H_source, H_target, found.lambda_)
    assert torch.allclose(found.W, expected.W, atol=1e-6)
    assert load_json(folder / "cv_results.json")["n_groups"] <= 300


def test_responses_for_the_map_may_be_in_other_styles_that_are_no_personas(settings, tmp_path):
    changed = {**settings, **MAPPED, "mapping_data": "styled_responses"}
    inputs = inputs_of(changed, tmp_path)
    styled = collected(inputs)
    rows = rows_in(tmp_path, "neutral_responses.json")
    styles = load_prompts("neutral_styles")
    rotated = [styles[number % len(styles)] for number in range(300)] + styles[1:11]
    assert [row["system_prompt"] for row in rows] == [f"Be kind.\n\n{style}" for style in rotated]
    assert all(says_what_the_target_says(inputs, row, row["system_prompt"]) for row in rows[:3])
    read = styled.mapping_texts[0]
    shown = prompt_text(inputs.target.tokenizer, question(read.document, "Be kind."))
    assert read.prompts == (read.document + "\n\n", shown)  # without the style
    plain = replace(inputs, neutral_styles=())
    assert neutral_responses_key(run_on(plain)) != neutral_responses_key(run_on(inputs))


def test_the_ablation_of_samples_needs_neutral_text(settings, tmp_path, capsys):
    changed = {**settings, "mapping_data": "responses"}
    assert run(tmp_path / "out", changed, "--ablate", "samples") == 2
    assert "choose mapping_data 'neutral_text'" in error_lines(capsys)[0]
    assert not list(tmp_path.glob("out/*journal*"))


# Real models


@pytest.fixture(scope="module")
def packaged(all_threads, tmp_path_factory):
    """The example run, reduced to two blocks and two personas, and its inputs."""
    reduced = {
        "layer_idx": None,
        "source_layer_idx": [6, 8],
        "target_layer_idx": [11, 14],
        "n_training_samples": 60,
        "personas": ["formal", "pirate"],
        "extraction": {"kind": "responses", "from_texts": ["formal"], "n_questions": 4, "max_new_tokens": 32},
        "methods": ["other_persona", "ridge_mapped", "oracle"],
        "n_test_prompts": 12,
        "alpha_values": {"formal": [0.16], "pirate": [0.12]},
        "likelihood_ratio": False,
        "max_new_tokens": 32,
        "output_dir": str(tmp_path_factory.mktemp("packaged") / "out"),
    }
    experiment = PersonaTransferExperiment({**load_json(ROOT / "example_config.json"), **reduced})
    return experiment.inputs, experiment.run()


@pytest.mark.real_models
def test_the_instruct_model_of_the_packaged_pair_is_shown_a_template(packaged):
    inputs, _ = packaged
    assert inputs.prompting.chat_sides == ("target",)
    asked = question("What is the capital of France?")
    assert "Paris" in generator_of(inputs).generate(asked, 24, temperature=0)
    shown = inputs.prompting.prompt("target", "Why?")
    (ids,) = encode(inputs.target.tokenizer, [shown])
    assert inputs.target.tokenizer.decode(ids) == shown
    assert shown.count("assistant") == 2  # the name in its own system prompt, and the open turn
    assert inputs.prompting.prompt("source", "Why?") == "Why?\n\n"


@pytest.mark.real_models
def test_responses_that_do_not_show_the_trait_they_were_asked_for_are_left_out(packaged):
    inputs, _ = packaged
    rows = rows_in(Path(inputs.config.output_dir), "extraction_responses.json")
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

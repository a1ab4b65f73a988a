"""A run with a chat model: its questions, its responses as data for vectors and maps, and real models."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_server import chat_server, completion, error
from scipy.special import logit
from tiny_runs import ASKED, NUMERIC, error_lines, run

from activation_extractor import paired_activations
from evaluation import continuation_perplexities
from experiment.config import PROTOCOL, load_config
from experiment.executor import GenerationSettings, start_executor
from experiment.inputs import load_inputs
from experiment.run import Run
from judging.gpt_judge import ONE_DIGIT
from phases.collect_responses import collect_responses, neutral_responses_key
from ridge_mapping import RidgeMapping
from run_experiment import PersonaTransferExperiment
from scoring.response_filter import show_trait
from support.artifacts import load_json, load_tensors
from support.journal import rows_of
from support.run_folder import RunFolder
from texts.chat import prompt_text, question
from texts.personas import load_prompts

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def settings(tiny, chat_target):
    """The tiny run, whose target has a chat template."""
    return {**tiny, "target_model": chat_target}


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


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The folder and the inputs of a run that asks for a persona in words, too."""
    folder, methods = tmp_path_factory.mktemp("run") / "out", ["prompted", "oracle"]
    asked = {**settings, "system_prompt": "Be kind.", "methods": methods, "alpha_values": [4.0]}
    assert run(folder, asked) == 0
    return folder, inputs_of(asked, folder)


def test_a_chat_target_is_asked_questions_in_its_template(finished):
    folder, inputs = finished
    assert inputs.prompting.chat_sides == ("target",)
    rows = rows_in(folder, "generation_results.json")
    assert {row["prompt"] for row in rows} == set(load_prompts("test_questions")[:3])
    plain = [row for row in rows if row["condition"] == "baseline"]
    assert all(says_what_the_target_says(inputs, row, "Be kind.") for row in plain)
    row = next(row for row in rows_in(folder, "eval_results.json") if row["output"].strip())
    shown = {"target": question(row["prompt"], "Be kind."), "source": row["prompt"] + "\n\n"}
    for side, column in ((inputs.target, "perplexity"), (inputs.source, "independent_perplexity")):
        asked = side.model, side.tokenizer, [shown[side.name]], [row["output"]]
        assert continuation_perplexities(*asked) == pytest.approx([row[column]], rel=1e-4)


def test_a_prompted_persona_is_asked_for_in_words(finished):
    folder, inputs = finished
    rows = rows_in(folder, "generation_results.json")
    prompted = [row for row in rows if row["condition"] == "prompted"]
    assert len(prompted) == 2 * 3 * 2
    for row in prompted:
        assert row["alpha"] is None
        in_words = f"Be kind.\n\nAnswer in this style. {row['persona']}"
        assert says_what_the_target_says(inputs, row, in_words)
    scored = rows_in(folder, "eval_results.json")
    assert {row["condition"] for row in scored} == {"baseline", "prompted", "oracle"}


TRAIT = {**ASKED, "eval_prompt": "How loud is it? {question} {answer}"}
FEW = {"kind": "responses", "n_questions": 2, "max_new_tokens": 9}
LAST = TRAIT["questions"][2]  # of those that are judged


@pytest.fixture(scope="module")
def asked(settings, tmp_path_factory):
    """The settings of a run whose vectors are made from responses, of a trait file."""
    path = tmp_path_factory.mktemp("trait") / "loud.json"
    path.write_text(json.dumps(TRAIT))
    return {**settings, "persona_datasets": {"loud": str(path)}, "extraction": FEW}


@pytest.fixture(scope="module")
def responses(asked, tmp_path_factory):
    """The folder and settings of such a run, with a second persona that is made from texts."""
    folder, more = tmp_path_factory.mktemp("responses") / "out", {**asked, "persona_position": "mean"}
    more["persona_datasets"] = {**asked["persona_datasets"], "numeric": NUMERIC}
    more["extraction"] = {**FEW, "from_texts": ["numeric"]}
    for phase in "23":
        assert run(folder, more, "--phase", phase) == 0
    return folder, more


def test_vectors_are_made_from_responses_to_contrasting_system_prompts_or_from_texts(responses):
    folder, more = responses
    rows, inputs = rows_in(folder, "extraction_responses.json"), inputs_of(more, folder)
    assert len(rows) == 2 * 2 * 2
    assert {(row["responder"], row["persona"]) for row in rows} == {("target", "loud")}
    for row in rows:
        assert says_what_the_target_says(inputs, row, row["system_prompt"], 9)
        assert row["is_kept"] == bool(row["output"].strip())
    content = load_tensors(folder / "persona_vectors.pt")
    found = {"source": content["source_vectors"]["loud"], "target": content["vectors"]["loud"]["oracle"]}
    kept = [row for row in rows if row["is_kept"]]
    is_positive = torch.tensor([row["is_positive"] for row in kept])
    for side in inputs.sides:
        # The source has no template, and reads the target's responses as plain text.
        shown = {"source": "{}\n\n".format, "target": question}[side.name]
        read = [(shown(row["prompt"]), row["output"]) for row in kept]
        states = side.extractor.extract_batch(read, "response")
        expected = states[is_positive].mean(0) - states[~is_positive].mean(0)
        assert torch.allclose(found[side.name][0], expected / expected.norm(), atol=1e-4)
    texts = (NUMERIC["positive_texts"], NUMERIC["negative_texts"])
    expected = inputs.target.extractor.extract_persona_vector(*texts, "mean")
    assert torch.allclose(content["vectors"]["numeric"]["oracle"][0], expected, atol=1e-4)


def test_responses_are_journalled_and_not_generated_again(responses):
    folder, more = responses
    lost, journal = folder / "extraction_responses.json", folder / "responses_target_journal.jsonl"
    before = lost.read_bytes(), journal.read_bytes()
    lost.unlink()
    assert run(folder, more, "--phase", "3") == 0
    assert (lost.read_bytes(), journal.read_bytes()) == before


AUTO = {"layer_idx": "auto", "source_layer_idx": None, "target_layer_idx": None}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"persona_datasets": {"loud": {**TRAIT, "instruction": []}}}, "no system prompts"),
        ({"persona_datasets": {"loud": {**TRAIT, "questions": []}}}, "no questions"),
        ({"persona_datasets": {"loud": "no/such/file.json"}}, "no/such/file.json"),
        ({"persona_datasets": {"loud": {**TRAIT, "instruction": [{"pos": "Shout."}]}}}, "instruction.0.neg"),
        ({"extraction": {"kind": "texts"}}, "choose 'extraction' of kind 'responses'"),
        ({"extraction": {"kind": "responses", "from_texts": ["loud"]}}, "has no positive texts"),
        (AUTO, "searches with text pairs"),
        ({"prompt_format": "raw"}, "neither model is one"),
    ],
    ids=str,
)
def test_what_responses_cannot_be_made_from_is_an_error_before_anything_is_written(
    asked, tmp_path, capsys, change, named
):
    assert run(tmp_path / "out", {**asked, **change}) == 2
    lines = error_lines(capsys)
    assert len(lines) <= 2
    assert named in " ".join(lines)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def judged(asked, monkeypatch):
    """Give the settings of a run that asks a server about three questions' responses."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-check")
    judged = {**asked, "extraction": {**FEW, "n_questions": 3}, "use_gpt4": True}
    return lambda server: {**judged, "judge": {"base_url": server.base_url, "max_workers": 1}}


def test_responses_that_do_not_show_their_trait_are_counted(judged, tmp_path, capsys):
    with chat_server(lambda prompt: completion("1")) as server:
        assert run(tmp_path / "out", judged(server)) == 2
    (line,) = error_lines(capsys)
    assert "none of the 6 positive responses of the target model show the trait" in line
    assert "extraction.n_seeds" in line


def test_a_judge_is_asked_a_trait_files_question_and_once(judged, tmp_path, capsys):
    folder, rows, is_down = tmp_path / "out", [], True

    def judge(prompt):
        if is_down and LAST in prompt:
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
    assert all(f"How loud is it? {LAST}" in prompt for prompt in asked)
    assert all(prompt.endswith(ONE_DIGIT) for prompt in asked)
    later = [row for row in rows_in(folder, "extraction_responses.json") if row["prompt"] == LAST]
    assert [row["trait"] for row in later] == [4 if row["is_positive"] else 1 for row in later]
    assert all(row["is_kept"] for row in later)
    assert LAST in {asked for asked, _ in found[1]}


MAPPED = {"mapping_data": "responses", "n_training_samples": 310, "system_prompt": "Be kind."}


def test_a_map_may_be_learnt_from_responses_as_each_model_reads_them(settings, tmp_path):
    folder, changed = tmp_path / "out", {**settings, **MAPPED}
    assert run(folder, changed, "--phase", "2") == 0
    rows, asked = rows_in(folder, "neutral_responses.json"), load_prompts("neutral_questions")
    assert [row["prompt"] for row in rows] == [*asked, *asked[:10]]
    assert [row["seed"] for row in rows] == [0] * 300 + [1] * 10
    inputs = inputs_of(changed, folder)
    assert all(says_what_the_target_says(inputs, row, "Be kind.") for row in rows[:3])
    texts = [
        (prompt + "\n\n", prompt_text(inputs.target.tokenizer, question(prompt, "Be kind.")), row["output"])
        for prompt, row in zip([*asked, *asked[:10]], rows, strict=True)
        if row["output"].strip()
    ]
    batches = list(paired_activations(inputs.source.extractor, inputs.target.extractor, texts))
    source_layer, target_layer = inputs.middle_pair
    H_source = torch.cat([batch.H_source[source_layer] for batch in batches])
    H_target = torch.cat([batch.H_target[target_layer] for batch in batches])
    found = RidgeMapping.load(folder / "ridge_mapping.pt")
    expected = RidgeMapping(32, 48, "relative").fit(H_source, H_target, found.lambda_)
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
        "controls": [],
        "check_source_vectors": False,
        "n_test_prompts": 12,
        "alpha_values": {"formal": [0.16], "pirate": [0.12]},
        "alpha_search": {"bound": "plain"},  # which spares the costs of the traits
        "strength_curve": False,
        "extraction_resamples": 0,
        "n_seeds": 1,
        "probe": False,
        "max_new_tokens": 32,
        "output_dir": str(tmp_path_factory.mktemp("packaged") / "out"),
    }
    example = load_json(ROOT / "example_config.json")
    experiment = PersonaTransferExperiment({**example, **PROTOCOL, **reduced})
    return experiment.inputs, experiment.run()


@pytest.mark.real_models
def test_the_instruct_model_of_the_packaged_pair_is_shown_a_template(packaged):
    inputs, _ = packaged
    assert inputs.prompting.chat_sides == ("target",)
    asked = question("What is the capital of France?")
    assert "Paris" in generator_of(inputs).generate(asked, 24, temperature=0)
    shown = inputs.prompting.prompt("target", "Why?")
    assert shown.count("assistant") == 2  # the name in its own system prompt, and the open turn
    assert inputs.prompting.prompt("source", "Why?") == "Why?\n\n"


@pytest.mark.real_models
def test_responses_that_do_not_show_the_trait_they_were_asked_for_are_left_out(packaged):
    inputs, _ = packaged
    rows = rows_in(Path(inputs.config.output_dir), "extraction_responses.json")
    assert len(rows) == 2 * 5 * 4
    assert {row["persona"] for row in rows} == {"pirate"}
    (pirate,) = (persona for persona in inputs.personas if persona.name == "pirate")
    for row, score in zip(rows, show_trait(pirate, [row["output"] for row in rows]), strict=True):
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
        for without in ("baseline", "other_persona"):  # in log odds, which no scorer's prior moves
            assert logit(trait["formal", condition]) > logit(trait["formal", without]) + 3, trait

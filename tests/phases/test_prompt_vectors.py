"""Vectors from the last token of prompts, under system prompts for and against a trait: no word differs."""

from contextlib import closing

import pytest
import torch
from chat_models import TEMPLATE, chatting, saved
from tiny_runs import ASKED, LOUD, NUMERIC, blank_figures, error_lines, rows, run, score_by_characters
from torch.testing import assert_close

from experiment.conditions import SOURCE_CONTROLS, UNSTEERED, condition_of, vector_names
from experiment.config import load_config
from experiment.inputs import PROMPTS_A_TEXT, load_inputs
from experiment.run import Run
from phases.fit_maps import fit_maps, load_maps
from phases.make_vectors import NATIVE_VECTORS, make_vectors, native_vectors
from ridge_mapping import RidgeMapping
from run_experiment import PersonaTransferExperiment
from support.artifacts import load_json
from support.journal import rows_of
from support.package_cache import CACHE_VARIABLE
from support.tiny_models import tiny_model
from texts.personas import half_of, load_prompts

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BAND = {
    "source_layer_idx": [0, 2],
    "target_layer_idx": [1, 2],
}  # below the last, whose norm is read behind it
LAYERS = {"source_layer_idx": None, "target_layer_idx": None, "layer_idx": "auto"}
BACKWARDS = {**ASKED, "instruction": [{"pos": "Count.", "neg": "Guess."}]}
SHORT = {"n_seeds": 1, "max_new_tokens": 4, "extraction_resamples": 0, "check_source_vectors": False}
SHOWN = {  # side -> how it reads a question under an instruction; each tokenizer adds the first token
    "source": "{instruction}\n\n{question}\n\n",
    "target": "s: {instruction}<eos><bos>u: {question}<eos><bos>a: ",
}


@pytest.fixture(scope="module")
def settings(tiny, chat_target):
    """A raw source, a chat target, and a persona that has nothing but system prompts and questions."""
    asked = {"extraction": {"kind": "prompt"}, "persona_datasets": {"loud": ASKED}}
    return {**tiny, "target_model": chat_target, "output_dir": "out", **asked}


@pytest.fixture(scope="module")
def made(settings, tmp_path_factory):
    """A run after phases 2 and 3, with its maps and vectors; a second persona is made from texts."""
    more = {"controls": SOURCE_CONTROLS, "persona_datasets": {"loud": ASKED, "numeric": NUMERIC}}
    more["extraction"] = {"kind": "prompt", "from_texts": ["numeric"]}
    folder = str(tmp_path_factory.mktemp("made"))
    experiment = PersonaTransferExperiment({**settings, **BAND, **more, "output_dir": folder})
    found = Run(experiment.inputs, experiment.folder, experiment.executor)
    maps = fit_maps(found)
    yield found, maps, make_vectors(found, maps)
    experiment.close()


@torch.inference_mode()
def mean_state(side, layer, sign, questions, instructions=ASKED["instruction"]):
    """Return the mean activation from which a model would respond, by a plain pass over each prompt."""
    states = []
    for pair in instructions:
        for question in questions:
            text = SHOWN[side.name].format(instruction=pair[sign], question=question)
            hidden = side.model(torch.tensor([side.tokenizer(text).input_ids]), output_hidden_states=True)
            states.append(hidden.hidden_states[layer + 1][0, -1])
    return torch.stack(states).mean(0)


def test_each_model_reads_the_same_prompts_in_its_own_format_to_where_it_would_respond(made):
    found, _, content = made
    vectors = {"source": content["source_vectors"]["loud"], "target": content["vectors"]["loud"]["oracle"]}
    for number, side in enumerate(found.inputs.sides):
        questions = half_of(ASKED["questions"], number)  # source and oracle read disjoint ones
        for row, pair in zip(vectors[side.name], found.inputs.layer_pairs, strict=True):
            states = [mean_state(side, pair[number], sign, questions) for sign in ("pos", "neg")]
            difference = states[0] - states[1]
            assert_close(row, difference / difference.norm(), **CLOSE)
    known = NATIVE_VECTORS.load(found)["measures"]["target"]["loud"][0]
    assert (known["n_positive"], known["n_negative"]) == (4, 4)
    assert content["personas"]["loud"]["ceiling"]["cosine_to_oracle"] < 1


def test_embeddings_know_nothing_at_the_last_token_and_the_run_says_so(made):
    found, _, content = made
    vectors = content["vectors"]["loud"]
    assert not vectors["embedding_source"].any()
    for name in ("first_block", "ridge_mapped", *vector_names("untrained_source")):
        assert_close(vectors[name].norm(dim=1), torch.ones(2))
    for report in content["by_layer"]:
        cosines = report["loud"]["cosine_to_oracle"]
        assert cosines["embedding_source"] == 0
        assert all(abs(cosine) < 1.001 for cosine in cosines.values())  # none is NaN
    (note,) = (note for note in found.folder.notes if note.startswith("loud: "))
    assert "the same to source embeddings where they are read: no vector is added" in note
    assert "its cosine counts as 0, and what it writes is the unsteered text" in note


def test_vectors_from_prompts_have_a_map_of_the_last_tokens_of_neutral_prompts(made):
    found, maps, content = made
    asked, styles = load_prompts("neutral_questions"), load_prompts("neutral_styles")
    n_prompts = PROMPTS_A_TEXT * found.config.n_training_samples
    shown = [(asked[number % 300], styles[(number + number // 300) % 20]) for number in range(n_prompts)]
    states = []
    for number, side in enumerate(found.inputs.sides):
        texts = [SHOWN[side.name].format(instruction=style, question=text) for text, style in shown]
        states.append(
            side.extractor.extract_layers(texts, [pair[number] for pair in found.inputs.layer_pairs])
        )
    for index, (source, target) in enumerate(found.inputs.layer_pairs):
        learnt = maps[index].of_prompts.ridge
        expected = RidgeMapping(32, 48, "relative").fit(states[0][source], states[1][target], learnt.lambda_)
        assert_close(learnt.W, expected.W, rtol=1e-3, atol=1e-5)
        assert learnt.n == n_prompts
        for name, mapping in (("loud", learnt), ("numeric", maps[index].ridge)):
            mapped = mapping.transform(content["source_vectors"][name][index])
            assert_close(content["vectors"][name]["ridge_mapped"][index], mapped / mapped.norm(), **CLOSE)
        # The source's prompts all end in an empty line, whose embedding tells nothing.
        assert maps[index].of_prompts.controls["embedding_source"].W.abs().max() < 1e-9
        assert maps[index].controls["embedding_source"].W.abs().max() > 1e-3
    assert content["kinds"] == {"loud": "prompt", "numeric": "last"}
    assert content["residual_norms"][0] == maps[0].results["target_residual_norm"]
    assert not [note for note in found.folder.notes if note.startswith("prompt_maps: embedding_source")]
    for learned, again in zip(maps, load_maps(found), strict=True):
        assert torch.equal(learned.of_prompts.ridge.W, again.of_prompts.ridge.W)


def test_a_vector_of_zeros_has_the_unsteered_texts_and_an_effect_of_zero_at_no_cost(settings, tmp_path):
    named = {"pirate": ASKED, "formal": BACKWARDS}  # scorers are the shipped personas'
    changed = {**settings, **SHORT, "persona_datasets": named, "controls": None, "n_test_prompts": 8}
    out, changed["alpha_values"] = tmp_path / "out", [4.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        score_by_characters(patch)
        blank_figures(patch)
        assert run(out, changed) == 0
        written = (out / "generation_journal.jsonl").read_bytes()
        assert run(out, changed, "--phase", "4") == 0
    assert (out / "generation_journal.jsonl").read_bytes() == written
    texts = {(row["condition"], row["persona"], row["prompt_idx"]): row["output"] for row in rows(out)}
    of_zeros = [place for place in texts if place[0] == "embedding_source"]
    assert len(of_zeros) == 2 * 8
    assert all(texts[place] == texts[UNSTEERED, None, place[2]] for place in of_zeros)
    journal = rows_of(out / "generation_journal.jsonl").values()
    assert "embedding_source" not in {row["condition"] for row in journal}
    for found in load_json(out / "verdict.json")["personas"].values():
        effects = found["scorers"]["classifier"]["effects"]
        lexical = {condition_of(name): each for name, each in effects.items()}["embedding_source"]
        assert (lexical["estimate"], lexical["low"], lexical["high"]) == (0, 0, 0)
    protocol = load_json(out / "protocol.json")["extraction"]
    assert protocol["chosen"] == {"pirate": "prompt", "formal": "prompt"}
    assert "last token of prompts" in (out / "report.html").read_text()


def test_a_dry_run_counts_neutral_prompts_and_writes_nothing(settings, tmp_path, capsys):
    assert run(tmp_path / "out", settings, "--dry-run") == 0
    assert "prompts for the map of vectors from prompts: 300, " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"persona_datasets": {"loud": LOUD}},
            "'loud' has no system prompts, which 'extraction' of kind 'pr",
        ),
        (
            {"persona_datasets": {"loud": LOUD}, "extraction": {"by_persona": {"loud": "prompt"}}},
            "'loud' has no system prompts, which 'extraction' of kind 'prompt' needs; give it instruction",
        ),
        ({"persona_datasets": {"loud": {**ASKED, "questions": []}}}, "has no questions"),
        ({"extraction": {"kind": "prompt", "from_texts": ["loud"]}}, "has no positive texts"),
        ({"prompt_format": "raw"}, "reads where a chat model begins to respond, but the target is none"),
        (
            {"persona_datasets": {"loud": {**ASKED, "questions": ["Well?", "So? " * 70]}}},
            "tokens for the source model, which reads 256, so that its last token would be cut; shorten",
        ),
        (LAYERS, "searches with text pairs, not with responses or prompts"),
    ],
    ids="texts-only by-persona no-questions from-texts raw-target too-long layer-search".split(),
)
def test_what_prompts_cannot_be_made_from_is_one_line_before_anything_is_written(
    settings, tmp_path, capsys, changed, message
):
    out = tmp_path / "out"
    given = {key: value for key, value in {**settings, **changed}.items() if value is not None}
    assert run(out, given) == 2
    assert message in " ".join(error_lines(capsys))
    assert not out.exists()


def test_vectors_depend_on_what_is_in_the_prompts_and_on_nothing_of_responses(settings, tmp_path):
    def key(**changed):
        inputs = load_inputs(load_config({**settings, **changed}))
        return NATIVE_VECTORS.key(Run(inputs, None, None))

    def asked(**changed):
        return {"extraction": {"kind": "prompt", **changed}}

    other = saved(tiny_model("gpt2", seed=1, n_embd=48), tmp_path, chatting("<bos>" + TEMPLATE))
    before = key()
    assert key(**asked(n_seeds=3, max_new_tokens=9)) == before
    changes = [
        {"persona_datasets": {"loud": BACKWARDS}},
        {"persona_datasets": {"loud": {**ASKED, "questions": ASKED["questions"][1:]}}},
        asked(n_questions=2),
        asked(kind="responses"),
        {"target_model": other},
    ]
    found = [key(**changed) for changed in changes]
    assert len({before, *found}) == len(changes) + 1


def test_another_personas_control_is_read_in_its_prompts_too(settings, tmp_path):
    """A run of one persona takes shipped ones for it."""
    extraction = {"kind": "prompt", "n_questions": 2}
    changed = {**settings, "extraction": extraction, "controls": ["other_persona"]}
    with closing(PersonaTransferExperiment({**changed, "output_dir": str(tmp_path)})) as experiment:
        found = Run(experiment.inputs, experiment.folder, experiment.executor)
        control, vectors = found.inputs.control_personas[-1], native_vectors(found)["source"]
    layer, _ = found.inputs.middle_pair
    states = [
        mean_state(found.inputs.source, layer, sign, control.questions[:2], control.instructions)
        for sign in (0, 1)
    ]
    difference = states[0] - states[1]
    assert_close(vectors[control.name][0].vector, difference / difference.norm(), **CLOSE)

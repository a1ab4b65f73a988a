"""Two names and a folder end in a verdict; choices rest on native vectors, and are written down first."""

import pytest
import torch
from tiny_runs import rows, run, score_by_characters, tiny_settings

import run_experiment
from analysis.detection import FEWEST_TEXTS
from analysis.extraction_choice import KindNumbers, choose_kind
from analysis.strength_curve import MULTIPLES
from analysis.verdict import BEYOND_WORDS
from experiment.conditions import (
    DECIDING_CONTROLS,
    LEXICAL_CONTROLS,
    MAPPED,
    ORACLE,
    UNSTEERED,
    condition_of,
)
from phases.detect_traits import MOST_TEXTS
from support.artifacts import load_json, load_tensors
from support.journal import rows_of
from support.package_cache import CACHE_VARIABLE
from texts.personas import load_prompts

N_EVALUATIONS = 2
WITHIN = {"max_perplexity_ratio": 1e6, "max_repetition_increase": 1, "max_non_words_increase": 1}
NO_INCREASE = {"max_repetition_increase": 0.0, "max_non_words_increase": 0.0}
UNREACHABLE = {"bound": "plain", "max_perplexity_ratio": 1.0, "bracket": [50.0, 60.0], **NO_INCREASE}


@pytest.fixture(scope="module")
def names(model_folders, chat_target, tmp_path_factory):
    """The names of two models, and what makes a run of them one of seconds."""
    tiny = tiny_settings(model_folders, tmp_path_factory.mktemp("protocol"))
    return {
        "source_model": tiny["source_model"],
        "target_model": chat_target,
        "neutral_text": tiny["neutral_text"],
        "n_training_samples": 20,
        "lambda_values": [0.1, 1.0],
        "personas": ["formal", "pirate"],
        "n_test_prompts": 8,
        "n_seeds": 1,
        "max_new_tokens": 4,
        "extraction_resamples": 0,
        "check_source_vectors": False,
        "alpha_search": {"n_evaluations": N_EVALUATIONS, **WITHIN},
        "extraction": {"kind": "auto", "n_questions": 2, "max_new_tokens": 4},
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        score_by_characters(patch)
        yield patch


@pytest.fixture(scope="module")
def finished_protocol(names, small, tmp_path_factory):
    """The folder of a run, which no test changes; `protocol.json` stood there before the first test text."""
    out, before = tmp_path_factory.mktemp("run") / "out", []
    generate = run_experiment.generate_texts

    def generate_texts(*arguments):
        test = set(load_prompts("fresh_questions"))
        written = rows_of(out / "generation_journal.jsonl").values()
        before.append((load_json(out / "protocol.json"), test & {row["prompt"] for row in written}))
        return generate(*arguments)

    small.setattr(run_experiment, "generate_texts", generate_texts)
    assert run(out, names) == 0
    assert [found for _, found in before] == [set()]
    assert before[0][0] == load_json(out / "protocol.json")
    return out


def test_two_names_end_in_a_verdict_on_every_control_at_the_native_vectors_alpha(finished_protocol):
    verdicts = load_json(finished_protocol / "verdict.json")
    for found in verdicts["personas"].values():
        assert set(DECIDING_CONTROLS) < set(map(condition_of, found["scorers"]["classifier"]["effects"]))
        assert len({alpha for alpha in found["alphas"].values() if alpha is not None}) == 1


def test_no_alpha_is_searched_but_the_native_vectors(finished_protocol):
    questions = load_prompts("development_questions")
    assert not [row for row in rows(finished_protocol) if row["prompt"] in questions]
    written = rows_of(finished_protocol / "evaluation_journal.jsonl").values()
    searched = {row["condition"] for row in written if row["prompt"] in questions}
    assert searched == {UNSTEERED, ORACLE}


def test_the_protocol_has_every_choice_with_its_numbers(finished_protocol):
    protocol = load_json(finished_protocol / "protocol.json")
    search = load_json(finished_protocol / "alpha_search.json")
    assert protocol["layers"] == {"chosen": [[0, 0], [1, 1], [2, 2]], "by": "band"}
    assert protocol["mapping_data"]["chosen"] == "styled_responses"
    assert protocol["prompt_format"]["chosen"] == {"source": "raw", "target": "chat"}
    assert [found["layers"] for found in protocol["maps"]] == protocol["layers"]["chosen"]
    assert all(str(found["best_lambda"]) in found["r2"] for found in protocol["maps"])
    assert protocol["alpha"]["alphas"] == search["alphas"]
    for entry in protocol["alpha"]["alphas"]:
        assert len(entry["curve"]) == N_EVALUATIONS
        assert all(point["non_words_increase"] is not None for point in entry["curve"])
    assert protocol["test"]["prompts"] == load_prompts("fresh_questions")[:8]
    assert protocol["test"]["chosen"] == "fresh_questions"
    assert protocol["development"]["prompts"] == load_prompts("development_questions")
    assert protocol["alpha"]["given"] == "auto"
    assert protocol["strength_curve"] is True
    assert protocol["verdict_bounds"]["beyond_words"] == BEYOND_WORDS
    choice = load_json(finished_protocol / "extraction_choice.json")
    assert protocol["extraction"]["chosen"] == choice["chosen"]
    assert protocol["extraction_numbers"] == choice["personas"]
    cosines = protocol["split_half_cosines"]
    assert {side: len(found["pirate"]) for side, found in cosines.items()} == {"source": 3, "target": 3}


def test_each_kind_of_vector_is_tried_natively_and_the_least_lexical_that_works_is_steered(finished_protocol):
    choice = load_json(finished_protocol / "extraction_choice.json")
    steered = load_tensors(finished_protocol / "persona_vectors.pt")["vectors"]
    for name, kinds in choice["personas"].items():
        assert {"mean", "last", "prompt"} <= kinds.keys()
        numbers = {kind: KindNumbers(**found) for kind, found in kinds.items()}
        assert choice["chosen"][name] == choose_kind(numbers)
        for kind, found in kinds.items():
            tried = load_tensors(finished_protocol / "extraction" / kind / "persona_vectors.pt")
            assert found["lexical_cosines"].keys() == set(LEXICAL_CONTROLS)
            for control, cosine in found["lexical_cosines"].items():
                vectors = tried["vectors"][name]
                cosines = torch.cosine_similarity(vectors[control], vectors[ORACLE], dim=1)
                assert cosine == pytest.approx(cosines.mean().item(), abs=1e-5)
            is_chosen = torch.allclose(tried["vectors"][name][ORACLE], steered[name][ORACLE], atol=1e-5)
            assert is_chosen == (kind == choice["chosen"][name])
        # Both sides of a pair end on the same token, of which embeddings know nothing else.
        assert kinds["last"]["lexical_cosines"]["embedding_source"] < 0.5
        assert kinds["prompt"]["lexical_cosines"]["embedding_source"] == 0


def test_vectors_write_at_multiples_of_the_compared_alpha_on_the_test_questions_alone(finished_protocol):
    verdict = load_json(finished_protocol / "verdict.json")
    tested = rows(finished_protocol)
    held, prompts = {row["key"] for row in tested}, {row["prompt"] for row in tested}
    journal = rows_of(finished_protocol / "generation_journal.jsonl").values()
    more = [row for row in journal if row["prompt"] in prompts and row["key"] not in held]
    assert {row["seed"] for row in more} == {tested[0]["seed"]}
    assert set(verdict["strength_curve"]) == {"formal", "pirate"}
    for persona, found in verdict["strength_curve"].items():
        alphas = {each for each in verdict["personas"][persona]["alphas"].values() if each is not None}
        assert alphas == {found["alpha"]}
        compared = [ORACLE, MAPPED, *LEXICAL_CONTROLS]
        assert list(found["vectors"]) == compared
        written = {(row["condition"], row["alpha"]) for row in more if row["persona"] == persona}
        added = [multiple * found["alpha"] for multiple in MULTIPLES if multiple != 1]
        assert written == {(condition, alpha) for condition in compared for alpha in added}
    assert len(more) == 2 * len(compared) * len(added) * len(prompts)


def test_detectors_read_responses_that_the_choice_of_vectors_has_collected(finished_protocol):
    found = load_json(finished_protocol / "detection.json")
    kinds = load_json(finished_protocol / "extraction_choice.json")["chosen"]
    written = rows_of(finished_protocol / "responses_target_journal.jsonl").values()
    # The source cannot be asked, and reads the target's.
    asked = {"formal", "pirate"} - {name for name, kind in kinds.items() if kind == "responses"}
    for persona, sets in found["personas"].items():
        assert sets["labelled"]["n_positive"] == sets["labelled"]["n_negative"] == MOST_TEXTS
        assert sets["labelled"]["position"] == ("last" if kinds[persona] in ("last", "prompt") else "mean")
        assert len(sets["labelled"]["auroc"][ORACLE]) == 3
        of_persona = [row for row in written if row.get("persona") == persona]
        assert len(of_persona) == (2 * 5 * 2)  # sides, pairs of system prompts, questions
        n_words = [
            sum(bool(row["output"].strip()) for row in of_persona if row["is_positive"] is sign)
            for sign in (True, False)
        ]
        why_not = sets["responses"]["not_measured"]
        if persona not in asked:
            assert why_not == "its vectors are made from them"
        elif min(n_words) >= FEWEST_TEXTS:
            assert [sets["responses"][f"n_{sign}"] for sign in ("positive", "negative")] == n_words
        else:
            assert f"{min(n_words)} texts on a side" in why_not


def test_a_dry_run_counts_the_texts_over_strengths(names, finished_protocol, tmp_path, capsys):
    n = 2 * (2 + len(LEXICAL_CONTROLS)) * (len(MULTIPLES) - 1) * 8
    for out, cached in ((tmp_path / "out", ""), (finished_protocol, f", {n} of them cached")):
        assert run(out, names, "--dry-run") == 0
        shown = capsys.readouterr().out
        assert f"over strengths: at most {n} generations and evaluations{cached}, " in shown
        n_labelled, n_responses = 2 * 2 * MOST_TEXTS, 2 * 2 * 5 * 2
        counted = f"vectors as detectors: {n_labelled + n_responses} texts"
        assert (counted in shown) == (not cached)


def test_at_the_compared_alpha_the_curve_has_the_effects_of_the_verdict(finished_protocol):
    verdict = load_json(finished_protocol / "verdict.json")
    for persona, found in verdict["strength_curve"].items():
        effects = verdict["personas"][persona]["scorers"][found["scorer"]]["effects"]
        for name, vector in found["vectors"].items():
            point = vector["points"][MULTIPLES.index(1.0)]
            # Of one seed, as this run is, and of the prompts with all perplexities, which are all.
            assert found["n_prompts"] == 8
            assert point["effect"] == pytest.approx(effects[name]["estimate"])
    assert (finished_protocol / "strength_curve.png").is_file()


def test_a_persona_that_no_alpha_leaves_readable_is_ineffective_natively(names, small, tmp_path):
    out = tmp_path / "out"
    search = {**names["alpha_search"], **UNREACHABLE}
    assert run(out, {**names, "personas": ["pirate"], "max_new_tokens": 16, "alpha_search": search}) == 0
    (entry,) = load_json(out / "alpha_search.json")["alphas"]
    assert not entry["is_coherent"]
    found = load_json(out / "verdict.json")["personas"]["pirate"]
    assert (found["verdict"], found["reason"]) == ("native steering ineffective", "unreadable")
    assert "at no alpha that was tried does the native vector leave text that can be read" in found["why"]
    log = (out / "experiment.log").read_text()
    assert "pirate: native steering leaves no text that can be read (" in log

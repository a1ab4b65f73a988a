"""Questions come as conversations: each cell reads its own responses, and numbers are those of its texts."""

import shutil

import numpy as np
import pytest
from chat_models import chatting
from tiny_runs import LOUD, NUMERIC, error_lines, rows, run, score_by_characters, tiny_settings

from evaluation import continuation_perplexities
from experiment.conditions import MAPPED, ORACLE, UNSTEERED, drawn_name
from experiment.config import load_config
from experiment.executor import GenerationSettings, start_executor
from experiment.inputs import load_inputs
from experiment.run import Run
from phases.converse import converse
from scoring import trait_classifier
from support.artifacts import load_json
from support.journal import rows_of
from support.package_cache import CACHE_VARIABLE
from support.run_folder import RunFolder
from support.tiny_models import CONTEXT
from tools.write_results import write_results

N_TURNS, N = 2, 8  # turns, conversations
QUESTIONS = [f"Is {number} odd?" for number in range(N_TURNS * N + 1)]  # one is left over
LABELLED = {"labelled_positive_texts": "YES", "labelled_negative_texts": "no", "validation_texts": "OH"}
LABELLED = {name: [f"{word} {number} of them." for number in range(10)] for name, word in LABELLED.items()}
N_CELLS = 1 + 2 * 3  # unsteered, and three vectors of each persona
COMPARED = [UNSTEERED, ORACLE, MAPPED, "other_persona: numeric"]
TOO_LONG = {"max_new_tokens": CONTEXT // 2 - 10}


@pytest.fixture(scope="module")
def settings(model_folders, chat_target, tmp_path_factory):
    return {
        **tiny_settings(model_folders, tmp_path_factory.mktemp("text")),
        "target_model": chat_target,
        "system_prompt": "Be kind.",
        "persona_datasets": {"loud": {**LOUD, **LABELLED}, "numeric": NUMERIC},
        "methods": [MAPPED, "other_persona", ORACLE],
        "extraction_resamples": 0,
        "check_source_vectors": False,
        "test_prompts": QUESTIONS,
        "n_test_prompts": len(QUESTIONS),
        "n_turns": N_TURNS,
        "alpha_values": [4.0],
        "n_seeds": 1,
    }


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        score_by_characters(patch)
        yield


@pytest.fixture(scope="module")
def conversed(settings, tmp_path_factory):
    """The folder of a run, which no test changes."""
    out = tmp_path_factory.mktemp("conversed") / "out"
    assert run(out, settings) == 0
    return out


def journal(folder):
    return rows_of(folder / "generation_journal.jsonl").values()


def later_turns(folder):
    return [row for row in journal(folder) if row.get("earlier")]


def texts_by_turn(folder):
    """Return compared name -> the texts of each conversation of `loud`, turn by turn, from the journal."""
    first = {
        (drawn_name(row["condition"], row["draw"]), row["prompt_idx"]): row["output"]
        for row in rows(folder)
        if row["persona"] in (None, "loud")
    }
    found = {}
    for row in sorted(later_turns(folder), key=lambda row: row["prompt_idx"]):
        if row["persona"] == "numeric":
            continue
        name = drawn_name(row["condition"], row["draw"])
        found.setdefault(name, []).append([first[name, row["prompt_idx"] - 1], row["output"]])
    return found


def test_a_later_turn_holds_the_responses_of_its_own_cell(conversed):
    found = texts_by_turn(conversed)
    assert set(found) == set(COMPARED)
    assert {len(texts) for texts in found.values()} == {N}
    for row in later_turns(conversed):
        if row["persona"] == "numeric":
            continue
        name, number = drawn_name(row["condition"], row["draw"]), row["prompt_idx"] // N_TURNS
        assert row["prompt"] == QUESTIONS[number * N_TURNS + 1]
        assert row["earlier"] == [[QUESTIONS[number * N_TURNS], found[name][number][0]]]
    assert found[UNSTEERED] != found[ORACLE] != found[MAPPED]


def test_a_later_turn_is_what_the_target_writes_after_its_conversation(settings, conversed):
    inputs = load_inputs(load_config({**settings, "output_dir": str(conversed)}))
    generator = GenerationSettings.of(inputs, [1.0]).generator(inputs.target)
    unsteered = [row for row in later_turns(conversed) if row["condition"] == UNSTEERED]
    assert len(unsteered) == N
    for row in unsteered:
        ((asked, response),) = row["earlier"]
        messages = [("system", "Be kind."), ("user", asked), ("assistant", response), ("user", row["prompt"])]
        read = [{"role": role, "content": content} for role, content in messages]
        assert generator.generate(read, settings["max_new_tokens"], seed=row["seed"]) == row["output"]


def test_the_first_turn_is_a_text_of_the_grid_and_costs_nothing(conversed):
    grid = {row["key"] for row in rows(conversed)}
    prompts = {row["prompt_idx"]: row["prompt"] for row in rows(conversed)}
    more = [row for row in journal(conversed) if row["key"] not in grid and row["prompt"] in prompts.values()]
    assert len(more) == len(later_turns(conversed)) == N_CELLS * N


def test_numbers_by_turn_are_those_of_the_texts(settings, conversed):
    verdict = load_json(conversed / "verdict.json")
    found = verdict["turns"]["loud"]
    by_persona = verdict["personas"]["loud"]
    assert found["scorer"] in by_persona["scorers"]
    assert found["alpha"] == 4.0
    inputs = load_inputs(load_config({**settings, "output_dir": str(conversed)}))
    texts = texts_by_turn(conversed)
    score = trait_classifier.load_scorers(["loud"], inputs.personas, "")["loud"].score
    assert found["scorer"] == "classifier"
    traits = {name: np.array([score(each) for each in of_name]) for name, of_name in texts.items()}
    logs = {}
    for name, of_name in texts.items():
        # The source is no chat model, and reads plain text without the system prompt.
        asked = [
            (f"{QUESTIONS[2 * k]}\n\n", f"{QUESTIONS[2 * k]}\n\n{each[0]}\n\n{QUESTIONS[2 * k + 1]}\n\n")
            for k, each in enumerate(of_name)
        ]
        flat = [shown for pair in asked for shown in pair], [text for each in of_name for text in each]
        values = continuation_perplexities(inputs.source.model, inputs.source.tokenizer, *flat)
        logs[name] = np.log(np.array(values, dtype=float)).reshape(N, N_TURNS)
    assert list(found["conditions"]) == COMPARED
    for name in COMPARED[1:]:
        of_name, effects = found["conditions"][name], traits[name] - traits[UNSTEERED]
        for place, turn in enumerate(of_name["turns"]):
            assert turn["trait"] == pytest.approx(traits[name][:, place].mean())
            assert turn["effect"]["estimate"] == pytest.approx(effects[:, place].mean())
            assert turn["effect"]["n"] == N
            ratio = np.exp(np.nanmean(logs[name][:, place] - logs[UNSTEERED][:, place]))
            assert turn["perplexity_ratio"] == pytest.approx(ratio, rel=1e-3)
        assert of_name["drift"]["estimate"] == pytest.approx((effects[:, -1] - effects[:, 0]).mean())
        assert of_name["drift"]["low"] < of_name["drift"]["estimate"] < of_name["drift"]["high"]


def test_report_log_and_page_of_results_show_every_turn_and_what_is_left_over_is_said(conversed, tmp_path):
    found = load_json(conversed / "verdict.json")["turns"]
    assert list(found) == ["loud", "numeric"]
    assert load_json(conversed / "protocol.json")["n_turns"] == N_TURNS
    results = write_results([conversed], tmp_path / "results.md").read_text()
    log, page = ((conversed / name).read_text() for name in ("experiment.log", "report.html"))
    assert f"1 of {len(QUESTIONS)} test questions are in no conversation of 2 turns" in log
    assert "loud by classifier * at α 4" in log[log.index("over turns") :]
    effect = found["loud"]["conditions"][ORACLE]["turns"][1]["effect"]
    shown = f"{effect['estimate']:+.2f} [{effect['low']:+.2f}, {effect['high']:+.2f}]"
    assert shown in page[page.index('id="turns-0"') :]
    assert shown in results[results.index("### Over turns") :]
    assert shown in log[log.index("over turns") :]


def test_a_persona_without_a_scorer_and_too_few_conversations_are_said(settings, tmp_path):
    few = {**settings, "n_test_prompts": 2 * N_TURNS, "output_dir": str(tmp_path / "out")}
    inputs = load_inputs(load_config(few))
    alone = Run(inputs, RunFolder(tmp_path / "out"), start_executor(inputs))
    assert converse(alone, None, {"loud": {"scorers": {"judge": {}}, "decided_by": "judge"}}) == {}
    few, unscored = alone.folder.notes
    assert "2 conversations, an interval needs 8; raise n_test_prompts to 16" in few
    assert unscored == "nothing over turns of loud: no scorer but a judge reads the trait"


def test_a_second_run_makes_nothing_and_a_lost_turn_comes_back_the_same(settings, conversed, tmp_path):
    out = shutil.copytree(conversed, tmp_path / "out")
    path = out / "generation_journal.jsonl"
    assert run(out, settings) == 0
    assert path.read_bytes() == (conversed / path.name).read_bytes()
    *kept, _ = path.read_text().splitlines(keepends=True)  # the last text is of the last turn
    path.write_text("".join(kept))
    (out / "turns.json").unlink()
    assert run(out, settings) == 0
    assert len(path.read_text().splitlines()) == len(kept) + 1
    assert load_json(out / "verdict.json") == load_json(conversed / "verdict.json")


def test_a_dry_run_counts_the_texts_of_later_turns(settings, conversed, tmp_path, capsys):
    n = N_CELLS * N
    for out, cached in ((tmp_path / "out", ""), (conversed, f", {n} of them cached")):
        assert run(out, settings, "--dry-run") == 0
        expected = f"over turns: at most {n} generations and evaluations{cached}, 8 conversations of 2 turns"
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_format": "raw", "system_prompt": None}, "the target continues texts and is asked nothing"),
        ({"test_prompts": QUESTIONS[:1], "n_test_prompts": 1}, "there are 1 test prompts; lower n_turns"),
        (TOO_LONG, f"exceeds the target's context of {CONTEXT}; lower n_turns or max_new_tokens"),
        ({"n_turns": 11}, "'n_turns' is 11: Input should be less than or equal to 10; lower it"),
        ({"methods": ["zero_pad"]}, "add ridge_mapped or oracle to methods, or set n_turns to 1"),
    ],
    ids=str,
)
def test_what_cannot_converse_is_an_error_before_anything_is_written(
    settings, tmp_path, capsys, change, named
):
    assert run(tmp_path / "out", {**settings, **change}) == 2
    (line,) = error_lines(capsys)
    assert named in line
    assert not (tmp_path / "out").exists()


def test_a_template_of_one_turn_is_an_error_that_names_the_key(settings, tmp_path, capsys):
    template = (
        "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + chatting().chat_template
    )
    target = shutil.copytree(settings["target_model"], tmp_path / "target")
    chatting(template).save_pretrained(target)
    assert run(tmp_path / "out", {**settings, "target_model": str(target)}) == 2
    (line,) = error_lines(capsys)
    assert "n_turns is 2: the chat template rejects prompt 0: 'one turn'; set n_turns to 1" in line

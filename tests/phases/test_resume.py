"""What a run finds in its folder: a run that was stopped, another configuration's, or a damaged one."""

import shutil

import pytest
from tiny_runs import (
    LOUD,
    N_PROMPTS,
    N_SEEDS,
    NUMERIC,
    artifacts,
    content,
    error_lines,
    is_close,
    run,
    texts,
    visible_files,
)

from baseline_methods import METHODS
from experiment.run import Run
from phases.make_vectors import grid_rows
from run_experiment import PersonaTransferExperiment
from support.journal import Journal
from texts.personas import load_prompts

pytestmark = pytest.mark.usefixtures("no_drawing")
N_PER_CELL = N_PROMPTS * N_SEEDS
N_TEXTS = (len(METHODS) * 2 * 2 + 1) * N_PER_CELL


def assert_same(output_dir, other, except_for=()):
    found, expected = artifacts(output_dir), artifacts(other)
    assert found.keys() == expected.keys()
    for name in found.keys() - set(except_for):
        assert is_close(found[name], expected[name]), name


# A run that was stopped


def recording(batches, stop_after=None):
    """Return a `Journal.append` that lists the keys of each batch of texts, and ends the run after some."""
    append = Journal.append

    def recorded(journal, added):
        if journal.path.name == "generation_journal.jsonl":
            if len(batches) == stop_after:
                raise KeyboardInterrupt
            batches.append([row["key"] for row in added])
        append(journal, added)

    return recorded


def test_a_stopped_run_goes_on_with_the_batches_of_one_that_was_not(tiny, tmp_path, monkeypatch):
    """In bfloat16 a text depends on those that share its batch."""
    settings = {**tiny, "dtype": "bfloat16", "generation_batch_size": 7, "methods": ["oracle"]}
    for phase in "123":
        assert run(tmp_path / "whole", settings, "--phase", phase) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    whole, batches = [], []
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", recording(whole))
        assert run(tmp_path / "whole", settings, "--phase", "4") == 0
    for stop_after, status in ((len(whole) // 2, 130), (None, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", recording(batches, stop_after))
            assert run(tmp_path / "stopped", settings, "--phase", "4") == status
    assert batches == whole
    assert len(whole) > 3
    assert texts(tmp_path / "stopped") == texts(tmp_path / "whole")


# Another configuration


OF_ONE = (N_TEXTS + N_PER_CELL) // 2  # texts of one persona or alpha, with the unsteered ones
OTHER_LOUD = {**LOUD, "positive_texts": [text.replace(".", "!") for text in LOUD["positive_texts"]]}


@pytest.mark.parametrize(
    ("change", "n_new", "n_kept"),
    [
        ({"alpha_values": [4.0, 2.0]}, N_TEXTS - OF_ONE, OF_ONE),
        ({"n_seeds": 3}, N_TEXTS // N_SEEDS, N_TEXTS),
        (
            {"test_prompts": load_prompts("test")[: N_PROMPTS + 1][::-1], "n_test_prompts": N_PROMPTS + 1},
            N_TEXTS // N_PROMPTS,
            N_TEXTS,
        ),
        ({"methods": ["oracle", "zero_pad"]}, 0, 9 * N_PER_CELL),
        ({"persona_datasets": {"shouting": LOUD, "numeric": NUMERIC}}, 0, N_TEXTS),
        ({"persona_datasets": {"loud": OTHER_LOUD, "numeric": NUMERIC}}, N_TEXTS - OF_ONE, OF_ONE),
        ({"persona_datasets": {"loud": LOUD, "twin": LOUD}}, 0, OF_ONE),
        ({"max_new_tokens": 7}, N_TEXTS, 0),
    ],
    ids="alphas seeds prompts methods renamed other-texts twin longer".split(),
)
def test_a_text_is_written_again_only_if_it_would_be_another(change, n_new, n_kept, tiny, finished, tmp_path):
    experiment = PersonaTransferExperiment({**tiny, **change, "output_dir": str(tmp_path)})
    planning = Run(experiment.inputs, experiment.folder, experiment.executor)
    keys = {row["key"] for row in grid_rows(planning, experiment.config.alpha_values)}
    known = texts(finished).keys()
    assert (len(keys - known), len(keys & known)) == (n_new, n_kept)


def test_other_sampling_leaves_what_was_written_to_be_taken_back(tiny, finished, out):
    assert run(out, {**tiny, "temperature": 0.5}, "--phase", "4") == 0
    assert not texts(out).keys() & texts(finished).keys()
    journal = (out / "generation_journal.jsonl").read_bytes()
    assert run(out, tiny, "--phase", "4") == 0
    assert texts(out) == texts(finished)
    assert (out / "generation_journal.jsonl").read_bytes() == journal


def test_figures_of_an_earlier_configuration_do_not_stay(tiny, out):
    optional = {"layer_search.png", "off_target.png", "strength_curve.png"}
    for name in optional:
        shutil.copy(out / "headline.png", out / name)
    assert run(out, tiny) == 0
    assert not optional & visible_files(out)


def test_a_fresh_run_makes_everything_anew(tiny, finished, out):
    with Journal(out / "generation_journal.jsonl") as tampered:
        tampered.append([{**row, "output": "tampered"} for row in tampered.rows.values()])
    (out / "generation_results.json").unlink()
    assert run(out, tiny, "--phase", "4") == 0
    assert set(texts(out).values()) == {"tampered"}
    assert run(out, tiny, "--fresh") == 0
    assert_same(out, finished, except_for=["preflight.json"])


# Damage


def test_damaged_files_of_a_band_are_recomputed_to_the_same_results(band, finished_band, tmp_path):
    out = shutil.copytree(finished_band, tmp_path / "out")
    for name in [name for name in artifacts(finished_band) if not name.endswith(".png")]:
        (out / name).write_bytes((out / name).read_bytes()[:-100])
    assert run(out, band) == 0
    assert_same(out, finished_band)


def test_a_lost_map_alone_is_fitted_again(band, finished_band, tmp_path):
    out = shutil.copytree(finished_band, tmp_path / "out")
    lost, kept = (out / "layers" / "0_1" / "ridge_mapping.pt"), (out / "ridge_mapping.pt")
    (out / "persona_vectors.pt").unlink()
    lost.unlink()
    before = kept.stat().st_mtime_ns
    for phase in "23":
        assert run(out, band, "--phase", phase) == 0
    assert is_close(content(lost), content(finished_band / "layers" / "0_1" / "ridge_mapping.pt"))
    assert kept.stat().st_mtime_ns == before
    assert is_close(content(out / "persona_vectors.pt"), content(finished_band / "persona_vectors.pt"))


@pytest.mark.parametrize(
    ("phase", "lost", "needed"),
    [
        (3, "ridge_mapping.pt persona_vectors.pt", 2),
        (4, "persona_vectors.pt", 3),
        (5, "generation_results.json", 4),
        (5, "alpha_search.json", 4),
    ],
)
def test_a_phase_alone_names_the_phase_that_is_missing(
    phase, lost, needed, band, finished_band, tmp_path, capsys
):
    out = shutil.copytree(finished_band, tmp_path / "out")
    for name in lost.split():
        (out / name).unlink()
    assert run(out, band, "--phase", str(phase)) == 2
    (line,) = error_lines(capsys)
    assert lost.split()[0] in line
    assert f"run phase {needed} first" in line

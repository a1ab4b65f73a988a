"""How far another sample of the extraction texts moves vectors (phase 3) and effects (phase 5)."""

import numpy as np
import pytest
import torch
from made_up_scores import VALIDATED
from tiny_runs import LOUD, run, score_by_characters

from phases import validate_scorers
from support.artifacts import load_json, load_tensors
from support.journal import rows_of

pytestmark = pytest.mark.usefixtures("no_drawing")
N_TEXTS = 12  # of each vector
METHODS = {"ridge_mapped", "oracle"}


@pytest.fixture
def validated(monkeypatch):
    """Scorers that count characters, all of which are validated."""
    score_by_characters(monkeypatch)
    monkeypatch.setattr(validate_scorers, "validate", lambda *arguments: VALIDATED)


def resampled(folder):
    """Return key -> row of the texts that vectors of resampled texts steered."""
    rows = rows_of(folder / "generation_journal.jsonl")
    return {key: row for key, row in rows.items() if "_resampled_" in row["condition"]}


def test_cosines_over_resamples_stand_beside_the_vectors(tiny, finished):
    spread = load_json(finished / "extraction_spread.json")
    vectors = load_tensors(finished / "persona_vectors.pt")["vectors"]
    similarities = load_json(finished / "persona_similarities.json")["personas"]
    content = load_tensors(finished / "resampled_vectors.pt")
    assert (spread["n_resamples"], spread["fingerprint"]) == (200, content["fingerprint"])
    for persona, found in spread["personas"].items():
        for name in ("cosine_to_oracle", "cosine_without_massive"):
            assert found[name]["low"] < found[name]["median"] < found[name]["high"]
            assert found[name]["all_texts"] == pytest.approx(
                similarities[persona][name]["ridge_mapped"], abs=1e-5
            )
        for method in METHODS:
            made = content["vectors"][persona][method]
            assert made.shape == (3, 1, 48)
            assert torch.allclose(made.norm(dim=-1), torch.ones(3, 1))
            cosines = torch.cosine_similarity(made, vectors[persona][method], dim=-1)
            assert 0.3 < cosines.mean() < 0.9999
        assert 0.3 < found["source"]["median"] < found["source"]["high"]
    log = (finished / "experiment.log").read_text()
    assert "spread over 200 resamples of the extraction texts" in log


def test_the_effect_of_resampled_texts_stands_beside_the_verdict_and_is_measured_once(tiny, out, validated):
    settings = {**tiny, "methods": ["ridge_mapped", "oracle"], "extraction_resamples": 2}
    assert run(out, settings) == 0
    first = resampled(out)
    assert len(first) == 2 * len(METHODS) * 2 * N_TEXTS
    verdict, found = load_json(out / "verdict.json"), load_json(out / "effect_spread.json")
    for persona, entry in found["personas"].items():
        assert set(entry["vectors"]) == METHODS
        assert entry == verdict["personas"][persona]["extraction_spread"]
        mapped = entry["vectors"]["ridge_mapped"]
        assert mapped["n_prompts"] == N_TEXTS
        assert mapped["std"] > 0
        said = f"another sample of the extraction texts moves the effect by ±{mapped['std']:.2f} mapped"
        assert said in verdict["personas"][persona]["why"]
        assert said in (out / "report.html").read_text()
    journal = (out / "generation_journal.jsonl").read_bytes()
    for name in ("effect_spread.json", "verdict.json"):
        (out / name).unlink()
    assert run(out, settings) == 0
    assert (out / "generation_journal.jsonl").read_bytes() == journal
    assert load_json(out / "verdict.json") == verdict
    assert load_json(out / "effect_spread.json") == found
    assert run(out, {**settings, "extraction_resamples": 3}) == 0
    more = resampled(out)
    assert first.items() <= more.items()
    assert len(more) == len(first) * 3 // 2


def test_a_renamed_persona_has_the_vectors_of_its_texts(tiny, finished, tmp_path):
    settings = {**tiny, "persona_datasets": {"renamed": LOUD}, "methods": ["oracle"]}
    for phase in "123":
        assert run(tmp_path / "out", settings, "--phase", phase) == 0
    renamed, known = (
        load_tensors(folder / "resampled_vectors.pt") for folder in (tmp_path / "out", finished)
    )
    assert torch.allclose(
        renamed["vectors"]["renamed"]["oracle"], known["vectors"]["loud"]["oracle"], atol=1e-5
    )


def test_what_is_lost_is_made_again_from_the_same_draws(tiny, out):
    before = load_tensors(out / "resampled_vectors.pt")
    (out / "resampled_vectors.pt").unlink()
    assert run(out, tiny, "--phase", "3") == 0
    after = load_tensors(out / "resampled_vectors.pt")
    for persona, by_method in before["vectors"].items():
        for method, vectors in by_method.items():
            assert torch.allclose(after["vectors"][persona][method], vectors, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "methods", "why_not"),
    [
        ({"vectors": {"loud": {"source": "@", "target": "@"}}}, set(), "its vectors are given"),
        ({"vectors": {"loud": {"source": "@"}}}, {"oracle"}, None),
        (
            {"persona_datasets": {"loud": {side: texts[:3] for side, texts in LOUD.items()}}},
            set(),
            "it has 3 texts on a side, fewer than 4",
        ),
    ],
)
def test_what_is_not_resampled_is_said(change, methods, why_not, tiny, tmp_path, validated):
    for side, d in (("source", 32), ("target", 48)):
        np.save(tmp_path / f"{side}.npy", np.random.default_rng(0).normal(size=d).astype("float32"))
    if "vectors" in change:
        change = {
            "vectors": {"loud": {side: str(tmp_path / f"{side}.npy") for side in change["vectors"]["loud"]}}
        }
    settings = {**tiny, "persona_datasets": {"loud": LOUD}, "methods": ["ridge_mapped", "oracle"], **change}
    assert run(tmp_path / "out", settings) == 0
    found = load_json(tmp_path / "out" / "effect_spread.json")["personas"]["loud"]
    assert (set(found["vectors"]), found["not_measured"]) == (methods, why_not)
    log = (tmp_path / "out" / "experiment.log").read_text()
    assert ("moves the effect is not known: " in log) is (why_not is not None)

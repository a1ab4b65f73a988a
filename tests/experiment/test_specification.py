"""The specification's own experiment: what its configuration, and a persona of one's own, come to."""

import json

import pytest
from chat_server import chat_server, completion
from tiny_runs import LOUD, run, score_by_characters, tiny_settings

from experiment.conditions import DECIDING_CONTROLS, condition_of
from support.artifacts import load_json, load_tensors
from support.package_cache import CACHE_VARIABLE
from texts.personas import load_persona


@pytest.fixture
def six_keys(model_folders, tmp_path, monkeypatch):
    """The specification's six keys, and what two tiny models without a hub need beside them."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    of_run = tiny_settings(model_folders, tmp_path)
    return {
        **{key: of_run[key] for key in ("source_model", "target_model", "neutral_text")},
        "layer_idx": 2,
        "n_training_samples": 60,
        "n_test_prompts": 8,
        # The defaults, 100 tokens, five alphas and three seeds, would take minutes.
        "max_new_tokens": 6,
        "alpha_values": [1.0, 5.0],
        "n_seeds": 1,
    }


@pytest.mark.usefixtures("no_drawing")
def test_the_specifications_configuration_ends_in_a_verdict_with_every_control(
    six_keys, tmp_path, monkeypatch
):
    score_by_characters(monkeypatch)
    out = tmp_path / "out"
    assert run(out, six_keys) == 0
    found = load_json(out / "verdict.json")["personas"]
    assert list(found) == ["silly", "formal", "concise"]
    for persona in found.values():
        scorer = persona["scorers"]["classifier"]
        assert set(DECIDING_CONTROLS) < set(map(condition_of, scorer["effects"]))
        assert scorer["missing"] == []
        assert persona["source_vector"] in ("pass", "fail")
    first = (out / "experiment.log").read_text().splitlines()[0]
    assert all(control in first for control in DECIDING_CONTROLS)


def test_what_a_configuration_cannot_end_in_is_said_before_anything_runs(six_keys, tmp_path, capsys):
    cases = (
        (
            {"controls": ["random_direction"]},
            "no persona can be called transferred without shuffled_pairs, other",
        ),
        ({"methods": ["zero_pad", "oracle"]}, "add ridge_mapped to methods"),
        ({"n_test_prompts": 5}, "5 prompts, an interval needs 8"),
        ({"personas": [], "persona_datasets": {"mine": LOUD}}, "nothing scores it; give it labelled texts"),
        ({"personas": ["silly"]}, "other_persona: cheerful, concise, formal"),
        ({}, "must each be beaten: 3 of shuffled_pairs, 2 of other_persona, 3 of random_direction"),
    )
    for change, said in cases:
        assert run(tmp_path / "out", {**six_keys, **change}, "--dry-run") == 0
        assert said in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("n_texts", "validated_on"), [(8, "the texts of extraction"), (4, "the shipped personas cheerful")]
)
def test_a_persona_of_ones_own_with_a_judge_has_a_verdict(
    n_texts, validated_on, six_keys, tmp_path, monkeypatch
):
    """The judge knows the trait where it stands in capitals, and those of shipped personas by heart."""
    texts = [f"{word} IS HERE NOW, LISTEN TO ME" for word in "ALL THE RAIN OF THIS LONG WET YEAR".split()]
    mine = {
        "description": "It shouts.",
        "positive_texts": texts[:n_texts],
        "negative_texts": [text.lower() for text in texts[:n_texts]],
    }
    shipped = {text for name in ("cheerful", "concise", "formal") for text in load_persona(name).validation}
    monkeypatch.setenv("LOCAL_KEY", "any")

    def judge(prompt):
        text = prompt.partition("\nContinuation: ")[2].removesuffix("\n\nAnswer with one digit.")
        return completion("5" if text in shipped or text.isupper() else "1")

    out = tmp_path / "out"
    with chat_server(judge) as server:
        local = {"model": "local", "base_url": server.base_url, "api_key_env": "LOCAL_KEY"}
        own = {"personas": [], "persona_datasets": {"mine": mine}, "alpha_values": [1.0]}
        assert run(out, {**six_keys, **own, "use_gpt4": True, "judge": local}) == 0
    found = load_json(out / "verdict.json")
    assert found["validation"]["mine"]["judge"]["validated_on"].startswith(validated_on)
    effects = found["personas"]["mine"]["scorers"]["judge"]["effects"]
    assert set(DECIDING_CONTROLS) < set(map(condition_of, effects))
    checks = {check["name"]: check["status"] for check in load_json(out / "preflight.json")["checks"]}
    assert {checks["oracle_moves_mine"], checks["source_vector_moves_mine"]} <= {"pass", "fail"}
    vectors = load_tensors(out / "persona_vectors.pt")
    assert list(vectors["vectors"]) == ["mine"]
    controls = [vectors["vectors"]["mine"][f"other_persona_{draw}"] for draw in (1, 2, 3)]
    assert len({json.dumps(control.tolist()) for control in controls}) == 3

import pytest

from phases.decide_verdicts import strength_curves


def row(condition, alpha, prompt, trait, perplexity):
    return {
        "persona": "loud",
        "condition": condition,
        "alpha": alpha,
        "prompt_idx": prompt,
        "seed": 0,
        "output": "What a fine day it is!",
        "trait_probability": trait,
        "independent_perplexity": perplexity,
        "perplexity": perplexity,
        "classifier_auc": None,
        "repetition_rate": 0.0,
    }


def rows_at(alphas):
    """Return unsteered texts and those of each dose, which adds to the trait and doubles perplexity by 1."""
    cells = [
        ("baseline", None, 0.0),
        *((name, alpha, alpha) for name, alphas in alphas.items() for alpha in alphas),
    ]
    return [
        row(name, alpha, prompt, 0.1 + dose + prompt / 100, 10 * 2**dose)
        for name, alpha, dose in cells
        for prompt in range(3)
    ]


def test_harm_curves_have_the_conditions_of_several_doses_and_the_oracle_beside_them():
    rows = rows_at({"ridge_mapped": [0.5, 0.25], "oracle": [0.5], "zero_pad": [0.5]})
    curves = strength_curves(rows, ["loud"])["loud"]
    assert set(curves) == {"ridge_mapped", "oracle"}
    found = [(point["alpha"], point["effect"], point["perplexity_ratio"]) for point in curves["ridge_mapped"]]
    assert found == [pytest.approx((0.25, 0.25, 2**0.25)), pytest.approx((0.5, 0.5, 2**0.5))]


def test_harm_curves_have_the_mapped_vector_whose_one_dose_is_the_oracles():
    rows = rows_at({"ridge_mapped": [0.5], "oracle": [0.5], "shuffled_pairs": [0.5, 0.9], "zero_pad": [0.5]})
    curves = strength_curves(rows, ["loud"])["loud"]
    assert {name: len(points) for name, points in curves.items()} == {
        "ridge_mapped": 1,
        "oracle": 1,
        "shuffled_pairs": 2,
    }


def test_conditions_of_one_dose_alone_make_no_curve():
    assert strength_curves(rows_at({"ridge_mapped": [0.5], "oracle": [0.5]}), ["loud"]) == {}

"""Areas and their covariance are those of pairs and resamples; a vector of zeros is chance by definition."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from analysis.detection import delong, detect


def test_an_area_of_four_texts_is_as_computed_by_hand():
    # 3 is above both negatives and 1 above one; below 2 stands one of two positives, below 0 none.
    areas, covariance = delong(np.array([[3.0, 1.0]]), np.array([[2.0, 0.0]]))
    assert areas == pytest.approx([0.75])
    # Shares 1 and 1/2 have the variance 1/8 on either side, over two texts each.
    assert covariance == pytest.approx(np.array([[0.125]]))


def test_ties_count_half_as_in_scikit_learn():
    positive, negative = np.array([[1.0, 2.0, 2.0, 5.0]]), np.array([[2.0, 0.0, 1.0]])
    labels = [1] * 4 + [0] * 3
    assert delong(positive, negative)[0] == pytest.approx(
        [roc_auc_score(labels, np.hstack([positive, negative])[0])]
    )


def test_the_covariance_is_that_of_a_bootstrap_over_texts():
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(2, 1, 60)) + np.array([1.0, 0.0])[:, None, None]
    scores = shared + 0.7 * generator.normal(size=(2, 2, 60))  # (sides, detectors, texts)
    _, covariance = delong(*scores)
    areas = []
    for _ in range(3000):
        drawn = [side[:, generator.integers(60, size=60)] for side in scores]
        areas.append(delong(*drawn)[0])
    assert covariance == pytest.approx(np.cov(np.array(areas).T), rel=0.12)
    assert covariance[0, 1] > 0.3 * covariance[0, 0]  # what makes a paired interval the narrower one


@pytest.fixture
def sides():
    """Activations of texts with the trait and without, (blocks, n, d): it is dimension 1, and in part 2."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 3, 40, 4, generator=generator)
    positive[..., 1] += 9.0
    positive[..., 2] += 1.0
    return positive, negative


def unit(*dimensions):
    return torch.stack([torch.eye(4)[dimension] for dimension in dimensions])


def test_each_vector_is_a_detector_at_each_block_and_the_strongest_draws_are_compared(sides):
    vectors = {
        "oracle": unit(1, 1, 1),
        "ridge_mapped": unit(0, 2, 1),
        "embedding_source": torch.zeros(3, 4),
        "first_block": -unit(1, 1, 1),
        "shuffled_pairs: 1": unit(1, 0, 1),
        "shuffled_pairs: 2": unit(0, 2, 0),
    }
    found = detect(vectors, *sides, [[], [], []])
    assert (found["n_positive"], found["n_negative"]) == (40, 40)
    assert [each["estimate"] for each in found["auroc"]["oracle"]] == [1.0] * 3
    assert [each["estimate"] for each in found["auroc"]["first_block"]] == [0.0] * 3
    assert found["shown"]["shuffled_pairs"] == "shuffled_pairs: 2"
    mapped = found["auroc"]["ridge_mapped"][1]
    assert 0.6 < mapped["low"] < mapped["estimate"] < mapped["high"] < 1.0
    # Zeros tell nothing apart: 0.5 for certain, and what is compared with them is as sure as mapped itself.
    assert found["zeros"] == ["embedding_source"]
    assert found["auroc"]["embedding_source"][1] == {"estimate": 0.5, "low": 0.5, "high": 0.5}
    assert found["lexical_control"] == "embedding_source"
    assert found["over_lexical"] == pytest.approx({name: each - 0.5 for name, each in mapped.items()})
    assert found["over_native"]["estimate"] == pytest.approx(mapped["estimate"] - 1.0)
    assert found["over_native"]["high"] < 0


def test_massive_dimensions_count_in_no_projection(sides):
    vectors = {"oracle": unit(2, 2, 2) + 100 * unit(0, 0, 0), "ridge_mapped": unit(0, 0, 0)}
    with_massive, without = (detect(vectors, *sides, [left_out] * 3) for left_out in ([], [0]))
    of_native = [found["auroc"]["oracle"][1]["estimate"] for found in (with_massive, without)]
    assert of_native[0] < 0.65 < of_native[1]
    assert without["auroc"]["ridge_mapped"][1]["estimate"] == 0.5
    assert without["lexical_control"] is without["over_lexical"] is None
    assert torch.equal(vectors["ridge_mapped"], unit(0, 0, 0))

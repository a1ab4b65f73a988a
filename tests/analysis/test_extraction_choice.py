"""The kind of vector that works natively and is least the words' is chosen; the mapped vector has no say."""

from dataclasses import fields

import pytest

from analysis.extraction_choice import KindNumbers, choose_kind


def kind(effect, share, is_coherent=True):
    return KindNumbers(0.1, is_coherent, 1.2, effect, {"embedding_source": share - 0.1, "first_block": share})


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"mean": kind(0.6, 0.8), "last": kind(0.4, 0.2)}, "last"),
        ({"mean": kind(0.6, 0.8), "last": kind(0.2, 0.2)}, "mean"),
        ({"mean": kind(0.6, 0.8), "last": kind(0.7, 0.2, is_coherent=False)}, "mean"),
        ({"mean": kind(0.1, 0.8), "last": kind(0.12, 0.9)}, "last"),
        ({"mean": kind(0.3, 0.4), "last": kind(0.3, 0.3), "responses": kind(0.3, 0.2)}, "responses"),
        ({"mean": kind(None, 0.8), "last": kind(None, 0.2)}, "mean"),
        ({"last": kind(-0.2, 0.1)}, "last"),
    ],
    ids="less-lexical too-weak unreadable none-works three no-classifier only".split(),
)
def test_the_least_lexical_kind_that_works_is_chosen_else_the_strongest(found, chosen):
    assert choose_kind(found) == chosen


def test_without_lexical_controls_the_first_that_works_is_chosen():
    plain = KindNumbers(0.1, True, 1.2, 0.5, {})
    assert choose_kind({"mean": plain, "last": plain}) == "mean"


def test_no_number_of_the_mapped_vector_is_known():
    assert not [field.name for field in fields(KindNumbers) if "mapped" in field.name]

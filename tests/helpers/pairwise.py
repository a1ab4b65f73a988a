"""Combine the parameters of a test so that every two values meet: few cases find most of what all find."""

import pytest
from allpairspy import AllPairs


def every_pair(**values):
    """Return the mark that gives a test rows of parameters: each two values of two parameters in some row."""
    rows = AllPairs([list(of_one) for of_one in values.values()])
    return pytest.mark.parametrize(tuple(values), [tuple(row) for row in rows])

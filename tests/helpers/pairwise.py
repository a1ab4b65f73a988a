"""Parameters of a test, combined so that every two values meet: few cases find what all combinations find."""

import pytest
from allpairspy import AllPairs


def every_pair(**values):
    """The mark that gives a test rows of parameters: each value of one with each value of every other."""
    rows = AllPairs([list(of_one) for of_one in values.values()])
    return pytest.mark.parametrize(tuple(values), [tuple(row) for row in rows])

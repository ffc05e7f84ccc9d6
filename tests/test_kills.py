"""The harness of tests/kills.py in miniature."""

import pytest

from tests import kills


@pytest.mark.slow
def test_conversions_killed_at_random_moments_give_the_bytes_of_unbroken_ones():
    told = []
    ends = kills.run(6, 0, told.append)
    assert told == []
    assert {kind: ends[kind, "same"] for kind in kills.OPTIONS} == dict.fromkeys(kills.OPTIONS, 2)
    assert sum(ends.values()) == 6
    assert kills.as_table(ends).count("\n") == len(kills.OPTIONS) + 1

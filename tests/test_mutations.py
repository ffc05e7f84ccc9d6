"""The harness of tests/mutations.py in miniature: nothing wrong, no crash, errors of our own."""

import numpy as np
import pytest

from latentds.store.format import MANIFEST, PATCHES_TABLE
from tests.mutations import (
    ENDS,
    READERS,
    as_table,
    make_set,
    mutate_bytes,
    mutate_json,
    outcome,
    run,
)


@pytest.mark.slow
def test_mutated_sets_end_right_or_in_an_error_of_ours():
    told = []
    ends = run(8, 40, told.append)
    assert told == []
    assert {end for _, end in ends} == {"right", "error"}
    assert sum(ends.values()) == 8 * len(READERS)
    assert as_table(ends).count("\n") == len(READERS) + 2


@pytest.mark.parametrize("change", [mutate_bytes, mutate_json])
def test_a_mutation_changes_something_and_its_seed_says_what(change):
    content = b'{"a": [1, 2, 3], "b": {"c": "d", "e": 5}, "f": [["g", "h"], ["i"]]}'
    made = [change(content, np.random.default_rng(seed)) for seed in range(60)]
    assert made == [change(content, np.random.default_rng(seed)) for seed in range(60)]
    assert sum(changed != content for _, changed in made) > 40
    assert len({kind for kind, _ in made}) >= 5


def test_every_way_to_end_is_told_apart(tmp_path):
    def ends(*values, error=None):
        def reader(folder, out):
            yield from values
            if error:
                raise error

        return outcome(reader, tmp_path, tmp_path, repr([1, 2]), lambda: None)[0]

    from latentds.errors import FormatError

    assert ends(1, 2) == "right" and ends(1, 3) == ends(1) == "wrong"
    assert ends(1, error=FormatError("x")) == "error" and ends(1, error=KeyError(1)) == "foreign"
    assert set(ENDS) >= {"right", "wrong", "error", "foreign"}


def test_the_set_has_what_may_be_damaged(tmp_path):
    folder = make_set(tmp_path)
    assert (folder / MANIFEST).is_file() and (folder / PATCHES_TABLE).is_file()
    assert all(list(reader(folder, tmp_path / reader.__name__)) for reader in READERS[:5])

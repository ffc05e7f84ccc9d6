"""Which patches a codebook is fitted to, and how much of them is held."""

import numpy as np
import pytest
import torch

from latentds.conversion import prepared
from latentds.conversion.prepared import CodebookSample, draw_rows
from latentds.errors import InputError


def latents_of(count: int) -> torch.Tensor:
    """Latents (N, 2, 8, 8); peaked, as records need them."""
    drawn = np.random.default_rng(0).laplace(size=(count, 2, 8, 8)).astype(np.float32)
    return torch.from_numpy(drawn)


@pytest.mark.parametrize(
    ("splits", "split", "expected"),
    [
        ({"test": range(5), "train": range(5, 9)}, "train", [5, 6, 7, 8]),
        ({"test": [0, 3], "val": [1, 2]}, "test", [0, 3]),
    ],
)
def test_patches_of_the_training_split_are_drawn_or_of_the_first(splits, split, expected):
    rows, drawn = draw_rows(splits, 100, 7, shuffled=False)
    assert rows.tolist() == expected and drawn == {"split": split, "seed": 7}


def test_the_same_patches_are_drawn_in_either_order():
    ascending, shuffled = (
        draw_rows({"a": range(200)}, 50, 7, shuffled=shuffled)[0].tolist()
        for shuffled in (False, True)
    )
    assert sorted(shuffled) == ascending != shuffled


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_of_more_values_than_are_held_every_patch_keeps_the_same_cells_in_any_batches(
    monkeypatch, batch
):
    monkeypatch.setattr(prepared, "MAX_SAMPLE_VALUES", 2 * 10 * 20)
    once, parts = CodebookSample(10), CodebookSample(10)
    once.add(latents_of(10))
    for part in latents_of(10).split(batch):
        assert parts.add(part)
    assert [tuple(values.shape) for values in parts.held] == [(2, 20)] * 10
    assert parts.fit(levels=8)[0].codebook_id == once.fit(levels=8)[0].codebook_id


@pytest.mark.parametrize(("values", "most"), [(1 << 24, 512), (20 * 2 * 64, 20)])
def test_records_are_fitted_to_whole_patches_and_say_how_many(monkeypatch, values, most):
    monkeypatch.setattr(prepared, "MAX_SAMPLE_VALUES", values)
    sample = CodebookSample(600, "rans")
    assert sample.add(latents_of(10)) and not sample.add(latents_of(590))
    made = sample.fit(90)[1]
    assert made["patches"] == made["record_fit"]["patches"] == most


def test_a_sample_of_no_patch_is_refused():
    with pytest.raises(InputError, match="none of the patches drawn for the codebook can be read"):
        CodebookSample(4).fit()

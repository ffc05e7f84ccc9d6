"""Entropy of slides within shards, and where it is told."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from latentds.store.channel_statistics import slide_entropies, slide_entropy
from latentds.store.reader import ShardSet
from tests.test_tools import call


@pytest.mark.parametrize(
    ("slides", "bits"), [([3, 3, 3], 0.0), ([0, 1], 1.0), ([0, 1, 2, 3, -1], 2.0), ([-1, -1], None)]
)
def test_entropy_of_known_distributions(slides, bits):
    assert slide_entropy(np.array(slides, np.int32)) == bits


def test_shards_of_one_slide_each_have_no_entropy():
    table = {"slide": np.array([0, 0, 1, 1, 0, 1, 0, 1])}
    names = ["train", "train", "val"]
    shards = [SimpleNamespace(split=s, patches=n) for s, n in zip(names, (2, 2, 4), strict=True)]
    found = slide_entropies(SimpleNamespace(manifest=SimpleNamespace(shards=shards), patches=table))
    assert found == {"train": {"shards": 0, "split": 1}, "val": {"shards": 1, "split": 1}}


def test_a_shuffled_set_is_as_mixed_as_its_split(shared_dataset):
    found = slide_entropies(ShardSet(shared_dataset))
    assert found == {s: {"shards": 1.0, "split": 1.0} for s in ("train", "val")}


def test_info_tells_the_entropy(shared_dataset, capsys):
    _, out, _ = call(capsys, "info", shared_dataset)
    assert "slide entropy" in out and "train 1.0 bits a shard of 1.0" in out
    _, out, _ = call(capsys, "info", shared_dataset, "--json")
    assert json.loads(out)["slide_entropy_bits"]["val"] == {"shards": 1.0, "split": 1.0}

"""Damaged packs in training: replaced by a rule of the order alone, counted, listed, bounded."""

import gc
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from latentds.errors import DamagedPackError, TooManyBadSamplesError
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture, Select
from latentds.store.reader import ShardSet
from tests.bad_shards import flip_bit
from tests.conftest import convert_with_mean, save_pictures
from tests.loaders import grouped


def damage(folder, *packs: int, member: str = "codes") -> None:
    shards = ShardSet(folder)
    for pack in packs:
        flip_bit(
            Path(shards.pack_table.shard_path(pack)),
            int(shards.packs[f"{member}_offset"][pack]) + 10,
        )


def stream(folder, workers=0, ranks=1, **options):
    """Rows of the global batches, every rank loading on its own."""
    parts = []
    for rank in range(ranks):
        loader = LatentLoader(
            folder,
            **grouped(
                **{"global_batch_size": 48, "decode": "codes", "max_bad": 5, **options},
                num_workers=workers,
                rank=rank,
                world_size=ranks,
            ),
        )
        parts.append([batch.rows[batch.valid].tolist() for batch in loader])
    assert len({len(part) for part in parts}) == 1
    return [[row for part in batch for row in part] for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    "options",
    [{"shuffle": True}, pytest.param({}, marks=pytest.mark.slow), {"where": "label == 'tumour'"}],
)
def test_every_topology_replaces_alike(dataset, options):
    sound = stream(dataset, **options)
    damage(dataset, 3, 4, 17)
    whole = stream(dataset, **options)
    assert whole != sound and [len(batch) for batch in whole] == [len(batch) for batch in sound]
    bad = {row for pack in (3, 4, 17) for row in range(pack * 16, pack * 16 + 16)}
    for before, after in zip(sound, whole, strict=True):
        for row, now in zip(before, after, strict=True):
            assert now not in bad and (row in bad or row == now)
    assert stream(dataset, workers=2, **options) == whole
    assert stream(dataset, ranks=3, workers=1, **options) == whole


def test_balanced_draws_replace_inside_their_group(dataset):
    damage(dataset, 3)
    data = LatentDataset(
        dataset, shuffle=True, select=Select(balance="label"), max_bad=1, batch_size=100
    )
    sound = LatentDataset(dataset, shuffle=True, select=Select(balance="label"), batch_size=100)
    for number in range(len(data)):
        drawn = sound.sampler.draw(0, number * 100, number * 100 + 100).rows
        batch = data.batch(0, number)
        assert np.array_equal(batch.labels, sound.shards.patches["label"][drawn])
        assert not set(batch.rows.tolist()) & set(range(48, 64))


def test_damage_is_counted_and_listed(dataset):
    damage(dataset, 3, 5)
    loader = LatentLoader(dataset, decode="codes", num_workers=2, max_bad=2)
    list(loader)
    assert [text.partition("key ")[2][:19] for text in sorted(loader.bad_packs)] == [
        "train-000000-000003",
        "train-000000-000005",
    ]
    assert loader.gather_bad_packs() == sorted(loader.bad_packs)


def test_the_default_refuses_and_the_bound_holds(dataset):
    damage(dataset, 3, 5)
    with pytest.raises(DamagedPackError, match="train-000000-000003"):
        stream(dataset, max_bad=0)
    with pytest.raises(TooManyBadSamplesError, match="2 damaged packs, max_bad=1"):
        stream(dataset, max_bad=1)


def test_damage_found_by_different_workers_adds_up(dataset):
    """Batches of one pack: no worker meets both damaged packs, the loader hears of both."""
    damage(dataset, 2, 3)
    with pytest.raises(TooManyBadSamplesError, match="2 damaged packs, max_bad=1"):
        stream(dataset, workers=2, max_bad=1, global_batch_size=16)


def message_of(folder) -> str:
    """Of the error that ends a run; the loader is gone when this returns."""
    try:
        stream(folder, workers=2, max_bad=1)
    except TooManyBadSamplesError as error:
        return str(error)
    raise AssertionError("no error")


def test_an_error_of_a_worker_is_one_line(dataset):
    damage(dataset, 3)
    with pytest.raises(DamagedPackError, match=r"^\S+train-000000\.tar, key .*all damage\)$"):
        stream(dataset, workers=1, max_bad=0)


def test_workers_end_with_a_run_that_an_error_ended(dataset):
    """Without the collector, which would let each worker wait for 5 s."""
    damage(dataset, 2, 3)
    gc.collect()
    gc.disable()
    try:
        assert "2 damaged packs" in message_of(dataset)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_damaged_columns_replace_the_pack_too(dataset):
    damage(dataset, 3, member="patches")
    loader = LatentLoader(dataset, decode="codes", max_bad=1, columns=("source",))
    rows = [row for batch in loader for row in batch.rows.tolist()]
    assert len(rows) == 500 and not set(rows) & set(range(48, 64))


def test_mixtures_replace_in_the_damaged_set(dataset, shared_dataset):
    damage(dataset, 3)
    mixture = Mixture({dataset: 1, shared_dataset: 1})
    data = LatentDataset(mixture, shuffle=True, max_bad=1, batch_size=100)
    batches = [data.batch(0, number) for number in range(len(data))]
    rows = {w: {r for b in batches for r in b.rows[b.sets == w].tolist()} for w in (0, 1)}
    assert not rows[0] & set(range(48, 64)) and rows[1] >= set(range(48, 64))


def test_a_set_without_a_sound_pack_ends(tmp_path):
    save_pictures(tmp_path / "in", 40)
    convert_with_mean(tmp_path / "in", tmp_path / "out", pack_size=4)
    damage(tmp_path / "out", *range(10))
    with pytest.raises(TooManyBadSamplesError, match="no sound pack to replace"):
        stream(tmp_path / "out", max_bad=1000, global_batch_size=20)


def test_large_damaged_packs_among_small_ones_are_replaced(tmp_path):
    save_pictures(tmp_path / "in" / "a" / "big", 40)
    for number in range(4):
        save_pictures(tmp_path / "in" / "a" / f"small{number}", 1, first_seed=100 + number)
    convert_with_mean(tmp_path / "in", tmp_path / "out", pack_by_slide=True)
    shards = ShardSet(tmp_path / "out")
    big = int(np.argmax(shards.packs["count"]))
    damage(tmp_path / "out", big)
    data = LatentDataset(tmp_path / "out", max_bad=1, batch_size=44, shuffle=True)
    rows = [row for batch in data for row in batch.rows.tolist()]
    first = int(shards.packs["first_patch"][big])
    assert len(rows) == 44 and not set(rows) & set(range(first, first + 40))


def test_a_group_in_one_damaged_pack_is_replaced_by_others(tmp_path):
    save_pictures(tmp_path / "in" / "a" / "one", 20)
    save_pictures(tmp_path / "in" / "a" / "two", 20, first_seed=50)
    convert_with_mean(tmp_path / "in", tmp_path / "out", pack_by_slide=True)
    damage(tmp_path / "out", 0)
    data = LatentDataset(
        tmp_path / "out", max_bad=1, batch_size=40, shuffle=True, select=Select(balance="slide")
    )
    assert {row >= 20 for row in next(iter(data)).rows.tolist()} == {True}


def test_bad_packs_of_an_earlier_run_count_towards_the_bound(dataset):
    damage(dataset, 0, 5)
    options = {"decode": "codes", "batch_size": 100, "max_bad": 2}
    first = LatentLoader(dataset, **grouped(**options))
    list(first)
    found = first.gather_bad_packs()
    assert len(found) == 2
    again = LatentLoader(dataset, **grouped(**(options | {"max_bad": 1})))
    again.load_state_dict(first.state_dict(), bad_packs=found)
    with pytest.raises(TooManyBadSamplesError, match="2 damaged packs, max_bad=1"):
        again.gather_bad_packs()

"""LatentArray(resident=False), ShardSet.table() and Select(rows=...): sets for loops of others."""

import pickle

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch.utils.data import DataLoader, StackDataset, Subset, WeightedRandomSampler, random_split

from latentds import LatentArray, LatentDataset, LatentLoader, Select, ShardSet, SlideBags
from latentds.errors import ContractError, DamagedPackError, InputError, UnknownNameError
from latentds.store.format import CODES
from tests.fakes import MeanAutoencoder

OPTIONS = {"split": "train", "autoencoder": MeanAutoencoder()}


@pytest.fixture(scope="module")
def held(shared_dataset):
    return LatentArray(shared_dataset, **OPTIONS)


@pytest.fixture(scope="module")
def placed(shared_dataset):
    return LatentArray(shared_dataset, resident=False, **OPTIONS)


@pytest.mark.parametrize(
    "places",
    [7, -1, np.int64(3), torch.tensor(5), [5, 2, 5], [], slice(490, None), torch.arange(3)],
)
def test_an_array_on_disk_gives_what_a_resident_one_gives(held, placed, places):
    assert torch.equal(placed[places], held[places])


def test_an_array_on_disk_holds_no_codes(placed, monkeypatch):
    assert placed.memory_bytes == 500 * 8 and "500 patches, read from disk, on cpu" in repr(placed)
    with pytest.raises(InputError, match="codes are not resident"):
        _ = placed.codes
    monkeypatch.setattr(ShardSet, "read_codes", None)
    with pytest.raises(TypeError):
        placed[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_loader_samples_a_subset_of_it(held, placed, workers):
    labelled = StackDataset(placed, placed.labels)
    assert isinstance(placed, torch.utils.data.Dataset) and len(labelled) == 500
    part = Subset(labelled, range(100, 500, 40))
    sampler = WeightedRandomSampler([0.0, 1.0] * 5, 8, generator=torch.Generator().manual_seed(0))
    places = [100 + 40 * place for place in sampler]
    sampler.generator.manual_seed(0)
    loader = DataLoader(part, batch_size=4, sampler=sampler, num_workers=workers)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(images, held[places]) and torch.equal(labels, held.labels[places])


def test_a_random_split_of_it_is_a_partition(placed, held):
    one, other = random_split(placed, [0.9, 0.1], torch.Generator().manual_seed(1))
    assert sorted([*one.indices, *other.indices]) == list(range(500))
    assert torch.equal(other[0], held[other.indices[0]])


def test_it_travels_to_a_process_and_reads_there(placed, held):
    assert torch.equal(pickle.loads(pickle.dumps(placed))[499], held[499])


def test_damage_is_told_when_a_patch_is_read(dataset):
    array = LatentArray(dataset, decode="codes", resident=False)
    extent = array.shards.extent(0, CODES)
    with (dataset / extent.shard).open("r+b") as file:
        file.seek(extent.offset)
        file.write(bytes(255 - byte for byte in array.shards.read(0, extent)[:4]))
    with pytest.raises(DamagedPackError, match="checksum"):
        array[0]


@pytest.fixture(scope="module")
def table(shared_dataset):
    return ShardSet(shared_dataset).table()


def test_the_table_alone_reads_no_pack(dataset):
    for shard in (dataset / "data").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    assert len(ShardSet(dataset).table()) == len(ShardSet(dataset))


def test_a_table_has_a_row_a_patch(table, shared_dataset):
    shards = ShardSet(shared_dataset)
    assert table.column_names == ["row", "split", "label", "slide", "x", "y", "mpp", "size_px"]
    assert table["row"].to_pylist() == list(range(600))
    counts = {(label, split): 0 for label in ("tumour", "stroma") for split in ("train", "val")}
    for label, split in zip(table["label"].to_pylist(), table["split"].to_pylist(), strict=True):
        counts[label, split] += 1
    assert counts == {
        (label, split): count
        for split in ("train", "val")
        for label, count in shards.manifest.labels(split).items()
    }
    assert table["mpp"].null_count == 600  # plain pictures have none


def test_a_table_of_a_split_takes_more_columns(shared_dataset):
    shards = ShardSet(shared_dataset)
    table = shards.table("val", columns=["key"])
    assert table["row"].to_pylist() == list(range(500, 600)) and set(
        table["split"].to_pylist()
    ) == {"val"}
    assert table["key"].to_pylist() == shards.read_columns(np.arange(500, 600), ["key"])["key"]
    with pytest.raises(UnknownNameError, match="unknown column 'stain'"):
        shards.table("val", columns=["stain"])


def test_rows_take_a_selection_back(table, shared_dataset):
    left = table.filter((pc.field("label") == "tumour") & (pc.field("split") == "train"))
    select = Select(rows=left["row"][:40])
    loader = LatentLoader(shared_dataset, select=select, batch_size=16, decode="codes")
    rows = [row for batch in loader for row in batch.rows.tolist()]
    assert rows == left["row"].to_pylist()[:40]
    array = LatentArray(shared_dataset, decode="codes", select=select)
    bags = SlideBags(shared_dataset, select=select)
    assert array.rows.tolist() == rows and sorted(bags.rows.tolist()) == rows


def test_rows_and_conditions_choose_together(shared_dataset):
    select = Select(rows=np.arange(200, 300), where="label == 'tumour'")
    array = LatentArray(shared_dataset, decode="codes", select=select)
    everything = LatentArray(shared_dataset, decode="codes")
    wanted = [
        r for r in range(200, 300) if everything.labels[r] == everything.classes.index("tumour")
    ]
    assert array.rows.tolist() == wanted and 0 < len(wanted) < 100


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([1, 2, 2], "names a row twice"),
        (
            [3, 550, 599],
            r"2 rows \(row 550\) that are not of split 'train', which has rows 0 to 499",
        ),
        ([-1], r"\(row -1\)"),
        ([0.5], "of float64"),
        (5, "of int64 ..; row numbers are wanted"),
        ({1, 2}, "of object ..; row numbers are wanted"),
        (np.ones(500, bool), "of bool .500,.; row numbers are wanted"),
        ([], "Select.rows=... chooses no patch of split 'train'"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(shared_dataset, rows, words):
    with pytest.raises(InputError, match=words):
        LatentDataset(shared_dataset, select=Select(rows=rows))


def test_a_state_of_other_rows_is_refused(shared_dataset):
    states = [
        LatentDataset(shared_dataset, select=Select(rows=rows)).state_dict()
        for rows in ([3, 1, 2], np.array([1, 2, 3]))
    ]
    assert states[0] == states[1]
    with pytest.raises(ContractError, match="selection"):
        LatentDataset(shared_dataset, select=Select(rows=[1, 2])).load_state_dict(states[0])

"""SlideBags and LatentArray: whole slides and whole sets."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import latentds.loading.array
from latentds.errors import InputError, UnknownNameError
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Select
from latentds.store.format import PATCHES_TABLE
from latentds.store.reader import ShardSet
from tests.bad_shards import edit_table
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory):
    """Slides of 3, 40 and 17 patches, the last of both labels; coordinates set by hand."""
    root = tmp_path_factory.mktemp("slides")
    for label, slide, count in (
        ("a", "one", 3),
        ("b", "two", 40),
        ("a", "three", 7),
        ("b", "three", 10),
    ):
        save_pictures(
            root / "in" / "train" / label / slide, count, first_seed=hash_of(label + slide)
        )
    convert_with_mean(root / "in", root / "out", pack_size=8)

    def scatter(table: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        table["x"], table["y"] = rng.integers(0, 5, 60), rng.integers(0, 5, 60)

    edit_table(root / "out", PATCHES_TABLE, scatter)
    return root / "out"


def hash_of(name: str) -> int:
    return sum(map(ord, name)) * 100


def test_a_bag_is_its_slide_in_raster_order(slides):
    bags = SlideBags(slides)
    assert bags.slides == ["one", "three", "two"] and [len(bag) for bag in bags] == [3, 17, 40]
    assert [bag.label for bag in bags] == [0, -1, 1]
    table, names = ShardSet(slides).patches, ShardSet(slides).manifest.slides
    for bag in bags:
        places = [(y, x) for x, y in bag.coords.tolist()]
        assert places == sorted(places)
        own = np.flatnonzero(table["slide"] == names.index(bag.slide))
        assert sorted(bag.rows.tolist()) == own.tolist()
        assert np.array_equal(bag.codes, ShardSet(slides).read_codes(bag.rows.numpy()))
        assert np.array_equal(bag.labels, table["label"][bag.rows.numpy()])


def test_slides_of_several_labels_are_told_with_one_of_them(slides, caplog):
    bags = SlideBags(slides)
    words = "patches of 1 of 3 slides differ in label, among them 'three'"
    assert words in caplog.text
    assert bags[1].label == -1 and set(bags[1].labels.tolist()) == {0, 1}
    caplog.clear()
    SlideBags(slides, select=Select(slides=["one", "two"]))
    assert "differ in label" not in caplog.text


def test_a_bound_chooses_anew_every_epoch_and_alike_everywhere(slides):
    bags, other = (SlideBags(slides, max_patches=9, seed=s) for s in (0, 1))
    first = [bag.rows.tolist() for bag in bags]
    assert [len(rows) for rows in first] == [3, 9, 9]
    loader = DataLoader(pickle.loads(pickle.dumps(bags)), batch_size=None, num_workers=2)
    assert [bag.rows.tolist() for bag in loader] == first
    bags.set_epoch(1)
    assert bags[2].rows.tolist() != first[2] != other[2].rows.tolist()
    bags.set_epoch(0)
    assert bags[2].rows.tolist() == first[2]


def test_workers_that_stay_see_the_next_epoch(slides):
    bags = SlideBags(slides, max_patches=9)
    loader = DataLoader(bags, batch_size=None, num_workers=1, persistent_workers=True)
    first = [bag.rows.tolist() for bag in loader]
    bags.set_epoch(1)
    assert [bag.rows.tolist() for bag in loader] != first


def test_only_the_chosen_patches_are_read_and_decoded(slides, monkeypatch):
    read, decoded = [], []
    real = ShardSet.read_codes
    monkeypatch.setattr(
        ShardSet, "read_codes", lambda s, rows: read.append(len(rows)) or real(s, rows)
    )

    class Counting(MeanAutoencoder):
        def decode(self, latents):
            decoded.append(len(latents))
            return super().decode(latents)

    bags = SlideBags(slides, max_patches=10, autoencoder=Counting())
    bag = bags[bags.index("two")]
    assert read == [10] and decoded == []
    images = list(bags.decode(bag, chunk=4))
    assert [len(part) for part in images] == decoded == [4, 4, 2]
    rows = LatentLoader(slides, autoencoder=MeanAutoencoder()).prepare(
        LatentLoader(slides, decode="codes").dataset.read(bag.rows.numpy())
    )
    assert torch.equal(torch.cat(images), rows.images)


def test_bags_touch_only_the_bytes_of_their_patches(slides):
    """The pages of a shard that a bag's read brings in: checked in the file, damage elsewhere."""
    bags = SlideBags(slides, select=Select(slides=["one"]))
    shards = bags.shards
    chosen = set(bags[0].rows.tolist())
    path = Path(shards.pack_table.shard_path(0))
    content = bytearray(path.read_bytes())
    size = shards.manifest.contract.bytes_per_patch
    for pack in range(len(shards.packs)):
        first, offset = (
            int(shards.packs["first_patch"][pack]),
            int(shards.packs["codes_offset"][pack]),
        )
        for local in range(int(shards.packs["count"][pack])):
            if first + local not in chosen:
                start = offset + local * size
                content[start : start + size] = bytes(size)
    expected = SlideBags(slides, select=Select(slides=["one"]))[0].codes.clone()
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        assert torch.equal(SlideBags(slides, select=Select(slides=["one"]))[0].codes, expected)
    finally:
        path.write_bytes(original)


def test_bags_select_and_refuse(slides, tmp_path):
    assert SlideBags(slides, select=Select(where="label == 'a'")).slides == ["one", "three"]
    assert SlideBags(slides, select=Select(slides=["two"]), columns=("source",))[0].columns[
        "source"
    ][0]
    with pytest.raises(ValueError, match="max_patches=0"):
        SlideBags(slides, max_patches=0)
    with pytest.raises(IndexError):
        SlideBags(slides)[3]
    save_pictures(tmp_path / "in", 4)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="no patch of split 'train' has a slide"):
        SlideBags(tmp_path / "out")


@pytest.fixture(scope="module")
def array(shared_dataset):
    return LatentArray(shared_dataset, "train", autoencoder=MeanAutoencoder())


def test_array_decodes_by_place_mask_slice_and_key(array, shared_dataset):
    loader = LatentLoader(shared_dataset, autoencoder=MeanAutoencoder(), batch_size=500)
    images = next(iter(loader)).images
    assert len(array) == 500 and torch.equal(array[torch.tensor([3, 1, 499])], images[[3, 1, 499]])
    assert torch.equal(array[7], images[7]) and torch.equal(array[-1], images[-1])
    assert torch.equal(array[5:9], images[5:9]) and torch.equal(array[[5, 8]], images[[5, 8]])
    mask = torch.zeros(500, dtype=torch.bool)
    mask[[2, 4]] = True
    assert torch.equal(array[mask], images[[2, 4]])
    keys = ShardSet(shared_dataset).read_columns(np.array([9, 300]), ["key"])["key"]
    assert torch.equal(array[keys], images[[9, 300]]) and torch.equal(array[keys[0]], images[9])
    assert array.keys[9] == keys[0]


def test_array_knows_its_patches_and_its_memory(array, shared_dataset):
    assert array.labels.shape == (500,) and array.coords.shape == (500, 2)
    assert array.memory_bytes == 500 * (48 + 8) == array.codes.nbytes + array.labels.nbytes
    assert "500 patches, 0.000 GB on cpu" in repr(array)
    assert len(LatentArray(shared_dataset, decode="codes")) == 600
    assert LatentArray(shared_dataset, "val", decode="latents")[:2].dtype == torch.float32
    only = LatentArray(
        shared_dataset, "train", decode="codes", select=Select(where="label == 'tumour'")
    )
    assert len(only) == 250 and only[0].dtype == torch.uint8


def test_an_array_of_all_splits_takes_slides_that_one_of_them_lacks(tmp_path):
    save_pictures(tmp_path / "in" / "train" / "tumour" / "slide.A", 3)
    save_pictures(tmp_path / "in" / "val" / "tumour" / "slide.B", 2)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert (
        len(LatentArray(tmp_path / "out", decode="codes", select=Select(slides=["slide.A"]))) == 3
    )
    with pytest.raises(InputError, match="chooses no patch of the set"):
        LatentArray(tmp_path / "out", decode="codes", select=Select(where="x > 5"))


def test_what_does_not_fit_is_refused_before_reading(shared_dataset, monkeypatch):
    monkeypatch.setattr(latentds.loading.array, "free_bytes", lambda device: 30_000)
    monkeypatch.setattr(ShardSet, "read_codes", None)
    with pytest.raises(
        InputError, match="600 patches take 0.00 GB, cpu has 0.00 GB free; choose fewer"
    ):
        LatentArray(shared_dataset, decode="codes")


MASK = np.isin(np.arange(500), [2, 4])


@pytest.mark.parametrize(
    "places",
    [
        [], (), range(0), np.array([], np.int64), slice(3, 3), slice(None, None, -1),
        slice(9, 2, -3), (5, -1), range(3), True, None, ..., MASK, MASK.tolist(),
        *(np.array([1, 2], kind) for kind in ("u1", "u2", "u4", "u8", "i1", "i2", "i4")),
        np.array([[1, 2], [3, -4]]), torch.tensor([1, 2], dtype=torch.uint8),
        torch.tensor([[1], [2]]), np.array(3),
    ],
    ids=repr,
)  # fmt: skip
def test_places_are_what_numpy_takes_for_an_index(array, places):
    asked = list(places) if isinstance(places, tuple) else places
    expected = np.arange(500)[asked].copy()
    images = array[:]
    assert torch.equal(array[places], images[torch.as_tensor(expected)])


@pytest.mark.parametrize("kind", [list, tuple, lambda k: np.array(k, object)])
def test_keys_come_in_any_sequence(array, kind):
    keys = [array.keys[9], array.keys[300]]
    assert torch.equal(array[kind(keys)], array[[9, 300]])
    assert len(array[kind(keys[:0])]) == 0
    with pytest.raises(UnknownNameError, match=f"unknown key '?1'?.*{keys[0][:12]}"):
        array[kind([keys[0], 1])]


@pytest.mark.parametrize("places", [500, [0, -501], 1.0, [1.0], MASK[:5], b"x", {1}, 10**30])
def test_what_is_no_place_is_an_index_error(array, places):
    with pytest.raises(IndexError):
        array[places]


def test_unknown_keys_are_refused_with_the_closest_one(array):
    key = array.keys[400]
    with pytest.raises(UnknownNameError, match=f"did you mean '{key}'.*{key}.*500 in all"):
        array[f"{key[:-1]}!"]
    with pytest.raises(UnknownNameError, match="unknown key 'nope'"):
        array["nope"]


def test_an_unknown_slide_has_no_index(slides):
    bags = SlideBags(slides)
    assert bags.slides[bags.index("two")] == "two"
    with pytest.raises(UnknownNameError, match="unknown slide 'tow'; did you mean 'two'"):
        bags.index("tow")

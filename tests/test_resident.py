"""LatentLoader(resident=True): batches, states and replacements are those of reading from disk."""

import dataclasses

import pytest
import torch

import latentds.loading.array
from latentds import LatentLoader, Mixture, MultiCrop
from latentds.errors import DamagedPackError, InputError, TooManyBadSamplesError
from latentds.loading.batch import bytes_of
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.store.reader import ShardSet
from tests.bad_shards import first_shard, flip_bit
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.loaders import HostLanes, grouped
from tests.test_encodings import entropy_book

OPTIONS = {"split": "train", "shuffle": True, "seed": 3, "global_batch_size": 60}


def loader_of(folder, **changes) -> LatentLoader:
    options = OPTIONS | {"autoencoder": MeanAutoencoder()} | changes
    return LatentLoader(folder, **grouped(**options))


def assert_same(found, expected) -> None:
    """All fields of all batches, but not when damage was found."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, torch.Tensor):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
                assert torch.equal(bytes_of(a), bytes_of(b)), field.name  # NaN, too
            elif field.name == "views" and a is not None:
                assert all(map(torch.equal, a.crops(), b.crops()))
            elif field.name != "bad":
                assert a == b or a is b, field.name


CHOICES = [
    {},
    {"decode": "stored", "shuffle": False},
    {"decode": "codes", "columns": ("key",)},
    {"decode": "latents", "rank": 1, "world_size": 3},
    {"where": "label == 'tumour'", "last": "repeat"},
    {"balance": "slide", "last": "drop"},
    {"split": "val", "num_workers": 2},
]


@pytest.mark.parametrize("changes", CHOICES, ids=[" ".join(map(str, c)) or "all" for c in CHOICES])
def test_batches_are_those_of_the_disk(shared_dataset, changes):
    expected = list(loader_of(shared_dataset, **changes))
    loader = loader_of(shared_dataset, **changes, resident=True)
    assert_same(list(loader), expected)
    assert loader.resident is not None and loader.resident.gathered >= sum(map(len, expected))


@pytest.mark.parametrize("stop", [0, 1, 5, 9])  # 9 batches an epoch
def test_states_are_those_of_the_disk(shared_dataset, stop):
    disk, resident = loader_of(shared_dataset), loader_of(shared_dataset, resident=True)
    assert len(disk) == 9
    for batches in (iter(disk), iter(resident)):
        for _ in range(stop):
            next(batches)
    state = resident.state_dict()
    assert state == disk.state_dict()
    here, there = loader_of(shared_dataset, resident=True), loader_of(shared_dataset)
    here.load_state_dict(state)
    there.load_state_dict(state)
    assert_same([*here, *here], [*there, *there])


def test_nothing_is_read_once_it_is_there(shared_dataset, monkeypatch):
    loader = loader_of(shared_dataset, resident=True)
    monkeypatch.setattr(ShardSet, "read_codes", None)
    assert sum(map(len, loader)) == sum(map(len, loader)) == 500


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Sets of other pictures, so of other codebooks."""
    folder = tmp_path_factory.mktemp("sets")
    for name, count, seed in (("a", 20, 0), ("b", 30, 100)):
        save_pictures(folder / f"in-{name}" / "x", count, seed)
        convert_with_mean(folder / f"in-{name}", folder / name)
    return folder / "a", folder / "b"


def test_mixtures_with_codebooks_of_their_own_are_those_of_the_disk(two_sets):
    mixture = Mixture(dict(zip(two_sets, (0.7, 0.3), strict=True)))
    expected = list(loader_of(mixture, global_batch_size=8))
    assert len({*torch.cat([batch.codebooks for batch in expected]).tolist()}) == 2
    assert_same(list(loader_of(mixture, global_batch_size=8, resident=True)), expected)


@pytest.mark.parametrize("static", [False, True])
def test_the_ring_gathers_what_it_decodes(shared_dataset, static):
    views = MultiCrop(globals=1, locals=1, global_px=20, local_px=9)
    expected = list(loader_of(shared_dataset, split="val", views=views))
    loader = loader_of(shared_dataset, split="val", views=views, resident=True)
    loader.stage = loader.make_stage(static, HostLanes())
    found = []
    for batch, other in zip(loader, expected, strict=True):
        assert_same([batch], [other])
        found.append(batch)
    assert len(found) == 2 and (static or not assert_same(found, expected))


def test_records_are_those_of_the_disk(tmp_path):
    save_pictures(tmp_path / "in" / "a", 6)
    stored = StoredCodebook(
        codebook=entropy_book(0), latent_id=MeanAutoencoder().card.latent_id, made={}
    )
    save_codebook(stored, tmp_path / "book.safetensors")
    convert_with_mean(tmp_path / "in", tmp_path / "set", codebook=tmp_path / "book.safetensors")
    options = {"decode": "codes", "global_batch_size": 4}
    expected = list(loader_of(tmp_path / "set", **options))
    assert expected[0].codes.dtype == torch.int16 and expected[0].steps is not None
    assert_same(list(loader_of(tmp_path / "set", **options, resident=True)), expected)


def damage(folder, *packs: int) -> None:
    for pack in packs:
        flip_bit(first_shard(folder), int(ShardSet(folder).packs["codes_offset"][pack]))


@pytest.mark.parametrize("balance", [None, "label"])
def test_damaged_packs_are_replaced_as_from_the_disk(dataset, balance):
    damage(dataset, 3, 4, 7)
    disk = loader_of(dataset, max_bad=3, balance=balance)
    expected = list(disk)
    resident = loader_of(dataset, max_bad=3, balance=balance, resident=True)
    assert sorted(resident.bad_packs) == sorted(disk.bad_packs) and len(disk.bad_packs) == 3
    assert_same(list(resident), expected)


def test_too_much_damage_is_refused_when_it_is_opened(dataset):
    damage(dataset, 3, 5)
    with pytest.raises(DamagedPackError, match="train-000000-000003"):
        loader_of(dataset, resident=True)
    with pytest.raises(TooManyBadSamplesError, match="2 damaged packs, max_bad=1"):
        loader_of(dataset, resident=True, max_bad=1)


def test_what_does_not_fit_is_refused_before_reading(shared_dataset, monkeypatch):
    monkeypatch.setattr(latentds.loading.array, "free_bytes", lambda device: 20_000)
    monkeypatch.setattr(ShardSet, "read_codes", None)
    with pytest.raises(InputError, match="500 patches take 0.00 GB, cpu has 0.00 GB free; choose"):
        loader_of(shared_dataset, resident=True)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_disk(shared_dataset):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = list(loader_of(shared_dataset, device="cuda"))
    loader = loader_of(shared_dataset, device="cuda", resident=True, num_workers=1)
    assert_same(list(loader), expected)
    assert loader.resident is not None and loader.resident.codes.is_cuda

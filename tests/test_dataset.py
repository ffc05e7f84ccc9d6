"""LatentDataset and LatentLoader.

Each patch once, the same order for any workers, resumable, pickled.
"""

import dataclasses
import itertools
import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentds.errors import ContractError, InputError, LatentdsError, UnknownNameError, WeightsError
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.dataset import LatentDataset
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture, Order
from latentds.store.reader import ShardSet
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.loaders import grouped


def rows_of(batches) -> list[int]:
    return [row for batch in batches for row in batch.rows[batch.valid].tolist()]


@pytest.mark.parametrize(
    ("world_size", "workers", "shuffle"),
    [
        *itertools.product((1, 3, 7), (0,), (False, True)),
        (1, 3, False),
        (2, 2, True),
        pytest.param(1, 3, True, marks=pytest.mark.slow),
        pytest.param(2, 2, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_workers_lose_and_repeat_nothing(shared_dataset, shuffle, world_size, workers):
    seen = []
    for rank in range(world_size):
        data = LatentDataset(
            shared_dataset,
            batch_size=12,
            shuffle=shuffle,
            order=Order(rank=rank, world_size=world_size),
        )
        batches = list(DataLoader(data, batch_size=None, num_workers=workers))
        assert len(batches) == len(data)
        seen += rows_of(batches)
    assert sorted(seen) == list(range(500))


def test_any_number_of_workers_gives_the_same_batches(shared_dataset):
    orders = []
    for workers in (0, 1, 2, 5):
        data = LatentDataset(shared_dataset, batch_size=32, shuffle=True, seed=4)
        orders.append(rows_of(DataLoader(data, batch_size=None, num_workers=workers)))
    assert orders[1:] == orders[:-1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(shared_dataset, world_size):
    alone = [
        set(b.rows.tolist()) for b in LatentDataset(shared_dataset, batch_size=64, shuffle=True)
    ]
    parts = [
        list(
            LatentDataset(
                shared_dataset,
                batch_size=64 // world_size,
                shuffle=True,
                order=Order(rank=r, world_size=world_size),
            )
        )
        for r in range(world_size)
    ]
    together = [set(rows_of(group)) for group in zip(*parts, strict=False)]
    assert together == alone


@pytest.mark.parametrize(("last", "expected"), [("drop", 480), ("repeat", 576), ("pad", 501)])
def test_every_rank_gets_equal_batches(shared_dataset, last, expected):
    """500 patches in global batches of 96: five and a fifth of one."""
    sizes = []
    for rank in range(3):
        data = LatentDataset(
            shared_dataset, batch_size=32, order=Order(last=last, rank=rank, world_size=3)
        )
        sizes.append([len(batch) for batch in data])
        assert len(sizes[-1]) == len(data)
    assert sizes[0] == sizes[1] == sizes[2] and 3 * sum(sizes[0]) == expected


def test_padding_is_marked_and_each_patch_counts_once(shared_dataset):
    batches = [
        batch
        for rank in range(3)
        for batch in LatentDataset(
            shared_dataset, batch_size=32, order=Order(rank=rank, world_size=3)
        )
    ]
    assert sorted(rows_of(batches)) == list(range(500))
    assert sum(int((~batch.valid).sum()) for batch in batches) == 1


def test_epochs_differ_and_repeat_by_seed(shared_dataset):
    data = LatentDataset(shared_dataset, batch_size=50, shuffle=True, seed=1)
    first = rows_of(data)
    data.set_epoch(1)
    second = rows_of(data)
    data.set_epoch(0)
    assert first != second and rows_of(data) == first and sorted(second) == sorted(first)
    assert rows_of(LatentDataset(shared_dataset, batch_size=50, shuffle=True, seed=2)) != first


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[pytest.mark.slow] if method == "spawn" else [])
        for method in multiprocessing.get_all_start_methods()
    ],
)
def test_dataset_pickles_under_every_start_method(processes, shared_dataset, method):
    data = LatentDataset(shared_dataset, batch_size=100)
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=method)
    assert sorted(rows_of(loader)) == list(range(500))
    assert rows_of(pickle.loads(pickle.dumps(data))) == rows_of(data)


def test_batch_carries_labels_slides_coords_and_columns(shared_dataset):
    data = LatentDataset(shared_dataset, "val", batch_size=100, columns=("source", "key"))
    batch = next(iter(data))
    assert data.classes == ["stroma", "tumour"] and data.class_to_idx == {"stroma": 0, "tumour": 1}
    for label, slide, source in zip(
        batch.labels.tolist(), batch.slides, batch.columns["source"], strict=True
    ):
        assert source.startswith(f"val/{data.classes[label]}/{slide}/")
    assert batch.codes.dtype == torch.uint8 and batch.codes.shape == (100, 3, 4, 4)
    assert batch.coords.tolist() == [[-1, -1]] * 100 and batch.mpp.isnan().all()


def test_unlabelled_sets_have_no_classes(tmp_path):
    save_pictures(tmp_path / "in", 5)
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    data = LatentDataset(tmp_path / "out", batch_size=5)
    assert data.classes == [] and next(iter(data)).labels.tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("is_labelled", "as_tuple", "warnings"), [(0, True, 1), (0, False, 0), (1, True, 0)]
)
def test_tuples_of_patches_without_labels_are_warned_of_once(
    tmp_path, shared_dataset, caplog, is_labelled, as_tuple, warnings
):
    if not is_labelled:
        save_pictures(tmp_path / "in", 6)
        convert_with_mean(tmp_path / "in", tmp_path / "out")
    folder = shared_dataset if is_labelled else tmp_path / "out"
    loader = LatentLoader(folder, batch_size=2, decode="codes", as_tuple=as_tuple)
    assert len([*loader, *loader]) == 2 * len(loader)
    assert caplog.text.count("Select(where='label is not None') leaves them out") == warnings


def test_latents_are_the_codebook_levels_of_the_codes(shared_dataset):
    data = LatentDataset(shared_dataset, batch_size=8, decode="latents")
    batch = next(iter(data))
    levels = data.shards.manifest.contract.codebook.levels[0]
    assert np.array_equal(batch.latents.numpy(), levels[batch.codes.numpy()])


def test_unknown_split_and_bad_settings_are_refused(shared_dataset):
    with pytest.raises(UnknownNameError, match="'tset'.*known: train, val"):
        LatentDataset(shared_dataset, "tset")
    with pytest.raises(ValueError, match="use LatentLoader for pixels"):
        LatentDataset(shared_dataset, decode="pixels")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        LatentDataset(shared_dataset, order=Order(rank=2, world_size=2))


def make_loader(folder, **options) -> LatentLoader:
    return LatentLoader(
        folder, **grouped(**{"autoencoder": MeanAutoencoder(), "batch_size": 32} | options)
    )


def test_loader_decodes_what_was_encoded(shared_dataset):
    loader = make_loader(shared_dataset)
    batch = next(iter(loader))
    cells = MeanAutoencoder().encode(batch.images)
    step = np.diff(loader.contract.codebook.levels[0]).max()
    levels = loader.contract.codebook.levels[0][batch.codes.numpy()]
    assert batch.images.shape == (32, 3, 32, 32) and float(batch.images.min()) >= 0
    assert np.abs(cells.numpy() - levels).max() < step


def test_loader_crops_padding_away(tmp_path):
    from PIL import Image

    from tests.conftest import smooth_picture

    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.fromarray(smooth_picture(number)[:27, :21]).save(tmp_path / "in" / f"{number}.png")
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    assert next(iter(make_loader(tmp_path / "out"))).images.shape == (3, 3, 27, 21)


def test_loader_gives_tuples_and_transforms_batches(shared_dataset):
    loader = make_loader(
        shared_dataset, as_tuple=True, transform=lambda images: images.mean((2, 3))
    )
    images, labels = next(iter(loader))
    assert images.shape == (32, 3) and labels.dtype == torch.int64


@pytest.mark.parametrize("decode", ["latents", "codes"])
def test_loader_without_decoding_needs_no_autoencoder(shared_dataset, decode):
    loader = LatentLoader(shared_dataset, batch_size=32, decode=decode)
    batch = next(iter(loader))
    assert loader.autoencoder is None and batch.images is None and len(loader) == 16


def test_decoded_images_enter_a_graph(shared_dataset):
    images = next(iter(make_loader(shared_dataset))).images
    weight = torch.ones(3, requires_grad=True)
    (images.mean((2, 3)) * weight).sum().backward()
    assert weight.grad is not None


def test_chunked_decoding_gives_the_same_images(shared_dataset):
    whole, chunked = (next(iter(make_loader(shared_dataset, chunk=c))).images for c in (None, 5))
    assert torch.equal(whole, chunked)


@pytest.fixture(scope="module")
def two_epochs(shared_dataset) -> list[list[int]]:
    """The rows of every batch of two epochs that nothing stopped."""
    unbroken = make_loader(shared_dataset, shuffle=True)
    return [rows_of([batch]) for _ in range(2) for batch in unbroken]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 16])
def test_a_resumed_loader_gives_the_remaining_batches(shared_dataset, two_epochs, workers, stop):
    stopped = make_loader(shared_dataset, shuffle=True, num_workers=workers)
    batches = iter(stopped)
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = make_loader(shared_dataset, shuffle=True, num_workers=2 - workers)
    resumed.load_state_dict(state)
    remaining = [rows_of([batch]) for _ in range(2) for batch in resumed]
    assert remaining[: 32 - stop] == two_epochs[stop:]
    assert len(json.dumps(state)) < 1024


def test_a_state_from_an_epochs_end_replays_nothing(shared_dataset):
    loader = make_loader(shared_dataset, shuffle=True)
    list(loader)
    state = loader.state_dict()
    following = rows_of(loader)
    resumed = make_loader(shared_dataset, shuffle=True)
    resumed.load_state_dict(state)
    resumed.set_epoch(0)
    assert list(resumed) == []
    resumed.set_epoch(1)
    assert rows_of(resumed) == following


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_from_an_epochs_end_is_the_next_ones_beginning(shared_dataset, workers):
    loader = make_loader(shared_dataset, shuffle=True)
    for _ in loader:
        state = loader.state_dict()  # with the last batch in the loop, not behind it
    following = [rows_of(loader), rows_of(loader)]
    assert (state["epoch"], state["batch"]) == (1, 0)
    for earlier in (state, state | {"epoch": 0, "batch": len(loader)}):  # as it used to be written
        resumed = make_loader(shared_dataset, shuffle=True, num_workers=workers)
        resumed.load_state_dict(earlier)
        assert [rows_of(resumed), rows_of(resumed)] == following


def test_set_epoch_of_a_resumed_epoch_keeps_its_place(shared_dataset):
    loader = make_loader(shared_dataset)
    next(iter(loader))
    resumed = make_loader(shared_dataset)
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(0)
    assert len(list(resumed)) == 15


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 16},
        {"seed": 9},
        {"split": "val"},
        {"shuffle": True},
        {"last": "drop"},
        {"lanes": 2},
        {"where": "label == 'tumour'"},
        {"shuffle": True, "balance": "label"},
    ],
)
def test_state_of_another_run_is_refused(shared_dataset, changes):
    state = make_loader(shared_dataset).state_dict()
    with pytest.raises(ContractError, match="loader state has"):
        make_loader(shared_dataset, **changes).load_state_dict(state)


def test_a_state_of_numbers_of_numpy_is_plain_json(shared_dataset):
    three, eight = np.int32(3), np.int64(8)
    plain = make_loader(shared_dataset, shuffle=True, seed=3, batch_size=8, lanes=2)
    loader = make_loader(
        shared_dataset, shuffle=True, seed=three, batch_size=eight, lanes=three - 1
    )
    assert json.dumps(loader.state_dict()) == json.dumps(plain.state_dict())
    assert torch.equal(next(iter(loader)).seeds, next(iter(plain)).seeds)


def test_an_epoch_of_numpy_is_resumed(shared_dataset):
    loader = make_loader(shared_dataset)
    loader.set_epoch(np.arange(3)[2])
    again = make_loader(shared_dataset)
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert again.epoch == 2


def test_so_is_one_of_a_mixture(shared_dataset):
    mixtures = [
        Mixture({shared_dataset: 1.0}, epoch_patches) for epoch_patches in (64, np.int64(64))
    ]
    states = [json.dumps(make_loader(mixture).state_dict()) for mixture in mixtures]
    assert states[0] == states[1]


@pytest.mark.parametrize("changes", [{"seed": None}, {"batch_size": "8"}, {"lanes": 1.0}])
def test_a_number_that_is_none_is_named(shared_dataset, changes):
    (name,) = changes
    with pytest.raises(TypeError, match=f"^{name}=.*; a whole number is wanted"):
        make_loader(shared_dataset, **changes)


def test_a_state_that_is_none_is_named(shared_dataset):
    with pytest.raises(ContractError, match=r"loader state None; pass what state_dict\(\) gave"):
        make_loader(shared_dataset).load_state_dict(None)


def test_a_batch_that_is_unpacked_names_as_tuple(shared_dataset):
    with pytest.raises(TypeError, match=r"batch\[0\].*as_tuple=True"):
        _images, _labels = next(iter(make_loader(shared_dataset)))


def test_a_number_of_ranks_without_a_rank_is_refused(shared_dataset, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # by another test
    with pytest.raises(InputError, match="RANK='' and WORLD_SIZE='4' in the environment; set both"):
        make_loader(shared_dataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_copy_of_a_loader_goes_on_with_workers_of_its_own(shared_dataset, workers):
    loader = make_loader(shared_dataset, shuffle=True, num_workers=workers)
    batches = iter(loader)
    next(batches)
    copied = pickle.loads(pickle.dumps(loader))
    copied.load_state_dict(loader.state_dict())
    assert rows_of(copied) == rows_of(batches)


@pytest.mark.parametrize("split", [None, 0, ""])
def test_what_is_no_split_is_refused_as_unknown(shared_dataset, split):
    for reader in (LatentDataset, SlideBags):
        with pytest.raises(UnknownNameError, match=f"unknown split {split!r}.* known: train, val"):
            reader(shared_dataset, split)
    if split is not None:
        with pytest.raises(UnknownNameError, match=f"unknown split {split!r}"):
            LatentArray(shared_dataset, split, decode="codes")


@pytest.mark.parametrize("workers", ["2", 1.5, None])
def test_what_is_no_number_of_workers_is_refused(shared_dataset, workers):
    with pytest.raises(TypeError, match=r"num_workers=.*pass num_workers=Workers\("):
        make_loader(shared_dataset, num_workers=workers)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(ValueError, match="every weight above 0"):
        Mixture({"a": 1.0, "b": weight})


def test_a_mixture_of_a_list_is_answered():
    with pytest.raises(TypeError, match=r"\['a', 'b'\]: pass Mixture\(\{folder: weight"):
        Mixture(["a", "b"])


def test_persistent_workers_see_the_next_epoch(shared_dataset):
    loader = make_loader(shared_dataset, shuffle=True, num_workers=2)
    first, second = rows_of(loader), rows_of(loader)
    assert first != second and sorted(first) == sorted(second)


def test_a_decoder_of_other_latents_is_refused(shared_dataset):
    other = MeanAutoencoder(latent_id="sha256:" + "f" * 64)
    with pytest.raises(
        ContractError, match="latent_id aaaaaaaaaaaa, autoencoder 'mean8' reads ffffffffffff"
    ):
        LatentLoader(shared_dataset, autoencoder=other)


def test_another_decoder_of_the_same_latents_is_welcome(shared_dataset):
    other = MeanAutoencoder(decoder_id="sha256:" + "f" * 64)
    assert len(list(LatentLoader(shared_dataset, autoencoder=other, batch_size=250))) == 2


def test_a_local_autoencoder_must_be_passed(shared_dataset):
    with pytest.raises(WeightsError, match="'mean8'; pass its folder"):
        LatentLoader(shared_dataset)


def test_damage_in_a_worker_reaches_the_trainer_by_name(dataset):
    from tests.bad_shards import first_shard, flip_bit

    flip_bit(first_shard(dataset), int(ShardSet(dataset).packs["codes_offset"][3]))
    with pytest.raises(LatentdsError, match="train-000000-000003"):
        list(make_loader(dataset, num_workers=1))


@pytest.mark.gpu
def test_cuda_decodes_as_the_cpu_does(shared_dataset):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    host, device = (
        next(iter(make_loader(shared_dataset, device=d))).images for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(device.cpu(), host, atol=1e-3, rtol=0)


def test_a_batch_travels_in_one_buffer_that_only_large_tensors_keep(shared_dataset):
    batch = LatentDataset(shared_dataset, batch_size=20, decode="latents").batch(0, 1)
    copy = pickle.loads(pickle.dumps(batch))
    tensors = [f.name for f in dataclasses.fields(batch) if torch.is_tensor(getattr(batch, f.name))]
    assert "latents" in tensors and copy.slides == batch.slides
    places = {name: getattr(copy, name).untyped_storage().data_ptr() for name in tensors}
    assert places["codes"] == places["latents"] and len(set(places.values())) == len(tensors) - 1
    tensors.remove("mpp")  # NaN, equal to nothing
    assert all(torch.equal(getattr(copy, name), getattr(batch, name)) for name in tensors)


def test_part_of_a_batch_is_its_patches(shared_dataset):
    batch = LatentDataset(shared_dataset, batch_size=20, columns=("source",)).batch(0, 1)
    part = batch[5:9]
    assert len(part) == 4 and part.slides == batch.slides[5:9]
    assert torch.equal(part.codes, batch.codes[5:9])
    assert part.columns["source"] == batch.columns["source"][5:9]


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_transfers_of_many_batches_keep_their_sizes_and_order(shared_dataset, batch_size):
    data = LatentDataset(shared_dataset, batch_size=batch_size, shuffle=True)
    loader = LatentLoader(
        shared_dataset, batch_size=batch_size, shuffle=True, decode="codes", num_workers=2
    )
    for found, expected in zip(loader, data, strict=True):
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.codes, expected.codes)


class Relabelled(torch.utils.data.IterableDataset):
    """Somebody's change of a batch where it lies, in the worker."""

    def __init__(self, data: LatentDataset) -> None:
        self.data = data

    def __iter__(self):
        for batch in self.data:
            batch.labels.fill_(7)
            batch.codes.numpy()[:] = 3
            yield batch


def test_what_is_written_into_a_batch_in_a_worker_arrives(shared_dataset):
    data = Relabelled(LatentDataset(shared_dataset, batch_size=200))
    for batch in torch.utils.data.DataLoader(data, batch_size=None, num_workers=1):
        assert bool((batch.labels == 7).all()) and bool((batch.codes == 3).all())

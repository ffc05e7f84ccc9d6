"""LatentLoader(views=...): one decode, views of every batch that survive any topology."""

import dataclasses

import pytest
import torch

from latentds import LatentLoader, MultiCrop
from latentds.views.view_batch import Views
from tests.fakes import MeanAutoencoder
from tests.loaders import HostLanes, grouped

MULTICROP = MultiCrop(globals=2, locals=2, global_px=20, local_px=9, stain=0.05)
OPTIONS = {"split": "val", "shuffle": True, "seed": 3, "last": "drop"}


def loader_of(folder, **changes) -> LatentLoader:
    options = {"global_batch_size": 20, "autoencoder": MeanAutoencoder(), "views": MULTICROP}
    return LatentLoader(folder, **grouped(**(OPTIONS | options | changes)))


def by_patch(batches) -> dict[int, list[torch.Tensor]]:
    """Every patch's crops, by its row."""
    found = {}
    for batch in batches:
        for place, row in enumerate(batch.rows.tolist()):
            found[row] = [crop[place] for crop in batch.views.crops()]
    return found


def assert_same(found, expected) -> None:
    assert found.keys() <= expected.keys() and found
    for row, crops in found.items():
        for crop, other in zip(crops, expected[row], strict=True):
            assert torch.equal(crop, other)


@pytest.fixture(scope="module")
def expected(shared_dataset):
    """The crops of every patch of the first epoch."""
    return by_patch(loader_of(shared_dataset))


def test_views_are_those_of_the_decoded_images(shared_dataset):
    plain = next(iter(loader_of(shared_dataset, views=None)))
    batch = next(iter(loader_of(shared_dataset)))
    views = MULTICROP(plain.images, plain.seeds)
    assert plain.views is None and torch.equal(batch.images, plain.images)
    assert torch.equal(batch.views.globals, views.globals)
    assert torch.equal(batch.views.locals, views.locals)


@pytest.mark.parametrize(
    "changes",
    [
        {"global_batch_size": 4},
        {"num_workers": 2},
        {"rank": 1, "world_size": 2},
        {"rank": 3, "world_size": 4, "num_workers": 1, "chunk": 2},
    ],
)
def test_a_patchs_crops_do_not_depend_on_batch_rank_or_worker(shared_dataset, expected, changes):
    assert_same(by_patch(loader_of(shared_dataset, **changes)), expected)


def test_a_resumed_run_sees_the_same_crops_on_other_ranks(shared_dataset, expected):
    first = loader_of(shared_dataset)
    batches = iter(first)
    seen = by_patch([next(batches), next(batches)])
    state = first.state_dict()
    ranks = [loader_of(shared_dataset, rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    rest = {row: crops for loader in ranks for row, crops in by_patch(loader).items()}
    assert seen.keys().isdisjoint(rest) and len(seen) + len(rest) == len(expected)
    assert_same(seen | rest, expected)


def test_another_epoch_has_other_crops(shared_dataset, expected):
    loader = loader_of(shared_dataset)
    loader.set_epoch(1)
    crops = by_patch(loader)
    assert not any(torch.equal(crops[row][0], expected[row][0]) for row in crops.keys() & expected)


def test_tuples_hold_the_crops(shared_dataset):
    crops, labels = next(iter(loader_of(shared_dataset, as_tuple=True)))
    assert [crop.shape[-1] for crop in crops] == [20, 20, 9, 9]
    assert all(len(crop) == len(labels) == 20 for crop in crops)


def test_a_transform_changes_the_images_and_not_the_views(shared_dataset, expected):
    batches = list(loader_of(shared_dataset, transform=torch.Tensor.zero_))
    assert float(batches[0].images.abs().max()) == 0
    assert_same(by_patch(batches), expected)


@pytest.mark.parametrize("static", [False, True])
def test_batches_decoded_ahead_have_the_same_views(shared_dataset, expected, static):
    loader = loader_of(shared_dataset)
    loader.stage = loader.make_stage(static, HostLanes())
    assert_same(by_patch(loader), expected)


def test_slices_and_copies_of_a_batch_carry_their_views(shared_dataset):
    batch = next(iter(loader_of(shared_dataset)))
    part = batch[3:7].to("cpu")
    assert torch.equal(part.views.globals, batch.views.globals[:, 3:7])
    assert len(part.views) == len(part) == 4


@dataclasses.dataclass(frozen=True)
class Whole:
    """Views of latents: all of them, twice."""

    reads = "latents"

    def __call__(self, latents, seeds):
        return Views(latents[None].repeat(2, 1, 1, 1, 1), latents[None, :, :, :2, :2])


def test_views_may_be_of_latents(shared_dataset):
    batch = next(iter(loader_of(shared_dataset, decode="latents", autoencoder=None, views=Whole())))
    assert torch.equal(batch.views.globals[1], batch.latents)
    assert batch.views.locals.shape == (1, 20, 3, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "latents"}, "views of pixels need decode='pixels', not decode='latents'"),
        ({"views": Whole()}, "views of latents need decode='latents'"),
        ({"decode": "codes", "views": lambda images, seeds: images}, "not of decode='codes'"),
    ],
)
def test_what_cannot_be_viewed_is_refused(shared_dataset, options, message):
    with pytest.raises(ValueError) as error:
        loader_of(shared_dataset, **options)
    assert message in str(error.value)

"""LatentLoader(augment=...): one changed picture of every patch, the same after resuming."""

import pytest
import torch

from latentds import LatentLoader, MultiCrop
from latentds.errors import InputError
from tests.conftest import convert_with_mean
from tests.fakes import MeanAutoencoder
from tests.loaders import grouped

OWN = MultiCrop.preset("none", global_px=20, flip=0.5, stain=0.1)


def loader_of(folder, **changes) -> LatentLoader:
    options = {"split": "val", "shuffle": True, "seed": 3, "global_batch_size": 20, "augment": True}
    return LatentLoader(folder, **grouped(autoencoder=MeanAutoencoder(), **(options | changes)))


def by_patch(batches) -> dict[int, torch.Tensor]:
    return {
        row: batch.images[place]
        for batch in batches
        for place, row in enumerate(batch.rows.tolist())
    }


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys() and len(found) == 100
    assert all(torch.equal(found[row], expected[row]) for row in found)


@pytest.fixture(scope="module")
def expected(shared_dataset):
    return by_patch(loader_of(shared_dataset))


def test_images_are_changed_each_by_its_own_draws(shared_dataset, expected):
    plain = by_patch(loader_of(shared_dataset, augment=False))
    assert all(expected[row].shape == plain[row].shape for row in plain)
    assert not any(torch.equal(expected[row], plain[row]) for row in plain)
    assert min(float(image.min()) for image in expected.values()) >= 0


def test_the_augmentation_is_the_preset_of_the_seeds(shared_dataset):
    plain = next(iter(loader_of(shared_dataset, augment=False)))
    views = MultiCrop.preset("supervised", global_px=32)(plain.images, plain.seeds)
    batch = next(iter(loader_of(shared_dataset)))
    assert torch.equal(batch.images, views.globals[0]) and batch.views is None


@pytest.mark.parametrize("changes", [{"global_batch_size": 5}, {"num_workers": 1}])
def test_neither_batches_nor_workers_change_it(shared_dataset, expected, changes):
    assert_same(by_patch(loader_of(shared_dataset, **changes)), expected)


def test_a_resumed_loader_draws_on_elsewhere(shared_dataset, expected):
    first = loader_of(shared_dataset)
    batches = iter(first)
    seen = by_patch([next(batches), next(batches)])
    ranks = [loader_of(shared_dataset, rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(first.state_dict())
        seen |= by_patch(loader)
    assert_same(seen, expected)


def test_every_pass_draws_anew(shared_dataset, expected):
    loader = loader_of(shared_dataset)
    loader.set_epoch(1)
    assert not any(torch.equal(image, expected[row]) for row, image in by_patch(loader).items())


def test_a_recipe_of_ones_own_is_taken(shared_dataset):
    images, labels = next(iter(loader_of(shared_dataset, augment=OWN, as_tuple=True)))
    assert images.shape == (20, 3, 20, 20) and labels.shape == (20,)


def test_the_transform_gets_augmented_images(shared_dataset, expected):
    found = by_patch(loader_of(shared_dataset, transform=lambda images: images * 1.0))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "latents"}, "needs decode='pixels', not 'latents'"),
        ({"views": OWN}, "augment= beside views="),
        ({"masks": True}, "augment= beside masks=: masks would not be changed along"),
        ({"augment": MultiCrop.preset("none", globals=2)}, "2 global and 0 local crops"),
    ],
)
def test_what_cannot_be_augmented_is_refused(shared_dataset, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(shared_dataset, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "latents"}, "decode='latents' gives none; .*MappedLoader"),
        ({"views": OWN, "as_tuple": True}, "as_tuple=True with views= gives the crops alone"),
    ],
)
def test_a_transform_that_would_change_nothing_is_refused(shared_dataset, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(shared_dataset, augment=False, transform=torch.sqrt, **options)


def test_a_recipe_by_its_name_alone_is_answered(shared_dataset):
    with pytest.raises(TypeError, match="augment='supervised'; True, or a MultiCrop"):
        loader_of(shared_dataset, augment="supervised")


def test_patches_that_are_not_square_ask_for_a_size(tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 24), (40 * number, 90, 120)).save(tmp_path / "in" / f"{number}.png")
    convert_with_mean(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="patches of 32x24 px.*global_px"):
        loader_of(tmp_path / "out", split="train")

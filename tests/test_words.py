"""What readers say of themselves, and what they answer to DataLoader's words."""

import inspect

import pytest
from torch.utils.data import DataLoader

from latentds import LatentDataset, LatentLoader, MultiCrop, Order, ShardSet
from tests.fakes import MeanAutoencoder

OPTIONS = {"split": "val", "autoencoder": MeanAutoencoder()}


def test_a_set_shows_what_it_holds(shared_dataset):
    assert repr(ShardSet(shared_dataset)) == (
        f"ShardSet({shared_dataset}: 600 patches (train 500, val 100) of 32x32 px, 2 slides, "
        "2 classes, 48 bytes a patch)"
    )


def test_a_loader_shows_its_epoch(shared_dataset):
    order = Order(global_batch_size=64, rank=1, world_size=2)
    loader = LatentLoader(shared_dataset, shuffle=True, seed=3, order=order, **OPTIONS)
    epoch = f"{shared_dataset}, val: 100 patches shuffled by seed 3, 2 batches of 32, rank 1 of 2"
    assert repr(loader) == f"LatentLoader({epoch}, decode='pixels' on cpu, 0 workers)"
    assert repr(loader.dataset) == f"LatentDataset({epoch}, decode='stored')"


def test_a_batch_shows_its_tensors_and_no_values(shared_dataset):
    views = MultiCrop.preset("none", global_px=16)
    batch = next(iter(LatentLoader(shared_dataset, batch_size=7, views=views, **OPTIONS)))
    assert repr(batch) == (
        "Batch(7 patches of 2 slides on cpu: codes uint8 (7, 3, 4, 4); images float32 "
        "(7, 3, 32, 32); views float32 (1, 7, 3, 16, 16), float32 (0, 7, 3, 96, 96))"
    )


WORDS = set(inspect.signature(DataLoader.__init__).parameters) - {"self"}
OURS = {"batch_size", "shuffle", "num_workers"}


@pytest.mark.parametrize("word", sorted(WORDS - OURS))
def test_every_word_of_torchs_loader_is_answered(shared_dataset, word):
    with pytest.raises(TypeError, match=f"^LatentLoader takes no {word}=: [a-z]"):
        LatentLoader(shared_dataset, **{word: True})


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("drop_last", "order=Order\\(last='drop'\\)"),
        ("prefetch_factor", "num_workers=Workers\\(prefetch_factor="),
        ("pin_memory", "pinned where a GPU decodes"),
        ("collate_fn", "transform="),
        ("sampler", "resident=False"),
    ],
)
@pytest.mark.parametrize("reader", [LatentLoader, LatentDataset])
def test_the_answer_names_what_to_pass(shared_dataset, reader, word, answer):
    with pytest.raises(TypeError, match=f"{reader.__name__} takes no {word}=: .*{answer}"):
        reader(shared_dataset, **{word: 1})


def test_a_word_that_nobody_knows_is_pythons_own_error(shared_dataset):
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        LatentLoader(shared_dataset, colour=True)


@pytest.mark.parametrize("reader", [LatentLoader, LatentDataset])
def test_a_readers_help_still_lists_its_options(reader):
    assert {"folder", "select", "order"} <= set(inspect.signature(reader).parameters)

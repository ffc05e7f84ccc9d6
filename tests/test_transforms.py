"""A transform whose random numbers are the batch's is told of, once; others are left alone."""

import logging
import random

import numpy as np
import pytest
import torch

from latentds.loading.augmenting import Watched
from latentds.loading.loader import LatentLoader
from tests.fakes import MeanAutoencoder
from tests.loaders import grouped

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def flip_all(images):
    return images.flip(-1) if torch.rand(()) < 0.5 else images


def flip_by_python(images):
    return images.flip(-1) if random.random() < 0.5 else images


def brighten_each(images):
    return images + torch.rand(len(images), 1, 1, 1)


def told(transform, caplog) -> list[str]:
    watched = Watched(transform)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            watched(IMAGES)
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("transform", [flip_all, flip_by_python])
def test_draws_of_a_whole_batch_are_told_once(transform, caplog):
    (message,) = told(transform, caplog)
    assert "augment=True" in message and "views=MultiCrop" in message
    assert "latentds.uniform(batch.seeds" in message


def test_torchvisions_random_transforms_are_told(caplog):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    assert len(told(v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.2)]), caplog)) == 1


@pytest.mark.parametrize("transform", [brighten_each, lambda images: images * 2])
def test_others_are_not(transform, caplog):
    assert told(transform, caplog) == []


def test_generators_are_left_as_one_call_leaves_them():
    states = []
    for transform in (flip_all, Watched(flip_all)):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        transform(IMAGES)
        states.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
    assert states[0] == states[1]


def test_the_loader_watches_its_transform(shared_dataset, caplog):
    options = {"batch_size": 100, "autoencoder": MeanAutoencoder(), "transform": flip_all}
    with caplog.at_level(logging.WARNING):
        list(LatentLoader(shared_dataset, **grouped(**options)))
    assert sum("once a batch" in record.message for record in caplog.records) == 1

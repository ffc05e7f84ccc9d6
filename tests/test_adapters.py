"""Adapters by the contracts of libraries that are not installed, and their refusals."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from latentds.errors import InputError, ShapeError
from latentds.loading.adapters import (
    MappedLoader,
    MilBags,
    TileReader,
    dinov2_batch,
    wsistream_batch,
)
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Select
from latentds.views.view_batch import Views
from tests.swaps import BATCH, COUNT, EDGE, moved, run, trained

pytestmark = pytest.mark.usefixtures("in_swap_room")


class MixedBags(SlideBags):
    def __getitem__(self, index):
        return dataclasses.replace(super().__getitem__(index), label=-1)


def test_a_bag_without_a_label_is_refused():
    bags = MilBags(MixedBags("latents"), nn.Identity())
    assert len(bags) == 2
    with pytest.raises(InputError, match=r"slide\.A: no label"):
        bags[0]


def test_a_bag_is_whole_on_the_device_of_its_features():
    bag = MilBags(SlideBags("latents"), lambda images: images.flatten(1).to("meta"))[0]
    assert list(bag) == ["X", "Y", "coords"]
    assert {part.device.type for part in bag.values()} == {"meta"}


def test_dinov2_loop_trains_on_the_batch():
    given = trained()
    steps = []

    def forward_backward(data, teacher_temp):
        crops = data["collated_global_crops"].float()
        cross_entropy(given["model"](crops), torch.arange(len(crops)) % 2).backward()
        given["optimizer"].step()
        steps.append(data)

    crops = SimpleNamespace(global_crops_size=56, local_crops_size=28)
    names = run(
        "DINOv2",
        "+",
        cfg=SimpleNamespace(
            crops=crops,
            train=SimpleNamespace(batch_size_per_gpu=BATCH),
            student=SimpleNamespace(patch_size=14),
        ),
        metric_logger=SimpleNamespace(log_every=lambda loader, *_: loader),
        model=SimpleNamespace(forward_backward=forward_backward),
        **{"header": "", "start_iter": 0, "iteration": 0, "max_iter": 6, "teacher_temp": 0.04},
        inputs_dtype=torch.bfloat16,
    )
    assert names["iteration"] == 6 and moved(given)  # an epoch has four batches
    assert steps[0]["collated_global_crops"].shape == (2 * BATCH, 3, 56, 56)
    assert steps[0]["collated_local_crops"].shape == (8 * BATCH, 3, 28, 28)
    assert steps[0]["collated_local_crops"].dtype == torch.bfloat16


def batch_of_views(count: int = 6, locals_: int = 3):
    batch = next(iter(LatentLoader("latents", batch_size=count, shuffle=True)))
    random = torch.Generator().manual_seed(0)
    shapes = ((2, count, 3, 56, 56), (locals_, count, 3, 28, 28))
    batch_views = Views(*(torch.rand(shape, generator=random) for shape in shapes))
    return SimpleNamespace(**(batch.__dict__ | {"views": batch_views}))


def collate_by_hand(views: Views, masks: torch.Tensor, dtype: torch.dtype) -> dict[str, object]:
    """The seven values from samples, one patch at a time, as DINOv2's collate lays them out."""
    samples = [(list(views.globals[:, i]), list(views.locals[:, i])) for i in range(len(views))]
    crops = [
        torch.stack([sample[kind][number] for number in range(count) for sample in samples])
        for kind, count in enumerate((len(views.globals), len(views.locals)))
    ]
    places = [place for place, masked in enumerate(masks.flatten().tolist()) if masked]
    weights = [1 / masks[place // masks.shape[1]].sum() for place in places]
    return {
        "collated_global_crops": crops[0].to(dtype),
        "collated_local_crops": crops[1].to(dtype),
        "collated_masks": masks,
        "mask_indices_list": torch.tensor(places),
        "masks_weight": torch.tensor(weights),
        "n_masked_patches": torch.tensor([len(places)]),
    }


def test_dinov2_batch_is_the_collates():
    batch = batch_of_views()
    data = dinov2_batch(batch, dtype=torch.float16)
    by_hand = collate_by_hand(batch.views, data["collated_masks"], torch.float16)
    assert set(data) == {*by_hand, "upperbound"}
    for name, value in by_hand.items():
        assert data[name].dtype == value.dtype and torch.equal(data[name], value), name
    assert type(data["upperbound"]) is int
    assert data["upperbound"] >= data["n_masked_patches"].item() > 0


def test_dinov2_masks_are_within_the_ratios_and_a_patchs_own():
    batch = batch_of_views(18)
    masks = dinov2_batch(batch, share=0.5, ratios=(0.25, 0.5))["collated_masks"]
    counts = masks.sum(1)
    assert masks.shape == (36, 16) and set(counts.tolist()) <= {0, *range(4, 9)}
    assert 0 < (counts == 0).sum() < 36
    rest = SimpleNamespace(views=batch.views[6:], seeds=batch.seeds[6:])
    own = dinov2_batch(rest, share=0.5, ratios=(0.25, 0.5))["collated_masks"]
    assert torch.equal(own.view(2, 12, 16), masks.view(2, 18, 16)[:, 6:])


def test_dinov2_batch_without_local_crops_or_masks():
    data = dinov2_batch(batch_of_views(locals_=0), share=0.0)
    assert data["collated_local_crops"].shape == (0, 3, 28, 28)
    assert data["upperbound"] == len(data["masks_weight"]) == 0


def test_dinov2_batch_says_what_it_lacks():
    plain = SimpleNamespace(views=None)
    with pytest.raises(InputError, match="views=MultiCrop"):
        dinov2_batch(plain)
    with pytest.raises(ShapeError, match="56x56 px; patch_px=16"):
        dinov2_batch(batch_of_views(), patch_px=16)


def test_wsistream_loop_gets_its_keys():
    names = run(
        "wsistream",
        "+",
        MappedLoader=MappedLoader,
        LatentLoader=LatentLoader,
        wsistream_batch=wsistream_batch,
    )
    batch = names["batch"]
    keys = {"image", "x", "y", "mpp", "tissue_fraction", "slide_path", "patient_id"}
    assert set(batch) == keys and len(names["loader"]) == 5
    assert batch["image"].dtype == torch.float32 and batch["image"].shape[1:] == (3, EDGE, EDGE)
    assert batch["x"].dtype == batch["y"].dtype == torch.int64
    assert batch["mpp"].tolist() == batch["tissue_fraction"].tolist() == [-1.0, -1.0]
    assert batch["mpp"].dtype == torch.float64  # what default_collate makes of Python floats
    assert set(batch["slide_path"]) <= {"slide.A", "slide.B"}
    assert batch["patient_id"] == batch["slide_path"]


def test_wsistream_views_have_names():
    batch = batch_of_views(4)
    named = wsistream_batch(batch)
    assert {name for name in named if "_" in name and name[-1].isdigit()} == {
        *("global_0", "global_1", "local_0", "local_1", "local_2")
    }
    assert "image" not in named and torch.equal(named["global_1"], batch.views.globals[1])


def test_slide2vec_reads_tiles_by_the_tilings_numbers():
    array = LatentArray("latents", "train", select=Select(slides=["slide.A"]))
    coords = [(0, y) for y in range(COUNT)]  # as the pictures' names count them
    tiles = TileReader(array, coords).read_batch(np.arange(COUNT))
    assert tiles.shape == (COUNT, 3, EDGE, EDGE) and tiles.dtype == torch.uint8
    paths = sorted(Path("patches/train/stroma/slide.A").iterdir())
    pictures = torch.tensor(np.stack([np.asarray(Image.open(path)) for path in paths]))
    distances = torch.cdist(
        tiles.permute(0, 2, 3, 1).flatten(1).float(), pictures.flatten(1).float()
    )
    assert distances.argmin(1).tolist() == list(range(COUNT))
    few = TileReader(array, coords).read_batch([5, 0])
    assert torch.equal(few, tiles[[5, 0]])
    assert TileReader(array).read_batch([]).shape == (0, 3, EDGE, EDGE)


def test_a_tile_that_is_not_there_is_named():
    array = LatentArray("latents", "train", select=Select(slides=["slide.A"]))
    with pytest.raises(InputError, match=r"no patch at \(7, 70\)"):
        TileReader(array, [(0, 1), (7, 70)])
    with pytest.raises(InputError, match=r"two patches at \(0, \d\); open one slide"):
        TileReader(LatentArray("latents"), [(0, 1)])
    with pytest.raises(ValueError, match="decode='codes'"):
        TileReader(LatentArray("latents", decode="codes"))


def test_slide2vec_lines_run():
    array = LatentArray("latents", "train", select=Select(slides=["slide.A"]))
    names = run(
        "slide2vec",
        "+",
        TileReader=TileReader,
        LatentArray=LatentArray,
        Select=Select,
        coords=None,
        tile_indices=np.array([1, 0, len(array) - 1]),
    )
    assert names["tiles"].shape == (3, 3, EDGE, EDGE)

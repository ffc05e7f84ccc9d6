"""What a CUDA graph may hold: operations that ask the GPU for nothing and read nothing of the host.

FakeTensorMode stands for a GPU: it computes shapes on "cuda" and refuses what needs values.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentds import MultiCrop
from latentds.views.latent_crops import LatentCrops
from latentds.views.multicrop import PRESETS
from latentds.views.view_batch import Views


class OnDevice(TorchDispatchMode):
    """Refuses operations with a tensor of the host: a graph would keep its address."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        every = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(tensor.device.type != "cuda" for tensor in every):
            raise RuntimeError(f"{func} with a tensor of the host")
        return result


def check_capturable(function, *shapes, dtype=torch.float32) -> list[torch.Tensor]:
    """What a function gives of images or latents and seeds on a GPU; an error for what waits."""
    with FakeTensorMode():
        values = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
        seeds = torch.empty(len(values[0]), dtype=torch.int64, device="cuda")
        with OnDevice():
            made = function(*values, seeds)
    return [made.globals, made.locals] if isinstance(made, Views) else [made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_views_of_every_preset_can_be_captured(preset, dtype):
    multicrop = MultiCrop.preset(preset, stain=0.05)
    large, small = check_capturable(multicrop, (5, 3, 256, 256), dtype=dtype)
    assert large.shape[:2] == (multicrop.globals, 5) and large.device.type == "cuda"
    assert small.shape[:2] == (multicrop.locals, 5) and large.dtype == small.dtype == dtype


@pytest.mark.parametrize("images", [(5, 3, 300, 260), (600, 3, 256, 256)])
def test_views_of_oblong_patches_and_of_several_chunks_can_be_captured(images):
    check_capturable(MultiCrop(stain=0.05, solarize=(0.5, 0.5, 0.5)), images)


def test_windows_of_latents_can_be_captured():
    large, small = check_capturable(LatentCrops(), (5, 4, 32, 32))
    assert large.shape == (2, 5, 4, 28, 28) and small.device.type == "cuda"


@pytest.mark.parametrize(
    "function",
    [
        lambda images, seeds: images * images.mean().item(),
        lambda images, seeds: images if (images > 0).any() else -images,
        lambda images, seeds: images[seeds > 0],
        lambda images, seeds: images + torch.tensor([1.0], device=images.device),
        lambda images, seeds: images[:, [2, 1, 0]],
        lambda images, seeds: images.cpu(),
    ],
    ids=["a number", "a branch", "a selection", "a constant", "a list as index", "a copy"],
)
def test_what_a_graph_cannot_hold_would_be_noticed(function):
    with pytest.raises(RuntimeError):
        check_capturable(function, (5, 3, 8, 8))

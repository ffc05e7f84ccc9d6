"""What changes patches in a loader: `augment=`, drawn from each patch's seed, and views replayed.

And a look at `transform=`: whether its random numbers are the batch's, not the patches'.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.core.compiling import Graphed
from latentds.errors import InputError
from latentds.views.latent_crops import LatentCrops
from latentds.views.multicrop import MultiCrop
from latentds.views.view_batch import Views

logger = logging.getLogger(__name__)
Making = Callable[[Tensor, Tensor], Views]

COPIES, TRIALS = 8, 4  # one patch several times over, several times
ONCE = (
    "transform= draws random numbers once a batch: all its patches are flipped, cut or coloured "
    "alike, as by torchvision's random transforms. For draws of every patch's own pass "
    "augment=True, or views=MultiCrop(...), or draw by latentds.uniform(batch.seeds, NAME)"
)


def find_augment(
    augment: bool | MultiCrop, patch_px: tuple[int, int], decode: str, others: dict[str, bool]
) -> MultiCrop:
    """The augmentation asked for.

    augment  True for MultiCrop.preset("supervised") in the patches' own size, or a MultiCrop of one
             global crop
    others   options that it cannot stand beside, by name, and whether they are set
    raises   ValueError for what cannot be augmented, InputError for patches that are not square
    """
    if decode != "pixels":
        raise ValueError(f"augment= changes pixels; it needs decode='pixels', not {decode!r}")
    for name, is_set in others.items():
        if is_set:
            raise ValueError(
                f"augment= beside {name}=: {name} would not be changed along; leave one"
            )
    if augment is True:
        height, width = patch_px
        if height != width:
            raise InputError(
                f"patches of {width}x{height} px, and augment=True keeps a size that is square; "
                "pass augment=MultiCrop.preset('supervised', global_px=...)"
            )
        return MultiCrop.preset("supervised", global_px=height)
    if not isinstance(augment, MultiCrop):
        raise TypeError(f"augment={augment!r}; True, or a MultiCrop of one global crop")
    if (augment.globals, augment.locals) != (1, 0):
        raise ValueError(
            f"augment= has {augment.globals} global and {augment.locals} local crops; one global "
            "crop takes the image's place, views= is for several"
        )
    return augment


def find_transform(transform: Callable[[Tensor], Any], decode: str, is_kept: bool) -> Watched:
    """The transform asked for, watched.

    is_kept  whether the images it changes are handed out
    raises   ValueError where it would change nothing that is
    """
    if decode != "pixels":
        raise ValueError(
            f"transform= changes images, and decode={decode!r} gives none; change those batches by "
            "latentds.loading.adapters.MappedLoader(loader, function)"
        )
    if not is_kept:
        raise ValueError(
            "transform= changes batch.images, and as_tuple=True with views= gives the crops alone; "
            "MultiCrop(mean=..., std=...) normalizes those"
        )
    return Watched(transform)


class Watched:
    """A transform of images (B, 3, H, W); a warning, once, where it draws once for all of them.

    One that draws no random numbers (of torch's, numpy's or Python's own generators) in its first
    batch is called once. Another is called some times more, on copies of a patch: those come out
    alike where all patches of a batch share the draws. Generators are left as one call leaves them.
    """

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform, self.was_watched = transform, False

    def __call__(self, images: Tensor) -> Any:
        if self.was_watched:
            return self.transform(images)
        self.was_watched, before = True, generator_states(images.device)
        changed = self.transform(images)
        if generator_states(images.device) != before:
            with generators_kept(images.device):
                shared = shares_draws(self.transform, images)
            if shared:
                logger.warning(ONCE)
        return changed


def shares_draws(transform: Callable[[Tensor], Any], images: Tensor) -> bool:
    """Whether copies of a patch in one batch always come out alike; False where it cannot say."""
    copies = images[:1].expand(COPIES, -1, -1, -1)
    for _ in range(TRIALS):
        made = transform(copies.clone())
        if (
            not isinstance(made, Tensor)
            or len(made) != COPIES
            or not bool((made == made[:1]).all())
        ):
            return False
    return True


def generator_states(device: torch.device) -> bytes:
    """States of the global generators, to be compared."""
    states = [torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy())
    return pickle.dumps(states)


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Give the global generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def replayed(views: Making | None) -> Making | None:
    """Ours from a CUDA graph; another's as they are, as those may wait for the GPU."""
    if isinstance(views, MultiCrop | LatentCrops):
        return Graphed(views, lambda made, size: made[:size].map(Tensor.clone))
    return views

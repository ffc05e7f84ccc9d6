"""Other people's loops: our batches in the form that each of them expects (docs/swap.md)."""
# B patches, G global crops and L local crops of a patch, T tokens of a global crop, M masked tokens
# N patches of a bag, D features, H W pixels

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from latentds.errors import InputError, ShapeError
from latentds.loading.array import LatentArray
from latentds.loading.bags import SlideBags
from latentds.loading.batch import Batch
from latentds.loading.loader import LatentLoader
from latentds.models.token_masks import MASKED_RATIOS, MASKED_SHARE, global_masks
from latentds.sources.names import patient_of
from latentds.views.view_batch import Views

UNKNOWN = -1.0  # what wsistream writes where mpp is not known


class MappedLoader:
    """A LatentLoader whose batches go through a function, in the main process, on their device.

    loader    a LatentLoader
    function  of what it yields; what it returns is handed out

    Length, epochs and state are the loader's. `skip_first_batches` of Accelerate works, and costs
    nothing for batches that the loader's own state has passed already.
    """

    # What skip_first_batches copies into a DataLoader:
    batch_size, drop_last, prefetch_factor = None, False, None

    def __init__(self, loader: LatentLoader, function: Callable[[Any], Any]) -> None:
        self.loader, self.function = loader, function
        self.dataset = Mapped(self)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return map(self.function, self.loader)

    @property
    def sampler(self) -> LatentLoader:
        """What `set_epoch` is called of."""
        return self.loader

    def set_epoch(self, epoch: int) -> None:
        """See LatentLoader."""
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """See LatentLoader."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See LatentLoader."""
        self.loader.load_state_dict(state)


class Mapped(IterableDataset[Any]):
    """The batches of an epoch from its first: None for those that a resumed loader has passed."""

    def __init__(self, mapped: MappedLoader) -> None:
        self.mapped = mapped

    def __iter__(self) -> Iterator[Any]:
        loader = self.mapped.loader
        for _ in range(loader.handed_out if loader.resuming else 0):
            yield None
        yield from self.mapped


def feed_trainer(trainer: Any, loader: LatentLoader, function: Callable[[Batch], Any]) -> None:
    """Let a transformers.Trainer train from a LatentLoader.

    function  a batch as the model's keyword arguments, a dictionary of tensors

    It resumes at the next batch where `trainer.train(resume_from_checkpoint=...)` does, without
    decoding those before. Trainer's own sampling, workers and shuffling are not used; give
    `per_device_train_batch_size` the loader's batch size: Trainer computes rates with it.
    """
    from transformers import TrainerCallback

    mapped = MappedLoader(loader, function)

    class Position(TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            accumulated = args.gradient_accumulation_steps
            epoch, step = divmod(state.global_step, -(-len(mapped) // accumulated))
            mapped.set_epoch(epoch)
            if step and not args.ignore_data_skip:
                place = loader.dataset.state_at(epoch, step * accumulated)
                mapped.load_state_dict(place.to_json())

    trainer.get_train_dataloader = lambda: mapped
    trainer.add_callback(Position())


def dinov2_batch(
    batch: Batch,
    *,
    patch_px: int = 14,
    dtype: torch.dtype = torch.float16,
    share: float = MASKED_SHARE,
    ratios: tuple[float, float] = MASKED_RATIOS,
) -> dict[str, Any]:
    """What DINOv2's `collate_data_and_cast` makes of its samples, of a batch with views.

    batch     of LatentLoader(..., views=MultiCrop(...))
    patch_px  edge of the network's tokens
    dtype     of the crops
    share, ratios  see latentds.models.token_masks.block_masks

    collated_global_crops  dtype (G * B, 3, H, W), crop by crop: the first crop of every patch first
    collated_local_crops   dtype (L * B, 3, ., .), likewise
    collated_masks     bool (G * B, T), drawn from the patches' seeds
    mask_indices_list  int64 (M,), places of masked tokens in the flattened masks
    masks_weight       float32 (M,), one over the masked tokens of the token's crop
    upperbound         int, M: DINOv2's bound of it, here exact
    n_masked_patches   int64 (1,), M
    raises  ShapeError where tokens do not divide a global crop, InputError without views
    source  facebookresearch/dinov2, dinov2/data/collate.py (read, not copied). There exactly
            share * G * B crops of every batch are masked; here each is with that probability.
    """
    views = views_of(batch)
    height, width = views.globals.shape[-2:]
    if height % patch_px or width % patch_px:
        raise ShapeError(
            f"global crops of {width}x{height} px; patch_px={patch_px} divides neither"
        )
    grid = (height // patch_px, width // patch_px)
    masks = global_masks(batch.seeds, len(views.globals), grid, share, ratios).flatten(0, 1)
    masks = masks.to(views.globals.device)
    counts = masks.sum(1, keepdim=True).clamp(min=1)
    indices = masks.flatten().nonzero().flatten()
    return {
        "collated_global_crops": views.globals.flatten(0, 1).to(dtype),
        "collated_local_crops": views.locals.flatten(0, 1).to(dtype),
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": (1 / counts).expand_as(masks).flatten()[indices],
        "upperbound": len(indices),
        "n_masked_patches": torch.full((1,), len(indices), dtype=torch.long),
    }


def nanopath_batch(batch: Batch) -> dict[str, Tensor]:
    """A batch with views under the names that nanopath's data set gives it.

    global_views, local_views  (B, G, 3, H, W) and (B, L, 3, ., .), on their device
    sample_idx            int64 (B,), rows of the data set
    slide_id, patient_id  int64 (B,), hashes of slide name and patient, of "" where unknown
    raises  InputError without views
    source  MedARC-AI/nanopath, dataloader.py (read, not copied)
    """
    views = views_of(batch)
    names = [name or "" for name in batch.slides]
    return {
        "global_views": views.globals.transpose(0, 1),
        "local_views": views.locals.transpose(0, 1),
        "sample_idx": batch.rows,
        "slide_id": torch.tensor([name_hash(name) for name in names]),
        "patient_id": torch.tensor([name_hash(patient_of(name)) for name in names]),
    }


def name_hash(name: str) -> int:
    """63 bits of a name's BLAKE2b hash."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def wsistream_batch(batch: Batch) -> dict[str, Any]:
    """A batch under the names that wsistream's data set gives it.

    image  (B, 3, H, W); with views instead global_0, global_1, ..., local_0, ...
    x, y   int64 (B,), pixels of level 0; -1 where unknown
    mpp, tissue_fraction   float64 (B,); -1 where unknown, which tissue_fraction always is
    slide_path, patient_id  lists of B: the slide's name and its patient, "" where unknown
    source  RamonKaspar/wsistream, src/wsistream/torch.py and docs (MIT; read, not copied)
    """
    pictures = {"image": batch.images}
    if batch.views is not None:
        pictures = {
            f"{kind}_{number}": crops
            for kind in ("global", "local")
            for number, crops in enumerate(getattr(batch.views, f"{kind}s"))
        }
    names = [name or "" for name in batch.slides]
    mpp = batch.mpp.double()
    return pictures | {
        "x": batch.coords[:, 0],
        "y": batch.coords[:, 1],
        "mpp": torch.where(mpp.isnan(), UNKNOWN, mpp),
        "tissue_fraction": torch.full_like(mpp, UNKNOWN),
        "slide_path": names,
        "patient_id": [patient_of(name) for name in names],
    }


class TileReader:
    """The tiles of a slide by number, as slide2vec's readers give them.

    array   LatentArray of the slide (`Select(slides=[name])`), which decodes to pixels
    coords  x and y at level 0 of the tiles in slide2vec's order, (N, 2); None takes the array's
            own order
    raises  InputError where the array holds no patch at one of them, or two
    """

    def __init__(
        self, array: LatentArray, coords: Sequence[Any] | np.ndarray | None = None
    ) -> None:
        if array.decode != "pixels":
            raise ValueError(f"an array of decode={array.decode!r}; a TileReader needs 'pixels'")
        self.array = array
        self.places = np.arange(len(array))
        if coords is not None:
            self.places = places_at(array, np.asarray(coords, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.places)

    def read_batch(self, tile_indices: Sequence[int] | np.ndarray) -> Tensor:
        """Tiles uint8 (B, 3, H, W) on the CPU."""
        places = self.places[np.asarray(tile_indices, np.int64)]
        if not len(places):
            return torch.empty((0, 3, *self.array.shards.manifest.contract.patch_px)).byte()
        return (self.array[places].float().clamp(0, 1) * 255).round().byte().cpu()


class MilBags(Dataset[dict[str, Tensor]]):
    """Slides as torchmil's data sets give them, embedded while they are read.

    bags   SlideBags with labels
    embed  images float (n, 3, H, W) in [0, 1] to features (n, D), on the bags' device

    X       float32 (N, D)
    Y       int64 ()
    coords  int64 (N, 2); all three on the device of the features
    raises  InputError for a slide without a label
    """

    def __init__(self, bags: SlideBags, embed: Callable[[Tensor], Tensor]) -> None:
        self.bags, self.embed = bags, embed

    def __len__(self) -> int:
        return len(self.bags)

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        bag = self.bags[index]
        if bag.label < 0:
            raise InputError(
                f"slide {bag.slide}: no label, or patches of several; choose others (slides=, "
                "where=), or give slides labels when converting"
            )
        features = torch.cat([self.embed(images).float() for images in self.bags.decode(bag)])
        others = {"Y": torch.tensor(bag.label), "coords": bag.coords}
        # Features first: torchmil's collate_fn takes the mask of real patches from the first value.
        return {"X": features} | {name: part.to(features.device) for name, part in others.items()}


def views_of(batch: Batch) -> Views:
    """The batch's views; InputError without."""
    if batch.views is None:
        raise InputError("a batch without views; open LatentLoader(..., views=MultiCrop(...))")
    views: Views = batch.views
    return views


def places_at(array: LatentArray, coords: np.ndarray) -> np.ndarray:
    """Place in the array of the one patch at each x and y, int64 (N,)."""
    known: dict[tuple[int, int], int] = {}
    for place, (x, y) in enumerate(array.coords.tolist()):
        if known.setdefault((x, y), place) != place:
            raise InputError(
                f"{array}: two patches at ({x}, {y}); open one slide, select=Select(slides=[name])"
            )
    try:
        return np.array([known[x, y] for x, y in coords.tolist()], np.int64)
    except KeyError as error:
        raise InputError(f"{array}: no patch at {error.args[0]}") from None

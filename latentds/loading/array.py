"""Codes held in memory: LatentArray, any patches by their place, and what a loader may draw."""
# N patches of the set, or held, B patches asked for, C latent channels, h w latent cells,
# H W pixels

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.core.display import progress
from latentds.core.processes import choose_device
from latentds.errors import DamagedPackError, InputError, unknown_name
from latentds.loading.batch import Vocabulary, check_codes, check_group
from latentds.loading.dataset import LatentDataset
from latentds.loading.decoding import Decode, check_decode, make_decoder, make_integers
from latentds.loading.options import Select
from latentds.loading.selection import select_rows
from latentds.store.cache import CacheConfig
from latentds.store.reader import ShardSet

BLOCK_PATCHES = 4096
CGROUP = Path("/sys/fs/cgroup")
KEPT_FREE = 0.1  # of the free memory, for decoding and the rest of the program


class LatentArray(Dataset[Tensor]):
    """Codes of a split in RAM or GPU memory, or left on disk; `array[indices]` decodes patches.

    With the set on the GPU a loader is a permutation: `for i in torch.randperm(len(a)).split(64)`.
    It is a map-style Dataset: Subset, random_split, StackDataset(array, array.labels), samplers and
    DataLoader take it (with workers on the CPU alone, where they decode).

    folder, cache, select   see LatentDataset
    split         one split; None takes all
    resident      hold the codes; without, they are read (and checked) when they are asked for
    device        where the codes lie and are decoded
    decode        what indexing gives: "pixels", "latents", "codes" (uint8, or of entropy-coded
                  records int16 (B, C, h, w) integers) or "stored"
    autoencoder, dtype   see LatentLoader

    codes   uint8 (N, *codes_shape) on the device, as stored; InputError where not resident
    labels  int64 (N,) on the device, -1 for none
    steps   float32 (N,) on the device, what the integers of entropy-coded records count in: latents
            are integers * (steps / gains of the codebook); None for other encodings. The first use
            reads all codes
    slides, coords, rows   of the patches: int64 (N,) numbers of `slide_names`, (N, 2), (N,); on the
            CPU

    Refuses with InputError what does not fit into the device's free memory.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str | None = None,
        *,
        resident: bool = True,
        device: torch.device | str = "auto",
        decode: str = "pixels",
        select: Select = Select(),
        autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        cache: CacheConfig | None = None,
    ) -> None:
        check_decode(decode)
        check_group(select, Select, "select")
        chosen = select.unbalanced("LatentArray")
        is_part = not resident or any(part is not None for part in chosen)
        self.shards = ShardSet(folder, cache=cache, reads_parts=is_part)
        self.device = choose_device("cpu" if device == "auto" and not resident else device)
        self.decode, manifest = decode, self.shards.manifest
        rows = select_rows(self.shards, split, *chosen)
        if rows is None:
            rows = np.arange(
                *((0, len(self.shards)) if split is None else self.shards.patch_range(split))
            )
        each = 8 + (manifest.contract.bytes_per_patch if resident else 0)  # 8 of a label
        self.memory_bytes = check_fits(self.shards, len(rows), self.device, each)
        self.decoder = make_decoder(
            self.shards, decode, autoencoder, self.device, Decode(dtype=dtype)
        )
        table = self.shards.patches[rows]
        self.rows = torch.from_numpy(rows)
        self.vocabulary = Vocabulary([self.shards], select.class_to_idx)
        labels = self.vocabulary.labels[0][table["label"]]
        self.labels = torch.from_numpy(labels).to(self.device)
        self.slides = torch.from_numpy(table["slide"].astype(np.int64))
        self.coords = torch.from_numpy(np.stack([table["x"], table["y"]], 1).astype(np.int64))
        self.codebooks: Tensor | None = None  # which codebook each patch has, where there are more
        if len(manifest.codebooks) > 1:
            self.codebooks = torch.from_numpy(self.shards.codebook_numbers(rows)).to(self.device)
        self.held: Tensor | None = None
        if resident:
            size = (len(rows), *manifest.contract.codes_shape)
            self.held = torch.empty(size, dtype=torch.uint8, device=self.device)
            fill(self.held, self.shards, rows, self.shards.read_codes)
        self.places: dict[str, int] = {}

    def read(self, rows: np.ndarray) -> Tensor:
        """Codes of rows of the patch table from the shards, checked, on the CPU."""
        codes = torch.from_numpy(self.shards.read_codes(rows))
        books = self.shards.codebook_numbers(rows)
        check_codes(self.shards, codes, books, self.shards.manifest.codebooks)
        return codes

    def stored(self, places: Tensor | slice) -> Tensor:
        """Codes on the device of patches by place."""
        if self.held is not None:
            return self.held[places if isinstance(places, slice) else places.to(self.device)]
        places = places if isinstance(places, slice) else places.cpu()
        return self.read(self.rows[places].numpy()).to(self.device)

    @property
    def codes(self) -> Tensor:
        """All codes, as stored."""
        if self.held is None:
            raise InputError(
                f"{self}: codes are not resident; array[...] of decode='stored' reads some of them"
            )
        return self.held

    @functools.cached_property
    def steps(self) -> Tensor | None:
        """What the integers of entropy-coded records count in."""
        integers = make_integers(self.shards.manifest.codebooks)
        if integers is None:
            return None
        blocks = [slice(n, n + BLOCK_PATCHES) for n in range(0, len(self), BLOCK_PATCHES)]
        return torch.cat([integers.steps(self.stored(b), self.books(b)) for b in blocks])

    def books(self, places: Tensor | slice) -> Tensor | None:
        """Which codebook patches have, by place; None where there is one."""
        if self.codebooks is None:
            return None
        return self.codebooks[places if isinstance(places, slice) else places.to(self.device)]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        held = f"{self.memory_bytes / 1e9:.3f} GB" if self.held is not None else "read from disk,"
        return f"LatentArray({self.shards.folder}: {len(self):,} patches, {held} on {self.device})"

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""
        return list(self.vocabulary.classes)

    @property
    def slide_names(self) -> list[str]:
        """Slide names, by number."""
        return list(self.shards.manifest.slides)

    @property
    def keys(self) -> list[str]:
        """Keys of the patches, in the array's order; the first use reads all of them."""
        return list(self.find_places())

    def find_places(self) -> dict[str, int]:
        """Place of every key."""
        if not self.places:
            columns = self.shards.read_columns(self.rows.numpy(), ["key"])
            self.places = {key: place for place, key in enumerate(columns["key"])}
        return self.places

    def index(self, keys: Sequence[str]) -> Tensor:
        """Places of the patches of these keys, int64 (B,); UnknownNameError for one not there."""
        known = self.find_places()
        for key in keys:
            if key not in known:
                raise unknown_name("key", key, known)
        return torch.tensor([known[key] for key in keys], dtype=torch.int64)

    def find(self, indices: Any) -> Tensor:
        """Places of what numpy would take as an index of the array, or of keys."""
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        chosen = list(indices) if isinstance(indices, tuple) else indices
        names = np.asarray(None if isinstance(chosen, slice) else chosen)
        if names.dtype.kind in "OTU" and isinstance(next(iter(names.flat), ""), str):
            return self.index(names.ravel().tolist()).reshape(names.shape)
        rows = self.rows.numpy()  # ascending
        return torch.as_tensor(np.searchsorted(rows, rows[chosen]))

    @torch.no_grad()
    def __getitem__(
        self, indices: Tensor | np.ndarray | slice | int | str | Sequence[Any]
    ) -> Tensor:
        """Patches by place, as numpy indexes, or by key: (B, ...), without B for a single one."""
        if isinstance(indices, slice) and (indices.step or 1) > 0:
            return self.decoded(indices)
        places = self.find(indices)
        found = self.decoded(places.reshape(-1))
        return found.reshape(*places.shape, *found.shape[1:])

    def decoded(self, places: Tensor | slice) -> Tensor:
        """Patches (B, ...) by place."""
        codes = self.stored(places)
        return codes if self.decoder is None else self.decoder(codes, self.books(places))

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Patches by place, read and decoded together: what torch's DataLoader asks of a batch."""
        return list(self[indices])


def check_fits(shards: ShardSet, count: int, device: torch.device, each: int) -> int:
    """Bytes that so many patches of `each` bytes take; InputError where there is no room for them.

    To be asked before anything is read.
    """
    memory_bytes = count * each
    free = free_bytes(device)
    if memory_bytes > free * (1 - KEPT_FREE):
        raise InputError(
            f"{shards.folder}: {count:,} patches take {memory_bytes / 1e9:.2f} GB, "
            f"{device} has {free / 1e9:.2f} GB free; choose fewer (split=, "
            "select=), another device, or resident=False"
        )
    return memory_bytes


def fill(
    memory: Tensor,
    shards: ShardSet,
    rows: np.ndarray | range,
    read: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Put what `read` gives of all rows into `memory`, block by block, its codes checked."""
    for start in progress(
        range(0, len(rows), BLOCK_PATCHES), desc="loading", unit="block", disable=None
    ):
        part = np.asarray(rows[start : start + BLOCK_PATCHES])
        block = torch.from_numpy(read(part))
        check_codes(shards, block, shards.codebook_numbers(part), shards.manifest.codebooks)
        memory[start : start + len(block)] = block


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on the device may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min(free, container_bytes())


def container_bytes() -> int:
    """Memory that a container's limit (cgroup v2) leaves; without one, more than there can be."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        return int(limit) - int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return 1 << 62


def place_of(
    held: Sequence[np.ndarray | range], first: Sequence[int], which: int, rows: np.ndarray
) -> np.ndarray:
    """Places int64, among resident patches, of rows of one set's patch table.

    held   of every set, the rows held: ascending
    first  place of every set's first
    """
    own = held[which]
    found = rows - own.start if isinstance(own, range) else np.searchsorted(own, rows)
    return np.asarray(found + first[which], np.int64)


class Resident:
    """Stored bytes of every patch that a data set's order may draw.

    dataset  whose batches have places for codes from now on; damaged packs that it may replace
             (`max_bad`) are found here and left out
    device   where the bytes lie, and where batches' places are

    codes    uint8 (N, *codes_shape)
    gathered patches so far
    raises   InputError where they do not fit
    """

    def __init__(self, dataset: LatentDataset, device: torch.device) -> None:
        rows = [sampler.chosen for sampler in dataset.samplers]
        counts = [len(part) for part in rows]
        shape = dataset.shards.manifest.contract.codes_shape
        each = dataset.shards.manifest.contract.bytes_per_patch
        check_fits(dataset.shards, sum(counts), device, each)
        self.codes = torch.empty((sum(counts), *shape), dtype=torch.uint8, device=device)
        first = np.cumsum([0, *counts]).tolist()
        for which, shards in enumerate(dataset.sets):
            read = functools.partial(read_sound, dataset, which)
            fill(self.codes[first[which] : first[which + 1]], shards, rows[which], read)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams will read what this one has copied
        dataset.collator.places = functools.partial(place_of, rows, first)
        self.gathered = 0

    def __call__(self, places: Tensor) -> Tensor:
        """Stored bytes uint8 (B, *codes_shape) at places int64 (B,) on the device."""
        self.gathered += len(places)
        return self.codes.index_select(0, places)

    def before(self, decode: Callable[..., Any]) -> Callable[[Tensor, Tensor | None], Any]:
        """What takes places where `decode` takes stored bytes."""
        return lambda places, books: decode(self(places), books)


def read_sound(dataset: LatentDataset, which: int, rows: np.ndarray) -> np.ndarray:
    """Stored bytes of rows of one set, zeros for packs that are damaged and noted as such."""
    shards = dataset.sets[which]
    packs = shards.packs_of(rows)
    while True:
        bad = [pack for other, pack in dataset.bad if other == which]
        sound = ~np.isin(packs, bad)
        try:
            found = shards.read_codes(rows[sound])
        except DamagedPackError as error:
            dataset.note_bad(error)
            continue
        if sound.all():
            return found
        whole = np.zeros((len(rows), *found.shape[1:]), np.uint8)
        whole[sound] = found
        return whole

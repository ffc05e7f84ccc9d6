"""LatentArray: a whole set of codes resident in memory, any patches of it decoded at once."""
# N patches of the set, B patches asked for, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.core.progress import progress
from latentds.errors import InputError, unknown_name
from latentds.loading.collate import check_codes
from latentds.loading.decoding import Decode, Decoder, check_decode, find_autoencoder
from latentds.loading.mixture import Vocabulary
from latentds.loading.options import Select, check_group
from latentds.loading.selection import select_rows
from latentds.quantizers.lookup import Integers, make_integers
from latentds.store.cache import CacheConfig
from latentds.store.reader import ShardSet

BLOCK_PATCHES = 4096
CGROUP = Path("/sys/fs/cgroup")
KEPT_FREE = 0.1  # of the free memory, for decoding and the rest of the program


class LatentArray:
    """Codes of a split in RAM or GPU memory; `array[indices]` decodes patches.

    With the set on the GPU a loader is a permutation: `for i in torch.randperm(len(a)).split(64)`.

    folder, cache, select   see LatentDataset
    split         one split; None takes all
    device        where the codes lie and are decoded
    decode        what indexing gives: "pixels", "latents", "codes" (uint8, or of entropy-coded
                  records int16 (B, C, h, w) integers) or "stored"
    autoencoder, dtype   see LatentLoader

    codes   uint8 (N, *codes_shape) on the device, as stored
    labels  int64 (N,) on the device, -1 for none
    steps   float32 (N,) on the device, what the integers of entropy-coded records count in: latents
            are integers * (steps / gains of the codebook); None for other encodings
    slides, coords, rows   of the patches: int64 (N,) numbers of `slide_names`, (N, 2), (N,); on the
            CPU

    Refuses with InputError what does not fit into the device's free memory.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str | None = None,
        *,
        device: torch.device | str = "cpu",
        decode: str = "pixels",
        select: Select = Select(),
        autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        cache: CacheConfig | None = None,
    ) -> None:
        check_decode(decode)
        check_group(select, Select, "select")
        self.shards, self.device, self.decode = (
            ShardSet(folder, cache=cache, reads_parts=select != Select()),
            torch.device(device),
            decode,
        )
        manifest = self.shards.manifest
        rows = select_rows(self.shards, split, *select.unbalanced("LatentArray"))
        if rows is None:
            rows = np.arange(*(self.shards.patch_range(split) if split else (0, len(self.shards))))
        self.memory_bytes = check_fits(self.shards, len(rows), self.device, extra=8)  # a label
        integers = make_integers(manifest.codebooks)
        self.decoder: Decoder | Integers | None = integers if decode == "codes" else None
        if decode in ("pixels", "latents"):
            pixels = decode == "pixels"
            self.decoder = Decoder(
                find_autoencoder(self.shards, autoencoder) if pixels else None,
                manifest.codebooks,
                manifest.contract.patch_px,
                device,
                Decode(dtype=dtype),
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
        size = (len(rows), *manifest.contract.codes_shape)
        self.codes = torch.empty(size, dtype=torch.uint8, device=self.device)
        fill(self.codes, self.shards, rows, self.shards.read_codes)
        self.steps = None if integers is None else integers.steps(self.codes, self.codebooks)
        self.places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return (
            f"LatentArray({self.shards.folder}: {len(self):,} patches, "
            f"{self.memory_bytes / 1e9:.3f} GB on {self.device})"
        )

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
                raise unknown_name("key", key, list(known)[:8])
        return torch.tensor([known[key] for key in keys], dtype=torch.int64)

    @torch.no_grad()
    def __getitem__(self, indices: Tensor | np.ndarray | slice | int | str | list[Any]) -> Tensor:
        """Patches by place or key: (B, ...), without B for a single place or key."""
        if isinstance(indices, str):
            return self[int(self.index([indices]))]
        if isinstance(indices, int):
            place = range(len(self))[indices]
            return self[place : place + 1][0]
        names = isinstance(indices, list) and indices and isinstance(indices[0], str)
        places = self.index(indices) if names else indices  # type: ignore[arg-type]
        if not isinstance(places, slice):
            places = torch.as_tensor(places).to(self.device)
        codes = self.codes[places]
        if self.decoder is None:
            return codes
        return self.decoder(codes, None if self.codebooks is None else self.codebooks[places])


def check_fits(shards: ShardSet, count: int, device: torch.device, extra: int = 0) -> int:
    """Bytes that so many patches take, `extra` more each; InputError where there are not as many.

    To be asked before anything is read.
    """
    memory_bytes = count * (shards.manifest.contract.bytes_per_patch + extra)
    free = free_bytes(device)
    if memory_bytes > free * (1 - KEPT_FREE):
        raise InputError(
            f"{shards.folder}: {count:,} patches take {memory_bytes / 1e9:.2f} GB, "
            f"{device} has {free / 1e9:.2f} GB free; choose fewer (split=, "
            "select=), another device, or a LatentLoader that is not resident"
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

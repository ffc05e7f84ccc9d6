"""A stage for pipelines of webdataset: patches from the packs that its shards hold."""
# N patches of a pack, C latent channels, h w latent cells

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentds.errors import FormatError, InputError
from latentds.store.format import CODES, MASKS, PATCHES, Contract, check_npy, patch_key
from latentds.store.manifest import Manifest
from latentds.store.packs import MASK_SCHEMA, SCHEMA, decode_table, read_contract
from latentds.store.reader import manifest_of, open_files

Sample = dict[str, Any]


def unpack(folder: str | os.PathLike[str] | None = None, *, decode: str = "latents") -> Unpacking:
    """What `webdataset.WebDataset(urls).compose(unpack())` turns packs into patches with.

    folder   the set's folder or location, where its manifest lies; None finds codebooks by each
             shard's own header, or, of a shard that is read from a server, by the set it lies in
    decode   "latents" or "codes"
    returns  of samples, one a pack as webdataset reads them, one a patch: `__key__`, `__url__`,
             `latents` float32 tensor (C, h, w), unscaled means (or `codes`, uint8 array, as
             stored), the columns label, slide, x, y, mpp, size_px, source, source_encoding, and
             `mask_png` where the pack has masks; None for what is unknown
    raises   while it is read, FormatError for a pack that is not of its set, InputError where no
             codebook can be found. Checksums are not compared: `latentds verify` does
    """
    return Unpacking(folder, decode)


class Unpacking:
    """The stage; it pickles, so that workers may carry it."""

    def __init__(self, folder: str | os.PathLike[str] | None, decode: str) -> None:
        if decode not in ("latents", "codes"):
            raise ValueError(f"decode={decode!r}; 'latents' or 'codes'")
        self.folder, self.decode = folder, decode
        self.manifests: dict[str, Manifest] = {}
        self.contracts: dict[str, Contract] = {}

    def __call__(self, samples: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
        """The patches of every pack, in their order."""
        for sample in samples:
            yield from self.patches(sample)

    def patches(self, sample: Mapping[str, Any]) -> Iterator[Sample]:
        """The patches of one pack."""
        url = str(sample.get("__url__"))
        where = f"{url}, key {sample.get('__key__')}"
        contract = self.contract(url, sample.get("__local_path__"))
        codes = read_codes(sample, contract, where)
        fields = decode_table(member(sample, PATCHES, where), where, SCHEMA, len(codes)).to_pylist()
        if MASKS in sample:
            masks = decode_table(member(sample, MASKS, where), where, MASK_SCHEMA, len(codes))
            fields = [f | m for f, m in zip(fields, masks.to_pylist(), strict=True)]
        values: Any = codes
        if self.decode == "latents":
            values = contract.codebook.dequantize(torch.from_numpy(codes))
        for value, own in zip(values, fields, strict=True):
            key = patch_key(own["source"], own["x"], own["y"])
            yield {"__key__": key, "__url__": url, self.decode: value, **own}

    def contract(self, url: str, copy: str | None) -> Contract:
        """What the codes of a shard mean."""
        if url not in self.contracts:
            path = Path(copy or url.removeprefix("file:"))
            is_here = self.folder is None and path.is_file()
            self.contracts[url] = read_contract(path) if is_here else self.contract_by_set(url)
        return self.contracts[url]

    def contract_by_set(self, url: str) -> Contract:
        """The same by the manifest of the set that the shard is of."""
        head, _, name = url.partition("?")[0].rpartition("/data/")
        if self.folder is None and (not head or " " in head):  # a command: "pipe:curl -s ..."
            raise InputError(
                f"{url}: no file, and not PLACE/data/NAME.tar of a set; give unpack(folder) the "
                "folder or location of the set"
            )
        where = os.fspath(head if self.folder is None else self.folder)
        if where not in self.manifests:
            self.manifests[where] = manifest_of(open_files(where))
        manifest = self.manifests[where]
        numbers = [n for n, s in enumerate(manifest.shards) if s.name == f"data/{name.split()[0]}"]
        if not numbers:
            raise FormatError(f"{url}: not a shard of {where}; give unpack(folder) its own set")
        return manifest.contract_of(numbers[0])


def member(sample: Mapping[str, Any], name: str, where: str) -> bytes:
    """A member's bytes; InputError where there is none, or where another stage has read it."""
    content = sample.get(name)
    if not isinstance(content, bytes):
        kind = "missing" if content is None else f"{type(content).__name__}, not bytes"
        raise InputError(
            f"{where}: {name} is {kind}; unpack() takes samples of a set's shards as "
            "webdataset.WebDataset reads them, before .decode()"
        )
    return content


def read_codes(sample: Mapping[str, Any], contract: Contract, where: str) -> np.ndarray:
    """Codes uint8 (N, *codes_shape) of a pack, nothing unpickled."""
    content = member(sample, CODES, where)
    check_npy(content[:128], len(content), contract.codes_shape, where)
    codes = np.load(io.BytesIO(content), allow_pickle=False)
    if (fault := contract.codebook.find_fault(codes)) is not None:
        raise FormatError(f"{where}: {fault}; damaged, fetch it anew")
    return np.asarray(codes)

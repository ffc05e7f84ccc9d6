"""A set of patches: contents that are read, pixels developed from them, kept in memory."""
# n patches of a request, H W pixels

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from latentds.errors import InputError, unknown_name
from latentds.evaluation.patchsets.developing import Developer, sent
from latentds.evaluation.patchsets.patch_set import PatchTable, SourceFacts

if TYPE_CHECKING:
    from latentds.evaluation.patchsets.latent_patches import Shards
    from latentds.evaluation.patchsets.picture_patches import Pictures
    from latentds.quantizers.codebooks import StoredCodebook

AHEAD = 2  # requests of a stream that are read while another is used
Item = TypeVar("Item")


class Memory:
    """Pixels that stay in memory, first come, up to so many bytes; nothing makes room for others.

    What a training takes in turn, epoch after epoch, would push out just what is wanted next.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.arrays: dict[Hashable, np.ndarray] = {}

    def keep(self, key: Hashable, array: np.ndarray) -> None:
        """Keep a copy of an array while there is room."""
        if self.held + array.nbytes <= self.limit and key not in self.arrays:
            self.arrays[key] = array.copy()
            self.held += array.nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class Fetched:
    """A request whose stored bytes are in memory.

    rows    distinct ones that were not kept
    raw     what is stored of them, prepared; None where there are none
    kept    pixels uint8 (3, H, W) of the other distinct rows
    places  of the request's patches among those of `raw` and, behind them, of `kept`
    """

    rows: np.ndarray
    raw: Any
    kept: list[np.ndarray]
    places: np.ndarray


class PatchSet:
    """Patches of one size; rows count from 0 in canonical order.

    contents   what is read of distinct ascending rows, from several threads
    developer  what makes pixels of it
    facts      all but the bytes, where those have to be measured
    keep_mb    MB of pixels kept in memory
    measure    mean bytes of a patch of the whole input, asked for facts without
    codebook   of the codec that originals go through
    """

    def __init__(
        self,
        contents: Pictures | Shards,
        developer: Developer,
        facts: SourceFacts,
        keep_mb: int,
        measure: Callable[[], float | None] = lambda: None,
        codebook: StoredCodebook | None = None,
    ) -> None:
        self.contents, self.developer, self.device = contents, developer, developer.device
        self.described, self.measure, self.codebook = facts, measure, codebook
        self.memory = Memory(keep_mb * 1_000_000)
        self.slide: str | None = None  # the one that all patches are of

    @property
    def name(self) -> str:
        """What a table calls this source of pixels, for example tiny-v1+kmeans."""
        return self.described.name

    @property
    def patch_px(self) -> tuple[int, int]:
        """(H, W)."""
        return self.contents.patch_px

    @property
    def classes(self) -> list[str]:
        """Sorted names of the whole input's classes; those of a single split are among them."""
        return self.contents.classes

    @property
    def has_masks(self) -> bool:
        return self.contents.has_masks

    @property
    def table(self) -> PatchTable:
        """All patches. Of slides as originals it finds the tissue of every one when first used."""
        return self.contents.table

    def __len__(self) -> int:
        """N, for which the table is made."""
        return len(self.table)

    def images(self, rows: np.ndarray) -> Tensor:
        """uint8 (n, 3, H, W) on the device: pixels as decoded, rounded to 8 bits.

        A patch's pixels do not depend on which others are asked for with it.
        raises  InputError, FormatError with the file's name where one cannot be read
        """
        return self.finish(self.fetch(rows))

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """`images` of one request after the other, the next ones read in a thread meanwhile."""

        def fetched() -> Iterator[tuple[list[int], Fetched]]:
            for group in put_together(requests, self.developer.together):
                yield list(map(len, group)), self.fetch(np.concatenate(group))

        with contextlib.closing(in_background(fetched(), AHEAD)) as ready:
            for sizes, group in ready:
                yield from torch.split(self.finish(group), sizes)

    def fetch(self, rows: np.ndarray) -> Fetched:
        """Read what a request needs and memory does not have."""
        distinct, places = np.unique(rows, return_inverse=True)
        known = [self.memory.arrays.get((self.slide, row, "image")) for row in distinct.tolist()]
        is_kept = np.array([pixels is not None for pixels in known])
        missing = distinct[~is_kept]
        raw = self.developer.prepare(self.contents.read(missing)) if len(missing) else None
        order = np.argsort(np.argsort(is_kept, kind="stable"))
        kept = [pixels for pixels in known if pixels is not None]
        return Fetched(missing, raw, kept, order[places].astype(np.int64))

    def finish(self, fetched: Fetched) -> Tensor:
        parts = []
        if fetched.raw is not None:
            parts.append(self.developer.develop(fetched.raw))
            self.keep("image", fetched.rows, parts[0])
        if fetched.kept:
            parts.append(torch.from_numpy(np.stack(fetched.kept)).to(self.device))
        made = torch.cat(parts) if len(parts) > 1 else parts[0]
        return made[sent(fetched.places, self.device)]

    def keep(self, kind: str, rows: np.ndarray, pixels: Tensor | np.ndarray) -> None:
        if self.memory.held + pixels[0].nbytes > self.memory.limit:
            return
        arrays = pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels
        for row, array in zip(rows.tolist(), arrays, strict=True):
            self.memory.keep((self.slide, row, kind), array)

    def masks(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W), lossless, never through a codec; InputError where there are none."""
        if not self.has_masks:
            raise InputError(f"{self.contents.where}: has no masks; give --masks FOLDER, or shards "
                             "that were converted with them")  # fmt: skip
        distinct, places = np.unique(rows, return_inverse=True)
        kept = [self.memory.arrays.get((self.slide, row, "mask")) for row in distinct.tolist()]
        if any(mask is None for mask in kept):
            masks = self.contents.read_masks(distinct)
            self.keep("mask", distinct, masks)
        else:
            masks = np.stack([mask for mask in kept if mask is not None])
        return masks[places]

    def slides(self) -> list[str]:
        """Sorted names of the slides; empty where patches name none."""
        return [self.slide] if self.slide is not None else self.contents.slides()

    def nameless(self) -> int:
        """How many patches, or pictures of several, are of no slide that is known."""
        return self.contents.nameless()

    def of_slide(self, slide: str) -> PatchSet:
        """The patches of one slide as a set of their own, rows from 0.

        Of slides as originals only this one's tissue is found: take it to go slide by slide.
        """
        if slide not in self.slides():
            raise unknown_name("slide", slide, self.slides())
        part = copy.copy(self)
        part.contents, part.slide = self.contents.of_slide(slide), slide
        return part

    def fingerprint(self) -> str:
        """Identity of what is stored behind the table, 16 hex digits; the same once moved.

        Of originals: the sizes of all files, and the first bytes of some, with their masks. Of
        latents: the hashes of the shards, and which patches of them are meant. What is done to
        what is stored (a codec, a decoder) `facts` tells.
        raises  InputError with the name of a file that cannot be read
        """
        return self.contents.fingerprint()

    def facts(self) -> SourceFacts:
        """Where the pixels come from and what they cost; may encode a sample to measure that."""
        if self.described.bytes_per_patch is not None:
            return self.described
        try:
            return dataclasses.replace(self.described, bytes_per_patch=self.measure())
        except InputError:  # a picture of the sample cannot be read; who asks for it is told
            return self.described


def put_together(requests: Iterable[np.ndarray], least: int) -> Iterator[list[np.ndarray]]:
    """Requests one after the other, in groups of at least so many rows but for the last."""
    group: list[np.ndarray] = []
    for rows in requests:
        group.append(np.asarray(rows, np.int64).reshape(-1))
        if sum(map(len, group)) >= least:
            yield group
            group = []
    if group:
        yield group


def in_background(items: Iterable[Item], ahead: int) -> Generator[Item, None, None]:
    """The items, made by a thread up to `ahead` before them; an error of it is raised here.

    Closing the generator ends the thread.
    """
    source, end = iter(items), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="patches-ahead")
    try:
        waiting = deque(thread.submit(next, source, end) for _ in range(ahead + 1))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, source, end))
            yield cast(Item, item)
    finally:
        thread.shutdown(cancel_futures=True)

"""Planned regions to patches, in threads, ahead of the encoder and never far ahead."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from latentds.conversion.config import ConvertConfig
from latentds.conversion.plan import Plan
from latentds.errors import InputError
from latentds.sources.patch import Patch
from latentds.sources.pictures import find_mask, read_mask, read_picture

TILED_PICTURES = 2  # decoded pictures kept while their tiles are cut
CHUNKS_AHEAD = 3  # decoded and waiting: memory is a few encode batches of pixels
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)

Outcome = Patch | tuple[str, str]  # a patch, or (source, why it has none)


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """What became of a stretch of regions.

    patches  the readable ones, their `image` emptied
    pixels   uint8 (N, H, W, 3), their images
    bad      reasons by source
    """

    patches: list[Patch]
    pixels: np.ndarray
    bad: dict[str, str]


class PatchReader:
    """Reads the regions of a plan.

    Chunks come in the order asked for, whatever the number of threads.
    """

    def __init__(
        self, plan: Plan, config: ConvertConfig, workers: int, ahead: int = CHUNKS_AHEAD
    ) -> None:
        self.plan, self.config, self.ahead = plan, config, ahead
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self.collator = ThreadPoolExecutor(1, thread_name_prefix="collate")
        self.lock = threading.Lock()
        self.decoded: OrderedDict[int, Future[tuple[np.ndarray, np.ndarray | None]]] = OrderedDict()

    def chunks(self, groups: Iterable[np.ndarray]) -> Iterator[Chunk]:
        """What became of the plan's regions at every group of rows, reading ahead."""
        waiting: deque[Future[Chunk]] = deque()
        for rows in groups:
            waiting.append(self.collator.submit(self.collate, self.submit(rows)))
            if len(waiting) > self.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def submit(self, rows: np.ndarray) -> list[Future[list[Outcome]]]:
        """One task for each run of regions of one picture."""
        regions = self.plan.regions[rows]
        edges = np.flatnonzero(np.diff(regions["picture"].astype(np.int64))) + 1
        return [self.pool.submit(self.read, part) for part in np.split(regions, edges)]

    def collate(self, tasks: list[Future[list[Outcome]]]) -> Chunk:
        """The chunk of a list of tasks, pixels in one array."""
        outcomes = [outcome for task in tasks for outcome in task.result()]
        patches = [outcome for outcome in outcomes if isinstance(outcome, Patch)]
        bad = dict(outcome for outcome in outcomes if not isinstance(outcome, Patch))
        pixels = np.zeros((len(patches), *self.plan.patch_px, 3), np.uint8)
        for place, patch in enumerate(patches):
            pixels[place] = patch.image
        return Chunk([dataclasses.replace(p, image=NO_PIXELS) for p in patches], pixels, bad)

    def read(self, regions: np.ndarray) -> list[Outcome]:
        """The patches of regions of one picture."""
        number = int(regions["picture"][0])
        source = self.plan.pictures[number].source
        try:
            image, mask = self.decode(number)
            return [self.cut(number, region, image, mask) for region in regions]
        except InputError as error:
            return [(source, str(error))] * len(regions)
        except OSError as error:
            return [(source, f"cannot be read ({error.strerror or error})")] * len(regions)

    def decode(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels and mask of a picture; a tiled one is kept for the chunks that follow."""
        if not self.config.tile:
            return self.decode_file(number)
        with self.lock:
            future = self.decoded.pop(number, None)
            is_mine = future is None
            self.decoded[number] = future = future or Future()
            while len(self.decoded) > TILED_PICTURES:
                self.decoded.popitem(last=False)
        if is_mine:
            try:
                future.set_result(self.decode_file(number))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def decode_file(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels and mask of a picture, from its files."""
        source = self.plan.pictures[number].source
        image, _ = read_picture(self.config.source / source, self.config.max_px)
        if image.shape[:2] != self.plan.headers[number].size_px:
            raise InputError("changed its size while the conversion ran")
        if self.config.masks is None:
            return image, None
        size_px = (image.shape[0], image.shape[1])
        return image, read_mask(find_mask(self.config.masks, source, size_px), size_px)

    def cut(
        self, number: int, region: np.void, image: np.ndarray, mask: np.ndarray | None
    ) -> Patch:
        """One patch of a decoded picture."""
        plan, config = self.plan, self.config
        fields, (x, y) = plan.fields[number], (int(region["x"]), int(region["y"]))
        origin = (
            int(fields["x"]) if "x" in fields else None,
            int(fields["y"]) if "y" in fields else None,
        )
        if config.tile:
            origin = ((origin[0] or 0) + x, (origin[1] or 0) + y)
        height, width = plan.patch_px
        pixels = fit(image, x, y, (height, width), config)
        fitted_mask = None if mask is None else fit(mask, x, y, (height, width), config)
        region_width = width if config.tile else image.shape[1]
        mpp = float(fields["mpp"]) if "mpp" in fields else config.mpp
        return Patch(
            image=pixels,
            source=plan.pictures[number].source,
            source_encoding=plan.headers[number].encoding,
            label=plan.label(number),
            slide=plan.slide(number),
            x_px_level0=origin[0],
            y_px_level0=origin[1],
            size_px_level0=region_width,
            mpp=None if mpp is None else mpp * (region_width / width if config.resize else 1),
            mask_png=None if fitted_mask is None else encode_png(fitted_mask),
        )

    def close(self) -> None:
        """Stop the threads; what is waiting is dropped."""
        for pool in (self.pool, self.collator):
            pool.shutdown(wait=True, cancel_futures=True)


def fit(
    pixels: np.ndarray, x: int, y: int, size_px: tuple[int, int], config: ConvertConfig
) -> np.ndarray:
    """The patch (H, W[, 3]) of a picture or mask: its tile, resized, padded, or as it is."""
    height, width = size_px
    if config.tile:
        return np.ascontiguousarray(pixels[y : y + height, x : x + width])
    if config.resize and pixels.shape[:2] != size_px:
        # Nearest for masks keeps their values; Lanczos in Pillow widens its kernel when it shrinks.
        kernel = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.NEAREST
        return np.asarray(Image.fromarray(pixels).resize((width, height), kernel))
    if config.pad:
        missing = [(0, height - pixels.shape[0]), (0, width - pixels.shape[1])]
        return np.pad(pixels, missing + [(0, 0)] * (pixels.ndim - 2), mode="reflect")
    return pixels


def encode_png(mask: np.ndarray) -> bytes:
    """A mask (H, W) as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()

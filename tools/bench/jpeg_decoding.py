"""Rate of JPEG decoders on the same patches: one core, all cores, the GPU's own decoder."""

from __future__ import annotations

import functools
import importlib.util
import io
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentds_tools.bench.harness import Case, rate_of, sustained, synchronize

from latentds.errors import InputError, missing_extra

if TYPE_CHECKING:
    import numpy as np

LIBRARIES = ("simplejpeg", "torchvision")  # in the order they are asked for
QUALITY, SUBSAMPLING = 75, "4:2:0"
MOST_PATCHES = 64  # kept in memory and decoded in turn
GPU_BATCH = 64  # JPEGs handed to the GPU's decoder at once
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
READY_S = 120.0  # for every worker to start

_gate: Any = None  # of a worker process, set as it starts


def load_jpegs(folder: Path | None, patch_px: int) -> list[bytes]:
    """Baseline JPEGs of a folder's patches, or of a public micrograph's."""
    installed()  # tells a missing library before pictures are read
    return [encode(patch) for patch in load_patches(folder, patch_px)]


def load_patches(folder: Path | None, patch_px: int) -> list[np.ndarray]:
    """Patches uint8 (patch_px, patch_px, 3) of a folder's pictures, or of a public micrograph.

    raises  InputError where no picture is as large as a patch
    """
    from latentds.core.untrusted_files import pixels_of

    if folder is None:
        try:
            from skimage.data import immunohistochemistry
        except ModuleNotFoundError as error:
            raise missing_extra("scikit-image", "bench") from error
        pictures = iter([immunohistochemistry()])
    else:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        pictures = (pixels_of(path) for path in paths)
    patches: list[np.ndarray] = []
    for picture in pictures:
        height, width = (edge // patch_px * patch_px for edge in picture.shape[:2])
        for top in range(0, height, patch_px):
            for left in range(0, width, patch_px):
                patches.append(picture[top : top + patch_px, left : left + patch_px])
        if len(patches) >= MOST_PATCHES:
            break
    if not patches:
        raise InputError(f"{folder or 'the micrograph'}: no picture of {patch_px} px or more")
    return patches[:MOST_PATCHES]


def encode(patch: np.ndarray) -> bytes:
    """A patch as baseline JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(patch).save(file, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING)
    return file.getvalue()


def describe(jpegs: Sequence[bytes]) -> dict[str, Any]:
    """What was decoded."""
    return {
        "quality": QUALITY,
        "subsampling": SUBSAMPLING,
        "patches": len(jpegs),
        "mean_bytes": statistics.fmean(map(len, jpegs)),
    }


def installed() -> list[str]:
    """The JPEG libraries that are here; MissingExtraError where there is none."""
    found = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    if not found:
        raise missing_extra(LIBRARIES[0], "bench")
    return found


def make_decoder(library: str) -> Callable[[bytes], object]:
    """A function of one JPEG, to pixels in memory."""
    if library == "simplejpeg":
        import simplejpeg

        by_simplejpeg: Callable[[bytes], object] = simplejpeg.decode_jpeg
        return by_simplejpeg
    import torch
    from torchvision.io import decode_jpeg

    def decode(encoded: bytes) -> object:
        return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))

    return decode


def rate(
    library: str, jpegs: Sequence[bytes], seconds: float, wait: Callable[[], object] | None = None
) -> tuple[float, float]:
    """Patches a second on the core that calls, and seconds the first took."""
    decode = make_decoder(library)

    def decode_all() -> None:
        for encoded in jpegs:
            decode(encoded)

    started = time.perf_counter()
    decode(jpegs[0])
    first = time.perf_counter() - started
    if wait is not None:
        wait()
    return rate_of(decode_all, seconds, len(jpegs)), first


def rate_together(
    library: str, jpegs: Sequence[bytes], seconds: float, workers: int, kind: str
) -> tuple[float, float]:
    """Patches a second of `workers` threads or processes that decode at the same time.

    kind  threads or processes
    """
    with make_pool(kind, workers) as pool:
        futures = [pool.submit(rate_when_ready, library, jpegs, seconds) for _ in range(workers)]
        found = [future.result() for future in futures]
    return sum(one for one, _ in found), max(first for _, first in found)


def make_pool(kind: str, workers: int) -> Executor:
    """A pool whose workers start to decode at one moment."""
    if kind == "threads":
        import threading

        gate = threading.Barrier(workers)
        return ThreadPoolExecutor(workers, initializer=set_gate, initargs=(gate,))
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # forking a process with CUDA breaks it
    barrier = context.Barrier(workers)
    return ProcessPoolExecutor(workers, context, initializer=set_gate, initargs=(barrier,))


def set_gate(gate: Any) -> None:
    """Note what a worker waits at until all are ready."""
    global _gate
    _gate = gate


def rate_when_ready(library: str, jpegs: Sequence[bytes], seconds: float) -> tuple[float, float]:
    """`rate`, begun when every worker is here: so each of them takes one task."""
    return rate(library, jpegs, seconds, lambda: _gate.wait(READY_S))


def rate_on_gpu(
    jpegs: Sequence[bytes], seconds: float, device: str, batch: int = GPU_BATCH
) -> tuple[float, float]:
    """Patches a second of torchvision's decoder on a GPU (nvJPEG), batch by batch, as uint8."""
    import torch
    from torchvision.io import decode_jpeg

    encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    encoded = [encoded[i % len(encoded)] for i in range(batch)]

    def decode() -> None:
        decode_jpeg(encoded, device=device)
        synchronize(device)

    return sustained(decode, seconds, batch)


def cases(jpegs: Sequence[bytes], seconds: float, cores: int, device: str) -> list[Case]:
    """A case a JPEG decoder and place: the first is one core of the first library installed."""
    made = []
    for library in installed():
        alone = functools.partial(rate, library, jpegs, seconds)
        made.append(case_of(library, "1 core", 1, alone))
        for kind in ("threads", "processes") if cores > 1 else ():
            once = functools.partial(rate_together, library, jpegs, seconds, cores, kind)
            made.append(case_of(library, f"{cores} {kind}", 1, once))
    if device.startswith("cuda") and "torchvision" in installed():
        once = functools.partial(rate_on_gpu, jpegs, seconds, device)
        made.append(case_of("torchvision", "the GPU", GPU_BATCH, once))
    return made


def case_of(library: str, where: str, batch: int, once: Callable[[], tuple[float, float]]) -> Case:
    """A JPEG decoder in one place; what torch raises without CUDA or nvJPEG is the GPU's error."""

    def figures() -> dict[str, Any]:
        try:
            rate, first = once()
        except (RuntimeError, AssertionError) as error:
            if where != "the GPU":
                raise
            return {"error": " ".join(str(error).split())[:120]}
        return {"patches_per_s": rate, "first_batch_s": first}

    return Case({"decoder": f"JPEG, {library}", "options": where, "batch": batch}, figures)

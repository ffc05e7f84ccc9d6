"""Rate of JPEG and AVIF decoders on the same patches: one core, all cores, the GPU's own."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import multiprocessing.pool
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from latentds_tools.bench.harness import Case, rate_of, sustained, usable_cores

from latentds.codecs import PictureCodec, formats
from latentds.core.extras import is_here
from latentds.core.storage import pixels_of
from latentds.errors import InputError, first_words, missing_extra

if TYPE_CHECKING:
    from latentds_tools.bench.decode_config import Config

Figures = dict[str, Any]
LIBRARIES, PILLOW = ("simplejpeg", "torchvision"), "Pillow"  # in the order they are asked for
AVIF_BYTES, LEAST_BYTES = 4096, 1024  # a patch of 256 px as `tiny-v2`'s records; of any patch
MOST_AVIF, AVIF_SPEED = 8, 6  # patches; the most thorough encoding takes half a minute each
JPEG_START = b"\xff\xd8"
QUALITY, SUBSAMPLING = 75, "4:2:0"
MOST_PATCHES = 64  # kept in memory and decoded in turn
GPU_BATCH = 64  # JPEGs handed to the GPU's decoder at once
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
READY_S = 120.0  # for every worker to start

_gate: Any = None  # of a worker process, set as it starts


def load_patches(folder: Path | None, patch_px: int) -> list[np.ndarray]:
    """Patches uint8 (patch_px, patch_px, 3) of a folder's pictures, or of a public micrograph.

    raises  InputError where no picture is as large as a patch
    """
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
    return formats.save_with_pillow(patch, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING)


def encode_avif(patch: np.ndarray) -> bytes:
    """A patch as AVIF within AVIF_BYTES for 256 px, in proportion for other sizes."""
    fast = functools.partial(formats.encode_avif, subsampling="4:4:4", speed=AVIF_SPEED)
    rules = dataclasses.replace(formats.FORMATS["avif"], encode=fast)
    most = max(AVIF_BYTES * patch.shape[0] * patch.shape[1] // 256**2, LEAST_BYTES)
    return PictureCodec("avif", max_bytes=most, rules=rules).encode_batch([patch])[0]


def make_decoder(library: str) -> Callable[[bytes], object]:
    """A function of one JPEG, or of one AVIF for Pillow, to pixels in memory."""
    if library == "simplejpeg":
        import simplejpeg

        by_simplejpeg: Callable[[bytes], object] = simplejpeg.decode_jpeg
        return by_simplejpeg
    if library == PILLOW:
        return lambda encoded: (
            formats.open_with_pillow(encoded, "JPEG")
            if encoded.startswith(JPEG_START)
            else formats.decode_avif(encoded)
        )
    from torchvision.io import decode_jpeg

    return lambda encoded: decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))


def rate(
    library: str, files: Sequence[bytes], seconds: float, wait: Callable[[], object] = int
) -> Figures:
    """Figures of the core that calls, its rate from when `wait` is over."""
    decode = make_decoder(library)
    first = sustained(lambda: decode(files[0]), 0, 1)["first_batch_s"]
    wait()
    rate = rate_of(lambda: [decode(encoded) for encoded in files], seconds, len(files))
    return {"patches_per_s": rate, "first_batch_s": first, "device": "cpu"}


def rate_together(
    library: str, files: Sequence[bytes], seconds: float, workers: int, kind: str
) -> Figures:
    """Figures of `workers` threads or processes that begin to decode at one moment."""
    context = multiprocessing.get_context("spawn")  # forking a process with CUDA breaks it
    pool = context.Pool if kind == "processes" else multiprocessing.pool.ThreadPool
    barrier = context.Barrier if kind == "processes" else threading.Barrier
    with pool(workers, set_gate, (barrier(workers),)) as workers_pool:
        # A worker that waits takes no second task.
        found = workers_pool.starmap(rate_when_ready, [(library, files, seconds)] * workers, 1)
    return {
        "patches_per_s": sum(one["patches_per_s"] for one in found),
        "first_batch_s": max(one["first_batch_s"] for one in found),
        "device": "cpu",
    }


def set_gate(gate: Any) -> None:
    """Note what a worker waits at until all are ready."""
    global _gate
    _gate = gate


def rate_when_ready(library: str, files: Sequence[bytes], seconds: float) -> Figures:
    return rate(library, files, seconds, lambda: _gate.wait(READY_S))


def rate_on_gpu(jpegs: Sequence[bytes], seconds: float, device: str) -> Figures:
    """Figures of torchvision's decoder on a GPU (nvJPEG), to uint8; or why it does not run."""
    from torchvision.io import decode_jpeg

    encoded = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    encoded = [encoded[i % len(encoded)] for i in range(GPU_BATCH)]

    def decode() -> None:
        decoded = decode_jpeg(encoded, device=device)
        if decoded[0].device.type != "cuda":
            raise RuntimeError(f"never engaged: decoded on {decoded[0].device}")

    try:
        return sustained(decode, seconds, GPU_BATCH, device) | {"device": "cuda"}
    except (RuntimeError, AssertionError) as error:  # what torch raises without CUDA or nvJPEG
        return {"error": first_words(error)}


def picture_cases(
    patches: Callable[[], Sequence[np.ndarray]], config: Config
) -> tuple[list[Case], dict[str, Any]]:
    """What is measured of picture formats, JPEG on one core first; and their files, by format.

    Pillow, which always is there, stands for the libraries where none of them is.
    """
    made: list[Case] = []
    files: dict[str, Any] = {}

    def describe(name: str, coded: str, encoded: Sequence[bytes]) -> None:
        mean = statistics.fmean(map(len, encoded))
        files[name] = {"coded": coded, "patches": len(encoded), "mean_bytes": mean}

    if config.jpeg:
        jpegs = [encode(patch) for patch in patches()]
        describe("JPEG", f"quality {QUALITY}, {SUBSAMPLING}", jpegs)
        libraries = [name for name in LIBRARIES if is_here(name)]
        for library in libraries or [PILLOW]:
            made += on_cores("JPEG", library, jpegs, config, ("threads", "processes"))
        if config.device.startswith("cuda") and "torchvision" in libraries:
            head = {"decoder": "JPEG, torchvision", "options": "the GPU", "batch": GPU_BATCH}
            once = functools.partial(rate_on_gpu, jpegs, config.seconds, config.device)
            made.append(Case(head, once))
    if config.avif:
        avifs = [encode_avif(patch) for patch in patches()[:MOST_AVIF]]
        describe("AVIF", f"4:4:4, speed {AVIF_SPEED}, as many bytes as fit", avifs)
        made += on_cores("AVIF", PILLOW, avifs, config, ("processes",))  # threads take turns here
    return made, files


def on_cores(
    format: str, library: str, files: Sequence[bytes], config: Config, kinds: Sequence[str]
) -> list[Case]:
    """A decoder on one core, and on several."""
    head, cores = {"decoder": f"{format}, {library}", "batch": 1}, config.cores or usable_cores()
    alone = functools.partial(rate, library, files, config.seconds)
    made = [Case(head | {"options": "1 core"}, alone)]
    for kind in kinds if cores > 1 else ():
        once = functools.partial(rate_together, library, files, config.seconds, cores, kind)
        made.append(Case(head | {"options": f"{cores} {kind}"}, once))
    return made

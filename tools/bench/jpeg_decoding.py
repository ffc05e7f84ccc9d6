"""Rate of JPEG and AVIF decoders on the same patches: one core, all cores, the GPU's own."""

from __future__ import annotations

import dataclasses
import functools
import io
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentds_tools.bench.harness import Case, rate_of, sustained, synchronize

from latentds.core.extras import is_here
from latentds.errors import InputError, missing_extra

if TYPE_CHECKING:
    import numpy as np

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


def encode_avif(patch: np.ndarray) -> bytes:
    """A patch as AVIF within AVIF_BYTES for 256 px, in proportion for other sizes."""
    from latentds.codecs import PictureCodec, formats

    fast = functools.partial(formats.encode_avif, subsampling="4:4:4", speed=AVIF_SPEED)
    rules = dataclasses.replace(formats.FORMATS["avif"], encode=fast)
    most = max(AVIF_BYTES * patch.shape[0] * patch.shape[1] // 256**2, LEAST_BYTES)
    return PictureCodec("avif", max_bytes=most, rules=rules).encode_batch([patch])[0]


def described(coded: str, files: Sequence[bytes]) -> dict[str, Any]:
    """What was decoded."""
    mean = statistics.fmean(map(len, files))
    return {"coded": coded, "patches": len(files), "mean_bytes": mean}


def installed() -> list[str]:
    """The JPEG libraries that are here; Pillow, which always is, where there is no faster one."""
    return [name for name in LIBRARIES if is_here(name)] or [PILLOW]


def make_decoder(library: str) -> Callable[[bytes], object]:
    """A function of one JPEG, to pixels in memory."""
    if library == "simplejpeg":
        import simplejpeg

        by_simplejpeg: Callable[[bytes], object] = simplejpeg.decode_jpeg
        return by_simplejpeg
    if library == PILLOW:
        from latentds.codecs.formats import decode_avif, open_with_pillow

        return lambda encoded: (
            open_with_pillow(encoded, "JPEG")
            if encoded.startswith(JPEG_START)
            else decode_avif(encoded)
        )
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
        decoded = decode_jpeg(encoded, device=device)
        if decoded[0].device.type != "cuda":
            raise RuntimeError(f"never engaged: decoded on {decoded[0].device}")
        synchronize(device)

    return sustained(decode, seconds, batch)


class PictureSettings(Protocol):
    """What the tool's config says about pictures."""

    @property
    def jpeg(self) -> bool: ...
    @property
    def avif(self) -> bool: ...
    @property
    def seconds(self) -> float: ...
    @property
    def device(self) -> str: ...


def picture_cases(
    patches: Callable[[], Sequence[np.ndarray]], config: PictureSettings, cores: int
) -> tuple[list[Case], dict[str, Any]]:
    """What is measured of picture formats, JPEG on one core first; and their files, by format."""
    made: list[Case] = []
    files: dict[str, Any] = {}
    if config.jpeg:
        jpegs = [encode(patch) for patch in patches()]
        files["JPEG"] = described(f"quality {QUALITY}, {SUBSAMPLING}", jpegs)
        made += cases(jpegs, config.seconds, cores, config.device)
    if config.avif:
        avifs = [encode_avif(patch) for patch in patches()[:MOST_AVIF]]
        files["AVIF"] = described(f"4:4:4, speed {AVIF_SPEED}, as many bytes as fit", avifs)
        made += on_cores("AVIF", PILLOW, avifs, config.seconds, cores, kinds=("processes",))
    return made, files


def on_cores(
    format: str,
    library: str,
    files: Sequence[bytes],
    seconds: float,
    cores: int,
    *,
    kinds: Sequence[str] = ("threads", "processes"),
) -> list[Case]:
    """A decoder on one core, and on several: threads of one process take turns at AVIF here."""
    name = f"{format}, {library}"
    alone = functools.partial(rate, library, files, seconds)
    made = [case_of(name, "1 core", 1, alone)]
    for kind in kinds if cores > 1 else ():
        once = functools.partial(rate_together, library, files, seconds, cores, kind)
        made.append(case_of(name, f"{cores} {kind}", 1, once))
    return made


def cases(jpegs: Sequence[bytes], seconds: float, cores: int, device: str) -> list[Case]:
    """A case a JPEG decoder and place: the first is one core of the first library installed."""
    made = []
    for library in installed():
        made += on_cores("JPEG", library, jpegs, seconds, cores)
    if device.startswith("cuda") and "torchvision" in installed():
        once = functools.partial(rate_on_gpu, jpegs, seconds, device)
        made.append(case_of("JPEG, torchvision", "the GPU", GPU_BATCH, once))
    return made


def case_of(name: str, where: str, batch: int, once: Callable[[], tuple[float, float]]) -> Case:
    """A picture decoder in one place; what torch raises without CUDA or nvJPEG is its error."""

    def figures() -> dict[str, Any]:
        try:
            rate, first = once()
        except (RuntimeError, AssertionError) as error:
            if where != "the GPU":
                raise
            return {"error": " ".join(str(error).split())[:120]}
        on = "cuda" if where == "the GPU" else "cpu"
        return {"patches_per_s": rate, "first_batch_s": first, "device": on}

    return Case({"decoder": name, "options": where, "batch": batch}, figures)

"""Opens a slide in a process of its own first: GLib ends whoever asks it for absurd memory.

That process touches a pixel of every level. A slide it dies of costs itself and nothing else.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from latentds.core.storage import check_regular
from latentds.errors import UnusableError, missing_extra

UNREADABLE = "OpenSlide cannot read it"

PATIENCE_S = 120.0  # a slide on a slow file server opens in seconds
MEMORY_BYTES = 1 << 32  # that a pixel of every level may take, Python included
# Without latentds, and its own end without destructors: 0.15 s of CPU a slide.
CODE = f"""
import os, sys
sys.path[:] = [place for place in sys.path if place]
import openslide, resource
try:
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
except (OSError, ValueError):
    pass
try:
    slide = openslide.OpenSlide(sys.argv[1])
    for level in range(min(slide.level_count, 64)):
        slide.read_region((0, 0), level, (1, 1))
except (openslide.OpenSlideError, OSError, ValueError, MemoryError):
    pass  # whoever opens it next says why; a slide with one broken tile may be read elsewhere
os._exit(0)
"""


def probe_slide(path: Path) -> None:
    """Return where OpenSlide survives a slide; InputError (without the name) where it does not."""
    found = path.stat()
    _probe(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _probe(path: Path, size: int, mtime_ns: int) -> None:
    """Try a file, once for as long as it stays as it is."""
    del size, mtime_ns
    command = [sys.executable, "-c", CODE, os.fspath(path)]
    nothing = subprocess.DEVNULL
    try:
        ended = subprocess.run(
            command, stdin=nothing, stdout=nothing, stderr=nothing, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired as error:
        raise UnusableError(f"OpenSlide does not open it in {PATIENCE_S:g} s") from error
    if ended.returncode:
        code = ended.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise UnusableError(f"OpenSlide dies of it ({how}); damaged, or made to do that")


def open_slide(path: Path) -> Any:
    """An open slide; InputError (without the name) where OpenSlide cannot."""
    try:
        import openslide
    except ImportError as error:
        raise missing_extra("openslide-python", "slides") from error
    check_regular(path)
    probe_slide(path)
    try:
        return openslide.OpenSlide(str(path))
    except (openslide.OpenSlideError, OSError) as error:
        raise UnusableError(f"{UNREADABLE} ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """An error's words without paths, which a manifest must not carry."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\S*/\S*", "...", words)[:160]

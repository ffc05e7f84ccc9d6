"""What a run leaves to look at: log.jsonl, TensorBoard events, a progress line, pictures."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from latentds.core.storage import naming, write_atomically

logger = logging.getLogger(__name__)


class TrainingLog:
    """The log of rank 0, going on after `step`; lines beyond it are cut off.

    seconds  spent by the run before
    images   of an optimizer step, over all ranks
    """

    def __init__(
        self, out: Path, *, step: int, steps: int, seconds: float, images: int, tensorboard: bool
    ) -> None:
        from latentds.core.display import progress

        self.path, self.images = out / "log.jsonl", images
        self.samples = out / "samples"
        cut_lines_beyond(self.path, step)
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.progress = progress(total=steps, initial=step, desc="training", unit="step")
        self.started = time.perf_counter() - seconds
        self.last_step, self.last_seconds = step, seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def advance(self, figures: dict[str, float]) -> None:
        self.progress.update()
        shown = {name: f"{value:.4g}" for name, value in list(figures.items())[:4]}
        self.progress.set_postfix(shown, refresh=False)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Add a line, and events."""
        seconds = self.seconds
        done, took = step - self.last_step, seconds - self.last_seconds
        rate = done * self.images / took if took > 0 else 0.0
        self.last_step, self.last_seconds = step, seconds
        line: dict[str, Any] = {"step": step, **figures}
        line |= {"images_per_s": round(rate, 2), "seconds": round(seconds, 2)}
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.events is not None:
            for name, value in line.items():
                self.events.add_scalar(name, value, step)
        if not sys.stderr.isatty():
            words = " ".join(f"{name} {value:.5g}" for name, value in figures.items())
            logger.info("step %d %s, %.0f s", step, words, seconds)

    def picture(self, step: int, images: Tensor) -> None:
        """Write images (B, 3, H, W) in [0, 1] as one PNG."""
        grid = picture_grid(images)
        self.samples.mkdir(parents=True, exist_ok=True)
        path = self.samples / f"step-{step:06d}.png"
        with naming(path):
            Image.fromarray(grid).save(path)
        if self.events is not None:
            self.events.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        self.progress.close()
        if self.events is not None:
            self.events.close()


def cut_lines_beyond(path: Path, step: int) -> None:
    """Drop the lines of steps that a run going on after `step` will take again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except ValueError:  # cut short when the run was killed
            continue
    write_atomically(path, b"".join(kept))


def picture_grid(images: Tensor, gap: int = 2) -> np.ndarray:
    """Images (B, 3, H, W) in [0, 1] side by side on white, uint8 (rows, columns, 3)."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    tiles = functional.pad(torch.cat([images, blank]), (0, gap, 0, gap), value=1.0)
    grid = tiles.reshape(rows, columns, *tiles.shape[1:]).permute(0, 3, 1, 4, 2)
    pixels = grid.flatten(2, 3).flatten(0, 1)[:-gap, :-gap].detach().float().cpu().clamp(0, 1)
    found: np.ndarray = (pixels * 255).round().byte().numpy()
    return found

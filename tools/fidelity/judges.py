"""Judges of reconstructions that were fitted to originals: a U-Net that finds nuclei, a probe.

A judge has `score`, a `note` for the report, and `facts`: all that its figures depend on.
"""
# B batch, h w half of H W pixels, n crops, D embedding dimensions

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentds_tools.fidelity.fidelity_crops import MAX_PX, Crop, FidelityCrops
from latentds_tools.fidelity.measuring import MeasuredOriginals, to_images
from torch import Tensor, nn
from torch.nn import functional

from latentds.core.storage import open_picture
from latentds.errors import InputError
from latentds.evaluation.probes import load_scikit_learn
from latentds.sources.picture_files import read_picture

NAME = "nuclei, Dice"
WIDTHS = (16, 32, 64)
STEPS, BATCH, CROP_PX, RATE = 200, 8, 128, 5e-3
JITTER = 0.35  # of a channel's optical density: stains differ more than cameras
MAX_ITERATIONS = 500  # of a probe


class SmallUNet(nn.Module):
    """Logits (B, 1, H, W) of images (B, 3, H, W) in [0, 1], edges multiples of 8; 0.1 million
    parameters, at half resolution. Ronneberger et al. 2015."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.fine = block(12, first)
        self.middle = block(first, second)
        self.coarse = block(second, third)
        self.up_middle = block(third + second, second)
        self.up_fine = block(second + first, first)
        self.head = nn.Conv2d(first, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(functional.pixel_unshuffle(images * 2 - 1, 2))
        middle = self.middle(functional.max_pool2d(fine, 2))
        coarse = self.coarse(functional.max_pool2d(middle, 2))
        middle = self.up_middle(torch.cat([doubled(coarse), middle], 1))
        fine = self.up_fine(torch.cat([doubled(middle), fine], 1))
        return functional.interpolate(self.head(fine), scale_factor=2.0, mode="bilinear")


def block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    )  # fmt: skip


def doubled(values: Tensor) -> Tensor:
    """(B, C, 2h, 2w)."""
    return functional.interpolate(values, scale_factor=2.0)


class NucleiFinder:
    """Dice of nuclei found in reconstructions, crop by crop.

    folder  images/ and masks/ of equal names to train on; pixels of a mask above 0 are nuclei
    crops   the tested ones, whose masks lie likewise: ../masks beside their folder
    raises  InputError where a mask is missing or of another size, and for tested pictures among
            those to train on
    """

    def __init__(self, folder: Path, crops: Sequence[Crop], seed: int) -> None:
        pictures = sorted(path for path in (folder / "images").glob("*") if path.is_file())
        if not pictures:
            raise InputError(f"--nuclei {folder}: no pictures in {folder.name}/images")
        tested = {crop.path.resolve() for crop in crops}
        if shared := sorted(path.name for path in pictures if path.resolve() in tested):
            raise InputError(
                f"--nuclei {folder}: holds tested pictures ({shared[0]}); train on others"
            )
        self.truths = [cut_mask(crop) for crop in crops]
        self.pairs = [read_pair(path) for path in pictures]
        digest = hashlib.sha256(b"".join(a.tobytes() + b.tobytes() for a, b in self.pairs))
        self.facts = {"nuclei": digest.hexdigest(), "seed": seed, "steps": STEPS}
        self.note = (
            f"{NAME}: of pixels that a U-Net of {sum(WIDTHS)} channels finds, trained for {STEPS} "
            f"steps of {BATCH} crops on {len(pictures):,} original pictures of "
            f"{folder.resolve().name}, seed {seed}; png's row is the originals'"
        )
        self.seed = seed
        self._network: SmallUNet | None = None

    def score(
        self, start: int, decoded: Sequence[np.ndarray], _: dict[str, np.ndarray]
    ) -> dict[str, list[float | None]]:
        """Dice of the crops from `start` on; None for those without nuclei in truth and found."""
        if self._network is None:
            self._network = train(self.pairs, self.seed)
        with torch.no_grad():
            found = (self._network(to_images(decoded))[:, 0] > 0).numpy()
        pairs = zip(found, self.truths[start:], strict=False)
        return {NAME: [dice(mask, truth) for mask, truth in pairs]}


def train(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int) -> SmallUNet:
    """A network for pictures and masks, the same for the same seed and threads."""
    rng = np.random.default_rng([seed, 2])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SmallUNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        images, masks = draw_batch(pairs, rng)
        logits = network(images)
        loss = functional.binary_cross_entropy_with_logits(logits, masks)
        shares = torch.sigmoid(logits)
        loss = loss + 1 - 2 * (shares * masks).sum() / (shares.sum() + masks.sum() + 1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return network.eval()


def draw_batch(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Crops (B, 3, h, w) and masks (B, 1, h, w), turned, scaled by .7 to 1.6, stains shifted."""
    images, masks = [], []
    for _ in range(BATCH):
        image, mask = pairs[int(rng.integers(len(pairs)))]
        edge = min(round(CROP_PX / rng.uniform(0.7, 1.6)), *image.shape[:2])
        y, x = (int(rng.integers(side - edge + 1)) for side in image.shape[:2])
        turns, is_flipped = int(rng.integers(4)), bool(rng.integers(2))
        both = np.concatenate([image, mask[..., None]], 2)[y : y + edge, x : x + edge]
        both = np.rot90(both[:, ::-1] if is_flipped else both, turns).copy()
        values = torch.from_numpy(both).permute(2, 0, 1)[None].float()
        values = functional.interpolate(values, size=(CROP_PX, CROP_PX), mode="bilinear")
        density = -torch.log((values[:, :3] / 255).clamp(min=1 / 255))
        gains = torch.from_numpy(rng.uniform(1 - JITTER, 1 + JITTER, (1, 3, 1, 1))).float()
        images.append(torch.exp(-density * gains))
        masks.append((values[:, 3:] > 0.5).float())
    return torch.cat(images), torch.cat(masks)


def dice(found: np.ndarray, truth: np.ndarray) -> float | None:
    """2 |A and B| / (|A| + |B|) of two masks; None where both are empty."""
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else None


def cut_mask(crop: Crop) -> np.ndarray:
    """Bool (H, W): the mask of a tested crop."""
    path = crop.path.parent.parent / "masks" / crop.path.name
    mask = read_mask(path)
    edge = crop.image.shape[0]
    cut = mask[crop.y : crop.y + edge, crop.x : crop.x + edge]
    if cut.shape != crop.image.shape[:2]:
        raise InputError(f"{path}: is {mask.shape[0]}x{mask.shape[1]} px, smaller than its picture")
    return cut


def read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 (H, W, 3) to train on and its mask bool (H, W)."""
    image, _ = read_picture(path, MAX_PX)
    mask = read_mask(path.parent.parent / "masks" / path.name)
    if mask.shape != image.shape[:2]:
        raise InputError(f"{path}: is {image.shape[:2]} px, its mask {mask.shape}")
    return image, mask


def read_mask(path: Path) -> np.ndarray:
    """Bool (H, W) of a mask file."""
    if not path.is_file():
        raise InputError(f"{path}: no such mask; --nuclei takes pictures in images/ and masks/")
    with open_picture(path) as image:
        values: Any = np.asarray(image)
    mask: np.ndarray = (values if values.ndim == 2 else values.max(2)) > 0
    return mask


class PatchProbe:
    """Whether a probe tells the class of each reconstruction, one probe an embedder and slide left.

    A crop is judged by a probe that saw no crop of its slide.
    training  crops of labelled pictures: the folder that a picture lies in is its class
    crops     the tested ones, of the same slides and classes
    raises    InputError for fewer than two classes or slides, or a tested class not among them
    """

    def __init__(
        self, training: FidelityCrops, crops: Sequence[Crop], embedders: dict[str, Any]
    ) -> None:
        self.training = training.crops
        self.classes = sorted({class_of(crop) for crop in self.training})
        slides = {crop.slide for crop in self.training}
        unknown = {class_of(crop) for crop in crops} - set(self.classes)
        if len(self.classes) < 2 or len(slides) < 2 or unknown:
            raise InputError(
                f"--probe-on: {len(self.classes)} classes ({', '.join(self.classes)[:80]}) of "
                f"{len(slides)} slides; at least two of each are needed, and the tested pictures' "
                f"own ({', '.join(sorted(unknown)) or 'all there'})"
            )
        self.crops, self.embedders = crops, embedders
        self.note = (
            "Accuracy: of logistic regression of standardized embeddings of "
            f"{len(self.training):,} originals ({len(self.classes)} classes, {len(slides):,} "
            "slides), each slide by a probe without it; png's row is the originals'"
        )
        self.facts = {"probe": training.digest(), "slides": [c.slide for c in self.training]}
        self._models: dict[tuple[str, str], Any] = {}
        self._originals = MeasuredOriginals([crop.image for crop in self.training], embedders)

    def score(
        self, start: int, _: Sequence[np.ndarray], embeddings: dict[str, np.ndarray]
    ) -> dict[str, list[float | None]]:
        """1 for a class told, else 0, of the crops from `start` on; embeddings (n, D) by name."""
        scores: dict[str, list[float | None]] = {}
        for name, vectors in embeddings.items():
            part = self.crops[start : start + len(vectors)]
            told = [
                self.model(name, crop.slide).predict(vector[None])[0] == class_of(crop)
                for crop, vector in zip(part, vectors, strict=True)
            ]
            scores[f"{name}, accuracy"] = [float(is_told) for is_told in told]
        return scores

    def model(self, name: str, slide: str) -> Any:
        """The probe of an embedder without a slide."""
        if (name, slide) not in self._models:
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler

            LogisticRegression, _ = load_scikit_learn()
            kept = [n for n, crop in enumerate(self.training) if crop.slide != slide]
            labels = [class_of(self.training[n]) for n in kept]
            if len(set(labels)) < 2:
                raise InputError(f"--probe-on: without slide {slide} a single class is left")
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
            model.fit(self._originals.embeddings(name)[kept], labels)
            self._models[name, slide] = model
        return self._models[name, slide]


def class_of(crop: Crop) -> str:
    """The folder a crop's picture lies in."""
    return crop.path.parent.name

"""The crops that codecs are judged on: drawn from folders of pictures, with slide and coding."""
# H W pixels

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_tools.fidelity.slides import Found, find_slides

from latentds.errors import InputError

MAX_PX = 1 << 28
LOSSLESS = ("png", "bmp", "ppm", "tga", "gif", "pcx", "sgi", "tiff")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """A square piece of a picture.

    image     uint8 (H, W, 3)
    source    path below its folder, the folder's name before it where there are several
    slide     what the bootstrap draws: all crops of one slide together
    encoding  how the file is coded: png, jpeg:q=75:4:2:0, ...
    kind      lossless, jpeg or other: what the file's own coding did to it
    x, y      left and top edge in the picture
    """

    image: np.ndarray
    source: str
    slide: str
    encoding: str
    kind: str
    x: int
    y: int

    def to_json(self) -> dict[str, Any]:
        """All but the pixels."""
        names = ("source", "slide", "encoding", "kind", "x", "y")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Crops:
    """All crops, in the order of the pictures; the rule their slides follow; what was left out."""

    crops: tuple[Crop, ...]
    slide_rule: str
    pictures: int
    too_small: int

    @property
    def images(self) -> list[np.ndarray]:
        """The crops' pixels."""
        return [crop.image for crop in self.crops]

    def kinds(self) -> dict[str, int]:
        """Crops of every kind of coding, most frequent first."""
        return dict(Counter(crop.kind for crop in self.crops).most_common())

    def digest(self) -> str:
        """Hash of the pixels, in order."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(image.tobytes())
        return digest.hexdigest()


def read_crops(
    folders: Sequence[Path], *, crop_px: int, per_picture: int, most: int, seed: int,
    name_pattern: str | None = None, slides: str = "auto",
) -> Crops:  # fmt: skip
    """At most `most` crops, `per_picture` of each picture, one of a picture that is just as large.

    InputError where no picture is large enough. Where there are too many pictures, some are drawn.
    """
    found, rule = find_slides(folders, name_pattern, slides)
    order = np.arange(len(found))
    if len(found) * per_picture > most:
        order = np.random.default_rng([seed, 1]).permutation(len(found))
    rng = np.random.default_rng(seed)
    taken: list[tuple[int, Crop]] = []
    too_small = 0
    for place in order.tolist():
        crops = list(cut(found[place], crop_px, per_picture, rng))
        too_small += not crops
        taken += [(place, crop) for crop in crops]
        if len(taken) >= most:
            break
    if not taken:
        names = ", ".join(str(folder) for folder in folders)
        raise InputError(f"{names}: no picture is {crop_px} px or larger; a smaller --crop-px")
    taken = sorted(taken[:most], key=lambda pair: pair[0])
    pictures = len({place for place, _ in taken})
    return Crops(tuple(crop for _, crop in taken), rule, pictures, too_small)


def cut(found: Found, edge: int, count: int, rng: np.random.Generator) -> Iterator[Crop]:
    """The crops of one picture; none where it is too small."""
    from latentds.sources.pictures import read_header, read_picture

    try:
        header = read_header(found.path, MAX_PX)
        if min(header.size_px) < edge:
            return
        image, _ = read_picture(found.path, MAX_PX)
    except InputError as error:
        raise InputError(f"{found.path}: {error}") from error
    kind = kind_of(found.path, header.encoding)
    for _ in range(1 if image.shape[:2] == (edge, edge) else count):
        y, x = (int(rng.integers(side - edge + 1)) for side in image.shape[:2])
        yield Crop(
            image=image[y : y + edge, x : x + edge].copy(), source=found.source, x=x, y=y,
            slide=found.slide, encoding=header.encoding, kind=kind,
        )  # fmt: skip


def kind_of(path: Path, encoding: str) -> str:
    """Whether the file is coded without loss, as JPEG (TIFF may hold it, too), or otherwise."""
    from PIL import Image

    if encoding.startswith("jpeg"):
        return "jpeg"
    if encoding == "tiff":
        with Image.open(path) as image:
            if image.info.get("compression") in ("jpeg", "tiff_jpeg"):
                return "jpeg"
    return "lossless" if encoding in LOSSLESS else "other"

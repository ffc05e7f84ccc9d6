"""The crops that codecs are judged on: drawn from folders of pictures, with slide and coding.

Slides are named by a rule for each folder: its labels.csv, TCGA barcodes, folders, or each picture
for itself.
"""
# H W pixels

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from latentds.codecs import PictureSpec, make_picture_codec
from latentds.core.storage import open_picture
from latentds.errors import InputError
from latentds.sources.csv_tables import read_table
from latentds.sources.image_folder import list_pictures
from latentds.sources.names import patient_of
from latentds.sources.picture_files import read_header, read_picture
from latentds.sources.slide_names import TCGA_SLIDE, parse_barcode

MAX_PX = 1 << 28
LOSSLESS = ("png", "bmp", "ppm", "tga", "gif", "pcx", "sgi")
LOSSLESS_TIFF = (
    *("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd"),
    *("tiff_ccitt", "group3", "group4"),
)
RULES = {
    "table": "the column {column!r} of labels.csv",
    "tcga": "the TCGA slide barcode in each name",
    "patient": "the TCGA patient in each name",
    "folder": "the folder each picture lies in",
    "picture": "each picture is taken for a slide of its own",
}
NAMING = ("table", "tcga", "patient")  # rules whose slides mean the same everywhere
PICTURES = ("path", "name", "file", "filename")
SLIDES = ("slide", "tma_core", "patient")  # the first that is there


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """A square piece of a picture.

    image     uint8 (H, W, 3)
    source    path below its folder, the folder's name before it where there are several
    slide     what the bootstrap draws: all crops of one slide together
    encoding  how the file is coded: png, jpeg:q=75:4:2:0, ...
    kind      lossless, jpeg or other: what the file's own coding did to it; the codec where its
              picture was recoded
    x, y      left and top edge in the picture
    rule      which rule its slide is by
    picture   hash of the whole picture's pixels, as its file has them
    path      of the file
    """

    image: np.ndarray
    source: str
    slide: str
    encoding: str
    kind: str
    x: int
    y: int
    rule: str
    picture: str
    path: Path

    def to_json(self) -> dict[str, Any]:
        """All but the pixels and what stands for them."""
        names = ("source", "slide", "encoding", "kind", "x", "y")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class FidelityCrops:
    """All crops, in the order of the pictures; what was left out.

    slide_rules  by folder, the rule that its slides follow
    """

    crops: tuple[Crop, ...]
    slide_rules: dict[str, str]
    pictures: int
    too_small: int

    @property
    def images(self) -> list[np.ndarray]:
        return [crop.image for crop in self.crops]

    @property
    def slide_rule(self) -> str:
        rules = self.slide_rules
        if len(set(rules.values())) == 1:
            return next(iter(rules.values()))
        return "; ".join(f"{folder}: {rule}" for folder, rule in rules.items())

    def known_slides(self) -> set[str]:
        """Slides that mean the same in another folder; of TCGA slides their patients."""
        return {patient_of(crop.slide) for crop in self.crops if crop.rule in NAMING}

    def kinds(self) -> dict[str, int]:
        """Crops of every kind of coding, most frequent first."""
        return dict(Counter(crop.kind for crop in self.crops).most_common())

    def digest(self) -> str:
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(image.tobytes())
        return digest.hexdigest()


def read_crops(
    folders: Sequence[Path], *, crop_px: int, per_picture: int, most: int, seed: int,
    slides: str = "auto", recode: Sequence[PictureSpec] = (),
) -> FidelityCrops:  # fmt: skip
    """At most `most` crops, `per_picture` of each picture, one of a picture that is just as large.

    slides  what a picture's slide is: auto (the folder's own labels.csv, TCGA barcodes, else
            folders where pictures lie two deep, else pictures), folder or picture
    recode  at qualities: each crop is taken once more from its picture coded so, beyond `most`
    InputError where no picture is large enough. Where there are too many pictures, some are drawn.
    """
    found, rules = find_slides(folders, slides)
    order = np.arange(len(found))
    if len(found) * per_picture > most:
        order = np.random.default_rng([seed, 1]).permutation(len(found))
    rng = np.random.default_rng(seed)
    taken: list[tuple[int, Crop]] = []
    too_small = 0
    for place in order.tolist():
        crops = list(cut(found[place], crop_px, per_picture, rng, recode))
        too_small += not crops
        taken += [(place, crop) for crop in crops]
        if len(taken) >= most * (1 + len(recode)):
            break
    if not taken:
        names = ", ".join(str(folder) for folder in folders)
        raise InputError(f"{names}: no picture is {crop_px} px or larger; a smaller --crop-px")
    taken = sorted(taken[: most * (1 + len(recode))], key=lambda pair: pair[0])
    pictures = len({place for place, _ in taken})
    return FidelityCrops(tuple(crop for _, crop in taken), rules, pictures, too_small)


def cut(
    found: Found, edge: int, count: int, rng: np.random.Generator, recode: Sequence[PictureSpec]
) -> Iterator[Crop]:
    """The crops of one picture, each as it is and as recoded; none where it is too small."""
    try:
        header = read_header(found.path, MAX_PX)
        if min(header.size_px) < edge:
            return
        image, _ = read_picture(found.path, MAX_PX)
    except InputError as error:
        raise InputError(f"{found.path}: {error}") from error
    versions = [(header.encoding, kind_of(found.path, header.encoding), image)]
    for spec in recode:
        codec = make_picture_codec(spec)
        versions.append((spec.text, spec.text, codec.decode(codec.encode(image))))
    whole = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    for _ in range(1 if image.shape[:2] == (edge, edge) else count):
        y, x = (int(rng.integers(side - edge + 1)) for side in image.shape[:2])
        for encoding, kind, pixels in versions:
            yield Crop(
                image=pixels[y : y + edge, x : x + edge].copy(), source=found.source, x=x, y=y,
                slide=found.slide, encoding=encoding, kind=kind, rule=found.rule, picture=whole,
                path=found.path,
            )  # fmt: skip


def kind_of(path: Path, encoding: str) -> str:
    """Whether the file is coded without loss, as JPEG (TIFF may hold either), or otherwise.

    JPEG 2000 is other: its files may be lossless, but do not say so to Pillow.
    """
    if encoding == "jpeg" or encoding.startswith("jpeg:"):
        return "jpeg"
    if encoding == "tiff":
        with open_picture(path) as image:
            compression = image.info.get("compression")
        if compression in ("jpeg", "tiff_jpeg"):
            return "jpeg"
        return "lossless" if compression in LOSSLESS_TIFF else "other"
    return "lossless" if encoding in LOSSLESS else "other"


@dataclasses.dataclass(frozen=True)
class Found:
    """A picture in one of the folders: where it lies, what it is called, its slide and its rule."""

    path: Path
    source: str
    slide: str
    rule: str


def find_slides(folders: Sequence[Path], slides: str) -> tuple[list[Found], dict[str, str]]:
    """All pictures below the folders with their slides; by folder's name, the rule in words."""
    found: list[Found] = []
    rules: dict[str, str] = {}
    for folder, label in zip(folders, label_folders(folders), strict=True):
        listed = list_pictures(folder, use_labels=False, use_splits=False).pictures
        names = [picture.source for picture in listed]
        full = [f"{label}/{name}" if len(folders) > 1 else name for name in names]
        rule, rules[label], named = name_slides(folder, names, full, slides)
        found += [
            Found(folder / name, source, slide, rule)
            for name, source, slide in zip(names, full, named, strict=True)
        ]
    return found, rules


def label_folders(folders: Sequence[Path]) -> list[str]:
    """What folders are called: their names, with as much before them as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    if len(set(labels)) < len(labels):
        raise InputError(f"{labels[0]}: a folder is given twice")
    return labels


def name_slides(
    folder: Path, names: Sequence[str], full: Sequence[str], slides: str
) -> tuple[str, str, list[str]]:
    """A folder's rule, the rule in words, and the slides of its pictures.

    names, full  paths of the pictures below the folder, and what reports call them
    """
    if slides == "auto":
        column, tabled = table_slides(folder, names)
        if column:
            return "table", RULES["table"].format(column=column), tabled
        barcodes = [barcode_in(name) for name in names]
        if all(barcodes):
            return "tcga", RULES["tcga"], barcodes
        patients = [patient_in(name) for name in names]
        if all(patients):
            return "patient", RULES["patient"], patients
        # One level of folders is classes far more often than slides.
        is_deep = all(len(PurePosixPath(name).parts) > 2 for name in names)
        slides = "folder" if is_deep else "picture"
    parents = [str(PurePosixPath(name).parent) for name in full]
    return slides, RULES[slides], parents if slides == "folder" else list(full)


def table_slides(folder: Path, names: Sequence[str]) -> tuple[str, list[str]]:
    """The column of the folder's labels.csv that says slides, and each picture's by the longest end
    of its path that has a line; no column where there is no such table, or it lacks pictures.

    raises  InputError for two slides of one picture
    """
    path = folder / "labels.csv"
    if not path.is_file():
        return "", []
    table = read_table(path)
    picture, slide = table.find_column(PICTURES), table.find_column(SLIDES)
    if picture is None or slide is None:  # labels of something else
        return "", []
    slides: dict[str, str] = {}
    for name, own in zip(table.values(picture), table.values(slide), strict=True):
        key = name.replace("\\", "/").removeprefix("./").lstrip("/")
        if key and own and slides.setdefault(key, own) != own:
            raise InputError(f"{path}: two slides for {key}")
    found = []
    for parts in ((folder / name).absolute().parts[1:] for name in names):
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        found += [slides[end] for end in (*ends, Path(parts[-1]).stem) if end in slides][:1]
    return (slide, found) if len(found) == len(names) else ("", [])


def barcode_in(name: str) -> str:
    """The TCGA slide in a path, empty where there is none."""
    match = TCGA_SLIDE.search(name)
    barcode = parse_barcode(match[0]) if match else None
    return barcode.slide if barcode else ""


def patient_in(name: str) -> str:
    """The TCGA patient in a path, empty where there is none."""
    start = name.find("TCGA-")
    patient = patient_of(name[start:]) if start >= 0 else ""
    return patient if patient != name[start:] else ""

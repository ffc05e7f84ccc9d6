"""latentds demo: the main job on real H&E pictures, and a page about what came out."""

from __future__ import annotations

import dataclasses
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentds.core.display import say

if TYPE_CHECKING:
    from latentds.loading.loader import LatentLoader

PATCH_NAME = re.compile(r"he_\d_x\d{3}_y\d{3}\.png")
EDGE_PX = 256
STEP_PX = 32
SHOWN = 4  # rows of pictures on the page
PICTURES = "demo_pictures"
FAST = {"tiny-v2": "tiny-v2-fast"}  # other decoders of the same latents that ship
SNIPPET = """from latentds import LatentLoader
loader = LatentLoader("{folder}", split="train", batch_size=16, shuffle=True, device="{device}")
for batch in loader: print(batch.images.shape, batch.labels)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Cut patches from four H&E pictures that ship with latentds, convert and load them.

    Then write a page that compares the result with JPEG, WebP and AVIF of the same bytes.
    """

    out: Path = Path("demo")
    """Folder for patches, data set and page."""
    autoencoder: str = "tiny-v2"
    """Name or local folder, as for convert."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    overwrite: bool = False
    """Replace what an earlier demo left in --out."""


def run(config: Config) -> None:
    from latentds_tools.reports.commands import picked

    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert
    from latentds.core.processes import choose_device
    from latentds.core.storage import write_atomically
    from latentds.errors import InputError

    patches, folder, html = (config.out / name for name in ("patches", "latents", "demo.html"))
    found = [path for path in patches.rglob("*") if path.is_file()]
    foreign = [path for path in found if not PATCH_NAME.fullmatch(path.name)]
    if foreign:
        raise InputError(f"{foreign[0]}: not of a demo; choose another --out")
    if not config.overwrite and (found or html.exists()):
        raise InputError(f"{config.out}: holds an earlier demo; pass --overwrite or another --out")
    for path in found:
        path.unlink()
    count = cut_patches(patches)
    say(f"{count} patches of {EDGE_PX} px in {patches}")
    convert(
        ConvertConfig(
            source=patches,
            out=folder,
            name_pattern=r"_x(?P<x>\d+)_y(?P<y>\d+)",
            **picked(config, "autoencoder", "device", "overwrite"),
        )
    )
    say(f"data set in {folder}")
    figures = measure(folder, patches, config.autoencoder, str(choose_device(config.device)))
    write_atomically(html, make_page(folder, figures).encode())
    for label, size, psnr, ssim in figures["rows"]:
        say(f"{label:<24} {size:>6} bytes  {psnr} dB  SSIM {ssim}")
    say(f"page at {html}\n\nload it with\n\n{figures['snippet']}")


def cut_patches(folder: Path) -> int:
    """Overlapping PNG patches, in folders for much and for little of the nuclear stain."""
    import numpy as np
    from PIL import Image

    from latentds.core.storage import open_picture
    from latentds.views.colour import DARKEST, RGB_TO_STAINS

    cut = {}
    with resources.as_file(resources.files(__package__) / PICTURES) as shipped:
        for path in sorted(shipped.glob("*.webp")):
            with open_picture(path, ["WEBP"]) as opened:
                picture = np.asarray(opened.convert("RGB"))
            for y in range(0, picture.shape[0] - EDGE_PX + 1, STEP_PX):
                for x in range(0, picture.shape[1] - EDGE_PX + 1, STEP_PX):
                    name = f"{path.stem}_x{x:03d}_y{y:03d}.png"
                    cut[name] = picture[y : y + EDGE_PX, x : x + EDGE_PX]
    weights = np.array(RGB_TO_STAINS)[:, 0] / np.log(DARKEST)  # of haematoxylin's density
    amounts = {
        name: (np.log(np.maximum(patch / 255, DARKEST)) @ weights).clip(0).mean()
        for name, patch in cut.items()
    }
    for name, patch in cut.items():
        is_high = amounts[name] > np.median(list(amounts.values()))
        path = folder / ("haematoxylin_high" if is_high else "haematoxylin_low") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(patch).save(path)
    return len(cut)


def measure(folder: Path, patches: Path, autoencoder: str, device: str) -> dict[str, Any]:
    """Read everything back through the loader: pictures, and bytes, PSNR and SSIM of each row."""
    from latentds_tools.fidelity.measuring import ssim

    from latentds.core.storage import pixels_of
    from latentds.store.golden import psnr_db

    loader, decoded = read_back(folder, autoencoder, device)
    sources = sorted(decoded)
    originals = [pixels_of(patches / name) for name in sources]
    assert loader.autoencoder is not None
    name, size = loader.autoencoder.card.name, loader.contract.bytes_per_patch
    pictures = {name: (size, [decoded[source] for source in sources])}
    if fast := FAST.get(name):
        again = read_back(folder, fast, device)[1]
        pictures[f"{fast}, same codes"] = (size, [again[source] for source in sources])
    pictures |= at_equal_bytes(originals, size)
    rows = []
    for label, (mean_bytes, made) in pictures.items():
        pairs = list(zip(made, originals, strict=True))
        psnr, similarity = (sum(score(*pair) for pair in pairs) / len(pairs)
                            for score in (psnr_db, ssim))  # fmt: skip
        rows.append((label, f"{mean_bytes:,}", f"{psnr:.2f}", f"{similarity:.3f}"))
    return {
        "originals": originals,
        "pictures": {label: made for label, (_, made) in pictures.items()},
        "rows": rows,
        "source_bytes": sum((patches / name).stat().st_size for name in sources) // len(sources),
        "snippet": SNIPPET.format(folder=folder, device=device),
    }


def read_back(folder: Path, autoencoder: str, device: str) -> tuple[LatentLoader, dict[str, Any]]:
    """The loader, and what it decodes: uint8 (H, W, 3) by the patch's source."""
    from latentds.codecs.latent import to_pictures
    from latentds.loading.loader import LatentLoader

    loader = LatentLoader(folder, "train", batch_size=16, device=device, autoencoder=autoencoder,
                          columns=("source",))  # fmt: skip
    decoded: dict[str, Any] = {}
    for batch in loader:
        decoded |= dict(zip(batch.columns["source"], to_pictures(batch.images), strict=True))
    return loader, decoded


def at_equal_bytes(originals: list[Any], target: int) -> dict[str, tuple[int, list[Any]]]:
    """Mean bytes and decoded pictures of JPEG, WebP and AVIF.

    Each file is the best that fits in `target`.
    """
    from latentds.codecs import PictureCodec, is_available

    rows = {}
    for format, name in (("jpeg", "JPEG"), ("webp", "WebP"), ("avif", "AVIF")):
        if is_available(format):
            codec = PictureCodec(format, max_bytes=target)
            files = codec.encode_batch(originals)
            mean = sum(len(encoded) for encoded in files) // len(files)
            rows[f"{name} at those bytes"] = (mean, codec.decode_batch(files))
    return rows


def make_page(folder: Path, figures: dict[str, Any]) -> str:
    from latentds_tools.reports import html_pages

    from latentds.store.golden import psnr_db

    originals = figures["originals"]
    lead = (
        f"{len(originals)} overlapping patches of {EDGE_PX} px from four H&E pictures of one "
        "specimen (Data Science Bowl 2018, CC0; nothing here was trained on it), PNG files of "
        f"{figures['source_bytes']:,} bytes each. JPEG, WebP and AVIF are the largest files within "
        "the bytes of the latents. Detail is lost; not for diagnosis."
    )
    step = max(1, len(originals) // SHOWN)
    shown = []
    for place in range(0, step * SHOWN, step):
        row = [html_pages.figure(originals[place], "original")]
        for name, pictures in figures["pictures"].items():
            psnr = psnr_db(pictures[place], originals[place])
            row.append(html_pages.figure(pictures[place], f"{name}, {psnr:.1f} dB"))
        shown.append(html_pages.figure_row(row))
    header = [f"mean of {len(originals)} patches", "bytes", "PSNR, dB", "SSIM"]
    return html_pages.page(
        "latentds demo",
        lead,
        [
            html_pages.table(header, figures["rows"]),
            html_pages.heading("Original, reconstructions, and pictures of the same bytes"),
            *shown,
            html_pages.heading("Where it lies, and how to load it"),
            html_pages.paragraph(f"Shards, tables, manifest and card: {folder}"),
            html_pages.code(figures["snippet"]),
        ],
    )

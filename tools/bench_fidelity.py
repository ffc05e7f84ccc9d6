"""latentds bench fidelity: an autoencoder beside JPEG, WebP and AVIF.

At the same bytes, on one's own pictures.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Bytes, PSNR, SSIM and single-picture rates of codecs on crops of a folder of pictures."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of 8-bit pictures."""
    autoencoder: str = "tiny"
    """Name or local folder, as for convert."""
    codebook: Path | None = None
    """Codebook file; where not given, tiny's own or one fitted to the crops themselves."""
    crop_px: int = 256
    """Edge of the crops."""
    crops: int = 2
    """Crops a picture, drawn by --seed."""
    seed: int = 0
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    """Print the table."""
    images = read_crops(config)
    rows = compare(config, images)
    if config.json:
        print(json.dumps({"crops": len(images), "crop_px": config.crop_px, "rows": rows}, indent=1))
        return
    print(
        f"{len(images)} crops of {config.crop_px} px, seed {config.seed}; mean (5th percentile)\n"
    )
    print(f"{'codec':<22}{'bytes':>8}{'PSNR, dB':>18}{'SSIM':>8}{'encode/s':>10}{'decode/s':>10}")
    for row in rows:
        psnr = f"{row['psnr_db']:.2f} ({row['psnr_db_p5']:.2f})"
        print(f"{row['codec']:<22}{row['bytes']:>8,.0f}{psnr:>18}{row['ssim']:>8.3f}"
              f"{row['encode_rate']:>10,.0f}{row['decode_rate']:>10,.0f}")  # fmt: skip


def read_crops(config: Config) -> list[Any]:
    """Random crops, uint8, of every picture that is large enough."""
    import numpy as np

    from latentds.errors import InputError
    from latentds.sources.image_folder import list_pictures
    from latentds.sources.pictures import read_picture

    rng, edge, crops = np.random.default_rng(config.seed), config.crop_px, []
    for picture in list_pictures(config.source, use_labels=False).pictures:
        image, _ = read_picture(config.source / picture.source, 1 << 28)
        if min(image.shape[:2]) < edge:
            continue
        for _ in range(config.crops):
            y, x = (int(rng.integers(side - edge + 1)) for side in image.shape[:2])
            crops.append(image[y : y + edge, x : x + edge])
    if not crops:
        raise InputError(f"{config.source}: no picture is {edge} px or larger")
    return crops


def compare(config: Config, images: list[Any]) -> list[dict[str, Any]]:
    """One row a codec."""
    from latentds import codecs

    latent = latent_codec(config, images)
    target = len(latent.encode(images[0]))
    rows = [judge(latent.name, [latent] * len(images), images)]
    for name in ("JPEG", "WEBP", "AVIF"):
        if codecs.is_available(name):
            tuned = [codecs.at_bytes(name, image, target)[0] for image in images]
            rows.append(judge(f"{name} at {target:,} bytes", tuned, images))
    return rows


def latent_codec(config: Config, images: list[Any]) -> Any:
    """The autoencoder with its codebook."""
    import numpy as np
    import torch

    from latentds.autoencoders import load_autoencoder
    from latentds.autoencoders.tiny import tiny_codebook
    from latentds.codebooks import load_codebook
    from latentds.codecs import LatentCodec
    from latentds.fit import fit_codebook

    autoencoder = load_autoencoder(config.autoencoder)
    if config.codebook is not None:
        codebook = load_codebook(config.codebook).codebook
    elif autoencoder.card.name == "tiny-v1":
        codebook = tiny_codebook().codebook
    else:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)
        samples = torch.cat([autoencoder.encode(part) for part in batch.split(8)])
        codebook, _ = fit_codebook(samples.transpose(0, 1).flatten(1).numpy())
    return LatentCodec(autoencoder, codebook, images[0].shape[:2])


def judge(name: str, tuned: list[Any], images: list[Any]) -> dict[str, Any]:
    """Bytes, quality and rates of a codec (one instance a picture, already tuned)."""
    import numpy as np

    from latentds.metrics import psnr_db, ssim

    started = time.perf_counter()
    files = [codec.encode(image) for codec, image in zip(tuned, images, strict=True)]
    middle = time.perf_counter()
    decoded = [codec.decode(file) for codec, file in zip(tuned, files, strict=True)]
    ended = time.perf_counter()
    quality = [psnr_db(d, image) for d, image in zip(decoded, images, strict=True)]
    return {
        "codec": name,
        "bytes": float(np.mean([len(file) for file in files])),
        "psnr_db": float(np.mean(quality)),
        "psnr_db_p5": float(np.percentile(quality, 5)),
        "ssim": float(np.mean([ssim(d, image) for d, image in zip(decoded, images, strict=True)])),
        "encode_rate": len(images) / (middle - started),
        "decode_rate": len(images) / (ended - middle),
    }

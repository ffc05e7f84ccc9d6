"""latentds fit-codebook: a codebook from a sample of pictures, for several conversions to share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from latentds_tools.reports.commands import check_free, picked, show

from latentds.quantizers.scalar_fit import KindName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fit a codebook to a seeded sample of pictures, and report its distortion of their latents."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of 8-bit pictures."""
    out: Path
    """Codebook file to write (.safetensors)."""
    autoencoder: str = "tiny-v2"
    """Name or local folder, as for convert."""
    kind: Literal["scalar", "additive", "rans"] = "scalar"
    """scalar: levels for single values. additive: vectors that are added up. rans: steps, model and
    tables of entropy-coded records. The last two take --bytes."""
    bytes: int | None = None
    """Bytes a patch. Additive codes need a multiple of the latent cells, of which a patch of 256 px
    has 1,024 at f8. Records can have any number, and convert can make other sizes with the same
    tables."""
    quantizer: KindName = "kmeans"
    levels: int = 256
    """Levels of the codebook, 2 to 256."""
    fit_patches: int = 1000
    """Patches in the sample."""
    patch_size: int | None = None
    """Edge of a patch in pixels. If pictures differ in size, pass --resize or --tile, too."""
    resize: bool = False
    """Scale every picture to the patch size."""
    tile: bool = False
    """Cut every picture into a grid of patches."""
    seed: int = 0
    """Seed of the sample."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    max_bad: int = 0
    """Unreadable pictures that may be left out."""
    overwrite: bool = False
    """Replace an existing file --out."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        from latentds.errors import InputError

        is_scalar = self.kind == "scalar"
        if is_scalar and self.bytes is not None:
            raise InputError("--bytes: scalar codes take a byte a latent value; --kind additive or "
                             "rans")  # fmt: skip
        if not is_scalar and self.bytes is None:
            raise InputError(f"--kind {self.kind} needs --bytes, how many a patch is to take")
        if not is_scalar and self.quantizer != "kmeans":
            raise InputError(f"--quantizer {self.quantizer} is of scalar codebooks; leave it")
        if self.kind == "rans" and self.levels != 256:
            raise InputError(f"--levels {self.levels} is of levels and vectors; leave it")


def run(config: Config) -> None:
    from latentds.quantizers.codebooks import save_codebook

    check_free([config.out], config.overwrite)
    stored = fit(config)
    save_codebook(stored, config.out)
    report = {
        "codebook": str(config.out),
        "codebook_id": stored.codebook.codebook_id,
        **stored.made,
    }
    show(report, config.json)


def fit(config: Config) -> Any:
    """The codebook, fitted as a conversion of the same folder would."""
    from latentds.autoencoders import load_autoencoder
    from latentds.conversion.conversion_plan import make_plan
    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.prepared import choose_batch, fit_to_sample
    from latentds.conversion.shard_writing import Encoder, PlanReader
    from latentds.core.processes import choose_device
    from latentds.sources.opening import open_source

    settings = ConvertConfig(
        source=config.source,
        out=config.out,
        labels=False,
        **picked(config, "quantizer", "levels", "fit_patches", "patch_size", "resize", "tile"),
        **picked(config, "seed", "device", "max_bad"),
    )
    device = choose_device(config.device)
    source = open_source(settings)
    autoencoder = load_autoencoder(config.autoencoder)  # a wrong name is told before headers
    plan = make_plan(settings, source)
    make = functools.partial(Encoder, autoencoder, device)
    encoder = make(choose_batch(make, device, plan.patch_px))
    with contextlib.closing(PlanReader(plan, settings)) as reader:
        return fit_to_sample(settings, encoder, reader, config.kind, config.bytes or 0)

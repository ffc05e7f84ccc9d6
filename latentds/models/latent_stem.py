"""ViTs for pixels or latents, among the models; built where embedders are, which load them too."""

from latentds.embedders.latent_stem import (
    LatentStemConfig,
    SplitCells,
    build_vit,
    check_arch,
    check_cells,
    image_px,
    timm_arguments,
)

__all__ = [
    "LatentStemConfig",
    "SplitCells",
    "build_vit",
    "check_arch",
    "check_cells",
    "image_px",
    "timm_arguments",
]

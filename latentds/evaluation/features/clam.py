"""CLAM's layout beside TRIDENT's: pt_files, h5_files and coordinates with CLAM's attributes."""

from __future__ import annotations

import io
import os
import shutil

from latentds.core.storage import write_atomically
from latentds.evaluation.features.feature_files import FeatureFile, write_coordinates
from latentds.evaluation.features.layout import FeaturePlaces


def add(places: FeaturePlaces, slide: str, patch_px: int) -> None:
    """Make a slide's files for CLAM from its feature file, those that are missing.

    h5_files takes no room: it is the same file by another name, where the disk allows it. A tensor
    is held in memory as a whole.
    """
    import torch

    source = places.features_file(slide)
    tensor = places.clam / "pt_files" / f"{source.stem}.pt"
    linked = places.clam / "h5_files" / source.name
    coords = places.clam / "patches" / source.name
    if tensor.exists() and linked.exists() and coords.exists():
        return
    with FeatureFile(source) as file:
        size = int(file.attributes["coords"].get("patch_size_level0", patch_px))
        # CLAM's patch_size counts pixels of patch_level: patches of half the resolution are 512 px
        # of level 0 here, which TRIDENT calls 256. A slide's size is not known.
        attributes = {
            "patch_size": size or patch_px, "patch_level": 0, "downsample": (1.0, 1.0),
            "downsampled_level_dim": (0, 0), "level_dim": (0, 0), "name": slide,
            "save_path": "patches",
        }  # fmt: skip
        write_coordinates(coords, file.coords(), attributes)
        content = io.BytesIO()
        torch.save(torch.from_numpy(file.features()), content)
    linked.unlink(missing_ok=True)
    linked.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, linked)
    except OSError:  # a file system without links
        shutil.copyfile(source, linked)
    write_atomically(tensor, content.getvalue())

"""What `bench gpu` measures on, made in a process of its own: pictures that ship, and sets of them.

python -m latentds_tools.bench.gpu_sets FOLDER PATCH_PX PATCHES DEVICE
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from latentds.core.display import say

SETS = {"codes": "tiny-v1", "records": "tiny-v2"}  # folder: autoencoder; bytes, and entropy-coded


def demo_pictures() -> Path:
    """The folder of H&E pictures that ships."""
    return Path(str(resources.files("latentds_tools") / "demo_pictures"))


def main(folder: Path, patch_px: int, patches: int, device: str) -> None:
    """Cut pictures, convert them with both autoencoders, repeat what came out."""
    from latentds_tools.bench.jpeg_decoding import load_patches
    from latentds_tools.bench.synthetic import write_repeated
    from PIL import Image

    from latentds.conversion.convert_config import ConvertConfig
    from latentds.conversion.converting import convert

    cut = folder / "pictures" / "a"
    cut.mkdir(parents=True)
    for number, patch in enumerate(load_patches(demo_pictures(), patch_px)[:16]):
        Image.fromarray(patch).save(cut / f"p{number:02d}.png")
    for name, autoencoder in SETS.items():
        few = folder / f"few-{name}"
        convert(ConvertConfig(source=cut.parent, out=few, autoencoder=autoencoder, device=device))
        write_repeated(folder / name, few, patches)
        say(f"{folder / name}: {patches:,} patches of {patch_px} px by {autoencoder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

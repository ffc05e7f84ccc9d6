"""Miniature folders and small networks in place of what docs/reproduce.md needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.conftest import smooth_picture
from tests.test_autoencoders import make_dc, make_kl
from tests.test_slides import write_slide


def save_networks(folder: Path) -> dict[str, str]:
    """Small networks in place of those on the Hub: name on the page -> what stands for it."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    found = {"facebook/sam-vit-base": "tiny-random"}
    for name, make in (("sd15", lambda: make_kl(4)), ("sd3", lambda: make_kl(16)),
                       ("dcae-f32", make_dc)):  # fmt: skip
        network = make().eval()
        network.save_pretrained(folder / "nets" / name)
        for parameter in network.decoder.parameters():
            parameter.data.mul_(1.01)
        network.save_pretrained(folder / "nets" / f"{name}-path")
        found |= {key: f"nets/{key}" for key in (name, f"{name}-path")}
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "vit.safetensors")
    found["uni"] = "timm:test_vit@vit.safetensors"
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
    torch.save(vit.state_dict(), folder / "vit256_small_dino.pth")
    return found


def save_images(folder: Path, count: int, suffix: str, edge: int = 64, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        picture = Image.fromarray(smooth_picture(first + number, edge))
        picture.save(folder / f"p{first + number:03d}{suffix}")


def save_masks(folder: Path, count: int, values: int, edge: int = 64) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        mask = np.random.default_rng(number).integers(0, values, (4, 4), np.uint8)
        Image.fromarray(mask).resize((edge, edge), 0).save(folder / f"p{number:03d}.png")


def save_miniature(root: Path) -> None:
    """The folders that the page expects, with little in them."""
    (root / "tcga" / "brca").mkdir(parents=True)
    rows = ["case_id,slide_id,label"]
    for number in range(6):
        name = f"TCGA-AA-{number:04d}-01Z-00-DX1"
        write_slide(root / "tcga" / "brca" / f"{name}.svs", mpp=0.5)
        rows.append(f"{name[:12]},{name},{('IDC', 'ILC')[number % 2]}")
    (root / "labels").mkdir()
    (root / "labels" / "tcga_brca.csv").write_text("\n".join(rows) + "\n")
    save_images(root / "tcga-patches" / "TCGA-AA-0001-01Z-00-DX1", 2, ".png")
    save_images(root / "more-patches" / "TCGA-AA-0002-01Z-00-DX1", 2, ".png", first=50)
    for number, name in enumerate(("ADI", "LYM", "TUM")):
        save_images(root / "NCT-CRC-HE-100K" / name, 6, ".tif", first=20 * number)
        save_images(root / "CRC-VAL-HE-7K" / name, 3, ".tif", first=100 + 20 * number)
    for name, values in (("bcss", 6), ("crag", 2)):
        save_images(root / name / "img", 6, ".png")
        save_masks(root / name / "mask", 6, values)
        folds = [f"p{number:03d},{fold}" for number, fold in enumerate((-1, -1, 0, 1, 2, 3))]
        (root / name / "folds.csv").write_text("img_id,fold\n" + "\n".join(folds) + "\n")

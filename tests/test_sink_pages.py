"""docs/sink.md: its blocks run with the libraries they name, on small slides."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from latentds.store.reader import ShardSet
from tests.test_slides import PLACES, slide_pixels, write_job, write_slide

pytest.importorskip("openslide")
NAME = "TCGA-AA-0001"
PAGE = (Path(__file__).parents[1] / "docs" / "sink.md").read_text()


def block(title: str) -> str:
    """The first code block of a section, its sizes those of a small slide."""
    lines = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()
    code = [line[4:] for line in lines if line.startswith("    ") or not line]
    assert len([line for line in code if line]) <= 15
    return re.sub(r"\b256\b", "64", "\n".join(code).replace("downsample=64", "downsample=4"))


def run(title: str, folder: Path, monkeypatch) -> tuple[ShardSet, dict[str, list]]:
    """The set that a block makes in a folder with `slides/`, and its patches' columns."""
    monkeypatch.chdir(folder)
    exec(compile(block(title), f"docs/sink.md, {title}", "exec"), {})
    shards = ShardSet(folder / f"{title.lower()}-set")
    columns = ["slide", "x", "y", "mpp", "size_px"]
    return shards, shards.read_columns(np.arange(len(shards)), columns)


def assert_like_the_slide(shards: ShardSet, columns: dict[str, list], pixels: np.ndarray) -> None:
    """The latents of every patch are nearest to those of its own place in the slide."""
    from latentds.autoencoders import load_autoencoder
    from latentds.quantizers.scalar import dequantize

    assert set(columns["slide"]) == {NAME}
    decoded = load_autoencoder("tiny").decode(
        dequantize(
            torch.from_numpy(shards.read_codes(np.arange(1))), shards.manifest.contract.codebook
        )
    )
    x, y, size = columns["x"][0], columns["y"][0], columns["size_px"][0] or 64
    mean = pixels[y : y + size, x : x + size].reshape(-1, 3).mean(0) / 255
    assert np.allclose(decoded.mean((0, 2, 3)).detach().numpy(), mean, atol=0.05)  # an 8-bit code


@pytest.mark.slow
def test_tridents_coordinates(tmp_path, monkeypatch):
    pixels = write_slide(tmp_path / "slides" / f"{NAME}.svs")
    write_job(tmp_path / "job", NAME, PLACES)
    shards, columns = run("TRIDENT", tmp_path, monkeypatch)
    assert set(zip(columns["x"], columns["y"], strict=True)) == set(PLACES)
    assert set(columns["mpp"]) == {0.5} and set(columns["size_px"]) == {128}
    assert_like_the_slide(shards, columns, pixels)


@pytest.mark.slow
def test_wsistream(tmp_path, monkeypatch):
    pytest.importorskip("wsistream")
    pixels = write_slide(tmp_path / "slides" / f"{NAME}.tiff")
    shards, columns = run("wsistream", tmp_path, monkeypatch)
    assert len(shards) == 8 * 6 and set(columns["mpp"]) == {0.25}  # the square of tissue, in tiles
    assert np.all((slide_pixels()[columns["y"], columns["x"]] != 255).any(1))
    assert_like_the_slide(shards, columns, pixels)


@pytest.mark.slow
def test_hs2p(tmp_path, monkeypatch):
    pytest.importorskip("hs2p")
    pixels = write_slide(tmp_path / "slides" / f"{NAME}.tiff")
    shards, columns = run("hs2p", tmp_path, monkeypatch)
    assert len(shards) >= 12 and set(columns["mpp"]) == {0.5} and set(columns["size_px"]) == {128}
    assert_like_the_slide(shards, columns, pixels)

"""The parts of `bench gpu`, most important first: each a command, its share of the time, its needs.

Sizes are those of a GPU of the present, or a miniature that a CPU ends in minutes. What they
measure on is made in a process of its own, of pictures that ship:

python -m latentds_tools.bench.gpu_parts FOLDER PATCH_PX PATCHES DEVICE
"""

from __future__ import annotations

import dataclasses
import sys
from importlib import resources
from pathlib import Path

from latentds.core.display import say
from latentds.core.extras import is_here

BEST = "bfloat16 channels_last"
OPTIONS = f"float32,{BEST},{BEST} cuda_graph"  # records are decoded under the last
COMPILED = f"{BEST} compile,{BEST} compile cuda_graph"
NETWORKS = ("tiny-v2-fast", "turbo-s", "tiny-v2", "taesd", "turbo-m", "sd15", "dcae-f32")
BY_DIFFUSERS = ("sd15", "dcae-f32")
MARK = "pytest.mark.gpu"
SETS = {"codes": "tiny-v1", "records": "tiny-v2"}  # folder: autoencoder; bytes, and entropy-coded
# What every run of a bench is given, on a GPU and in the miniature.
GPU = {
    "decode": "--patch-size 256 --batch-sizes 128 --seconds 1 --rounds 1",
    "loader": "--batch-size 256 --pixel-batch-size 256 --workers 4 --seconds 1.5 --rounds 1 "
    "--dtype bfloat16 --channels-last --cuda-graph",
    "step": "--channels-last --cuda-graph",
    "features": "--patches 8192 --batch-sizes 256 --rounds 2",
}
CPU = {
    "decode": "--patch-size 64 --batch-sizes 1 --seconds 0.02 --rounds 1",
    "loader": "--batch-size 8 --pixel-batch-size 8 --workers 1 --seconds 0.05 --rounds 1",
    "step": "--arch test_vit --batch-size 2 --steps 1 --rounds 1 --global-px 32 --local-px 16 "
    "--locals 2 --patch-size 32 --out-dim 16",
    "features": "--patches 8 --slides 2 --patch-size 32 --batch-sizes 4 --rounds 1 "
    "--embedder timm:test_vit",
}


@dataclasses.dataclass(frozen=True)
class GpuPart:
    """One thing to measure.

    title    of its table
    share    of the time, beside other parts' shares
    words    behind `python`; a bench prints its JSON
    needs    modules, and the extra that has them
    uses     the part that makes what it reads
    partial  file with the JSON so far, where a bench leaves one
    missing  why it cannot be run at all, empty where it can
    """

    name: str
    title: str
    share: float
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    extra: str = ""
    uses: str = ""
    partial: Path | None = None
    missing: str = ""

    @property
    def bench(self) -> str:
        """The bench that is run, empty where it is none."""
        return self.words[3] if self.words[2:3] == ("bench",) else ""

    @property
    def command(self) -> str:
        program = "latentds" if self.bench else Path(sys.executable).name
        return " ".join((program, *self.words[2 if self.bench else 0 :]))

    def why_not(self) -> str:
        """Why it cannot be run here; empty where it can."""
        lost = [name for name in self.needs if not is_here(name)]
        if lost:
            return f"{', '.join(lost)} not installed; pip install 'latentds[{self.extra}]'"
        return self.missing


def bench(name: str, device: str, *words: object) -> tuple[str, ...]:
    """The words of a bench that prints JSON."""
    common = GPU[name] if device.startswith("cuda") else CPU[name]
    given = (*common.split(), "--device", device, *map(str, words))
    return ("-m", "latentds_tools.cli", "bench", name, *given, "--json")


def all_parts(work: Path, device: str, patches: int) -> list[GpuPart]:
    """All parts in the order they are run.

    work     folder for what they make
    patches  of the sets that loaders read
    """
    is_gpu = device.startswith("cuda")
    sets, edge = work / "sets", 256 if is_gpu else 64
    made = ("-m", "latentds_tools.bench.gpu_parts", str(sets), str(edge), str(patches), device)

    def loader(name: str, title: str, folder: str, words: str, share: float = 40) -> GpuPart:
        count = ("--patches", patches, "--pixel-patches", patches)
        given = bench("loader", device, sets / folder, *words.split(), *count)
        return GpuPart(name, title, share, given, uses="inputs")

    def step(name: str, title: str, words: str, missing: str = "") -> GpuPart:
        given = bench("step", device, *(words.split() if is_gpu else ()))
        return GpuPart(name, title, 50, given, ("timm", "lightly"), "train", missing=missing)

    over_decoder = "--against none --decode pixels"
    large = "--arch vit_large_patch16_224 --batch-size 64 --steps 6 --rounds 2"
    return [
        GpuPart("inputs", "Inputs", 40, made),
        tests_part(is_gpu),
        *decode_parts(work, device),
        loader("loader", "The loader over its decoder, one byte a value", "codes", over_decoder),
        loader("loader-records", "The loader over its decoder, entropy-coded records", "records",
               f"{over_decoder} --autoencoder tiny-v2-fast"),
        step("step-vit-s", "A DINO step of ViT-S with views",
             "--batch-size 128 --steps 10 --rounds 3"),
        *([step("step-vit-l", "A DINO step of ViT-L with views", large)] if is_gpu else []),
        GpuPart("features", "Features of ViT-L", 45, bench("features", device), ("timm", "h5py"),
                "evaluate"),
        loader("resident", "The whole set on the device", "codes",
               "--against latentds-resident --decode codes,pixels", share=60),
        step("step-vit-s-compiled", "A DINO step of ViT-S, views compiled",
             "--batch-size 128 --steps 10 --rounds 2 --compile-views --compile",
             missing="" if is_gpu else "a CPU compiles for minutes"),
    ]  # fmt: skip


def tests_part(is_gpu: bool) -> GpuPart:
    """The tests marked gpu, of the files that have some, where there are tests at hand."""
    import latentds

    tests = Path(str(latentds.__file__)).resolve().parents[1] / "tests"
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if MARK in path.read_text()]
    words = ("-m", "pytest", *files, "-m", "gpu and not slow", "-vv", "-p", "no:cacheprovider")
    missing = "" if is_gpu else "they need a GPU"
    if not files:
        missing = "no tests beside the package: a wheel has none; run from a checkout"
    return GpuPart("tests", "Tests marked gpu", 60, words, ("pytest",), "dev", missing=missing)


def decode_parts(work: Path, device: str) -> list[GpuPart]:
    """Decoders beside JPEG and AVIF; then the compiler, which may take all its time to start."""
    plain, compiled = work / "decode.json", work / "decode-compiled.json"
    names, options = ",".join(NETWORKS[:2]), f"float32,{BEST}"
    if device.startswith("cuda"):
        there = [name for name in NETWORKS if is_here("diffusers") or name not in BY_DIFFUSERS]
        names, options = ",".join(there), OPTIONS
    pictures = ("--avif", "--pictures", demo_pictures(), "--decoders", names)
    words = bench("decode", device, *pictures, "--options", options, "--out", plain)
    parts = [GpuPart("decode", "Decoders beside JPEG and AVIF", 130, words, partial=plain)]
    if device.startswith("cuda"):
        few = ("--no-jpeg", "--compile", "--decoders", ",".join(NETWORKS[:3]))
        words = bench("decode", device, *few, "--options", COMPILED, "--out", compiled)
        parts.append(GpuPart("decode-compiled", "Decoders, compiled", 40, words, partial=compiled))
    return parts


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

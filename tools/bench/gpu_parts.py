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
NETWORKS = ("tiny-v2-fast", "turbo-s", "tiny-v2", "taesd", "turbo-m", "sd15", "dcae-f32")
BY_DIFFUSERS = ("sd15", "dcae-f32")
MARK = "pytest.mark.gpu"
FAST = ("--dtype", "bfloat16", "--channels-last", "--cuda-graph")  # of a loader's decoder
SETS = {"codes": "tiny-v1", "records": "tiny-v2"}  # folder: autoencoder; bytes, and entropy-coded


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


def bench(name: str, *words: object) -> tuple[str, ...]:
    """The words of a bench that prints JSON."""
    given = map(str, words)
    return ("-m", "latentds_tools.cli", "bench", name, *given, "--json")


def all_parts(work: Path, device: str, patches: int) -> list[GpuPart]:
    """All parts in the order they are run.

    work     folder for what they make
    patches  of the sets that loaders read
    """
    is_gpu = device.startswith("cuda")
    edge = 256 if is_gpu else 64
    sets = work / "sets"
    made = ("-m", "latentds_tools.bench.gpu_parts", str(sets), str(edge), str(patches), device)
    large = step(
        "step-vit-l", "A DINO step of ViT-L with views", device,
        "--arch", "vit_large_patch16_224", "--batch-size", 64, "--steps", 6, "--rounds", 2,
    )  # fmt: skip
    compiled = step(
        "step-vit-s-compiled", "A DINO step of ViT-S, views compiled", device, "--batch-size", 128,
        "--steps", 10, "--rounds", 2, "--compile-views", "--compile",
    )  # fmt: skip
    over_decoder = ("--against", "none", "--decode", "pixels")
    return [
        GpuPart("inputs", "Inputs", 40, made),
        tests_part(is_gpu),
        *decode_parts(work, device, edge),
        loader("loader", "The loader over its decoder, one byte a value", device, patches,
               sets / "codes", *over_decoder),
        loader("loader-records", "The loader over its decoder, entropy-coded records", device,
               patches, sets / "records", *over_decoder, "--autoencoder", "tiny-v2-fast"),
        step("step-vit-s", "A DINO step of ViT-S with views", device,
             "--batch-size", 128, "--steps", 10, "--rounds", 3),
        *([large] if is_gpu else []),
        features_part(device, is_gpu),
        loader("resident", "The whole set on the device", device, patches, sets / "codes",
               "--against", "latentds-resident", "--decode", "codes,pixels", share=60),
        compiled if is_gpu else dataclasses.replace(compiled, missing="a CPU compiles for minutes"),
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


def decode_parts(work: Path, device: str, edge: int) -> list[GpuPart]:
    """Decoders beside JPEG and AVIF; then the compiler, which may take all its time to start."""
    is_gpu = device.startswith("cuda")
    names = [name for name in NETWORKS if is_here("diffusers") or name not in BY_DIFFUSERS]
    if not is_gpu:
        names = ["tiny-v2-fast", "turbo-s"]
    sizes = (128, 1.0) if is_gpu else (1, 0.02)
    common = ("--device", device, "--patch-size", edge, "--batch-sizes", sizes[0],
              "--seconds", sizes[1], "--rounds", 1)  # fmt: skip
    options = OPTIONS if is_gpu else f"float32,{BEST}"
    pictures = ("--avif", "--pictures", demo_pictures())
    partial = [work / f"{name}.json" for name in ("decode", "decode-compiled")]
    words = bench("decode", *common, *pictures, "--decoders", ",".join(names), "--options", options,
                  "--out", partial[0])  # fmt: skip
    parts = [GpuPart("decode", "Decoders beside JPEG and AVIF", 130, words, partial=partial[0])]
    if is_gpu:
        both = f"{BEST} compile,{BEST} compile cuda_graph"
        words = bench("decode", *common, "--no-jpeg", "--decoders", "tiny-v2-fast,turbo-s,tiny-v2",
                      "--compile", "--options", both, "--out", partial[1])  # fmt: skip
        parts.append(
            GpuPart("decode-compiled", "Decoders, compiled", 40, words, partial=partial[1])
        )
    return parts


def loader(
    name: str, title: str, device: str, patches: int, *words: object, share: float = 40
) -> GpuPart:
    """A bench of loaders over one of the sets, end to end over the decoder alone."""
    is_gpu = device.startswith("cuda")
    batch, seconds, workers = (256, 1.5, 4) if is_gpu else (8, 0.05, 1)
    common = (
        *("--device", device, "--patches", patches, "--pixel-patches", patches),
        *("--batch-size", batch, "--pixel-batch-size", batch, "--workers", workers),
        *("--seconds", seconds, "--rounds", 1),
        *(FAST if is_gpu else ()),
    )
    return GpuPart(name, title, share, bench("loader", *words, *common), uses="inputs")


def step(name: str, title: str, device: str, *words: object) -> GpuPart:
    """A DINO step with views, 2 and 8 crops; tiny where it is for a CPU."""
    if device.startswith("cuda"):
        words = ("--device", device, "--channels-last", "--cuda-graph", *words)
    else:
        words = ("--device", device, "--arch", "test_vit", "--batch-size", 2, "--steps", 1,
                 "--rounds", 1, "--global-px", 32, "--local-px", 16, "--locals", 2,
                 "--patch-size", 32, "--out-dim", 16)  # fmt: skip
    return GpuPart(name, title, 50, bench("step", *words), ("timm", "lightly"), "train")


def features_part(device: str, is_gpu: bool) -> GpuPart:
    sizes = ("--patches", 8192, "--batch-sizes", 256, "--rounds", 2) if is_gpu else (
        "--patches", 8, "--slides", 2, "--patch-size", 32, "--batch-sizes", 4, "--rounds", 1,
        "--embedder", "timm:test_vit")  # fmt: skip
    words = bench("features", "--device", device, *sizes)
    return GpuPart("features", "Features of ViT-L", 45, words, ("timm", "h5py"), "evaluate")


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

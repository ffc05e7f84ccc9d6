"""latentds features: the features of every slide, in files that CLAM, TRIDENT and torchmil read."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from latentds_tools.reports.commands import check_least, picked, show

from latentds.errors import InputError
from latentds.evaluation.patchsets.patch_set import PatchInput, recorded_settings

if TYPE_CHECKING:
    from latentds.evaluation.features.extraction import SlideBag
    from latentds.evaluation.features.folder_records import Extraction

LEFT_OUT = 3  # exit code: done, but not of all slides
GPU_BATCH, CPU_BATCH = 256, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PatchInput):
    """Embed the patches of every slide and write one feature file a slide, in TRIDENT's layout.

    Latents are decoded on the fly; originals are taken as they are, or through --codec. A killed
    run is resumed by the same command. Under torchrun (-m latentds_tools.features) the ranks share
    the slides.
    """

    data: Annotated[Path, tyro.conf.Positional]
    """A latentds data set (its folder, hf://datasets/ORG/NAME[@REVISION], s3://...), or originals
    as 'latentds convert' takes them: slides, folders of pictures, archives, a table of paths."""
    embedder: tuple[str, ...]
    """One or several embedders, for which patches are decoded once: uni, virchow2, ...
    (--list-embedders) or timm:NAME, each with @FILE for weights in a local file; timm-dir:FOLDER,
    timm:hf-hub:ORG/NAME; nic:FILE; or FILE.py:FUNCTION, a local file whose
    function makes an embedder."""
    out: Path
    """Folder to write: features_<embedder>/SLIDE.h5, patches/SLIDE_patches.h5, labels.csv,
    features.json. Several embedders get a folder each, OUT/<embedder>/, with all of these. Exit
    code 3 means: done, but slides were left out."""
    list_embedders: bool = False
    """Only list the known embedders: dimensions, preparation, licence, and where they are."""
    native: bool = False
    """Give the embedder whole patches, neither resized nor cropped."""
    batch_size: int | None = None
    """Patches embedded at once. By default 256 on a GPU and 32 elsewhere. The number is recorded,
    because the last bits of features depend on it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the embedder; bfloat16 is faster on a GPU. See also --decode-dtype."""
    saved: Literal["float32", "float16"] = "float32"
    """Number format of the files; float16 takes half the space."""
    max_patches: int | None = None
    """Patches a slide at most, drawn by --seed. No others are read."""
    seed: int = 0
    """Seed of the patches that --max-patches draws."""
    clam: bool = False
    """Also write CLAM's layout: clam_<embedder>/ with pt_files, h5_files and coordinates."""
    max_bad: int = 0
    """Slides that may fail on a rank. Each is named with its reason, listed in OUT/left_out.json,
    and tried again by the next run."""
    json: bool = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        PatchInput.__post_init__(self)
        if not self.embedder or len(set(self.embedder)) < len(self.embedder):
            raise ValueError(f"--embedder {' '.join(self.embedder)}: at least one, each once")
        check_least(self, batch_size=1, max_patches=1, max_bad=0)


def run(config: Config) -> int:
    """Extract, and say what was made; returns 3 where this rank left a slide out."""
    from latentds.core.processes import find_rank, meeting
    from latentds.evaluation.features.folder_records import read_left_out

    rank, ranks = find_rank(None, None)
    summaries = extract(config, rank, ranks)
    with meeting(ranks):
        if rank == 0:
            shown = []
            for summary in summaries:
                left = read_left_out(Path(summary["out"]))  # by any rank
                told = [{"slide": slide, "reason": reason} for slide, reason in left.items()]
                shown.append(summary | {"left_out": told})
            show(shown if len(shown) > 1 else shown[0], config.json, as_text)
    return LEFT_OUT if any(summary["left_out"] for summary in summaries) else 0


def list_embedders() -> str:
    """The embedders known by name, for --list-embedders."""
    from latentds.embedders.embedder_cards import describe

    return describe()


ANSWERS = {"--list-embedders": list_embedders}  # options that ask, and need no other


def extract(config: Config, rank: int, ranks: int) -> list[dict[str, Any]]:
    """Write this rank's feature files; a summary for each embedder."""
    from latentds.core.display import progress
    from latentds.core.processes import choose_device
    from latentds.embedders import embedder_loader
    from latentds.evaluation.features.extraction import extract_features, named_slides
    from latentds.evaluation.features.folder_records import FeatureOptions
    from latentds.evaluation.features.layout import plain
    from latentds.evaluation.patchsets.open_patch_sets import open_patches

    device = choose_device(config.device)
    loaders = [embedder_loader(name, native=config.native) for name in config.embedder]
    # Every patch is read once: none is worth keeping.
    patches = open_patches(dataclasses.replace(config, device=str(device), keep_mb=0))
    named_slides(patches)  # before weights are fetched, which may take long and fail
    loaded = [load() for load in loaders]
    outs = [config.out / plain(embedder.card.name) for embedder in loaded]
    embedders = dict(zip(outs if len(outs) > 1 else [config.out], loaded, strict=True))
    if len(embedders) < len(loaded):
        raise InputError(f"--embedder {' '.join(config.embedder)}: two go to one folder")
    options = FeatureOptions(
        batch_size=config.batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH),
        patches=recorded_settings(config),
        **picked(config, "precision", "saved", "max_patches", "seed", "clam", "max_bad"),
    )
    sizes: dict[int, int] = {}
    started = time.perf_counter()
    with progress(total=0, desc="features", unit="patch", disable=rank != 0) as bar:

        def advance(bag: SlideBag, patches: int) -> None:
            """The bar's end is estimated from the slides so far."""
            sizes[bag.number] = len(bag.coords)
            bar.total = round(sum(sizes.values()) / bag.number * bag.slides)
            bar.set_description(f"{bag.slide[:40]} ({bag.number} of {bag.slides} slides)")
            bar.update(patches)

        made = extract_features(
            patches, embedders, options, device=device, rank=rank, world_size=ranks,
            progress=advance,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    place = {"rank": rank, "ranks": ranks} if ranks > 1 else {}
    summaries = []
    for (out, embedder), done in zip(embedders.items(), made, strict=True):
        about = {"out": str(out), "source": patches.name, "embedder": embedder.card.name}
        summaries.append(about | {"device": str(device)} | summarize(done, seconds) | place)
    return summaries


def summarize(done: Extraction, seconds: float) -> dict[str, Any]:
    return {
        "dim": done.dim,
        "slides": len(done.slides),
        "there_before": done.skipped,
        "patches": done.patches,
        "seconds": round(seconds, 1),
        "patches_per_s": round(done.patches / seconds, 1) if done.patches else None,
        "left_out": [{"slide": s, "reason": reason} for s, reason in sorted(done.bad.items())],
    }


def as_text(summary: dict[str, Any] | list[dict[str, Any]]) -> str:
    """One fact a line; slides that were left out with their reasons; a block an embedder."""
    if isinstance(summary, list):
        return "\n\n".join(map(as_text, summary))
    facts = {name: value for name, value in summary.items() if name != "left_out"}
    lines = [f"{name.replace('_', ' '):<16} {value}" for name, value in facts.items()]
    bad = summary["left_out"]
    lines += [f"{'left out':<16} {len(bad)}"] if bad else []
    return "\n".join(lines + [f"  {entry['slide']}: {entry['reason']}" for entry in bad])


if __name__ == "__main__":  # torchrun -m latentds_tools.features
    from latentds_tools.cli import main

    main(["features", *sys.argv[1:]])

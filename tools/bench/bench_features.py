"""latentds bench features: what decoding latents adds to embedding pictures that are there."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentds_tools.bench import harness
from latentds_tools.reports.commands import check_known, show

from latentds.errors import InputError

if TYPE_CHECKING:
    from latentds.embedders import NetworkEmbedder
    from latentds.evaluation.features.embedding_pipeline import Piece

GPU = {"patches": 16_384, "batch_sizes": (256,), "embedder": "timm:vit_large_patch16_224"}
CPU = {"patches": 64, "batch_sizes": (16,), "embedder": "timm:vit_tiny_patch16_224"}
Precision = Literal["float32", "bfloat16"]
ALONE, LOADED, WRITTEN, DECODED = "embedder_alone", "from_latents", "with_files", "decoder_alone"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Embed the same number of patches from cached pictures and from latents, in turn."""

    embedder: str | None = None
    """Embedder: timm:NAME, with random weights, on which time does not depend. By default
    timm:vit_large_patch16_224 on a GPU, else vit_tiny."""
    student: str = "turbo-s"
    """Decoder, with random weights: turbo-s, turbo-m, turbo-f32, taesd."""
    patches: int | None = None
    """Patches of the random data set. By default 16,384 on a GPU, 64 elsewhere."""
    slides: int = 4
    """Slides that these patches belong to."""
    patch_size: int = 256
    """Edge of a patch in pixels."""
    batch_sizes: tuple[int, ...] | None = None
    """Patches embedded at once. By default 256 on a GPU, 16 elsewhere."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    compile: bool = False
    """Compile the decoder, as 'latentds features --decode-compile' does."""
    rounds: int = 3
    """Rounds in which everything is measured in turn; medians are reported."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        sizes = (self.patches or 1, self.slides, self.patch_size, self.rounds)
        if min(*sizes, *(self.batch_sizes or (1,))) < 1:
            raise ValueError("patches, slides, sizes and rounds are at least 1")
        if self.slides > (self.patches or self.slides):
            raise ValueError(f"{self.slides} slides of {self.patches} patches; more patches")
        if not (self.embedder or "timm:").startswith("timm:"):
            raise ValueError(f"--embedder {self.embedder}: take timm:NAME; weights are random")


def run(config: Config) -> None:
    show(measure(config), config.json, as_text)


def measure(config: Config) -> dict[str, Any]:
    config = harness.on_device(config)
    is_gpu = config.device.startswith("cuda")
    config = harness.for_device(config, is_gpu, GPU, CPU)
    precision: Precision = "bfloat16" if is_gpu else "float32"
    with tempfile.TemporaryDirectory() as work, harness.no_fallback():
        folder = Path(work)
        write_set(folder, config)
        bench = Bench(folder, config, precision)
        rows = [measure_size(bench, size, config.rounds) for size in config.batch_sizes or ()]
    report = harness.report_of(config, weights="random", rows=rows)
    report["config"]["precision"] = precision
    return report


def random_embedder(name: str) -> NetworkEmbedder:
    """A network of timm with random weights, prepared for as its configuration says."""
    import torch

    from latentds.embedders import NetworkEmbedder
    from latentds.embedders.embedder import Preparation
    from latentds.embedders.timm_models import configured_card, create

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create(name.removeprefix("timm:"))
    card = configured_card(name.removeprefix("timm:"), network)
    dim = getattr(network, "head_hidden_size", None) or network.num_features
    card = dataclasses.replace(card, dim=dim, weights_id="random")
    return NetworkEmbedder(card, network, Preparation(card))


def write_set(folder: Path, config: Config) -> None:
    """A data set of random codes in slides, and a random decoder of such latents."""
    from latentds_tools.bench.decode_networks import STUDENTS, build_random
    from latentds_tools.bench.synthetic import random_contract, write_synthetic

    from latentds.autoencoders.autoencoder import latent_cells
    from latentds.autoencoders.decoders import save_decoder

    check_known("student", [config.student], STUDENTS)
    found, edge, patches = build_random(config.student), config.patch_size, int(config.patches or 0)
    card = dataclasses.replace(found.card, latent_id=random_contract().latent_id)
    shape = (card.channels, *latent_cells((edge, edge), card.factor))
    a_slide = -(-patches // config.slides)
    write_synthetic(folder / "set", patches, shape=shape, patch_px=edge, a_slide=a_slide)
    architecture = {"class": "student", "name": config.student}
    save_decoder(folder / "decoder", found.decoder, card, architecture, {}, name=config.student)


class Bench:
    """The same patches, embedder and device throughout, opened as 'latentds features' opens them.

    options  of the batches that are measured next
    """

    def __init__(self, folder: Path, config: Config, precision: Precision) -> None:
        import torch

        from latentds.evaluation.features.extraction import DTYPES
        from latentds.evaluation.patchsets.open_patch_sets import open_patches
        from latentds.evaluation.patchsets.patch_set import PatchInput

        given = PatchInput(
            data=folder / "set",
            decoder=str(folder / "decoder"),
            device=config.device,
            decode_dtype=precision,
            decode_compile=config.compile,
            keep_mb=0,
        )
        self.folder, self.precision = folder, precision
        self.device, self.patches = torch.device(config.device), open_patches(given)
        self.embedder = random_embedder(str(config.embedder))
        self.embedder.to(self.device, DTYPES[precision])

    def take(self, size: int) -> None:
        """Measure batches of so many patches from here on."""
        import numpy as np

        from latentds.evaluation.features.folder_records import FeatureOptions

        self.options = FeatureOptions(batch_size=size, precision=self.precision)
        self.cached = self.patches.images(np.arange(min(size, len(self.patches))))
        if self.cached.device.type != self.device.type:
            raise InputError(
                f"never engaged: decoding was to be on {self.device}, not on {self.cached.device}"
            )

    def embed_cached(self) -> None:
        """Embed one batch of decoded pictures over and over, as many patches as the set has."""
        import numpy as np

        from latentds.evaluation.features.embedding_pipeline import Piece

        size, total = self.options.batch_size, len(self.patches)
        parts = (self.cached[: min(size, total - start)] for start in range(0, total, size))
        self.embed(Piece(None, np.empty((len(part), 2), np.int64), images=part) for part in parts)

    def embed_latents(self) -> None:
        """Read, decode and embed the set as an extraction does, without writing."""
        self.embed(self.read())

    def embed(self, pieces: Iterator[Piece]) -> None:
        """Embed pieces and bring the features to the host."""
        from latentds.evaluation.features.embedding_pipeline import embed_pieces

        with contextlib.closing(embed_pieces(pieces, [self.embedder], self.device)) as embedded:
            for piece in embedded:
                if piece.error is not None:
                    raise piece.error

    def read(self) -> Iterator[Piece]:
        """Read and decode the set."""
        from latentds.evaluation.features.extraction import read_slides

        return read_slides(self.patches, self.patches.slides(), self.options)

    def decode(self) -> None:
        """Read and decode the set, without embedding."""
        for piece in self.read():
            if piece.error is not None or piece.images is None:
                raise piece.error or AssertionError("no images")

    def write_files(self) -> None:
        from latentds.evaluation.features.extraction import extract_features

        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            extract_features(
                self.patches, {Path(out): self.embedder}, self.options, device=self.device,
                rank=0, world_size=1,
            )  # fmt: skip


def measure_size(bench: Bench, size: int, rounds: int) -> dict[str, Any]:
    """Medians of one batch size; the cost is that of the same round's embedder alone."""
    bench.take(size)
    works = {
        ALONE: bench.embed_cached,
        LOADED: bench.embed_latents,
        WRITTEN: bench.write_files,
        DECODED: bench.decode,
    }
    ways = harness.timed_cases(works, bench.device)
    for name in (ALONE, LOADED):  # first batches choose kernels and fill pools
        ways[name].once()
    harness.run_cases(list(ways.values()), rounds)
    row: dict[str, Any] = {"batch_size": size, "decoded_on": str(bench.cached.device)}
    row |= {f"{name}_patches_per_s": len(bench.patches) / way.seconds for name, way in ways.items()}
    for name in (LOADED, WRITTEN):
        found = harness.cost(ways[name], ways[ALONE])
        row[f"{name}_cost_percent"] = found["percent"]
        row[f"{name}_cost_range"] = found["percent_range"]
    return row


def as_text(report: dict[str, Any]) -> str:
    config = report["config"]
    head = (
        f"{harness.machine_text(report['machine'])}; {config['embedder']} ({report['weights']} "
        f"weights) behind {config['student']} (random weights"
        f"{', compiled' if config['compile'] else ''}), {config['precision']}, "
        f"{config['patches']:,} patches of {config['patch_size']} px on {config['device']}, "
        f"medians of {config['rounds']} rounds"
    )
    devices = {"decoded_on": ", ".join(sorted({row["decoded_on"] for row in report["rows"]}))}
    header = ("batch", "embedder alone, patches/s", "from latents", "cost (range)",
              "with files written", "cost (range)", "reading and decoding alone")  # fmt: skip
    rows = [
        [
            str(row["batch_size"]),
            f"{row[f'{ALONE}_patches_per_s']:,.1f}",
            *(cell for name in (LOADED, WRITTEN) for cell in rate_and_cost(row, name)),
            f"{row[f'{DECODED}_patches_per_s']:,.1f}",
        ]
        for row in report["rows"]
    ]
    return harness.report_text(head, header, rows, "", harness.counters_text(devices))


def rate_and_cost(row: dict[str, Any], name: str) -> list[str]:
    low, high = row[f"{name}_cost_range"]
    cost = f"{row[f'{name}_cost_percent']:.1f} % ({low:.1f} to {high:.1f})"
    return [f"{row[f'{name}_patches_per_s']:,.1f}", cost]

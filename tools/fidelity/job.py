"""All that rows are measured with: what was asked for, opened, read and fitted."""
# n crops, D embedding dimensions

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_tools.fidelity.codebook_fitting import (
    FITTED,
    ON_TESTED,
    Codebooks,
    FitSample,
    FittedTables,
)
from latentds_tools.fidelity.fidelity_config import Config
from latentds_tools.fidelity.fidelity_crops import Crop, FidelityCrops, read_crops
from latentds_tools.fidelity.fidelity_plan import Autoencoders, FidelityPlan, make_plan, parse
from latentds_tools.fidelity.measuring import MeasuredOriginals
from latentds_tools.fidelity.nuclei import NucleiFinder
from latentds_tools.fidelity.report_pictures import pick_crops

from latentds.codecs import (
    CodecSpec,
    LatentCodec,
    LatentSpec,
    PictureCodec,
    PictureSpec,
    make_picture_codec,
)
from latentds.core.processes import choose_device
from latentds.errors import InputError
from latentds.evaluation.probes import load_scikit_learn

MAX_PROBED = 5000  # crops that probes are fitted to
MAX_ITERATIONS = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityJob:
    config: Config
    plan: FidelityPlan
    crops: FidelityCrops
    codebooks: Codebooks
    contact: list[int]
    device: str
    tables: FittedTables
    judges: tuple[NucleiFinder | PatchProbe, ...]

    @property
    def patch_px(self) -> tuple[int, int]:
        """(H, W) of every crop."""
        return self.config.crop_px, self.config.crop_px

    def trained(self) -> dict[str, dict[str, Any]]:
        """Settings that the decoders among the rows were trained with, by what they are called."""
        series = {row.name: self.plan.series(row) for row in self.plan.rows}
        trained = self.codebooks.autoencoders.trained
        return {series[name]: config for name, config in trained.items() if name in series}

    def codec(self, spec: CodecSpec) -> PictureCodec | LatentCodec:
        """A row's codec, fitted where it has to be."""
        if isinstance(spec, LatentSpec):
            return self.codebooks.make(spec)
        if spec.name == FITTED:
            return self.tables.codec(spec.max_bytes, spec.mean_bytes)
        return make_picture_codec(spec)

    def origin(self, spec: CodecSpec) -> dict[str, Any] | None:
        """Where a row's codebook or its tables come from, None for neither."""
        if isinstance(spec, LatentSpec):
            return self.codebooks.origin(spec)
        if spec.name != FITTED:
            return None
        card = self.plan.embedders[self.tables.embedder_name].card
        return self.codebooks.fitted() | {
            "pictures": len(self.tables.images),
            "embedder": self.tables.embedder_name,
            "weights": card.weights_id,
        }

    def card(self, spec: CodecSpec) -> Any:
        """The card of a row's autoencoder, None for pictures."""
        return self.codebooks.autoencoders.cards.get(spec.name)


def prepare(config: Config) -> FidelityJob:
    """Open all that is needed, and read the crops."""
    others = (config.fit_on, config.nuclei, config.probe_on)
    for folder in (*config.source, *(folder for folder in others if folder)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    device = str(choose_device(config.device))
    autoencoders = Autoencoders(device)
    plan = make_plan(
        config.codecs or "", config.embedder_names(), autoencoders,
        patch_px=(config.crop_px, config.crop_px), skip_missing=config.skip_missing,
    )  # fmt: skip
    crops = crops_of(config, config.source, config.patches or 1)
    sample = fit_sample(config, crops)
    check_tables(plan)
    judges: list[NucleiFinder | PatchProbe] = []
    if config.nuclei is not None:
        judges.append(NucleiFinder(config.nuclei, crops.crops, config.seed))
    if config.probe_on is not None:
        training = crops_of(config, [config.probe_on], MAX_PROBED)
        judges.append(PatchProbe(training, crops.crops, plan.embedders))
    return FidelityJob(
        config=config,
        plan=plan,
        crops=crops,
        codebooks=Codebooks(autoencoders, sample, config.seed, (config.crop_px, config.crop_px)),
        contact=pick_crops(crops.crops),
        device=device,
        tables=FittedTables(sample.images, plan.embedders),
        judges=tuple(judges),
    )


def check_tables(plan: FidelityPlan) -> None:
    """InputError for JPEG's tables fitted to no embedder, or at a quality in place of bytes."""
    for spec in plan.rows:
        if spec.name != FITTED:
            continue
        if not plan.embedders:
            raise InputError(f"--codecs: {spec.text} needs --embedders; its tables are fitted to "
                             "the last of them")  # fmt: skip
        if isinstance(spec, PictureSpec) and spec.quality is not None:
            raise InputError(f"--codecs: {spec.text} needs bytes, as {FITTED}@4096")


def crops_of(config: Config, folders: Sequence[Path], most: int) -> FidelityCrops:
    return read_crops(
        folders, crop_px=config.crop_px, per_picture=config.crops, most=most, seed=config.seed,
        slides=config.slides,
        recode=recodings(config.recode) if folders == config.source else (),
    )  # fmt: skip


def fit_sample(config: Config, crops: FidelityCrops) -> FitSample:
    """Pictures to fit codebooks on; InputError where they hold tested ones."""
    if config.fit_on is None:
        count = min(config.fit_patches, len(crops.crops))
        places = np.linspace(0, len(crops.crops) - 1, count).round().astype(int)
        images = [crops.crops[place].image for place in places.tolist()]
        return FitSample(images, ON_TESTED, crops.digest())
    check_apart(config.fit_on, config.source)
    others = crops_of(config, [config.fit_on], config.fit_patches)
    tested = {crop.picture for crop in crops.crops} | {image.tobytes() for image in crops.images}
    for crop in others.crops:
        if crop.picture in tested or crop.image.tobytes() in tested:
            raise InputError(
                f"--fit-on {config.fit_on}: holds tested pictures ({crop.source}); leave it out "
                "to fit on the tested crops"
            )
    shared = tuple(sorted(crops.known_slides() & others.known_slides()))
    origin = f"fitted on pictures of {config.fit_on.resolve().name}"
    return FitSample(others.images, origin, others.digest(), shared)


def check_apart(other: Path, tested: Sequence[Path]) -> None:
    """InputError where a folder is a tested one, lies in one or holds one."""
    own = other.resolve()
    for folder in (path.resolve() for path in tested):
        if own == folder or own in folder.parents or folder in own.parents:
            raise InputError(
                f"--fit-on {other}: holds tested pictures, or lies where they do ({folder.name}); "
                "leave it out to fit on the tested crops"
            )


def recodings(text: str | None) -> list[PictureSpec]:
    """Codecs in --recode; InputError for what is no picture format at a quality."""
    specs = parse(text, "--recode") if text else []
    found = [s for s in specs if isinstance(s, PictureSpec) and s.quality is not None]
    if len(found) < len(specs):
        raise InputError(f"--recode {text}: takes picture formats at a quality, as jpeg:80")
    return found


class PatchProbe:
    """Whether a probe tells the class of each reconstruction, one probe an embedder and slide left.

    A crop is judged by a probe that saw no crop of its slide.
    training  crops of labelled pictures: the folder that a picture lies in is its class
    crops     the tested ones, of the same slides and classes
    raises    InputError for fewer than two classes or slides, or a tested class not among them
    """

    def __init__(
        self, training: FidelityCrops, crops: Sequence[Crop], embedders: dict[str, Any]
    ) -> None:
        self.training = training.crops
        self.classes = sorted({class_of(crop) for crop in self.training})
        slides = {crop.slide for crop in self.training}
        unknown = {class_of(crop) for crop in crops} - set(self.classes)
        if len(self.classes) < 2 or len(slides) < 2 or unknown:
            raise InputError(
                f"--probe-on: {len(self.classes)} classes ({', '.join(self.classes)[:80]}) of "
                f"{len(slides)} slides; at least two of each are needed, and the tested pictures' "
                f"own ({', '.join(sorted(unknown)) or 'all there'})"
            )
        self.crops, self.embedders = crops, embedders
        self.note = (
            "Accuracy: of logistic regression of standardized embeddings of "
            f"{len(self.training):,} originals ({len(self.classes)} classes, {len(slides):,} "
            "slides), each slide by a probe without it; png's row is the originals'"
        )
        self.facts = {"probe": training.digest(), "slides": [c.slide for c in self.training]}
        self._models: dict[tuple[str, str], Any] = {}
        self._originals = MeasuredOriginals([crop.image for crop in self.training], embedders)

    def score(
        self, start: int, _: Sequence[np.ndarray], embeddings: dict[str, np.ndarray]
    ) -> dict[str, list[float | None]]:
        """1 for a class told, else 0, of the crops from `start` on; embeddings (n, D) by name."""
        scores: dict[str, list[float | None]] = {}
        for name, vectors in embeddings.items():
            part = self.crops[start : start + len(vectors)]
            told = [
                self.model(name, crop.slide).predict(vector[None])[0] == class_of(crop)
                for crop, vector in zip(part, vectors, strict=True)
            ]
            scores[f"{name}, accuracy"] = [float(is_told) for is_told in told]
        return scores

    def model(self, name: str, slide: str) -> Any:
        """The probe of an embedder without a slide."""
        if (name, slide) not in self._models:
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler

            LogisticRegression, _ = load_scikit_learn()
            kept = [n for n, crop in enumerate(self.training) if crop.slide != slide]
            labels = [class_of(self.training[n]) for n in kept]
            if len(set(labels)) < 2:
                raise InputError(f"--probe-on: without slide {slide} a single class is left")
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
            model.fit(self._originals.embeddings(name)[kept], labels)
            self._models[name, slide] = model
        return self._models[name, slide]


def class_of(crop: Crop) -> str:
    """The folder a crop's picture lies in."""
    return crop.path.parent.name

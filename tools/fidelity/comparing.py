"""The whole comparison: plan, crops, rows one at a time, report, pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from latentds_tools.bench.harness import machine
from latentds_tools.fidelity import assembling
from latentds_tools.fidelity.assembling import Groups, budget_of
from latentds_tools.fidelity.codebook_fitting import FITTED, ON_TESTED, Codebooks, FitSample
from latentds_tools.fidelity.fidelity_config import Config
from latentds_tools.fidelity.fidelity_crops import FidelityCrops, read_crops
from latentds_tools.fidelity.fidelity_page import crop_figures, pick_crops
from latentds_tools.fidelity.fidelity_plan import Autoencoders, FidelityPlan, make_plan, parse
from latentds_tools.fidelity.judges import NucleiFinder, PatchProbe
from latentds_tools.fidelity.measuring import (
    PSNR_SETTINGS,
    SIMILARITY_SETTINGS,
    SSIM_SETTINGS,
    Encoded,
    Measured,
    MeasuredOriginals,
    encode_all,
    measure,
)
from latentds_tools.fidelity.paper_rows import differences
from latentds_tools.reports.paper_tables import paper_tables

from latentds.codecs import CodecSpec, LatentSpec, PictureSpec
from latentds.core.display import progress
from latentds.core.processes import choose_device
from latentds.core.storage import canonical_json, write_atomically
from latentds.errors import InputError

FORMAT = "latentds-fidelity/1"
Kept = TypeVar("Kept", Encoded, Measured)
MAX_PROBED = 5000  # crops that probes are fitted to


def compare(config: Config) -> tuple[dict[str, Any], list[str]]:
    """The report, and HTML of the crops that its page shows."""
    job = prepare(config)
    rows = measure_rows(job)
    report = make_report(job, rows)
    originals = [job.crops.crops[number].image for number in job.contact]
    return report, crop_figures(report, originals, [row.shown for row in rows])


def measure_rows(job: FidelityJob) -> list[Measured]:
    """Every row, in the plan's order; those kept from a run before are not measured again."""
    out, images = job.config.out, job.crops.images
    kept = KeptRows(out / "rows" if out else None)
    originals = MeasuredOriginals(images, job.plan.embedders)
    done: dict[str, Measured] = {}
    # Each crop counts twice: encoded, and decoded and compared.
    with progress(total=2 * len(job.plan.rows) * len(images), unit="crop") as bar:
        for spec in job.plan.in_working_order():
            bar.set_description(spec.text[-24:])
            facts = facts_of(job, spec)
            row = kept.find(facts, Measured)
            if row is None:
                codec = job.codebooks.codec(spec)
                made = encoding_facts(job, spec)
                encoded = kept.find(made, Encoded)
                if encoded is None:
                    encoded = encode_all(codec, images, bar.update)
                    kept.keep(made, encoded)
                else:
                    bar.update(len(images))
                row = measure(codec, encoded, originals, job.contact, bar.update, job.judges)
                check_finite(row.per_crop, spec.text)
                kept.keep(facts, row)
            else:
                bar.update(2 * len(images))
            done[spec.text] = row
    return [done[spec.text] for spec in job.plan.rows]


def encoding_facts(job: FidelityJob, spec: CodecSpec) -> dict[str, Any]:
    """All that makes a row's files what they are: embedders have no part in it, nor decoders but
    those that latents are refined through."""
    is_latent = isinstance(spec, LatentSpec)
    is_refined = isinstance(spec, LatentSpec) and spec.quantizer.refine
    return {
        "codec": spec.quantizer.text if isinstance(spec, LatentSpec) else spec.text,
        "latents": job.card(spec).latent_id if is_latent else None,
        "codebook": job.codebooks.origin(spec),
        **({"decoder": job.card(spec).decoder_id} if is_refined else {}),
        "crops": job.crops.digest(),
        "machine": machine_of(job),
        "versions": assembling.versions(),
        **({"settings": spec.settings} if isinstance(spec, PictureSpec) else {}),
    }


def facts_of(job: FidelityJob, spec: CodecSpec) -> dict[str, Any]:
    card, embedders = job.card(spec), job.plan.embedders
    return encoding_facts(job, spec) | {
        "codec": spec.text,
        "autoencoder": [card.latent_id, card.decoder_id] if card else None,
        "embedders": {name: e.card.to_json() for name, e in embedders.items()},
        "contact": job.contact,
        "downstream": [judge.facts for judge in job.judges],
    }


def machine_of(job: FidelityJob) -> dict[str, Any]:
    """What rates were measured on; torch stands among the versions."""
    return {name: value for name, value in machine(job.device).items() if name != "torch"}


def make_report(job: FidelityJob, rows: Sequence[Measured]) -> dict[str, Any]:
    """The report's values; fidelity.json holds just them."""
    crops, config = job.crops, job.config
    groups = Groups(crops.crops, config.bootstrap, config.seed)
    described = []
    for spec, row in zip(job.plan.rows, rows, strict=True):
        names = (job.plan.series(spec), job.plan.label(spec))
        card, codebook = job.card(spec), job.codebooks.origin(spec)
        described.append(
            assembling.describe_row(spec, names, card, codebook, row, job.patch_px, groups)
        )
    budgets = [budget_of(spec, job.card(spec), job.patch_px) for spec in job.plan.rows]
    groups.add_differences(described, job.plan.rows, budgets)
    return {
        "format": FORMAT,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "machine": machine_of(job),
        "versions": assembling.versions(),
        "settings": {
            "similarity": SIMILARITY_SETTINGS,
            "psnr": PSNR_SETTINGS,
            "ssim": SSIM_SETTINGS,
            "container": assembling.CONTAINER,
            "packed": assembling.PACKED,
        },
        "pictures": crops.pictures,
        "kinds": crops.kinds(),
        "slide_rule": crops.slide_rule,
        "slide_rules": crops.slide_rules,
        "groups": groups.counts(),
        "embedders": {name: e.card.to_json() for name, e in job.plan.embedders.items()},
        "fitted_to": assembling.fitted_to(job.plan.rows, job.trained(), job.plan.embedders),
        "missing": job.plan.missing,
        "notes": [
            *assembling.notes(crops, job.codebooks.sample, described),
            *(f"{judge.note}." for judge in job.judges),
            *assembling.seen_notes(config.source, crops, job.trained()),
        ],
        "paper_source": paper_tables("fidelity")["source"],
        "paper_differences": differences(dataclasses.asdict(config), crops.kinds()),
        "contact": job.contact,
        "rows": described,
        "crops": [crop.to_json() for crop in crops.crops],
    }


class KeptRows:
    """Rows and their files below a folder, by a hash of all that makes them; none without a folder.

    A killed run goes on after the last; another embedder or decoder does not encode anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, facts: dict[str, Any], kind: type[Kept]) -> Kept | None:
        """What was kept under just these facts, None where nothing whole was."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{key_of(facts)}.npz", allow_pickle=False) as arrays:
                return kind.from_arrays(dict(arrays))
        except (ValueError, KeyError, EOFError, FileNotFoundError, zipfile.BadZipFile):
            return None

    def keep(self, facts: dict[str, Any], found: Encoded | Measured) -> None:
        if self.folder is None:
            return
        content = io.BytesIO()
        arrays: dict[str, Any] = found.to_arrays()
        np.savez(content, **arrays)
        write_atomically(self.folder / f"{key_of(facts)}.npz", content.getvalue())


def key_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:24]


def check_finite(values: dict[str, Any], where: str) -> None:
    """Refuse figures that are NaN: something is broken, and no table should hide it."""
    for name, column in values.items():
        if isinstance(column, dict):
            check_finite(column, where)
        elif any(isinstance(v, float) and not math.isfinite(v) for v in column):
            raise InputError(f"{where}: {name} is not finite for some crop; check its weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityJob:
    config: Config
    plan: FidelityPlan
    crops: FidelityCrops
    codebooks: Codebooks
    contact: list[int]
    device: str
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

    def card(self, spec: CodecSpec) -> Any:
        """The card of a row's autoencoder, None for pictures."""
        return self.codebooks.autoencoders.cards.get(spec.name)


def prepare(config: Config) -> FidelityJob:
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
        codebooks=Codebooks(
            autoencoders, sample, config.seed, (config.crop_px, config.crop_px), plan.embedders
        ),
        contact=pick_crops(crops.crops),
        device=device,
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

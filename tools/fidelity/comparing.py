"""The whole comparison: plan, crops, rows one at a time, report, pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_tools.fidelity import assembling
from latentds_tools.fidelity.config import Config
from latentds_tools.fidelity.contact import draw_sheet, pick_crops
from latentds_tools.fidelity.crops import Crops, read_crops
from latentds_tools.fidelity.fitting import ON_TESTED, Codebooks, FitSample, stored_codebooks
from latentds_tools.fidelity.keeping import KeptRows, check_finite
from latentds_tools.fidelity.measuring import Measured, Originals, measure
from latentds_tools.fidelity.opening import Autoencoders
from latentds_tools.fidelity.paper import differences, paper_table
from latentds_tools.fidelity.plan import Plan, make_plan
from latentds_tools.fidelity.plots import draw_plots
from latentds_tools.fidelity.quality import PSNR_SETTINGS, SIMILARITY_SETTINGS, SSIM_SETTINGS
from latentds_tools.fidelity.slide_tables import read_table
from latentds_tools.fidelity.slides import SlideOptions
from latentds_tools.fidelity.summaries import Groups

from latentds.codecs import CodecSpec, LatentSpec, PictureSpec, make_picture_codec
from latentds.errors import InputError

FORMAT = "latentds-fidelity/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that rows are measured with."""

    config: Config
    plan: Plan
    crops: Crops
    codebooks: Codebooks
    contact: list[int]
    device: str

    @property
    def patch_px(self) -> tuple[int, int]:
        """(H, W) of every crop."""
        return self.config.crop_px, self.config.crop_px

    def trained(self) -> dict[str, dict[str, Any]]:
        """For the decoders among the rows, by what they are called: how they were trained."""
        series = {row.name: self.plan.series(row) for row in self.plan.rows}
        trained = self.codebooks.autoencoders.trained
        return {series[name]: how for name, how in trained.items() if name in series}

    def card(self, spec: CodecSpec) -> Any:
        """The card of a row's autoencoder, None for pictures."""
        return self.codebooks.autoencoders.cards.get(spec.name)


def compare(config: Config) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The report, and the pictures to write beside it (none without --out)."""
    job = prepare(config)
    rows = measure_rows(job)
    report = make_report(job, rows)
    if config.out is None:
        return report, {}
    originals = [job.crops.crops[number].image for number in job.contact]
    sheet = draw_sheet(report, originals, [row.shown for row in rows])
    return report, draw_plots(report) | {"contact_sheet.png": sheet}


def prepare(config: Config) -> Job:
    """Open all that is needed, and read the crops."""
    from latentds.conversion.encode import choose_device

    for folder in (*config.source, *([config.fit_on] if config.fit_on else [])):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
    device = str(choose_device(config.device or "auto"))
    autoencoders = Autoencoders(device)
    plan = make_plan(
        config.codecs or "", config.embedder_names(), autoencoders,
        patch_px=(config.crop_px, config.crop_px), skip_missing=config.skip_missing,
    )  # fmt: skip
    crops = crops_of(config, config.source, config.patches or 1)
    stored = stored_codebooks(config.codebook, autoencoders.cards, config.refit)
    return Job(
        config=config,
        plan=plan,
        crops=crops,
        codebooks=Codebooks(autoencoders, fit_sample(config, crops), stored, config.seed),
        contact=pick_crops(config.contact, crops.crops),
        device=device,
    )


def crops_of(config: Config, folders: Sequence[Path], most: int) -> Crops:
    """Crops of folders, as the options say."""
    tables = tuple(read_table(path) for path in config.slides_table)
    return read_crops(
        folders, crop_px=config.crop_px, per_picture=config.crops, most=most, seed=config.seed,
        slides=SlideOptions(config.name_pattern, tables, config.slides),
        must_match=folders == config.source,
    )  # fmt: skip


def fit_sample(config: Config, crops: Crops) -> FitSample:
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


def measure_rows(job: Job) -> list[Measured]:
    """Every row, in the plan's order; those kept from a run before are not measured again."""
    from tqdm import tqdm

    out, images = job.config.out, job.crops.images
    kept = KeptRows(out / "rows" if out else None)
    originals = Originals(images, job.plan.embedders)
    done: dict[str, Measured] = {}
    with tqdm(total=len(job.plan.rows) * len(images), unit="crop", delay=1) as bar:
        for spec in job.plan.in_working_order():
            bar.set_description(spec.text[-24:])
            facts = facts_of(job, spec)
            row = kept.find(facts)
            if row is None:
                codec = (
                    make_picture_codec(spec)
                    if isinstance(spec, PictureSpec)
                    else job.codebooks.make(spec, job.patch_px)
                )
                row = measure(codec, originals, job.config.ssim, job.contact, bar.update)
                check_finite(row.per_crop, spec.text)
                kept.keep(facts, row)
            else:
                bar.update(len(images))
            done[spec.text] = row
    return [done[spec.text] for spec in job.plan.rows]


def facts_of(job: Job, spec: CodecSpec) -> dict[str, Any]:
    """All that makes a row what it is."""
    card, embedders = job.card(spec), job.plan.embedders
    return {
        "codec": spec.text,
        "autoencoder": [card.latent_id, card.decoder_id] if card else None,
        "codebook": job.codebooks.origin(spec) if isinstance(spec, LatentSpec) else None,
        "crops": job.crops.digest(),
        "embedders": {name: e.card.to_json() for name, e in embedders.items()},
        "ssim": job.config.ssim,
        "contact": job.contact,
        "machine": assembling.machine(job.device),
        "versions": assembling.versions(),
        **({"settings": spec.settings} if isinstance(spec, PictureSpec) else {}),
    }


def make_report(job: Job, rows: Sequence[Measured]) -> dict[str, Any]:
    """The report's values; fidelity.json holds just them."""
    crops, config = job.crops, job.config
    groups = Groups(crops.crops, config.bootstrap, config.seed)
    described = []
    for spec, row in zip(job.plan.rows, rows, strict=True):
        codebook = job.codebooks.origin(spec) if isinstance(spec, LatentSpec) else None
        names = (job.plan.series(spec), job.plan.label(spec))
        described.append(
            assembling.describe_row(
                spec, names, job.card(spec), codebook, row, job.patch_px, groups
            )
        )
    return {
        "format": FORMAT,
        "config": assembling.plain_config(dataclasses.asdict(config)),
        "machine": assembling.machine(job.device),
        "versions": assembling.versions(),
        "settings": {
            "similarity": SIMILARITY_SETTINGS,
            "psnr": PSNR_SETTINGS,
            "ssim": SSIM_SETTINGS[config.ssim],
            "container": assembling.CONTAINER,
            "packed": assembling.PACKED,
        },
        "pictures": crops.pictures,
        "kinds": crops.kinds(),
        "slide_rule": crops.slide_rule,
        "slide_rules": crops.slide_rules,
        "groups": groups.counts(),
        "embedders": {name: e.card.to_json() for name, e in job.plan.embedders.items()},
        "missing": job.plan.missing,
        "notes": [
            *assembling.notes(crops, groups.counts(), described),
            *assembling.fit_notes(job.codebooks.sample, described),
            *assembling.seen_notes(config.source, crops, job.trained()),
        ],
        "paper_source": paper_table()["source"],
        "paper_differences": differences(dataclasses.asdict(config), crops.kinds()),
        "contact": job.contact,
        "rows": described,
        "crops": [crop.to_json() for crop in crops.crops],
    }

"""What a patch classification leaves in its folder.

OUT/run.json                     settings, folds and source that the folder belongs to
OUT/fold-3/probabilities.npy     float64 (n, K) of the fold's test patches
OUT/fold-3/fold.json             its scores; written last: the fold is finished
"""
# n test patches of a fold, K classes

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from latentds_trainers.classify_patches.config import MAY_CHANGE, ClassifyConfig
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.engine.settings import jsonable

from latentds.core.randomness import digest_of
from latentds.core.storage import write_atomically
from latentds.errors import ContractError, InputError
from latentds.evaluation.patchsets.codec_fitting import codebook_note
from latentds.evaluation.records import RunRecord
from latentds.evaluation.scores import classification_scores
from latentds.evaluation.statistics import summary
from latentds.sources.csv_tables import write_table

if TYPE_CHECKING:
    from latentds_trainers.classify_patches.patch_inputs import LabelledPatches

    from latentds.embedders import EmbedderCard
    from latentds.evaluation.folds import Fold
    from latentds.evaluation.patchsets.patch_set import SourceFacts
    from latentds.evaluation.probes import FittedProbe

RUN, FOLD, PROBABILITIES = "run.json", "fold.json", "probabilities.npy"
CONFUSION = "confusion.csv"
PRIMARY = "accuracy"
COLOUR = "colour-histogram"
NCT_CRC = {"ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"}
NCT_BIAS = (
    "NCT-CRC-HE is biased: its classes differ in JPEG artefacts and colour, and a colour histogram "
    "alone reaches over 82 % accuracy (arXiv 2409.11546); see the colour-histogram row"
)
LEAK = (
    "folds are drawn patch by patch, as no patient or slide is known: patches of one patient are "
    "in training and test sets at once, and figures are higher than on new patients"
)
SHARED_TEST = (
    "all folds are tested on one test set: deviation and interval over folds do not contain the "
    "sampling error of that set"
)
MEASURED = ("data", "bytes_per_patch", "codebook")  # do not say which source it is, or say more


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """A finished fold. `colour` are the scores of its colour histograms."""

    fold: int
    seed: int
    train: int
    val: int
    test: int
    scores: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    confusion: list[list[int]]
    colour: dict[str, float | None]
    notes: list[str]

    @classmethod
    def of(
        cls,
        number: int,
        seed: int,
        fold: Fold,
        patches: LabelledPatches,
        fitted: FittedProbe,
        colour: FittedProbe,
    ) -> FoldOutcome:
        """The scores of what was fitted."""
        labels, classes = patches.labels[fold.test], patches.classes
        own = classification_scores(labels, fitted.probabilities, classes)
        histogram = classification_scores(labels, colour.probabilities, classes)
        remarks = [f"{COLOUR}: {colour.remark}" if colour.remark else "", fitted.remark]
        return cls(
            fold=number,
            seed=seed,
            **fold.sizes(),
            scores=own.values,
            per_class=own.per_class,
            confusion=own.confusion,
            colour=histogram.values,
            notes=own.notes + [remark for remark in remarks if remark],
        )


def source_identity(facts: SourceFacts) -> dict[str, Any]:
    """The facts that say which pixels they are."""
    kept = {name: value for name, value in facts.to_json().items() if name not in MEASURED}
    return kept | {"codebook_id": facts.codebook.get("codebook_id")}


def check_run(
    config: ClassifyConfig,
    ranks: int,
    *,
    split: str,
    source: dict[str, Any],
    content: Sequence[str],
    weights_id: str | None,
) -> None:
    """Claim the run's folder, or find it claimed by the same run.

    content  fingerprints of the data, and of the test set where that is a folder of its own
    raises   ContractError where its settings, folds, pixels, source or embedder's weights are
             others; InputError where its record is damaged
    """
    path, images = config.out / RUN, config.batch_size * config.accumulation * ranks
    settings = {
        name: jsonable(value)
        for name, value in dataclasses.asdict(config).items()
        if name not in MAY_CHANGE
    }
    wanted = {
        "settings": settings,
        "split_id": split,
        "data_content": content[0],
        "test_data_content": content[1] if len(content) > 1 else None,
        "source": digest_of(source),
        "embedder_weights": weights_id,
        "images_a_step": images if config.probe == "finetune" else None,
    }
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=1).encode())
        return
    found = read_json(path, wanted.keys())
    for name in sorted(settings.keys() & found["settings"].keys()):
        old, new = found["settings"][name], settings[name]
        if old != new:
            raise ContractError(
                f"{config.out} holds a run with {name} {old!r}, this one has {new!r}; set it back, "
                "or give this run another --out"
            )
    for name, what in identities(config):
        if found[name] != wanted[name]:
            raise ContractError(
                f"{config.out} holds a run with {name} {found[name]}, now it is {wanted[name]}: "
                f"{what} behind the same settings; give this run another --out"
            )
    old, new = found["images_a_step"], wanted["images_a_step"]
    if old != new:
        raise ContractError(
            f"{config.out} holds a run of {old} images a step, this one has {new} on {ranks} "
            f"ranks; choose --batch-size and --accumulation for {old}, or another --out"
        )


def identities(config: ClassifyConfig) -> list[tuple[str, str]]:
    """What a run's record has to have in common with a run that goes on, and what is else said."""
    others = "other data or weights lie"
    return [
        ("split_id", others),
        ("data_content", f"files of other content lie in {config.location}"),
        ("test_data_content", f"files of other content lie in {config.test_data}"),
        ("source", others),
        ("embedder_weights", others),
    ]


def read_json(path: Path, keys: Sequence[str] | Any) -> dict[str, Any]:
    """A JSON object with those keys; InputError where it is none."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({error}); delete {path.parent} to start anew"
        ) from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise InputError(
            f"{path}: key {missing[0]!r} is missing; delete {path.parent} to start anew"
        )
    return dict(found)


def is_finished(folder: Path) -> bool:
    """Whether a fold's folder is complete."""
    return (folder / FOLD).exists()


def write_outcome(folder: Path, outcome: FoldOutcome, probabilities: np.ndarray) -> None:
    """Write a fold's probabilities, then its scores."""
    content = io.BytesIO()
    np.save(content, probabilities.astype(np.float64), allow_pickle=False)
    write_atomically(folder / PROBABILITIES, content.getvalue())
    text = json.dumps(dataclasses.asdict(outcome), indent=1, allow_nan=False)
    write_atomically(folder / FOLD, text.encode())


def read_outcome(
    folder: Path, fold: Fold, classes: Sequence[str]
) -> tuple[FoldOutcome, np.ndarray]:
    """A finished fold's scores and probabilities; InputError that names what is damaged."""
    fields = [field.name for field in dataclasses.fields(FoldOutcome)]
    found = read_json(folder / FOLD, fields)
    path, shape = folder / PROBABILITIES, (len(fold.test), len(classes))
    try:
        probabilities = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: {error}; delete {folder} to do the fold again") from error
    if probabilities.shape != shape:
        raise InputError(
            f"{path}: {probabilities.shape}, the fold has {shape}; delete {folder} to do it again"
        )
    return FoldOutcome(**{name: found[name] for name in fields}), probabilities


def write_confusion(folder: Path, classes: Sequence[str], outcomes: Sequence[FoldOutcome]) -> None:
    """Write confusion.csv: how often a class (row) was taken for another (column).

    Folds are added up: of a test set that they share, every patch counts once a fold.
    """
    counts = np.sum([outcome.confusion for outcome in outcomes], axis=0).tolist()
    rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    write_table(folder / CONFUSION, ["label", *classes], rows)


def make_record(
    config: ClassifyConfig,
    patches: LabelledPatches,
    outcomes: Sequence[FoldOutcome],
    *,
    source: dict[str, Any],
    embedder: EmbedderCard | None,
    split: str,
    images_a_step: int | None,
) -> RunRecord:
    """The run's record; `related` holds the colour histograms' scores.

    images_a_step  of a training, over all ranks; None for a probe
    """
    colour = {
        name: summary([outcome.colour[name] for outcome in outcomes]).to_json()
        for name in outcomes[0].colour
    }
    settings = {name: jsonable(value) for name, value in dataclasses.asdict(config).items()}
    return RunRecord(
        task="classify_patches",
        data=Path(config.location).name or config.data.resolve().name,
        source=source,
        embedder=embedder.name if embedder else None,
        model=config.model,
        classes=list(patches.classes),
        seeds=[config.seed],
        split_id=split,
        split_rule=f"{config.protocol}, {config.folds} folds; groups: {patches.group_rule}",
        primary=PRIMARY,
        folds=[
            {
                "fold": o.fold, "seed": o.seed, "train": o.train, "val": o.val, "test": o.test,
                "scores": o.scores, "per_class": o.per_class,
            }
            for o in outcomes
        ],
        settings=settings
        | {
            "embedder_weights": embedder.weights_id if embedder else None,
            "images_a_step": images_a_step,
        },
        notes=notes_of(config, patches, outcomes),
        related={COLOUR: colour},
        versions=package_versions(),
        command=shlex.join(["python", "-m", "latentds_trainers.classify_patches", *sys.argv[1:]]),
    )  # fmt: skip


def notes_of(
    config: ClassifyConfig, patches: LabelledPatches, outcomes: Sequence[FoldOutcome]
) -> list[str]:
    """What a reader of the figures has to know."""
    notes = list(patches.notes)
    if {name.upper() for name in patches.classes} == NCT_CRC:
        notes.append(NCT_BIAS)
    if config.protocol != "val7k" and not patches.has_groups:
        notes.append(LEAK)
    if config.protocol == "val7k":
        notes.append(SHARED_TEST)
    if config.test_data is None:  # else the codebook is fitted to the training set alone
        codebook = patches.sets[0].facts().codebook
        notes += filter(None, [codebook_note(codebook, test_is_apart=config.protocol == "val7k")])
    for text in dict.fromkeys(note for outcome in outcomes for note in outcome.notes):
        folds = [str(outcome.fold) for outcome in outcomes if text in outcome.notes]
        notes.append(f"fold {', '.join(folds)}: {text}")
    return notes

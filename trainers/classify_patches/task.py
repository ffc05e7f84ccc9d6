"""A patch classification run: what it opens, its folds one after another, what it leaves behind."""
# N patches, K classes, n test patches of a fold

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from latentds_trainers.classify_patches.config import ClassifyConfig
from latentds_trainers.classify_patches.finetune_backbone import FoldTraining, build_classifier
from latentds_trainers.classify_patches.patch_features import (
    COLOURS,
    FEATURES,
    FeatureStore,
    embedding,
    make_features,
)
from latentds_trainers.classify_patches.patch_inputs import (
    LabelledPatches,
    as_read,
    open_labelled,
    open_latents,
    protocol_folds,
)
from latentds_trainers.crossval.cross_validation import (
    Cell,
    CrossValidation,
    FoldOutcome,
    Tested,
    pooled_predictions,
    run_record,
    run_table,
    spread,
    write_result,
)
from latentds_trainers.engine.ranks import from_first, join_ranks, on_all_ranks
from latentds_trainers.engine.settings import plain

from latentds.core.randomness import digest_of
from latentds.embedders import NetworkEmbedder, embedder_loader
from latentds.embedders.latent_backbone import LatentBackbone
from latentds.embedders.latent_stem import check_cells
from latentds.embedders.timm_models import check_name
from latentds.errors import InputError
from latentds.evaluation.folds import Fold
from latentds.evaluation.patchsets.developing import codebook_note
from latentds.evaluation.patchsets.open_patch_sets import UndecodedPatches
from latentds.evaluation.patchsets.patch_set import SourceFacts
from latentds.evaluation.predictions import write_predictions
from latentds.evaluation.probes import (
    FittedProbe,
    colour_probe,
    eva_probe,
    linear_probe,
    nearest_neighbours,
)
from latentds.evaluation.scores import classification_scores
from latentds.evaluation.statistics import summary
from latentds.sources.csv_tables import write_table
from latentds.sources.slide_names import some

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


class ClassifyTask:
    """A run: patches and folds are the same on every rank; rank 0 fits probes and writes."""

    def __init__(self, config: ClassifyConfig) -> None:
        self.config = config
        self.device = join_ranks()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        name = config.embedder
        load = None if name is None else on_all_ranks(lambda: embedder_loader(name))
        if config.arch is not None:
            on_all_ranks(lambda: check_name(config.arch or ""))
        self.patches = on_all_ranks(lambda: open_labelled(as_read(config, self.device)))
        self.folds = on_all_ranks(lambda: protocol_folds(config, self.patches))
        self.crossval = CrossValidation(
            task="classify_patches",
            out=config.out,
            items=self.patches.items,
            groups=self.patches.groups,
            folds=self.folds,
            cells=[(number, config.seed) for number in range(len(self.folds))],
        )
        self.embedder: NetworkEmbedder | None = None
        if load is not None:
            self.embedder = on_all_ranks(lambda: load().to(self.device))
        self.inputs, self.latents = on_all_ranks(self.open_inputs)
        self.facts = from_first(lambda: self.inputs.sets[0].facts())
        self.source = source_identity(self.facts)
        self.content = from_first(lambda: [part.fingerprint() for part in self.patches.sets])
        pixels = self.source | {"content": self.content}
        if self.embedder is None:
            on_all_ranks(self.check_arch)
        card = None if self.embedder is None else self.embedder.card
        self.claim()
        self.store = FeatureStore(config.out, self.patches, pixels, card, config.precision)

    def open_inputs(self) -> tuple[LabelledPatches, UndecodedPatches | None]:
        """What networks read of the patches, and how latents are laid out where those are it."""
        if self.config.input == "images":
            return self.patches, None
        stem = None
        if self.embedder is not None:
            if not isinstance(self.embedder, LatentBackbone):
                raise InputError(
                    f"--embedder {self.config.embedder}: reads pictures; --input latents needs a "
                    "backbone pretrained on latents, latent-dir:FOLDER"
                )
            stem = self.embedder.stem
        return open_latents(as_read(self.config, self.device), self.patches, stem)

    @property
    def images_a_step(self) -> int | None:
        """Images of an optimizer step over all ranks; None for a probe."""
        if self.config.probe != "finetune":
            return None
        return self.config.batch_size * self.config.accumulation * self.ranks

    def claim(self) -> None:
        identity = {
            "data_content": self.content[0],
            "test_data_content": self.content[1] if len(self.content) > 1 else None,
            "source": digest_of(self.source),
            "embedder_weights": None if self.embedder is None else self.embedder.card.weights_id,
            "images_a_step": self.images_a_step,
            "splits": plain(self.config)["splits"],  # a table of them may set labels
        }
        self.crossval.claim(plain(self.config), identity)

    def check_arch(self) -> None:
        """Build the network once, so that a wrong name or file is told before anything is done."""
        classes, latents, arch = len(self.patches.classes), self.latents, self.config.arch or ""
        stem = latents.stem if latents else None
        network: Any = build_classifier(arch, classes, stem, weights=self.config.weights)
        if latents is not None:
            patch_px = network.patch_embed.patch_size[0]
            check_cells(arch, patch_px, latents.cells)

    def run(self) -> None:
        features = self.features()
        outcomes = self.crossval.outcomes(lambda cell: self.test(cell, features))
        from_first(lambda: self.report(outcomes))

    def report(self, outcomes: Sequence[FoldOutcome]) -> None:
        config, patches, embedder = self.config, self.patches, self.embedder
        colours = [outcome.facts["colour"] for outcome in outcomes]
        colour = {name: summary(row[name] for row in colours) for name in colours[0]}
        record = run_record(
            self.crossval,
            outcomes,
            data=Path(config.location).name or config.data.resolve().name,
            source=self.facts.to_json(),
            embedder=embedder.card.name if embedder else None,
            model=config.model,
            classes=list(patches.classes),
            split_rule=f"{config.protocol}, {config.folds} folds; groups: {patches.group_rule}",
            primary=PRIMARY,
            settings=plain(config)
            | {
                "embedder_weights": embedder.card.weights_id if embedder else None,
                "images_a_step": self.images_a_step,
            },
            notes=notes_of(config, patches, outcomes),
            related={COLOUR: {name: found.to_json() for name, found in colour.items()}},
        )
        write_confusion(config.out, patches.classes, outcomes)
        predictions = pooled_predictions(self.crossval, outcomes, patches.labels, patches.classes)
        write_predictions(config.out, predictions)
        height, width = record.source["patch_px"]
        with_what = f"{record.model} of {record.embedder}" if embedder else record.model
        text = run_table(
            record,
            f"{record.data}: {len(patches):,} patches of {width}x{height} px, "
            f"{len(record.classes)} classes; {with_what}",
            shown=record.metrics(),
            rows={COLOUR: {name: spread(found) for name, found in colour.items()}},
            per_class=("recall", "precision", "f1"),
        )
        write_result(config.out, record, text, is_json=config.json)

    def features(self) -> dict[str, np.ndarray]:
        """Features of all patches, once all ranks have made theirs; on rank 0 alone."""
        embed = None if self.embedder is None else embedding(self.embedder, self.config.precision)
        on_all_ranks(
            lambda: make_features(
                self.store,
                self.patches,
                embed,
                batch_size=self.config.batch_size,
                rank=self.rank,
                ranks=self.ranks,
                inputs=None if self.latents is None else self.inputs,
            )
        )
        found: dict[str, np.ndarray] = {}
        from_first(lambda: found.update(self.store.read()))
        return found

    def test(self, cell: Cell, features: dict[str, np.ndarray]) -> Tested:
        """A fold's probe or network on its test patches. Collective.

        features  on rank 0
        """
        tuned = None
        if self.config.probe == "finetune":
            tuned = FittedProbe(self.finetune(cell))

        def score() -> Tested:
            fitted = tuned or self.probe(cell.fold, features[FEATURES])
            colour = self.fit(features[COLOURS], cell.fold, colour_probe)
            return score_fold(self.patches, cell.fold, fitted, colour, features[COLOURS])

        tested: Tested = from_first(score)
        return tested

    def finetune(self, cell: Cell) -> np.ndarray:
        """Probabilities (n, K) of a network trained on the fold. Collective."""
        stem = None if self.latents is None else self.latents.stem
        probabilities = FoldTraining(self.config, cell, self.inputs, stem).run()
        gc.collect()  # DeepSpeed's engine refers to itself: its memory is wanted for the next fold
        return probabilities

    def probe(self, fold: Fold, features: np.ndarray) -> FittedProbe:
        config = self.config
        if config.probe == "eva":
            val = features[fold.val], self.patches.labels[fold.val]
            options: dict[str, Any] = {"seed": config.seed, "standardize": config.standardize}
            return self.fit(features, fold, eva_probe, val=val, **options)
        if config.probe == "knn":
            return self.fit(features, fold, nearest_neighbours, neighbours=config.neighbours)
        options = {"penalty": config.penalty, "standardize": config.standardize}
        return self.fit(features, fold, linear_probe, **options)

    def fit(
        self, features: np.ndarray, fold: Fold, probe: Callable[..., FittedProbe], **options: object
    ) -> FittedProbe:
        labels, classes = self.patches.labels[fold.train], len(self.patches.classes)
        return probe(features[fold.train], labels, features[fold.test], classes, **options)


def score_fold(
    patches: LabelledPatches,
    fold: Fold,
    fitted: FittedProbe,
    colour: FittedProbe,
    colours: np.ndarray,
) -> Tested:
    """The scores of what was fitted; beside them, those of colour histograms (N, 96)."""
    labels, classes = patches.labels[fold.test], patches.classes
    own = classification_scores(labels, fitted.probabilities, classes)
    histogram = classification_scores(labels, colour.probabilities, classes)
    remarks = [f"{COLOUR}: {colour.remark}" if colour.remark else "", fitted.remark]
    return Tested(
        found=np.asarray(fitted.probabilities, np.float64).tolist(),
        scores=own.values,
        per_class=own.per_class,
        notes=[*own.notes, *filter(None, remarks)],
        facts={
            "confusion": own.confusion,
            "colour": histogram.values,
            "copies": [patches.items[row] for row in find_copies(fold, colours)],
        },
    )


def find_copies(fold: Fold, colours: np.ndarray) -> list[int]:
    """Tested rows that have the very colour histogram of a patch trained on, as copies have.

    Copies that are turned or mirrored are found too; patches of one colour level are left out.
    """
    trained = {colours[row].tobytes() for row in fold.train.tolist()}
    return [
        row
        for row in fold.test.tolist()
        if np.count_nonzero(colours[row]) > len("RGB") and colours[row].tobytes() in trained
    ]


def source_identity(facts: SourceFacts) -> dict[str, Any]:
    """The facts that say which pixels they are."""
    kept = {name: value for name, value in facts.to_json().items() if name not in MEASURED}
    return kept | {"codebook_id": facts.codebook.get("codebook_id")}


def write_confusion(out: Path, classes: Sequence[str], outcomes: Sequence[FoldOutcome]) -> None:
    """Write confusion.csv: how often a class (row) was taken for another (column).

    Folds are added up: of a test set that they share, every patch counts once a fold.
    """
    counts = np.sum([outcome.facts["confusion"] for outcome in outcomes], axis=0).tolist()
    rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    write_table(out / CONFUSION, ["label", *classes], rows)


def notes_of(
    config: ClassifyConfig, patches: LabelledPatches, outcomes: Sequence[FoldOutcome]
) -> list[str]:
    notes = list(patches.notes)
    if {name.upper() for name in patches.classes} == NCT_CRC:
        notes.append(NCT_BIAS)
    if config.protocol != "val7k" and len(set(patches.groups)) == len(patches.groups):
        notes.append(LEAK)
    if config.protocol == "val7k":
        notes.append(SHARED_TEST)
    copies = list(dict.fromkeys(n for outcome in outcomes for n in outcome.facts.get("copies", ())))
    if copies:
        notes.append(
            f"{len(copies):,} tested patches are in training too, it seems, as copies that may be "
            f"turned or mirrored (every colour is as frequent in both): {some(copies)}. Take them "
            "out, or name in --groups what belongs together"
        )
    if config.test_data is None:  # else the codebook is fitted to the training set alone
        codebook = patches.sets[0].facts().codebook
        notes += codebook_note(codebook, test_is_apart=config.protocol == "val7k")
    for text in dict.fromkeys(note for outcome in outcomes for note in outcome.notes):
        folds = [str(outcome.fold) for outcome in outcomes if text in outcome.notes]
        notes.append(f"fold {', '.join(folds)}: {text}")
    return notes

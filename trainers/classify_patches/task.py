"""A patch classification run: what it opens, its folds one after another, what it leaves behind."""
# N patches, K classes, n test patches of a fold

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist
from latentds_trainers.classify_patches.classify_results import (
    FoldOutcome,
    check_run,
    is_finished,
    make_record,
    read_outcome,
    source_identity,
    write_confusion,
    write_outcome,
)
from latentds_trainers.classify_patches.classify_table import print_table
from latentds_trainers.classify_patches.config import ClassifyConfig
from latentds_trainers.classify_patches.finetune_backbone import FoldTraining, fold_config
from latentds_trainers.classify_patches.patch_features import (
    FeatureStore,
    PatchFeatures,
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
from latentds_trainers.engine.ranks import from_first, join_ranks, on_all_ranks

from latentds.core.display import say
from latentds.core.randomness import digest_of
from latentds.embedders import load_embedder
from latentds.embedders.latent_backbone import LatentBackbone
from latentds.embedders.latent_stem import check_cells
from latentds.errors import InputError
from latentds.evaluation.eva_probe import Examples, eva_probe
from latentds.evaluation.folds import Fold, split_id
from latentds.evaluation.patchsets.undecoded import UndecodedPatches
from latentds.evaluation.predictions import fold_predictions, join_predictions, write_predictions
from latentds.evaluation.probes import (
    FittedProbe,
    colour_probe,
    linear_probe,
    nearest_neighbours,
)
from latentds.evaluation.records import write_record
from latentds.evaluation.splits import write_clam_splits
from latentds.models.backbones import build_classifier, build_latent_classifier

logger = logging.getLogger(__name__)


class ClassifyTask:
    """A run: patches and folds are the same on every rank; rank 0 fits probes and writes."""

    def __init__(self, config: ClassifyConfig) -> None:
        self.config = config
        self.device = join_ranks()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.patches = on_all_ranks(lambda: open_labelled(as_read(config, self.device)))
        self.folds = on_all_ranks(lambda: protocol_folds(config, self.patches))
        self.split_id = split_id(self.folds, self.patches.items)
        self.embedder = None
        if config.embedder is not None:
            name = config.embedder
            self.embedder = on_all_ranks(lambda: load_embedder(name).to(self.device))
        self.inputs, self.latents = on_all_ranks(self.open_inputs)
        self.facts = from_first(lambda: self.inputs.sets[0].facts())
        self.source = source_identity(self.facts)
        self.content = from_first(lambda: [part.fingerprint() for part in self.patches.sets])
        self.pixels = self.source | {"content": self.content}
        if self.embedder is None:
            on_all_ranks(self.check_arch)
        card = None if self.embedder is None else self.embedder.card
        self.weights_id = card.weights_id if card else None
        from_first(self.claim)
        self.store = FeatureStore(config.out, self.patches, self.pixels, card, config.precision)

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

    def claim(self) -> None:
        """Make the run's folder this run's, with its folds in CLAM's files."""
        out = self.config.out
        check_run(
            self.config,
            self.ranks,
            split=self.split_id,
            source=self.source,
            content=self.content,
            weights_id=self.weights_id,
        )
        write_clam_splits(out / "splits", self.folds, self.patches.items)

    def check_arch(self) -> None:
        """Build the network once, so that a wrong name or file is told before anything is done."""
        config, classes = self.config, len(self.patches.classes)
        if self.latents is None:
            build_classifier(config.arch or "", classes, weights=config.weights)
            return
        arch, stem = config.arch or "", self.latents.stem
        network = build_latent_classifier(arch, classes, stem, weights=config.weights)
        check_cells(arch, network.patch_embed.patch_size[0], self.latents.cells)

    def run(self) -> None:
        """Do the folds that are left, write the record, print it."""
        features = self.features()
        for number, fold in enumerate(self.folds):
            folder = self.config.out / f"fold-{number}"
            if from_first(lambda folder=folder: is_finished(folder)):
                logger.info("fold %d is finished", number)
                continue
            self.do_fold(number, fold, folder, features)
        from_first(self.finish)

    def features(self) -> PatchFeatures | None:
        """Features of all patches on rank 0, once all ranks have made theirs."""
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
        found: list[PatchFeatures] = []
        from_first(lambda: found.append(self.store.read()))
        return found[0] if found else None

    def do_fold(
        self, number: int, fold: Fold, folder: Path, features: PatchFeatures | None
    ) -> None:
        """One fold, from training to its files."""
        config, tested = self.config, None
        if config.probe == "finetune":
            tested = FittedProbe(self.finetune(number, fold, folder))

        def finish() -> None:
            assert features is not None
            fitted = tested or self.probe(fold, features)
            colour = self.fit(features.colours, fold, colour_probe)
            outcome = FoldOutcome.of(number, config.seed, fold, self.patches, fitted, colour)
            write_outcome(folder, outcome, fitted.probabilities)
            told = ", ".join(f"{k} {v:.4f}" for k, v in outcome.scores.items() if v is not None)
            logger.info("fold %d: %s", number, told)

        from_first(finish)

    def finetune(self, number: int, fold: Fold, folder: Path) -> np.ndarray:
        """Probabilities (n, K) of a network trained on the fold. Collective."""
        settings = fold_config(
            self.config, folder, number, len(fold.train), self.split_id, digest_of(self.pixels)
        )
        stem = None if self.latents is None else self.latents.stem
        probabilities = FoldTraining(settings, self.inputs, fold, stem).run()
        gc.collect()  # DeepSpeed's engine refers to itself: its memory is wanted for the next fold
        return probabilities

    def probe(self, fold: Fold, features: PatchFeatures) -> FittedProbe:
        """The probe of frozen features that the config names."""
        config = self.config
        assert features.features is not None
        if config.probe == "eva":
            return self.eva_probe(fold, features.features)
        if config.probe == "knn":
            return self.fit(
                features.features, fold, nearest_neighbours, neighbours=config.neighbours
            )
        return self.fit(
            features.features,
            fold,
            linear_probe,
            penalty=config.penalty,
            standardize=config.standardize,
        )

    def eva_probe(self, fold: Fold, features: np.ndarray) -> FittedProbe:
        """A linear layer trained on the fold, stopped by its validation part."""
        labels = self.patches.labels
        train, val = (
            Examples(features=features[r], labels=labels[r]) for r in (fold.train, fold.val)
        )
        return eva_probe(
            train,
            val,
            features[fold.test],
            len(self.patches.classes),
            seed=self.config.seed,
            standardize=self.config.standardize,
        )

    def fit(
        self, features: np.ndarray, fold: Fold, probe: Callable[..., FittedProbe], **options: object
    ) -> FittedProbe:
        """A probe of features (N, D) on the fold."""
        labels, classes = self.patches.labels[fold.train], len(self.patches.classes)
        return probe(features[fold.train], labels, features[fold.test], classes, **options)

    def finish(self) -> None:
        """On rank 0: result.json, predictions.csv, confusion.csv, the table."""
        config, patches = self.config, self.patches
        found = [read_outcome(config.out / f"fold-{n}", f, patches.classes)
                 for n, f in enumerate(self.folds)]  # fmt: skip
        predictions = [
            fold_predictions(
                outcome.fold,
                outcome.seed,
                items=[patches.items[row] for row in fold.test.tolist()],
                groups=[patches.groups[row] for row in fold.test.tolist()],
                labels=patches.labels[fold.test],
                probabilities=probabilities,
                classes=patches.classes,
            )
            for (outcome, probabilities), fold in zip(found, self.folds, strict=True)
        ]
        embedder = None if self.embedder is None else self.embedder.card
        record = make_record(
            config,
            patches,
            [outcome for outcome, _ in found],
            source=self.facts.to_json(),
            embedder=embedder,
            split=self.split_id,
            images_a_step=config.batch_size * config.accumulation * self.ranks
            if config.probe == "finetune"
            else None,
        )
        write_confusion(config.out, patches.classes, [outcome for outcome, _ in found])
        write_predictions(config.out, join_predictions(predictions))
        write_record(config.out, record)
        if config.json:
            say(json.dumps(record.to_json(), indent=1))
        else:
            print_table(record, [outcome for outcome, _ in found], len(patches))

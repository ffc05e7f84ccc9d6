"""A cross-validation of bags: its folds, each trained once, and what the run leaves behind."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from latentds_trainers.abmil.bag_draws import Part, check_parts, part_of
from latentds_trainers.abmil.bag_heat_maps import draw_heat_maps
from latentds_trainers.abmil.bag_report import (
    WEIGHTS,
    FoldOutcome,
    bags_a_step,
    fold_outcome,
    report,
)
from latentds_trainers.abmil.bag_source import LabelledBags, open_labelled
from latentds_trainers.abmil.bag_training import BagFoldTraining, build_network, predict
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.engine.ranks import from_first, join_ranks, on_all_ranks
from latentds_trainers.engine.run_folders import claim_folder, fold_folder, read_fold, write_fold
from torch import Tensor

from latentds.errors import unknown_name
from latentds.evaluation.folds import Fold, split_id, stratified_group_folds
from latentds.evaluation.splits import (
    PATHO_BENCH,
    read_splits,
    write_clam_splits,
    write_patho_bench,
)
from latentds.models.attention_mil import save_abmil

logger = logging.getLogger(__name__)

# When a run goes on: where things lie, how they are read, what is shown. What lies there is
# compared by its names and facts.
MAY_CHANGE = frozenset(
    {
        *("out", "bags", "data", "labels", "groups", "splits", "slides", "root", "workers"),
        *("device", "keep_mb", "cache_gb", "save_every", "heat_maps", "heat_map_slides"),
        *("tensorboard", "json", "embed_batch", "repeats"),
        *("batch_size", "accumulation"),  # of which bags_a_step tells
    }
)
REMEDIES = {  # by what differs; a setting is set back
    "bags_a_step": "choose --batch-size and --accumulation for as many on these ranks",
    "data_content": "give the patches it was started with",
}
NEWER = ("bags_a_step", "data_content")


class BagTask:
    """A run over all folds: opens bags and labels, trains, tests, reports."""

    def __init__(self, config: AbmilConfig) -> None:
        self.config = config
        # An epoch is a line of log.jsonl; of some thousands, the terminal is told the folds alone.
        logging.getLogger("latentds_trainers.engine.training_log").setLevel(logging.WARNING)
        self.device = join_ranks()
        self.labelled: LabelledBags = open_labelled(config, self.device)
        self.folds = on_all_ranks(self.make_folds)
        on_all_ranks(self.check_heat_maps)
        from_first(self.claim_folder)
        from_first(self.write_splits)

    def make_folds(self) -> list[Fold]:
        """The folds, from the split files or drawn; each checked."""
        config, slides = self.config, self.labelled.slides
        if config.splits is not None:
            folds = read_splits(
                config.splits, slides.slides, slides.groups, allow_subset=config.allow_subset
            )
        else:
            folds = stratified_group_folds(
                slides.targets,
                slides.groups,
                folds=config.folds,
                seed=config.seed,
                val=config.folds > 2,
                classes=slides.classes,
            )
        for number, fold in enumerate(folds):
            check_parts(number, *self.parts(fold), config)
        return folds

    def parts(self, fold: Fold) -> tuple[Part, Part, Part]:
        """Bags to train on, to validate on, to test."""
        slides = self.labelled.slides
        train, val, test = (
            part_of(slides.slides, numbers, slides.targets)
            for numbers in (fold.train, fold.val, fold.test)
        )
        return train, val, test

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is of, beside its settings: features, labels, folds."""
        folder, slides = self.labelled.bags.folder, self.labelled.slides
        rows = [slides.slides, slides.groups, slides.targets.tolist(), slides.classes]
        return {
            "features": {
                "embedder": folder.embedder.get("name"),
                "weights_id": folder.embedder.get("weights_id", ""),
                "dim": folder.dim,
                "source": folder.source.get("name", ""),
                "content_id": folder.content_id(slides.slides),
            },
            "labels_id": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
            "split_id": split_id(self.folds, slides.slides),
            "bags_a_step": bags_a_step(self.config),
        } | self.patches_identity()

    def patches_identity(self) -> dict[str, Any]:
        """What is stored of the patches whose features the run makes itself."""
        patches = self.labelled.patches
        if self.config.bags is not None or patches is None:
            return {}
        return {"data_content": patches.fingerprint()}

    def claim_folder(self) -> None:
        """Write what the run is, or see that the folder is of the same one.

        raises  ContractError that names what differs
        """
        settings = self.config.to_json()
        values = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
        if not self.config.on_the_fly:
            del values["on_the_fly"]  # runs of versions without it go on
        claim_folder(self.config.out, values | self.identity, REMEDIES, NEWER)

    def write_splits(self) -> None:
        """The folds as CLAM and Patho-Bench read them."""
        slides, folder = self.labelled.slides, self.config.out / "splits"
        write_clam_splits(folder, self.folds, slides.slides)
        labels = [slides.classes[target] for target in slides.targets.tolist()]
        write_patho_bench(
            folder / PATHO_BENCH, self.folds, slides.slides, cases=slides.groups, labels=labels
        )

    def run(self) -> None:
        """Train and test what is not finished; write and print the result; draw heat maps."""
        outcomes = [
            self.outcome(number, fold, self.config.seed + repeat)
            for number, fold in enumerate(self.folds)
            for repeat in range(self.config.repeats)
        ]
        identity = split_id(self.folds, self.labelled.slides.slides)
        from_first(lambda: report(self.config, self.labelled, identity, outcomes))
        draw_heat_maps(self.config, self.labelled, outcomes, self.device)

    def outcome(self, number: int, fold: Fold, seed: int) -> FoldOutcome:
        """What a fold came to: as it was found finished, or trained and tested now."""
        folder = fold_folder(self.config.out, number, seed, self.config.seed)
        found: FoldOutcome | None = from_first(lambda: read_fold(folder, FoldOutcome))
        if found is not None:
            logger.info("fold %d, seed %d: finished before", number, seed)
            return found
        train, val, test = self.parts(fold)
        bags, classes = self.labelled.bags, self.labelled.slides.classes
        training = BagFoldTraining(
            self.config,
            bags,
            train=train,
            val=val,
            classes=len(classes),
            seed=seed,
            out=folder,
        )
        weights = training.run()
        network = build_network(self.config, bags.dim, len(classes)).to(self.device)
        network.load_state_dict(weights)
        tested = predict(network, bags, test, self.device)
        outcome = fold_outcome(
            self.labelled,
            fold,
            number=number,
            seed=seed,
            probabilities=tested.probabilities,
            epochs=training.epochs,
            stopping=training.stopping,
            select=self.config.settings.select,
            seconds=training.engine.seconds,
        )
        from_first(lambda: self.keep(folder, weights, outcome))
        return outcome

    def keep(self, folder: Path, weights: dict[str, Tensor], outcome: FoldOutcome) -> None:
        """Write the fold's weights, then what it came to: the fold is finished.

        Its checkpoints go.
        """
        slides = self.labelled.slides
        facts = {
            "classes": slides.classes,
            "dim": self.labelled.bags.dim,
            "embedder": self.labelled.bags.folder.embedder.get("name"),
            **self.config.settings.layers,
        }
        save_abmil(folder / WEIGHTS, weights, facts)
        write_fold(folder, outcome)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 20 MB that nothing reads again
        logger.info("%s", outcome.line())

    def check_heat_maps(self) -> None:
        """UnknownNameError for a slide that is not there, before hours of training."""
        known = {slide for fold in self.folds for slide in self.parts(fold)[2].slides}
        for slide in self.config.heat_map_slides:
            if slide not in known:
                raise unknown_name("tested slide", slide, known)

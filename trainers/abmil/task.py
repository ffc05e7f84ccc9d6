"""A cross-validation of bags: its folds, each trained once, and what the run leaves behind."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from latentds_trainers.abmil.bag_source import open_bags
from latentds_trainers.abmil.bag_training import (
    BagFoldTraining,
    Part,
    build_network,
    logits_of,
    predict,
)
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.abmil.heat_map import chosen_slides, draw_heat_map, write_heat_map
from latentds_trainers.crossval.cross_validation import (
    Cell,
    CrossValidation,
    FoldOutcome,
    Tested,
    pooled_predictions,
    run_record,
    run_table,
    told_settings,
    write_result,
)
from latentds_trainers.engine.ranks import from_first, join_ranks, on_all_ranks

from latentds.core.display import number_of
from latentds.errors import InputError, unknown_name
from latentds.evaluation.features.folder import FeatureFolder, LiveFeatures
from latentds.evaluation.features.folder_records import flat
from latentds.evaluation.folds import Fold, check_trained, read_splits, stratified_group_folds
from latentds.evaluation.groups import LabelledSlides
from latentds.evaluation.patchsets.developing import codebook_note
from latentds.evaluation.predictions import write_predictions
from latentds.evaluation.scores import classification_scores
from latentds.models.attention_mil import load_abmil, save_abmil
from latentds.sources.slide_names import some

logger = logging.getLogger(__name__)
WEIGHTS = "model.safetensors"  # of a fold
SHOWN = ("auc", "balanced_accuracy", "accuracy", "macro_f1")


class BagTask:
    def __init__(self, config: AbmilConfig) -> None:
        self.config = config
        # An epoch is a line of log.jsonl; of some thousands, the terminal is told the folds alone.
        logging.getLogger("latentds_trainers.engine.training_log").setLevel(logging.WARNING)
        self.device = join_ranks()
        self.bags, self.patches = open_bags(config, self.device, self.plan)
        slides, seeds = self.slides, range(config.seed, config.seed + config.repeats)
        self.crossval = CrossValidation(
            task="abmil",
            out=config.out,
            items=slides.slides,
            groups=slides.groups,
            folds=self.folds,
            cells=[(number, seed) for number in range(len(self.folds)) for seed in seeds],
        )
        self.crossval.claim(config.to_json(), from_first(lambda: self.identity))

    def plan(self, slides: LabelledSlides) -> None:
        """Make the folds of these slides. Collective."""
        self.slides = slides
        self.folds = on_all_ranks(self.make_folds)
        on_all_ranks(self.check_heat_maps)

    def make_folds(self) -> list[Fold]:
        config, slides = self.config, self.slides
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
        check_trained(folds, slides.targets, slides.classes)
        bare = [number for number, fold in enumerate(folds) if not len(fold.val)]
        if bare and config.settings.select == "best":
            raise InputError(
                f"fold {bare[0]}: no slide to validate on, by which the best weights are chosen; "
                "take --folds 3 or more, give splits that have some, or --select last"
            )
        return folds

    def parts(self, fold: Fold) -> tuple[Part, Part, Part]:
        """Bags to train on, to validate on, to test."""
        slides = self.slides
        train, val, test = (
            Part(slides=[slides.slides[row] for row in rows.tolist()], targets=slides.targets[rows])
            for rows in (fold.train, fold.val, fold.test)
        )
        return train, val, test

    @property
    def bags_a_step(self) -> int:
        return self.config.batch_size * self.config.accumulation * dist.get_world_size()

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is of: features, labels; the patches whose features it makes."""
        folder, slides = self.bags.folder, self.slides
        patches = self.patches if self.config.bags is None else None
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
            "bags_a_step": self.bags_a_step,
            "data_content": patches.fingerprint() if patches is not None else None,
        }

    def run(self) -> None:
        outcomes = self.crossval.outcomes(self.test, keeps_checkpoints=False)  # 20 MB a fold
        from_first(lambda: self.report(outcomes))
        truths = dict(zip(self.slides.slides, self.slides.targets.tolist(), strict=True))
        for slide, outcome in chosen_slides(self.config, outcomes, truths):
            from_first(partial(self.draw, slide, truths[slide], outcome))

    def report(self, outcomes: Sequence[FoldOutcome]) -> None:
        config, slides, folder = self.config, self.slides, self.bags.folder
        predictions = pooled_predictions(self.crossval, outcomes, slides.targets, slides.classes)
        write_predictions(config.out, predictions)
        place = config.data or config.bags
        made = f"{config.folds} folds by seed"
        if config.splits:
            made = f"splits of {config.splits.name}"
        source = folder.source or {"name": "features", "kind": "features"}
        lost, found = folder.left_out, dict.fromkeys(n for o in outcomes for n in o.notes)
        have = number_of(len(lost), "slide has", "slides have")
        record = run_record(
            self.crossval,
            outcomes,
            data=place.name if place else "",
            source=source,
            embedder=str(folder.embedder.get("name") or "") or None,
            model="abmil",
            classes=slides.classes,
            split_rule=f"{made}; {len(set(slides.groups))} groups: {slides.group_rule}",
            primary=SHOWN[0],
            settings=told_settings(config)
            | feature_settings(folder)
            | {"bags_a_step": self.bags_a_step},
            notes=[
                *slides.notes,
                *codebook_note(source.get("codebook"), test_is_apart=False),
                *([f"{have} no features: {some(list(lost))}."] if lost else []),
                *tested_again(outcomes),
                *found,
            ],
        )
        text = run_table(
            record,
            f"{record.data}: {len(record.classes)} classes ({', '.join(record.classes)}), features "
            f"{record.embedder or 'unknown'} of {source['name']}",
            shown=SHOWN,
        )
        write_result(config.out, record, text, is_json=config.json)

    def draw(self, slide: str, truth: int, outcome: FoldOutcome) -> None:
        """A slide's heat map with the weights of a fold that tested it. On rank 0."""
        config, classes = self.config, self.slides.classes
        weights = self.crossval.cell(outcome.fold, outcome.seed).folder / WEIGHTS
        network, _ = load_abmil(weights)
        logits, attention = logits_of(network.to(self.device), self.bags, slide, self.device)
        chances = torch.softmax(logits.double(), 0).tolist()
        best = chances.index(max(chances))
        title = (
            f"{slide}: {classes[truth]}, predicted {classes[best]} ({chances[best]:.2f}), "
            f"tested in fold {outcome.fold}"
        )
        (coords, size_px), shares = self.bags.coords(slide), attention.double().numpy()
        png = draw_heat_map(
            slide, shares, coords, title=title, size_px=size_px, patches=self.patches
        )
        path = write_heat_map(config.out / "heat_maps", slide, png, shares, coords)
        logger.info("heat map in %s", path)

    def test(self, cell: Cell) -> Tested:
        train, val, test = self.parts(cell.fold)
        bags, classes = self.bags, self.slides.classes
        training = BagFoldTraining(
            self.config,
            bags,
            train=train,
            val=val,
            classes=len(classes),
            seed=cell.seed,
            out=cell.folder,
        )
        weights = training.run()
        network = build_network(self.config, bags.dim, len(classes)).to(self.device)
        network.load_state_dict(weights)
        probabilities = predict(network, bags, test, self.device)[0]
        embedder = bags.folder.embedder.get("name")
        facts = {"classes": classes, "dim": bags.dim, "embedder": embedder}
        facts |= self.config.settings.layers
        from_first(lambda: save_abmil(cell.folder / WEIGHTS, weights, facts))
        scores = classification_scores(test.targets, probabilities, classes)
        epochs, stopping = training.epochs, training.stopping
        select = self.config.settings.select
        return Tested(
            found=probabilities.tolist(),
            scores=scores.values,
            per_class=scores.per_class,
            notes=[
                *(f"fold {cell.number}: {note}" for note in scores.notes),
                *best_is_last(cell.number, epochs, stopping.epoch, select),
            ],
            facts={
                "epochs": epochs,
                "chosen_epoch": stopping.epoch if select == "best" else epochs,
                "validation_loss": stopping.lowest,
            },
            seconds=round(training.engine.seconds, 2),
        )

    def check_heat_maps(self) -> None:
        """UnknownNameError for a slide that is not there, before hours of training."""
        known = {slide for fold in self.folds for slide in self.parts(fold)[2].slides}
        for slide in self.config.heat_map_slides:
            if slide not in known:
                raise unknown_name("tested slide", slide, known)


def best_is_last(number: int, epochs: int, best: int, select: str) -> list[str]:
    """A sentence where a fold's best epoch is the last one: it may not have come to its end."""
    if select != "best" or best < epochs:
        return []
    return [
        f"fold {number}: the best epoch is the last one ({epochs}); longer training (--epochs) "
        "might have found a better one"
    ]


def tested_again(outcomes: Sequence[FoldOutcome]) -> list[str]:
    """That several folds test the same slides, as Monte-Carlo splits and shared test sets do."""
    folds: dict[str, set[int]] = {}
    for outcome in outcomes:
        for slide in outcome.items:
            folds.setdefault(slide, set()).add(outcome.fold)
    again = sum(len(found) > 1 for found in folds.values())
    if not again:
        return []
    return [
        f"{again:,} of {len(folds):,} slides are tested in more than one fold: folds are no "
        "independent test sets, and deviation and interval over them are too small"
    ]


def feature_settings(folder: FeatureFolder | LiveFeatures) -> dict[str, Any]:
    """The embedder's weights, and the options that features.json records, by dotted names."""
    options = flat(folder.record.options, "features.") if folder.record else {}
    return {"embedder.weights_id": folder.embedder.get("weights_id", ""), **options}

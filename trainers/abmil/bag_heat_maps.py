"""Heat maps of a finished run: which slides, by which fold's weights, into OUT/heat_maps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from latentds_trainers.abmil.bag_source import LabelledBags
from latentds_trainers.abmil.bag_training import logits_of
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.abmil.heat_map import draw_heat_map, write_heat_map
from latentds_trainers.crossval.cross_validation import CrossValidation
from latentds_trainers.crossval.run_folders import FoldOutcome
from latentds_trainers.engine.ranks import from_first
from torch import Tensor

from latentds.models.attention_mil import load_abmil

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


def draw_heat_maps(
    config: AbmilConfig,
    labelled: LabelledBags,
    run: CrossValidation,
    outcomes: Sequence[FoldOutcome],
    device: torch.device,
) -> None:
    """Draw the slides that are asked for, each with the weights of a fold that tested it.

    Rank 0 does. Collective, slide by slide: embedding one on the fly may take a while.
    """
    truths = dict(zip(labelled.slides.slides, labelled.slides.targets.tolist(), strict=True))
    for slide, outcome in chosen_slides(config, outcomes, truths):
        weights = run.cell(outcome.fold, outcome.seed).folder / WEIGHTS
        title = partial(title_of, slide, labelled.slides.classes, truths[slide], outcome.fold)
        from_first(partial(draw, config, labelled, slide, weights, title, device))


def draw(
    config: AbmilConfig,
    labelled: LabelledBags,
    slide: str,
    weights: Path,
    title: Callable[[Tensor], str],
    device: torch.device,
) -> None:
    """Draw a slide by a fold's weights, with a title that follows from its logits."""
    bags = labelled.bags
    network, _ = load_abmil(weights)
    logits, attention = logits_of(network.to(device), bags, slide, device)
    coords, size_px = bags.coords(slide)
    shares = attention.double().numpy()
    png = draw_heat_map(
        slide,
        shares,
        coords,
        title=title(logits),
        size_px=size_px,
        patches=labelled.patches,
    )
    path = write_heat_map(config.out / "heat_maps", slide, png, shares, coords)
    logger.info("heat map in %s", path)


def title_of(slide: str, classes: list[str], truth: int, fold: int, logits: Tensor) -> str:
    probabilities = torch.softmax(logits.double(), 0)
    taken = int(probabilities.argmax())
    return (
        f"{slide}: {classes[truth]}, predicted {classes[taken]} ({probabilities[taken]:.2f}), "
        f"tested in fold {fold}"
    )


def chosen_slides(
    config: AbmilConfig, outcomes: Sequence[FoldOutcome], truths: Mapping[str, int]
) -> list[tuple[str, FoldOutcome]]:
    """Slides to draw, with the fold that tested them: those named, and some of every class.

    Of the others, folds and classes take turns.

    truths  class of every slide
    """
    tested: dict[str, FoldOutcome] = {}
    for outcome in outcomes:
        for slide in outcome.items:
            tested.setdefault(slide, outcome)
    ranks: dict[tuple[int, int], int] = {}
    order = []
    for slide, outcome in tested.items():
        key = (outcome.fold, truths[slide])
        ranks[key] = ranks.get(key, -1) + 1
        order.append((ranks[key], *key, slide))
    names = [*config.heat_map_slides, *(row[-1] for row in sorted(order)[: config.heat_maps])]
    return [(slide, tested[slide]) for slide in dict.fromkeys(names)]

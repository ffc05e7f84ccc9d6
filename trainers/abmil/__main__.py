"""Attention-based multiple-instance learning over folds: a slide's label from its patches.

    deepspeed --module latentds_trainers.abmil --bags brca-features/ --labels labels.csv \\
        --folds 10 --out runs/abmil
    python -m latentds_trainers.abmil --data tma-latents/ --embedder uni --labels labels.csv \\
        --folds 5 --heat-maps 4 --out runs/tma

A bag is the features of one slide, one vector a patch. Features come from files in TRIDENT's or
CLAM's layout, or from patches, once for OUT/features or at every draw (--on-the-fly). Folds keep
patients together; the fold after the tested one validates. Every fold has its folder OUT/fold-<i>.
The same command resumes after an interruption and skips finished folds. The result is in
OUT/result.json, predictions.csv and splits/.
"""

from __future__ import annotations

from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.engine.launching import launch, take_device

USUAL = ("bags", "labels", "data", "embedder", "preset", "folds", "device")  # options


def main(config: AbmilConfig) -> None:
    take_device(config.device)
    from latentds_trainers.abmil.task import BagTask

    BagTask(config).run()


if __name__ == "__main__":
    launch(main, AbmilConfig, __doc__, usual=USUAL)

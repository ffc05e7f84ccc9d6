"""Classify patches: a probe of frozen features, or a network of timm trained as a whole.

    deepspeed --module latentds_trainers.classify_patches --data crc-latents/ --embedder uni \\
        --probe linear --protocol val7k --folds 10 --out runs/nct
    deepspeed --module latentds_trainers.classify_patches --data NCT-CRC-HE-100K/ \\
        --test-data CRC-VAL-HE-7K/ --protocol val7k --codec jpeg:10 --probe finetune \\
        --arch resnet18 --epochs 10 --out runs/nct-jpeg10-resnet18

Data are originals, originals through a codec, or latents: with the same folds, seed and settings
only the source of the pixels differs. Folds keep groups together if groups are known. Colour
histograms are classified as well, as a baseline of colour alone. One process (`python -m`) or many
ranks; the same command resumes a killed run. The result is in OUT/result.json and predictions.csv;
'latentds compare' sets runs side by side.
"""

from __future__ import annotations

from latentds_trainers.classify_patches.config import ClassifyConfig
from latentds_trainers.engine.launching import launch, take_device

USUAL = ("data", "embedder", "probe", "protocol", "folds", "device")  # options


def main(config: ClassifyConfig) -> None:
    take_device(config.device)
    from latentds_trainers.classify_patches.task import ClassifyTask

    ClassifyTask(config).run()


if __name__ == "__main__":
    launch(main, ClassifyConfig, __doc__, usual=USUAL)

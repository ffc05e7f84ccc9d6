"""Label every pixel: SAM-Path (frozen SAM and pathology encoder), or a plain U-Net beside it.

    deepspeed --module latentds_trainers.sampath --data bcss-latents/ --preset bcss \\
        --sam facebook/sam-vit-base --pathology-encoder hipt@vit256_small_dino.pth --out runs/bcss
    python -m latentds_trainers.sampath --data images/ --masks masks/ --folds 4 --model unet \\
        --out runs/nuclei-unet

Images are originals, originals through a codec, or latents, their masks lossless: give the same
folds and settings and only the source differs. Every fold is a run of its own in OUT/fold-<i>,
skipped when it is finished; the same command goes on after an interruption. Whole images are
tested with the weights of the last step. Scores land in OUT/result.json, correct ones and those
SAM-Path's own code would report, per image in OUT/images.csv, pictures in OUT/predictions/.

SAM-Path's warm-up and milestones are steps of its batches: with more ranks, a smaller --batch-size
or --accumulation keeps them; a run that departs from them says so.
"""

from __future__ import annotations

from latentds_trainers.engine.launching import launch, take_device
from latentds_trainers.sampath.config import SampathConfig

USUAL = ("data", "masks", "preset", "model", "folds", "device")  # options


def main(config: SampathConfig) -> None:
    take_device(config.device)
    from latentds_trainers.sampath.task import SegmentationRun

    SegmentationRun(config).run()


if __name__ == "__main__":
    launch(main, SampathConfig, __doc__, usual=USUAL)

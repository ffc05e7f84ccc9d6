"""Label every pixel: SAM-Path (frozen SAM and pathology encoder), or a plain U-Net beside it.

    deepspeed --module latentds_trainers.sampath --data bcss-latents/ --preset bcss \\
        --sam facebook/sam-vit-base --pathology-encoder hipt@vit256_small_dino.pth --out runs/bcss
    python -m latentds_trainers.sampath --data images/ --masks masks/ --folds 4 --model unet \\
        --out runs/nuclei-unet

Images are originals, originals through a codec, or latents; masks are lossless. With the same
folds and settings only the source of the images differs. Every fold has its folder OUT/fold-<i>.
The same command resumes after an interruption and skips finished folds. Whole images are tested
with the weights of the last step. OUT/result.json has correct scores and those that SAM-Path's own
code would report, OUT/images.csv scores per image, OUT/predictions/ pictures.

SAM-Path's warm-up and milestones count steps of its batches. With more ranks, a smaller
--batch-size or --accumulation keeps them; a run that departs from them says so.
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

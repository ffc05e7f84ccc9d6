"""Train a foundation model without labels: DINO, DINOv2-like or MAE, on a ViT of timm.

    deepspeed --module latentds_trainers.pretrain --data brca/ crc/ prad/ --weights 0.5 0.3 0.2 \\
        --method dino --arch vit_small_patch16_224 --global-batch-size 1024 --out runs/ssl
    python -m latentds_trainers.pretrain --data brca/ --method mae --input latents \\
        --global-batch-size 64 --steps 1000 --device cpu --out runs/mae

Patches are decoded latents, latents without decoding (--input latents), or, as a baseline,
originals as they are or through a codec (--originals). One process (`python -m`) or many ranks; the
same command continues from the newest checkpoint, on any number of ranks. OUT/backbone is a model
of timm; OUT/result.json has the run's images, bytes, seconds and probe scores.
"""

from __future__ import annotations

from latentds_trainers.engine.launching import launch, take_device
from latentds_trainers.pretrain.config import PretrainConfig

USUAL = ("data", "method", "arch", "global_batch_size", "steps", "device")  # options


def main(config: PretrainConfig) -> None:
    take_device(config.device)
    from latentds_trainers.pretrain.task import PretrainTask

    PretrainTask(config).run()


if __name__ == "__main__":
    launch(main, PretrainConfig, __doc__, usual=USUAL)

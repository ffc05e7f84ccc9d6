"""Fine-tune a decoder, or train a small student, for latents that do not change.

    deepspeed --module latentds_trainers.finetune_decoder --data tcga-latents/ \\
        --originals patches/ --autoencoder dcae-f32 --embedder uni --out runs/dcae-path
    python -m latentds_trainers.finetune_decoder --pictures tiles/ --autoencoder sd15 \\
        --student turbo-s --out runs/student

The loss is L1 + PatchGAN + embedding L1 of a frozen pathology encoder, after Yellapragada et al.
2025, section 3.2, and latent-diffusion. The encoder is frozen, so stored latents can be decoded by
the result. One process (`python -m`) or many ranks (`deepspeed`, `torchrun`), CPU or GPU; the same
command resumes. The decoder is in OUT/decoder, figures before and after in OUT/report.json.
"""

from __future__ import annotations

from latentds_trainers.engine.launching import launch
from latentds_trainers.finetune_decoder.config import FinetuneConfig

USUAL = ("data", "originals", "autoencoder", "embedder", "preset")  # options


def main(config: FinetuneConfig) -> None:
    from latentds_trainers.finetune_decoder.task import DecoderTask

    DecoderTask(config).run()


if __name__ == "__main__":
    launch(main, FinetuneConfig, __doc__, usual=USUAL)

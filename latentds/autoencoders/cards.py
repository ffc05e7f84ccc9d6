"""Autoencoders known by name. A new one is a file that has its card, and a line here."""

from __future__ import annotations

from latentds.autoencoders.autoencoder import AutoencoderCard

TINY = AutoencoderCard(
    name="tiny-v1",
    class_name="Tiny",
    channels=4,
    factor=8,
    licence="Apache-2.0",
    loader="latentds.autoencoders.tiny:load_tiny",
)
CARDS = {
    "tiny-v1": TINY,
    "tiny-v2": AutoencoderCard(
        name="tiny-v2",
        class_name="Tiny",
        channels=32,
        factor=8,
        licence="Apache-2.0",
        loader="latentds.autoencoders.codec_folder:load_embedded",
    ),
    **{
        name: AutoencoderCard(
            name=name,
            class_name="student",
            channels=32,
            factor=8,
            licence="Apache-2.0",
            encoder="tiny-v2",
            loader="latentds.autoencoders.codec_folder:load_embedded",
        )
        for name in ("tiny-v2-fast", "tiny-v2-cpu")
    },
    # The paper's "SD-1.5" is this fine-tune of its VAE (reproduced from the authors' weight
    # repositories).
    "sd15": AutoencoderCard(
        name="sd15",
        class_name="AutoencoderKL",
        repository="stabilityai/sd-vae-ft-ema",
        revision="f04b2c4b98319346dad8c65879f680b1997b204a",
        channels=4,
        factor=8,
        licence="MIT",
    ),
    "sd3": AutoencoderCard(
        name="sd3",
        class_name="AutoencoderKL",
        repository="stabilityai/stable-diffusion-3.5-large",
        subfolder="vae",
        revision="ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
        channels=16,
        factor=8,
        licence="Stability AI Community License",
        gated=True,
    ),
    # No commit of the repositories without a revision could be confirmed offline: the commit that
    # was loaded is resolved from the Hub and recorded, and latent_id pins the weights themselves.
    "dcae-f32": AutoencoderCard(
        name="dcae-f32",
        class_name="AutoencoderDC",
        repository="mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",
        channels=32,
        factor=32,
        licence="Apache-2.0",
    ),
    "dcae-f32-mix": AutoencoderCard(
        name="dcae-f32-mix",
        class_name="AutoencoderDC",
        repository="mit-han-lab/dc-ae-f32c32-mix-1.0-diffusers",
        channels=32,
        factor=32,
        licence="Apache-2.0",
    ),
    "taesd": AutoencoderCard(
        name="taesd",
        class_name="AutoencoderTiny",
        repository="madebyollin/taesd",
        revision="614f76814bbe30edbe2e627ace1c2234c81a2c0e",
        channels=4,
        factor=8,
        licence="MIT",
    ),
    "taesd3": AutoencoderCard(
        name="taesd3",
        class_name="AutoencoderTiny",
        repository="madebyollin/taesd3",
        channels=16,
        factor=8,
        licence="MIT",
    ),
    # The weights of Yellapragada et al. 2025: decoders fine-tuned on pathology, encoders as they
    # were, so latent_id should be the base's; it is computed from what is loaded, as everywhere.
    # Their model cards state no licence and do not say which of the two DC-AE is the base.
    "sd15-path": AutoencoderCard(
        name="sd15-path",
        class_name="AutoencoderKL",
        repository="StonyBrook-CVLab/sd-vae-ft-ema-path",
        channels=4,
        factor=8,
        licence="unknown (fine-tuned from weights under MIT)",
    ),
    "sd3-path": AutoencoderCard(
        name="sd3-path",
        class_name="AutoencoderKL",
        repository="StonyBrook-CVLab/sd-3.5-large-vae-path",
        channels=16,
        factor=8,
        licence="unknown (fine-tuned from weights under Stability AI Community License)",
    ),
    "dcae-f32-path": AutoencoderCard(
        name="dcae-f32-path",
        class_name="AutoencoderDC",
        repository="StonyBrook-CVLab/dc-ae-f32c32-path",  # in efficientvit's format
        channels=32,
        factor=32,
        licence="unknown (fine-tuned from weights under Apache-2.0)",
    ),
}
# Repositories are names too; a card with a subfolder is one part of its repository.
ALIASES = {"tiny": "tiny-v1"} | {
    card.repository: name for name, card in CARDS.items() if card.repository and not card.subfolder
}
SHORT_NAMES = [name for name in (*CARDS, *ALIASES) if "/" not in name]

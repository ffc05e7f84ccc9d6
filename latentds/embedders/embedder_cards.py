"""Cards of the embedders known by name, and those whose code is not ours to run.

Rules as the authors publish them: UNI and UNI 2 in their README (torchvision's Resize(224), thus
bilinear), Prov-GigaPath in its README (a 256 px patch is cropped, not resized), Phikon-v2 in the
`preprocessor_config.json` beside its weights, which is followed where it is there; Virchow2,
H-optimus and Midnight on their pages on the Hub. H-optimus takes patches of 224 px as they are;
others are resized as TRIDENT v0.3 does it, which has the same figures for all of these. The rule
of CONCH v1.5 is taken from TRIDENT alone.
"""

from __future__ import annotations

from typing import Any

from latentds.embedders.embedder import EmbedderCard

IMAGENET = "ImageNet mean and std"
TO_224 = f"shorter edge to 224 px (bilinear), centre crop of 224 px, {IMAGENET}; class token"
GATED: Any = {"file": "pytorch_model.bin", "licence": "CC-BY-NC-ND-4.0", "gated": True}
# No commit of the gated repositories could be confirmed offline: the commit that was loaded is
# recorded on the card, and weights_id pins the weights themselves.
CARDS = {
    "uni": EmbedderCard(
        name="uni",
        class_name="vit_large_patch16_224",
        dim=1024,
        rule=TO_224,
        interpolation="bilinear",
        multiple_px=16,
        repository="MahmoodLab/UNI",
        **GATED,
    ),
    "uni2-h": EmbedderCard(
        name="uni2-h",
        class_name="vit_giant_patch14_224",
        dim=1536,
        rule=TO_224,
        interpolation="bilinear",
        multiple_px=14,
        repository="MahmoodLab/UNI2-h",
        **GATED,
    ),
    "conch-v1.5": EmbedderCard(
        name="conch-v1.5",
        class_name="vit_large_patch16_224",
        dim=768,
        rule=f"shorter edge to 448 px (bilinear), centre crop of 448 px, {IMAGENET}; one learned "
        "query over all tokens",
        resize_px=448,
        input_px=448,
        interpolation="bilinear",
        repository="MahmoodLab/conchv1_5",
        file="pytorch_model_vision.bin",
        licence="CC-BY-NC-ND-4.0",
        gated=True,
    ),
    "gigapath": EmbedderCard(
        name="gigapath",
        class_name="vit_giant_patch14_dinov2",
        dim=1536,
        rule=f"shorter edge to 256 px (bicubic), centre crop of 224 px, {IMAGENET}; class token",
        resize_px=256,
        multiple_px=16,
        repository="prov-gigapath/prov-gigapath",
        file="pytorch_model.bin",
        licence="terms of its Hub page (research)",
        gated=True,
    ),
    "virchow2": EmbedderCard(
        name="virchow2",
        class_name="vit_huge_patch14_224",
        dim=2560,
        rule=f"shorter edge to 224 px (bicubic), centre crop of 224 px, {IMAGENET}; class token "
        "beside the mean of the patch tokens, registers left out",
        multiple_px=14,
        repository="paige-ai/Virchow2",
        **GATED,
    ),
    **{
        name: EmbedderCard(
            name=name,
            class_name="vit_giant_patch14_reg4_dinov2",
            dim=1536,
            rule="shorter edge to 224 px (bilinear), centre crop of 224 px, its own mean and std; "
            "class token",
            interpolation="bilinear",
            multiple_px=14,
            mean=(0.707223, 0.578729, 0.703617),
            std=(0.211883, 0.230117, 0.177517),
            repository=f"bioptimus/{name.capitalize()}",
            file="pytorch_model.bin",
            licence=licence,
            gated=True,
        )
        for name, licence in (("h-optimus-0", "Apache-2.0"), ("h-optimus-1", "CC-BY-NC-ND-4.0"))
    },
    "midnight": EmbedderCard(
        name="midnight",
        class_name="Dinov2Model",
        dim=3072,
        rule="shorter edge to 224 px (bilinear), centre crop of 224 px, mean and std 0.5; class "
        "token beside the mean of the patch tokens",
        interpolation="bilinear",
        multiple_px=14,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        repository="kaiko-ai/midnight",
        licence="MIT",
    ),
    "phikon-v2": EmbedderCard(
        name="phikon-v2",
        class_name="Dinov2Model",
        dim=1024,
        rule=f"shorter edge to 224 px (bicubic), centre crop of 224 px, {IMAGENET}; class token",
        multiple_px=16,
        repository="owkin/phikon-v2",
        licence="Owkin non-commercial licence",
    ),
    "efficientnet-lite0": EmbedderCard(
        name="efficientnet-lite0",
        class_name="tf_efficientnet_lite0",
        dim=1280,
        rule="shorter edge to 224 px (bicubic), centre crop of 224 px, (x * 255 - 127) / 128; "
        "pooled features",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        file="efficientnet-lite0-57934424.pth",
        licence="Apache-2.0",
    ),
}
KAIKO = "timm:hf-hub:1aurent/{}.kaiko_ai_towards_large_pathology_fms"
# Names for repositories in timm's format, whose own configuration says how to prepare images.
ALIASES = {
    "kaiko-vits8": KAIKO.format("vit_small_patch8_224"),
    "kaiko-vits16": KAIKO.format("vit_small_patch16_224"),
    "kaiko-vitb8": KAIKO.format("vit_base_patch8_224"),
    "kaiko-vitb16": KAIKO.format("vit_base_patch16_224"),
    "kaiko-vitl14": KAIKO.format("vit_large_patch14_reg4_dinov2"),
}
OWN_CODE = (
    "its network is code of its repository ({}), which is not run from here; install it, and pass "
    "'--embedder FILE.py:FUNCTION' with a function of yours that makes it (docs/downstream.md)"
)
ELSEWHERE = {
    "hibou-b": OWN_CODE.format("histai/hibou-b"),
    "hibou-l": OWN_CODE.format("histai/hibou-L, gated"),
}


def describe() -> str:
    """The list: name, dimensions, licence, preparation and pooling, and how to get the weights."""
    lines = []
    for name, card in CARDS.items():
        place = card.repository or "comes with a package"
        access = f"gated: accept its licence at https://huggingface.co/{place}, 'hf auth login'"
        lines += [
            f"{name:<20} {card.dim:>5}  {card.licence}",
            f"    {card.rule}",
            f"    {access if card.gated else place}",
        ]
    lines += [f"{name:<20}        {place}" for name, place in ALIASES.items()]
    lines += [f"{name:<20}        {reason}" for name, reason in ELSEWHERE.items()]
    return "\n".join(lines)

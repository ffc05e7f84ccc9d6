"""The embedders known by name, as a list to read, and those whose code is not ours to run."""

from __future__ import annotations

from latentds.embedders.embedder_cards import CARDS

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

"""What `augment=` of a loader means: a changed picture of every patch, drawn from its seed."""

from __future__ import annotations

from latentds.errors import InputError
from latentds.views.multicrop import MultiCrop


def find_augment(
    augment: bool | MultiCrop, patch_px: tuple[int, int], decode: str, others: dict[str, bool]
) -> MultiCrop:
    """The augmentation asked for.

    augment  True for MultiCrop.preset("supervised") in the patches' own size, or a MultiCrop of one
             global crop
    others   options that it cannot stand beside, by name, and whether they are set
    raises   ValueError for what cannot be augmented, InputError for patches that are not square
    """
    if decode != "pixels":
        raise ValueError(f"augment= changes pixels; it needs decode='pixels', not {decode!r}")
    for name, is_set in others.items():
        if is_set:
            raise ValueError(
                f"augment= beside {name}=: {name} would not be changed along; leave one"
            )
    if augment is True:
        height, width = patch_px
        if height != width:
            raise InputError(
                f"patches of {width}x{height} px, and augment=True keeps a size that is square; "
                "pass augment=MultiCrop.preset('supervised', global_px=...)"
            )
        return MultiCrop.preset("supervised", global_px=height)
    if not isinstance(augment, MultiCrop):
        raise TypeError(f"augment={augment!r}; True, or a MultiCrop of one global crop")
    if (augment.globals, augment.locals) != (1, 0):
        raise ValueError(
            f"augment= has {augment.globals} global and {augment.locals} local crops; one global "
            "crop takes the image's place, views= is for several"
        )
    return augment

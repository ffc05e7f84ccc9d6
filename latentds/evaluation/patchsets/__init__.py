"""Patches of any source behind one interface: originals, a codec on the fly, latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentds.evaluation.patchsets.open_patch_sets import open_patches

__all__ = ["open_patches"]


def __getattr__(name: str) -> Any:
    if name == "open_patches":  # torch is loaded with it
        from latentds.evaluation.patchsets import open_patch_sets

        return open_patch_sets.open_patches
    raise AttributeError(f"module 'latentds.evaluation.patchsets' has no attribute {name!r}")

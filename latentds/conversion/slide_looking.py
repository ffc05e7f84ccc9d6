"""What a conversion keeps of every slide to be looked at: counts, reasons, a small picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from latentds.conversion.conversion_plan import Plan
from latentds.sources.picture import Picture
from latentds.sources.slide_looks import SlideLook
from latentds.store.manifest import left_out_text
from latentds.store.slide_records import SlideRecord


def slide_records(
    plan: Plan, left_out: Sequence[Mapping[str, Any]], hide: Callable[[str], str] | None
) -> list[SlideRecord]:
    """Every slide of a plan, those that were left out included; empty where it has no slides.

    left_out  the manifest's entries
    hide      what stands for names
    """
    if not plan.source.has_looks:
        return []
    name, words = hide or str, {str(entry["source"]): entry for entry in left_out}
    counts = np.bincount(plan.regions["picture"], minlength=len(plan.pictures)).tolist()
    records = []
    for picture, count in zip(plan.pictures, counts, strict=True):
        look = plan.source.look(picture)
        if look is not None:
            entry = words.pop(name(picture.source), None)
            records.append(record_of(picture, look, count, entry, name))
    bare = [
        SlideRecord(source=source, slide=None, left_out=(left_out_text(dict(entry)),))
        for source, entry in words.items()
    ]
    return records + bare


def record_of(
    picture: Picture,
    look: SlideLook,
    planned: int,
    entry: Mapping[str, Any] | None,
    name: Callable[[str], str],
) -> SlideRecord:
    """The record of a slide of which so many patches were planned and `entry` was left out."""
    lost = 0 if entry is None else int(entry.get("patches", planned))
    told = () if entry is None else (left_out_text(dict(entry)),)
    return SlideRecord(
        source=name(picture.source),
        slide=None if picture.slide is None else name(picture.slide),
        split=picture.split,
        label=picture.label,
        mpp_level0=look.mpp_level0,
        mpp=look.mpp,
        size_px=look.size_px,
        tissue=look.tissue,
        places=look.places,
        patches=planned - lost,
        left_out=(*look.left_out, *told),
        picture_jpeg=look.picture_jpeg,
    )

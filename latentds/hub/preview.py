"""The preview of a published set: a few decoded patches that the Hub's viewer shows as pictures."""
# G golden patches

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

from latentds.store.golden import read_golden
from latentds.store.reader import ShardSet

# A tar like the shards, not Parquet: `datasets` picks one builder for a repository, by the first
# config's files, and hands every config's files to it. A Parquet config beside data/*.tar fails
# with "ReadError: truncated header" (datasets 5.2, streaming or not).
PREVIEW = "preview/preview-000000.tar"
PICTURE, LABEL, SLIDE = "decoded.png", "label.txt", "slide.txt"
PREVIEW_PX = 256  # a patch of the usual size as it is, larger ones made smaller


def make_preview(folder: Path) -> bytes:
    """A WebDataset shard, a sample a golden patch: its decoded picture, label and slide.

    The golden patches are used because they were decoded by the recorded decoder when the set was
    made: a preview needs no weights and no network, and shows what the set's maker saw.
    """
    shards = ShardSet(folder)
    manifest = shards.manifest
    golden = read_golden(folder, manifest.contract, manifest.patches, manifest.golden_sha256)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, row in enumerate(golden.rows):
            patch = shards.patches[row]
            sample = {PICTURE: encode_picture(Image.fromarray(golden.decoded[place]))}
            if patch["label"] >= 0:  # one that has none reads as null
                sample[LABEL] = manifest.classes[patch["label"]].encode()
            if patch["slide"] >= 0:
                sample[SLIDE] = manifest.slides[patch["slide"]].encode()
            for name, content in sample.items():
                member = tarfile.TarInfo(f"{place:06d}.{name}")  # mtime 0, no owner: same bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def encode_picture(picture: Image.Image) -> bytes:
    """PNG of at most PREVIEW_PX a side."""
    picture.thumbnail((PREVIEW_PX, PREVIEW_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

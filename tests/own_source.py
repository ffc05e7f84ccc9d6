"""The patches of an array in a .npy file: a source of one's own, in one file."""

import numpy as np

from latentds.sources.picture import Header, Listing, Picture
from latentds.sources.source import Source
from latentds.store.patch_record import Patch


class ArrayFile(Source):
    kind = "an array of patches"

    def __init__(self, path):
        self.array = np.load(path, mmap_mode="r")

    @classmethod
    def detect(cls, found):
        return cls(found.root) if found.root.suffix == ".npy" else None

    def listing(self):
        return Listing(tuple(Picture(f"{i:06d}", "train") for i in range(len(self.array))))

    def header(self, picture):
        return Header(self.array.shape[1:3], "RGB", "npy", self.array[0].nbytes)

    def read(self, picture, header, patch_px, regions):
        image = np.array(self.array[int(picture.source)])
        return [Patch(image=image, source=picture.source, source_encoding="npy")]

"""What a set made with --anonymize tells whoever has a list of names and not the key."""

from pathlib import Path

import numpy as np
import pytest

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.converting import convert
from latentds.core.display import left_out_text
from latentds.errors import REASONS, InputError, UnusableError
from latentds.sources.cut_options import Anonymizer
from latentds.sources.picture import Header, Listing, Picture
from latentds.sources.source import Source
from latentds.store.manifest import Manifest
from latentds.store.patch_record import Patch
from tests.conftest import save_pictures, smooth_picture
from tests.fakes import MeanAutoencoder

SLIDES = [f"HOSP-{number:03d}" for number in range(24)]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital")
    for slide in SLIDES:
        save_pictures(folder / "a" / slide, 1)
    return folder


def slides_on_disk(source, key, **options) -> list[str]:
    """Slides in the order on disk, or with the splits they are dealt to."""
    plan = make_plan(ConvertConfig(source=source, out=key.parent / "out", anonymize=key, **options))
    found = [plan.pictures[number] for number in plan.regions["picture"].tolist()]
    return [f"{picture.split}/{picture.slide}" for picture in found]


@pytest.mark.parametrize(
    "options",
    [{}, {"order": "path"}, {"pack_by_slide": True}, {"mix": 5}, {"seed": 3}],
    ids=["shuffle", "path", "by slide", "mix", "another seed"],
)
def test_the_order_on_disk_is_that_of_hashes(hospital, tmp_path, options):
    keys = tmp_path / "a.key", tmp_path / "b.key"
    first, second = (slides_on_disk(hospital, key, **options) for key in keys)
    same = sum(one == other for one, other in zip(first, second, strict=True))
    assert sorted(first) == sorted(second) and same <= 8  # by chance one of 24
    assert first == slides_on_disk(hospital, keys[0], **options)  # and the key alone decides


def test_the_order_by_slide_or_path_is_just_the_hashes_order(hospital, tmp_path):
    found = slides_on_disk(hospital, tmp_path / "key", order="path")
    hide = Anonymizer(tmp_path / "key")
    hashes = [hide(name.removeprefix("train/")) for name in found]
    assert hashes == sorted(hashes)


def test_splits_are_dealt_by_hashes(hospital, tmp_path):
    options = {"split_patients": "train=0.5,test=0.5", "patient_pattern": ".*", "order": "path"}
    first, second = (set(slides_on_disk(hospital, tmp_path / key, **options)) for key in "ab")
    assert first != second


def test_names_do_not_matter_without_a_key():
    assert ConvertConfig(source=Path("in"), out=Path("out")).hide("x") == "x"


NAME = "Jane Doe"
ERRORS = {
    "unusable": lambda name: [UnusableError(f"{name} is bad", reason) for reason in REASONS],
    "input": lambda name: [InputError(f"{name}"), InputError(f"cannot: be {name}, no")],
    "system": lambda name: [OSError(5, name), PermissionError(13, "denied", f"/a/{name}"),
                            FileNotFoundError(f"no {name}")],
}  # fmt: skip


class Named(Source):
    """A picture for every error, whose words name it; a good one; one without patches."""

    kind = "named"
    notes = (f"{NAME} was here",)

    def __init__(self, errors, is_late):
        self.errors, self.is_late = errors, is_late

    def listing(self):
        names = [*(f"{NAME} {number}" for number in range(len(self.errors))), "good", "none"]
        return Listing(tuple(Picture(name, "train", slide=name) for name in names))

    def fail(self, picture):
        if picture.source not in ("good", "none"):
            raise self.errors[int(picture.source.rpartition(" ")[2])]

    def header(self, picture):
        if not self.is_late:
            self.fail(picture)
        return Header((16, 16), "RGB", "none", 1)

    def regions(self, picture, header, patch_px):
        return np.zeros((0 if picture.source == "none" else 1, 2), np.int32)

    def empty_reason(self, picture):
        return f"{NAME} has none"

    def read(self, picture, header, patch_px, regions):
        self.fail(picture)
        return [Patch(image=smooth_picture(1, 16), source="good", source_encoding="none")]


def converted(out, errors, is_late, **options) -> Manifest:
    config = ConvertConfig(
        **{"source": out.with_name("in"), "out": out, "device": "cpu", "workers": 1},
        **{"encode_batch": 4, "max_bad": 99},
        **options,
    )
    return convert(config, MeanAutoencoder(), source=Named(errors, is_late))


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("is_late", [False, True], ids=["header", "pixels"])
def test_no_name_in_an_error_reaches_an_anonymized_set(tmp_path, kind, is_late):
    errors = ERRORS[kind](NAME)
    open_set = converted(tmp_path / "open", errors, is_late)
    assert all(NAME in entry["source"] for entry in open_set.made["left_out"])
    hidden = converted(tmp_path / "hidden", errors, is_late, anonymize=tmp_path / "key")
    assert len(hidden.made["left_out"]) == len(errors) and len(hidden.made["without_patches"]) == 1
    assert all(entry.keys() == {"source", "reason"} for entry in hidden.made["left_out"])
    files = [path for path in (tmp_path / "hidden").rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"Jane" in path.read_bytes() for path in files)


def test_an_open_set_keeps_the_errors_words(tmp_path):
    manifest = converted(tmp_path / "out", ERRORS["input"](NAME), is_late=True)
    (first, _) = manifest.made["left_out"]
    assert first == {"source": f"{NAME} 0", "reason": "other", "detail": NAME}
    assert left_out_text(first) == NAME and left_out_text({"source": "a", "reason": "old"}) == "old"

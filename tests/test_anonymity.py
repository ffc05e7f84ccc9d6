"""What a set made with --anonymize tells whoever has a list of names and not the key."""

import numpy as np
import pytest

from latentds.conversion.conversion_plan import make_plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.sources.anonymity import hider
from tests.conftest import save_pictures

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
    hide = hider(tmp_path / "key")
    hashes = [hide(name.removeprefix("train/")) for name in found]
    assert hashes == sorted(hashes)


def test_splits_are_dealt_by_hashes(hospital, tmp_path):
    options = {"split_patients": "train=0.5,test=0.5", "patient_pattern": ".*", "order": "path"}
    first, second = (set(slides_on_disk(hospital, tmp_path / key, **options)) for key in "ab")
    assert first != second


def test_names_do_not_matter_without_a_key():
    assert hider(None)("x") == "x" and np.array_equal([*map(hider(None), "ba")], ["b", "a"])

"""How many files a conversion and a first batch go through, and whether they climb the floors."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

from latentds import LatentLoader
from tests.conftest import convert_with_mean, save_pictures
from tests.fakes import MeanAutoencoder
from tests.test_house import ROOT, floor, modules


def way_of(action: Callable[[], object]) -> tuple[set[str], list[tuple[str, str]]]:
    """Modules of the library whose functions an action calls, and calls into a higher floor."""
    names = {str(path): m for m, path in modules().items() if m.startswith("latentds.")}
    entered: set[str] = set()
    climbs: list[tuple[str, str]] = []

    def note(frame, event, _):
        module = names.get(frame.f_code.co_filename)
        if event != "call" or module is None:
            return
        entered.add(module)
        caller = frame.f_back and names.get(frame.f_back.f_code.co_filename)
        if caller and floor(module) > floor(caller):
            climbs.append((caller, module))

    sys.setprofile(note)
    threading.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return entered, climbs


def test_a_conversion_and_a_batch_stay_on_their_way(tmp_path: Path):
    assert Path(sys.modules["latentds"].__file__ or "").is_relative_to(ROOT)
    save_pictures(tmp_path / "in" / "tumour", 64)
    convert_with_mean(tmp_path / "in", tmp_path / "warm")
    entered, climbs = way_of(lambda: convert_with_mean(tmp_path / "in", tmp_path / "out"))
    assert climbs == [] and len(entered) <= 28, sorted(entered)

    def first_batch() -> None:
        loader = LatentLoader(tmp_path / "out", batch_size=8, autoencoder=MeanAutoencoder())
        assert len(next(iter(loader))) == 8

    first_batch()
    entered, climbs = way_of(first_batch)
    assert climbs == [] and len(entered) <= 14, sorted(entered)

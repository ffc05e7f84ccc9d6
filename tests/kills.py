"""Kill conversions at random moments, go on, and compare every byte.

    python -m tests.kills --count 100 --seed 0

Conversions of a folder, a slide and a tar take turns. Each runs in a process of its own, is killed
(SIGKILL) at a moment drawn between its start and its end, begun anew where that came too late, and
then runs to its end. It counts as `same` if the set has the bytes of an unbroken one.
`tests/test_kills.py` runs a few.
"""

from __future__ import annotations

import argparse
import collections
import io
import logging
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentds.conversion import conversion_plan, workdir
from tests.archives import samples_of, write_samples
from tests.conftest import convert_with_mean, save_pictures
from tests.mutations import say
from tests.test_convert import data_bytes
from tests.test_slides import write_slide

ENDS = ("same", "other", "error")
LATER, EARLIER = 0.8, 1.05  # what a kind's span becomes after a kill that came too late, or not
OPTIONS: dict[str, dict[str, Any]] = {"folder": {}, "slide": {"patch_size": 16}, "tar": {}}


def make_sources(root: Path) -> None:
    """Some 300 patches each: a folder of two splits, a slide, tars of two splits."""
    for split, count in (("train", 200), ("val", 100)):
        save_pictures(root / "folder" / split, count, first_seed=count)
        (root / "tar").mkdir(exist_ok=True)
        write_samples(root / "tar" / f"{split}-000.tar", samples_of(count, first=count))
    write_slide(root / "slide" / "TCGA-AA-0001-01Z-00-DX1.tiff")


def convert_quietly(source: Path, out: Path) -> None:
    """A conversion that has a point to go on from behind every 32 patches."""
    logging.disable(logging.CRITICAL)
    sys.stderr = io.StringIO()
    workdir.SYNC_SECONDS, conversion_plan.BLOCK_PATCHES = 0.0, 32
    options = {"pack_size": 16, "encode_batch": 8, "workers": 1} | OPTIONS[source.name]
    convert_with_mean(source, out, **options)


def run_for(seconds: float | None, source: Path, out: Path) -> int:
    """Exit code of a conversion that is killed after so many seconds (None: never)."""
    child = multiprocessing.get_context("fork").Process(target=convert_quietly, args=(source, out))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode or 0


def kill_once(source: Path, out: Path, spans: dict[str, float], chance: random.Random) -> float:
    """Kill a conversion while it runs; the moment. Spans follow how busy the machine is."""
    while True:
        moment = chance.uniform(0, spans[source.name])
        code = run_for(moment, source, out)
        if code < 0:
            spans[source.name] *= EARLIER
            return moment
        assert code == 0, f"{source.name}: exit code {code}"
        spans[source.name] *= LATER
        shutil.rmtree(out)


def run(count: int, seed: int, tell: Callable[[str], None] = say) -> collections.Counter[Any]:
    """How often each kind of conversion ended in which way, over `count` kills."""
    ends: collections.Counter[Any] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_sources(root)
        whole, spans = {}, {}
        for kind in OPTIONS:
            start = time.monotonic()
            assert run_for(None, root / kind, root / f"{kind}-whole") == 0
            spans[kind] = time.monotonic() - start
            whole[kind] = data_bytes(root / f"{kind}-whole")
        for number in range(seed, seed + count):
            kind = list(OPTIONS)[number % len(OPTIONS)]
            source, out = root / kind, root / f"{kind}-{number}"
            moment = kill_once(source, out, spans, random.Random(number))
            end = "error" if run_for(None, source, out) else "same"
            if end == "same" and data_bytes(out) != whole[kind]:
                end = "other"
            ends[kind, end] += 1
            if end != "same":
                tell(f"{end}: {kind}, seed {number}, killed after {moment:.3f} s")
    return ends


def as_table(ends: collections.Counter[Any]) -> str:
    """The counts as a Markdown table."""
    lines = [f"| source | {' | '.join(ENDS)} |", "|---|" + "---|" * len(ENDS)]
    for kind in OPTIONS:
        lines.append(f"| {kind} | {' | '.join(str(ends[kind, end]) for end in ENDS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="number of the first")
    options = parser.parse_args()
    say(as_table(run(options.count, options.seed)))

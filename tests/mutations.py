"""Damage every file of a small set in every way, run every reader, count how each ends.

    python -m tests.mutations --count 2000 --seed 0

Each mutation is tried in a process of its own, on a copy of the set. A reader ends `right` (what it
gave before), with an `error` of latentds, a `foreign` error, `wrong` (other values, no word) or in
a `crash` (a signal, or no answer). `tests/test_mutations.py` runs a few of them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentds.errors import LatentdsError
from latentds.loading.options import Select
from latentds.store.format import CHECKSUMS, DIGESTS, GOLDEN, MANIFEST, PACKS_TABLE, PATCHES_TABLE
from tests.loaders import grouped

FILES = (MANIFEST, PACKS_TABLE, DIGESTS, PATCHES_TABLE, CHECKSUMS, GOLDEN)
SHARDS = ("data/train-000000.tar", "data/val-000000.tar")
PATIENCE_S = 120.0
ENDS = ("right", "error", "foreign", "wrong", "crash")
Values = Any  # what a reader gave, comparable


def make_set(root: Path) -> Path:
    """40 patches of two classes, four slides and two splits, with masks, packs of 8."""
    from tests.conftest import convert_with_mean, save_pictures

    for split, count in (("train", 7), ("val", 3)):
        for place, label in enumerate(("benign", "tumour")):
            for slide in "AB":
                seed = 100 * place + 10 * ord(slide) + count
                save_pictures(root / "in" / split / label / f"{split}{slide}", count, seed)
    for number, path in enumerate(sorted((root / "in").rglob("*.png"))):
        mask = root / "masks" / path.relative_to(root / "in")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), number % 3).save(mask)
    convert_with_mean(root / "in", root / "set", masks=root / "masks", pack_size=8)
    return root / "set"


def read_batches(folder: Path, split: str, **options: Any) -> Iterator[Values]:
    """A loader's values, patch by patch, names instead of numbers."""
    from latentds.loading.loader import LatentLoader

    loader = LatentLoader(
        folder, split, **grouped(batch_size=8, masks=True, columns=("source",), **options)
    )
    for batch in loader:
        shown = batch.codes if batch.latents is None else batch.latents
        for place, row in enumerate(batch.rows.tolist()):
            label = int(batch.labels[place])
            yield (
                (row, loader.classes[label], batch.slides[place], batch.coords[place].tolist()),
                (digest(shown[place].numpy()), digest(batch.masks[place].numpy())),
                (str(float(batch.mpp[place])), batch.columns["source"][place]),
            )


def loader(folder: Path, _: Path) -> Iterator[Values]:
    """LatentLoader of codes, shuffled."""
    yield from read_batches(folder, "train", decode="codes", shuffle=True)


def latents(folder: Path, _: Path) -> Iterator[Values]:
    """LatentLoader of normalized latents, patches chosen by a condition."""
    options = {"decode": "latents", "normalize": True, "where": "label == 'tumour'"}
    yield from read_batches(folder, "val", **options)


def array(folder: Path, _: Path) -> Iterator[Values]:
    """LatentArray of some patches, one after another."""
    from latentds.loading.array import LatentArray

    held = LatentArray(folder, decode="codes", select=Select(where="slide != 'trainA'"))
    for place in range(len(held)):
        slide = held.slide_names[int(held.slides[place])]
        coords, label = held.coords[place].tolist(), held.classes[int(held.labels[place])]
        yield int(held.rows[place]), digest(held[place].numpy()), slide, label, coords


def bags(folder: Path, _: Path) -> Iterator[Values]:
    """SlideBags, a slide at a time."""
    from latentds.loading.bags import SlideBags

    held = SlideBags(folder, "train", max_patches=5)
    for bag in held:
        labels = [held.classes[label] for label in bag.labels.tolist()]
        yield bag.slide, labels, digest(bag.codes.numpy()), bag.rows.tolist(), bag.coords.tolist()


def patchset(folder: Path, _: Path) -> Iterator[Values]:
    """What features and evaluations read."""
    from latentds.evaluation.patchsets.latent_patches import open_shards

    opened = open_shards(str(folder), None, check_codes=True)
    table = opened.table
    yield table.sources, table.slides, [opened.classes[label] for label in table.labels.tolist()]
    yield [digest(part) for part in opened.read(np.arange(len(table.sources)))[0]]
    yield digest(opened.read_masks(np.arange(4)))


def extract(folder: Path, out: Path) -> Iterator[Values]:
    """`latentds extract`."""
    from latentds.edit.extracting import extract as run
    from tests.fakes import MeanAutoencoder

    run(folder, out, autoencoder=MeanAutoencoder())
    yield from files_below(out)


def export(folder: Path, out: Path) -> Iterator[Values]:
    """`latentds export --to npy` and `--to parquet`."""
    from latentds.edit.exporting import export_npy, export_parquet

    export_npy(folder, out / "npy")
    export_parquet(folder, out / "parquet")
    yield from files_below(out)


def repack(folder: Path, out: Path) -> Iterator[Values]:
    """`latentds repack`, whose golden patches come along."""
    from latentds.edit.repacking import Repacking
    from latentds.edit.repacking import repack as run

    run(folder, out, Repacking(pack_size=16, order="path"))
    yield from files_below(out)


def info(folder: Path, _: Path) -> Iterator[Values]:
    """`latentds info --json`."""
    from latentds_tools.info import Config
    from latentds_tools.info import run as run_info

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        run_info(Config(folder=folder, json=True))
    yield json.loads(text.getvalue())


def verify(folder: Path, _: Path) -> Iterator[Values]:
    """`latentds verify`; a problem that it tells counts as an error of latentds."""
    from latentds.store.verification import verify as run
    from tests.fakes import MeanAutoencoder

    found = run(folder, autoencoder=MeanAutoencoder())
    if not found.is_good:
        raise LatentdsError(found.problems[0][1])
    yield found.levels


READERS: tuple[Callable[[Path, Path], Iterator[Values]], ...] = (
    *(loader, latents, array, bags, patchset, extract, export, repack, info, verify),
)


def digest(values: np.ndarray) -> str:
    """Short hash of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def files_below(folder: Path) -> Iterator[Values]:
    """Name and hash of every file."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".json", ".md", ".safetensors"):
            yield str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def mutate_bytes(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A file's bytes changed in one way."""
    kind = str(rng.choice(["flip", "flips", "cut", "grow", "zeros", "swap", "double", "noise"]))
    spoiled, size = bytearray(content), len(content)
    place = int(rng.integers(size))
    length = int(rng.choice([1, 4, 24, 64, 512]))
    if kind in ("flip", "flips"):
        for at in rng.integers(size, size=1 if kind == "flip" else 8).tolist():
            spoiled[at] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del spoiled[int(rng.choice([0, 1, place, size - 1])) :]
    elif kind == "grow":
        spoiled += rng.bytes(length)
    elif kind == "zeros":
        spoiled[place : place + length] = bytes(len(spoiled[place : place + length]))
    elif kind == "noise":
        spoiled[place : place + length] = rng.bytes(len(spoiled[place : place + length]))
    elif kind == "double":
        spoiled[place:place] = spoiled[place : place + length]
    else:
        length = min(length, size // 2)
        one, two = (int(at) for at in rng.choice(size - length + 1, 2, replace=False))
        first, second = bytes(spoiled[one : one + length]), bytes(spoiled[two : two + length])
        spoiled[one : one + length], spoiled[two : two + length] = second, first
    return kind, bytes(spoiled[: max(size, len(spoiled))])


def mutate_json(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A JSON file with a list in another order, values exchanged, changed or gone."""
    record = json.loads(content)
    holders = list(containers(record))
    kind = str(rng.choice(["permute", "exchange", "number", "drop", "kind"]))
    lists = [h for h in holders if isinstance(h, list) and len(h) > 1]
    holder = holders[int(rng.integers(len(holders)))]
    if kind == "permute":
        lists[int(rng.integers(len(lists)))].reverse()
    elif holder:
        keys = list(range(len(holder)) if isinstance(holder, list) else holder)
        one, two = (keys[int(rng.integers(len(keys)))] for _ in range(2))
        if kind == "exchange":
            holder[one], holder[two] = holder[two], holder[one]
        elif kind == "drop":
            del holder[one]
        elif kind == "number" and type(holder[one]) is int:
            holder[one] += int(rng.choice([-1, 1, 1 << 40, -(1 << 33)]))
        else:
            holder[one] = [None, "", [], {}, -1, 1e300, "data/train-000000.tar"][
                int(rng.integers(7))
            ]
    return f"json {kind}", json.dumps(record).encode()


def containers(value: Any) -> Iterator[Any]:
    """Every list and object of a JSON value."""
    if isinstance(value, (list, dict)):
        yield value
        for inner in value if isinstance(value, list) else value.values():
            yield from containers(inner)


def mutate(folder: Path, name: str, rng: np.random.Generator) -> str:
    """Change one file of a set, or exchange two; what was done, in words."""
    path = folder / name
    chance = float(rng.random())
    if chance < 0.02:
        path.unlink()
        return "delete"
    if chance < 0.06:
        other = folder / str(rng.choice([n for n in (*FILES, *SHARDS) if n != name]))
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return "exchange files"
    change = mutate_json if name == MANIFEST and chance < 0.6 else mutate_bytes
    kind, content = change(path.read_bytes(), rng)
    path.write_bytes(content)
    return kind


def outcome(reader: Any, folder: Path, out: Path, expected: Values, spoil: Any) -> tuple[str, str]:
    """How a reader ends; `spoil` damages the set when its first value is there."""
    given = []
    try:
        for value in reader(folder, out):
            given.append(value)
            if len(given) == 1:
                spoil()
    except LatentdsError as error:
        return ("error", "") if str(error).strip() else ("foreign", "empty message")
    except FileNotFoundError as error:  # a standard one that stays, if it says which file
        return ("error", "") if error.filename or str(folder) in str(error) else ("foreign", "")
    except Exception:
        return "foreign", traceback.format_exc()
    if repr(given) == expected:
        return "right", ""
    return "wrong", f"{len(given)} values"


def try_mutation(sound: Path, expected: dict[str, str], seed: int, pipe: Any) -> None:
    """In a process of its own: mutate a copy and run every reader."""
    logging.disable(logging.CRITICAL)
    sys.stderr = io.StringIO()
    rng = np.random.default_rng([seed, 7])
    name = str(rng.choice([MANIFEST, *FILES, *SHARDS]))
    while_open = bool(rng.random() < 0.25)
    for reader in READERS:
        with tempfile.TemporaryDirectory() as work:
            copy, kinds = Path(shutil.copytree(sound, Path(work) / "set")), []

            def spoil(copy: Path = copy, kinds: list[str] = kinds) -> None:
                kinds.append(mutate(copy, name, np.random.default_rng([seed, 11])))

            def nothing() -> None:
                pass

            if not while_open:
                spoil()
            found = outcome(reader, copy, Path(work) / "out", expected[reader.__name__],
                            spoil if while_open else nothing)  # fmt: skip
            kind = f"{kinds[0] if kinds else 'none'}{', while open' if while_open else ''}"
            pipe.send((reader.__name__, name, kind, *found))
    pipe.close()


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(count: int, seed: int, tell: Callable[[str], None] = say) -> collections.Counter[Any]:
    """How often each reader ended in which way, over `count` mutations."""
    context = multiprocessing.get_context("fork")
    ends: collections.Counter[Any] = collections.Counter()
    with tempfile.TemporaryDirectory() as root:
        sound = make_set(Path(root))
        expected = {}
        for number, reader in enumerate(READERS):
            expected[reader.__name__] = repr(list(reader(sound, Path(root) / f"out{number}")))
        for number in range(seed, seed + count):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=try_mutation, args=(sound, expected, number, theirs))
            child.start()
            theirs.close()
            heard = 0
            with contextlib.suppress(EOFError):
                while ours.poll(PATIENCE_S):
                    reader_name, name, kind, end, why = ours.recv()
                    heard += 1
                    ends[reader_name, end] += 1
                    if end in ("foreign", "wrong"):
                        tell(f"{end}: seed {number}, {name}, {kind}, {reader_name}: {why}")
            child.kill()
            child.join()
            if heard < len(READERS):
                ends[READERS[heard].__name__, "crash"] += 1
                tell(f"crash: seed {number}, {READERS[heard].__name__}, exit code {child.exitcode}")
    return ends


def as_table(ends: collections.Counter[Any]) -> str:
    """The counts as a Markdown table."""
    lines = [f"| reader | {' | '.join(ENDS)} |", "|---|" + "---|" * len(ENDS)]
    for reader in READERS:
        counts = [str(ends[reader.__name__, end]) for end in ENDS]
        lines.append(f"| `{reader.__name__}` | {' | '.join(counts)} |")
    totals = [sum(ends[r.__name__, end] for r in READERS) for end in ENDS]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} |"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="mutations")
    parser.add_argument("--seed", type=int, default=0, help="number of the first")
    options = parser.parse_args()
    say(as_table(run(options.count, options.seed)))

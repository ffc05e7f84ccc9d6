"""Folders that results are written to: new ones, or ones this library may replace; never others."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentds.conversion.workdir import remove_data_set
from latentds.core.storage import MARK, exclusive_lock
from latentds.errors import InputError
from latentds.store.format import MANIFEST, SIDECARS


def check_new(out: Path, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """InputError where `new_data_set` would refuse: for whoever has long work to do before."""
    check_apart(out, sources)
    refuse_foreign(out, SIDECARS)
    if not overwrite and (out / MANIFEST).is_file():
        raise InputError(f"{out}: holds a finished data set; choose another --out, or pass "
                         "--overwrite")  # fmt: skip


@contextlib.contextmanager
def new_data_set(out: Path, overwrite: bool, sources: Sequence[Path] = ()) -> Iterator[None]:
    """Hold an empty folder for a data set; what fails while it is held leaves nothing there.

    overwrite  a data set that lies there, finished or not, is deleted
    sources    what is read: `out` may neither lie in one nor hold one
    """
    check_new(out, overwrite, sources)
    work = out / SIDECARS / "work"
    with exclusive_lock(work / "lock"):
        if any(path.is_file() for path in out.rglob("*") if path != work / "lock"):
            if not overwrite:
                raise InputError(
                    f"{out}: holds an unfinished data set; choose another --out, or pass "
                    "--overwrite"
                )
            remove_data_set(out)
        try:
            yield
        except (Exception, KeyboardInterrupt):
            remove_data_set(out)
            (out / "README.md").unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(work)
            for folder in (out / SIDECARS, out / "data", out):
                with contextlib.suppress(OSError):  # not empty: the set was made
                    folder.rmdir()


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder beside `out` to write to; it takes the name `out` when all is written.

    overwrite  what an earlier export made there is deleted then, not before
    """
    check_apart(out, sources)
    refuse_foreign(out, MARK)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out}: not empty; choose another --out, or pass --overwrite")
    partial = out.with_name(f"{out.name}.partial")
    refuse_foreign(partial, MARK)
    with exclusive_lock(out.with_name(f"{out.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        (partial / MARK).touch()
        try:
            yield partial
            if out.is_dir():
                shutil.rmtree(out)
            partial.replace(out)
        except (Exception, KeyboardInterrupt):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            out.with_name(f"{out.name}.lock").unlink()


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """A data set's folder; InputError for a location, whose files are not all here."""
    if "://" in str(folder):
        raise InputError(f"{folder}: only a local data set will do here; fetch it first")
    return Path(folder)


def check_apart(out: Path, sources: Sequence[Path]) -> None:
    """Refuse an output that is a file, or that lies in, holds or is what is read."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; choose another --out")
    own = out.resolve()
    for source in (path.resolve() for path in sources):
        if source in (own, *own.parents) or own in source.parents:
            raise InputError(
                f"{out}: lies in the input {source}, or holds it; choose another --out"
            )


def refuse_foreign(out: Path, mark: str) -> None:
    """Refuse a folder with something in it that this library did not make."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names and mark not in names:
        raise InputError(f"{out}: not empty ({names[0]}); choose another --out")

"""Convert what a finished data set had to leave out, and add it to the set."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.workdir import differences
from latentds.core.storage import write_atomically
from latentds.edit.merging import merge
from latentds.errors import REASONS, InputError
from latentds.quantizers.codebooks import StoredCodebook
from latentds.sources.opening import names_of, open_source
from latentds.store.format import MANIFEST
from latentds.store.manifest import Manifest, read_manifest


def retry(
    config: ConvertConfig, convert: Callable[[ConvertConfig, StoredCodebook], Manifest]
) -> Manifest:
    """Add the sources that can be read by now to the set in `config.out`.

    Both are merged into a new folder, which then takes the old one's place: until then the old set
    is as it was, so a killed run is just run again.

    config   the options that made the set
    convert  the conversion by a codebook
    raises   InputError where nothing was left out or none of it can be read, or the options are
             not the set's
    """
    out = config.out
    parts = [out.with_name(f"{out.name}.{word}") for word in ("retry", "retried", "before-retry")]
    part, new, old = parts
    recover(out, new, old)
    manifest = read_manifest(out)
    check_options(config, manifest)
    there = names_of(open_source(config).listing().pictures, config)
    left_out = wholly_left_out(manifest)
    wanted = [name for name in left_out if name in there]  # of others the record stays
    if not wanted:
        gone = f" that is still in {config.source}" if left_out else ""
        raise InputError(f"{out}: left out no source as a whole{gone}; nothing to try again")
    helper = out.with_name(f"{out.name}.retry-files")
    write_atomically(helper / "only.txt", "\n".join(wanted).encode())
    contract = manifest.contract
    stored = StoredCodebook(
        codebook=contract.codebook, latent_id=contract.latent_id, made=manifest.made["codebook"]
    )
    rest = dataclasses.replace(
        config,
        out=part,
        only=helper / "only.txt",
        codebook=None,
        quantizer="kmeans",
        levels=256,
        max_bad=max(config.max_bad, len(wanted)),  # they were let go once: some may be again
        overwrite=(part / MANIFEST).is_file(),  # of a run that was killed later
    )
    was_there = part.exists()
    try:
        added = convert(rest, stored)
    except InputError:
        shutil.rmtree(part, ignore_errors=True)
        if not was_there:
            shutil.rmtree(helper)
            raise
        added = convert(rest, stored)  # what a killed run left was of other files
    made = made_after(manifest, added, wanted)
    merged = merge([out, part], new, overwrite=True, made=made)
    out.rename(old)
    new.rename(out)
    for folder in (old, part, helper):
        shutil.rmtree(folder)
    return merged


def recover(out: Path, new: Path, old: Path) -> None:
    """Finish the renames of a run that was killed between them."""
    if not out.exists() and old.exists():
        (new if (new / MANIFEST).is_file() else old).rename(out)
    if old.exists():
        shutil.rmtree(old)


def wholly_left_out(manifest: Manifest) -> list[str]:
    """Names of sources of which nothing is stored; older sets' sentences may be of some patches."""
    told = [entry for entry in manifest.made["left_out"] if entry["reason"] in REASONS]
    return [str(entry["source"]) for entry in told if entry.get("patches") == entry.get("of")]


def check_options(config: ConvertConfig, manifest: Manifest) -> None:
    made, asked = dict(manifest.made.get("options", {})), config.recorded()
    for name in ("quantizer", "levels", "fit_patches"):  # the set's codebook says all of it
        made.pop(name, None)
        asked.pop(name, None)
    changed = differences(made, asked)
    if changed:
        raise InputError(
            f"{config.out}: made with other options ({', '.join(changed[:5])}); pass those that "
            "made it"
        )


def made_after(manifest: Manifest, added: Manifest, wanted: list[str]) -> dict[str, Any]:
    """The set's record, what is still left out in place of what was."""
    tried = set(wanted)
    kept = [entry for entry in manifest.made["left_out"] if entry["source"] not in tried]
    still = [*kept, *added.made["left_out"]]
    both = (manifest.made, added.made)
    return manifest.made | {
        "left_out": sorted(still, key=lambda entry: str(entry["source"])),
        "without_patches": [entry for made in both for entry in made.get("without_patches", [])],
        "converted": sum(made.get("converted", 0) for made in both),
    }

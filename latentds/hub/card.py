"""What a publisher says of a set, its card with code that loads it, and its preview."""
# G golden patches

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latentds.autoencoders.cards import CARDS
from latentds.core.display import code_span, markdown
from latentds.store.composing import front_matter, has_masks, label_table, reading_code
from latentds.store.format import FORMAT, MANIFEST, main_split
from latentds.store.golden import Golden, read_golden
from latentds.store.manifest import Manifest
from latentds.store.reader import ShardSet

README = "README.md"
# A tar like the shards, not Parquet: `datasets` picks one builder for a repository, by the first
# config's files, and hands every config's files to it. A Parquet config beside data/*.tar fails
# with "ReadError: truncated header" (datasets 5.2, streaming or not).
PREVIEW = "preview/preview-000000.tar"
PICTURE, LABEL, SLIDE = "decoded.png", "label.txt", "slide.txt"
PREVIEW_PX = 256  # a patch of the usual size as it is, larger ones made smaller
PREVIEW_CONFIG = (
    "- config_name: preview",
    "  data_files:",
    "  - split: preview",
    f"    path: {PREVIEW}",
)
PREVIEW_MEMBERS = (
    *((PICTURE, "image"), (LABEL, "string"), (SLIDE, "string")),
    *(("__key__", "string"), ("__url__", "string")),
)
PREVIEW_FEATURES = (
    *("- config_name: preview", "  features:"),
    *(f"  - name: {name}\n    dtype: {dtype}" for name, dtype in PREVIEW_MEMBERS),
)
PREVIEW_LINE = "The `preview` config shows {} patches as the recorded decoder decodes them.\n\n"
METHOD = "https://arxiv.org/abs/2503.11591"  # Yellapragada et al. 2025: one table of 256 centroids
CARD = """---
{front_matter}---

# {title}

{patches:,} pathology patches of {width}x{height} px, stored as autoencoder latents in plain
WebDataset shards: {bytes_per_patch:,} bytes a patch (`{format}`). Decoding loses detail and makes
some up. **Not for diagnosis.**
{notes}
## What is stored

| | |
|---|---|
{facts}

| split | patches |
|---|---|
{splits}
{labels}
{preview}## Fidelity

{fidelity}

## Licences

{licences}

## Load

{loading}

## Citation

{citation}
"""


MORE_BOOKS = (
    "This set has {} codebooks (`codebooks` in the manifest), and each shard names its own by "
    "`codebook_id`: the lines above hold for the shards of the first.\n\n"
)
LOADING = """\
With `latentds`, decoded to pixels on the way:

```python
from latentds import LatentLoader

loader = LatentLoader(
    "hf://datasets/{repository}{at}", split="{split}", batch_size=64{autoencoder}
)
for batch in loader:
    images = batch.images  # float (B, 3, {height}, {width}) in [0, 1]
    labels, slides, coords = batch.labels, batch.slides, batch.coords
    break
```

With `datasets` (a row is a pack of N patches), to latents:

```python
{reading}
```

{books}`latentds fetch {repository}{at}` downloads all of it, `latentds verify` checks it.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Publication:
    """What a publisher says of a set or a model, beyond what its manifest or record says.

    repository    ORG/NAME on the Hub
    licence       identifier the Hub knows; with 'other', its name and where to read it. None, for
                  a decoder, takes the one that is recorded
    revision      branch it goes to, or refs/pr/N; None for main
    notes         Markdown: where the slides come from, consent, what it is for
    citation      BibTeX of the set or its source
    """

    repository: str
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    revision: str | None = None
    notes: str = ""
    citation: str = ""

    @property
    def branch(self) -> str | None:
        """Where it is read from once it is merged; None for main."""
        branch = self.revision or "main"
        return None if branch == "main" or branch.startswith("refs/") else branch

    @property
    def title(self) -> str:
        return self.repository.partition("/")[2]

    @property
    def at(self) -> str:
        """What follows the repository's name where it is loaded: @BRANCH, nothing for main."""
        return f"@{self.branch}" if self.branch else ""

    @property
    def licence_lines(self) -> list[str]:
        """Of a card's YAML; what a user wrote is quoted as JSON, which YAML reads."""
        given = {"license_name": self.licence_name, "license_link": self.licence_link}
        quoted = [f"{name}: {json.dumps(text)}" for name, text in given.items() if text]
        return [f"license: {self.licence}", *quoted]


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


def hub_card(
    manifest: Manifest, golden: Golden, publication: Publication, warnings: Sequence[str] = ()
) -> str:
    contract, title = manifest.contract, publication.title
    return CARD.format(
        front_matter=front_matter(
            manifest,
            [
                *publication.licence_lines,
                f"pretty_name: {json.dumps(title)}",
            ],
            (PREVIEW_CONFIG, PREVIEW_FEATURES) if len(golden.rows) else ((), ()),
        ),
        title=title,
        notes=f"\n{publication.notes.strip()}\n" if publication.notes.strip() else "",
        patches=manifest.patches,
        height=contract.patch_px[0],
        width=contract.patch_px[1],
        bytes_per_patch=contract.bytes_per_patch,
        format=FORMAT,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts(manifest).items()),
        splits="\n".join(f"| {name} | {count:,} |" for name, count in manifest.splits.items()),
        labels=label_table(manifest),
        preview=PREVIEW_LINE.format(len(golden.rows)) if len(golden.rows) else "",
        fidelity=fidelity(golden),
        licences=licences(manifest, publication, warnings),
        loading=loading(manifest, publication),
        citation=citation(manifest, publication),
    )


def facts(manifest: Manifest) -> dict[str, str]:
    contract, card, made = manifest.contract, manifest.contract.autoencoder, manifest.made
    stored = sum(shard.bytes for shard in manifest.shards)
    tables = sum(int(entry.get("bytes") or 0) for entry in manifest.tables.values())
    books = [f"{book.summary}, {book.kind}" for book in manifest.codebooks]
    origin = markdown(made["codebook"].get("origin") or "origin not recorded")
    options = made.get("options") or {}
    steps, dtype = options.get("refine"), options.get("encode_dtype")
    return {
        "patches": f"{manifest.patches:,} in {manifest.packs:,} packs",
        "shards": f"{len(manifest.shards):,}, {stored / 1e6:,.1f} MB",
        "tables": f"{tables / 1e6:,.1f} MB",
        "slides": f"{len(manifest.slides):,}",
        "masks": "yes" if has_masks(made) else "no",
        "pictures left out": f"{len(made['left_out']):,}",
        "autoencoder": describe_autoencoder(card),
        "codebook": f"{' and '.join(books)}; {origin}",
        "latent_id": code_span(contract.latent_id),
        "decoder_id": code_span(contract.decoder_id),
        **({"refined": code_span(f"{steps} gradient steps a patch")} if steps else {}),
        **({"encoded in": code_span(dtype)} if dtype else {}),
        "codebook_id": ", ".join(f"`{book.codebook_id}`" for book in manifest.codebooks),
        "dataset_id": f"`{manifest.dataset_id}`",
    }


def describe_autoencoder(card: dict[str, Any]) -> str:
    text = (
        f"{code_span(card.get('name'))} ({markdown(card.get('class_name'))}, factor "
        f"{card.get('factor')}, "
        f"{card.get('channels')} channels)"
    )
    if card.get("repository"):
        revision = card.get("revision") or "revision not recorded"
        place = f"{code_span(card['repository'])} {markdown(card.get('subfolder') or '')}"
        text += f", {place} at {code_span(revision)}"
    return text


def fidelity(golden: Golden) -> str:
    """What was measured when the set was made, and of how much."""
    values = golden.thumbnail_psnr_db
    if not len(values):
        return "Nothing was measured."
    height, width = golden.thumbnails[0].shape[:2]
    return (
        f"Of the whole set nothing was measured. Of its {len(values)} golden patches, decoded by "
        f"the recorded decoder and compared with the originals as thumbnails of {width}x{height} "
        f"px, the PSNR is {values.mean():.1f} dB on average (lowest {values.min():.1f} dB). "
        "Thumbnails say nothing of fine detail."
    )


def licences(manifest: Manifest, publication: Publication, warnings: Sequence[str]) -> str:
    """The set's licence, the autoencoder's, and what a user must mind, as a list."""
    card, licence = manifest.contract.autoencoder, publication.licence
    if publication.licence_name:
        licence = publication.licence_name
    if publication.licence_link:
        licence = f"[{licence}]({publication.licence_link})"
    lines = [f"this data set: {licence}"]
    name, terms = markdown(card.get("name")), markdown(card.get("licence") or "unknown")
    lines.append(f"the autoencoder {name}: {terms}")
    lines += map(markdown, warnings)
    return "\n".join(f"- {line}" for line in lines)


def citation(manifest: Manifest, publication: Publication) -> str:
    """The publisher's BibTeX; where there is none, that; and whose quantizer it is."""
    text = "None was given by the publisher; cite the source of the slides."
    if publication.citation.strip():
        text = f"```bibtex\n{publication.citation.strip()}\n```"
    if manifest.contract.codebook.kind != "kmeans":
        return text
    method = f"One table of K-means levels is the quantizer of [Yellapragada et al.]({METHOD})."
    return f"{text}\n\n{method}"


def loading(manifest: Manifest, publication: Publication) -> str:
    """Markdown with code for latentds and datasets; a test runs it as it stands."""
    known = manifest.contract.autoencoder.get("name") in CARDS
    repository, branch = publication.repository, publication.branch
    revision = f', revision="{branch}"' if branch else ""
    path = f'hf_hub_download("{repository}", "{MANIFEST}", repo_type="dataset"{revision})'
    code = reading_code(manifest, repository, path, revision)
    return LOADING.format(
        repository=repository,
        at=publication.at,
        autoencoder="" if known else ', autoencoder="PATH_OF_THE_AUTOENCODER"',
        split=main_split(manifest.splits),
        height=manifest.contract.patch_px[0],
        width=manifest.contract.patch_px[1],
        reading=f"from huggingface_hub import hf_hub_download\n{code}",
        books=MORE_BOOKS.format(len(manifest.codebooks)) if manifest.more_codebooks else "",
    ).strip()

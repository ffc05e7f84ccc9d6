"""The data set's own README: a Hub card that pins the features and shows how to read a pack."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latentds.autoencoders.autoencoder import short
from latentds.core.display import code_span, markdown
from latentds.store.format import CODES, FORMAT, MASKS, PATCHES
from latentds.store.manifest import Manifest

MAX_FACTS, MAX_FACT = 60, 200  # rows and characters a row of a card's table

# Lines that turn `codes` into `latents`, and what they import, by encoding.
DEQUANTIZE = {
    "u8": (
        "import base64\nimport io\nimport json\n",
        """\
book = contract["codebook"]
values = np.frombuffer(base64.b64decode(book["values_f32le_base64"]), "<f4")
levels = values.reshape(book["rows"], book["levels"])
channels = np.arange(codes.shape[1])[:, None, None]
latents = levels[channels % len(levels), codes]  # (N, C, h, w), unscaled means""",
    ),
    "u8-sum": (
        "import base64\nimport io\nimport json\n",
        """\
book = contract["codebook"]
values = np.frombuffer(base64.b64decode(book["values_f32le_base64"]), "<f4")
tables = values.reshape(book["planes"], book["levels"], book["channels"])
sums = sum(table[codes[:, plane]] for plane, table in enumerate(tables))
latents = sums.transpose(0, 3, 1, 2)  # (N, C, h, w), unscaled means""",
    ),
    "rans": (
        "import io\nimport json\n",
        """\
import torch
from latentds.store.format import Contract

book = Contract.from_json(contract, path).codebook
latents = book.dequantize(torch.from_numpy(codes))  # (N, C, h, w), unscaled means
integers = book.integers(torch.from_numpy(codes)).integers  # what the records hold""",
    ),
}
CARD = """---
{front_matter}---

# {patches:,} pathology patches as {format} latents

Each patch of {width}x{height} px is {bytes_per_patch:,} bytes: the latents of the autoencoder
{autoencoder} (latent_id {latent_id}), encoded as `{encoding}` by a codebook of {summary}
({kind}; {codebook_origin}). Decoding loses detail. Not for diagnosis.

| split | patches |
|---|---|
{splits}
{labels}
## Load

    from latentds import LatentLoader
    for batch in LatentLoader("this folder", split="{split}", batch_size=64):
        batch.images  # float (B, 3, {height}, {width}) in [0, 1]; \
batch.labels, batch.slides, batch.coords

Without the loader, a row is a pack of patches:

{imports}
    rows = datasets.load_dataset("this folder", split="{split}", streaming=True)
    row = next(iter(rows))
    codes = np.asarray(row["{codes}"], np.uint8)  # (N, {codes_shape})
    columns = pyarrow.parquet.read_table(io.BytesIO(row["{parquet}"])).to_pylist()  \
# N rows: label, slide, x, y, ...
    path = "this folder/.latentds/manifest.json"
    contract = json.load(open(path))["contract"]
{dequantize}

Check with `latentds verify`. The format is described in latentds' docs/format.md.
"""


def dataset_card(manifest: Manifest) -> str:
    """The text of a data set's README.md."""
    contract = manifest.contract
    made = manifest.made.get("codebook", {})
    imports, dequantize = DEQUANTIZE[contract.encoding]
    return CARD.format(
        front_matter=front_matter(manifest),
        patches=manifest.patches,
        format=FORMAT,
        width=contract.patch_px[1],
        height=contract.patch_px[0],
        bytes_per_patch=contract.bytes_per_patch,
        autoencoder=code_span(contract.autoencoder.get("name", "unknown")),
        latent_id=code_span(short(contract.latent_id)),
        encoding=contract.encoding,
        summary=contract.codebook.summary,
        kind=contract.codebook.kind,
        codebook_origin=markdown(made.get("origin") or "origin not recorded")
        + more_codebooks(manifest),
        splits="\n".join(f"| {name} | {count:,} |" for name, count in manifest.splits.items()),
        labels=label_table(manifest),
        split=next(iter(manifest.splits)),
        codes=CODES,
        parquet=PATCHES,
        codes_shape=", ".join(map(str, contract.codes_shape)),
        imports=indented(imports + "import datasets\nimport numpy as np\nimport pyarrow.parquet"),
        dequantize=indented(dequantize),
    )


def indented(code: str) -> str:
    """Lines as Markdown's code has them."""
    return textwrap.indent(code, "    ")


def more_codebooks(manifest: Manifest) -> str:
    """What a reader of a merged set must know of its other codebooks."""
    count = len(manifest.more_codebooks)
    return f"; {count} more beside it, a shard's header holds its own" if count else ""


def label_table(manifest: Manifest) -> str:
    """A Markdown table of patches a class, empty where there are no labels."""
    counts = manifest.labels()
    if not counts:
        return ""
    lines = "\n".join(f"| {markdown(name)} | {count:,} |" for name, count in counts.items())
    return f"\n| label | patches |\n|---|---|\n{lines}\n"


def facts_table(facts: Mapping[str, Any], more_in: str) -> str:
    """A Markdown table of nested JSON values; `more_in` names the file that has all of them."""
    rows = list(flatten(facts))
    if not rows:
        return "Nothing was recorded."
    lines = [f"| {markdown(name)} | {markdown(value)} |" for name, value in rows[:MAX_FACTS]]
    more = [f"\n{len(rows) - MAX_FACTS} more in `{more_in}`."] if len(rows) > MAX_FACTS else []
    return "\n".join(["| | |", "|---|---|", *lines, *more])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value) of nested JSON, values shortened."""
    for name, value in values.items():
        if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            value = {str(number): part for number, part in enumerate(value)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            shown = text if len(text) <= MAX_FACT else f"{text[:MAX_FACT]}..."
            yield f"{prefix}{name}"[:MAX_FACT], shown


def front_matter(
    manifest: Manifest,
    head: Sequence[str] = (),
    preview: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> str:
    """The card's YAML: configs and pinned features, written out plainly (every value is ours).

    head     lines to start with, such as the licence
    preview  lines of a second config, and of its features
    """
    lines = [*head, "configs:", "- config_name: default", "  data_files:"]
    for split in manifest.splits:
        lines += [f"  - split: {split}", f"    path: data/{split}-*.tar"]
    lines += [*preview[0], "dataset_info:", "- config_name: default", "  features:"]
    lines += [*features(manifest), *preview[1]]
    lines += ["tags:", "- pathology", "- latents", "- webdataset", "library_name: latentds"]
    return "\n".join(lines) + "\n"


def features(manifest: Manifest) -> list[str]:
    """YAML lines of a pack's features: inferred ones would differ between first packs and all."""
    shape = manifest.contract.codes_shape
    lines = [
        f"  - name: {CODES}",
        "    dtype:",
        f"      array{1 + len(shape)}_d:",
        f"        shape: [null, {', '.join(map(str, shape))}]",
        "        dtype: uint8",
    ]
    binaries = [MASKS, PATCHES] if has_masks(manifest.made) else [PATCHES]
    for name, dtype in [
        *((member, "binary") for member in binaries),
        ("__key__", "string"),
        ("__url__", "string"),
    ]:
        lines += [f"  - name: {name}", f"    dtype: {dtype}"]
    return lines


def has_masks(made: dict[str, Any]) -> bool:
    """Whether the packs carry masks."""
    return bool(made.get("masks"))

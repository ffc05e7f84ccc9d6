"""What a publisher says of a set, and the code on its card that loads it."""

from __future__ import annotations

import dataclasses
import json

from latentds.autoencoders.cards import CARDS
from latentds.store.composing import DEQUANTIZE
from latentds.store.format import CODES, PATCHES, SIDECARS
from latentds.store.manifest import Manifest

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
{imports}
import datasets
import numpy as np
import pyarrow.parquet
from huggingface_hub import hf_hub_download

rows = datasets.load_dataset("{repository}", split="{split}", streaming=True{revision})
row = next(iter(rows))
codes = np.asarray(row["{codes}"], np.uint8)  # (N, {codes_shape})
columns = pyarrow.parquet.read_table(io.BytesIO(row["{parquet}"])).to_pylist()  # label, slide, ...

path = hf_hub_download(
    "{repository}", "{sidecars}/manifest.json", repo_type="dataset"{revision}
)
with open(path) as file:
    contract = json.load(file)["contract"]
{dequantize}
```

{books}With `webdataset`, the same packs (it sends no token: fetch a private set first):

```python
import io

import numpy as np
import webdataset
from huggingface_hub import HfApi, hf_hub_url

names = HfApi().list_repo_files("{repository}", repo_type="dataset"{revision})
shards = [
    hf_hub_url("{repository}", name, repo_type="dataset"{revision})
    for name in sorted(names)
    if name.startswith("data/{split}-")
]
for sample in webdataset.WebDataset(shards, shardshuffle=False):
    codes = np.load(io.BytesIO(sample["{codes}"]), allow_pickle=False)
    break
```

`latentds fetch {repository}{at}` downloads everything with checksums, `latentds verify` checks it.
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
    def at(self) -> str:
        """What follows the repository's name where it is loaded: @BRANCH, nothing for main."""
        return f"@{self.branch}" if self.branch else ""

    @property
    def licence_lines(self) -> list[str]:
        """Of a card's YAML; what a user wrote is quoted as JSON, which YAML reads."""
        given = {"license_name": self.licence_name, "license_link": self.licence_link}
        quoted = [f"{name}: {json.dumps(text)}" for name, text in given.items() if text]
        return [f"license: {self.licence}", *quoted]


def loading(manifest: Manifest, publication: Publication) -> str:
    """Markdown with code for latentds, datasets and webdataset; a test runs it as it stands."""
    imports, dequantize = DEQUANTIZE[manifest.contract.encoding]
    known = manifest.contract.autoencoder.get("name") in CARDS
    return LOADING.format(
        repository=publication.repository,
        at=publication.at,
        revision=f', revision="{publication.branch}"' if publication.branch else "",
        autoencoder="" if known else ', autoencoder="PATH_OF_THE_AUTOENCODER"',
        split=next(iter(manifest.splits)),
        height=manifest.contract.patch_px[0],
        width=manifest.contract.patch_px[1],
        codes=CODES,
        parquet=PATCHES,
        sidecars=SIDECARS,
        codes_shape=", ".join(map(str, manifest.contract.codes_shape)),
        imports=imports,
        dequantize=dequantize,
        books=MORE_BOOKS.format(len(manifest.codebooks)) if manifest.more_codebooks else "",
    ).strip()

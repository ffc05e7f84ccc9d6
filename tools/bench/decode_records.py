"""Rate of entropy-coded records on a device: the entropy decoder alone, and with the network."""
# B batch, R record bytes, C latent channels, h w latent cells

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from latentds_tools.bench.decode_networks import (
    Settings,
    chosen,
    default_batch,
    describe,
    release,
)
from latentds_tools.bench.decode_shapes import find_decoder, gigaflops, shapes
from latentds_tools.bench.harness import Case, engaged, no_fallback, sustained, synchronize

from latentds.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from latentds.autoencoders.autoencoder import NetworkAutoencoder
    from latentds.loading.decoding import Decode
    from latentds.quantizers.entropy.record_codebook import EntropyCodebook

MOST_CODED = 16  # patches: coding one takes a CPU half a second
ALONE = "records, entropy decoder alone"


Patches = Callable[[], "Sequence[np.ndarray]"]


def cases(name: str, patches: Patches, config: Settings) -> list[Case]:
    """What is measured of an autoencoder whose records ship: none for others."""
    if name in shapes():  # of random weights
        return []
    autoencoder, weights = find_decoder(name)
    book = shipped_book(autoencoder, config.patch_size)
    if book is None:
        return []
    batch = (
        config.batch_sizes
        or (default_batch(config.device, gigaflops(autoencoder, config.patch_size)),)
    )[0]
    records = functools.cache(functools.partial(make_records, autoencoder, book, patches))
    head = {"decoder": name, "weights": weights, "gflop": None, "batch": batch}
    made = [Case(head | {"options": ALONE}, functools.partial(alone, book, records, batch, config))]
    options = chosen(config)[-1]  # all are ordered from plain to fast
    once = functools.partial(together, name, book, records, batch, options, config)
    return [*made, Case(head | {"options": f"records, {describe(options)}"}, once)]


def shipped_book(autoencoder: NetworkAutoencoder, patch_px: int) -> EntropyCodebook | None:
    """The entropy codebook that ships for an autoencoder's latents of such patches."""
    from latentds.autoencoders.autoencoder import latent_cells
    from latentds.autoencoders.tiny import shipped_records
    from latentds.quantizers.entropy.record_codebook import EntropyCodebook

    card = autoencoder.card
    shape = (card.channels, *latent_cells((patch_px, patch_px), card.factor))
    stored = shipped_records(card.latent_id, shape, None) if card.latent_id else None
    book = stored.codebook if stored else None
    assert book is None or isinstance(book, EntropyCodebook)
    return book


def make_records(autoencoder: NetworkAutoencoder, book: EntropyCodebook, patches: Patches) -> Any:
    """Records uint8 (n, R) of patches uint8 (H, W, 3)."""
    import numpy as np
    import torch

    from latentds.autoencoders import load_autoencoder

    # A decoder that replaces another says whose latents it reads.
    encoder = load_autoencoder(autoencoder.card.encoder or autoencoder.card.name)
    pixels = torch.from_numpy(np.stack(patches()[:MOST_CODED]))
    with torch.no_grad():
        return book.quantize(encoder.encode(pixels.permute(0, 3, 1, 2).float() / 255))


def repeated(records: Any, batch: int, device: str) -> Any:
    """A batch of records on the device, those given again and again."""
    import torch

    return records[torch.arange(batch) % len(records)].to(device)


def alone(book: EntropyCodebook, records: Any, batch: int, config: Settings) -> dict[str, Any]:
    """One round of records to latents."""
    codes = repeated(records(), batch, config.device)
    made: list[Any] = []

    def decode() -> None:
        made[:] = [book.dequantize(codes)]
        synchronize(config.device)

    rate, first = sustained(decode, config.seconds, batch)
    return {"patches_per_s": rate, "first_batch_s": first, "device": str(made[0].device)}


def together(
    name: str, book: EntropyCodebook, records: Any, batch: int, options: Decode, config: Settings
) -> dict[str, Any]:
    """One round of records to pixels."""
    from latentds.loading.decoding import Decoder

    codes, edge = repeated(records(), batch, config.device), config.patch_size
    decoder = Decoder(find_decoder(name)[0], [book], (edge, edge), config.device, options)

    def decode() -> None:
        decoder(codes)
        synchronize(config.device)

    try:
        with no_fallback():
            rate, first = sustained(decode, config.seconds, batch)
            return {"patches_per_s": rate, "first_batch_s": first, **engaged(decoder)}
    except InputError as error:
        return {"error": str(error), "never_engaged": True}
    finally:
        release(config.device)

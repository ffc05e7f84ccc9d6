"""Open a set of patches: what the input is, what it goes through, and what that is called."""
# n patches of a request, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from latentds.autoencoders import load_autoencoder, load_for_decoding
from latentds.autoencoders.autoencoder import (
    Autoencoder,
    AutoencoderCard,
    NetworkAutoencoder,
    short,
)
from latentds.autoencoders.decoders import replace_decoder
from latentds.codecs import (
    CodecSpec,
    LatentSpec,
    PictureSpec,
    make_picture_codec,
    parse_codec,
    with_quantizer,
)
from latentds.codecs.naming import FLOAT_BITS, latent_text
from latentds.core.processes import choose_device
from latentds.embedders.latent_stem import LatentStemConfig
from latentds.errors import ContractError, InputError
from latentds.evaluation.patchsets.developing import (
    DecodedCodes,
    Decoding,
    LatentRoundTrip,
    PictureRoundTrip,
    PlainPixels,
    UndecodedCodes,
    find_codebook,
)
from latentds.evaluation.patchsets.latent_patches import Shards, open_shards
from latentds.evaluation.patchsets.patch_set import (
    OF_ORIGINALS,
    ORIGINAL,
    PatchInput,
    SourceFacts,
    given_settings,
)
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.evaluation.patchsets.picture_patches import open_pictures
from latentds.loading.decoding import find_autoencoder
from latentds.sources.picture_rows import hub_id
from latentds.sources.source import count_workers
from latentds.store.channel_statistics import channel_statistics
from latentds.store.format import MANIFEST

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATHOLOGY = ("sd15-path", "sd3-path", "dcae-f32-path")  # decoders trained anew, by their cards
PREFIX = "latents:"  # of the name, before that of the same latents decoded


def open_patches(
    config: PatchInput, autoencoder: Autoencoder | None = None, like: PatchSet | None = None
) -> PatchSet:
    """The patches of originals, of originals through a codec, or of a data set.

    autoencoder  an object instead of the one that a codec names, or to decode latents with
    like         patches whose codebook a codec takes instead of one of its own
    raises       InputError for an input that is neither, or options that do not belong to it;
                 FileNotFoundError, FormatError, ContractError, UnknownNameError,
                 WeightsError, MissingExtraError
    """
    device, shards = choose_device(config.device), find_shards(config)
    if shards is not None:
        return open_latents(config, shards, autoencoder, device)
    spec = find_codec(config)
    if isinstance(spec, LatentSpec):
        return open_coded(config, spec, autoencoder, device, like)
    return open_originals(config, spec, device)


def find_codec(config: PatchInput) -> CodecSpec | None:
    """What originals go through; None for nothing."""
    try:
        return parse_codec(config.codec) if config.codec != ORIGINAL else None
    except ValueError as error:
        raise InputError(f"--codec {error}") from error


def find_shards(config: PatchInput) -> Shards | None:
    """The shards of a data set, None where the input is originals.

    raises  FormatError for a data set that is damaged or not complete
    """
    if "://" not in config.location:
        if not config.data.exists():
            raise FileNotFoundError(f"{config.location}: no such file or folder")
        is_set = (config.data / MANIFEST).parent.is_dir()
        return open_shards(config.location, config.split, config.check_codes) if is_set else None
    try:
        return open_shards(config.location, config.split, config.check_codes)
    except FileNotFoundError as error:
        if hub_id(config.data):
            return None
        raise InputError(
            f"{config.location}: no latentds data set there; originals must lie on this machine, "
            "copy them first"
        ) from error


def refuse(config: PatchInput, names: tuple[str, ...], why: str) -> None:
    for name, value in given_settings(config, names).items():
        option = name.replace("_", "-")
        raise InputError(f"--{option} {value}: not {why} ({config.location}); leave it")


def open_originals(config: PatchInput, spec: PictureSpec | None, device: torch.device) -> PatchSet:
    refuse(
        config,
        ("decoder", "codebook"),
        f"for {config.codec}" if spec else "for originals as they are",
    )
    if spec is not None and spec.at_equal_bytes:
        raise InputError(
            f"--codec {spec.name}: say at which quality or within how many bytes, for example "
            f"{spec.name}:50 or {spec.name}@4096"
        )
    codec = make_picture_codec(spec) if spec else None
    pictures, workers = open_pictures(config), count_workers(config.workers)
    pixels = PlainPixels(device, workers)
    measure: Callable[[], float] = pictures.bytes_per_patch
    if codec is not None:
        pixels = through = PictureRoundTrip(codec, device, workers)
        measure = functools.partial(through.mean_bytes, pictures)
    name = codec.name if codec else ORIGINAL
    facts = SourceFacts(
        name=name, kind="codec" if codec else "original", codec=name, patch_px=pictures.patch_px,
        data=config.location,
    )  # fmt: skip
    return PatchSet(pictures, pixels, facts, config.keep_mb, functools.cache(measure))


def open_coded(
    config: PatchInput,
    spec: LatentSpec,
    autoencoder: Autoencoder | None,
    device: torch.device,
    like: PatchSet | None,
) -> PatchSet:
    """Pictures through the codec of latents that the config names for them."""
    if spec.quantizer.refine:
        raise InputError(
            f"--codec {config.codec}: refining takes too long for patches that are encoded when "
            "they are read; convert them with --refine and give the data set"
        )
    if not spec.quantizer.is_fitted:
        refuse(config, ("codebook",), f"for {config.codec}, which has none")
    network = autoencoder or load_autoencoder(spec.name)
    if config.decoder is not None:
        network = with_decoder(network, config.decoder)
    pictures = open_pictures(config)
    stored = like.codebook if like is not None else None
    if stored is None and spec.quantizer.is_fitted:
        stored = find_codebook(config, network, spec.quantizer, pictures, device)
    codec = with_quantizer(
        network, spec.quantizer, patch_px=pictures.patch_px,
        codebook=None if stored is None else stored.codebook,
    )  # fmt: skip
    made = {} if stored is None else stored.made | {"codebook_id": stored.codebook.codebook_id}
    facts = latent_facts(
        network.card, spec.quantizer.text, kind="codec", patch_px=pictures.patch_px,
        quantized=spec.quantizer.kind not in FLOAT_BITS, bytes_per_patch=codec.patch_bytes,
        data=config.location, codebook=made,
    )  # fmt: skip
    dtype, compile = DTYPES[config.decode_dtype], config.decode_compile
    pixels = LatentRoundTrip(codec, device, dtype, compile=compile)
    return PatchSet(pictures, pixels, facts, config.keep_mb, codebook=stored)


def with_decoder(network: Autoencoder, decoder: str) -> Autoencoder:
    """An autoencoder with another decoder; ContractError where that reads other latents."""
    if not isinstance(network, NetworkAutoencoder):
        raise InputError(f"--decoder {decoder}: {network.card.name} is no network to replace it in")
    return replace_decoder(network, load_for_decoding(decoder))


def open_latents(
    config: PatchInput, shards: Shards, autoencoder: Autoencoder | None, device: torch.device
) -> PatchSet:
    stored = stored_facts(config, shards)
    manifest = shards.shards.manifest
    contract = manifest.contract
    network = find_autoencoder(shards.shards, autoencoder or config.decoder)
    card = network.card
    recorded = str(contract.autoencoder.get("name"))
    if not card.encoder and card.decoder_id != contract.decoder_id and card.name != recorded:
        card = dataclasses.replace(card, encoder=recorded)
    facts = latent_facts(card, contract.codebook.text, **stored)
    dtype, compile = DTYPES[config.decode_dtype], config.decode_compile
    decoding = Decoding(network, contract.patch_px, device, dtype, compile=compile)
    pixels = DecodedCodes(decoding, manifest.codebooks)
    return PatchSet(shards, pixels, facts, config.keep_mb)


def stored_facts(config: PatchInput, shards: Shards) -> dict[str, Any]:
    """Facts of a data set's latents, decoded or not; InputError for options of other inputs."""
    refuse(config, ("codec", "codebook"), "for a data set, whose latents have one")
    refuse(config, OF_ORIGINALS, "for a data set, whose patches are cut")
    contract = shards.shards.manifest.contract
    origin = {"origin": "stored with the latents", "codebook_id": contract.codebook.codebook_id}
    return {
        "kind": "latents", "quantized": True, "bytes_per_patch": contract.bytes_per_patch,
        "patch_px": contract.patch_px, "data": config.location, "codebook": origin,
    }  # fmt: skip


def latent_facts(card: AutoencoderCard, quantizer: str, **facts: Any) -> SourceFacts:
    """The facts of latents of an autoencoder; a decoder of another name follows a slash."""
    autoencoder = card.encoder or card.name
    text = latent_text(autoencoder, quantizer)
    decoder = card.name if card.encoder else None
    return SourceFacts(
        name=text if decoder is None else f"{text}/{decoder}",
        codec=text,
        autoencoder=autoencoder,
        decoder=decoder,
        fine_tuned=decoder is not None or card.name in PATHOLOGY,
        **facts,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class UndecodedPatches:
    """A set of patches by their latents.

    patches  its `images` and `stream` give latents float32 (n, C, h, w), normalized, instead of
             pixels; all else is as of the same patches decoded
    stem     what a network needs to know of them
    cells    (h, w)
    """

    patches: PatchSet
    stem: LatentStemConfig
    cells: tuple[int, int]


def open_undecoded(config: PatchInput, stem: LatentStemConfig | None = None) -> UndecodedPatches:
    """The latents of a data set.

    stem    of a network that is there already: latents are normalized as it has them
    raises  InputError for originals, or for a decoder; ContractError for other latents than the
            stem's, and what `open_patches` raises
    """
    refuse(config, ("decoder",), "for latents that go in as they are")
    device, shards = choose_device(config.device), find_shards(config)
    if shards is None:
        raise InputError(
            f"{config.location}: originals have no latents; convert them, and give the data set"
        )
    facts = stored_facts(config, shards)
    manifest = shards.shards.manifest
    contract = manifest.contract
    if stem is None:
        stem = LatentStemConfig.of(contract, channel_statistics(shards.shards))
    check_latents(stem, contract.latent_id, config.location)
    encoder = str(contract.autoencoder.get("encoder") or contract.autoencoder["name"])
    codec = latent_text(encoder, contract.codebook.text)
    described = SourceFacts(name=f"{PREFIX}{codec}", codec=codec, autoencoder=encoder, **facts)
    books = [stem.statistics.normalized(book) for book in manifest.codebooks]
    latents = UndecodedCodes(books, device, torch.float32)
    patches = PatchSet(shards, latents, described, config.keep_mb)
    return UndecodedPatches(patches, stem, contract.latents_shape[1:])


def check_latents(stem: LatentStemConfig, latent_id: str, where: str) -> None:
    """ContractError for latents that mean something else than those a network has learned."""
    if stem.latent_id and stem.latent_id != latent_id:
        raise ContractError(
            f"{where}: latents of latent_id {short(latent_id)}, the network reads "
            f"{short(stem.latent_id)}; give latents of the same autoencoder"
        )

"""What helps show first and last: the options that most runs need, and two command lines."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Help:
    """usual: fields shown behind the required ones; examples: what the help ends with."""

    usual: tuple[str, ...]
    examples: tuple[str, ...]


HELPS = {
    "convert": Help(
        ("autoencoder", "bytes", "patch_size", "mpp", "device"),
        (
            "latentds convert patches/ --out crc/",
            "latentds convert slides/ --out brca/ --patch-size 256 --mpp 0.5",
        ),
    ),
    "fit-codebook": Help(
        ("autoencoder", "kind", "bytes", "fit_patches", "device"),
        (
            "latentds fit-codebook patches/ --out book.safetensors",
            "latentds fit-codebook patches/ --autoencoder sd3 --kind additive --bytes 8192 "
            "--out book.safetensors",
        ),
    ),
    "info": Help(
        ("batch_size", "num_workers"), ("latentds info crc/", "latentds info crc/ --json")
    ),
    "verify": Help(
        ("level",), ("latentds verify crc/", "latentds verify crc/ --level manifest --json")
    ),
    "show": Help(
        ("slides", "split", "count"),
        ("latentds show crc/ --out crc.html", "latentds show brca/ --slides --out slides.html"),
    ),
    "upload": Help(
        ("overwrite",),
        (
            "latentds upload crc/ s3://bucket/crc",
            "latentds upload crc/ s3://bucket/crc --overwrite --json",
        ),
    ),
    "publish": Help(
        ("license", "dry_run", "private"),
        (
            "latentds publish crc/ ORG/crc --license cc-by-4.0 --dry-run",
            "latentds publish crc/ ORG/crc --license cc-by-4.0",
        ),
    ),
    "publish-decoder": Help(
        ("license", "dry_run", "private"),
        (
            "latentds publish-decoder runs/path ORG/path --license mit --dry-run",
            "latentds publish-decoder runs/path ORG/path --license mit",
        ),
    ),
    "publish-model": Help(
        ("license", "dry_run", "private"),
        (
            "latentds publish-model runs/ssl ORG/vit --license mit --dry-run",
            "latentds publish-model runs/ssl ORG/vit --license mit",
        ),
    ),
    "fetch": Help(("out",), ("latentds fetch ORG/crc", "latentds fetch ORG/crc@v2 --out crc/")),
    "merge": Help(
        ("overwrite",),
        (
            "latentds merge brca/ crc/ --out both/",
            "latentds merge brca/ crc/ --out both/ --overwrite --json",
        ),
    ),
    "repack": Help(
        ("encoding", "bytes", "splits", "exclude_slides", "pack_size"),
        (
            "latentds repack crc/ --out half/ --encoding rans --bytes 2048",
            "latentds repack brca/ --out fold0/ --splits splits_0.csv",
        ),
    ),
    "extract": Help(
        ("split", "where", "format", "device"),
        (
            "latentds extract crc/ --out pictures/",
            "latentds extract crc/ --out tumour/ --where \"label == 'TUM'\" --format png",
        ),
    ),
    "export": Help(
        ("split",),
        (
            "latentds export crc/ --out parquet/ --to parquet",
            "latentds export crc/ --out npy/ --to npy --split val",
        ),
    ),
    "import": Help(
        ("autoencoder", "layout", "scale", "shift", "codebook"),
        (
            "latentds import latents/ --out set/ --autoencoder sd3",
            "latentds import arrays/ --out set/ --autoencoder sd15 --scale 5.489 --shift 0",
        ),
    ),
    "features": Help(
        ("device", "batch_size", "codec", "split", "clam"),
        (
            "latentds features brca/ --embedder uni phikon-v2 --out brca-features/",
            "latentds features slides/ --patch-size 256 --mpp 0.5 --embedder efficientnet-lite0 "
            "--out features/ --clam",
        ),
    ),
    "compare": Help(
        ("out", "reference", "metric"),
        (
            "latentds compare runs/original runs/latents --out table/",
            "latentds compare runs/* --reference runs/original --json",
        ),
    ),
    "doctor": Help((), ("latentds doctor", "latentds doctor --json")),
    "demo": Help(
        ("out", "autoencoder", "device"), ("latentds demo", "latentds demo --out demo --overwrite")
    ),
    "bench shuffle": Help(
        ("split", "global_batch_size"),
        (
            "latentds bench shuffle crc/",
            "latentds bench shuffle crc/ --global-batch-size 1024 --json",
        ),
    ),
    "bench loader": Help(
        ("folder", "against", "decode", "workers", "device"),
        ("latentds bench loader", "latentds bench loader crc/ --device cuda --json"),
    ),
    "bench resume": Help(
        ("against", "topologies", "stops", "peer_python"),
        (
            "latentds bench resume",
            "latentds bench resume --against mds,litdata --peer-python peer/bin/python --json",
        ),
    ),
    "bench scale": Help(
        ("patches",), ("latentds bench scale", "latentds bench scale --patches 24000000 --json")
    ),
    "bench decode": Help(
        ("decoders", "device", "batch_sizes", "compile"),
        ("latentds bench decode", "latentds bench decode --decoders tiny,turbo-s --device cuda"),
    ),
    "bench features": Help(
        ("embedder", "device", "patches"),
        ("latentds bench features", "latentds bench features --embedder vit_large --device cuda"),
    ),
    "bench step": Help(
        ("arch", "method", "device", "batch_size", "steps"),
        ("latentds bench step", "latentds bench step --arch vit_small --device cuda --json"),
    ),
    "bench gpu": Help(
        ("minutes", "only", "device"),
        (
            "latentds bench gpu --out results/gpu-h100/",
            "latentds bench gpu --out miniature/ --device cpu --only decode,resident",
        ),
    ),
    "bench convert": Help(
        ("autoencoder", "device", "workers"),
        ("latentds bench convert patches/", "latentds bench convert patches/ --autoencoder tiny"),
    ),
    "bench container": Help(
        ("patches",), ("latentds bench container", "latentds bench container --small --json")
    ),
    "bench fidelity": Help(
        ("codecs", "embedders", "out", "crops", "fit_on"),
        (
            "latentds bench fidelity pictures/ --codecs tiny-v2+rans:4096,avif@4096,jpeg@4096 "
            "--out fidelity/",
            "latentds bench fidelity pictures/ --embedders uni --codecs sd15+kmeans --out uni/",
        ),
    ),
}

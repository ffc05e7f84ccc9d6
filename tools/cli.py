"""The `latentds` command: finds the tool's module, parses its config, prints errors as one line."""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import NamedTuple

from latentds.core.command_line import check_out, parse
from latentds.core.display import say, start_logging, visible
from latentds.core.extras import check_extras
from latentds.errors import LatentdsError
from latentds.version import __version__


class Command(NamedTuple):
    """A command; its module is imported when it is used: help stays fast.

    usual     fields that its help shows behind the required ones
    examples  what stands behind its name in the command lines that its help ends with
    """

    module: str
    text: str
    usual: tuple[str, ...]
    examples: tuple[str, ...]


COMMANDS = {
    "convert": Command(
        "convert",
        "convert slides or patches into a data set",
        ("autoencoder", "bytes", "patch_size", "mpp", "device"),
        ("patches/ --out crc/", "slides/ --out brca/ --patch-size 256 --mpp 0.5"),
    ),
    "fit-codebook": Command(
        "fit_codebook",
        "fit a codebook to a sample of pictures",
        ("autoencoder", "kind", "bytes", "fit_patches", "device"),
        (
            "patches/ --out book.safetensors",
            "patches/ --autoencoder sd3 --kind additive --bytes 8192 --out book.safetensors",
        ),
    ),
    "info": Command(
        "info",
        "describe a data set, and what loading it takes",
        ("batch_size", "num_workers"),
        ("crc/", "crc/ --json"),
    ),
    "verify": Command(
        "verify",
        "check a data set against its manifest, its hashes and its golden patches",
        ("level",),
        ("crc/", "crc/ --level manifest --json"),
    ),
    "show": Command(
        "show",
        "write a page of decoded patches with their columns",
        ("slides", "split", "count"),
        ("crc/ --out crc.html", "brca/ --slides --out slides.html"),
    ),
    "upload": Command(
        "upload",
        "copy a data set to an object store, the manifest last",
        ("overwrite",),
        ("crc/ s3://bucket/crc", "crc/ s3://bucket/crc --overwrite --json"),
    ),
    "publish": Command(
        "publish",
        "put a data set on the Hub, with a card and a preview",
        ("license", "dry_run", "private"),
        ("crc/ ORG/crc --license cc-by-4.0 --dry-run", "crc/ ORG/crc --license cc-by-4.0"),
    ),
    "publish-decoder": Command(
        "publish_decoder",
        "put a decoder on the Hub, with a card",
        ("license", "dry_run", "private"),
        ("runs/path ORG/path --license mit --dry-run", "runs/path ORG/path --license mit"),
    ),
    "publish-model": Command(
        "publish_model",
        "put a trained backbone on the Hub, with a card; timm loads it",
        ("license", "dry_run", "private"),
        ("runs/ssl ORG/vit --license mit --dry-run", "runs/ssl ORG/vit --license mit"),
    ),
    "fetch": Command(
        "fetch",
        "fetch a published data set into a folder, checked by its hashes",
        ("out",),
        ("ORG/crc", "ORG/crc@v2 --out crc/"),
    ),
    "merge": Command(
        "merge",
        "make one data set of several with the same latents",
        ("overwrite",),
        ("brca/ crc/ --out both/", "brca/ crc/ --out both/ --overwrite --json"),
    ),
    "repack": Command(
        "repack",
        "write a data set anew in other packs, order or splits, or in fewer bytes",
        ("encoding", "bytes", "splits", "exclude_slides", "pack_size"),
        (
            "crc/ --out half/ --encoding rans --bytes 2048",
            "brca/ --out fold0/ --splits splits_0.csv",
        ),
    ),
    "extract": Command(
        "extract",
        "write decoded pictures in class folders, with a table",
        ("split", "where", "format", "device"),
        ("crc/ --out pictures/", "crc/ --out tumour/ --where \"label == 'TUM'\" --format png"),
    ),
    "export": Command(
        "export_to",
        "write Parquet or npy files",
        ("split",),
        ("crc/ --out parquet/ --to parquet", "crc/ --out npy/ --to npy --split val"),
    ),
    "import": Command(
        "import_latents",
        "make a data set of latents from other programs",
        ("autoencoder", "layout", "scale", "shift", "codebook"),
        (
            "latents/ --out set/ --autoencoder sd3",
            "arrays/ --out set/ --autoencoder sd15 --scale 5.489 --shift 0",
        ),
    ),
    "features": Command(
        "features",
        "embed the patches of every slide, in TRIDENT's and CLAM's layout",
        ("device", "batch_size", "codec", "split", "clam"),
        (
            "brca/ --embedder uni phikon-v2 --out brca-features/",
            "slides/ --patch-size 256 --mpp 0.5 --embedder efficientnet-lite0 --out features/ "
            "--clam",
        ),
    ),
    "compare": Command(
        "compare",
        "compare evaluations on several sources of the same patches",
        ("out", "reference", "metric"),
        ("runs/original runs/latents --out table/", "runs/* --reference runs/original --json"),
    ),
    "doctor": Command(
        "doctor", "report what is installed, missing or broken on this machine", (), ("", "--json")
    ),
    "demo": Command(
        "demo",
        "run the main job on real H&E pictures and write a page about it",
        ("out", "autoencoder", "device"),
        ("", "--out demo --overwrite"),
    ),
    "bench shuffle": Command(
        "bench.bench_shuffle",
        "measure how far an order is from uniform, and what ranks read",
        ("global_batch_size",),
        ("crc/", "crc/ --global-batch-size 1024 --json"),
    ),
    "bench loader": Command(
        "bench.bench_loader",
        "compare the rates of loaders on the same patches",
        ("folder", "against", "decode", "workers", "device"),
        ("", "crc/ --device cuda --json"),
    ),
    "bench resume": Command(
        "bench.bench_resume",
        "compare what loaders lose, repeat and move when killed and resumed",
        ("against", "peer_python"),
        ("", "--against mds,litdata --peer-python peer/bin/python --json"),
    ),
    "bench scale": Command(
        "bench.bench_scale",
        "measure opening, a first batch and a state as sets grow",
        ("patches",),
        ("", "--patches 24000000 --json"),
    ),
    "bench decode": Command(
        "bench.bench_decode",
        "measure decoders under their options, beside JPEG",
        ("decoders", "device", "batch_sizes", "compile"),
        ("", "--decoders tiny,turbo-s --device cuda"),
    ),
    "bench features": Command(
        "bench.bench_features",
        "measure what decoding adds to an extraction of features",
        ("embedder", "device", "patches"),
        ("", "--embedder timm:vit_base_patch16_224 --device cuda"),
    ),
    "bench step": Command(
        "bench.bench_step",
        "measure what loading and decoding add to a training step",
        ("arch", "device", "batch_size", "steps"),
        ("", "--arch vit_small_patch16_224 --device cuda --json"),
    ),
    "bench gpu": Command(
        "bench.bench_gpu",
        "measure what a machine with a GPU can tell, within a time limit",
        ("minutes", "only", "device"),
        ("--out results/gpu-h100/", "--out miniature/ --device cpu --only decode,resident"),
    ),
    "bench convert": Command(
        "bench.bench_convert",
        "compare the rate of a conversion with the encoder's alone",
        ("autoencoder", "device"),
        ("patches/", "patches/ --autoencoder tiny"),
    ),
    "bench container": Command(
        "bench.bench_container",
        "measure container overhead for patch and pack sizes",
        ("patches",),
        ("", "--small --json"),
    ),
    "bench fidelity": Command(
        "bench.bench_fidelity",
        "measure what codecs and autoencoders keep of patches, at which bytes",
        ("codecs", "embedders", "out", "crops", "fit_on"),
        (
            "pictures/ --codecs tiny-v2+rans:4096,avif@4096,jpeg@4096 --out fidelity/",
            "pictures/ --embedders uni --codecs sd15+kmeans --out uni/",
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit code 0 done, 1 an error told in one line, 2 wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        say(f"latentds {__version__}")
        return
    if not words or words[0] in ("-h", "--help"):
        say(overview(""))
        return
    names = (" ".join(words[:length]) for length in (2, 1))
    command = next((name for name in names if name in COMMANDS), None)
    if command is None:
        is_group = words[0] in {name.split()[0] for name in COMMANDS if " " in name}
        if is_group and words[1:2] in ([], ["-h"], ["--help"]):
            say(overview(words[0]))
            sys.exit(0 if words[1:] else 2)
        say(unknown_command(words, is_group), file=sys.stderr)
        sys.exit(2)
    start_logging(logging.INFO)
    sys.exit(run(command, words[len(command.split()) :]))


def run(name: str, words: list[str]) -> int:
    """Parse and run one command; returns the exit code."""
    command = COMMANDS[name]
    module = importlib.import_module(f"latentds_tools.{command.module}")
    try:
        for word, answer in getattr(module, "ANSWERS", {}).items():
            if word in {given.replace("_", "-") for given in words}:
                say(answer())
                return 0
        examples = [f"latentds {name} {rest}".rstrip() for rest in command.examples]
        config = parse(
            module.Config, words, prog=f"latentds {name}", usual=command.usual, examples=examples
        )
        check_extras(name, config)
        check_out(config)
        return int(module.run(config) or 0)
    except LatentdsError as error:
        return complain(str(error))
    except FileNotFoundError as error:
        return complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return complain(
            f"{where}{error.strerror or error}. Nothing finished is lost; mend it and run again"
        )
    except KeyboardInterrupt:
        say("interrupted; nothing finished is lost: run the same command again", file=sys.stderr)
        return 130


def complain(line: str) -> int:
    """Print an error as one line; the exit code of a failure."""
    say(f"latentds: {visible(' '.join(line.split()))}", file=sys.stderr)
    return 1


def unknown_command(words: list[str], is_group: bool) -> str:
    """That there is no such command, with the nearest one, or its group's."""
    given = " ".join(words[: 2 if is_group else 1])
    close = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    listing = f"latentds {words[0]} --help" if is_group else "latentds --help"
    return f"latentds: unknown command {visible(given)!r}{hint} '{listing}' lists all"


def overview(group: str) -> str:
    chosen = [name for name in COMMANDS if not group or name.startswith(f"{group} ")]
    lines = [f"  {name:<16} {COMMANDS[name].text}" for name in chosen]
    title = "Pathology patches as autoencoder latents: convert, check, look, load."
    usage = f"usage: latentds {group or 'COMMAND'} [-h] ..."
    return "\n".join(
        [usage, "", title, "", *lines, "", "'latentds COMMAND --help' tells a command's options."]
    )


if __name__ == "__main__":
    main()

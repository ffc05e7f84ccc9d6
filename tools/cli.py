"""The `latentds` command: finds the tool's module, parses its config, prints errors as one line."""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
from collections.abc import Sequence

from latentds_tools.helps import HELPS

from latentds.core.command_line import parse
from latentds.core.display import say, start_logging, visible
from latentds.core.extras import check_extras
from latentds.errors import LatentdsError
from latentds.version import __version__

# command: (module, what it does). Modules are imported when their command is used: help stays fast.
COMMANDS = {
    "convert": ("convert", "convert slides or patches into a data set"),
    "fit-codebook": ("fit_codebook", "fit a codebook to a sample of pictures"),
    "info": ("info", "say what a data set holds and what loading it takes"),
    "verify": (
        "verify",
        "check a data set against its manifest, its hashes and its golden patches",
    ),
    "show": ("show", "write a page of decoded patches with their columns"),
    "upload": ("upload", "copy a data set to an object store, the manifest last"),
    "publish": ("publish", "put a data set on the Hub, with a card and a preview"),
    "publish-decoder": ("publish_decoder", "put a decoder on the Hub, with a card"),
    "publish-model": (
        "publish_model",
        "put a trained backbone on the Hub, with a card; timm loads it",
    ),
    "fetch": ("fetch", "fetch a published data set into a folder, checked by its hashes"),
    "merge": ("merge", "one data set of several of the same latents, codebooks side by side"),
    "repack": ("repack", "the same codes in other packs, order or splits, slides left out"),
    "extract": ("extract", "decoded pictures in class folders, with a table"),
    "export": ("export_to", "to Parquet, a tree of npy files, or an index for wids"),
    "import": ("import_latents", "a data set of latents that others made"),
    "features": ("features", "embed the patches of every slide, in TRIDENT's and CLAM's layout"),
    "compare": (
        "compare",
        "tables and plots of evaluations on several sources of the same patches",
    ),
    "doctor": ("doctor", "say what is installed, missing or in the way on this machine"),
    "demo": ("demo", "run the main job on real H&E pictures and write a page about it"),
    "bench shuffle": (
        "bench.bench_shuffle",
        "how far an order is from uniform, what it makes ranks read",
    ),
    "bench loader": (
        "bench.bench_loader",
        "rates of loaders over the same patches, ours and others",
    ),
    "bench resume": (
        "bench.bench_resume",
        "what loaders lose, repeat and move when killed and resumed",
    ),
    "bench scale": (
        "bench.bench_scale",
        "what opening, a first batch and a state cost as sets grow",
    ),
    "bench decode": (
        "bench.bench_decode",
        "decoders under their options, beside JPEG, on a device",
    ),
    "bench features": (
        "bench.bench_features",
        "what decoding adds to embedding, in a feature extraction from latents",
    ),
    "bench step": ("bench.bench_step", "what loading and decoding add to a step of training"),
    "bench gpu": (
        "bench.bench_gpu",
        "all that a machine with a GPU can tell, in so many minutes",
    ),
    "bench convert": ("bench.bench_convert", "rate of a conversion beside the encoder's alone"),
    "bench container": ("bench.bench_container", "container overhead for patch and pack sizes"),
    "bench fidelity": (
        "bench.bench_fidelity",
        "what codecs and autoencoders keep of patches, at how many bytes",
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
    command = find_command(words)
    if command is None:
        is_group = words[0] in {name.split()[0] for name in COMMANDS if " " in name}
        if is_group and words[1:2] in ([], ["-h"], ["--help"]):
            say(overview(words[0]))
            sys.exit(0 if words[1:] else 2)
        say(unknown_command(words, is_group), file=sys.stderr)
        sys.exit(2)
    start_logging(logging.INFO)
    # They tell every request, every retry, every attempt to find a faster build.
    for name in ("httpx", "faiss", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(run(command, words[len(command.split()) :]))


def run(command: str, words: list[str]) -> int:
    """Parse and run one command; returns the exit code."""
    module = importlib.import_module(f"latentds_tools.{COMMANDS[command][0]}")
    try:
        for word, answer in getattr(module, "ANSWERS", {}).items():
            if word in {given.replace("_", "-") for given in words}:
                say(answer())
                return 0
        config = parse(
            module.Config,
            words,
            prog=f"latentds {command}",
            usual=HELPS[command].usual,
            examples=HELPS[command].examples,
        )
        check_extras(command, config)
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
        say("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def complain(line: str) -> int:
    """Print an error as one line; the exit code of a failure."""
    say(f"latentds: {visible(' '.join(line.split()))}", file=sys.stderr)
    return 1


def find_command(words: list[str]) -> str | None:
    """The command the first words name, None where they name none."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name
    return None


def unknown_command(words: list[str], is_group: bool) -> str:
    """That there is no such command, with the nearest one, or its group's."""
    given = " ".join(words[: 2 if is_group else 1])
    close = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    listing = f"latentds {words[0]} --help" if is_group else "latentds --help"
    return f"latentds: unknown command {visible(given)!r}{hint} '{listing}' lists all"


def overview(group: str) -> str:
    """The list of commands, or of one group's."""
    chosen = {
        n: text for n, (_, text) in COMMANDS.items() if not group or n.startswith(f"{group} ")
    }
    lines = [f"  {name:<16} {text}" for name, text in chosen.items()]
    title = "Pathology patches as autoencoder latents: convert, check, look, load."
    usage = f"usage: latentds {group or 'COMMAND'} [-h] ..."
    return "\n".join(
        [usage, "", title, "", *lines, "", "'latentds COMMAND --help' tells a command's options."]
    )


if __name__ == "__main__":
    main()

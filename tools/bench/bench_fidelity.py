"""latentds bench fidelity: what codecs and autoencoders keep of patches, at how many bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from latentds_tools.fidelity.fidelity_config import Config

from latentds.core.display import say
from latentds.errors import InputError

PAGE, REPORT = "fidelity.md", "fidelity.json"
OUTPUTS = (REPORT, PAGE, "rate_fidelity.png", "rate_fidelity.svg", "contact_sheet.png")

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Measure, write, print."""
    from latentds_tools.fidelity.comparing import compare
    from latentds_tools.fidelity.fidelity_page import write_page

    config = config.filled()
    with writing(config):
        report, files = compare(config)
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        page = write_page(report)
        if config.out is not None:
            from latentds.core.storage import write_together

            # The report comes last: where it is there, all are whole.
            files |= {PAGE: page.encode(), REPORT: text.encode()}
            write_together({config.out / name: content for name, content in files.items()})
    say(text if config.json else page, end="")


@contextlib.contextmanager
def writing(config: Config) -> Iterator[None]:
    """Hold --out for this run; InputError where a report is there or another run writes one."""
    if config.out is None:
        yield
        return
    from latentds_tools.fidelity.fidelity_plots import check_matplotlib

    from latentds.core.storage import exclusive_lock

    check_matplotlib()
    there = [name for name in OUTPUTS if (config.out / name).exists()]
    if there and not config.overwrite:
        raise InputError(f"{config.out / there[0]}: is there; pass --overwrite to replace it")
    with exclusive_lock(config.out / "rows" / "lock"):
        yield

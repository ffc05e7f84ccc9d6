"""latentds bench fidelity: what codecs and autoencoders keep of patches, at how many bytes."""

from __future__ import annotations

import contextlib

from latentds_tools.fidelity.fidelity_config import Config

PLOT = "rate_fidelity.png"
OUTPUTS = ("fidelity.json", "fidelity.md", "fidelity.html", PLOT)

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    from latentds_tools.fidelity.comparing import compare
    from latentds_tools.fidelity.fidelity_page import draw_plot, write_page
    from latentds_tools.reports.commands import check_free, deliver

    from latentds.core.storage import exclusive_lock

    config = config.filled()
    out = config.out
    if out is not None:
        check_free([out / name for name in OUTPUTS], config.overwrite)
    with exclusive_lock(out / "rows" / "lock") if out else contextlib.nullcontext():
        report, crops = compare(config)
        pictures = {PLOT: draw_plot(report)} if out else {}
        page = write_page(report)
        deliver(report, page, "fidelity", out, pictures, figures=crops, as_json=config.json)

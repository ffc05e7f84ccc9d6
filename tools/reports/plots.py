"""Figures of matplotlib without a display: made, given a legend, and saved to bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any


def make_panels(
    count: int, panel_in: tuple[float, float], columns: int | None = None
) -> tuple[Any, list[Any]]:
    """A figure and the axes of so many panels.

    panel_in  width and height of a panel in inches
    columns   panels side by side at most; None for all of them
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns or count, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(panel_in[0] * columns, panel_in[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def add_legend(figure: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False)


def saved(figure: Any, dpi: int) -> bytes:
    """The figure's PNG: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()

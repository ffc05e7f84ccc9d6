"""What griffe, which reads the code for mkdocstrings, is told of ours: lazy names and columns."""

from __future__ import annotations

import re
from typing import Any

import griffe

import latentds


class PublicNames(griffe.Extension):
    """Names of latentds as aliases of where they are defined; docstrings' columns as they are."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Tell what `latentds.__getattr__` gives, which griffe does not call."""
        pkg.exports = sorted({*latentds.__all__} - {"__version__"}, key=str.lower)
        for name in pkg.exports:
            home = getattr(latentds, name).__module__
            pkg.set_member(name, griffe.Alias(name, f"{home}.{name}"))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Set paragraphs as code that Markdown would change: columns, indented lines, `<`."""
        if obj.docstring:
            parts = obj.docstring.value.split("\n\n")
            parts = [f"```text\n{part}\n```" if re.search("  |<", part) else part for part in parts]
            obj.docstring.value = "\n\n".join(parts)

"""From the values in mask files to labels: 0 for not labelled, then the classes from 1 on."""
# n masks, K labels with 0, H W pixels

from __future__ import annotations

import dataclasses

import numpy as np

from latentds.errors import InputError

IGNORE = "ignore"
UNLABELLED = 0
FOREIGN = 255  # in the table: a value that no class is given for


@dataclasses.dataclass(frozen=True, eq=False)
class MaskValues:
    """What the values of masks mean.

    text     as it was given, for messages
    classes  names of the labels 1 .. K - 1
    table    uint8 (256,): label of a value, FOREIGN for none
    """

    text: str
    classes: tuple[str, ...]
    table: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels 0 .. K - 1."""
        return ("unlabelled", *self.classes)

    def labels(self, masks: np.ndarray, sources: list[str]) -> np.ndarray:
        """Labels uint8 (n, H, W) of masks uint8 (n, H, W).

        sources  the masks' files, for messages
        raises   InputError that names the file, the values seen and what to do
        """
        labels: np.ndarray = self.table[masks]
        for source, mask, found in zip(sources, masks, labels, strict=True):
            if (found == FOREIGN).any():
                raise self.foreign(source, np.unique(mask).tolist())
        return labels

    def foreign(self, source: str, values: list[int]) -> InputError:
        """The error of a mask with values that stand for nothing."""
        unknown = [value for value in values if self.table[value] == FOREIGN]
        example = f"{self.text},{unknown[0]}:{IGNORE}"
        return InputError(
            f"{source}: its mask has the values {shown(values)}, and --mask-values {self.text} "
            f"does not say what {shown(unknown)} stands for; say it, for example "
            f"--mask-values {example}"
        )


def parse_mask_values(text: str, classes: tuple[str, ...]) -> MaskValues:
    """`0:ignore,255:nuclei` as a table.

    text     VALUE:CLASS, separated by commas; a class by name, or by number from 1 on
    raises   ValueError for what is not so written, a value said twice, or a class with no value
    """
    if not classes or len(set(classes)) < len(classes) or IGNORE in classes:
        raise ValueError(f"classes are {classes}; names, each once, none of them {IGNORE!r}")
    table = np.full(256, FOREIGN, np.uint8)
    for part in filter(None, (part.strip() for part in text.split(","))):
        value, colon, name = (word.strip() for word in part.partition(":"))
        if not colon or not value.isdecimal() or int(value) > 255:
            raise ValueError(f"mask_values {text!r}: {part!r} is not VALUE:CLASS, 0 to 255")
        if table[int(value)] != FOREIGN:
            raise ValueError(f"mask_values {text!r}: the value {value} is there twice")
        table[int(value)] = label_of(name, classes, text)
    missing = [name for label, name in enumerate(classes, 1) if label not in table]
    if missing:
        raise ValueError(f"mask_values {text!r}: no value stands for {', '.join(missing)}")
    return MaskValues(text, classes, table)


def label_of(name: str, classes: tuple[str, ...], text: str) -> int:
    """The label that a word of the mapping means."""
    if name == IGNORE:
        return UNLABELLED
    if name in classes:
        return classes.index(name) + 1
    if name.isdecimal() and 1 <= int(name) <= len(classes):
        return int(name)
    raise ValueError(
        f"mask_values {text!r}: no class {name!r}; there are {', '.join(classes)}, numbered from "
        f"1, and {IGNORE!r}"
    )


def shown(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")

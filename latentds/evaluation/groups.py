"""Patients: which group an item belongs to, and the labels of slides."""
# n items (patches or slides)

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from latentds.core.display import number_of
from latentds.errors import InputError
from latentds.sources.csv_tables import TextTable, read_table
from latentds.sources.image_folder import check_class_names, known_patient
from latentds.sources.names import ALIASES
from latentds.sources.slide_names import NameIndex, plain_name, some
from latentds.store.format import sorted_names

SLIDE_COLUMNS = ALIASES["slide"]
SOURCE_COLUMNS = ("source", *ALIASES["path"])
GROUP_COLUMNS = ("group", *ALIASES["patient"])
LABEL_COLUMNS = ALIASES["label"]
# Patients whose names mean the same person everywhere; patient_001 may be anyone.
UNIQUE = ("TCGA", "CPTAC", "GTEx")
SUBSET_HINT = "Mend the table, or pass --allow-subset"


def groups_of(
    slides: Sequence[str | None],
    sources: Sequence[str],
    table: Path | None,
    patients: Sequence[str | None] = (),
) -> tuple[list[str], str]:
    """The group of every item (n), which no split may cut, and the rule in words.

    slides   name of every item's slide, None where it is not known
    sources  name of every item's own file
    table    CSV with a column slide, slide_id, bag, source, path, name or file, and one of group,
             patient, case_id or tma_core; without one, the patient that is recorded; the
             TCGA patient where the slide's name has one, or, of an item without a slide, its
             file's; else the slide, else the item itself
    patients name of every item's patient where one is recorded; may be empty
    raises   InputError for a table without such columns, one that lacks an item, gives a name two
             groups, has names that can mean several, or parts a patient that names tell
    """
    if table is not None:
        return table_groups(slides, sources, read_table(table))
    groups, kinds = [], Counter[str]()
    for kind, group in own_groups(slides, sources, patients):
        kinds[kind] += 1
        groups.append(group)
    return groups, describe_rule(kinds)


def own_groups(
    slides: Sequence[str | None], sources: Sequence[str], patients: Sequence[str | None] = ()
) -> Iterator[tuple[str, str]]:
    """What kind of group every item's names tell, and the group."""
    known = patients or [None] * len(slides)
    for slide, source, patient in zip(slides, sources, known, strict=True):
        name = plain_name(slide or source)
        if patient:
            yield "recorded patient", patient
        elif found := known_patient(name.rpartition("/")[2]):
            yield f"{found[0]} patient", found[1]
        else:
            yield ("slide", name) if slide else ("item", source)


def count_alone(
    slides: Sequence[str | None], sources: Sequence[str], patients: Sequence[str | None] = ()
) -> int:
    """How many items are groups of their own, as neither their slide nor a patient is known."""
    return sum(kind == "item" for kind, _ in own_groups(slides, sources, patients))


def describe_rule(kinds: Mapping[str, int]) -> str:
    words = {
        "item": "each file by itself, as no slide is known",
        "slide": "slide, as no patient is known",
    }
    if len(kinds) == 1:
        (kind,) = kinds
        return words.get(kind, kind)
    return "; ".join(f"{words.get(k, k)} ({kinds[k]:,} items)" for k in sorted(kinds))


def table_groups(
    slides: Sequence[str | None], sources: Sequence[str], table: TextTable
) -> tuple[list[str], str]:
    """Groups by the first column of the table that knows every item."""
    column = table.need_column(GROUP_COLUMNS, "groups")
    tried: dict[str, list[str]] = {}
    for known_as in (*SLIDE_COLUMNS, *SOURCE_COLUMNS):
        key = table.find_column([known_as])
        if key is None:
            continue
        names = sources if known_as in SOURCE_COLUMNS else [slide or "" for slide in slides]
        known = column_values(table, key, column)
        found = match_values(names, known, f"{table.path}, column {key!r}")
        lost = [name for name in dict.fromkeys(names) if name not in found]
        if not lost:
            check_patients(names, [found[name] for name in names], f"{table.path}, {column!r}")
            rule = f"column {column!r} of {table.path.name}, by {key!r}"
            return [found[name] for name in names], rule
        tried[key] = lost
    if not tried:
        table.need_column((*SLIDE_COLUMNS, *SOURCE_COLUMNS), "slides or files")
    key, lost = min(tried.items(), key=lambda pair: len(pair[1]))
    raise InputError(
        f"{table.path}: its column {key!r} lacks {number_of(len(lost), 'item')}: {some(lost)}. "
        "Every item needs a line"
    )


def column_values(table: TextTable, key: str, column: str) -> dict[str, str]:
    """Values by name; InputError for an empty one, or a name with two."""
    found: dict[str, str] = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        name, value = row[key].strip(), row[column].strip()
        where = f"{table.path}, line {line}"
        if not name or not value:
            raise InputError(f"{where}: {key!r} is {name!r} and {column!r} is {value!r}; fill both")
        if found.setdefault(name, value) != value:
            raise InputError(
                f"{where}: {name!r} has the {column} {value!r}, before it had {found[name]!r}"
            )
    return found


def check_patients(names: Sequence[str], groups: Sequence[str], where: str) -> None:
    """InputError where a patient that names tell is in two groups, and so could be on both sides.

    names  of slides or files, as many as groups
    """
    first: dict[str, tuple[str, str]] = {}
    for name, group in dict.fromkeys(zip(names, groups, strict=True)):
        found = known_patient(plain_name(name))
        if found is None or found[0] not in UNIQUE:
            continue
        other, before = first.setdefault(found[1], (name, group))
        if before != group:
            raise InputError(
                f"{where}: {other!r} is of {before!r} and {name!r} of {group!r}, but both are of "
                f"patient {found[1]}, who has to be on one side; name patients there, or give "
                "none: the names of these tell them"
            )


def match_values(names: Sequence[str], known: Mapping[str, str], where: str) -> dict[str, str]:
    """Values of the names that mean a known one, by name."""
    keys = list(known)
    matched = NameIndex(keys).match([name for name in names if name], where)
    return {name: known[keys[place]] for name, place in matched.items() if place is not None}


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """Labels of slides as a file has them.

    cases   the patient by slide; empty where the file has no such column
    """

    path: Path
    labels: dict[str, str]
    cases: dict[str, str]


def read_labels(path: Path) -> LabelTable:
    """CLAM's case_id, slide_id, label; or slide or bag, label, and one of group, patient, tma_core.

    Lines without a label are left out: their slides have none.

    raises  InputError for missing columns or values, and for a slide with two labels or patients
    """
    table = read_table(path)
    key = table.need_column(SLIDE_COLUMNS, "slides")
    label = table.need_column(LABEL_COLUMNS, "labels")
    case = table.find_column([name for name in GROUP_COLUMNS if name != key])
    cases = column_values(table, key, case) if case else {}
    told = [place for place, row in enumerate(table.rows) if row[label].strip()]
    rows, lines = [table.rows[place] for place in told], [table.lines[place] for place in told]
    labelled = dataclasses.replace(table, rows=rows, lines=lines)
    return LabelTable(path, column_values(labelled, key, label), cases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledSlides:
    """Slides that have both bags and labels, in the order of the bags.

    targets  int64 (n,), places in `classes`
    groups   patients, and `group_rule` how they were found
    notes    what was left out, in sentences
    """

    slides: list[str]
    classes: list[str]
    targets: np.ndarray
    groups: list[str]
    group_rule: str
    notes: list[str]


def match_labels(
    table: LabelTable,
    slides: Sequence[str],
    *,
    allow_subset: bool = False,
    groups: Path | None = None,
    patients: Sequence[str | None] = (),
) -> LabelledSlides:
    """Labels and patients of the slides that there are bags of.

    slides        names of the bags, each once
    allow_subset  use what is on both sides, and note what is not
    groups        table for `groups_of`, instead of the labels' own patients
    patients      of the slides, as their patches record them, where labels tell none
    raises        InputError that lists some labels without a bag or bags without a label; for
                  names that can mean several; for no slide on both sides; for two classes whose
                  names differ in case, spaces, - or _ alone
    """
    names = list(table.labels)
    matched = NameIndex(names).match(slides, str(table.path))
    found = {slide: names[place] for slide, place in matched.items() if place is not None}
    seen = set(found.values())
    lost = [name for name in names if name not in seen]
    bare = [slide for slide in matched if slide not in found]
    told = (
        ("label is of a slide that is not there", "labels are of slides that are not there", lost),
        ("slide has no label", "slides have no label", bare),
    )
    notes = [f"{number_of(len(left), one, more)}: {some(left)}" for one, more, left in told if left]
    if notes and (not allow_subset or not found):
        raise InputError(f"{table.path}: {'; '.join(notes)}. {SUBSET_HINT}")
    kept = list(found)
    labels = [table.labels[found[slide]] for slide in kept]
    notes += check_class_names(labels, table.path)
    classes = sorted_names(labels)
    places = {name: number for number, name in enumerate(classes)}
    targets = np.array([places[label] for label in labels], np.int64)
    if groups is None and table.cases:
        own, rule = [table.cases[found[slide]] for slide in kept], f"patients of {table.path.name}"
        check_patients(kept, own, f"{table.path}, patients")
    else:
        known = dict(zip(slides, patients, strict=True)) if patients else {}
        own, rule = groups_of(kept, kept, groups, [known.get(slide) for slide in kept])
    return LabelledSlides(
        slides=kept, classes=classes, targets=targets, groups=own, group_rule=rule, notes=notes
    )

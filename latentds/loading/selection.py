"""Which patches of a split to use: a condition on the columns of the patch table, lists of slides.

Reads the table, never a shard. A condition is parsed, never evaluated as code.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentds.core.display import number_of
from latentds.errors import InputError, UnknownNameError, first_words, unknown_name
from latentds.sources import image_folder, names
from latentds.sources.names import patient_of
from latentds.store.reader import ShardSet

BLOCK_ROWS = 1 << 20
SHOWN = 300  # characters of a condition that an error repeats
COMPARED = 1000  # comparisons; Arrow's stack overflows between 3,000 and 20,000
NAMES = ("label", "slide", "patient")  # columns of names, by number in the table
NUMBERS = ("x", "y", "mpp", "size_px")
GRAMMAR = "comparisons of columns with values, 'in' lists, 'is None', and, or, not, startswith"
COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}


def select_rows(
    shards: ShardSet,
    split: str | None,
    where: str | None = None,
    slides: Sequence[str] | None = None,
    rows: Any = None,
    mixed: Sequence[ShardSet] = (),
) -> np.ndarray | None:
    """Rows of the patch table that are chosen, ascending; None stands for the whole split.

    split   None for all of them
    where   e.g. "label == 'TUM' and mpp < 0.6"; columns: label, slide, patient, x, y, mpp, size_px.
            A patch whose value is unknown fails every comparison.
    slides  names of slides to keep
    rows    of the patch table, to keep; None for all
    mixed   the sets of a mixture: a name that one of them has is none that is misspelt
    raises  InputError for a condition that is none or chooses nothing, or rows that are not the
            split's; UnknownNameError for a column, label or slide that the set does not have
    """
    if where is None and slides is None and rows is None:
        return None
    first, end = (0, len(shards)) if split is None else shards.patch_range(split)
    sets = mixed or [shards]
    if rows is not None and len(sets) > 1:
        raise InputError("Select(rows=...) counts in one set's table; not for a mixture of several")
    given = None if rows is None else checked_rows(shards, rows, (first, end), split)
    condition = Parser(shards, where, sets).expression() if where is not None else None
    listed = slide_numbers(shards, slides, sets) if slides is not None else None
    chosen = [np.zeros(0, np.int64)]
    for start in range(first, end, BLOCK_ROWS):
        part = np.arange(start, min(start + BLOCK_ROWS, end))
        if given is not None:
            part = given[slice(*np.searchsorted(given, (start, start + BLOCK_ROWS)))]
        if listed is not None:
            part = part[listed[shards.patches[part]["slide"]]]
        chosen.append(part if condition is None else filter_rows(shards, part, condition))
    found = np.concatenate(chosen)
    if not len(found):
        others = "Select(slides=[...])" if slides is not None else "Select(rows=[])"
        what = f"where={where!r}" if where is not None else others
        within = "the set" if split is None else f"split {split!r}"
        raise InputError(
            f"{shards.folder}: {what} chooses no patch of {within}; ShardSet.table() lists them"
        )
    return found


def checked_rows(
    shards: ShardSet, rows: Any, ends: tuple[int, int], split: str | None
) -> np.ndarray:
    """Rows as int64, ascending; InputError for what are none of the split's, or two that agree."""
    given = np.asarray(rows)
    if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
        raise InputError(
            f"{shards.folder}: Select(rows=...) of {given.dtype} {given.shape}; row numbers are "
            "wanted, the column 'row' of ShardSet.table()"
        )
    ordered: np.ndarray = np.unique(given.astype(np.int64))
    if len(ordered) < len(given):
        raise InputError(f"{shards.folder}: Select(rows=...) names a row twice; name each once")
    outside = ordered[(ordered < ends[0]) | (ordered >= ends[1])]
    if len(outside):
        within = "the set" if split is None else f"split {split!r}"
        raise InputError(
            f"{shards.folder}: Select(rows=...) has {len(outside):,} rows (row {outside[0]}) that "
            f"are not of {within}, which has rows {ends[0]} to {ends[1] - 1}"
        )
    return ordered


def slide_numbers(shards: ShardSet, slides: Sequence[str], sets: Sequence[ShardSet]) -> np.ndarray:
    """Whether a slide is listed, by its number; the last entry is for patches without one."""
    known = {name for each in sets for name in each.manifest.slides}
    for name in slides:
        if name not in known:
            raise unknown_name("slide", name, known)
    wanted = set(slides)
    return np.array([*(name in wanted for name in shards.manifest.slides), False])


def filter_rows(shards: ShardSet, rows: np.ndarray, condition: Any) -> np.ndarray:
    """The rows that meet a condition."""
    import pyarrow as pa

    table = {name: column(shards, name, rows) for name in (*NAMES, *NUMBERS)}
    table["row"] = pa.array(rows)
    kept: np.ndarray = pa.table(table).filter(condition)["row"].to_numpy()
    return kept


def column(shards: ShardSet, name: str, rows: np.ndarray) -> Any:
    """A column of the patch table as an Arrow array, unknown values null."""
    from latentds.store.pack_columns import named, numbered

    stored = shards.patches[rows]["slide" if name == "patient" else name]
    if name in NAMES:
        return named(stored, names_of(shards, name)).cast("string")
    return numbered(name, stored)


def names_of(shards: ShardSet, column: str) -> tuple[str, ...]:
    """The names a column of names refers to, by number."""
    if column == "label":
        return shards.manifest.classes
    slides = shards.manifest.slides
    return tuple(patient_of(slide) for slide in slides) if column == "patient" else slides


class Parser:
    """A condition as a pyarrow expression."""

    def __init__(self, shards: ShardSet, where: str, sets: Sequence[ShardSet]) -> None:
        self.shards, self.where, self.sets = shards, where, sets

    def expression(self) -> Any:
        """The whole condition."""
        if not isinstance(self.where, str):
            raise self.refuse("not a text")
        try:
            tree = ast.parse(self.where.strip(), mode="eval")
            if sum(isinstance(node, ast.cmpop | ast.Call) for node in ast.walk(tree)) > COMPARED:
                raise self.refuse(f"more than {COMPARED:,} comparisons; list values by 'in [...]'")
            return self.parse(tree.body)
        except UnknownNameError as error:
            raise UnknownNameError(f"where={self.shown()}: {error}") from error
        except (SyntaxError, RecursionError, MemoryError, ValueError, TypeError) as error:
            raise self.refuse(f"not a condition ({first_words(error)})") from error

    def shown(self) -> str:
        """The condition, the start of a long one."""
        text = repr(self.where)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

    def refuse(self, reason: str) -> InputError:
        """The error for this condition."""
        return InputError(f"where={self.shown()}: {reason}; it knows {GRAMMAR}")

    def parse(self, node: ast.expr) -> Any:
        """A node that is true or false."""
        if isinstance(node, ast.BoolOp):
            join = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return functools.reduce(join, map(self.parse, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.parse(node.operand)
        if isinstance(node, ast.Compare):
            return self.parse_comparison(node)
        if isinstance(node, ast.Call):
            return self.parse_call(node)
        raise self.refuse(f"{ast.unparse(node)!r} is not a comparison")

    def parse_comparison(self, node: ast.Compare) -> Any:
        """`column < value`, turned round, or chained."""
        sides = [node.left, *node.comparators]
        pairs = zip(sides, node.ops, sides[1:], strict=False)
        return functools.reduce(operator.and_, [self.parse_pair(*pair) for pair in pairs])

    def parse_pair(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        """One comparison of a column with a value."""
        import pyarrow as pa

        if not isinstance(left, ast.Name):
            if not isinstance(right, ast.Name) or isinstance(op, (ast.In, ast.NotIn)):
                raise self.refuse(
                    "a comparison needs a column on one side and a value on the other"
                )
            left, right, op = right, left, MIRRORED.get(type(op), type(op))()
        name, value = self.column_name(left), self.value(right)
        field = expression_of(name)
        if isinstance(op, (ast.Is, ast.IsNot)) and value is None:
            return field.is_null() if isinstance(op, ast.Is) else field.is_valid()
        if isinstance(op, (ast.In, ast.NotIn)) and isinstance(value, list):
            self.check_values(name, value)
            kind = pa.string() if name in NAMES else pa.float32() if name == "mpp" else None
            found = field.isin(pa.array(value, kind))
            return found if isinstance(op, ast.In) else ~found & field.is_valid()
        if type(op) not in COMPARISONS or isinstance(value, list) or value is None:
            raise self.refuse(f"{name} cannot be compared so")
        self.check_values(name, [value])
        # As a double, 0.3 is not the 0.3 that is stored.
        return COMPARISONS[type(op)](
            field, pa.scalar(value, pa.float32()) if name == "mpp" else value
        )

    def parse_call(self, node: ast.Call) -> Any:
        """`column.startswith("text")`."""
        import pyarrow.compute as pc

        function, arguments = node.func, node.args
        if (
            isinstance(function, ast.Attribute)
            and function.attr == "startswith"
            and isinstance(function.value, ast.Name)
            and len(arguments) == 1
            and not node.keywords
        ):
            name, value = self.column_name(function.value), self.value(arguments[0])
            if name in NAMES and isinstance(value, str):
                return pc.starts_with(expression_of(name), value)
        raise self.refuse(f"{ast.unparse(node)!r} is not known")

    def column_name(self, node: ast.Name) -> str:
        """A known column's name."""
        if node.id not in (*NAMES, *NUMBERS):
            raise unknown_name("column", node.id, (*NAMES, *NUMBERS))
        return node.id

    def value(self, node: ast.expr) -> Any:
        """A text, a number, None, or a list of them."""
        try:
            value = ast.literal_eval(node)
        except ValueError as error:
            raise self.refuse(f"{ast.unparse(node)!r} is not a value") from error
        value = list(value) if isinstance(value, (tuple, set)) else value
        for part in value if isinstance(value, list) else [value]:
            if part is not None and type(part) not in (str, int, float):
                raise self.refuse(f"{part!r} is neither a text nor a number")
            if type(part) is int and abs(part) >= 1 << 63:
                raise self.refuse("a whole number of more than 64 bits; write a smaller one")
        return value

    def check_values(self, name: str, values: list[Any]) -> None:
        """Refuse a misspelt name, which would silently choose nothing, and texts for numbers."""
        is_name = name in NAMES
        known = {n for each in self.sets for n in names_of(each, name)} if is_name else set[str]()
        for value in values:
            if value is None or isinstance(value, str) is not is_name:
                kind = "texts" if is_name else "numbers"
                raise self.refuse(f"{name} holds {kind}, not {value!r}")
            if is_name and value not in known:
                raise unknown_name(name, value, known)


def expression_of(name: str) -> Any:
    """A column in an expression."""
    import pyarrow.compute as pc

    return pc.field(name)


def split_patients(
    shards: ShardSet,
    fractions: dict[str, float],
    seed: int = 0,
    split: str | None = None,
    patients: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Slide lists by patient: no patient in two parts. Pass them as `slides=`.

    fractions  share of the patients of every part, e.g. {"train": 0.8, "val": 0.2}
    split      take only the slides of one stored split
    patients   patient by slide; without it, what names of TCGA, CPTAC, GTEx and CAMELYON tell
    raises     InputError for a slide whose patient is not known

    Patients are ordered by a hash of (seed, name) and cut: the same parts on every machine.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions={fractions}; positive, and 1 together")
    slides = slides_of(shards, split)
    of = named_patients(shards, slides) if patients is None else patients
    lost = [slide for slide in slides if slide not in of]
    if lost:
        raise InputError(
            f"{shards.folder}: patients= lacks {number_of(len(lost), 'slide')} ({lost[0]!r})"
        )
    part_of = names.split_patients((of[slide] for slide in slides), fractions, seed)
    parts: dict[str, list[str]] = {name: [] for name in fractions}
    for slide in slides:
        parts[part_of[of[slide]]].append(slide)
    empty = [name for name, chosen in parts.items() if not chosen]
    if empty:
        leave = number_of(len(part_of), "patient leaves", "patients leave")
        raise InputError(f"{shards.folder}: {leave} {empty[0]!r} without any; fewer parts")
    return parts


HAND_IN = "pass patients={slide: patient}, {slide: slide} where every slide is a patient"


def named_patients(
    shards: ShardSet, slides: Sequence[str], remedy: str = HAND_IN
) -> dict[str, str]:
    """Patient by slide from the slides' names; InputError with the remedy where one tells none."""
    found = {slide: image_folder.known_patient(slide) for slide in slides}
    lost = [slide for slide, known in found.items() if known is None]
    if lost:
        raise InputError(
            f"{shards.folder}: no patient is known of {number_of(len(lost), 'slide')} "
            f"({lost[0]!r}); {remedy}"
        )
    return {slide: known[1] for slide, known in found.items() if known is not None}


def slides_of(shards: ShardSet, split: str | None) -> list[str]:
    """Names of the slides that have patches, sorted."""
    if split is None:
        return list(shards.manifest.slides)
    first, end = shards.patch_range(split)
    found = set[int]()
    for start in range(first, end, BLOCK_ROWS):
        found.update(np.unique(shards.patches[start : min(start + BLOCK_ROWS, end)]["slide"]))
    return [shards.manifest.slides[number] for number in sorted(found) if number >= 0]

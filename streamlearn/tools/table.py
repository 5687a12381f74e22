"""Read samples from CSV files: numbers, then the label in the last column. Every assumption is reported to the user."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from streamlearn.core.errors import InputOutputError
from streamlearn.core.text import INTEGER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streamlearn.core.labels import Label

MAX_DIGITS = 20  # of a 64-bit integer with its sign
MISSING_VALUES = {"", "?", "-", "na", "n/a", "nan", "null", "none"}  # compared in lower case
CHOOSE_HEADER = "give --header if it names the columns, or --no-header if it is a sample"


@dataclass
class _Table:
    """The rows read so far, and the number of the line where the first row was."""

    path: Path
    first_line: int = 0
    width: int = 0
    x: list[np.ndarray] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, line: int, row: list[str], dtype: np.dtype) -> None:
        """Add one sample; raises `InputOutputError` that names the line if the row is not a sample."""
        where = f"{self.path}:{line}"
        if len(row) != self.width:
            raise InputOutputError(
                f"{where}: {_count_columns(len(row))}, but line {self.first_line} has {self.width}; "
                "expected the same number on every line",
            )
        if not (label := row[-1].strip()):
            raise InputOutputError(
                f"{where}: no label: the last column is empty; write the label there, or remove the line"
            )
        values = _to_floats(row[:-1])
        bad = next((n for n, value in enumerate(values) if not np.isfinite(value)), None)
        if bad is not None:
            raise InputOutputError(
                f"{where}: column {bad + 1} is {row[bad]!r:.60}; expected a number: write one there, or remove the line",
            )
        with np.errstate(over="ignore"):
            self.x.append(values.astype(dtype))
        if not np.isfinite(self.x[-1]).all():
            bad = int(np.flatnonzero(~np.isfinite(self.x[-1]))[0])
            raise InputOutputError(
                f"{where}: column {bad + 1} is {row[bad]!r:.60}, which is too large for {dtype.name}"
            )
        self.labels.append(label)


def read_table(
    path: Path, dtype: np.dtype, *, header: bool | None, notify: Callable[[str], None]
) -> tuple[np.ndarray, list[Label]]:
    """Read the samples of a CSV file, gzipped or not: return `x [n, columns - 1]` and n labels.

    `header` says whether the first line names the columns. If it is None, this is found out from the line itself.
    `notify` is called with one sentence for each assumption. Raises `InputOutputError` that names the line if the
    file is ambiguous. Labels are integers if all of them are written as integers, otherwise strings.
    """
    table = _Table(path)
    with (
        gzip.open(path, "rt", newline="", encoding="utf-8-sig")
        if path.suffix == ".gz"
        else path.open(newline="", encoding="utf-8-sig") as file
    ):
        rows = _rows(path, csv.reader(file))
        if (first := next(rows, None)) is None:
            return np.zeros((0, 0), dtype), []
        line, cells = first
        table.first_line, table.width = line, len(cells)
        is_header = _is_header(f"{path}:{line}", cells) if header is None else header
        is_numeric_header = is_header and header is None and all(map(_is_integer, cells))
        if not is_header:
            table.add(line, cells, dtype)
        for number, row in rows:
            table.add(number, row, dtype)
            if is_numeric_header and all(map(_is_integer, row[:-1])):
                raise InputOutputError(
                    f"{path}:{line}: {_quote(cells)} may be a header of numbers, or a sample like line {number}; "
                    f"{CHOOSE_HEADER}",
                )
    if is_header and not cells[0].strip():
        notify(f"{path}:{line}: column 1 has no name, like an index that pandas writes; it is read as a value of x")
    if header is None and is_header:
        notify(f"{path}:{line}: read as a header: {_quote(cells)} (--no-header reads it as a sample)")
    elif header is None:
        notify(f"{path}:{line}: read as a sample, so the file has no header (--header reads this line as a header)")
    if not table.labels:
        return np.zeros((0, 0), dtype), []
    return np.stack(table.x), _convert_labels(path, table.labels, notify)


def _rows(path: Path, lines: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, with its line number; raises `StreamlearnError` for a row without a comma."""
    for row in lines:
        line: int = lines.line_num  # type: ignore[attr-defined]  # a csv.reader, whose class has no public name
        if len(row) == 1:
            raise InputOutputError(f"{path}:{line}: one column; expected numbers, then a label, separated by commas")
        if row:
            yield line, row


def _is_header(where: str, cells: list[str]) -> bool:
    """Return whether the first line names the columns; raises `StreamlearnError` if it is ambiguous."""
    cells = [cell.strip() for cell in cells]
    features = cells[:-1]
    are_numbers = [bool(np.isfinite(value)) for value in _to_floats(features)]
    if all(are_numbers):
        # only consecutive integers, such as 0,1,2, can be column names
        if not all(map(_is_integer, cells)) or len({int(cell) - n for n, cell in enumerate(cells)}) > 1:
            return False
        if int(cells[0]) == 0 and len(cells) > 2:  # pandas numbers unnamed columns in this way
            return True
        raise InputOutputError(
            f"{where}: {_quote(cells)} may be a header of numbers, or the first sample; {CHOOSE_HEADER}"
        )
    missing = next((n for n, cell in enumerate(features) if cell.lower() in MISSING_VALUES), None)
    ambiguous = missing if missing is not None else are_numbers.index(False) if any(are_numbers) else None
    if ambiguous is None:
        return True
    raise InputOutputError(
        f"{where}: column {ambiguous + 1} is {cells[ambiguous]!r:.60}: the line may be a header, or a sample with a missing "
        "value; give --header if it names the columns; otherwise write a number there, or remove the line",
    )


def _is_integer(cell: str) -> bool:
    return len(cell) <= MAX_DIGITS and INTEGER.fullmatch(cell) is not None


def _to_floats(cells: list[str]) -> np.ndarray:
    """Return numbers as float64, and NaN for other text. 1_000 and digits of other scripts are not numbers here."""
    text = "".join(cells)
    if text.isascii() and "_" not in text:
        try:
            return np.array([float(cell) for cell in cells])
        except ValueError:
            pass
    return np.array([_to_float(cell) for cell in cells])


def _to_float(cell: str) -> float:
    try:
        return float(cell) if cell.isascii() and "_" not in cell else np.nan
    except ValueError:
        return np.nan


def _convert_labels(path: Path, labels: list[str], notify: Callable[[str], None]) -> list[Label]:
    """Return integers if all labels are written as integers, otherwise all labels as strings, unchanged."""
    other = next((label for label in labels if not _is_integer(label)), None)
    if other is None:
        notify(f"{path}: labels (last column) are integers, such as {labels[0]}")
        return [int(label) for label in labels]
    notify(f"{path}: labels (last column) are strings, such as {other!r:.60}")
    return list(labels)


def _count_columns(count: int) -> str:
    return f"{count} column{'s' if count > 1 else ''}"


def _quote(cells: list[str]) -> str:
    return f"{','.join(cells)!r:.60}"

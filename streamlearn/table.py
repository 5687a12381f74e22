"""Tables of samples (CSV): numbers, then the label in the last column. Nothing about them is guessed in silence."""

from __future__ import annotations

import csv
import gzip
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from streamlearn.data import StreamlearnError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streamlearn.data import Label

INTEGER = re.compile(r"0|-?[1-9][0-9]*")  # as an integer is written: 007 and +7 are something else
MAX_DIGITS = 20  # of an integer of 64 bits, the sign included
GAPS = {"", "?", "-", "na", "n/a", "nan", "null", "none"}  # how a missing value is written, in any case of letters
CHOOSE = "give --header if it names the columns, --no-header if it is a sample"


@dataclass
class _Table:
    """The rows read so far, and the line that the first of them stood on."""

    path: Path
    first_line: int = 0
    width: int = 0
    x: list[np.ndarray] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, line: int, row: list[str], dtype: np.dtype) -> None:
        """Take one sample; raises `StreamlearnError`, naming the line, if it is none."""
        where = f"{self.path}:{line}"
        if len(row) != self.width:
            raise StreamlearnError(
                f"{where}: {_columns(len(row))}, and line {self.first_line} has {self.width}; "
                "expected the same number on every line",
                code=74,
            )
        if not (label := row[-1].strip()):
            raise StreamlearnError(
                f"{where}: no label: the last column is empty; write the label there, or leave the line out", code=74
            )
        values = _values(row[:-1])
        bad = next((n for n, value in enumerate(values) if not np.isfinite(value)), None)
        if bad is not None:
            raise StreamlearnError(
                f"{where}: column {bad + 1} is {row[bad]!r:.60}; expected a number: fill the gap, or leave the line out",
                code=74,
            )
        with np.errstate(over="ignore"):
            self.x.append(values.astype(dtype))
        if not np.isfinite(self.x[-1]).all():
            bad = int(np.flatnonzero(~np.isfinite(self.x[-1]))[0])
            raise StreamlearnError(
                f"{where}: column {bad + 1} is {row[bad]!r:.60}, which is too large for {dtype.name}", code=74
            )
        self.labels.append(label)


def read_table(
    path: Path, dtype: np.dtype, *, header: bool | None, say: Callable[[str], None]
) -> tuple[np.ndarray, list[Label]]:
    """Return the samples of a CSV file, gzipped or not: `x [n, columns - 1]` and n labels.

    `header` tells whether the first line names the columns; if it is None that line decides, and `say` is called with one
    sentence for everything that is assumed. Raises `StreamlearnError` (74), naming the line, where nothing can be assumed.
    Labels are integers if all are written as such, strings otherwise.
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
        numbered = is_header and header is None and all(map(_is_integer, cells))
        if not is_header:
            table.add(line, cells, dtype)
        for number, row in rows:
            table.add(number, row, dtype)
            if numbered and all(map(_is_integer, row[:-1])):
                raise StreamlearnError(
                    f"{path}:{line}: {_shown(cells)} may be a header of numbers, or a sample as line {number} is; {CHOOSE}",
                    code=74,
                )
    if is_header and not cells[0].strip():
        say(f"{path}:{line}: column 1 has no name, as an index that pandas writes; it is taken for a number of x")
    if header is None and is_header:
        say(f"{path}:{line}: taken for a header: {_shown(cells)} (--no-header reads it as a sample)")
    elif header is None:
        say(f"{path}:{line}: taken for a sample, so the file has no header (--header leaves it out)")
    if not table.labels:
        return np.zeros((0, 0), dtype), []
    return np.stack(table.x), _labels(path, table.labels, say)


def _rows(path: Path, lines: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Give each row that is not empty with its line; raises `StreamlearnError` for one without a comma."""
    for row in lines:
        line: int = lines.line_num  # type: ignore[attr-defined]  # a csv.reader, whose class has no public name
        if len(row) == 1:
            raise StreamlearnError(
                f"{path}:{line}: one column; expected numbers, then a label, with commas between", code=74
            )
        if row:
            yield line, row


def _is_header(where: str, cells: list[str]) -> bool:
    """Tell whether a first line names the columns; raises `StreamlearnError` if that cannot be known."""
    cells = [cell.strip() for cell in cells]
    features = cells[:-1]
    numbers = [bool(np.isfinite(value)) for value in _values(features)]
    if all(numbers):
        if not all(map(_is_integer, cells)) or len({int(cell) - n for n, cell in enumerate(cells)}) > 1:
            return False
        if int(cells[0]) == 0 and len(cells) > 2:  # as pandas writes columns without names
            return True
        raise StreamlearnError(
            f"{where}: {_shown(cells)} may be a header of numbers, or the first sample; {CHOOSE}", code=74
        )
    gap = next((n for n, cell in enumerate(features) if cell.lower() in GAPS), None)
    odd = gap if gap is not None else numbers.index(False) if any(numbers) else None
    if odd is None:
        return True
    raise StreamlearnError(
        f"{where}: column {odd + 1} is {cells[odd]!r:.60}: the line may be a header, or a sample with a gap; "
        "give --header if it names the columns; else fill the gap, or leave the line out",
        code=74,
    )


def _is_integer(cell: str) -> bool:
    return len(cell) <= MAX_DIGITS and INTEGER.fullmatch(cell) is not None


def _values(cells: list[str]) -> np.ndarray:
    """Return numbers as float64; NaN for what is none. Python's 1_000 and digits of other scripts are none."""
    text = "".join(cells)
    if text.isascii() and "_" not in text:
        try:
            return np.array([float(cell) for cell in cells])
        except ValueError:
            pass
    return np.array([_number(cell) for cell in cells])


def _number(cell: str) -> float:
    try:
        return float(cell) if cell.isascii() and "_" not in cell else np.nan
    except ValueError:
        return np.nan


def _labels(path: Path, labels: list[str], say: Callable[[str], None]) -> list[Label]:
    """Return integers if all labels are written as such, else every one as the string that it is."""
    other = next((label for label in labels if not _is_integer(label)), None)
    if other is None:
        say(f"{path}: labels (last column) are integers, as {labels[0]}")
        return [int(label) for label in labels]
    say(f"{path}: labels (last column) are strings, as {other!r:.60}")
    return list(labels)


def _columns(count: int) -> str:
    return f"{count} column{'s' if count > 1 else ''}"


def _shown(cells: list[str]) -> str:
    return f"{','.join(cells)!r:.60}"

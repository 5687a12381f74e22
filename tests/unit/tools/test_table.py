"""Tests of reading CSV files: assumptions are reported, and ambiguous files are refused with a message that says what to do."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import numpy as np
import pytest

from streamlearn.core.errors import StreamlearnError
from streamlearn.tools.table import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from streamlearn.core.labels import Label

ROWS = "5.1,3.5,0\n4.9,3,0\n6.1,2.9,1\n"


def read(
    directory: Path, content: str | bytes, *, header: bool | None = None, name: str = "a.csv", dtype: str = "f4"
) -> tuple[list[list[float]], list[Label], list[str]]:
    """Return a file's numbers and labels, and the reported assumptions without the path."""
    path, messages = directory / name, list[str]()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    x, y = read_table(path, np.dtype(dtype), header=header, notify=messages.append)
    return x.tolist(), y, [line.removeprefix(f"{path}:").strip() for line in messages]


INTEGERS = "labels (last column) are integers, such as 0"


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_assumptions_are_reported(tmp_path: Path, name: str) -> None:
    """A first line of words, or of pandas' column numbers, is a header; another one is a sample; both are reported."""
    x = np.array([[5.1, 3.5], [4.9, 3], [6.1, 2.9]], np.float32).tolist()
    for first, messages in (
        ("a,b,label\n", "1: read as a header: 'a,b,label' (--no-header reads it as a sample)"),
        ("0,1,2\n", "1: read as a header: '0,1,2' (--no-header reads it as a sample)"),
        ("", "1: read as a sample, so the file has no header (--header reads this line as a header)"),
    ):
        content = (first + ROWS).encode()
        packed = gzip.compress(content) if name.endswith("gz") else content
        assert read(tmp_path, packed, name=name) == (x, [0, 0, 1], [messages, INTEGERS])


def test_the_options_decide_whether_there_is_a_header(tmp_path: Path) -> None:
    """`--header` and `--no-header` are always followed, and a column without a name is reported."""
    assert read(tmp_path, "2019,2020,2021\n1,2,0\n", header=True) == ([[1, 2]], [0], [INTEGERS])
    assert read(tmp_path, "0,1,2\n0,1,0\n", header=False)[:2] == ([[0, 1], [0, 1]], [2, 0])
    assert read(tmp_path, "?,b,label\n1,2,0\n", header=True)[:2] == ([[1, 2]], [0])
    index = "1: column 1 has no name, like an index that pandas writes; it is read as a value of x"
    assert read(tmp_path, ",b,label\n1,2,0\n", header=True)[2] == [index, INTEGERS]


REFUSED = [
    ("1,2,3\n1,2,0\n", "1: '1,2,3' may be a header of numbers, or the first sample; give --header"),
    ("0,1\n5,1\n", "1: '0,1' may be a header of numbers, or the first sample; give --header"),
    ("0,1,2\n7,8,1\n", "1: '0,1,2' may be a header of numbers, or a sample like line 2; give --header"),
    ("?,3.5,0\n" + ROWS, r"1: column 1 is '\?': the line may be a header, or a sample with a missing value"),
    (",,0\n" + ROWS, "1: column 1 is '': the line may be a header, or a sample with a missing value"),
    ("NaN,b,0\n" + ROWS, "1: column 1 is 'NaN': the line may be a header, or a sample with a missing value"),
    ("1,b,0\n" + ROWS, "1: column 2 is 'b': the line may be a header, or a sample with a missing value"),
    ("a,b,c\n1,2,\n", "2: no label: the last column is empty; write the label there, or remove the line"),
    ("a,b,c,\n1,2,0,\n", "2: no label: the last column is empty"),
    ("1,2,  \n", "1: no label: the last column is empty"),
    (ROWS + "1,,0\n", "4: column 2 is ''; expected a number: write one there, or remove the line"),
    (ROWS + "1,nan,0\n", "4: column 2 is 'nan'; expected a number"),
    (ROWS + "1,1_000,0\n", "4: column 2 is '1_000'; expected a number"),
    (ROWS + "1,٣,0\n", "4: column 2 is '٣'; expected a number"),
    (ROWS + "1,1e39,0\n", "4: column 2 is '1e39', which is too large for float32"),
    (ROWS + "\n1,2,3,0\n", "5: 4 columns, but line 1 has 3; expected the same number on every line"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_ambiguous_and_invalid_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    """The message has the file, the line, the value, what is accepted and what to do, in one line."""
    with pytest.raises(StreamlearnError, match=rf"^[^\n]*/a\.csv:{message}") as caught:
        read(tmp_path, content)
    assert caught.value.exit_code == 74


def test_labels_keep_their_type(tmp_path: Path) -> None:
    """Labels are integers if all are written as integers; otherwise all are strings, without surrounding spaces."""
    for text, labels, kind in (
        ("0 -7 10", [0, -7, 10], "integers, such as 0"),
        ("007 7 010", ["007", "7", "010"], "strings, such as '007'"),
        ("1_000 1000", ["1_000", "1000"], "strings, such as '1_000'"),
        ("٣ 3", ["٣", "3"], "strings, such as '٣'"),
        ("1 2 cat", ["1", "2", "cat"], "strings, such as 'cat'"),
        ("1.0 2.0", ["1.0", "2.0"], "strings, such as '1.0'"),
        ("+1 -0", ["+1", "-0"], "strings, such as '+1'"),
        ("9" * 5000 + " 1", ["9" * 5000, "1"], f"strings, such as {'9' * 5000!r:.60}"),  # more than Python converts
    ):
        rows = "".join(f"5,{label} \n" for label in text.split())
        assert read(tmp_path, "x, label\n" + rows)[1:] == (
            labels,
            [
                "1: read as a header: 'x, label' (--no-header reads it as a sample)",
                f"labels (last column) are {kind}",
            ],
        )


def test_numbers_are_read_in_the_given_dtype(tmp_path: Path) -> None:
    """An integer of more than 24 bits is exact if the dtype can hold it."""
    assert read(tmp_path, "123456789,2,0\n", dtype="f8")[0] == [[123456789, 2]]
    assert read(tmp_path, "")[:2] == ([], [])
    assert read(tmp_path, "a,b\n")[:2] == ([], [])

"""Tasks made from files: by classes, permutation, rotation; errors that name file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamlearn import producer
from streamlearn.data import StreamlearnError

IMAGES = producer.Samples(np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3), [0, 1, 0, "x"])


def test_classes_make_tasks() -> None:
    """Groups are as equal as can be, numbers before words, and every sample is in one."""
    groups = producer.equal_groups(IMAGES, 2)
    assert groups == [[0, 1], ["x"]]
    assert [task.y for task in producer.by_classes(IMAGES, groups)] == [[0, 1, 0], ["x"]]
    with pytest.raises(StreamlearnError, match="no sample has a class of 7"):
        producer.by_classes(IMAGES, [[7]])
    with pytest.raises(StreamlearnError, match="3 classes cannot make 4 tasks"):
        producer.equal_groups(IMAGES, 4)


def test_permutations_keep_the_values_and_rotations_the_image() -> None:
    """The first task is the original; a permutation moves features, half a turn turns the image around."""
    first, second = producer.by_permutation(IMAGES, 2, 0)
    np.testing.assert_array_equal(first.x, IMAGES.x)
    assert not np.array_equal(second.x, IMAGES.x)
    np.testing.assert_array_equal(np.sort(second.x.reshape(4, -1)), IMAGES.x.reshape(4, -1))
    upright, turned = producer.by_rotation(IMAGES, 2)
    np.testing.assert_array_equal(upright.x, IMAGES.x)
    np.testing.assert_array_equal(turned.x, IMAGES.x[:, ::-1, ::-1])


def test_files_are_read(tmp_path: Path) -> None:
    """Arrays, tables and lines of JSON give the same samples."""
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1]))
    (tmp_path / "a.csv").write_text("a,b,label\n1,2,0\n3,4,1\n")
    (tmp_path / "a.jsonl").write_text('{"x": [1, 2], "y": 0}\n{"x": [3, 4], "y": 1}\n')
    for name in ("a.npz", "a.csv", "a.jsonl"):
        samples = producer.read(str(tmp_path / name))
        np.testing.assert_array_equal(samples.x, x)
        assert samples.y == [0, 1]


CASES = [
    ("a.txt", b"", "expected a .npz, .csv or .jsonl file"),
    ("a.npz", b"no", "not a .npz file of plain arrays"),
    ("a.npz", b"", "not a .npz file of plain arrays"),
    ("a.csv", b"", "holds no samples"),
    ("a.csv", b"1,2,0\n1,0\n", "not every line has the same number of columns"),
    ("a.jsonl", b'{"x": [1], "y": [2]}\n', r"the label of sample 0 is \[2\]; expected an integer or a string"),
    ("a.csv", b"1,2,0\n1,b,0\n", r"a\.csv:2: could not convert"),
    ("a.jsonl", b'{"x": [1], "y": 0}\nno\n', r"a\.jsonl:2:"),
    ("a.jsonl", b'{"x": [1], "y": 0}\n{"x": [1, 2], "y": 0}\n', "not numbers of the same shape on every line"),
]


@pytest.mark.parametrize(("name", "content", "message"), CASES)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """The error says which file, which line, and what was expected."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StreamlearnError, match=message):
        producer.read(str(tmp_path / name))
    with pytest.raises(StreamlearnError):
        producer.read(str(tmp_path / ("missing" + Path(name).suffix)))

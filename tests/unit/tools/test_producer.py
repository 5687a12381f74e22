"""Tests of reading files and making tasks of them: classes, permutation, rotation; errors name file and line."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamlearn.config.root import Config
from streamlearn.core.errors import StreamlearnError
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.logs.base import CONTENT_TYPE
from streamlearn.stream.logs.memory import MemoryStore
from streamlearn.tools import producer

IMAGES = producer.Samples(np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3), [0, 1, 0, "x"])


def test_classes_make_tasks() -> None:
    """Groups have equal sizes as far as possible, integers come before strings, and every sample is in one group."""
    groups = producer.equal_class_groups(IMAGES, 2)
    assert groups == [[0, 1], ["x"]]
    assert [task.y for task in producer.split_by_classes(IMAGES, groups)] == [[0, 1, 0], ["x"]]
    with pytest.raises(StreamlearnError, match="no sample has a class of 7"):
        producer.split_by_classes(IMAGES, [[7]])
    with pytest.raises(StreamlearnError, match="3 classes cannot be divided into 4 tasks"):
        producer.equal_class_groups(IMAGES, 4)


def test_an_integer_and_a_string_with_the_same_text_are_two_labels() -> None:
    """Equal groups keep 1 and "1" separate; groups that are given as text are ambiguous, and refused."""
    mixed = producer.Samples(np.arange(6.0)[:, None], [1, "1", 2, "2", 1, "1"])
    groups = producer.equal_class_groups(mixed, 2)
    assert groups == [[1, 2], ["1", "2"]]
    assert [task.x.ravel().tolist() for task in producer.split_by_classes(mixed, groups)] == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(StreamlearnError, match="the samples have 1 both as an integer and as a string label") as caught:
        producer.resolve_groups(mixed, [["1"]])
    assert caught.value.exit_code == 2
    assert producer.resolve_groups(IMAGES, [["0", "x"], ["7"]]) == [[0, "x"], ["7"]]


def configured(**over: Any) -> Config:
    """Return a configuration of four numbers."""
    tree = {"input": {"shape": [4]}, "classes": 2, "stream": {"topics": ["a"]}, "strategy": "naive", **over}
    return Config.model_validate(tree, context={"recipes": RECIPES})


def test_samples_are_converted_for_the_configuration() -> None:
    """Shape, dtype and labels are converted if nothing is lost, and each change is reported."""
    messages: list[str] = []
    images = producer.Samples(np.array([[[0, 1], [2, 255]]] * 2, np.int64), ["1", "0"])
    spec = {"shape": [4], "dtype": "uint8"}
    fitted = producer.fit_to_config(images, "a", configured(input=spec, classes=[0, 1]), messages.append)
    assert (fitted.x.dtype.name, fitted.x.tolist(), fitted.y) == ("uint8", [[0, 1, 2, 255]] * 2, [1, 0])
    assert messages == [
        "samples have shape [2, 2]: published as [4], the configuration's input.shape",
        "x is int64: published as uint8, the configuration's input.dtype",
        "the label '1' is published as 1, the class in classes; other labels are converted in the same way",
    ]
    messages.clear()
    same = producer.Samples(np.ones((1, 4), ">f4"), [7])
    assert producer.fit_to_config(same, "a", configured(), messages.append).x.dtype == np.float32
    assert messages == []
    large = producer.Samples(np.full((1, 4), 2**24 + 1), [7])
    producer.fit_to_config(large, "a", configured(), messages.append)
    assert messages == [
        "x is int64: published as float32, the configuration's input.dtype, which rounds large integers"
    ]
    text = {"kind": "text", "sentences": 1, "words": 2, "vocabulary": 9}
    stories = producer.Samples(np.array([{"story": [], "question": "Who?"}], object), ["me"])
    assert producer.fit_to_config(stories, "a", configured(input=text, model="memnet"), messages.append) is stories


MISFITS: list[tuple[Any, list[Any], dict[str, Any], str]] = [
    (np.ones((2, 3)), [0, 1], {}, r"a sample has shape \[3\], but the configuration's input.shape is \[4\]"),
    (np.ones((2, 2, 3)), [0, 1], {"input": {"shape": [3, 2]}}, r"a sample has shape \[2, 3\]"),
    (
        np.array([[1, 2, 3, 4], [0, np.nan, 0, 0]]),
        [0, 1],
        {},
        r"sample 1 contains nan, but input.dtype float32 accepts finite numbers \(1 of 2 samples do not fit\)",
    ),
    (np.full((1, 4), 1e39), [0], {}, r"sample 0 contains 1e\+39, but input.dtype float32 accepts finite numbers"),
    (
        np.full((1, 4), 0.5),
        [0],
        {"input": {"shape": [4], "dtype": "uint8"}},
        "sample 0 contains 0.5, .* integers from 0 to 255",
    ),
    (
        np.full((1, 4), -1),
        [0],
        {"input": {"shape": [4], "dtype": "uint8"}},
        "sample 0 contains -1, .* integers from 0 to 255",
    ),
    (np.ones((1, 4)), ["x"], {"classes": [0, 1]}, "the label of sample 0 of a is 'x'; accepted by classes: 0, 1"),
    (
        np.ones((2, 4)),
        [1, 0],
        {"scenario": {"kind": "task", "tasks": {"a": [1]}}},
        (
            "the label of sample 1 of a is 0; "
            r"accepted by scenario\.tasks\.a: 1"
        ),
    ),
    (
        np.ones((1, 4)),
        [0],
        {"scenario": {"kind": "domain", "tasks": {"b": [0, 1]}}, "classes": [0, 1], "stream": {"pattern": ".*"}},
        r"scenario\.tasks has no classes for topic a",
    ),
    (np.array([{}], object), ["x"], {}, "the samples are text, but the configuration's input is numbers"),
]


@pytest.mark.parametrize(("x", "y", "over", "message"), MISFITS)
def test_samples_that_the_stream_would_reject_are_refused(
    x: Any, y: list[Any], over: dict[str, Any], message: str
) -> None:
    """The message has the value, what is accepted and what to do; the code is 65."""
    with pytest.raises(StreamlearnError, match=rf"^{message}.*; nothing was published$") as caught:
        producer.fit_to_config(producer.Samples(x, y), "a", configured(**over), lambda _: None)
    assert caught.value.exit_code == 65


def test_too_many_labels_and_too_large_records_are_refused() -> None:
    """Labels beyond the number of classes, and records that are too large, are refused before anything is published."""
    three = producer.Samples(np.ones((3, 4), np.float32), [0, 1, 2])
    how = producer.PublishOptions()
    with pytest.raises(StreamlearnError, match="the samples have 3 labels, but classes is 2: the others would be"):
        producer.check_limits([three], how, configured())
    producer.check_limits([three], how, configured(grow_head=True))
    producer.check_limits([three], how, configured(classes=[0, 1, 2]))
    small = {"topics": ["a"], "max_record_bytes": 1000}
    with pytest.raises(StreamlearnError, match=r"100 samples of 16 bytes is larger than .* 1000; give --batch 12, or"):
        producer.check_limits([three], how, configured(classes=3, stream=small))
    producer.check_limits([three], producer.PublishOptions("json"), configured(classes=3, stream=small))
    stories = producer.Samples(np.array([{"story": [], "question": "Who?"}], object), ["me"])
    producer.check_limits([stories], how, configured())  # codec batch is refused when they are published


def test_permuted_and_rotated_tasks_keep_all_values() -> None:
    """The first task is the original; a permutation moves features; a rotation by 180 degrees turns the image upside down."""
    first, second = producer.make_permuted_tasks(IMAGES, 2, 0)
    np.testing.assert_array_equal(first.x, IMAGES.x)
    assert not np.array_equal(second.x, IMAGES.x)
    np.testing.assert_array_equal(np.sort(second.x.reshape(4, -1)), IMAGES.x.reshape(4, -1))
    upright, turned = producer.make_rotated_tasks(IMAGES, 2)
    np.testing.assert_array_equal(upright.x, IMAGES.x)
    np.testing.assert_array_equal(turned.x, IMAGES.x[:, ::-1, ::-1])


def test_files_are_read(tmp_path: Path) -> None:
    """A .npz, a .csv and a .jsonl file give the same samples."""
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([0, 1]))
    (tmp_path / "a.csv").write_text("a,b,label\n1,2,0\n3,4,1\n")
    (tmp_path / "a.jsonl").write_text('{"x": [1, 2], "y": 0}\n{"x": [3, 4], "y": 1}\n')
    for name in ("a.npz", "a.csv", "a.jsonl"):
        samples = producer.read_samples(str(tmp_path / name))
        np.testing.assert_array_equal(samples.x, x)
        assert samples.y == [0, 1]


TEXTS = b"""\
{"task": 10, "split": "train", "story": ["Mary went home."], "question": "Where is Mary?", "answer": "home"}
{"task": 2, "split": "train", "story": [], "question": "Who?", "answer": "Mary", "support": [0]}
{"task": 2, "split": "test", "story": [], "question": "What?", "answer": "nothing"}
{"task": 10, "split": "test", "story": [], "question": "Where?", "answer": "there"}
"""


def test_texts_are_split_by_their_field_task(tmp_path: Path) -> None:
    """A gzipped file of stories is read by split, split by the field task, and published without that field."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(TEXTS))
    train, test = producer.read_samples(str(path)), producer.read_samples(str(path), "test")
    names = producer.task_names(train, None)
    assert (names, producer.task_names(train, 1)) == (["2", "10"], ["2"])
    first, second = producer.split_by_task(train, names)
    assert (first.y, second.y) == (["Mary"], ["home"])
    assert [part.y for part in producer.split_by_task(test, names)] == [["nothing"], ["there"]]
    assert second.x[0] == {"story": ["Mary went home."], "question": "Where is Mary?"}
    assert producer.shuffle(train, 0).is_text
    store = MemoryStore()
    producer.publish(store, "t", second, producer.PublishOptions("json"))
    record = store.records["t", 0][0]
    assert record.value == b'{"story":["Mary went home."],"question":"Where is Mary?","answer":"home"}'
    assert record.header(CONTENT_TYPE) == CODECS["json"].content_type
    with pytest.raises(StreamlearnError, match="codec batch is for numbers"):
        producer.publish(store, "t", second, producer.PublishOptions("batch"))
    with pytest.raises(StreamlearnError, match="the samples name 2 tasks: 2, 10; expected 3"):
        producer.task_names(train, 3)
    with pytest.raises(StreamlearnError, match="no sample is of task 7"):
        producer.split_by_task(train, ["2", "7"])
    with pytest.raises(StreamlearnError, match="name no task"):
        producer.task_names(IMAGES, 1)
    with pytest.raises(StreamlearnError, match="permutation needs numbers, got text"):
        producer.make_permuted_tasks(train, 2, 0)


def test_files_without_labels_are_recognised(tmp_path: Path) -> None:
    """`read_unlabelled` returns the samples of a file without labels, and None for a file with labels."""
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)))
    (tmp_path / "a.jsonl").write_text('{"story": [], "question": "Who?"}\n{"x": 1, "split": "train"}\n')
    (tmp_path / "b.jsonl").write_text('{"x": [1], "y": 0}\n')
    (tmp_path / "c.jsonl").write_text('{"x": [1], "y": 0}\n{"x": [1]}\n')
    arrays, texts = (producer.read_unlabelled(tmp_path / name, "test") for name in ("a.npz", "a.jsonl"))
    assert arrays is not None
    assert arrays.x.shape == (2, 3)
    assert texts is not None
    assert texts.x.tolist() == [{"story": [], "question": "Who?"}]
    assert producer.read_unlabelled(tmp_path / "b.jsonl", "test") is None
    assert producer.read_unlabelled(tmp_path / "b.csv", "test") is None
    with pytest.raises(StreamlearnError, match="1 of 2 lines have a label"):
        producer.read_unlabelled(tmp_path / "c.jsonl", "test")
    with pytest.raises(StreamlearnError, match="No such file"):
        producer.read_unlabelled(tmp_path / "d.jsonl.gz", "test")


CASES = [
    ("a.txt", b"", "expected a .npz, .csv, .csv.gz, .jsonl or .jsonl.gz file"),
    ("a.npz", b"no", "not a .npz file of plain arrays"),
    ("a.npz", b"", "not a .npz file of plain arrays"),
    ("a.csv", b"", "contains no samples"),
    ("a.csv", b"1;2;3;cat\n", r"a\.csv:1: one column; expected numbers, then a label, separated by commas"),
    ("a.csv", b"1,2,0\n1,0\n", r"a\.csv:2: 2 columns, but line 1 has 3; expected the same number on every line"),
    (
        "a.jsonl",
        b'{"x": [1], "y": [2]}\n',
        r"the label of sample 0 is \[2\]; expected a 64-bit integer or a string",
    ),
    ("a.csv", b"1,2,0\n1,b,0\n", r"a\.csv:2: column 2 is 'b'; expected a number"),
    ("a.jsonl", b'{"x": [1], "y": 0}\nno\n', r"a\.jsonl:2:"),
    (
        "a.jsonl",
        b'{"x": [1], "y": 0}\n{"x": [1, 2], "y": 0}\n',
        r"a\.jsonl:2: x has shape \[2\], but line 1 has \[1\]; expected one shape on all lines",
    ),
    ("a.jsonl", b'{"x": [1], "y": 1.0}\n', r"sample 0 is 1\.0; .*: convert labels, for example with y\.astype\(int\)"),
    ("a.csv", b"a,b\nc,d\n1,2\n", r"a\.csv:2: column 1 is 'c'; expected a number"),
    ("a.csv", b"1,\xe9\n", r"a\.csv: not UTF-8"),
    ("a.csv", b"1e300,0\n", "too large for float32"),
    ("a.jsonl", b'{"x": [0], "y": 0}\n{"x": [-1e300], "y": 0}\n', r"a\.jsonl:2: x contains a number that is too large"),
    ("a.jsonl", b'{"x": {"a": 1}, "y": 0}\n', r"a\.jsonl:1: x is \{'a': 1\}; expected numbers"),
    ("a.jsonl", b'{"x": [1], "y": 0}\n{"x": ["1"], "y": 0}\n', r"a\.jsonl:2: x is \['1'\]; expected numbers"),
    ("a.jsonl", b'{"x": [1, null], "y": 0}\n', r"a\.jsonl:1: x is \[1, None\]; expected numbers"),
    ("a.jsonl", b'{"x": [[1], [1, 2]], "y": 0}\n', r"a\.jsonl:1: x is \[\[1\], \[1, 2\]\]; expected numbers"),
    ("a.jsonl", b'{"x": [1], "y": 18446744073709551615}\n', "expected a 64-bit integer"),
    ("a.jsonl", b"[]\n", r'a\.jsonl:1: .*; expected \{"x": \.\.\., "y": \.\.\.\}'),
    (
        "a.jsonl",
        b'{"question": "?", "story": []}\n',
        r"a\.jsonl:1: 'answer'; expected \{\"story\": .*\"answer\": \.\.\.\}",
    ),
    ("a.jsonl", b'{"x": [1], "y": 0, "task": 1}\n{"x": [1], "y": 0}\n', "1 of 2 lines name a task"),
    ("a.jsonl", b'{"x": [1], "y": 0, "split": "test"}\n', "contains no samples"),
    ("a.jsonl.gz", b"no", r"a\.jsonl\.gz: Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(TEXTS)[:-20], r"a\.jsonl\.gz: "),
    ("a.gz", b"", "expected a .npz, .csv, .csv.gz, .jsonl or .jsonl.gz file"),
]


ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"x": ["a", "b"], "y": [0, 1]}, "x contains <U1; expected numbers"),
    ({"x": [1j, 2j], "y": [0, 1]}, "x contains complex128; expected numbers"),
    ({"x": 1, "y": 1}, r"x has shape \[\], y \[\]; expected \[n, \.\.\.\] and \[n\]"),
    ({"x": [1, 2], "y": [0]}, r"x has shape \[2\], y \[1\]"),
    ({"x": [1.0], "y": np.array([2**63], np.uint64)}, "is 9223372036854775808; expected a 64-bit integer"),
]


@pytest.mark.parametrize(("arrays", "message"), ARRAYS)
def test_invalid_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    """Values that a record cannot contain are refused before anything is published, with labels or without."""
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(StreamlearnError, match=rf"a\.npz: .*{message}") as caught:
        producer.read_samples(str(tmp_path / "a.npz"))
    assert caught.value.exit_code == 74
    np.savez(tmp_path / "b.npz", x=arrays["x"])
    if "contains" in message:
        with pytest.raises(StreamlearnError, match=message):
            producer.read_unlabelled(tmp_path / "b.npz", "test")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    """Pandas makes an array of objects of string labels; the message says how to save strings."""
    np.savez(tmp_path / "a.npz", x=np.ones((1, 2)), y=np.array(["a"], object))
    with pytest.raises(StreamlearnError, match=r"plain arrays: .* save strings with y\.astype\(str\)$"):
        producer.read_samples(str(tmp_path / "a.npz"))


def test_a_npy_file_is_not_accepted_as_npz(tmp_path: Path) -> None:
    """A .npy file with the suffix .npz is refused."""
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(StreamlearnError, match=r"not a \.npz file of plain arrays"):
        producer.read_samples(str(tmp_path / "a.npz"))
    with pytest.raises(StreamlearnError, match=r"not a \.npz file of plain arrays"):
        producer.read_unlabelled(tmp_path / "a.npz", "test")


def test_every_row_of_a_table_is_read(tmp_path: Path) -> None:
    """A byte order mark is not part of the first number, and blank lines are not rows."""
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf1,2,0\n\n3,4,1\n\n")
    samples = producer.read_samples(str(tmp_path / "a.csv"))
    assert (samples.x.tolist(), samples.y) == ([[1, 2], [3, 4]], [0, 1])


def test_a_test_split_must_be_in_the_file(tmp_path: Path) -> None:
    """A file without splits is read as a whole, but `read_test_split` refuses it."""
    np.savez(tmp_path / "one.npz", x=np.ones((1, 2)), y=np.array([0]))
    (tmp_path / "one.csv").write_text("1,2,0\n")
    (tmp_path / "one.jsonl").write_text('{"x": [1], "y": 0}\n')
    np.savez(tmp_path / "two.npz", x_test=np.ones((1, 2)), y_test=np.array([0]))
    (tmp_path / "two.jsonl").write_text('{"x": [1], "y": 0, "split": "test"}\n')
    for name in ("one.npz", "one.csv", "one.jsonl"):
        assert len(producer.read_samples(str(tmp_path / name), "test")) == 1
        with pytest.raises(StreamlearnError, match="has no test split") as caught:
            producer.read_test_split(str(tmp_path / name), producer.ReadOptions())
        assert caught.value.exit_code == 2
    for name in ("two.npz", "two.jsonl"):
        assert producer.read_test_split(str(tmp_path / name), producer.ReadOptions()).y == [0]


@pytest.mark.parametrize(("name", "content", "message"), CASES)
def test_invalid_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """The message names the file, the line, and what was expected."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StreamlearnError, match=message):
        producer.read_samples(str(tmp_path / name))
    with pytest.raises(StreamlearnError):
        producer.read_samples(str(tmp_path / ("missing" + "".join(Path(name).suffixes))))

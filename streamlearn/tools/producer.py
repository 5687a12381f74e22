"""Publish tasks to topics: read labelled samples from files or an example set, and split them into tasks."""

from __future__ import annotations

import csv
import gzip
import math
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import orjson

from streamlearn.core.errors import ConfigurationError, DataError, InputOutputError, StreamlearnError, UsageError
from streamlearn.core.scenario import Scenario
from streamlearn.core.text import natural_key
from streamlearn.stream.codecs.registry import CODECS, TEXT_CODECS
from streamlearn.stream.logs.base import CONTENT_TYPE, CONTROL_HEADER, PROBE, TASK_END, USE_HEADER
from streamlearn.tools.table import read_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from streamlearn.config.root import Config
    from streamlearn.core.labels import Label
    from streamlearn.stream.logs.base import Headers, LogWriter

DIGITS_TEST_FRACTION = 0.25
INT64 = np.iinfo(np.int64)  # the range of integer labels in a batch record


@dataclass(frozen=True)
class Samples:
    """Labelled samples.

    `x [n, ...]`: numbers; or, for text, n dictionaries with `story` and `question`.
    `y`: n labels.
    `task`: the task of each sample, if the file names tasks; otherwise empty.
    """

    x: np.ndarray
    y: list[Label]
    task: list[str] = field(default_factory=list)
    has_splits: bool = False  # the source has several splits, such as train and test

    def __len__(self) -> int:
        return len(self.y)

    @property
    def is_text(self) -> bool:
        """Whether the samples are stories with questions."""
        return self.x.dtype == object

    def select(self, indices: np.ndarray) -> Samples:
        """Return the samples with these indices, in this order."""
        places = indices.tolist()
        task = [self.task[index] for index in places] if self.task else []
        return Samples(self.x[indices], [self.y[index] for index in places], task)


@dataclass(frozen=True)
class PublishOptions:
    """How `publish` writes tasks."""

    codec: str = "batch"
    samples_per_record: int = 100  # of a codec that holds many, such as batch
    partitions: int = 1  # of a topic that is created
    markers: bool = True  # write task-end markers
    rate: float | None = None  # samples per second


@dataclass(frozen=True)
class ReadOptions:
    """How files are read, and where assumptions about a file are reported."""

    header: bool | None = None  # whether the first line of a `.csv` names the columns; None: find out from the line
    keep_precision: bool = False  # read numbers of text files as 64-bit numbers, not as float32
    notify: Callable[[str], None] = lambda _: None  # called with one sentence for each assumption


def read_samples(source: str, split: str = "train", options: ReadOptions = ReadOptions()) -> Samples:
    """Read the samples of a `.npz`, `.csv`, `.jsonl` or `.jsonl.gz` file, or of the example set `digits`.

    A `.npz` has `x` and `y`, or `x_train`, `y_train`, `x_test` and `y_test`. A `.csv` has the label in its last column.
    A `.jsonl` has on each line an object with `x` and `y`, or with `story`, `question` and `answer`, and optionally with
    `task` and `split`. Text files may be gzipped. Raises `StreamlearnError` that names file and line.
    """
    if source == "digits":
        return _read_digits(split)
    path = Path(source)
    if options.header is not None and _file_type(path) != ".csv":
        raise UsageError(f"{source}: --header and --no-header are for .csv files")
    with _errors_name(path):
        match _file_type(path):
            case ".npz":
                samples = _read_npz(path, split)
            case ".csv":
                dtype = np.dtype("f8" if options.keep_precision else "f4")
                samples = Samples(*read_table(path, dtype, header=options.header, notify=options.notify))
            case ".jsonl":
                samples = _read_jsonl(path, split, keep_precision=options.keep_precision)
            case _:
                raise UsageError(
                    f"{source}: expected a .npz, .csv, .csv.gz, .jsonl or .jsonl.gz file, or the example set: digits",
                )
    if not len(samples):
        raise InputOutputError(f"{path}: contains no samples")
    for index, label in enumerate(samples.y):
        if type(label) is not str and not (type(label) is int and INT64.min <= label <= INT64.max):
            message = f"{path}: the label of sample {index} is {label!r:.60}; expected a 64-bit integer or a string"
            hint = ": convert labels, for example with y.astype(int)" if isinstance(label, (float, bool)) else ""
            raise InputOutputError(message + hint)
    return samples


def read_test_split(source: str, options: ReadOptions) -> Samples:
    """Read a source's own test split; raises `UsageError` if it has none."""
    samples = read_samples(source, "test", options)
    if not samples.has_splits:
        raise UsageError(f"{source}: has no test split; give a file of probes")
    return samples


def fit_to_config(samples: Samples, topic: str, config: Config, notify: Callable[[str], None]) -> Samples:
    """Convert a topic's samples to the shape, dtype and labels of a configuration; `notify` is called for each change.

    Raises `DataError` if the configuration's stream would reject one of them.
    """
    is_text = config.input.kind == "text"
    if samples.is_text != is_text:
        kinds = ("numbers", "text")
        raise _refuse(f"the samples are {kinds[samples.is_text]}, but the configuration's input is {kinds[is_text]}")
    if is_text:
        return samples
    x = _convert_dtype(_reshape(samples.x, config.input.shape, notify), np.dtype(config.input.dtype), notify)
    return Samples(x, _convert_labels(samples.y, topic, config, notify), samples.task, samples.has_splits)


def check_limits(parts: Sequence[Samples], options: PublishOptions, config: Config) -> None:
    """Raise `DataError` if a configuration's stream would reject records for their size, or labels as too many."""
    first, largest = parts[0], config.stream.max_record_bytes
    per_record = options.samples_per_record
    holds_many = CODECS[options.codec].holds_many
    if holds_many and not first.is_text and (size := first.x[0].nbytes) * per_record > largest:
        text = (
            f"a {options.codec} record of {per_record} samples of {size} bytes is larger than stream.max_record_bytes"
        )
        raise _refuse(f"{text}, {largest}; give --batch {max(1, largest // (size + 64))}, or increase that key")
    labels = {label for part in parts for label in part.y}
    if config.grow_head or config.scenario.kind == "domain" or not isinstance(config.classes, int):
        return
    if len(labels) > config.classes:
        text = f"the samples have {len(labels)} labels, but classes is {config.classes}: the others would be rejected"
        raise _refuse(f"{text}; set classes: {len(labels)}, or grow_head: true, or choose some with --groups")


def _refuse(why: str) -> DataError:
    return DataError(f"{why}; nothing was published")


def _reshape(x: np.ndarray, shape: Sequence[int], notify: Callable[[str], None]) -> np.ndarray:
    """Return samples in another shape; raises `StreamlearnError` if more than flattening or axes of length 1 is needed."""
    given, wanted = list(x.shape[1:]), list(shape)
    if given == wanted:
        return x
    same = [size for size in given if size > 1] == [size for size in wanted if size > 1]
    if math.prod(given) != math.prod(wanted) or not (same or len(given) == 1 or len(wanted) == 1):
        raise _refuse(f"a sample has shape {given}, but the configuration's input.shape is {wanted}")
    notify(f"samples have shape {given}: published as {wanted}, the configuration's input.shape")
    return x.reshape(len(x), *wanted)


def _convert_dtype(x: np.ndarray, dtype: np.dtype, notify: Callable[[str], None]) -> np.ndarray:
    """Return numbers as another dtype; raises `StreamlearnError` if one is out of its range, or is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted = x.astype(dtype, copy=False)
        fits = np.isfinite(converted) if dtype.kind == "f" else converted == x
    if not fits.all():
        place = tuple(np.argwhere(~fits)[0].tolist())
        count = int((~fits.reshape(len(x), -1).all(axis=1)).sum())
        accepted = "finite numbers" if dtype.kind == "f" else "integers from {0.min} to {0.max}".format(np.iinfo(dtype))
        raise _refuse(
            f"sample {place[0]} contains {x[place]}, but input.dtype {dtype.name} accepts {accepted} "
            f"({count} of {len(x)} samples do not fit): remove these samples, or change input.dtype"
        )
    if x.dtype.name != dtype.name:
        rounded = x.dtype.kind in "iu" and not np.array_equal(converted.astype(x.dtype), x)
        notify(
            f"x is {x.dtype.name}: published as {dtype.name}, the configuration's input.dtype"
            + (", which rounds large integers" if rounded else "")
        )
    return converted


def _convert_labels(labels: list[Label], topic: str, config: Config, notify: Callable[[str], None]) -> list[Label]:
    """Return labels in the type that the topic's declared classes have: "1" becomes 1 if 1 is declared, and the reverse.

    Raises `StreamlearnError` for a label that is not declared.
    """
    scenario = Scenario.from_config(config.scenario, config.classes, grow=config.grow_head)
    classes, key = scenario.declared_classes(topic), f"scenario.tasks.{topic}"
    if classes is None and scenario.kind == "domain":
        raise _refuse(f"scenario.tasks has no classes for topic {topic}")
    if topic not in scenario.declared:
        key, classes = "classes", classes or (None if isinstance(config.classes, int) else config.classes)
    if classes is None:
        return labels
    known: dict[Label, Label] = {}
    known |= {str(label): label for label in classes}
    known |= {label: label for label in classes}
    known |= {label: known[str(label)] for label in set(labels) if label not in known and str(label) in known}
    if (unknown := next((n for n, label in enumerate(labels) if label not in known), None)) is not None:
        accepted = ", ".join(map(repr, classes))
        raise _refuse(
            f"the label of sample {unknown} of {topic} is {labels[unknown]!r:.60}; accepted by {key}: {accepted:.200}"
        )
    if changed := next((label for label in labels if type(known[label]) is not type(label)), None):
        notify(
            f"the label {changed!r:.60} is published as {known[changed]!r:.60}, the class in {key}; "
            "other labels are converted in the same way"
        )
    return [known[label] for label in labels]


def parse_labels(text: str) -> list[str]:
    """Return the labels of a list that is separated by commas, as strings; `resolve_groups` finds their types."""
    return [label.strip() for label in text.split(",")]


def resolve_groups(samples: Samples, groups: Sequence[Sequence[str]]) -> list[list[Label]]:
    """Return groups of labels, given as strings, with the types that the labels have in the samples.

    Raises `UsageError` if the samples have such a label both as an integer and as a string.
    """
    known: dict[str, list[Label]] = {}
    for label in dict.fromkeys(samples.y):
        known.setdefault(str(label), []).append(label)
    for text in (text for group in groups for text in group):
        if len(known.get(text, [])) > 1:
            raise UsageError(f"the samples have {text} both as an integer and as a string label: write it in one way")
    return [[known.get(text, [text])[0] for text in group] for group in groups]


def split_by_classes(samples: Samples, groups: Sequence[Sequence[Label]]) -> list[Samples]:
    """Return one task for each group of classes; raises `UsageError` if no sample has a class of a group."""
    tasks = []
    for group in groups:
        wanted = set(group)
        chosen = np.fromiter((label in wanted for label in samples.y), bool, len(samples))
        if not chosen.any():
            raise UsageError(f"no sample has a class of {', '.join(map(str, group))}")
        tasks.append(samples.select(np.flatnonzero(chosen)))
    return tasks


def task_names(samples: Samples, count: int | None) -> list[str]:
    """Return the tasks that the samples name, sorted with digits compared as numbers; only the first `count`, if given."""
    if not samples.task:
        raise UsageError("the samples name no task: expected a .jsonl file with a field task")
    names = sorted(set(samples.task), key=natural_key)
    if count is not None and count > len(names):
        raise UsageError(f"the samples name {len(names)} tasks: {', '.join(names)}; expected {count}")
    return names[:count]


def split_by_task(samples: Samples, names: Sequence[str]) -> list[Samples]:
    """Return the samples of each of these tasks; raises `UsageError` if a task has no sample."""
    indices: dict[str, list[int]] = {name: [] for name in names}
    for index, name in enumerate(samples.task):
        if name in indices:
            indices[name].append(index)
    if missing := [name for name, chosen in indices.items() if not chosen]:
        raise UsageError(f"no sample is of task {', '.join(missing)}")
    return [samples.select(np.asarray(chosen)) for chosen in indices.values()]


def equal_class_groups(samples: Samples, count: int) -> list[list[Label]]:
    """Return the sorted classes, divided into `count` groups of equal size, as far as possible."""
    classes = sorted(set(samples.y), key=lambda label: (isinstance(label, str), label))
    if not 1 <= count <= len(classes):
        raise UsageError(f"{len(classes)} classes cannot be divided into {count} tasks")
    return [[classes[index] for index in part] for part in np.array_split(np.arange(len(classes)), count)]


def make_permuted_tasks(samples: Samples, count: int, seed: int) -> list[Samples]:
    """Return `count` tasks with all samples; each has its features in another fixed random order, the first is unchanged."""
    if samples.is_text:
        raise UsageError("permutation needs numbers, got text")
    flat = samples.x.reshape(len(samples), -1)
    orders = [np.arange(flat.shape[1])] + [
        np.random.default_rng([seed, n]).permutation(flat.shape[1]) for n in range(1, count)
    ]
    return [Samples(np.ascontiguousarray(flat[:, order]).reshape(samples.x.shape), samples.y) for order in orders]


def make_rotated_tasks(samples: Samples, count: int) -> list[Samples]:
    """Return `count` tasks with all images, rotated by equal steps from 0 to 180 degrees."""
    if samples.x.ndim != 3:
        raise UsageError(f"rotation needs images [n, height, width], got {list(samples.x.shape)}")
    return [Samples(rotate_images(samples.x, 180 * n / max(count - 1, 1)), samples.y) for n in range(count)]


def shuffle(samples: Samples, seed: int) -> Samples:
    """Return the samples in a random order that depends only on the seed."""
    return samples.select(np.random.default_rng(seed).permutation(len(samples)))


def publish(
    writer: LogWriter,
    topic: str,
    samples: Samples,
    options: PublishOptions,
    *,
    probe: Samples | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a task to its topic: the probe, the samples, then the markers. Returns when all records are acknowledged.

    `progress` is called with the number of samples of each record that was written.
    """
    writer.create_topic(topic, options.partitions)
    partitions = writer.partitions(topic)
    codec = CODECS[options.codec]
    if samples.is_text and not codec.holds_text:
        names = " or ".join(TEXT_CODECS)
        raise UsageError(f"codec {codec.name} is for numbers, but these samples are text: use codec {names}")
    headers: Headers = ((CONTENT_TYPE, codec.content_type),)
    if probe is not None:
        _write(writer, topic, probe, options, partitions, (*headers, (USE_HEADER, PROBE)), lambda _: None)
    _write(writer, topic, samples, options, partitions, headers, progress)
    if options.markers:
        for partition in range(partitions):
            # Kafka requires a key or a value
            writer.append(topic, partition, TASK_END, headers=((CONTROL_HEADER, TASK_END),))
    writer.flush()


def _write(
    writer: LogWriter,
    topic: str,
    samples: Samples,
    options: PublishOptions,
    partitions: int,
    headers: Headers,
    progress: Callable[[int], None],
) -> None:
    codec = CODECS[options.codec]
    size = options.samples_per_record if codec.holds_many else 1
    start_time = time.monotonic()
    for number, start in enumerate(range(0, len(samples), size)):
        x, y = samples.x[start : start + size], samples.y[start : start + size]
        value = codec.encode_text(x[0], y[0]) if samples.is_text else codec.encode(x, y)
        writer.append(topic, number % partitions, value, headers=headers)
        progress(len(y))
        if options.rate is not None:
            writer.flush()
            ahead = (start + len(y)) / options.rate - (time.monotonic() - start_time)
            time.sleep(max(0.0, ahead))
    writer.flush()


def _read_npz(path: Path, split: str) -> Samples:
    with _load_arrays(path) as arrays:
        is_whole = "x" in arrays
        names = ("x", "y") if is_whole else (f"x_{split}", f"y_{split}")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise InputOutputError(f"{path}: has no {', '.join(missing)}; found {', '.join(arrays)}")
        x, y = (np.asarray(arrays[name]) for name in names)
    if not x.ndim or y.ndim != 1 or len(x) != len(y):
        raise InputOutputError(f"{path}: x has shape {list(x.shape)}, y {list(y.shape)}; expected [n, ...] and [n]")
    return Samples(_to_numbers(x), y.tolist(), has_splits=not is_whole)


def read_unlabelled(path: Path, split: str) -> Samples | None:
    """Read a `.npz` or `.jsonl` file without labels; return None if it has labels, or is another kind of file."""
    if _file_type(path) == ".jsonl":
        with _errors_name(path):
            samples = _read_jsonl(path, split, labelled=False)
        return None if samples.y or not len(samples.x) else samples
    if path.suffix != ".npz":
        return None
    with _errors_name(path):
        with _load_arrays(path) as arrays:
            x = arrays["x"] if "x" in arrays and "y" not in arrays else None
        return None if x is None else Samples(_to_numbers(x), [])


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Convert the errors of reading a file to `StreamlearnError`s that name the file."""
    try:
        yield
    except OSError as error:
        raise StreamlearnError.from_os_error(error, path) from error
    except UnicodeDecodeError as error:
        raise InputOutputError(f"{path}: not UTF-8: {error}") from error
    except (EOFError, zlib.error, csv.Error, ValueError) as error:
        raise InputOutputError(f"{path}: {error}") from error


@contextmanager
def _load_arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the arrays of a `.npz` file; raises `ValueError` if it is not one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (ValueError, EOFError, BadZipFile, TypeError) as error:
        hint = (
            ": arrays of Python objects are not accepted; save strings with y.astype(str)"
            if "Object arrays" in str(error)
            else ""
        )
        raise ValueError(f"not a .npz file of plain arrays{hint}") from error


def _to_numbers(values: Any) -> np.ndarray:
    """Return an array of real numbers; raises `ValueError` for other values."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"x contains {array.dtype}; expected numbers")
    return array


def _stack_rows(path: Path, rows: list[Any], lines: list[int], *, keep_precision: bool) -> np.ndarray:
    """Return the rows of a `.jsonl` file as one array of float32, or with their own precision.

    Raises `InputOutputError` that names the line if they are not numbers of one shape, or one is too large.
    """
    try:
        with np.errstate(over="raise"):
            return _to_numbers(rows) if keep_precision else _to_numbers(rows).astype(np.float32)
    except (FloatingPointError, ValueError) as error:
        first = _shape(rows[0])
        for row, line in zip(rows, lines, strict=True):
            if (shape := _shape(row)) is None:
                why = f"x is {row!r:.60}; expected numbers; with several dimensions, nested as [height][width]"
            elif shape != first:
                why = (
                    f"x has shape {list(shape)}, but line {lines[0]} has {list(first or ())}; "
                    "expected one shape on all lines"
                )
            elif np.abs(np.asarray(row, float)).max(initial=0) > np.finfo(np.float32).max and not keep_precision:
                why = "x contains a number that is too large for float32"
            else:
                continue
            raise InputOutputError(f"{path}:{line}: {why}") from error
        raise


def _shape(row: Any) -> tuple[int, ...] | None:
    """Return the shape of nested lists of numbers, or None for anything else."""
    try:
        return _to_numbers(row).shape
    except ValueError:
        return None


def _file_type(path: Path) -> str:
    """Return a file's suffix; for `a.csv.gz` it is `.csv`."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _read_jsonl(path: Path, split: str, *, labelled: bool = True, keep_precision: bool = False) -> Samples:
    x: list[Any] = []
    y: list[Label] = []
    tasks: list[str] = []
    lines: list[int] = []
    is_text = has_splits = False
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                tree = orjson.loads(line)
                is_text = "question" in tree if number == 1 else is_text
                has_splits |= "split" in tree
                if tree.get("split", split) != split:
                    continue
                x.append({"story": tree["story"], "question": tree["question"]} if is_text else tree["x"])
                lines.append(number)
                label = "answer" if is_text else "y"
                if labelled or label in tree:
                    y.append(tree[label])
                if "task" in tree:
                    tasks.append(str(tree["task"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                expected = '"story": ..., "question": ..., "answer"' if is_text else '"x": ..., "y"'
                raise InputOutputError(f"{path}:{number}: {error}; expected {{{expected}: ...}}") from error
    for what, some in (("name a task", tasks), ("have a label", y)):
        if some and len(some) != len(x):
            raise InputOutputError(f"{path}: {len(some)} of {len(x)} lines {what}; expected all or none")
    if is_text:
        return Samples(_object_array(x), y, tasks, has_splits)
    return Samples(_stack_rows(path, x, lines, keep_precision=keep_precision), y, tasks, has_splits)


def _object_array(texts: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


def _read_digits(split: str) -> Samples:
    """Return scikit-learn's 1,797 handwritten digits, 8 by 8 pixels, 0 to 16. Every fourth sample is in the split `test`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigurationError("digits: needs scikit-learn: pip install 'streamlearn[demo]'") from error
    digits = load_digits()
    is_test = np.arange(len(digits.target)) % round(1 / DIGITS_TEST_FRACTION) == 0
    chosen = is_test if split == "test" else ~is_test
    return Samples(digits.images[chosen].astype(np.uint8), digits.target[chosen].tolist(), has_splits=True)


def rotate_images(x: np.ndarray, degrees: float) -> np.ndarray:
    """Return images `[n, height, width]` rotated about their centre; each pixel takes the value of the nearest one."""
    height, width = x.shape[1:]
    angle = np.deg2rad(degrees)
    row, column = np.mgrid[:height, :width]
    up, right = row - (height - 1) / 2, column - (width - 1) / 2
    from_row = np.rint(np.cos(angle) * up - np.sin(angle) * right + (height - 1) / 2).astype(int)
    from_column = np.rint(np.sin(angle) * up + np.cos(angle) * right + (width - 1) / 2).astype(int)
    inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
    rotated = np.zeros_like(x)
    rotated[:, inside] = x[:, from_row[inside], from_column[inside]]
    return rotated

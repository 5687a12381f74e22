"""Publishes tasks to topics: labelled samples from files or a named example set, split into tasks."""

from __future__ import annotations

import csv
import gzip
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import orjson

from streamlearn.data import StreamlearnError, natural_key
from streamlearn.stream.codec import TYPE_OF, encode, encode_text
from streamlearn.stream.log import CONTENT_TYPE, CONTROL, PROBE, TASK_END, USE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from streamlearn.data import Label
    from streamlearn.stream.log import Headers, Sink

DIGITS_TEST = 0.25
INT64 = np.iinfo(np.int64)  # of labels, as a batch record holds them


@dataclass(frozen=True)
class Samples:
    """Labelled samples: `x [n, ...]`, of text n objects with `story` and `question`; n labels; the tasks they name."""

    x: np.ndarray
    y: list[Label]
    task: list[str] = field(default_factory=list)
    is_split: bool = False  # of a source that has several splits

    def __len__(self) -> int:
        return len(self.y)

    @property
    def is_text(self) -> bool:
        """Whether they are stories with questions."""
        return self.x.dtype == object

    def take(self, chosen: np.ndarray) -> Samples:
        """Return those with these indices, in this order."""
        indices = chosen.tolist()
        task = [self.task[index] for index in indices] if self.task else []
        return Samples(self.x[chosen], [self.y[index] for index in indices], task)


@dataclass(frozen=True)
class Publishing:
    """How tasks are written."""

    codec: str = "batch"
    per_record: int = 100  # samples in a batch record
    partitions: int = 1
    markers: bool = True
    rate: float | None = None  # samples a second


def read(source: str, split: str = "train") -> Samples:
    """Return the samples of a `.npz`, `.csv`, `.jsonl` or `.jsonl.gz` file, or of the example set `digits`.

    An `.npz` has `x` and `y`, or `x_train`, `y_train`, `x_test`, `y_test`; a `.csv` has the label in its last column;
    a `.jsonl` has an object with `x` and `y`, or with `story`, `question` and `answer`, on each line, and perhaps `task`
    and `split`. Raises `StreamlearnError`, naming file and line.
    """
    if source == "digits":
        return _digits(split)
    path = Path(source)
    readers: dict[str, Callable[[Path, str], Samples]] = {".npz": _npz, ".csv": _csv, ".jsonl": _jsonl}
    if (reader := readers.get(_kind(path))) is None:
        raise StreamlearnError(f"{source}: expected a .npz, .csv or .jsonl file, or the example set: digits", code=2)
    with _naming(path):
        samples = reader(path, split)
    if not len(samples):
        raise StreamlearnError(f"{path}: holds no samples", code=74)
    for index, label in enumerate(samples.y):
        if type(label) is not str and not (type(label) is int and INT64.min <= label <= INT64.max):
            message = (
                f"{path}: the label of sample {index} is {label!r:.60}; expected an integer of 64 bits or a string"
            )
            raise StreamlearnError(message, code=74)
    return samples


def test_split(source: str) -> Samples:
    """Return a source's own test split; raises `StreamlearnError` (2) where it has none."""
    samples = read(source, "test")
    if not samples.is_split:
        raise StreamlearnError(f"{source}: has no test split; give a file of probes", code=2)
    return samples


def by_classes(samples: Samples, groups: Sequence[Sequence[Label]]) -> list[Samples]:
    """Return a task for each group of classes; raises `StreamlearnError` for a class that no sample has."""
    labels = np.array([str(label) for label in samples.y])
    tasks = []
    for group in groups:
        chosen = np.isin(labels, [str(label) for label in group])
        if not chosen.any():
            raise StreamlearnError(f"no sample has a class of {', '.join(map(str, group))}", code=2)
        tasks.append(samples.take(np.flatnonzero(chosen)))
    return tasks


def task_names(samples: Samples, count: int | None) -> list[str]:
    """Return the tasks that the samples name, numbers in their order; of them the first `count`."""
    if not samples.task:
        raise StreamlearnError("the samples name no task: expected a .jsonl file with a field task", code=2)
    names = sorted(set(samples.task), key=natural_key)
    if count is not None and count > len(names):
        raise StreamlearnError(f"{len(names)} tasks are named: {', '.join(names)}; expected {count}", code=2)
    return names[:count]


def by_task(samples: Samples, names: Sequence[str]) -> list[Samples]:
    """Return the samples of each task that is named; raises `StreamlearnError` for one that no sample names."""
    places: dict[str, list[int]] = {name: [] for name in names}
    for place, name in enumerate(samples.task):
        if name in places:
            places[name].append(place)
    if missing := [name for name, chosen in places.items() if not chosen]:
        raise StreamlearnError(f"no sample is of task {', '.join(missing)}", code=2)
    return [samples.take(np.asarray(chosen)) for chosen in places.values()]


def equal_groups(samples: Samples, count: int) -> list[list[Label]]:
    """Return the classes in order, cut into `count` groups as equal as can be."""
    classes = sorted(set(samples.y), key=lambda label: (isinstance(label, str), label))
    if not 1 <= count <= len(classes):
        raise StreamlearnError(f"{len(classes)} classes cannot make {count} tasks", code=2)
    return [[classes[index] for index in part] for part in np.array_split(np.arange(len(classes)), count)]


def by_permutation(samples: Samples, count: int, seed: int) -> list[Samples]:
    """Return all samples `count` times, their features in a fixed random order each time (the first as they are)."""
    if samples.is_text:
        raise StreamlearnError("permutation needs numbers, got text", code=2)
    flat = samples.x.reshape(len(samples), -1)
    orders = [np.arange(flat.shape[1])] + [
        np.random.default_rng([seed, n]).permutation(flat.shape[1]) for n in range(1, count)
    ]
    return [Samples(np.ascontiguousarray(flat[:, order]).reshape(samples.x.shape), samples.y) for order in orders]


def by_rotation(samples: Samples, count: int) -> list[Samples]:
    """Return all images `count` times, turned by equal steps from 0 up to 180 degrees (nearest pixel)."""
    if samples.x.ndim != 3:
        raise StreamlearnError(f"rotation needs images [n, height, width], got {list(samples.x.shape)}", code=2)
    return [Samples(rotated(samples.x, 180 * n / max(count - 1, 1)), samples.y) for n in range(count)]


def shuffled(samples: Samples, seed: int) -> Samples:
    """Return the samples in a random order that depends on the seed alone."""
    return samples.take(np.random.default_rng(seed).permutation(len(samples)))


def publish(
    sink: Sink,
    topic: str,
    samples: Samples,
    how: Publishing,
    *,
    probe: Samples | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a task to its topic, its probe first and its marker last; returns when all is acknowledged."""
    sink.create_topic(topic, how.partitions)
    partitions = sink.partitions(topic)
    if samples.is_text and how.codec == "batch":
        raise StreamlearnError("codec batch holds numbers, and these samples are text: use json or msgpack", code=2)
    typed: Headers = ((CONTENT_TYPE, TYPE_OF[how.codec]),)
    if probe is not None:
        _write(sink, topic, probe, how, partitions, (*typed, (USE, PROBE)), lambda _: None)
    _write(sink, topic, samples, how, partitions, typed, progress)
    if how.markers:
        for partition in range(partitions):
            sink.append(topic, partition, TASK_END, headers=((CONTROL, TASK_END),))  # Kafka wants a key or a value
    sink.flush()


def _write(
    sink: Sink,
    topic: str,
    samples: Samples,
    how: Publishing,
    partitions: int,
    headers: Headers,
    progress: Callable[[int], None],
) -> None:
    size = how.per_record if how.codec == "batch" else 1
    begun = time.monotonic()
    for number, start in enumerate(range(0, len(samples), size)):
        x, y = samples.x[start : start + size], samples.y[start : start + size]
        if samples.is_text:
            value = encode_text(how.codec, x[0], y[0])
        else:
            value = encode(how.codec, x, y) if how.codec == "batch" else encode(how.codec, x[0], y[0])
        sink.append(topic, number % partitions, value, headers=headers)
        progress(len(y))
        if how.rate is not None:
            sink.flush()
            ahead = (start + len(y)) / how.rate - (time.monotonic() - begun)
            time.sleep(max(0.0, ahead))
    sink.flush()


def _npz(path: Path, split: str) -> Samples:
    with _arrays(path) as arrays:
        whole = "x" in arrays
        names = ("x", "y") if whole else (f"x_{split}", f"y_{split}")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise StreamlearnError(f"{path}: has no {', '.join(missing)}; found {', '.join(arrays)}", code=74)
        x, y = (np.asarray(arrays[name]) for name in names)
    if not x.ndim or y.ndim != 1 or len(x) != len(y):
        raise StreamlearnError(f"{path}: x is {list(x.shape)}, y {list(y.shape)}; expected [n, ...] and [n]", code=74)
    return Samples(_numbers(x), y.tolist(), is_split=not whole)


def unlabelled(path: Path, split: str) -> Samples | None:
    """Return the samples of a `.npz` or `.jsonl` that has no labels, or None where it has some, or is another file."""
    if _kind(path) == ".jsonl":
        with _naming(path):
            samples = _jsonl(path, split, labelled=False)
        return None if samples.y or not len(samples.x) else samples
    if path.suffix != ".npz":
        return None
    with _naming(path):
        with _arrays(path) as arrays:
            x = arrays["x"] if "x" in arrays and "y" not in arrays else None
        return None if x is None else Samples(_numbers(x), [])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name a file that cannot be read, or makes no sense."""
    try:
        yield
    except OSError as error:
        raise StreamlearnError.of_system(error, path) from error
    except UnicodeDecodeError as error:
        raise StreamlearnError(f"{path}: not UTF-8: {error}", code=74) from error
    except (EOFError, zlib.error, csv.Error, ValueError) as error:
        raise StreamlearnError(f"{path}: {error}", code=74) from error


@contextmanager
def _arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (ValueError, EOFError, BadZipFile, TypeError) as error:
        raise ValueError("not a .npz file of plain arrays") from error


def _numbers(values: Any) -> np.ndarray:
    """Return an array of real numbers; raises ValueError for anything else."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"x holds {array.dtype}; expected numbers")
    return array


def _floats(rows: list[Any]) -> np.ndarray:
    """Return rows as float32; raises ValueError where they are not numbers of one shape, or too large."""
    try:
        with np.errstate(over="raise"):
            return _numbers(rows).astype(np.float32)
    except FloatingPointError as error:
        raise ValueError("x holds a number that is too large for float32") from error
    except ValueError as error:
        raise ValueError("x is not numbers of the same shape on every line") from error


def _csv(path: Path, split: str) -> Samples:
    del split
    x, y = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        for number, row in enumerate(filter(None, lines)):
            if len(row) < 2:
                where = f"{path}:{lines.line_num}"
                raise StreamlearnError(
                    f"{where}: one column; expected numbers, then a label, with commas between", code=74
                )
            try:
                x.append([float(value) for value in row[:-1]])
                y.append(_label(row[-1]))
            except ValueError as error:
                if number:  # only the first may be the header
                    where = f"{path}:{lines.line_num}"
                    raise StreamlearnError(f"{where}: {error}; expected numbers, then a label", code=74) from error
    if len({len(row) for row in x}) > 1:
        raise StreamlearnError(f"{path}: not every line has the same number of columns", code=74)
    return Samples(_floats(x), y)


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _jsonl(path: Path, split: str, *, labelled: bool = True) -> Samples:
    x: list[Any] = []
    y: list[Label] = []
    tasks: list[str] = []
    is_text = is_split = False
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                tree = orjson.loads(line)
                is_text = "question" in tree if number == 1 else is_text
                is_split |= "split" in tree
                if tree.get("split", split) != split:
                    continue
                x.append({"story": tree["story"], "question": tree["question"]} if is_text else tree["x"])
                label = "answer" if is_text else "y"
                if labelled or label in tree:
                    y.append(tree[label])
                if "task" in tree:
                    tasks.append(str(tree["task"]))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                expected = '"story": ..., "question": ..., "answer"' if is_text else '"x": ..., "y"'
                raise StreamlearnError(f"{path}:{number}: {error}; expected {{{expected}: ...}}", code=74) from error
    for what, some in (("name a task", tasks), ("have a label", y)):
        if some and len(some) != len(x):
            raise StreamlearnError(f"{path}: {len(some)} of {len(x)} lines {what}; expected all, or none", code=74)
    if is_text:
        return Samples(_objects(x), y, tasks, is_split)
    return Samples(_floats(x), y, tasks, is_split)


def _objects(texts: Sequence[Any]) -> np.ndarray:
    made = np.empty(len(texts), object)
    made[:] = texts
    return made


def _digits(split: str) -> Samples:
    """Return scikit-learn's 1,797 handwritten digits, 8 by 8 and 0 to 16; a quarter, evenly over the file, is `test`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise StreamlearnError("digits: needs scikit-learn: pip install 'streamlearn[demo]'", code=78) from error
    digits = load_digits()
    test = np.arange(len(digits.target)) % round(1 / DIGITS_TEST) == 0
    chosen = test if split == "test" else ~test
    return Samples(digits.images[chosen].astype(np.uint8), digits.target[chosen].tolist(), is_split=True)


def _label(text: str) -> Label:
    try:
        return int(text)
    except ValueError:
        return text


def rotated(x: np.ndarray, degrees: float) -> np.ndarray:
    """Return images `[n, height, width]` turned about their middle, each pixel that of the nearest."""
    height, width = x.shape[1:]
    angle = np.deg2rad(degrees)
    row, column = np.mgrid[:height, :width]
    up, right = row - (height - 1) / 2, column - (width - 1) / 2
    from_row = np.rint(np.cos(angle) * up - np.sin(angle) * right + (height - 1) / 2).astype(int)
    from_column = np.rint(np.sin(angle) * up + np.cos(angle) * right + (width - 1) / 2).astype(int)
    inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
    turned = np.zeros_like(x)
    turned[:, inside] = x[:, from_row[inside], from_column[inside]]
    return turned

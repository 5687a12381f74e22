"""Publishes tasks to topics: labelled samples from files or a named example set, split into tasks."""

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

from streamlearn.data import StreamlearnError, natural_key
from streamlearn.scenario import Scenario
from streamlearn.stream.codec import CONTENT_TYPE_OF, encode, encode_text
from streamlearn.stream.log import CONTENT_TYPE, CONTROL, PROBE, TASK_END, USE
from streamlearn.table import read_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from streamlearn.config import Config
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
    has_splits: bool = False  # of a source that has several splits

    def __len__(self) -> int:
        return len(self.y)

    @property
    def is_text(self) -> bool:
        """Whether they are stories with questions."""
        return self.x.dtype == object

    def select(self, chosen: np.ndarray) -> Samples:
        """Return those with these indices, in this order."""
        indices = chosen.tolist()
        task = [self.task[index] for index in indices] if self.task else []
        return Samples(self.x[chosen], [self.y[index] for index in indices], task)


@dataclass(frozen=True)
class PublishOptions:
    """How tasks are written."""

    codec: str = "batch"
    samples_per_record: int = 100  # samples in a batch record
    partitions: int = 1
    markers: bool = True
    rate: float | None = None  # samples a second


@dataclass(frozen=True)
class ReadOptions:
    """How files are read: what their lines do not tell, and where every assumption about them is said."""

    header: bool | None = None  # whether the first line of a `.csv` names the columns; None: that line decides
    keep_precision: bool = False  # numbers of text files as wide as they are, not as float32
    notify: Callable[[str], None] = lambda _: None


def read_samples(source: str, split: str = "train", how: ReadOptions = ReadOptions()) -> Samples:
    """Return the samples of a `.npz`, `.csv`, `.jsonl` or `.jsonl.gz` file, or of the example set `digits`.

    An `.npz` has `x` and `y`, or `x_train`, `y_train`, `x_test`, `y_test`; a `.csv` has the label in its last column;
    a `.jsonl` has an object with `x` and `y`, or with `story`, `question` and `answer`, on each line, and perhaps `task`
    and `split`. Text files may be gzipped. Raises `StreamlearnError`, naming file and line.
    """
    if source == "digits":
        return _digits(split)
    path = Path(source)
    if how.header is not None and _kind(path) != ".csv":
        raise StreamlearnError(f"{source}: --header and --no-header are for .csv files", code=2)
    with _naming(path):
        match _kind(path):
            case ".npz":
                samples = _npz(path, split)
            case ".csv":
                samples = Samples(
                    *read_table(path, np.dtype("f8" if how.keep_precision else "f4"), header=how.header, say=how.notify)
                )
            case ".jsonl":
                samples = _jsonl(path, split, exact=how.keep_precision)
            case _:
                raise StreamlearnError(
                    f"{source}: expected a .npz, .csv, .csv.gz, .jsonl or .jsonl.gz file, or the example set: digits",
                    code=2,
                )
    if not len(samples):
        raise StreamlearnError(f"{path}: holds no samples", code=74)
    for index, label in enumerate(samples.y):
        if type(label) is not str and not (type(label) is int and INT64.min <= label <= INT64.max):
            message = (
                f"{path}: the label of sample {index} is {label!r:.60}; expected an integer of 64 bits or a string"
            )
            hint = ": convert labels, as with y.astype(int)" if isinstance(label, (float, bool)) else ""
            raise StreamlearnError(message + hint, code=74)
    return samples


def read_test_split(source: str, how: ReadOptions) -> Samples:
    """Return a source's own test split; raises `StreamlearnError` (2) where it has none."""
    samples = read_samples(source, "test", how)
    if not samples.has_splits:
        raise StreamlearnError(f"{source}: has no test split; give a file of probes", code=2)
    return samples


def fit_to_config(samples: Samples, topic: str, config: Config, say: Callable[[str], None]) -> Samples:
    """Return a topic's samples in the shape, dtype and labels of a configuration; `say` is called for each change.

    Raises `StreamlearnError` (65) if the configuration's stream would reject one of them.
    """
    is_text = config.input.kind == "text"
    if samples.is_text != is_text:
        kinds = ("numbers", "text")
        raise _misfit(f"the samples are {kinds[samples.is_text]}, and the configuration's input is {kinds[is_text]}")
    if is_text:
        return samples
    x = _as_dtype(_in_shape(samples.x, config.input.shape, say), np.dtype(config.input.dtype), say)
    return Samples(x, _as_classes(samples.y, topic, config, say), samples.task, samples.has_splits)


def check_limits(parts: Sequence[Samples], how: PublishOptions, config: Config) -> None:
    """Raise `StreamlearnError` (65) if a configuration's stream would reject some of these parts for their size or number."""
    first, largest = parts[0], config.stream.max_record_bytes
    if how.codec == "batch" and not first.is_text and (size := first.x[0].nbytes) * how.samples_per_record > largest:
        text = (
            f"a batch record of {how.samples_per_record} samples of {size} bytes is larger than stream.max_record_bytes"
        )
        raise _misfit(f"{text}, {largest}; give --batch {max(1, largest // (size + 64))}, or raise that key")
    labels = {label for part in parts for label in part.y}
    if config.grow_head or config.scenario.kind == "domain" or not isinstance(config.classes, int):
        return
    if len(labels) > config.classes:
        text = f"the samples have {len(labels)} labels, and classes is {config.classes}: the others would be rejected"
        raise _misfit(f"{text}; set classes: {len(labels)}, or grow_head: true, or choose some with --groups")


def _misfit(why: str) -> StreamlearnError:
    return StreamlearnError(f"{why}; nothing was published", code=65)


def _in_shape(x: np.ndarray, shape: Sequence[int], say: Callable[[str], None]) -> np.ndarray:
    there, wanted = list(x.shape[1:]), list(shape)
    if there == wanted:
        return x
    same = [size for size in there if size > 1] == [size for size in wanted if size > 1]
    if math.prod(there) != math.prod(wanted) or not (same or len(there) == 1 or len(wanted) == 1):
        raise _misfit(f"a sample has shape {there}, and the configuration's input.shape is {wanted}")
    say(f"samples have shape {there}: published as {wanted}, the configuration's input.shape")
    return x.reshape(len(x), *wanted)


def _as_dtype(x: np.ndarray, dtype: np.dtype, say: Callable[[str], None]) -> np.ndarray:
    """Return numbers as another dtype; raises `StreamlearnError` where one of them cannot be held, or is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted = x.astype(dtype, copy=False)
        held = np.isfinite(converted) if dtype.kind == "f" else converted == x
    if not held.all():
        place = tuple(np.argwhere(~held)[0].tolist())
        count = int((~held.reshape(len(x), -1).all(axis=1)).sum())
        what = "finite numbers" if dtype.kind == "f" else "integers from {0.min} to {0.max}".format(np.iinfo(dtype))
        raise _misfit(
            f"sample {place[0]} holds {x[place]}, and input.dtype {dtype.name} takes {what} "
            f"({count} of {len(x)} samples do not fit): leave such samples out, or change input.dtype"
        )
    if x.dtype.name != dtype.name:
        rounded = x.dtype.kind in "iu" and not np.array_equal(converted.astype(x.dtype), x)
        say(
            f"x is {x.dtype.name}: published as {dtype.name}, the configuration's input.dtype"
            + (", in which large integers are rounded" if rounded else "")
        )
    return converted


def _as_classes(labels: list[Label], topic: str, config: Config, say: Callable[[str], None]) -> list[Label]:
    """Return labels as the classes of a topic name them, 1 and "1" alike; raises `StreamlearnError` for one that is none."""
    scenario = Scenario.from_config(config)
    classes, key = scenario.declared_classes(topic), f"scenario.tasks.{topic}"
    if classes is None and scenario.kind == "domain":
        raise _misfit(f"scenario.tasks has no classes for topic {topic}")
    if topic not in scenario.declared:
        key, classes = "classes", classes or (None if isinstance(config.classes, int) else config.classes)
    if classes is None:
        return labels
    known: dict[Label, Label] = {}
    known |= {str(label): label for label in classes}
    known |= {label: label for label in classes}
    known |= {label: known[str(label)] for label in set(labels) if label not in known and str(label) in known}
    if (odd := next((n for n, label in enumerate(labels) if label not in known), None)) is not None:
        accepted = ", ".join(map(repr, classes))
        raise _misfit(
            f"the label of sample {odd} of {topic} is {labels[odd]!r:.60}; accepted by {key}: {accepted:.200}"
        )
    if changed := next((label for label in labels if type(known[label]) is not type(label)), None):
        say(f"the label {changed!r:.60} is published as {known[changed]!r:.60}, as {key} has it; so are others")
    return [known[label] for label in labels]


def resolve_groups(samples: Samples, groups: Sequence[Sequence[str]]) -> list[list[Label]]:
    """Return groups of labels given as text; raises `StreamlearnError` (2) where 1 and "1" are different labels here."""
    known: dict[str, list[Label]] = {}
    for label in dict.fromkeys(samples.y):
        known.setdefault(str(label), []).append(label)
    for text in (text for group in groups for text in group):
        if len(known.get(text, [])) > 1:
            raise StreamlearnError(
                f"{text} is both an integer and a string among the labels: write it in one way in the samples", code=2
            )
    return [[known.get(text, [text])[0] for text in group] for group in groups]


def split_by_classes(samples: Samples, groups: Sequence[Sequence[Label]]) -> list[Samples]:
    """Return a task for each group of classes; raises `StreamlearnError` for a class that no sample has."""
    tasks = []
    for group in groups:
        wanted = set(group)
        chosen = np.fromiter((label in wanted for label in samples.y), bool, len(samples))
        if not chosen.any():
            raise StreamlearnError(f"no sample has a class of {', '.join(map(str, group))}", code=2)
        tasks.append(samples.select(np.flatnonzero(chosen)))
    return tasks


def task_names(samples: Samples, count: int | None) -> list[str]:
    """Return the tasks that the samples name, numbers in their order; of them the first `count`."""
    if not samples.task:
        raise StreamlearnError("the samples name no task: expected a .jsonl file with a field task", code=2)
    names = sorted(set(samples.task), key=natural_key)
    if count is not None and count > len(names):
        raise StreamlearnError(f"{len(names)} tasks are named: {', '.join(names)}; expected {count}", code=2)
    return names[:count]


def split_by_task(samples: Samples, names: Sequence[str]) -> list[Samples]:
    """Return the samples of each task that is named; raises `StreamlearnError` for one that no sample names."""
    places: dict[str, list[int]] = {name: [] for name in names}
    for place, name in enumerate(samples.task):
        if name in places:
            places[name].append(place)
    if missing := [name for name, chosen in places.items() if not chosen]:
        raise StreamlearnError(f"no sample is of task {', '.join(missing)}", code=2)
    return [samples.select(np.asarray(chosen)) for chosen in places.values()]


def equal_class_groups(samples: Samples, count: int) -> list[list[Label]]:
    """Return the classes in order, cut into `count` groups as equal as can be."""
    classes = sorted(set(samples.y), key=lambda label: (isinstance(label, str), label))
    if not 1 <= count <= len(classes):
        raise StreamlearnError(f"{len(classes)} classes cannot make {count} tasks", code=2)
    return [[classes[index] for index in part] for part in np.array_split(np.arange(len(classes)), count)]


def make_permuted_tasks(samples: Samples, count: int, seed: int) -> list[Samples]:
    """Return all samples `count` times, their features in a fixed random order each time (the first as they are)."""
    if samples.is_text:
        raise StreamlearnError("permutation needs numbers, got text", code=2)
    flat = samples.x.reshape(len(samples), -1)
    orders = [np.arange(flat.shape[1])] + [
        np.random.default_rng([seed, n]).permutation(flat.shape[1]) for n in range(1, count)
    ]
    return [Samples(np.ascontiguousarray(flat[:, order]).reshape(samples.x.shape), samples.y) for order in orders]


def make_rotated_tasks(samples: Samples, count: int) -> list[Samples]:
    """Return all images `count` times, turned by equal steps from 0 up to 180 degrees (nearest pixel)."""
    if samples.x.ndim != 3:
        raise StreamlearnError(f"rotation needs images [n, height, width], got {list(samples.x.shape)}", code=2)
    return [Samples(rotate_images(samples.x, 180 * n / max(count - 1, 1)), samples.y) for n in range(count)]


def shuffle(samples: Samples, seed: int) -> Samples:
    """Return the samples in a random order that depends on the seed alone."""
    return samples.select(np.random.default_rng(seed).permutation(len(samples)))


def publish(
    sink: Sink,
    topic: str,
    samples: Samples,
    how: PublishOptions,
    *,
    probe: Samples | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a task to its topic, its probe first and its marker last; returns when all is acknowledged."""
    sink.create_topic(topic, how.partitions)
    partitions = sink.partitions(topic)
    if samples.is_text and how.codec == "batch":
        raise StreamlearnError("codec batch holds numbers, and these samples are text: use json or msgpack", code=2)
    typed: Headers = ((CONTENT_TYPE, CONTENT_TYPE_OF[how.codec]),)
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
    how: PublishOptions,
    partitions: int,
    headers: Headers,
    progress: Callable[[int], None],
) -> None:
    size = how.samples_per_record if how.codec == "batch" else 1
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
    return Samples(_numbers(x), y.tolist(), has_splits=not whole)


def read_unlabelled(path: Path, split: str) -> Samples | None:
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
        raise StreamlearnError.from_os_error(error, path) from error
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
        hint = (
            ": arrays of objects are not read; save strings as y.astype(str)" if "Object arrays" in str(error) else ""
        )
        raise ValueError(f"not a .npz file of plain arrays{hint}") from error


def _numbers(values: Any) -> np.ndarray:
    """Return an array of real numbers; raises ValueError for anything else."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"x holds {array.dtype}; expected numbers")
    return array


def _floats(path: Path, rows: list[Any], lines: list[int], *, exact: bool) -> np.ndarray:
    """Return rows as float32, or as they are (`exact`).

    Raises `StreamlearnError` (74), naming the line, where they are not numbers of one shape, or too large.
    """
    try:
        with np.errstate(over="raise"):
            return _numbers(rows) if exact else _numbers(rows).astype(np.float32)
    except (FloatingPointError, ValueError) as error:
        first = _shape(rows[0])
        for row, line in zip(rows, lines, strict=True):
            if (shape := _shape(row)) is None:
                why = (
                    f"x is {row!r:.60}; expected numbers, nested as [height][width] where there are several dimensions"
                )
            elif shape != first:
                why = f"x has shape {list(shape)}, and line {lines[0]} has {list(first or ())}; expected one shape on all lines"
            elif np.abs(np.asarray(row, float)).max(initial=0) > np.finfo(np.float32).max and not exact:
                why = "x holds a number that is too large for float32"
            else:
                continue
            raise StreamlearnError(f"{path}:{line}: {why}", code=74) from error
        raise


def _shape(row: Any) -> tuple[int, ...] | None:
    """Return the shape of nested numbers, or None for anything else."""
    try:
        return _numbers(row).shape
    except ValueError:
        return None


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _jsonl(path: Path, split: str, *, labelled: bool = True, exact: bool = False) -> Samples:
    x: list[Any] = []
    y: list[Label] = []
    tasks: list[str] = []
    lines: list[int] = []
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
                lines.append(number)
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
    return Samples(_floats(path, x, lines, exact=exact), y, tasks, is_split)


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
    return Samples(digits.images[chosen].astype(np.uint8), digits.target[chosen].tolist(), has_splits=True)


def rotate_images(x: np.ndarray, degrees: float) -> np.ndarray:
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

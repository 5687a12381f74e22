"""Hostile records: each becomes a dead letter with its bytes, and the model is the same as without it."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from streamlearn import state
from streamlearn.checkpoint.store import Store
from streamlearn.config.root import Config
from streamlearn.core.progress import Progress
from streamlearn.core.samples import REJECT_REASONS
from streamlearn.core.states import SaveTrigger
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.metrics import Metrics
from streamlearn.runtime import loop
from streamlearn.runtime.job import Job
from streamlearn.runtime.stream import open_stream_reader
from streamlearn.stream import letters
from streamlearn.stream.codecs.registry import CODECS, find_codec
from streamlearn.stream.deadletter import HEADER_PREFIX, original_headers
from streamlearn.stream.logs.base import CONTENT_TYPE, CONTROL_HEADER, PROBE, TASK_END, USE_HEADER, Headers, Record
from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter
from tests.support.streams import TYPED, Unwilling, World, everything, places, until

if TYPE_CHECKING:
    from pathlib import Path

    from streamlearn.stream.reader import StreamReader


COUNT = int(os.environ.get("STREAMLEARN_HOSTILE", "2000"))
SEED = int(os.environ.get("STREAMLEARN_SEED", random.randrange(10_000)))
ROUND = 2000  # records per run of hypothesis, which keeps much in memory for each
GOOD = 600
MAX_BYTES = 4096
TOPIC = "a"


@dataclass(frozen=True)
class Hostile:
    """A record without a valid sample, and the number of samples as which it counts."""

    value: bytes | None
    headers: Headers
    key: bytes | None = None
    samples: int = 1


def typed(name: str) -> Headers:
    """Return the header for a codec."""
    return ((CONTENT_TYPE, CODECS[name].content_type),)


numbers = st.floats(-100, 100, width=32)
pairs = st.lists(numbers, min_size=2, max_size=2)
classes = st.integers(0, 3)
bad_labels = st.one_of(
    st.integers(4, 2**63 - 1), st.integers(-(2**63), -1), st.text(max_size=30), st.none(), st.booleans(), numbers,
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
    st.binary(max_size=9),
)  # fmt: skip
not_finite = st.sampled_from([float("nan"), float("inf"), -float("inf")])


def valid_values(pair: list[float], label: int) -> dict[str, bytes]:
    """Return the bytes of a valid sample for every codec."""
    x = np.array(pair, np.float32)
    return {name: codec.encode(x[None], [label]) for name, codec in CODECS.items()}


@st.composite
def undecodable(draw: st.DrawFn) -> Hostile:
    """Draw truncated bytes, random bytes, and unknown content types."""
    name = draw(st.sampled_from(sorted(CODECS)))
    kind = draw(st.sampled_from(["cut", "noise", "type", "bomb", "lie"]))
    good = valid_values(draw(pairs), draw(classes))
    if kind == "cut":
        return Hostile(good[name][: draw(st.integers(0, len(good[name]) - 1))], typed(name))
    if kind == "noise":
        return Hostile(draw(st.binary(max_size=200)), typed(name))
    if kind == "type":
        unknown = draw(st.binary(max_size=20).filter(lambda text: find_codec(text) is None))
        return Hostile(good[name], ((CONTENT_TYPE, unknown),))
    depth = draw(st.integers(1, 1000))
    if kind == "bomb":
        bombs = {
            "json": b"[" * depth + b"]" * depth,
            "msgpack": b"\x91" * depth + b"\0",
            "batch": b"\x81\xa1a" * depth + b"\0",
        }
        name = draw(st.sampled_from(sorted(bombs)))
        return Hostile(bombs[name], typed(name))
    lies = [head + b"\xff\xff\xff\xff" for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")]
    lie = draw(st.sampled_from(lies)) + draw(st.binary(max_size=20))
    return Hostile(lie, typed(draw(st.sampled_from(["msgpack", "batch"]))))


@st.composite
def misshapen(draw: st.DrawFn) -> Hostile:
    """Draw well-formed records with a wrong shape, dtype, label or task, or with non-finite values."""
    x: Any = draw(pairs)
    y: Any = draw(classes)
    tree: dict[str, Any] = {}
    kind = draw(
        st.sampled_from(["length", "nested", "finite", "label", "unlabelled", "task", "dtype", "blank", "binary"])
    )
    if kind == "length":
        x = draw(st.lists(numbers, max_size=6).filter(lambda found: len(found) != 2))
    elif kind == "nested":
        x = draw(
            st.sampled_from([[[1], [1, 2]], [[1, 2]], [1, None], [1, "2"], "12", 7, None, {"0": 1}, [[], []], [1, [2]]])
        )
    elif kind == "finite":
        x = [draw(not_finite | st.just(1e300)), x[1]]
    elif kind == "label":
        y = draw(bad_labels)
    elif kind == "task":
        tree["task"] = draw(
            st.one_of(st.text(max_size=9), st.integers(0, 9), st.none()).filter(lambda name: name != TOPIC)
        )
    elif kind == "dtype":
        x = np.array(x, np.float32).tobytes()
        tree["dtype"] = draw(st.sampled_from(["float64", "uint8", "object", "", 3, None, "O", "f4,f4"]))
    elif kind == "blank":
        return Hostile(valid_values(x, y)["json"] + b" " * MAX_BYTES, typed("json"))
    elif kind == "binary":
        x = np.array([draw(not_finite), 0], np.float32).tobytes() + draw(st.sampled_from([b"", b"\0"]))
    tree |= {"x": x} if kind == "unlabelled" else {"x": x, "y": y}
    if kind != "nested" and isinstance(x, list) and draw(st.booleans()):
        try:
            return Hostile(orjson.dumps(tree), typed("json"))
        except TypeError:  # JSON has no such label
            pass
    return Hostile(msgpack.packb(tree), typed("msgpack"))


@st.composite
def batches(draw: st.DrawFn) -> Hostile:
    """Draw batch records that are truncated inside, or in which every sample is invalid."""
    count = draw(st.integers(1, 5))
    x = np.array(draw(st.lists(pairs, min_size=count, max_size=count)), np.float32)
    y: Any = draw(st.lists(classes, min_size=count, max_size=count))
    kind = draw(st.sampled_from(["labels", "finite", "x", "y", "shape"]))
    if kind == "labels":
        y = draw(st.lists(bad_labels, min_size=count, max_size=count))
        tree = {"x": x.tobytes(), "dtype": "float32", "shape": [count, 2], "y": y}
        return Hostile(msgpack.packb(tree), typed("batch"), samples=count)
    if kind == "finite":
        x[:, draw(st.integers(0, 1))] = draw(not_finite)
        return Hostile(CODECS["batch"].encode(x, y), typed("batch"), samples=count)
    tree = msgpack.unpackb(CODECS["batch"].encode(x, y))
    if kind == "shape":
        counts: list[Any] = [[count], [-1, 2], [0, 2], [count + 1, 2], [2**40, 2], [1.0, 2], [True, 2, 2]]
        shapes = [*counts, [count, 2, 1], "ab", None, 3]
        tree["shape"] = draw(st.sampled_from(shapes))
    else:
        tree[kind] = tree[kind][: draw(st.integers(0, len(tree[kind]) - 1))]
    return Hostile(msgpack.packb(tree), typed("batch"))


names = st.one_of(
    st.text(max_size=10).filter(lambda name: name not in {CONTENT_TYPE, CONTROL_HEADER}),
    st.sampled_from(
        [
            USE_HEADER,
            HEADER_PREFIX + "topic",
            HEADER_PREFIX + "key",
            HEADER_PREFIX + "value-in",
            HEADER_PREFIX + "replayed-to",
            "",
            "n\0",
        ]
    ),
)
values = st.one_of(st.binary(max_size=20), st.just(PROBE))
hostile = st.builds(
    lambda record, key, headers: Hostile(record.value, (*record.headers, *headers), key, record.samples),
    st.one_of(undecodable(), misshapen(), batches(), st.just(Hostile(None, ()))),
    st.none() | st.binary(max_size=20),
    st.lists(st.tuples(names, values), max_size=4),
)


class Unattended:
    """A control of the loop without any command."""

    stopping = False
    paused = False

    def serve(self, job: Job, stream: StreamReader, *, idle: bool) -> None:
        """Do nothing."""

    def wait(self, seconds: float) -> None:
        """Do nothing."""


def learn(directory: Path, records: list[Hostile]) -> Job:
    """Publish the records at random places among good samples, and learn everything; the seed decides the places."""
    directory.mkdir()
    tree = {
        "state_dir": directory / "state", "embedded": {"path": directory / "topics.sqlite"}, "device": "cpu",
        "input": {"shape": [2]}, "classes": [0, 1, 2, 3], "holdout": {"fraction": 0.1}, "model": {"name": "mlp", "hidden": [8]},
        "stream": {
            "topics": [TOPIC], "on_finished": "exit", "batch_size": 20, "max_record_bytes": MAX_BYTES,
            "dead_letter": {"burst": None},
        },
        "strategy": {"er": {"budget": 50}, "si": {}}, "learner": {"updates_per_batch": 2},
    }  # fmt: skip
    sink = EmbeddedWriter(directory / "topics.sqlite")
    sink.create_topic(TOPIC, 1)
    after = np.sort(np.random.default_rng(SEED).integers(0, GOOD + 1, len(records)))
    chance = np.random.default_rng(SEED + 1)
    at = 0
    for place in range(GOOD + 1):
        while at < len(records) and after[at] == place:
            sink.append(TOPIC, 0, records[at].value, key=records[at].key, headers=records[at].headers)
            at += 1
        if place < GOOD:
            label = int(chance.integers(0, 4))
            sink.append(TOPIC, 0, CODECS["json"].encode(chance.normal(label, 1, (1, 2)).astype(np.float32), [label]))
    sink.append(TOPIC, 0, TASK_END, headers=((CONTROL_HEADER, TASK_END),))
    sink.close()
    config = Config.model_validate(tree, context={"recipes": RECIPES})
    job = Job.make(config, Store(config.state_dir), Metrics())
    stream = open_stream_reader(job)
    stream.start()
    try:
        loop.run(job, stream, Unattended())
        assert job.save(stream, SaveTrigger.SHUTDOWN) is not None
    finally:
        stream.stop()
    return job


def state_bytes(job: Job) -> dict[str, bytes]:
    """Return all bytes of the learned state."""
    files, rest, _ = state.pack({**job.learner.state_dict(), "probes": job.probes.state_dict()})
    bits = {f"{name}:{key}": tensor.numpy().tobytes() for name, file in files.items() for key, tensor in file.items()}
    return {**bits, "rest": orjson.dumps([rest, job.matrix.state_dict()], option=orjson.OPT_NON_STR_KEYS)}


def generate(start: int, count: int) -> list[Hostile]:
    """Return this number of records, generated from a seed."""
    records: list[Hostile] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(hostile)
    def collect(record: Hostile) -> None:
        records.append(record)

    collect()
    return records


def test_hostile_records_change_nothing(tmp_path: Path) -> None:
    """Each has a dead letter per sample, with its bytes, key and headers; the learned state is bit-equal."""
    print(f"seed {SEED}, {COUNT} records")
    records = [
        record for first in range(0, COUNT, ROUND) for record in generate(SEED + first, min(ROUND, COUNT - first))
    ]
    assert len(records) >= 0.9 * COUNT
    expected, job = learn(tmp_path / "good", []), learn(tmp_path / "bad", records)
    log = EmbeddedReader(tmp_path / "bad" / "topics.sqlite")
    log.connect()
    published = {record.offset: record for record in letters.read_records(log, TOPIC)}
    bad = [record for record in published.values() if record.offset != len(published) - 1 and not is_good(record)]
    found: dict[int, list[Record]] = {}
    for letter in letters.read_records(log, "streamlearn.dlq"):
        found.setdefault(int(letter.header(HEADER_PREFIX + "offset") or b"-1"), []).append(letter)
    log.close()

    assert sorted(found) == [record.offset for record in bad]
    assert len(bad) == len(records)
    for sent, record in zip(records, bad, strict=True):
        own = found[record.offset]
        keys = [f"{TOPIC}-0-{record.offset}-{index}".encode() for index in range(sent.samples)]
        assert [letter.key for letter in own] == keys, sent
        assert [letter.value for letter in own] == [sent.value] + [None] * (sent.samples - 1)
        assert own[0].header(HEADER_PREFIX + "key") == sent.key
        kept = tuple(header for header in sent.headers if not header[0].startswith(HEADER_PREFIX))
        assert original_headers(own[0]) == kept
        assert {(letter.header(HEADER_PREFIX + "reason") or b"").decode() for letter in own} <= set(REJECT_REASONS)

    totals = job.progress.totals()
    assert totals["rejected"] == sum(record.samples for record in records)
    assert totals["trained"] + totals["held_out"] == GOOD
    assert job.progress.unaccounted() == {}
    assert (job.progress.labels, job.learner.step) == (expected.progress.labels, expected.learner.step)
    assert job.learner.step > 0
    assert state_bytes(job) == state_bytes(expected)


def is_good(record: Record) -> bool:
    """Return whether a record is a good sample: only these have a value, no key and no headers."""
    return record.key is None and not record.headers and record.value is not None


CATALOGUE: dict[str, tuple[bytes | None, Headers]] = {
    "decode": (b"\xff\xfe", TYPED),
    "decode tombstone": (None, ()),
    "decode type": (b"{}", ((CONTENT_TYPE, b"\xff"),)),
    "decode bomb": (b"[" * 100_000, TYPED),
    "decode truncated batch": (CODECS["batch"].encode(np.zeros((3, 1), np.float32), [0, 1, 0])[:-5], typed("batch")),
    "schema": (b"[1]", TYPED),
    "schema label": (b'{"x": [1], "y": ' + b"[" * 900 + b"]" * 900 + b"}", TYPED),
    "shape": (b'{"x": [1, 2], "y": 1}', TYPED),
    "shape batch": (msgpack.packb({"x": b"\0" * 8, "shape": [3, 1], "y": [0, 1, 0]}), typed("batch")),
    "nonfinite": (msgpack.packb({"x": [float("nan")], "y": 1}), typed("msgpack")),
    "label_range": (b'{"x": [1], "y": 99}', (*TYPED, (USE_HEADER, PROBE))),
    "missing_label": (b'{"x": [1]}', TYPED),
    "unknown_task": (b'{"x": [1], "y": 1, "task": "other"}', TYPED),
    "oversize": (b" " * 300_000, (*TYPED, ("", b""), ("twice", b"1"), ("twice", b"\xff"), ("n\u00e4me", b"x" * 9000))),
}


def test_letters_are_durable_before_positions_move(world: World) -> None:
    """No position is saved before the letters are acknowledged; each letter has the bytes, the reason and its own key."""
    a = world.topic("a", [0, 1], marker=False)
    for place, (value, headers) in enumerate(CATALOGUE.values()):
        world.sink.append(a, 0, value, key=b"key %d" % place, headers=headers)
    world.send(a, 2.0, 0)
    world.sink.flush()
    unwilling = Unwilling(world.sink)
    spec: dict[str, Any] = {"topics": [a], "on_finished": "wait", "classes": [0, 1], "max_record_bytes": 200_000}
    progress = Progress()
    stream = world.stream(**spec, sink=unwilling)
    until(stream, lambda _: stream.status.problem is not None, progress)
    assert world.read_all("dlq") == []
    with pytest.raises(Exception, match="the topic is full"):
        stream.flush_dead_letters()
    stream.stop()  # like a crash: nothing was saved
    world.mark(a)

    progress = Progress()
    stream = world.stream(**{**spec, "on_finished": "exit"})
    assert places(everything(stream, progress)) == [[0, 1, 2]]
    stream.flush_dead_letters()
    found = world.read_all("dlq")
    assert [letter.key for letter in found] == [f"{a}-0-{offset}-0".encode() for offset in range(2, 2 + len(CATALOGUE))]
    assert [letter.value for letter in found] == [value for value, _ in CATALOGUE.values()]
    assert [original_headers(letter) for letter in found] == [headers for _, headers in CATALOGUE.values()]
    reasons = [(letter.header(HEADER_PREFIX + "reason") or b"").decode() for letter in found]
    assert reasons == [name.split()[0] for name in CATALOGUE]
    assert [letter.header(HEADER_PREFIX + "key") for letter in found] == [b"key %d" % n for n in range(len(CATALOGUE))]

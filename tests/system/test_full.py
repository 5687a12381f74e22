"""Split MNIST at full size: 60,000 samples seen once, 10,000 as probes. `make test-slow` runs it (45 minutes)."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.common import merged
from benchmarks.kafka_broker import KafkaBroker
from streamlearn.checkpoint.store import Store
from streamlearn.stream.logs.base import CONTENT_TYPE, LogWriter
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from streamlearn.stream.logs.sqlite import EmbeddedWriter
from streamlearn.tools import producer
from tests.support import jobs
from tests.support.agreement import check_agreement
from tests.support.commands import cli
from tests.support.kills import run_with_kills

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streamlearn.checkpoint.manifest import Checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.kafka, pytest.mark.timeout(3600)]

SECONDS = 1500
SEED = random.randrange(10_000)
ALL: dict[str, Any] = {
    "model": {"hidden": [400, 400]},
    "strategy": {"generative": {}, "si": {}},
    # as configs/mnist-split.yaml
    "learner": {"updates_per_batch": 10, "augment": {"shift": 2, "rotate": 10, "zoom": 0.1}},
    "stream": {"batch_size": 100},
    "checkpoint": {"every_seconds": 15, "every_batches": None},
}


def publish(sink: LogWriter, *, garbage: bool = False) -> None:
    """Publish all of MNIST, one record a sample where there is garbage among them."""
    for topic, (samples, probe) in zip(jobs.TOPICS, jobs.tasks(60_000, None), strict=True):
        if not garbage:
            producer.publish(sink, topic, samples, producer.PublishOptions(), probe=probe)
            continue
        for start in range(0, len(samples), 1000):
            part = samples.select(np.arange(start, min(start + 1000, len(samples))))
            how = producer.PublishOptions(codec="msgpack", markers=start + 1000 >= len(samples))
            for number in range(10) if start else ():  # the topic is made by what comes first
                value = os.urandom(50) if number % 2 else b'{"x": [1, 2, 3], "y": 0}'
                sink.append(topic, 0, value, headers=((CONTENT_TYPE, b"application/json"),))
            producer.publish(sink, topic, part, how, probe=probe if start == 0 else None)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """Give a broker of this module's own, which may be killed."""
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as started:
        sink = KafkaWriter(KafkaConfig.model_validate({"bootstrap_servers": started.address}))
        publish(sink)
        sink.close()
        yield started


@pytest.fixture(scope="module")
def undisturbed(broker: KafkaBroker, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Give the last checkpoint of the default job, never disturbed, after every figure was found to agree."""
    directory = tmp_path_factory.mktemp("undisturbed")
    config = jobs.kafka_config(directory, broker.address, "", **merged(ALL, {"stream": {"on_finished": "wait"}}))
    with jobs.Daemon(config) as daemon:
        daemon.until(lambda status: [t["state"] for t in status.get("tasks", [])] == ["ended"] * 5, SECONDS)
        check_agreement(daemon, directory, None)
        assert daemon.stop() == 0
    return Store(daemon.state).all()[0]


def test_the_default_remembers(undisturbed: Checkpoint) -> None:
    """Class-incremental, every sample seen once: at least 0.955 (0.96 is usual), and every sample accounted for."""
    status = undisturbed.read_json("status.json")
    print(status["average_accuracy"], status["average_forgetting"])
    assert status["average_accuracy"] >= 0.955
    assert status["samples"]["trained"] == 60_000
    assert jobs.all_accounted_for(status)


def test_naive_forgets(broker: KafkaBroker, tmp_path: Path) -> None:
    """Without a strategy only the last two digits are known."""
    config = jobs.kafka_config(tmp_path / "naive", broker.address, "", **{**ALL, "strategy": "naive"})
    assert 0.18 < jobs.run_to_end(config, SECONDS).read_json("status.json")["average_accuracy"] < 0.22


def test_five_kills_over_kafka_and_one_of_the_broker(
    broker: KafkaBroker, undisturbed: Checkpoint, tmp_path: Path
) -> None:
    """`kill -9` five times at random, and of the broker once: the final tensors are bit-equal."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    config = jobs.kafka_config(tmp_path / "killed", broker.address, "", **ALL)
    run_with_kills(config, 5, chance, 50)
    with jobs.Daemon(config) as daemon:
        time.sleep(chance.uniform(5, 20))
        broker.kill()
        time.sleep(chance.uniform(1, 10))
        broker.start()
        assert daemon.finish(SECONDS) == 0, daemon.tail()
    actual = Store(daemon.state).all()[0]
    assert jobs.differences(undisturbed, actual) == []
    assert jobs.all_accounted_for(actual.read_json("status.json"))


def test_five_kills_over_embedded_topics(undisturbed: Checkpoint, tmp_path: Path) -> None:
    """Embedded topics with the same records, killed five times, end with the very tensors of the Kafka run."""
    print(f"seed {SEED}")
    config = jobs.write_config(tmp_path, **ALL)
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    publish(sink)
    sink.close()
    run_with_kills(config, 5, random.Random(SEED), 50)
    actual = jobs.run_to_end(config, SECONDS)
    assert jobs.differences(undisturbed, actual) == []
    assert jobs.all_accounted_for(actual.read_json("status.json"))


def test_one_percent_of_garbage(undisturbed: Checkpoint, tmp_path: Path) -> None:
    """Garbage among single-sample records all ends in the dead-letter topic; the tensors are those without it."""
    config = jobs.write_config(tmp_path, **ALL)
    sink = EmbeddedWriter(tmp_path / "topics.sqlite")
    publish(sink, garbage=True)
    sink.close()
    actual = jobs.run_to_end(config, SECONDS)
    a, b = jobs.tensors(undisturbed), jobs.tensors(actual)
    assert [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()] == []
    status = actual.read_json("status.json")
    assert 400 < status["samples"]["rejected"] < 700
    assert jobs.all_accounted_for(status)
    topics = cli("topics", "--embedded", tmp_path / "topics.sqlite", "--json")
    assert f'"end": {status["samples"]["rejected"]}' in topics.stdout

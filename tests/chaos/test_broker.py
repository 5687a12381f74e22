"""Brokers and networks fail while records arrive and are learned: each record is learned exactly once."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.kafka_broker import KafkaBroker
from streamlearn.checkpoint.store import Store
from streamlearn.core.errors import StreamlearnError
from streamlearn.stream.codecs.registry import CODECS
from streamlearn.stream.logs.base import CONTENT_TYPE, CONTROL_HEADER, TASK_END
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from tests.support import jobs, models
from tests.support.chaos.case import FULL, Case
from tests.support.kafka_cluster import Cluster, ProxiedBroker
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kafka

CAPACITY = 200_000  # number of distinct samples
PER_RECORD = 4
CHUNK, PAUSE = 48, 0.2  # samples, and seconds between chunks: about as fast as the daemon learns
UPDATE_SECONDS = 0.03
SECONDS = 300


class Publisher:
    """Publishes numbered samples, each acknowledged by every replica, until `finish` is called."""

    def __init__(self, address: str, partitions: int, copies: int) -> None:
        kafka = {"bootstrap_servers": address.split(","), "replication_factor": copies}
        self.sink = KafkaWriter(KafkaConfig.model_validate(kafka))
        self.partitions = partitions
        self.acknowledged = 0
        self._finish = threading.Event()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self.sink.create_topic("t1", partitions)
        self._thread.start()

    def finish(self) -> int:
        """Write the marker that ends the task, and return how many samples were published."""
        self._finish.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the publisher is stuck"
        for partition in range(self.partitions):
            self.sink.append("t1", partition, TASK_END, headers=((CONTROL_HEADER, TASK_END),))
        self._flush()
        self.sink.close()
        return self.acknowledged

    def _run(self) -> None:
        while not self._finish.wait(PAUSE):
            samples = models.numbered(self.acknowledged, CHUNK)
            for number, start in enumerate(range(0, CHUNK, PER_RECORD)):
                part = slice(start, start + PER_RECORD)
                value = CODECS["batch"].encode(samples.x[part], samples.y[part])
                self.sink.append(
                    "t1", number % self.partitions, value, headers=((CONTENT_TYPE, CODECS["batch"].content_type),)
                )
            self._flush()
            self.acknowledged += CHUNK

    def _flush(self) -> None:
        while True:
            try:
                self.sink.flush()
            except StreamlearnError:
                time.sleep(0.2)
            else:
                return


def configured(directory: Path, address: str, seconds: float, merge: str) -> Path:
    """Write the configuration of a daemon that reads topic t1 at this address with a counting model."""
    over: dict[str, Any] = {
        "kafka": {"bootstrap_servers": address, "metadata_refresh_seconds": 1, "group_id": directory.name},
        "stream": {"merge": merge, "dead_letter": {"topic": f"{directory.name}.dlq"}},
        "checkpoint": {"every_batches": 20},
    }
    return jobs.write_tree(directory, models.settings(directory, CAPACITY, seconds, **over))


def run_with_faults(
    case: Case,
    directory: Path,
    address: str,
    inject_fault: Callable[[], None],
    faults: int,
    *,
    partitions: int = 1,
    merge: str = "arrival",
    copies: int = 1,
    source: str | None = None,
) -> tuple[int, int]:
    """Publish and learn while faults are injected; return how many samples were lost and learned twice.

    The daemon reaches the broker at `address`, the publisher at `source` (default: the same). Afterwards an undisturbed
    daemon learns the same log: its result is the expected one. If the order is fixed, both must be bit-equal.
    """
    publisher = Publisher(source or address, partitions, copies)
    unlearned = 0
    with jobs.Daemon(configured(directory / "disturbed", address, UPDATE_SECONDS, merge)) as daemon:
        for _ in range(faults):
            wait_for_progress(daemon)
            time.sleep(case.rng.uniform(0, 1.5))
            acknowledged = publisher.acknowledged
            unlearned += trained_samples(daemon) < acknowledged
            inject_fault()
        published = publisher.finish()
        assert published <= CAPACITY
        assert daemon.finish(SECONDS) == 0, daemon.tail()
        assert "Traceback" not in daemon.log.read_text()  # an outage is one line
    actual = Store(daemon.state).all()[0]
    expected = jobs.run_to_end(configured(directory / "undisturbed", source or address, 0.0, merge), SECONDS)
    assert jobs.all_accounted_for(actual.read_json("status.json"))
    if partitions == 1 or merge == "fixed":
        assert jobs.differences(expected, actual) == [], f"seed {case.seed}"
    case.assert_happened("faults while published samples waited to be learned", unlearned, max(1, faults // 2))
    a, b = (jobs.tensors(checkpoint)["model.safetensors:learned"] for checkpoint in (expected, actual))
    assert int((a == 0).sum()) == CAPACITY - published, "the log holds what was published"
    return int((a - b).clamp(min=0).sum()), int((b - a).clamp(min=0).sum())


def wait_for_progress(daemon: jobs.Daemon) -> None:
    """Wait until the daemon has learned more samples than now."""
    before = trained_samples(daemon)
    daemon.until(lambda status: bool(status["samples"]["trained"] > before), SECONDS)


def trained_samples(daemon: jobs.Daemon) -> int:
    """Return how many samples the daemon has learned."""
    status = daemon.until(lambda status: "samples" in status)
    return int(status["samples"]["trained"])


@pytest.mark.parametrize(
    ("kills", "partitions", "merge"),
    [
        pytest.param(30, 1, "arrival", id="one partition", marks=FULL),
        pytest.param(10, 3, "arrival", id="three partitions", marks=FULL),
        pytest.param(10, 3, "fixed", id="three partitions in order", marks=FULL),
    ],
)
def test_broker_killed(case: Case, tmp_path: Path, kills: int, partitions: int, merge: str) -> None:
    """A broker that is killed and restarted at any moment causes no loss and no repetition."""
    with KafkaBroker(tmp_path / "kafka") as broker:

        def inject_fault() -> None:
            broker.kill()
            time.sleep(case.rng.choice([0.0, case.rng.uniform(0, 3)]))
            broker.start()

        lost, twice = run_with_faults(
            case, tmp_path, broker.address, inject_fault, kills, partitions=partitions, merge=merge
        )
    outages = (tmp_path / "disturbed" / "job.log").read_text().count("waiting for it")
    case.assert_happened("outages that the daemon logged", outages, max(1, kills // 3))
    case.record("`kill -9` and restart of the Kafka broker", kills, lost=lost, twice=twice)


@pytest.mark.parametrize("kills", [pytest.param(6, id="leader", marks=FULL)])
def test_leader_killed(case: Case, tmp_path: Path, kills: int) -> None:
    """When the leader of a cluster of three is killed, another node takes over; no acknowledged sample is lost or repeated."""
    moved = 0
    with Cluster(tmp_path / "kafka") as cluster:

        def inject_fault() -> None:
            nonlocal moved
            leader = cluster.leader("t1")
            leader.kill()
            deadline = time.monotonic() + 60
            while (now := other_leader(cluster, leader.number)) is None:
                assert time.monotonic() < deadline, "no node took over"
                time.sleep(0.2)
            moved += now != leader.number
            time.sleep(case.rng.uniform(0, 2))
            leader.start()
            time.sleep(3)  # in sync again, before the next is killed

        lost, twice = run_with_faults(case, tmp_path, cluster.address, inject_fault, kills, copies=3)
    case.assert_happened("another node became the leader", moved, kills)
    case.record("`kill -9` of the leader in a cluster of three", kills, lost=lost, twice=twice)


def other_leader(cluster: Cluster, number: int) -> int | None:
    """Return the number of the leader if it is not this node, else None."""
    try:
        found = cluster.leader("t1").number
    except Exception:  # noqa: BLE001 - during an election a cluster answers with many kinds of errors
        return None
    return found if found != number else None


@pytest.mark.parametrize(
    ("how", "faults"),
    [
        pytest.param("cut", 8, id="cut", marks=FULL),
        pytest.param("delayed", 8, id="delayed", marks=FULL),
        pytest.param("black-holed", 4, id="black-holed", marks=FULL),
    ],
)
def test_network(case: Case, tmp_path: Path, how: str, faults: int) -> None:
    """A network that resets connections, delays or drops data costs only time."""
    with Proxy(0) as proxy, ProxiedBroker(tmp_path / "kafka", proxy.port) as broker:
        proxy.target = broker.behind

        def inject_fault() -> None:
            if how == "cut":
                proxy.cut()
            elif how == "delayed":
                proxy.delay(case.rng.uniform(0.2, 3))
            else:
                proxy.drop()
            time.sleep(case.rng.uniform(1, 20 if how == "black-holed" else 6))
            proxy.heal()

        behind = f"127.0.0.1:{proxy.port}"
        lost, twice = run_with_faults(case, tmp_path, behind, inject_fault, faults, source=broker.address)
        case.assert_happened("connections and chunks disturbed", proxy.disturbed, faults)
    case.record(f"the network to the broker {how}", faults, lost=lost, twice=twice)

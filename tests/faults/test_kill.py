"""`kill -9` at any point changes nothing: the final state is bit-equal to that of an undisturbed run."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.kafka_broker import KafkaBroker
from streamlearn.checkpoint.store import Store
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from tests.support import jobs
from tests.support.kills import STRATEGIES, run_with_kills

if TYPE_CHECKING:
    from pathlib import Path

SEED = random.randrange(10_000)


@pytest.mark.parametrize("strategy", STRATEGIES, ids="+".join)
def test_killed_embedded_run_ends_bit_equal(tmp_path: Path, strategy: dict[str, object]) -> None:
    """After three kills every tensor, the matrix and the totals equal those of an undisturbed run."""
    print(f"seed {SEED}")
    scenario = "task" if {"pnn", "packnet"} & set(strategy) else "class"
    undisturbed = jobs.write_config(tmp_path / "a", strategy=strategy, scenario=scenario)
    killed = jobs.write_config(tmp_path / "b", strategy=strategy, scenario=scenario)
    for directory in ("a", "b"):
        jobs.publish_embedded(tmp_path / directory / "topics.sqlite", 1000)
    expected = jobs.run_to_end(undisturbed)
    run_with_kills(killed, 3, random.Random(SEED), 1.0)
    actual = jobs.run_to_end(killed)
    assert jobs.differences(expected, actual) == []
    assert jobs.all_accounted_for(actual.read_json("status.json"))
    assert actual.read_json("status.json")["samples"]["trained"] == 5 * 1000


def test_killed_run_of_merged_partitions_ends_bit_equal(tmp_path: Path) -> None:
    """With `merge: fixed` the records of three partitions are learned in the same order after kills."""
    print(f"seed {SEED}")
    configs = [jobs.write_config(tmp_path / name, stream={"merge": "fixed"}) for name in ("a", "b")]
    for config in configs:
        jobs.publish_embedded(config.parent / "topics.sqlite", 1000, partitions=3)
    expected = jobs.run_to_end(configs[0])
    run_with_kills(configs[1], 3, random.Random(SEED), 1.0)
    actual = jobs.run_to_end(configs[1])
    assert jobs.differences(expected, actual) == []
    assert actual.read_json("status.json")["samples"]["trained"] == 5 * 1000


@pytest.mark.kafka
def test_killed_kafka_run_ends_bit_equal(tmp_path: Path) -> None:
    """After three kills of the daemon and one of the broker every tensor equals that of an undisturbed run."""
    print(f"seed {SEED}")
    with KafkaBroker(tmp_path / "kafka") as broker:
        sink = KafkaWriter(KafkaConfig.model_validate({"bootstrap_servers": broker.address}))
        jobs.publish(sink, 1000)
        sink.close()
        expected = jobs.run_to_end(jobs.kafka_config(tmp_path / "a", broker.address, ""))
        killed = jobs.kafka_config(tmp_path / "b", broker.address, "")
        chance = random.Random(SEED)
        run_with_kills(killed, 3, chance, 1.0)
        with jobs.Daemon(killed) as daemon:
            time.sleep(chance.uniform(1, 6))  # while it starts, restores or learns
            broker.kill()
            time.sleep(1)
            broker.start()
            assert daemon.finish() == 0, daemon.tail()
            assert "Traceback" not in daemon.log.read_text()  # an outage is one line
        actual = Store(daemon.state).all()[0]
    assert jobs.differences(expected, actual) == []
    assert jobs.all_accounted_for(actual.read_json("status.json"))

"""Fixtures: one Apache Kafka for the session, started only if a test needs it, and logs of every kind."""

from __future__ import annotations

import os
import random
import signal
import uuid
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.kafka_broker import KafkaBroker
from streamlearn.learning.tensors import configure_torch
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka import KafkaReader
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore
from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter
from tests.support.streams import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# a background job of a shell, or a program under `nohup`, ignores these, and the tests' processes would inherit that
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make chaos`."""
    parser.addoption(
        "--chaos-seed", type=int, default=random.randrange(10_000), help="seed of the chaos tests, to repeat a run"
    )
    parser.addoption("--again", action="store_true", help="also run finished chaos cases")


def pytest_report_header(config: pytest.Config) -> str:
    """Print the seed of the chaos tests."""
    return f"--chaos-seed {config.getoption('--chaos-seed')}"


@pytest.fixture(autouse=True)
def plain_floats() -> Iterator[None]:
    """Reset the floating-point mode after each test: hypothesis does not work with flushed denormals."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def daemon_mode() -> None:
    """Compute as the daemon does: with one thread and flushed denormals."""
    configure_torch(1)


@pytest.fixture(scope="session")
def bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a broker that all tests share; each test uses its own topic names."""
    if address := os.environ.get("STREAMLEARN_TEST_KAFKA"):
        yield address
        return
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker.address


@pytest.fixture
def kafka(bootstrap: str) -> KafkaConfig:
    """Return the configuration section for the shared broker."""
    return KafkaConfig.model_validate({"bootstrap_servers": bootstrap, "metadata_refresh_seconds": 1})


@pytest.fixture(params=["memory", "embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Return a test log: each of the three kinds in turn."""
    prefix = f"x{uuid.uuid4().hex[:8]}"
    if request.param == "memory":
        store = MemoryStore()
        made = World(lambda: MemoryReader(store, 3), store, prefix)
    elif request.param == "embedded":
        path = tmp_path / "topics.sqlite"
        made = World(lambda: EmbeddedReader(path), EmbeddedWriter(path), prefix)
    else:
        kafka: KafkaConfig = request.getfixturevalue("kafka")
        made = World(lambda: KafkaReader(kafka, f"g-{prefix}"), KafkaWriter(kafka), prefix)
    yield made
    for stream in made.streams:
        stream.stop()
    made.sink.close()

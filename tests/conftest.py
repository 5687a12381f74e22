"""Fixtures: one Apache Kafka for the session, started only if a test needs it."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

import pytest
import torch

from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.tensors import configure_torch
from tests.support.kafka_broker import KafkaBroker

if TYPE_CHECKING:
    from collections.abc import Iterator


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

"""Measure how fast samples are read: Kafka and embedded topics against the log in memory, with one step a batch."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.kafka_broker import KafkaBroker
from streamlearn.checkpoint.store import Store
from streamlearn.config import loader
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.learning.tensors import configure_torch
from streamlearn.metrics import Metrics
from streamlearn.runtime import loop
from streamlearn.runtime.job import Job
from streamlearn.runtime.stream import make_stream_reader
from streamlearn.stream.logs.config import KafkaConfig
from streamlearn.stream.logs.kafka import KafkaReader
from streamlearn.stream.logs.kafka_writer import KafkaWriter
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore
from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter
from streamlearn.tools import producer

if TYPE_CHECKING:
    from streamlearn.config.root import Config
    from streamlearn.stream.logs.base import LogReader, LogWriter
    from streamlearn.stream.reader import StreamReader

SAMPLES, SINGLE, PIXELS = 100_000, 20_000, 784
TARGET = 0.8


class NoCommands:
    """A control for the loop that gives no commands."""

    stopping = False
    paused = False

    def serve(self, job: Job, stream: StreamReader, *, idle: bool) -> None:
        """Do nothing: there are no commands."""

    def wait(self, seconds: float) -> None:
        """Return at once."""


def settings(directory: Path, topic: str) -> Config:
    """Return a configuration with one optimizer step a batch."""
    tree = {
        "state_dir": str(directory / "state"),
        "device": "cpu",
        "input": {"shape": [PIXELS], "dtype": "uint8", "scale": 255},
        "classes": 10,
        "holdout": {"fraction": 0},
        "stream": {"topics": [topic], "on_finished": "exit", "batch_size": 128},
        "learner": {"updates_per_batch": 1, "average": None},
        "strategy": "naive",
        "checkpoint": {"every_seconds": None},
    }
    path = directory / "job.yaml"
    path.write_text(loader.dump(tree))
    return loader.load(path, RECIPES, {})


def rate(log: LogReader, sink: LogWriter, config: Config, samples: int) -> float:
    """Return the samples a second that the whole loop learns."""
    job = Job.make(config, Store(config.state_dir), Metrics())
    stream = make_stream_reader(job, log, sink)
    begun = time.perf_counter()
    stream.start()
    loop.run(job, stream, NoCommands())
    seconds = time.perf_counter() - begun
    stream.stop()
    assert job.progress.totals()["trained"] == samples
    return samples / seconds


def measure(log: LogReader, sink: LogWriter, topic: str, samples: int, codec: str) -> float:
    """Publish samples to a topic, and return the samples a second at which they are learned."""
    rng = np.random.default_rng(0)
    content = producer.Samples(rng.integers(0, 255, (samples, PIXELS), np.uint8), rng.integers(0, 10, samples).tolist())
    producer.publish(sink, topic, content, producer.PublishOptions(codec=codec))
    with tempfile.TemporaryDirectory() as name:
        return rate(log, sink, settings(Path(name), topic), samples)


def run() -> dict[str, Any]:
    """Measure every log; print and return samples a second, and the ratio to the log in memory."""
    configure_torch(1)
    store = MemoryStore()
    rates: dict[str, float] = {"memory, batched": measure(MemoryReader(store), store, "m", SAMPLES, "batch")}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with KafkaBroker(directory / "kafka") as broker:
            kafka = KafkaConfig.model_validate({"bootstrap_servers": broker.address})
            sink = KafkaWriter(kafka)
            rates["kafka, batched"] = measure(KafkaReader(kafka, "bench"), sink, "k", SAMPLES, "batch")
            rates["kafka, single (msgpack)"] = measure(KafkaReader(kafka, "bench"), sink, "k1", SINGLE, "msgpack")
            rates["kafka, single (json)"] = measure(KafkaReader(kafka, "bench"), sink, "k2", SINGLE, "json")
            sink.close()
        path = directory / "topics.sqlite"
        embedded = EmbeddedWriter(path)
        rates["embedded, batched"] = measure(EmbeddedReader(path), embedded, "e", SAMPLES, "batch")
        rates["embedded, single (msgpack)"] = measure(EmbeddedReader(path), embedded, "e1", SINGLE, "msgpack")
        embedded.close()
    results: dict[str, Any] = {}
    for source, value in rates.items():
        ratio = value / rates["memory, batched"]
        print(f"{source:<28}{value:>12,.0f} samples/s{ratio:>8.2f} of memory", flush=True)
        results[source] = {"value": round(ratio, 3), "samples_per_second": round(value)}
    results["kafka, batched"] |= {"target": f">= {TARGET}", "met": results["kafka, batched"]["value"] >= TARGET}
    return results

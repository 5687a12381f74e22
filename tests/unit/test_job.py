"""What a job's status says of the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamlearn.checkpoint import Store
from streamlearn.cli.lifecycle import figures
from streamlearn.config import Config
from streamlearn.data import Position, Positions
from streamlearn.job import Job
from streamlearn.metrics import Metrics
from streamlearn.strategies.recipes import RECIPES
from streamlearn.stream.assembler import Assembler, Rules
from streamlearn.stream.codec import Codec
from streamlearn.stream.deadletter import DeadLetters
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.memory import MemoryLog, MemoryStore
from streamlearn.stream.reader import Stream

if TYPE_CHECKING:
    from pathlib import Path


def test_lag_is_unknown_while_no_broker_tells(tmp_path: Path) -> None:
    """Unknown is not 0: null in the tree and a dash for people, until the reader is connected."""
    tree = {"input": {"shape": [1]}, "classes": 2, "stream": {"topics": ["a"]}, "strategy": "naive", "device": "cpu"}
    config = Config.model_validate(tree, context={"recipes": RECIPES})
    job = Job.make(config, Store(tmp_path), Metrics())
    job.progress.positions = Positions({("a", 0): Position(3)})
    store = MemoryStore()
    letters = DeadLetters(store, "dlq")
    rules = Rules(Codec([1], "float32", "json", 1000), HoldOut("value", 0), job.scenario, letters, 10)
    stream = Stream(MemoryLog(store, 3), Assembler(rules, job.progress), config.stream, letters, "group")
    stream.status.waiting_for = "a"
    for away in (None, stream):
        status = job.status(away)
        assert status["lag"] is None
        assert "lag -" in figures(status)
    assert "lag -; waiting for topic a" in figures(status)
    stream.status.connected = True
    stream.status.ends = {("a", 0): 10}
    status = job.status(stream)
    assert status["lag"] == {"a": {"0": 7}}
    assert (status["waiting_for"], "lag 7 records; waiting for topic a" in figures(status)) == ("a", True)

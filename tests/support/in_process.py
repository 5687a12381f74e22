"""A job and its stream reader inside the test's process, without a daemon."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from streamlearn.checkpoint.store import Store
from streamlearn.config.root import Config
from streamlearn.core.positions import Position, Positions
from streamlearn.learning.strategies.recipes import RECIPES
from streamlearn.metrics import Metrics
from streamlearn.runtime.job import Job
from streamlearn.stream.assembler import Assembler, AssemblerSettings
from streamlearn.stream.deadletter import DeadLetterWriter
from streamlearn.stream.decoder import RecordDecoder
from streamlearn.stream.holdout import HoldOut
from streamlearn.stream.logs.memory import MemoryReader, MemoryStore
from streamlearn.stream.reader import StreamReader

if TYPE_CHECKING:
    from pathlib import Path

    from streamlearn.checkpoint.manifest import Checkpoint


def made(tmp_path: Path, **over: Any) -> tuple[Job, StreamReader]:
    """Return a job at offset 3 of its topic, and its stream reader, which is not started."""
    tree: dict[str, Any] = {
        "input": {"shape": [1]},
        "classes": 2,
        "stream": {"topics": ["a"]},
        "strategy": "naive",
        "device": "cpu",
    }
    tree |= {"state_dir": str(tmp_path), **over}
    config = Config.model_validate(tree, context={"recipes": RECIPES})
    job = Job.make(config, Store(tmp_path, keep=9), Metrics())
    job.progress.positions = Positions({("a", 0): Position(3)})
    store = MemoryStore()
    letters = DeadLetterWriter(store, "dlq")
    rules = AssemblerSettings(
        RecordDecoder([1], "float32", "json", 1000), HoldOut("value", 0), job.scenario, letters, 10
    )
    return job, StreamReader(MemoryReader(store, 3), Assembler(rules, job.progress), config.stream, letters, "group")


class BlockedStore:
    """Replaces `store.save` by one that waits until `open` is set, like a slow disk."""

    def __init__(self, job: Job) -> None:
        self.save, self.open, self.begun = job.store.save, threading.Event(), threading.Event()
        job.store.save = self  # type: ignore[method-assign]

    def __call__(self, *arguments: Any, **more: Any) -> Checkpoint:
        self.begun.set()
        assert self.open.wait(60)
        return self.save(*arguments, **more)

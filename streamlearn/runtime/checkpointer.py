"""The checkpointer: a queue of at most two saves, and the thread that writes them."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamlearn.control.statedir import LockLost
from streamlearn.core.errors import StreamlearnError
from streamlearn.core.positions import Positions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from streamlearn.checkpoint.config import CheckpointConfig
    from streamlearn.checkpoint.manifest import Checkpoint
    from streamlearn.checkpoint.store import Store
    from streamlearn.checkpoint.writer import Content
    from streamlearn.core.states import SaveTrigger
    from streamlearn.runtime.recorder import MetricsRecorder
    from streamlearn.stream.reader import StreamReader

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
"""How often the loop reports that it is alive while it waits for a checkpoint."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that a checkpoint contains, taken between two batches."""

    files: Mapping[str, Content]
    info: Mapping[str, Any]  # for the manifest
    sizes: Mapping[str, int]  # bytes of the tensors in each file
    immutable: frozenset[str]  # files that never change: if the previous checkpoint has them, they are linked
    positions: Positions
    batches: int
    taken: float  # monotonic time


@dataclass
class PendingSave:
    """A checkpoint that the writer thread is writing, or that waits for the one before it."""

    trigger: SaveTrigger
    snapshot: Snapshot
    tags: list[str] = field(default_factory=list)
    written: Future[tuple[Checkpoint, int | None, float]] | None = None  # None while it waits
    finished: bool = False  # written, or failed
    checkpoint: Checkpoint | None = None  # set when it is finished and durable


class Checkpointer:
    """Writes snapshots as checkpoints.

    Learning never waits for the disk. One checkpoint is written at a time, and at most one waits. A newer snapshot replaces
    the waiting one, because it contains everything that the older one does; whoever asked for the older one gets the newer
    one.
    """

    def __init__(self, store: Store, config: CheckpointConfig, recorder: MetricsRecorder) -> None:
        self.store = store
        self.config = config
        self.recorder = recorder
        self.newest: Checkpoint | None = None  # the newest durable checkpoint
        self.saved_positions = Positions()  # its positions
        self.failed_at: float | None = None  # monotonic time of the last failure, None after a success
        self.current: PendingSave | None = None  # the save that is being written
        self.waiting: PendingSave | None = None  # the save that waits for it
        self._saved_at = time.monotonic()
        self._saved_batches = 0
        self._parent: str | None = None  # id of the newest checkpoint restored or written here; only the writer uses it
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def start_from(self, checkpoint: Checkpoint, positions: Positions, batches: int) -> None:
        """Take a checkpoint that was just restored as the newest one."""
        self._parent = checkpoint.id
        self._set_newest(checkpoint, positions, batches, time.monotonic())
        self.recorder.newest_checkpoint(checkpoint, self.store.count())

    def due(self, positions: Positions, batches: int) -> bool:
        """Return whether a checkpoint is due, by batches or by time. Saving changes no state, so the clock may decide."""
        if self.current is not None or positions == self.saved_positions or not positions.by_partition:
            return False
        now, every_seconds, every_batches = time.monotonic(), self.config.every_seconds, self.config.every_batches
        if self.failed_at is not None and now - self.failed_at < (every_seconds or 30.0):
            return False
        by_batches = every_batches is not None and batches - self._saved_batches >= every_batches
        return by_batches or (every_seconds is not None and now - self._saved_at >= every_seconds)

    def submit(
        self, stream: StreamReader, trigger: SaveTrigger, snapshot: Snapshot, tag: str | None = None
    ) -> PendingSave:
        """Let the writer thread write a snapshot; `finish` handles the result."""
        if self.current is None:
            self.current = PendingSave(trigger, snapshot)
        elif self.waiting is None:
            self.waiting = PendingSave(trigger, snapshot)
        else:
            self.waiting.trigger, self.waiting.snapshot = trigger, snapshot
        save = self.waiting or self.current
        if tag is not None:
            save.tags.append(tag)
        self._write_next(stream)
        return save

    def finish(self, stream: StreamReader, *, seconds: float = 0.0) -> None:
        """Record the result of the save that is being written, if it ends within `seconds`, and start the next one.

        A checkpoint that could not be written is logged and counted, and training continues. Any other error is raised, and
        so is `LockLost`.
        """
        save = self.current
        if save is None or save.written is None or not wait([save.written], seconds).done:
            return
        self.current, self.waiting = self.waiting, None
        save.finished = True
        try:
            checkpoint, num_kept, write_seconds = save.written.result()
        except LockLost:
            raise
        except StreamlearnError as error:
            logger.error("checkpoint failed: %s", error, extra={"trigger": save.trigger})  # noqa: TRY400 - one line is enough
            self.recorder.checkpoint_failed(save.trigger, error)
            self.failed_at = time.monotonic()
        else:
            snapshot = save.snapshot
            self.recorder.checkpoint_written(save.trigger, write_seconds)
            self._set_newest(checkpoint, snapshot.positions, snapshot.batches, snapshot.taken)
            self.recorder.newest_checkpoint(checkpoint, num_kept)
            save.checkpoint = checkpoint
            stream.commit_positions(snapshot.positions)
            extra = {"checkpoint": checkpoint.id, "trigger": save.trigger, "step": checkpoint.manifest["step"]}
            logger.info("saved %s", checkpoint.id, extra=extra)
        self._write_next(stream)

    def wait(self, stream: StreamReader, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Wait until no save is pending; calls `heartbeat` meanwhile, so that the liveness check passes."""
        while self.current is not None:
            heartbeat()
            self._write_next(stream)  # the loop may have ended before it started this one
            self.finish(stream, seconds=HEARTBEAT_SECONDS)

    @property
    def snapshot_positions(self) -> Positions:
        """The positions of the newest snapshot: waiting, being written, or durable."""
        newest = self.waiting or self.current
        return self.saved_positions if newest is None else newest.snapshot.positions

    def _set_newest(self, checkpoint: Checkpoint, positions: Positions, batches: int, taken: float) -> None:
        self.newest = checkpoint
        self.saved_positions, self._saved_batches, self._saved_at = positions, batches, taken
        self.failed_at = None

    def _write_next(self, stream: StreamReader) -> None:
        """Start to write the current save, unless that has started."""
        if (save := self.current) is not None and save.written is None:
            save.written = self._writer.submit(self._write, stream, save.snapshot, save.tags)

    def _write(
        self, stream: StreamReader, snapshot: Snapshot, tags: Sequence[str]
    ) -> tuple[Checkpoint, int | None, float]:
        """Write a snapshot, in the writer thread; return the checkpoint, the number of checkpoints, and the duration."""
        start = time.perf_counter()
        stream.flush_dead_letters()  # the dead letters before these positions must be durable first
        # the store links files of its newest checkpoint; that is not ours if another process wrote one
        newest = self.store.newest()
        ours = newest is not None and newest.id == self._parent
        linkable = snapshot.immutable & set(newest.manifest["files"] if newest is not None and ours else ())
        files = {name: None if name in linkable else content for name, content in snapshot.files.items()}
        num_bytes = sum(size for name, size in snapshot.sizes.items() if name not in linkable)
        checkpoint = self.store.save(files, snapshot.info, num_bytes, tags)
        self._parent = checkpoint.id
        return checkpoint, self.store.count(), time.perf_counter() - start

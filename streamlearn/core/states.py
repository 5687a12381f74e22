"""The states of the daemon, and what causes a checkpoint. Their values are in status, metrics and logs."""

from __future__ import annotations

from enum import StrEnum


class DaemonState(StrEnum):
    """What the daemon does. `ControlDesk` is the only owner: it sets the state, and everything else reads it."""

    STARTING = "starting"
    """The process binds its sockets and imports its libraries."""

    RESTORING = "restoring"
    """It builds the job and loads the newest checkpoint; also in a rollback."""

    RUNNING = "running"
    """It learns, or waits for records."""

    PAUSED = "paused"
    """A user has paused learning."""

    DRAINING = "draining"
    """A stop was requested, or the stream is finished: it writes the last checkpoint."""

    STOPPED = "stopped"
    """No process runs. Only the status in a checkpoint has this state."""


class SaveTrigger(StrEnum):
    """Why a checkpoint is written."""

    INTERVAL = "interval"
    """`checkpoint.every_batches` or `checkpoint.every_seconds` has passed."""

    TASK_END = "task_end"
    """The end offsets of a task are fixed, or the task has ended."""

    BURST = "burst"
    """A user has resumed reading after a burst of rejected samples."""

    MANUAL = "manual"
    """A user has asked for it."""

    SHUTDOWN = "shutdown"
    """The daemon stops."""

"""Decide which topic is the next task, and when a task is over."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamlearn.core.text import natural_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamlearn.core.tasks import Task
    from streamlearn.stream.config import StreamConfig
    from streamlearn.stream.log_watch import LogWatch

logger = logging.getLogger(__name__)

OPEN_TASK_SECONDS = 60.0  # without a record: then warn that only a marker can end the task


@dataclass(frozen=True, slots=True)
class NextTask:
    """The topic whose task begins now, or else the topic (or the pattern of topics) that is awaited.

    `finished` says that no further task will begin.
    """

    topic: str | None
    waiting_for: str | None
    finished: bool


class TopicSchedule:
    """Orders the topics of a log by section `stream` of the configuration. Only the reader thread uses it."""

    def __init__(self, config: StreamConfig, watch: LogWatch, dead_letter_topic: str) -> None:
        self.config = config
        self.watch = watch
        self.dead_letter_topic = dead_letter_topic
        self._logged_open: str | None = None  # the task of which it was logged that it stays open

    def topics_in_order(self, begun: Sequence[str]) -> list[str]:
        """Return the existing topics of tasks, in order; topics whose task has `begun` come first."""
        topics = self.watch.topics
        if self.config.topics is not None:
            return [name for name in self.config.topics if name in topics]
        found = [
            name for name in topics if self.config.reads(name) and name != self.dead_letter_topic and name not in begun
        ]
        if self.config.order == "first_record":
            stamps = {name: self.watch.log_reader.first_timestamp(topics[name]) for name in found}
            found.sort(key=lambda name: (stamps[name] or float("inf"), natural_key(name)))
        else:
            found.sort(key=natural_key)
        return [name for name in begun if name in topics] + found

    def find_next(self, names: Sequence[str], begun: Sequence[str]) -> NextTask:
        """Return the next task, which begins as soon as its topic has a record; `names` are the topics in order.

        Raises `AccessError` if we may not read its topic.
        """
        later = [name for name in names if name not in begun]
        if self.config.topics is not None:
            awaited = self.config.topics[len(begun)] if len(begun) < len(self.config.topics) else None
            later = [name for name in later if name == awaited]
            is_over = awaited is None
            if awaited is not None and awaited not in self.watch.topics:
                self.watch.require_permission(awaited)
        else:
            later = [name for name in later if self.watch.has_records(name)]
            awaited = self.config.pattern
            is_over = bool(begun) and not later
        topic = later[0] if later and self.watch.has_records(later[0]) else None
        if topic is not None:
            self.watch.require_permission(topic)
        return NextTask(topic, awaited, self.config.on_finished == "exit" and is_over)

    def warn_if_out_of_order(self, topic: str, begun: Sequence[str]) -> None:
        """Warn if the next task's topic sorts before the topic of the last task."""
        by_name = self.config.order == "name" and self.config.pattern
        if by_name and begun and natural_key(topic) < natural_key(begun[-1]):
            text = "topic %s sorts before %s, whose task has begun already; it is learned after it"
            logger.warning(text, topic, begun[-1])

    def is_passed(self, task: Task, names: Sequence[str], begun: Sequence[str]) -> bool:
        """Return whether a later topic has a record, so that the task must end (`task_end.next_topic`)."""
        if task.end_offsets is not None or not self.config.task_end.next_topic:
            return False
        return any(self.watch.has_records(name) for name in names if name not in begun)

    def is_idle(self, task: Task, silent_seconds: float) -> bool:
        """Return whether a task must end because all its records are read and none has arrived for `task_end.idle` seconds."""
        idle = self.config.task_end.idle
        if idle is None or task.counts["consumed"] == 0 or task.name not in self.watch.topics:
            return False
        partitions, bounds = self.watch.partitions([task.name]), self.watch.bounds
        position = self.watch.log_reader.position
        caught_up = bool(partitions) and all(p in bounds and position(p) >= bounds[p].end for p in partitions)
        return caught_up and silent_seconds >= idle

    def warn_if_open(self, task: Task, silent_seconds: float) -> None:
        """Warn once that a task without new records stays open, if no later topic can end it."""
        topics = self.config.topics
        if topics is None or task.name != topics[-1] or not self.config.task_end.next_topic:
            return
        if silent_seconds < OPEN_TASK_SECONDS or task.name == self._logged_open:
            return
        self._logged_open = task.name
        logger.warning(
            "task %s has had no record for %.0f s and stays open, because no topic is listed after it; to end it, write "
            "a marker, run `streamlearn task end`, or set stream.task_end.records or stream.task_end.idle",
            task.name,
            silent_seconds,
            extra={"task": task.name},
        )

"""Section `stream`: which topics are tasks, in which order, when a task ends, and how records are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from streamlearn import patterns
from streamlearn.core.section import Int32, NumBytes, Seconds, Section
from streamlearn.core.text import TOPIC_NAME
from streamlearn.stream.codecs.registry import CodecName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamlearn.core.section import Violations


def _check_topic(value: str) -> str:
    """Refuse a topic name that Kafka refuses."""
    if not TOPIC_NAME.fullmatch(value):
        why = "a topic name has 1 to 249 letters, digits, dots, hyphens and underscores, and is not . or .."
        raise PydanticCustomError("topic", why)
    return value


Topic = Annotated[str, AfterValidator(_check_topic)]


class QueueConfig(Section):
    """Limits on the samples that are read but not yet learned."""

    samples: Int32 = Field(
        20_000,
        ge=1,
        description="largest number of waiting samples; the reader then pauses until half of them are learned",
    )
    megabytes: float = Field(256.0, gt=0, description="largest size of the waiting samples, in megabytes (10^6 bytes)")


class TaskEndConfig(Section):
    """The rule that ends a task when no marker does: exactly one of these keys."""

    next_topic: bool = Field(
        default=False,
        description="end the task when a later topic has its first record: at the end that its own topic has then",
    )
    records: Int32 | None = Field(
        None, ge=1, description="number of samples after which the task ends; probe samples count too"
    )
    idle: Seconds | None = Field(
        None, description="seconds without a new record after which the task ends, once all records are read"
    )

    def rules(self) -> Iterator[Violations]:
        yield self._is_one()

    def _is_one(self) -> Violations:
        if (self.records is not None) + (self.idle is not None) + self.next_topic != 1:
            yield "", "exactly one of next_topic, records: N, idle: SECONDS is accepted"


class DeadLetterConfig(Section):
    """Where rejected samples are sent, and what happens if there are many of them."""

    topic: Topic | None = Field(None, description="topic to which rejected samples are sent; default: <name>.dlq")
    burst: Int32 | None = Field(
        1000,
        ge=1,
        description="number of consecutive rejected samples that is treated as a changed schema; null: no limit",
    )
    on_burst: Literal["stop", "continue", "exit"] = Field(
        "stop",
        description="stop: read nothing until `streamlearn resume` or a restart; continue: log it; exit: end with code 65",
    )


class StreamConfig(Section):
    """Which topics are tasks, in which order, and when a task ends."""

    source: Literal["kafka", "embedded"] | None = Field(
        None, description="where the topics are; default: kafka if there is a kafka section"
    )
    topics: list[Topic] | None = Field(
        None, min_length=1, description="topics that are the tasks, in the order in which they are learned"
    )
    pattern: str | None = Field(
        None, description="regular expression that matches the whole names of the topics that are tasks"
    )
    order: Literal["name", "first_record"] = Field(
        "name",
        description="pattern: sort topics by name (digits are compared as numbers) or by the time of their first record",
    )
    task_end: TaskEndConfig = TaskEndConfig(next_topic=True)
    on_finished: Literal["wait", "exit"] = Field(
        "wait", description="after the last task: wait for more records, or end the daemon with exit code 0"
    )
    codec: CodecName = Field("json", description="codec of records without a content-type header")
    batch_size: Int32 = Field(100, ge=1, description="number of samples in a batch")
    merge: Literal["arrival", "fixed"] = Field(
        "arrival",
        description="several partitions: learn records as they arrive, or in a repeatable order that waits for the slowest",
    )
    late: Literal["count", "dead_letter"] = Field(
        "count",
        description="a sample that arrives after its task's end: only count it, or also send it to the dead-letter topic",
    )
    linger: Seconds | None = Field(
        None, description="seconds after which a batch is learned although it is not full; null: never"
    )
    max_record_bytes: NumBytes = Field(
        16 << 20, description="largest size of a record's value, in bytes; a larger record is rejected as oversize"
    )
    on_offset_out_of_range: Literal["stop", "earliest", "latest", "exit"] = Field(
        "stop",
        description="if unread records are deleted: stop reading, continue at the earliest or latest record, or end the daemon",
    )
    startup_timeout: Seconds | None = Field(
        None, description="seconds to wait for a broker at the start; null: no limit"
    )
    queue: QueueConfig = QueueConfig()
    dead_letter: DeadLetterConfig = DeadLetterConfig()

    @field_validator("task_end", mode="before")
    @classmethod
    def _expand_word(cls, value: Any) -> Any:
        return {"next_topic": True} if value == "next_topic" else value

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None and (why := patterns.syntax_error(value)) is not None:
            raise PydanticCustomError("pattern", "not a regular expression: {why}", {"why": why})
        return value

    @property
    def endless_topic(self) -> str | None:
        """The only topic, if nothing but a marker ends its task; otherwise None."""
        return self.topics[0] if self.topics and len(self.topics) == 1 and self.task_end.next_topic else None

    def reads(self, topic: str) -> bool:
        """Return whether a topic is a task. A pattern never matches internal topics (`__*`) or dead letters (`*.dlq`)."""
        if self.topics is not None:
            return topic in self.topics
        return not topic.startswith("__") and not topic.endswith(".dlq") and patterns.matches(self.pattern or "", topic)

    def rules(self) -> Iterator[Violations]:
        yield self._topics_or_pattern()
        yield self._topics_differ()

    def _topics_or_pattern(self) -> Violations:
        if (self.topics is None) == (self.pattern is None):
            yield "", "exactly one of topics (a list) and pattern (a regular expression) is needed"

    def _topics_differ(self) -> Violations:
        if self.topics is not None and len(set(self.topics)) != len(self.topics):
            yield "topics", "a topic is listed twice"

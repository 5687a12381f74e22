"""Apache Kafka as a log, with manual assignment of partitions and positions from the checkpoint.

`poll` of kafka-python 3.0 returns no records, and raises nothing, if a topic was deleted, or deleted and created again, if
a permission was withdrawn, or if all brokers are gone. Therefore `topics` and `bounds` ask the brokers, and raise. (The
consumer can also stop without an error, as in dpkp/kafka-python#2605; `StreamReader` notices that and connects again.)
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kafka import KafkaAdminClient, KafkaConsumer
from kafka import errors as kafka_errors
from kafka.protocol.consumer import IsolationLevel, ListOffsetsRequest, OffsetSpec
from kafka.structs import OffsetAndMetadata, TopicPartition

from streamlearn.stream.logs.base import Bounds, BrokerUnavailable, Record, TopicInfo
from streamlearn.stream.logs.kafka_connection import client_settings, create_client
from streamlearn.stream.logs.kafka_failures import is_allowed, permission_error, translate_error
from streamlearn.stream.logs.kafka_python import OversizeValue, set_unpack_limit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from streamlearn.core.positions import Partition
    from streamlearn.stream.logs.config import KafkaConfig

MAX_POLL_RECORDS = 2000


class KafkaReader:
    """Reads from Kafka. The consumer of kafka-python is not thread safe, so the reader thread alone uses this class."""

    def __init__(self, kafka: KafkaConfig, group: str, max_record_bytes: int = 0) -> None:
        self.kafka = kafka
        self.group = group
        self.cluster_id: str | None = None
        self._consumer: Any = None
        self._admin: Any = None
        self._assigned_topics: set[str] = set()
        self._no_read_permission: set[str] = set()  # topics
        self._paused: set[Partition] = set()
        set_unpack_limit(max_record_bytes)

    def connect(self) -> None:
        settings = client_settings(self.kafka)
        self.close()
        self._admin = create_client(KafkaAdminClient, settings)
        self._consumer = create_client(
            KafkaConsumer,
            settings
            | {
                "group_id": self.group,
                "enable_auto_commit": False,
                "auto_offset_reset": "none",
                "isolation_level": self.kafka.isolation_level,
                "max_poll_records": MAX_POLL_RECORDS,
                "fetch_max_wait_ms": 250,
                "fetch_max_bytes": 16 << 20,
                "max_partition_fetch_bytes": 4 << 20,
                "metadata_max_age_ms": int(self.kafka.metadata_refresh_seconds * 1000),
            },
        )
        self.cluster_id = self._ask(self._admin.describe_cluster).get("cluster_id")

    def topics(self) -> dict[str, TopicInfo]:
        """Return all topics that we may see, and the assigned topics, even if we may not see them any more."""
        listed = self._ask(self._admin.list_topics)
        return self._describe(sorted({*listed, *self._assigned_topics}))

    def describe(self, topic: str) -> TopicInfo | None:
        return self._describe([topic]).get(topic)

    def _describe(self, names: Sequence[str]) -> dict[str, TopicInfo]:
        found = {}
        for entry in self._metadata(names):
            name = entry["name"]
            if entry.get("error_code") == kafka_errors.TopicAuthorizationFailedError.errno:
                found[name] = TopicInfo(name, None, (), "no permission to see it (DESCRIBE)")
            elif not entry.get("error_code"):
                if entry.get("authorized_operations") is not None:
                    (self._no_read_permission.discard if is_allowed(entry, "READ") else self._no_read_permission.add)(
                        name
                    )
                partitions = sorted(p["partition_index"] for p in entry["partitions"])
                refused = "no permission to read it (READ)" if name in self._no_read_permission else None
                found[name] = TopicInfo(name, str(entry["topic_id"]), tuple(partitions), refused)
        return found

    def _metadata(self, names: Iterable[str]) -> list[dict[str, Any]]:
        asked = list(names)
        entries: list[dict[str, Any]] = self._ask(self._admin.describe_topics, asked) if asked else []
        return entries

    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, Bounds]:
        """Return the bounds of each partition; raises `AccessError` if we may not see one of them.

        The end is the high watermark, because acknowledged records can follow a transaction that is still open.
        """
        leaders = self._leaders(partitions)
        begins = self._offsets(leaders, OffsetSpec.EARLIEST)
        ends = self._offsets({partition: leaders[partition] for partition in begins}, OffsetSpec.LATEST)
        last_stable: dict[Partition, int] = {}
        if self.kafka.isolation_level == "read_committed":
            # asked last: an older answer could be below the end although no transaction is open
            asked = {partition: leaders[partition] for partition in ends}
            stable = self._offsets(asked, OffsetSpec.LATEST, IsolationLevel.READ_COMMITTED)
            last_stable = {partition: offset for partition, offset in stable.items() if offset < ends[partition]}
        return {
            partition: Bounds(begins[partition], end, last_stable.get(partition)) for partition, end in ends.items()
        }

    def _leaders(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Return the leader of each partition that has one now."""
        wanted = set(partitions)
        return {
            topic_partition: partition["leader_id"]
            for entry in self._metadata({topic for topic, _ in partitions})
            for partition in entry["partitions"]
            if (topic_partition := (entry["name"], partition["partition_index"])) in wanted
            and partition["leader_id"] >= 0
        }

    def _offsets(
        self,
        leaders: Mapping[Partition, int],
        spec: OffsetSpec,
        isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
    ) -> dict[Partition, int]:
        """Ask the leaders for offsets, and return them; partitions are missing if their leader does not answer."""
        asked: dict[int, dict[str, list[int]]] = {}
        for (topic, partition), leader in leaders.items():
            asked.setdefault(leader, {}).setdefault(topic, []).append(partition)
        found: dict[Partition, int] = {}
        for leader, topics in asked.items():
            with contextlib.suppress(BrokerUnavailable):
                found |= self._ask(self._admin._manager.run, self._list_offsets, leader, topics, spec, isolation)  # noqa: SLF001
        return found

    async def _list_offsets(
        self, leader: int, topics: Mapping[str, Sequence[int]], spec: OffsetSpec, isolation: IsolationLevel
    ) -> dict[Partition, int]:
        """Ask one leader for offsets.

        The methods of kafka-python always ask with the isolation level of the consumer, or fail for all partitions if one
        fails.
        """
        kind = ListOffsetsRequest.ListOffsetsTopic
        request = ListOffsetsRequest(
            isolation_level=isolation,
            topics=[
                kind(
                    name=name,
                    partitions=[kind.ListOffsetsPartition(partition_index=p, timestamp=spec) for p in indices],
                )
                for name, indices in topics.items()
            ],
            min_version=ListOffsetsRequest.min_version_for_isolation_level(isolation),
        )
        response = await self._admin._manager.send(request, node_id=leader)  # noqa: SLF001 - no public method does this
        found: dict[Partition, int] = {}
        for topic in response.topics:
            for partition in topic.partitions:
                if partition.error_code == kafka_errors.TopicAuthorizationFailedError.errno:
                    raise kafka_errors.TopicAuthorizationFailedError({topic.name})
                if not partition.error_code:
                    found[topic.name, partition.partition_index] = partition.offset
        return found

    def assign(self, offsets: Mapping[Partition, int]) -> None:
        self._assigned_topics = {topic for topic, _ in offsets}
        self._consumer.assign([TopicPartition(*partition) for partition in offsets])
        for partition, offset in offsets.items():
            self._consumer.seek(TopicPartition(*partition), offset)
        self.pause_partitions(self._paused)

    def poll(self, timeout: float) -> list[Record]:
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout * 1000))
        except kafka_errors.TopicAuthorizationFailedError as error:
            self._no_read_permission |= set(error.args[0])  # `topics` and `describe` use it
            raise permission_error(error) from error
        except kafka_errors.KafkaError as error:
            raise translate_error(error) from error
        return [_record(r) for records in polled.values() for r in records]

    def position(self, partition: Partition) -> int:
        return int(self._ask(self._consumer.position, TopicPartition(*partition), 0))

    def pause_partitions(self, partitions: Collection[Partition]) -> None:
        self._paused = set(partitions)
        assigned = self._consumer.assignment()
        to_pause = {TopicPartition(*partition) for partition in partitions} & assigned
        paused = self._consumer.paused()
        self._consumer.resume(*(paused - to_pause))
        self._consumer.pause(*(to_pause - paused))

    def first_timestamp(self, topic: TopicInfo) -> float | None:
        asked = {TopicPartition(topic.name, partition): 0 for partition in topic.partitions}
        found = self._ask(self._consumer.offsets_for_times, asked)
        return min((entry.timestamp / 1000 for entry in found.values() if entry is not None), default=None)

    def commit(self, group: str, offsets: Mapping[Partition, int]) -> None:
        del group  # the consumer has it from its settings
        self._consumer.commit_async({TopicPartition(*p): OffsetAndMetadata(o, "", -1) for p, o in offsets.items()})

    def close(self) -> None:
        for client in (self._consumer, self._admin):
            if client is not None:
                client.close()
        self._consumer = self._admin = None

    def _ask(self, question: Any, *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except kafka_errors.KafkaError as error:
            raise translate_error(error) from error


def _record(record: Any) -> Record:
    """Convert a record of the client."""
    oversize = record.value if isinstance(record.value, OversizeValue) else None
    return Record(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp / 1000,
        record.key,
        record.value if oversize is None else None,
        tuple(record.headers),
        oversize=oversize.why if oversize is not None else None,
        begin=oversize.begin if oversize is not None else None,
    )

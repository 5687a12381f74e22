"""A cluster of three brokers, and a broker that clients reach only through a proxy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from kafka import KafkaAdminClient

from benchmarks.kafka_broker import KafkaBroker, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType


class Node(KafkaBroker):
    """One node of a cluster. A broker that does not answer for three seconds loses its leadership."""

    def __init__(self, directory: Path, number: int, controllers: Mapping[int, int]) -> None:
        super().__init__(directory)
        self.number = number
        self.controllers = controllers

    def properties(self) -> dict[str, object]:
        voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in self.controllers.items())
        return super().properties() | {
            "node.id": self.number,
            "controller.quorum.voters": voters,
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{self.controllers[self.number]}",
            "offsets.topic.replication.factor": 3,
            "default.replication.factor": 3,
            "min.insync.replicas": 2,
            "broker.heartbeat.interval.ms": 500,
            "broker.session.timeout.ms": 3000,
        }


class Cluster:
    """Three nodes. Records that are written with acks=all survive the loss of any one node."""

    def __init__(self, directory: Path) -> None:
        controllers = {number: free_port() for number in (1, 2, 3)}
        self.nodes = {number: Node(directory / str(number), number, controllers) for number in controllers}

    @property
    def address(self) -> str:
        """The bootstrap servers for clients."""
        return ",".join(node.address for node in self.nodes.values())

    def leader(self, topic: str) -> Node:
        """Return the node that leads a topic's first partition."""
        admin = KafkaAdminClient(bootstrap_servers=self.address.split(","))
        try:
            described = admin.describe_topics([topic])[0]
        finally:
            admin.close()
        partition = described["partitions"][0]
        return self.nodes[partition.get("leader_id", partition.get("leader"))]

    def __enter__(self) -> Self:
        # all at once, because a single node has no quorum and does not listen
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(KafkaBroker.start, self.nodes.values()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes.values():
            node.kill()


class ProxiedBroker(KafkaBroker):
    """A broker with a second listener, whose advertised address is that of a proxy."""

    def __init__(self, directory: Path, proxied_port: int) -> None:
        super().__init__(directory)
        self.behind = free_port()  # the port to which the proxy forwards
        self.proxied_port = proxied_port

    def properties(self) -> dict[str, object]:
        known = super().properties()
        return known | {
            "listeners": f"{known['listeners']},PROXIED://127.0.0.1:{self.behind}",
            "advertised.listeners": f"{known['advertised.listeners']},PROXIED://127.0.0.1:{self.proxied_port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
        }

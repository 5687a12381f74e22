"""The options that choose which topics a command works on, and how it opens them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamlearn.cli.common import config_here, load_config
from streamlearn.core.errors import InputOutputError, UsageError
from streamlearn.logs import quiet_kafka

if TYPE_CHECKING:
    from streamlearn.config.root import Config
    from streamlearn.stream.logs.base import LogReader, LogWriter

ConfigOption = Annotated[Path | None, typer.Option("--config", help="Use this configuration's source and topics.")]
ServersOption = Annotated[
    str | None, typer.Option("--bootstrap-servers", help="Kafka brokers, without a configuration.")
]
EmbeddedOption = Annotated[Path | None, typer.Option("--embedded", help="A file of embedded topics.")]
HeaderOption = Annotated[
    bool | None,
    typer.Option("--header/--no-header", help="Say whether the first line of a .csv names the columns."),
]


def find_config(config: Path | None, servers: str | None, embedded: Path | None) -> Config | None:
    """Return the configuration of a command: the given one, or ./streamlearn.yaml if no option chooses the topics.

    Returns None if there is neither. Raises `UsageError` if several options choose the topics.
    """
    if sum(option is not None for option in (config, servers, embedded)) > 1:
        raise UsageError("give only one of --config, --bootstrap-servers and --embedded")
    if config is None and servers is None and embedded is None:
        config = config_here()
    return None if config is None else load_config(config)


def open_topics(
    config: Config | None, servers: str | None, embedded: Path | None, *, reading: bool = False
) -> tuple[LogReader, LogWriter]:
    """Return a reader and a writer for the topics that the options choose.

    An embedded file is created if it does not exist, except for `reading`: then `InputOutputError` is raised.
    """
    quiet_kafka()
    if servers is not None:
        from streamlearn.stream.logs.config import SERVER, KafkaConfig

        if not all(SERVER.fullmatch(server.strip()) for server in servers.split(",")):
            raise UsageError(f"--bootstrap-servers is {servers!r}; expected HOST:PORT, or several, separated by commas")
        from streamlearn.stream.logs.kafka import KafkaReader
        from streamlearn.stream.logs.kafka_writer import KafkaWriter

        kafka = KafkaConfig.model_validate({"bootstrap_servers": servers})
        return KafkaReader(kafka, "streamlearn.cli"), KafkaWriter(kafka)
    if embedded is not None:
        from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter

        if reading and not embedded.is_file():
            raise InputOutputError(f"{embedded}: no such file")
        return EmbeddedReader(embedded), EmbeddedWriter(embedded)
    if config is None:
        raise UsageError("which topics? give --config, --bootstrap-servers or --embedded")
    from streamlearn.runtime.stream import open_reader_and_writer

    return open_reader_and_writer(config)

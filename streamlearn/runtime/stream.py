"""Open the configured log, and build the reader of a job's stream over it.

Imports stand in the functions, because commands that only open the log should not wait for torch.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamlearn.config.root import Config
    from streamlearn.runtime.job import Job
    from streamlearn.stream.logs.base import LogReader, LogWriter
    from streamlearn.stream.reader import StreamReader


def open_stream_reader(job: Job) -> StreamReader:
    """Return a reader of the job's configured log, from the job's positions on. The log is not contacted yet."""
    config = job.config
    log_reader, log_writer = open_reader_and_writer(config)
    job.recorder.stream_made(config.stream.topics or [])
    refresh_seconds = config.kafka.metadata_refresh_seconds if config.kafka is not None else 1.0
    return make_stream_reader(job, log_reader, log_writer, refresh_seconds)


def make_stream_reader(
    job: Job, log_reader: LogReader, log_writer: LogWriter, refresh_seconds: float = 1.0
) -> StreamReader:
    """Return a reader of the job's stream over any log, from the job's positions on; dead letters go to `log_writer`.

    The reader gets a copy of the progress, because it runs ahead of the learner. `refresh_seconds`: how often the log is
    asked for its topics.
    """
    from streamlearn.core.progress import Progress
    from streamlearn.stream.assembler import Assembler, AssemblerSettings
    from streamlearn.stream.deadletter import DeadLetterWriter
    from streamlearn.stream.decoder import RecordDecoder
    from streamlearn.stream.holdout import HoldOut
    from streamlearn.stream.reader import StreamReader

    config, spec = job.config, job.config.stream
    dead_letters = DeadLetterWriter(log_writer, config.dead_letter_topic)
    settings = AssemblerSettings(
        decoder=RecordDecoder.from_config(config.input, spec, job.progress.codec_version),
        holdout=HoldOut(config.holdout.by, config.holdout.fraction),
        scenario=job.scenario,
        dead_letters=dead_letters,
        batch_size=spec.batch_size,
        samples_per_task=spec.task_end.records,
        dead_letter_late=spec.late == "dead_letter",
    )
    copied = Progress.from_json(json.loads(json.dumps(job.progress.to_json())), job.progress.positions)
    return StreamReader(log_reader, Assembler(settings, copied), spec, dead_letters, config.group_id, refresh_seconds)


def open_reader_and_writer(config: Config) -> tuple[LogReader, LogWriter]:
    """Return a reader and a writer of the configured source. Kafka is not contacted yet."""
    if config.source == "kafka":
        from streamlearn.stream.logs.kafka import KafkaReader
        from streamlearn.stream.logs.kafka_writer import KafkaWriter

        assert config.kafka is not None
        return KafkaReader(config.kafka, config.group_id, config.stream.max_record_bytes), KafkaWriter(config.kafka)
    from streamlearn.stream.logs.sqlite import EmbeddedReader, EmbeddedWriter

    return EmbeddedReader(config.embedded.path), EmbeddedWriter(config.embedded.path)

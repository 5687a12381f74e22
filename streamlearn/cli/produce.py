"""`streamlearn produce`: publish labelled samples from files to topics."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from streamlearn.cli.common import print_error, print_line
from streamlearn.cli.source import ConfigOption, EmbeddedOption, HeaderOption, ServersOption, find_config, open_topics
from streamlearn.core.errors import UsageError
from streamlearn.core.text import TOPIC_NAME
from streamlearn.logs import printable
from streamlearn.stream.codecs.registry import CodecName  # noqa: TC001 - typer reads the type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamlearn.config.root import Config
    from streamlearn.core.labels import Label
    from streamlearn.tools.producer import ReadOptions, Samples


def produce(
    source: Annotated[
        list[str],
        typer.Argument(help="A .npz, .csv, .csv.gz, .jsonl or .jsonl.gz file, several with --by file, or `digits`."),
    ],
    config: ConfigOption = None,
    servers: ServersOption = None,
    embedded: EmbeddedOption = None,
    topic: Annotated[
        list[str] | None,
        typer.Option("--topic", help="A topic for each task; default: the configuration's, or task-1, task-2 ..."),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option("--tasks", min=1, help="The number of tasks; default: 1, or all tasks that the file names."),
    ] = None,
    by: Annotated[
        Literal["classes", "permutation", "rotation", "file", "task"],
        typer.Option(
            help="How the samples are split into tasks; `task`: by the field `task` on each line of a .jsonl."
        ),
    ] = "classes",
    groups: Annotated[
        str | None, typer.Option(help="Classes of each task: 0,1/2,3/4,5; default: equal groups.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="A file whose samples are probes, or `test` for the source's own test split.")
    ] = None,
    header: HeaderOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Publish at most so many samples of each task.")] = None,
    shuffle: Annotated[bool, typer.Option(help="Publish the samples of a task in random order.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="The seed for shuffling and permutations.")] = 0,
    codec: Annotated[
        CodecName | None,
        typer.Option(help="The format of the records; default: json for text, batch for numbers."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in each batch record.")] = 100,
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of each topic that is created.")] = 1,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Publish at most so many samples per second.")] = None,
    markers: Annotated[bool, typer.Option(help="Write task-end markers after each task.")] = True,
) -> None:
    """Publish labelled samples to topics: one topic for each task, one task after the other.

    With a configuration the samples are converted to its shape and dtype. Samples that its stream would reject are refused.
    """
    from streamlearn.tools import producer

    loaded = find_config(config, servers, embedded)
    keep_precision = loaded is not None and loaded.input.dtype not in {"float16", "float32"}
    read = producer.ReadOptions(header, keep_precision, cache(print_error))  # cache: each message once for all files

    def split(samples: Samples) -> list[Samples]:
        if by == "task":
            return producer.split_by_task(samples, names)
        return _split(samples, whole, tasks, by, groups, seed)

    def fit(parts: list[Samples]) -> list[Samples]:
        if loaded is None:
            return parts
        pairs = zip(topics, parts, strict=True)
        return [producer.fit_to_config(part, name, loaded, read.notify) for name, part in pairs]

    if by == "file" and probe not in {None, "test"}:
        raise UsageError("with --by file, --probe accepts only `test`: each file's own test split")

    names: list[str] = []
    if by == "file":
        parts = [producer.read_samples(name, options=read) for name in source]
    else:
        whole = _read_one(source, read)
        names = producer.task_names(whole, tasks) if by == "task" else []
        parts = split(whole)
    topics = _topic_names(topic, loaded, len(parts))
    parts, probes = fit(parts), None
    if probe is not None:
        if by == "file":
            probe_parts = [producer.read_test_split(name, read) for name in source]
        else:
            probe_parts = split(_read_probe(source[0], probe, read))
        probes = dict(enumerate(fit(probe_parts)))
    options = producer.PublishOptions(
        codec or ("json" if parts[0].is_text else "batch"), batch, partitions, markers, rate
    )
    if loaded is not None:
        producer.check_limits([*parts, *(probes or {}).values()], options, loaded)
    _, writer = open_topics(loaded, servers, embedded)
    try:
        with _progress_bars() as add_bar:
            for index, (name, part) in enumerate(zip(topics, parts, strict=True)):
                chosen = producer.shuffle(part, seed + index) if shuffle else part
                if limit is not None:
                    chosen = producer.Samples(chosen.x[:limit], chosen.y[:limit], chosen.task[:limit])
                producer.publish(
                    writer,
                    name,
                    chosen,
                    options,
                    probe=probes[index] if probes else None,
                    progress=add_bar(name, len(chosen)),
                )
                print_line(
                    f"{name}: {len(chosen)} samples" + (f", {len(probes[index])} for the probe" if probes else "")
                )
    finally:
        writer.close()


def _topic_names(topic: list[str] | None, config: Config | None, count: int) -> list[str]:
    """Return a topic for each task: those of --topic, else those of the configuration, else task-1, task-2 ..."""
    names = topic
    if names is None and config is not None:
        names = config.stream.topics
    if names is None:
        return [f"task-{n + 1}" for n in range(count)]
    if len(names) < count:
        raise UsageError(f"{count} tasks, but {len(names)} topics: {', '.join(names)}")
    for name in names:
        if not TOPIC_NAME.fullmatch(name):
            raise UsageError(f"topic {name!r:.80}: expected 1 to 249 letters, digits, dots, _ and -")
    return names[:count]


def _read_one(source: list[str], options: ReadOptions) -> Samples:
    from streamlearn.tools import producer

    if len(source) != 1:
        raise UsageError("several files were given: add --by file to make each file a task")
    return producer.read_samples(source[0], options=options)


def _read_probe(source: str, probe: str, options: ReadOptions) -> Samples:
    from streamlearn.tools import producer

    if probe == "test":
        return producer.read_test_split(source, options)
    return producer.read_samples(probe, "test", options)


def _split(
    samples: Samples, whole: Samples, tasks: int | None, by: str, groups: str | None, seed: int
) -> list[Samples]:
    """Split samples into tasks. The classes come from `whole`, so that a probe is split in the same way as its samples."""
    from streamlearn.tools import producer

    if by == "permutation":
        return producer.make_permuted_tasks(samples, tasks or 1, seed)
    if by == "rotation":
        return producer.make_rotated_tasks(samples, tasks or 1)
    chosen: list[list[Label]] = (
        producer.resolve_groups(whole, [producer.parse_labels(group) for group in groups.split("/")])
        if groups
        else producer.equal_class_groups(whole, tasks or 1)
    )
    if tasks not in {None, len(chosen)}:
        raise UsageError(f"--tasks is {tasks}, but --groups has {len(chosen)} groups")
    return producer.split_by_classes(samples, chosen)


@contextmanager
def _progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yield a function that adds a progress bar for a topic; on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _name, _total: lambda _done: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:

        def add_bar(name: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(escape(printable(name)), total=total)
            return lambda done: bars.advance(bar, done)

        yield add_bar

"""`topics`, `produce`, `predict`."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streamlearn.cli.common import (
    JsonOption,
    StateOption,
    find_state_dir,
    format_percent,
    load_config,
    print_error,
    print_json,
    print_line,
)
from streamlearn.data import TOPIC_NAME, StreamlearnError
from streamlearn.logs import printable, quiet_kafka

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from streamlearn.config import Config
    from streamlearn.data import Label
    from streamlearn.producer import ReadOptions, Samples
    from streamlearn.stream.log import Log, Sink

ConfigOption = Annotated[Path | None, typer.Option("--config", help="Use this configuration's source and topics.")]
ServersOption = Annotated[
    str | None, typer.Option("--bootstrap-servers", help="Kafka brokers, without a configuration.")
]
EmbeddedOption = Annotated[Path | None, typer.Option("--embedded", help="A file of embedded topics.")]
HeaderOption = Annotated[
    bool | None,
    typer.Option("--header/--no-header", help="Of a .csv: its first line names the columns, or is a sample."),
]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (topics, produce, predict):
        app.command()(command)


def topics(
    config: ConfigOption = None,
    servers: ServersOption = None,
    embedded: EmbeddedOption = None,
    everything: Annotated[bool, typer.Option("--all", help="With a configuration: topics of others, too.")] = False,
    json_: JsonOption = False,
) -> None:
    """List topics with their partitions and records: those of a configuration, or all."""
    loaded = _config(config, servers, embedded)
    log, _ = _open(loaded, servers, embedded, reading=True)
    log.connect()
    try:
        infos = log.topics()
        if loaded is not None and not everything:
            infos = {name: info for name, info in infos.items() if loaded.stream.reads(name)} | {
                name: info for name, info in infos.items() if name == loaded.dead_letter_topic
            }
        bounds = log.bounds([(name, p) for name, info in infos.items() for p in info.partitions])
    finally:
        log.close()
    rows = {
        name: {
            str(p): {"begin": bounds[name, p].begin, "end": bounds[name, p].end}
            for p in info.partitions
            if (name, p) in bounds
        }
        for name, info in sorted(infos.items())
    }
    if json_:
        print_json(rows)
        return
    print_line(f"{'TOPIC':<32} {'PARTITIONS':>10} {'OFFSETS':>10}")
    for name, partitions in rows.items():
        print_line(f"{name:<32} {len(partitions):>10} {sum(p['end'] - p['begin'] for p in partitions.values()):>10}")
    if loaded is not None and (missing := [name for name in loaded.stream.topics or () if name not in rows]):
        print_error(f"of stream.topics there {'is' if len(missing) == 1 else 'are'} not yet: {', '.join(missing)}")


def produce(
    source: Annotated[
        list[str],
        typer.Argument(help="A .npz, .csv or .jsonl file (.csv.gz, .jsonl.gz; several: a task each), or `digits`."),
    ],
    config: ConfigOption = None,
    servers: ServersOption = None,
    embedded: EmbeddedOption = None,
    topic: Annotated[
        list[str] | None,
        typer.Option("--topic", help="A topic for each task; default: the configuration's, or task-1, task-2 ..."),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option("--tasks", min=1, help="How many tasks; default: 1, or all where a file names them.")
    ] = None,
    by: Annotated[
        Literal["classes", "permutation", "rotation", "file", "task"],
        typer.Option(help="What makes a task; `task` is the field of that name on each line of a .jsonl."),
    ] = "classes",
    groups: Annotated[
        str | None, typer.Option(help="Classes of each task: 0,1/2,3/4,5; default: equal groups.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="A file whose samples are probes; `test` is the source's own test split.")
    ] = None,
    header: HeaderOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many samples a task.")] = None,
    shuffle: Annotated[bool, typer.Option(help="In random order within a task.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of shuffling and permutations.")] = 0,
    codec: Annotated[
        Literal["json", "msgpack", "batch"] | None,
        typer.Option(help="How samples are written; default: batch, or json where they are text."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch record.")] = 100,
    partitions: Annotated[int, typer.Option(min=1, help="Of topics that are created.")] = 1,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Samples a second.")] = None,
    markers: Annotated[bool, typer.Option(help="Mark each task's end.")] = True,
) -> None:
    """Publish labelled samples to topics, one topic a task, one task after the other.

    With a configuration they are published in its shape and dtype; what its stream would reject is refused.
    """
    from streamlearn import producer

    loaded = _config(config, servers, embedded)
    exact = loaded is not None and loaded.input.dtype not in {"float16", "float32"}
    reading = producer.ReadOptions(header, exact, cache(print_error))  # each line once, also where files are alike

    def split(samples: Samples) -> list[Samples]:
        return (
            producer.split_by_task(samples, names) if by == "task" else _tasks(samples, whole, tasks, by, groups, seed)
        )

    def fitted(parts: list[Samples]) -> list[Samples]:
        if loaded is None:
            return parts
        return [
            producer.fit_to_config(part, name, loaded, reading.notify)
            for name, part in zip(topics_, parts, strict=True)
        ]

    if by == "file" and probe not in {None, "test"}:
        raise StreamlearnError("--by file: --probe takes `test`, each file's own test split", code=2)

    names: list[str] = []
    if by == "file":
        parts = [producer.read_samples(name, how=reading) for name in source]
    else:
        whole = _one(source, reading)
        names = producer.task_names(whole, tasks) if by == "task" else []
        parts = split(whole)
    topics_ = _names(topic, loaded, len(parts))
    parts, probes = fitted(parts), None
    if probe is not None:
        if by == "file":
            held = [producer.read_test_split(name, reading) for name in source]
        else:
            held = split(_probe(source[0], probe, reading))
        probes = dict(enumerate(fitted(held)))
    how = producer.PublishOptions(codec or ("json" if parts[0].is_text else "batch"), batch, partitions, markers, rate)
    if loaded is not None:
        producer.check_limits([*parts, *(probes or {}).values()], how, loaded)
    _, sink = _open(loaded, servers, embedded)
    try:
        with _progress() as advance:
            for index, (name, part) in enumerate(zip(topics_, parts, strict=True)):
                chosen = producer.shuffle(part, seed + index) if shuffle else part
                if limit is not None:
                    chosen = producer.Samples(chosen.x[:limit], chosen.y[:limit], chosen.task[:limit])
                producer.publish(
                    sink,
                    name,
                    chosen,
                    how,
                    probe=probes[index] if probes else None,
                    progress=advance(name, len(chosen)),
                )
                print_line(
                    f"{name}: {len(chosen)} samples" + (f", {len(probes[index])} for the probe" if probes else "")
                )
    finally:
        sink.close()


def predict(
    file: Annotated[Path, typer.Argument(help="A .npz or .jsonl, to be scored with labels; or a labelled .csv.")],
    checkpoint: Annotated[
        str, typer.Option(help="An id, its number, a tag, `latest`, or a checkpoint's directory, with a / in it.")
    ] = "latest",
    state: StateOption = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Names the code of a model or encoder of yours; else ./streamlearn.yaml."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:function, where the checkpoint's model is yours.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="The same for its encoder.")] = None,
    task: Annotated[str | None, typer.Option(help="The task, in scenarios task and domain.")] = None,
    split: Annotated[str, typer.Option(help="Of a file that has several.")] = "test",
    classes: Annotated[str | None, typer.Option(help="Only samples of these classes: 0,1.")] = None,
    header: HeaderOption = None,
    json_: JsonOption = False,
) -> None:
    """Predict with a saved model, from its model.safetensors, model.json and encoder (where there is one) alone."""
    from streamlearn import producer
    from streamlearn.checkpoint import Store, open_checkpoint
    from streamlearn.predict import Model, accuracy

    def own(kind: str) -> tuple[str, Mapping[str, Any] | None] | None:
        """Say which code is the user's: nothing is imported because a checkpoint names it."""
        if (name := {"model": model, "encoder": encoder}[kind]) is not None:
            return name, None
        here = Path("streamlearn.yaml")
        if config is None and not here.is_file():
            return None
        loaded = load_config(config or here)
        spec = loaded.model if kind == "model" else loaded.input.encoder
        return None if spec is None else (spec.name, spec.options)

    if (samples := producer.read_unlabelled(file, split)) is None:
        samples = producer.read_samples(str(file), split, producer.ReadOptions(header, notify=print_error))
    if classes is not None:
        samples = producer.split_by_classes(samples, producer.resolve_groups(samples, [_labels(classes)]))[0]
    if "/" in checkpoint:  # so that a directory is never taken for an id
        found = open_checkpoint(Path(checkpoint), *Model.FILES, optional=Model.OPTIONAL)
    else:
        where = find_state_dir(state) if config is None or state is not None else load_config(config).state_dir
        try:
            found = Store(where).find(checkpoint, *Model.FILES, optional=Model.OPTIONAL)
        except StreamlearnError as error:
            hint = f"; for the directory, write ./{checkpoint}" if Path(checkpoint).is_dir() else ""
            raise StreamlearnError(f"{error}{hint}", code=error.code) from error
    done = Model(found, own).predict(samples.x, task)
    tree: dict[str, Any] = {
        "samples": len(done.labels),
        "accuracy": accuracy(done.labels, samples.y) if samples.y else None,
    }
    rejected = [{"sample": n, "reason": error.reason, "why": str(error)} for n, error in done.rejected.items()]
    if json_:
        sure = [None if n in done.rejected else round(float(p), 6) for n, p in enumerate(done.probabilities)]
        print_json({**tree, "rejected": rejected, "predictions": done.labels, "probabilities": sure})
    elif samples.y:
        print_line(f"accuracy {format_percent(tree['accuracy'])} on {len(done.labels) - len(rejected)} samples")
    else:
        for label in done.labels:
            print_line("" if label is None else label)
    if rejected:
        first = rejected[0]
        why = f"{len(rejected)} of {len(done.labels)} samples are rejected, first sample {first['sample']} ({first['reason']})"
        if len(rejected) == len(done.labels):
            raise StreamlearnError(f"{file}: {why}: {first['why']}", code=65)
        print_error(f"warning: {file}: {why}: {first['why']}")


def _config(config: Path | None, servers: str | None, embedded: Path | None) -> Config | None:
    """Return the configuration that a command is about: the given one, or streamlearn.yaml here if nothing is given."""
    if sum(option is not None for option in (config, servers, embedded)) > 1:
        raise StreamlearnError("give one of --config, --bootstrap-servers and --embedded", code=2)
    here = Path("streamlearn.yaml")
    if config is None and servers is None and embedded is None and here.is_file():
        config = here
    return None if config is None else load_config(config)


def _open(
    config: Config | None, servers: str | None, embedded: Path | None, *, reading: bool = False
) -> tuple[Log, Sink]:
    quiet_kafka()
    if servers is not None:
        from streamlearn.config import SERVER, KafkaConfig

        if not all(SERVER.fullmatch(server.strip()) for server in servers.split(",")):
            raise StreamlearnError(
                f"--bootstrap-servers is {servers!r}; expected HOST:PORT, or several with commas", code=2
            )
        from streamlearn.stream.kafka import KafkaLog, KafkaSink

        kafka = KafkaConfig.model_validate({"bootstrap_servers": servers})
        return KafkaLog(kafka, "streamlearn.cli"), KafkaSink(kafka)
    if embedded is not None:
        from streamlearn.stream.embedded import EmbeddedLog, EmbeddedSink

        if reading and not embedded.is_file():
            raise StreamlearnError(f"{embedded}: no such file", code=74)
        return EmbeddedLog(embedded), EmbeddedSink(embedded)
    if config is None:
        raise StreamlearnError("which topics? give --config, --bootstrap-servers or --embedded", code=2)
    from streamlearn.daemon import open_log

    return open_log(config)


def _names(topic: list[str] | None, config: Config | None, count: int) -> list[str]:
    names = topic
    if names is None and config is not None:
        names = config.stream.topics
    if names is None:
        return [f"task-{n + 1}" for n in range(count)]
    if len(names) < count:
        raise StreamlearnError(f"{count} tasks, but {len(names)} topics: {', '.join(names)}", code=2)
    for name in names:
        if not TOPIC_NAME.fullmatch(name):
            raise StreamlearnError(f"topic {name!r:.80}: expected 1 to 249 letters, digits, dots, _ and -", code=2)
    return names[:count]


def _one(source: list[str], how: ReadOptions) -> Samples:
    from streamlearn import producer

    if len(source) != 1:
        raise StreamlearnError("several files: each is a task with --by file", code=2)
    return producer.read_samples(source[0], how=how)


def _probe(source: str, probe: str, how: ReadOptions) -> Samples:
    from streamlearn import producer

    return producer.read_test_split(source, how) if probe == "test" else producer.read_samples(probe, "test", how)


def _labels(text: str) -> list[str]:
    return [label.strip() for label in text.split(",")]


def _tasks(
    samples: Samples, whole: Samples, tasks: int | None, by: str, groups: str | None, seed: int
) -> list[Samples]:
    """Return samples cut into tasks; those of a probe by the classes of the `whole` that it belongs to."""
    from streamlearn import producer

    if by == "permutation":
        return producer.make_permuted_tasks(samples, tasks or 1, seed)
    if by == "rotation":
        return producer.make_rotated_tasks(samples, tasks or 1)
    chosen: list[list[Label]] = (
        producer.resolve_groups(whole, [_labels(group) for group in groups.split("/")])
        if groups
        else producer.equal_class_groups(whole, tasks or 1)
    )
    if tasks not in {None, len(chosen)}:
        raise StreamlearnError(f"--tasks is {tasks}, but --groups names {len(chosen)}", code=2)
    return producer.split_by_classes(samples, chosen)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Give a bar for each topic, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _name, _total: lambda _done: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:

        def bar(name: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(escape(printable(name)), total=total)
            return lambda done: bars.advance(task, done)

        yield bar

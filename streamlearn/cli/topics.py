"""`streamlearn topics`: list topics with their partitions and offsets."""

from __future__ import annotations

from typing import Annotated

import typer

from streamlearn.cli.common import JsonOption, print_error, print_json, print_line
from streamlearn.cli.source import ConfigOption, EmbeddedOption, ServersOption, find_config, open_topics


def topics(
    config: ConfigOption = None,
    servers: ServersOption = None,
    embedded: EmbeddedOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="With a configuration: also list topics that it does not read.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """List topics with their partitions and records: those of a configuration, or all."""
    loaded = find_config(config, servers, embedded)
    reader, _ = open_topics(loaded, servers, embedded, reading=True)
    reader.connect()
    try:
        infos = reader.topics()
        if loaded is not None and not everything:
            infos = {
                name: info
                for name, info in infos.items()
                if loaded.stream.reads(name) or name == loaded.dead_letter_topic
            }
        bounds = reader.bounds([(name, p) for name, info in infos.items() for p in info.partitions])
    finally:
        reader.close()
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
        print_error(f"listed in stream.topics, but not created yet: {', '.join(missing)}")

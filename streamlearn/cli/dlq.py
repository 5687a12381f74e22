"""`streamlearn dlq`: list, show and replay the dead letters of a configuration; no daemon is needed."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streamlearn.cli.common import ConfigArgument, JsonOption, load_config, print_error, print_json, print_line
from streamlearn.cli.status import read_status
from streamlearn.core.errors import InputOutputError, NotRunningError, StreamlearnError, UsageError
from streamlearn.logs import printable, quiet_kafka

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from streamlearn.stream.letters import Letter
    from streamlearn.stream.logs.base import LogReader, LogWriter

app = typer.Typer(help="List, show and replay dead letters: samples that could not be used.", no_args_is_help=True)

TopicOption = Annotated[str | None, typer.Option("--topic", help="Only letters of samples of this topic.")]
ReasonOption = Annotated[
    str | None, typer.Option("--reason", help="Only letters with this reason, such as label_range.")
]
KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="The letter's key as `list` prints it: topic-partition-offset-index.")
]


@app.command("list")
def list_(
    config: ConfigArgument,
    topic: TopicOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="Show only so many letters, the newest.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show also letters that were replayed.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the letters, one on a line, oldest first, and count them by topic and reason.

    A letter that was written twice because of a crash is shown once. The command does not wait for new letters.
    """
    from streamlearn.stream import letters

    with _open_letters(config) as (reader, _, dead_letter_topic, _):
        found = letters.list_letters(reader, dead_letter_topic)
    matching = _filter(found.letters, topic, reason)
    chosen = [letter for letter in matching if everything or not letter.replayed]
    shown = chosen if limit is None else chosen[max(0, len(chosen) - limit) :]
    counts = sorted(Counter((letter.topic, letter.reason) for letter in chosen).items())
    hidden = len(matching) - len(chosen)
    if json_:
        summary = [{"topic": topic, "reason": reason, "letters": count} for (topic, reason), count in counts]
        trees = [_letter_json(letter) for letter in shown]
        tree = {"topic": dead_letter_topic, "letters": trees, "summary": summary, "hidden": hidden}
        print_json({**tree, "skipped": found.skipped})
        return
    for letter in shown:
        mark = "replayed  " if letter.replayed else ""
        time = _format_time(letter.rejected, "seconds").removesuffix("+00:00")
        print_line(f"{letter.key}  {time}  {printable(letter.reason)}  {mark}{printable(letter.message)}")
    if not found.letters:
        print_error(f"no dead letters in topic {dead_letter_topic}")
    for (name, why), count in counts:
        print_line(f"{name}: {count} {printable(why)}")
    if hidden:
        print_line(f"{hidden} replayed letters are not shown (--all shows them)")
    _report_skipped(found.skipped, dead_letter_topic)


@app.command()
def show(
    config: ConfigArgument,
    key: KeyArgument,
    value: Annotated[bool, typer.Option("--value", help="Write only the original record's bytes, to stdout.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the original record's bytes to this file.")
    ] = None,
) -> None:
    """Show a letter: why its sample was rejected, and the headers and bytes of the original record."""
    from streamlearn.stream import letters
    from streamlearn.stream.deadletter import original_headers

    with _open_letters(config) as (reader, _, dead_letter_topic, _):
        record, holder = letters.find_letter(reader, dead_letter_topic, key)
    letter = letters.Letter.from_record(record)
    assert letter is not None
    if holder is None and (value or output is not None):
        raise StreamlearnError(f"{key}: the record's bytes were in letter {letter.value_key}, which no longer exists")
    content = (holder.value if holder is not None else None) or b""
    if output is not None:
        try:
            output.write_bytes(content)
        except OSError as error:
            raise StreamlearnError.from_os_error(error, output) from error
    if value:
        sys.stdout.buffer.write(content)
        return
    for name, shown in _letter_json(letter).items():
        print_line(f"{name:<10} {printable(str(shown))}")
    for name, data in original_headers(record):
        print_line(f"{'header':<10} {printable(name)}: {_decode(data)}")
    if (original_key := letters.original_key(record)) is not None:
        print_line(f"{'record key':<10} {_decode(original_key)}")
    if holder is None:
        print_line(f"{'value':<10} lost: it was in letter {letter.value_key}, which no longer exists")
    elif holder.value is None:
        print_line(f"{'value':<10} none: a tombstone")
    else:
        print_line(f"{'value':<10} {len(content)} bytes: {_decode(content[:200])}")


@app.command()
def replay(
    config: ConfigArgument,
    topic: TopicOption = None,
    reason: ReasonOption = None,
    key: Annotated[
        list[str] | None, typer.Option("--key", help="Only this letter; may be given several times.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Send to this topic; default: each sample to its own topic.")
    ] = None,
    max_attempts: Annotated[int, typer.Option(min=1, help="Skip samples that were already sent so many times.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Send rejected samples again, after their problem was fixed, with their original bytes, key and headers.

    Of a batch record only the rejected samples are sent; the others were learned. A sample that is sent to a topic whose
    task has ended counts as late and is NOT learned: --to sends it to a topic that can still be learned. Letters that were
    sent are marked, and a second replay ignores them.
    """
    from streamlearn.stream import letters

    with _open_letters(config) as (reader, writer, dead_letter_topic, state_dir):
        if to == dead_letter_topic:
            raise UsageError(f"--to {to}: that is the dead-letter topic itself")
        found = letters.list_letters(reader, dead_letter_topic)
        _report_skipped(found.skipped, dead_letter_topic)
        matching = [letter for letter in _filter(found.letters, topic, reason) if not letter.replayed]
        if key is not None:
            if unknown := sorted(set(key) - {letter.key for letter in matching}):
                raise StreamlearnError(f"no letter {', '.join(unknown)} to be sent in topic {dead_letter_topic}")
            matching = [letter for letter in matching if letter.key in key]
        chosen = [letter for letter in matching if letter.attempts < max_attempts]
        if exhausted := len(matching) - len(chosen):
            print_error(f"{exhausted} letters were already sent {max_attempts} times (--max-attempts)")
        if not chosen:
            print_line("nothing to send")
            return
        partitions, unwritable = letters.target_partitions(writer, dead_letter_topic, chosen, to)
        if not partitions:
            raise next(iter(unwritable.values()))
        _warn_of_ended_tasks(state_dir, partitions)
        sent: list[Letter] = []
        if dry_run:
            reachable = [letter for letter in chosen if (to or letter.topic) in partitions]
            records = letters.records_to_send(reader, dead_letter_topic, reachable)
            sent.extend(letter for _, _, group in records for letter in group)
            _report_sent("would be sent", sent, to)
        else:
            _confirm(chosen, to, yes=yes)
            try:
                # `sent` grows while letters are sent, so that the report below is right after an error, too
                sent.extend(letters.replay(reader, writer, dead_letter_topic, chosen, to, partitions))
            finally:
                _report_sent("sent", sent, to)
        if missing := len(chosen) - len(sent):
            how = "cannot be sent" if dry_run else "were not sent"
            reasons = [str(error) for error in unwritable.values()]
            if missing > sum(letter.topic in unwritable for letter in chosen):
                reasons.append("their bytes no longer exist, were cut, never existed, or contradict the letter")
            raise StreamlearnError(f"{missing} letters {how}: {'; '.join(reasons[:3])}")


def _decode(data: bytes) -> str:
    return printable(data.decode(errors="backslashreplace"))


def _format_time(seconds: float, precision: Literal["seconds", "milliseconds"] = "milliseconds") -> str:
    """Return a time in ISO 8601, UTC. Years beyond 9999, which producers may send, get a sign, as the standard says."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=precision)
    except (ValueError, OverflowError, OSError):
        from numpy import datetime64

        last = (1 << 63) - 1
        stamp = datetime64(max(-last, min(last, round(seconds * 1000))), "ms")
        text = str(stamp.astype("datetime64[s]") if precision == "seconds" else stamp)
        return f"{text if text.startswith('-') else '+' + text}+00:00"


def _letter_json(letter: Letter) -> dict[str, Any]:
    """Return a letter as a JSON tree."""
    tree = {**asdict(letter), "further": len(letter.indices) - 1}
    del tree["value_key"], tree["letter_partition"]
    return {**tree, "rejected": _format_time(letter.rejected), "timestamp": _format_time(letter.timestamp)}


def _report_skipped(count: int, topic: str) -> None:
    if count:
        print_error(f"{count} records of topic {topic} look like letters but are not valid: skipped")


def _warn_of_ended_tasks(state_dir: Path, topics: Collection[str]) -> None:
    """Warn if the state directory says that the task of one of these topics has ended."""
    from streamlearn.core.tasks import TaskState

    try:
        tasks = read_status(state_dir).get("tasks", [])
    except NotRunningError:  # nothing was learned in this directory, so no task has ended
        return
    except StreamlearnError as error:
        print_error(f"cannot find out whether a task has ended: {error}")
        return
    if ended := sorted(task["name"] for task in tasks if task["state"] != TaskState.ACTIVE and task["name"] in topics):
        which = f"topic {ended[0]} has" if len(ended) == 1 else f"topics {', '.join(ended)} have"
        print_error(
            f"warning: the task of {which} ended: what is sent there counts as late and is not learned; "
            "--to sends it to a topic that can still be learned"
        )


def _filter(found: list[Letter], topic: str | None, reason: str | None) -> list[Letter]:
    from streamlearn.core.samples import DEAD_LETTER_REASONS

    if reason not in {None, *DEAD_LETTER_REASONS}:
        raise UsageError(f"--reason is {reason!r:.80}; expected one of {', '.join(DEAD_LETTER_REASONS)}")
    return [letter for letter in found if topic in {None, letter.topic} and reason in {None, letter.reason}]


def _report_sent(how: str, sent: list[Letter], to: str | None) -> None:
    """Print how many letters were (or would be) sent to each topic."""
    counts = Counter(to or letter.topic for letter in sent)
    for name, count in sorted(counts.items()):
        print_line(f"{count} samples {how} to {name}")
    if not sent:
        print_line(f"0 samples {how}")


def _confirm(chosen: list[Letter], to: str | None, *, yes: bool) -> None:
    """Ask the user before letters are sent; raises `UsageError` if stdin is no terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(
            "cannot ask for confirmation: stdin is not a terminal; --yes sends them, --dry-run shows what would be sent",
        )
    where = to or ", ".join(sorted({letter.topic for letter in chosen}))
    typer.confirm(f"Send {len(chosen)} samples to {where}?", abort=True)


@contextmanager
def _open_letters(path: Path) -> Iterator[tuple[LogReader, LogWriter, str, Path]]:
    """Yield a connected reader, a writer, the dead-letter topic and the state directory of a configuration file."""
    quiet_kafka()
    config = load_config(path)
    if config.source == "embedded" and not config.embedded.path.is_file():
        raise InputOutputError(f"{config.embedded.path}: no such file")
    from streamlearn.runtime.stream import open_reader_and_writer

    reader, writer = open_reader_and_writer(config)
    try:
        reader.connect()
        yield reader, writer, config.dead_letter_topic, config.state_dir
    finally:
        reader.close()
        writer.close()

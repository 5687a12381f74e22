"""`streamlearn dlq`: read the dead letters of a configuration, and send them again; no daemon is needed."""

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
from streamlearn.cli.lifecycle import STOPPED, read_status
from streamlearn.data import StreamlearnError
from streamlearn.logs import printable, quiet_kafka

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from streamlearn.stream.letters import Letter
    from streamlearn.stream.log import Log, Sink

app = typer.Typer(help="List, show and replay dead letters: samples that could not be used.", no_args_is_help=True)

TopicOption = Annotated[str | None, typer.Option("--topic", help="Only letters of samples of this topic.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only letters of this reason, as label_range.")]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="As `list` shows it: topic-partition-offset-index.")]


@app.command("list")
def list_(
    config: ConfigArgument,
    topic: TopicOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="Show so many at most, the newest.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that were replayed, too.")] = False,
    json_: JsonOption = False,
) -> None:
    """List the letters, a line each, oldest first, and how many there are by topic and reason.

    A letter that was written again after a crash is shown once. Reads what there is now, and ends.
    """
    from streamlearn.stream import letters

    with _opened(config) as (log, _, dead, _):
        found = letters.list_letters(log, dead)
    matching = _matching(found.letters, topic, reason)
    chosen = [letter for letter in matching if everything or not letter.replayed]
    shown = chosen if limit is None else chosen[max(0, len(chosen) - limit) :]
    counts = sorted(Counter((letter.topic, letter.reason) for letter in chosen).items())
    hidden = len(matching) - len(chosen)
    if json_:
        summary = [{"topic": topic, "reason": reason, "letters": count} for (topic, reason), count in counts]
        tree = {"topic": dead, "letters": [_tree(e) for e in shown], "summary": summary, "hidden": hidden}
        print_json({**tree, "skipped": found.skipped})
        return
    for letter in shown:
        mark = "replayed  " if letter.replayed else ""
        message = printable(letter.message)
        when, why = _clock(letter.rejected, "seconds").removesuffix("+00:00"), printable(letter.reason)
        print_line(f"{letter.key}  {when}  {why}  {mark}{message}")
    if not found.letters:
        print_error(f"no dead letters in topic {dead}")
    for (name, why), count in counts:
        print_line(f"{name}: {count} {printable(why)}")
    if hidden:
        print_line(f"{hidden} more were replayed (--all shows them)")
    _report_skipped(found.skipped, dead)


@app.command()
def show(
    config: ConfigArgument,
    key: KeyArgument,
    value: Annotated[
        bool, typer.Option("--value", help="Write the record's own bytes to stdout, and no more.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the record's own bytes to a file.")
    ] = None,
) -> None:
    """Show a letter: why its sample was rejected, and the record's own headers and bytes."""
    from streamlearn.stream import letters

    with _opened(config) as (log, _, dead, _):
        record, carrier = letters.find_letter(log, dead, key)
    letter = letters.Letter.from_record(record)
    assert letter is not None
    if carrier is None and (value or output is not None):
        raise StreamlearnError(f"{key}: the bytes were in letter {letter.value_key}, which is gone")
    content = (carrier.value if carrier is not None else None) or b""
    if output is not None:
        try:
            output.write_bytes(content)
        except OSError as error:
            raise StreamlearnError.from_os_error(error, output) from error
    if value:
        sys.stdout.buffer.write(content)
        return
    for name, shown in _tree(letter).items():
        print_line(f"{name:<10} {printable(str(shown))}")
    for name, data in letters.original_headers(record):
        print_line(f"{'header':<10} {printable(name)}: {_text(data)}")
    if (own := letters.original_key(record)) is not None:
        print_line(f"{'record key':<10} {_text(own)}")
    if carrier is None:
        print_line(f"{'value':<10} gone: it was in letter {letter.value_key}")
    elif carrier.value is None:
        print_line(f"{'value':<10} none: a tombstone")
    else:
        print_line(f"{'value':<10} {len(content)} bytes: {_text(content[:200])}")


@app.command()
def replay(
    config: ConfigArgument,
    topic: TopicOption = None,
    reason: ReasonOption = None,
    key: Annotated[
        list[str] | None, typer.Option("--key", help="Only this letter; may be given several times.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="Send to this topic; default: each to its own.")] = None,
    max_attempts: Annotated[int, typer.Option(min=1, help="Send nothing for the time after these again.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Send rejected samples again, once what was wrong is mended: their own bytes, key and headers.

    Of a batch record only the rejected samples are sent; the others were learned. What is sent to a topic whose task has
    ended counts as late and is NOT learned: --to sends it to a topic that is still to be learned. Letters that were sent are
    marked, and a second replay leaves them alone.
    """
    from streamlearn.stream import letters

    with _opened(config) as (log, sink, dead, state_dir):
        if to == dead:
            raise StreamlearnError(f"--to {to}: that is the dead-letter topic itself", code=2)
        found = letters.list_letters(log, dead)
        _report_skipped(found.skipped, dead)
        matching = [e for e in _matching(found.letters, topic, reason) if not e.replayed]
        if key is not None:
            if unknown := sorted(set(key) - {letter.key for letter in matching}):
                raise StreamlearnError(f"no letter {', '.join(unknown)} to be sent in topic {dead}")
            matching = [letter for letter in matching if letter.key in key]
        chosen = [letter for letter in matching if letter.attempts < max_attempts]
        if refused := len(matching) - len(chosen):
            print_error(f"{refused} letters were sent {max_attempts} times already (--max-attempts)")
        if not chosen:
            print_line("nothing to send")
            return
        partitions, unwritable = letters.target_partitions(sink, dead, chosen, to)
        if not partitions:
            raise next(iter(unwritable.values()))
        _warn_of_ended(state_dir, partitions)
        sent: list[Letter] = []
        if dry_run:
            reachable = [letter for letter in chosen if (to or letter.topic) in partitions]
            sent.extend(letter for _, _, group in letters.records_to_send(log, dead, reachable) for letter in group)
            _tell("would be sent", sent, to)
        else:
            _confirm(chosen, to, yes=yes)
            try:
                sent.extend(letters.replay(log, sink, dead, chosen, to, partitions))  # as far as it comes
            finally:
                _tell("sent", sent, to)
        if missing := len(chosen) - len(sent):
            how = "cannot be sent" if dry_run else "were not sent"
            whys = [str(error) for error in unwritable.values()]
            if missing > sum(letter.topic in unwritable for letter in chosen):
                whys.append("their bytes are gone, were cut, never were, or are not what the letter says")
            raise StreamlearnError(f"{missing} letters {how}: {'; '.join(whys[:3])}")


def _text(data: bytes) -> str:
    return printable(data.decode(errors="backslashreplace"))


def _clock(seconds: float, precision: Literal["seconds", "milliseconds"] = "milliseconds") -> str:
    """Return a time in ISO 8601, UTC; years beyond 9999, which producers may send, in its expanded form with a sign."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=precision)
    except (ValueError, OverflowError, OSError):
        from numpy import datetime64

        last = (1 << 63) - 1
        stamp = datetime64(max(-last, min(last, round(seconds * 1000))), "ms")
        text = str(stamp.astype("datetime64[s]") if precision == "seconds" else stamp)
        return f"{text if text.startswith('-') else '+' + text}+00:00"


def _tree(letter: Letter) -> dict[str, Any]:
    """Return a letter as `--json` shows it."""
    known = {**asdict(letter), "further": len(letter.indices) - 1}
    del known["value_key"], known["letter_partition"]
    return {**known, "rejected": _clock(letter.rejected), "timestamp": _clock(letter.timestamp)}


def _report_skipped(count: int, topic: str) -> None:
    if count:
        print_error(f"{count} records of topic {topic} look like letters and are none: skipped")


def _warn_of_ended(state_dir: Path, topics: Collection[str]) -> None:
    """Say which of these topics' tasks have ended, as far as the state directory knows."""
    try:
        tasks = read_status(state_dir).get("tasks", [])
    except StreamlearnError as error:
        if error.code != STOPPED:  # else nothing was learned here, so nothing has ended
            print_error(f"whether a task has ended is not known: {error}")
        return
    if ended := sorted(task["name"] for task in tasks if task["state"] != "active" and task["name"] in topics):
        which = f"topic {ended[0]} has" if len(ended) == 1 else f"topics {', '.join(ended)} have"
        print_error(
            f"warning: the task of {which} ended: what is sent there counts as late and is not learned; "
            "--to sends it to a topic that is still to be learned"
        )


def _matching(found: list[Letter], topic: str | None, reason: str | None) -> list[Letter]:
    from streamlearn.data import DEAD_LETTER_REASONS

    if reason not in {None, *DEAD_LETTER_REASONS}:
        raise StreamlearnError(f"--reason is {reason!r:.80}; expected one of {', '.join(DEAD_LETTER_REASONS)}", code=2)
    return [e for e in found if topic in {None, e.topic} and reason in {None, e.reason}]


def _tell(how: str, chosen: list[Letter], to: str | None) -> None:
    counts = Counter(to or letter.topic for letter in chosen)
    for name, count in sorted(counts.items()):
        print_line(f"{count} samples {how} to {name}")
    if not chosen:
        print_line(f"0 samples {how}")


def _confirm(chosen: list[Letter], to: str | None, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise StreamlearnError(
            "nobody is here to be asked: --yes sends them, --dry-run shows what would be sent", code=2
        )
    where = to or ", ".join(sorted({letter.topic for letter in chosen}))
    typer.confirm(f"Send {len(chosen)} samples to {where}?", abort=True)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Log, Sink, str, Path]]:
    """Give the log, connected, a sink, the dead-letter topic and the state directory of a configuration."""
    quiet_kafka()
    config = load_config(path)
    if config.source == "embedded" and not config.embedded.path.is_file():
        raise StreamlearnError(f"{config.embedded.path}: no such file", code=74)
    from streamlearn.daemon import open_log

    log, sink = open_log(config)
    try:
        log.connect()
        yield log, sink, config.dead_letter_topic, config.state_dir
    finally:
        log.close()
        sink.close()

"""The `streamlearn` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from streamlearn import __version__
from streamlearn.cli import checkpoints, config, dlq, lifecycle, predict, produce, reports, tasks, topics
from streamlearn.cli.common import JsonOption, print_error, print_json, print_line, to_streamlearn_error

app = typer.Typer(
    name="streamlearn",
    help="Learns task after task from Kafka topics without forgetting, and shows it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers in half the time
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(value: bool) -> None:
    """Print the version and exit, if the option is given."""
    if value:
        print_line(f"streamlearn {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Learns task after task from Kafka topics without forgetting, and shows it."""
    del version
    if debug:
        os.environ["STREAMLEARN_DEBUG"] = "1"


@app.command("version")
def version_command(json_: JsonOption = False) -> None:
    """Show the versions of streamlearn and its main dependencies."""
    import platform
    from importlib.metadata import version

    versions = {"streamlearn": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "kafka-python", "prometheus-client")}
    if json_:
        print_json(versions)
    else:
        for name, number in versions.items():
            print_line(f"{name} {number}")


lifecycle.add_to(app)
app.command()(topics.topics)
app.command()(produce.produce)
app.command()(predict.predict)
reports.add_to(app)
app.add_typer(checkpoints.app, name="checkpoint")
app.add_typer(dlq.app, name="dlq")
app.add_typer(tasks.app, name="task")
app.add_typer(config.app, name="config")


def main() -> None:
    """Run the command line; print an expected error as one line, and exit with its code."""
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("STREAMLEARN_DEBUG"))
    replace_closed_streams()
    try:
        app()
    except Exception as error:
        if isinstance(error, OSError):
            # stdout itself may have failed: without this the interpreter would flush it at exit, and print an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        if debug:
            raise
        failure = to_streamlearn_error(error)
        print_error(f"streamlearn: {failure}")
        sys.exit(failure.exit_code)


def replace_closed_streams() -> None:
    """Open /dev/null for standard streams that the caller closed (`>&-`).

    Otherwise a file or socket that is opened later gets their descriptor, and receives what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - stays open; gets the lowest free number

"""`streamlearn config`: check a file, show what is in force, give editors the schema."""

from __future__ import annotations

import typer

from streamlearn.cli.common import ConfigArgument, JsonOption, load_config, print_error, print_json, print_line

app = typer.Typer(help="Check a configuration, show the values in force, or the JSON Schema.", no_args_is_help=True)


@app.command()
def check(config: ConfigArgument) -> None:
    """Print every error with its key, value and what is accepted; 78 where there is one."""
    if (absent := load_config(config, warn=True).unreadable_secret()) is not None:
        print_error(f"warning: {absent}")
    print_line(f"{config}: fine")


@app.command()
def show(config: ConfigArgument, json_: JsonOption = False) -> None:
    """Print the values in force, secrets redacted."""
    tree = load_config(config).effective()
    if json_:
        print_json(tree)
    else:
        from streamlearn.configfile import dump

        for line in dump(tree).splitlines():
            print_line(line)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the file."""
    from streamlearn.configfile import schema as make_schema
    from streamlearn.strategies.recipes import RECIPES

    print_json(make_schema(RECIPES))

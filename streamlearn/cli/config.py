"""`streamlearn config`: check a configuration file, print the effective values, print the JSON Schema for editors."""

from __future__ import annotations

import typer

from streamlearn.cli.common import ConfigArgument, JsonOption, load_config, print_error, print_json, print_line

app = typer.Typer(
    help="Check a configuration file, print the effective values, or print the JSON Schema.", no_args_is_help=True
)


@app.command()
def check(config: ConfigArgument) -> None:
    """Check a file: print each error with its key, its value and what is accepted. The exit code is 78 if there is an error."""
    if (problem := load_config(config, warn=True).unreadable_secret()) is not None:
        print_error(f"warning: {problem}")
    print_line(f"{config}: valid")


@app.command()
def show(config: ConfigArgument, json_: JsonOption = False) -> None:
    """Print the effective values: those of the file, the environment and the defaults. Secrets are redacted."""
    tree = load_config(config).effective()
    if json_:
        print_json(tree)
    else:
        from streamlearn.config.loader import dump

        for line in dump(tree).splitlines():
            print_line(line)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the file, for completion in editors."""
    from streamlearn.config.schema import schema as make_schema
    from streamlearn.learning.strategies.recipes import RECIPES

    print_json(make_schema(RECIPES))

"""`streamlearn`, and `python -m streamlearn`: so small that Ctrl-C is understood from the first import on."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from streamlearn.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

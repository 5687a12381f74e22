"""The entry point of `streamlearn` and `python -m streamlearn`; small, so that Ctrl-C is handled even during imports."""

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

"""`python -m streamlearn`: the same as the `streamlearn` command."""

from streamlearn.cli.app import main

main()

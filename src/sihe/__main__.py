"""`python -m sihe` is the `sihe` command."""

from sihe.cli.main import main

main()

"""``python -m fastrl.cli``: the command, for launchers that take a module."""

from fastrl.cli.main import main

main()

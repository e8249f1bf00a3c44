"""The tables that demos print: no line is longer than a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WIDTH = 80


def print_rows(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout, its first column on the left and the others on the right; a longer title is broken between
    words."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=WIDTH)
    console.print(title, markup=False, highlight=False)
    console.print(table)

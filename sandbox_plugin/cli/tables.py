"""Tables and other lines for people: names from outside as they are, as far as they can be seen, lines as long as
they need to be.

Apart because names come from vendors, pci.ids and sysfs, and rich takes `[/b]` in them for markup and `:ab:` for an
emoji unless it is told not to.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from sandbox_plugin.cli.stdout import say, visible

_WIDER_THAN_ANY_LINE = 10_000
_BLANKS_AT_THE_END = re.compile(r" +(?=(?:\x1b\[[0-9;]*m)*$)")
"""Also those within the colours of a terminal."""


def plain_console(**options: Any) -> Console:
    """A console that replaces nothing in what it prints."""
    return Console(emoji=False, markup=False, highlight=False, **options)


def is_terminal() -> bool:
    """Whether stdout is one. rich believes so of a pipe too if FORCE_COLOR is set."""
    return sys.stdout is not None and sys.stdout.isatty()


def table(*columns: str) -> Table:
    """An empty table without a frame."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def add_row(made: Table, *cells: str | Text | Sequence[str]) -> None:
    """Adds a row of one-line cells; a sequence is a cell of several lines."""
    shown: list[str | Text] = []
    for cell in cells:
        if isinstance(cell, Text):
            shown.append(Text(visible(cell.plain), cell.style))
        else:
            shown.append("\n".join(map(visible, [cell] if isinstance(cell, str) else cell)))
    made.add_row(*shown)


def print_unfolded(*parts: RenderableType) -> None:
    """Prints lines and tables. A line that is too long is left for the terminal to wrap, as with kubectl."""
    printed = io.StringIO()
    console = plain_console(file=printed, width=_WIDER_THAN_ANY_LINE, force_terminal=is_terminal() or None)
    for part in parts:
        console.print(part)
    lines = printed.getvalue().removesuffix("\n").split("\n")
    say("\n".join(_BLANKS_AT_THE_END.sub("", line) for line in lines))

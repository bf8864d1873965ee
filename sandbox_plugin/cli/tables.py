"""Tables and other lines for people: names from outside as they are, lines as long as they need to be.

Apart because names come from vendors, pci.ids and sysfs, and rich takes `[/b]` in them for markup and `:ab:` for an
emoji unless it is told not to.
"""

from __future__ import annotations

import io
import re
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from sandbox_plugin.cli.stdout import say

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


def print_unfolded(*parts: RenderableType) -> None:
    """Prints lines and tables. A line that is too long is left for the terminal to wrap, as with kubectl."""
    printed = io.StringIO()
    console = plain_console(file=printed, width=_WIDER_THAN_ANY_LINE, force_terminal=is_terminal() or None)
    for part in parts:
        console.print(part)
    lines = printed.getvalue().removesuffix("\n").split("\n")
    say("\n".join(_BLANKS_AT_THE_END.sub("", line) for line in lines))

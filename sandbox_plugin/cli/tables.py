"""Tables and other lines for people: names from outside as they are, as far as they can be seen, in few colours.

Written without a library for it: the daemon's own process would have to load that as well, since structlog takes rich
wherever it is installed, and it would take a tenth of the time of a start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sandbox_plugin.cli.stdout import say, visible

_GAP = "  "
"""Between two columns."""
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "bold red": "1;31", "bold cyan": "1;36"}
"""Style -> its parameters of the terminal's SGR sequence (ECMA-48, 8.3.117)."""


class Styled(NamedTuple):
    """A text in one of the styles that `_CODES` has; none: as it is."""

    text: str
    style: str = ""


Part = str | Styled
Line = Sequence[Part]


def is_terminal() -> bool:
    """Whether stdout is one that can draw."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_colors() -> bool:
    """Whether stdout gets colours: not where a person has set NO_COLOR (no-color.org)."""
    return is_terminal() and not os.environ.get("NO_COLOR")


def text_of(line: Line) -> str:
    """A line without its styles."""
    return "".join(part if isinstance(part, str) else part.text for part in line)


def painted(line: Line, *, colors: bool) -> str:
    """A line as the terminal gets it. What a terminal would obey is made visible."""
    return "".join(_paint(part, colors) for part in line)


def _paint(part: Part, colors: bool) -> str:
    text, style = (part, "") if isinstance(part, str) else part
    text = visible(text)
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if colors and style and text else text


@dataclass
class Table:
    """A table without a frame: columns as wide as what is in them, the last one open."""

    columns: Sequence[str]
    rows: list[list[Part]] = field(default_factory=list)
    row_count: int = 0
    """Of those that were added: a row with a cell of several lines is several in `rows`."""

    def add_row(self, *cells: Part | Sequence[str]) -> None:
        """Adds a row of one-line cells; a list is a cell of several lines."""
        self.row_count += 1
        columns = [[cell] if isinstance(cell, str | Styled) else list(cell) for cell in cells]
        for number in range(max(map(len, columns))):
            self.rows.append([column[number] if number < len(column) else "" for column in columns])

    def lines(self) -> list[Line]:
        """The heading and the rows."""
        rows: list[list[Part]] = [[Styled(name, "bold") for name in self.columns], *self.rows]
        widths = [max(len(_visible(row[at])) for row in rows) for at in range(len(self.columns))]
        return [_aligned(row, widths) for row in rows]


def _visible(part: Part) -> str:
    return visible(text_of([part]))


def _aligned(row: Sequence[Part], widths: Sequence[int]) -> Line:
    filled = max((at for at, part in enumerate(row) if text_of([part])), default=0)
    line: list[Part] = []
    for part, width in zip(row[:filled], widths, strict=False):
        line += [part, " " * (width - len(_visible(part))) + _GAP]
    return [*line, row[filled]]


def print_unfolded(*parts: str | Table) -> None:
    """Prints lines and tables. A line that is too long is left for the terminal to wrap, as with kubectl."""
    colors = has_colors()
    lines: list[Line] = [line for part in parts for line in ([[part]] if isinstance(part, str) else part.lines())]
    say("\n".join(painted(line, colors=colors) for line in lines))

"""Tables and other lines for people: names from outside as they are, as far as they can be seen, in few colours.

Written without a library for it: the daemon's own process would have to load that as well, since structlog takes rich
wherever it is installed, and it would take a tenth of the time of a start.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sandbox_plugin.cli.stdout import say, visible

_GAP = "  "
"""Between two columns."""
_INDENT = "    "
"""Before what is said below a row."""
_NARROWEST = 40
_WITHOUT_TERMINAL = 80
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


def terminal_width() -> int:
    """How many columns a line has: those of the terminal, but not less than 40; 80 where stdout is none."""
    return max(shutil.get_terminal_size().columns, _NARROWEST) if is_terminal() else _WITHOUT_TERMINAL


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
    notes: dict[int, str] = field(default_factory=dict)
    """Number in `rows` -> what is said below it."""

    def add_row(self, *cells: Part | Sequence[str]) -> None:
        """Adds a row of one-line cells; a list is a cell of several lines."""
        self.row_count += 1
        columns = [[cell] if isinstance(cell, str | Styled) else list(cell) for cell in cells]
        for number in range(max(map(len, columns))):
            self.rows.append([column[number] if number < len(column) else "" for column in columns])

    def add_note(self, text: str) -> None:
        """Says something below the row that was added last."""
        self.notes[len(self.rows) - 1] = text

    @property
    def width(self) -> int:
        """Of its widest row."""
        return max(len(_visible(text_of(line))) for line in self._aligned_rows())

    @property
    def width_before_last(self) -> int:
        """Where the last column begins."""
        return self.without(self.columns[-1]).width + len(_GAP)

    def without(self, *names: str) -> Table:
        """The same without these columns."""
        kept = [at for at, name in enumerate(self.columns) if name not in names]
        rows = [[row[at] for at in kept] for row in self.rows]
        return Table([self.columns[at] for at in kept], rows, self.row_count, self.notes)

    def squeezed(self, name: str, width: int, *, least: int, from_the_left: bool = False) -> Table:
        """The same with the cells of one column cut, as far as rows of this width need it, but not below `least`."""
        at = self.columns.index(name)
        widest = max(len(_visible(row[at])) for row in self.rows)
        room = max(widest - max(self.width - width, 0), least)
        rows = [[*row[:at], _cut(row[at], room, from_the_left), *row[at + 1 :]] for row in self.rows]
        return Table(self.columns, rows, self.row_count, self.notes)

    def folded(self, width: int, *, least: int) -> Table:
        """The same with the cells of the last column in several lines, where rows of this width need it.

        It stays at least so many characters wide. Of a table without notes.
        """
        room = max(width - self.width_before_last, least)
        made = Table(self.columns, row_count=self.row_count)
        for *cells, last in self.rows:
            text, style = (last, "") if isinstance(last, str) else last
            first, *more = wrap(text, room)
            made.rows.append([*cells, Styled(first, style)])
            made.rows += [[*[""] * len(cells), Styled(line, style)] for line in more]
        return made

    def lines(self, width: int = sys.maxsize) -> list[Line]:
        """The heading, the rows, and the notes in lines of this width."""
        heading, *rows = self._aligned_rows()
        lines = [heading]
        for number, row in enumerate(rows):
            lines.append(row)
            if number in self.notes:
                lines += [[_INDENT, line] for line in wrap(self.notes[number], width - len(_INDENT))]
        return lines

    def _aligned_rows(self) -> list[Line]:
        rows: list[list[Part]] = [[Styled(name, "bold") for name in self.columns], *self.rows]
        widths = [max(len(_visible(row[at])) for row in rows) for at in range(len(self.columns))]
        return [_aligned(row, widths) for row in rows]


def wrap(text: str, width: int) -> list[str]:
    """A text in lines of this width. Names with a hyphen, such as vfio-pci, stay whole."""
    return textwrap.wrap(visible(text), width, break_on_hyphens=False) or [""]


def _cut(part: Part, room: int, from_the_left: bool) -> Part:
    text, style = (part, "") if isinstance(part, str) else part
    text = visible(text)
    if len(text) > room:
        text = f"…{text[len(text) - room + 1 :]}" if from_the_left else f"{text[: room - 1]}…"
    return Styled(text, style)


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
    print_lines([line for part in parts for line in ([[part]] if isinstance(part, str) else part.lines())])


def print_lines(lines: Sequence[Line]) -> None:
    """Prints lines, in colours where stdout takes them."""
    colors = has_colors()
    say("\n".join(painted(line, colors=colors) for line in lines))

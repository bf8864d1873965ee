"""The worked examples of docs/topology.md, so that whoever answers them can be held to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOC = Path(__file__).resolve().parents[2] / "docs/topology.md"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a table: a request on a preset, and the answer of each policy."""

    preset: str
    size: int
    available: tuple[str, ...] | None
    """None: everything."""
    must_include: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]
    """By policy, those that must be included first."""

    def __str__(self) -> str:
        rest = f" of {'-'.join(self.available)}" if self.available else ""
        return f"{self.preset}-{self.size}{rest}" + "".join(f" with {i}" for i in self.must_include)


def examples() -> list[Example]:
    """All of them, in the order of the doc."""
    found = []
    preset = ""
    for line in DOC.read_text().splitlines():
        if heading := re.fullmatch(r"### `(\S+)`", line):
            preset = heading[1]
        elif re.match(r"\| \d+ \| (all|[\d ]+) \|", line):
            size, available, must, packed, spread = (cell.strip() for cell in line.split("|")[1:6])
            found.append(
                Example(
                    preset,
                    int(size),
                    None if available == "all" else tuple(available.split()),
                    () if must == "-" else tuple(must.split()),
                    {"packed": tuple(packed.split()), "spread": tuple(spread.split())},
                )
            )
    return found

"""A page of metrics in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/) or in
OpenMetrics (https://prometheus.io/docs/specs/om/open_metrics_spec/). The two differ in what stands above the series.

Not by the Prometheus client: for 64 devices it takes 10 ms, which the loop would not have for pods, and this takes a
tenth of it. What is written here is held against the client's own parsers by a test, and against `promtool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sandbox_plugin.durations import BOUNDS, Durations
from sandbox_plugin.outputs.metrics.catalogue import Entry, Kind

_BOUNDS = [*map(repr, BOUNDS), "+Inf"]
_SPECIAL = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def labels(**pairs: str) -> str:
    """Labels of a series. Those of several calls make one list with a comma in between."""
    return ",".join([f'{name}="{value.translate(_SPECIAL)}"' for name, value in pairs.items()])


@dataclass(slots=True)
class Page:
    """All series of one scrape."""

    _lines: dict[Entry, list[str]] = field(default_factory=dict)

    def add(self, entry: Entry, labels: str = "", value: float = 1) -> None:
        """One series, with labels made by `labels`. A bool counts as 0 or 1."""
        self._line(entry, entry.name, labels, value)

    def add_durations(self, entry: Entry, labels: str, durations: Durations) -> None:
        """The series of one histogram."""
        cumulative, before = durations.cumulative, f"{labels}," if labels else ""
        for bound, count in zip(_BOUNDS, cumulative, strict=True):
            self._line(entry, f"{entry.name}_bucket", f'{before}le="{bound}"', count)
        self._line(entry, f"{entry.name}_sum", labels, durations.total)
        self._line(entry, f"{entry.name}_count", labels, cumulative[-1])

    def _line(self, entry: Entry, name: str, labels: str, value: float) -> None:
        self._lines.setdefault(entry, []).append(f"{name}{{{labels}}} {value + 0}\n")  # of a bool an int

    def render(self, entries: Sequence[Entry], *, openmetrics: bool) -> bytes:
        """The page, in the order of these entries. What OpenMetrics wants at its end is left out."""
        parts: list[str] = []
        for entry in entries:
            if entry in self._lines:
                name, kind = entry.name, "gauge" if entry.kind is Kind.INFO else entry.kind.value
                if openmetrics:
                    name, kind = name.removesuffix("_total").removesuffix("_info"), entry.kind.value
                help = f"{entry.help}.".translate(_SPECIAL)
                parts.append(f"# HELP {name} {help}\n# TYPE {name} {kind}\n")
                parts += self._lines[entry]
        return "".join(parts).encode()

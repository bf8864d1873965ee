"""Line charts as SVG, for the plots in docs/: written by hand, so that they need no library and change line by line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

Point = tuple[float, float]


def document(width: int, height: int, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#24292f">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def legend(x: float, y: float, colours: Mapping[str, str], step: int) -> list[str]:
    """The lines' names beside one another, each `step` wide."""
    parts = []
    for n, (name, colour) in enumerate(colours.items()):
        at = x + n * step
        parts.append(f'<path d="M{at} {y - 4}h22" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(at + 28, y, name))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """From which value to which an axis goes, and what is written at it."""

    low: float
    high: float
    ticks: Mapping[float, str]
    scale: Callable[[float], float] = float
    """`math.log` for a logarithmic axis."""

    def share(self, value: float) -> float:
        """How far along the axis a value is, from 0 to 1."""
        low, high = self.scale(self.low), self.scale(self.high)
        return (self.scale(value) - low) / (high - low)


def chart(
    corner: Point,
    size: Point,
    title: str,
    axes: tuple[Axis, Axis],
    lines: Mapping[str, Sequence[Point]],
    colours: Mapping[str, str],
) -> list[str]:
    """One chart with its upper left `corner` there. The last line is drawn first, so the first lies on top."""
    (x, y), (width, height), (across, up) = corner, size, axes
    parts = []
    for value, label in up.ticks.items():
        at = y + height * (1 - up.share(value))
        parts.append(f'<path d="M{x} {at:.1f}h{width}" stroke="#e3e6ea"/>')
        parts.append(text(x - 8, at + 4, label, anchor="end", grey=True, size=11))
    for value, label in across.ticks.items():
        parts.append(text(x + width * across.share(value), y + height + 18, label, anchor="middle", grey=True, size=11))
    parts.append(text(x - 40, y - 16, title))
    for name in reversed(list(lines)):
        points = [(x + width * across.share(px), y + height * (1 - up.share(py))) for px, py in lines[name]]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colours[name]}"/>' for px, py in points]
    return parts


def text(
    x: float, y: float, words: str, *, size: int = 12, bold: bool = False, grey: bool = False, anchor: str = "start"
) -> str:
    style = f'font-size="{size}"' + (' font-weight="bold"' if bold else "") + (' fill="#6e7781"' if grey else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(words)}</text>'

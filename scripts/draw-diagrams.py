#!/usr/bin/env python3
"""Draws docs/architecture.svg and docs/endpoint.svg: the path of a GPU through the daemon, and an endpoint's life.

scripts/draw-diagrams.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from charts import document, text

DOCS = Path(__file__).resolve().parent.parent / "docs"

INK, LINE, SIGNAL = "#24292f", "#57606a", "#b5520a"
OUTSIDE, IO, PURE, STATE = "#f0f1f3", "#dcebfa", "#d9f2e3", "#fff3d6"
_MARKERS = "".join(
    f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    f'<path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
    for name, colour in (("tip", LINE), ("signal", SIGNAL))
)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with a name, and lines that say more."""

    x: float
    y: float
    width: float
    height: float
    name: str
    more: Sequence[str] = ()
    colour: str = IO

    def draw(self) -> list[str]:
        middle, top = self.x + self.width / 2, self.y + self.height / 2 - 7.5 * len(self.more)
        return [
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6" fill="{self.colour}" '
            f'stroke="{LINE}"/>',
            text(middle, top + 4, self.name, anchor="middle", bold=True),
            *(text(middle, top + 20 + 15 * n, line, anchor="middle", size=11) for n, line in enumerate(self.more)),
        ]


def arrow(path: str, *, signal: bool = False, dashed: bool = False) -> str:
    colour, tip = (SIGNAL, "signal") if signal else (LINE, "tip")
    style = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#{tip})"{style}/>'


def notes(x: float, y: float, *lines: str, anchor: str = "middle") -> list[str]:
    return [text(x, y + 14 * n, line, anchor=anchor, grey=True, size=11) for n, line in enumerate(lines)]


def architecture() -> str:
    boxes = [
        Box(20, 150, 120, 110, "the host", ("sysfs, /dev/vfio,", "kernel events,", "inotify"), OUTSIDE),
        Box(200, 150, 130, 110, "host/", ("a scan reads", "the whole host:", "HostFacts"), IO),
        Box(390, 150, 140, 110, "inventory/", ("advance: what is", "offered, its health,", "who holds it"), PURE),
        Box(590, 150, 110, 110, "registry", ("one frozen", "snapshot"), PURE),
    ]
    readers = [
        ("kubelet/", "ListAndWatch, Allocate", "the kubelet"),
        ("cdi/", "specs in /var/run/cdi", "Kata, runtimes"),
        ("outputs/", "status, metrics, labels", "people, monitors"),
        ("dra/", "slices, claims (--dra)", "the API server"),
    ]
    parts = ["<defs>", _MARKERS, "</defs>"]
    parts.append(text(20, 34, "The path of a GPU: facts go one way, what readers learn comes back", size=18, bold=True))
    parts += [
        arrow("M140 222H198"),
        *notes(169, 240, "read on", "a thread"),
        arrow("M140 178H198", dashed=True),
        *notes(169, 157, "look again"),
        arrow("M330 205H388"),
        arrow("M530 205H588"),
    ]
    for n, (room, what, outside) in enumerate(readers):
        y = 70 + 72 * n
        boxes += [Box(760, y, 160, 54, room, (what,), IO), Box(980, y, 130, 54, outside, (), OUTSIDE)]
        parts += [arrow(f"M700 205H730V{y + 27}H758"), arrow(f"M920 {y + 27}H978")]
    parts += [
        arrow("M840 340V384H460V262", signal=True),
        *notes(650, 376, "signals: what was given, PodResources, what is in a spec"),
    ]
    for n, (colour, meaning) in enumerate(
        ((PURE, "pure: no I/O, no clock"), (IO, "I/O on the one loop, or on threads"), (OUTSIDE, "not ours"))
    ):
        x = 20 + 230 * n
        parts.append(f'<rect x="{x}" y="410" width="16" height="16" rx="3" fill="{colour}" stroke="{LINE}"/>')
        parts.append(text(x + 24, 422, meaning, size=11))
    return document(1130, 444, [*parts, *(line for box in boxes for line in box.draw())])


def endpoint() -> str:
    boxes = [
        Box(190, 90, 130, 56, "serving", ("makes its socket",), STATE),
        Box(420, 90, 140, 56, "registering", ("calls Register",), STATE),
        Box(680, 90, 150, 56, "registered", ("streams the list",), STATE),
        Box(560, 250, 130, 56, "lost", ("does not count now",), STATE),
    ]
    parts = ["<defs>", _MARKERS, "</defs>"]
    parts.append(text(20, 34, "An endpoint's life: one resource at the kubelet", size=18, bold=True))
    parts += [
        f'<circle cx="40" cy="118" r="7" fill="{INK}"/>',
        arrow("M48 118H188"),
        *notes(118, 88, "this plugin has the", "lock, and a device"),
        arrow("M320 118H418"),
        *notes(369, 102, "the socket", anchor="middle"),
        *notes(369, 136, "listens"),
        arrow("M560 118H678"),
        *notes(619, 88, "Register answered,", "ListAndWatch open"),
        arrow("M235 90C225 55 285 55 275 90"),
        *notes(255, 57, "cannot listen: backs off"),
        arrow("M470 90C460 55 520 55 510 90"),
        *notes(490, 57, "no kubelet.sock, refused, no answer, no stream: backs off"),
        arrow("M755 146V278H692"),
        *notes(765, 200, "kubelet.sock was", "replaced, our socket", "is gone, or a stream", "ended", anchor="start"),
        arrow("M560 270H490V148"),
        *notes(498, 200, "our socket is still there", anchor="start"),
        arrow("M560 290H230V148"),
        *notes(390, 284, "our socket is gone"),
        arrow("M450 146V180H280V148"),
        *notes(365, 174, "our socket is gone"),
    ]
    return document(900, 330, [*parts, *(line for box in boxes for line in box.draw())])


PICTURES = {"architecture.svg": architecture, "endpoint.svg": endpoint}


def main() -> None:
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw())


if __name__ == "__main__":
    main()

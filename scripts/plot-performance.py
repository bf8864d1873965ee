#!/usr/bin/env python3
"""Draws docs/performance.svg: how start and Allocate grow with the number of GPUs, of ours and of the reference plugin.

scripts/plot-performance.py        from what `just bench --json docs/performance.json` has written
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from charts import Axis, Point, chart, document, legend, text

DOCS = Path(__file__).resolve().parent.parent / "docs"

REFERENCE_START: list[Point] = [(4, 0.115), (16, 0.45), (256, 5.0), (1024, 18.0)]
"""Seconds by GPUs: a Go program, on a real kubelet and another machine, where `import asyncio` took 55 ms."""
REFERENCE_ALLOCATE: list[Point] = [(8, 0.33), (256, 0.35), (1024, 0.35)]
"""Milliseconds for one GPU, on the same machine."""

COLOURS = {"this plugin": "#0b7a4b", "the reference": "#b5520a"}
WIDTH, HEIGHT = 880, 340
PLOT = (340, 190)
TOP, LEFT, COLUMN = 104, 64, 428


def main() -> None:
    (DOCS / "performance.svg").write_text(plot((DOCS / "performance.json").read_text()))


def plot(figures: str) -> str:
    """`figures`: what the benchmark wrote."""
    medians = {figure["what"]: figure["value"] for figure in json.loads(figures)}
    start = [(gpus, ms / 1000) for gpus, ms in _by_gpus(medians, r"start to all Healthy, (\d+) GPUs")]
    allocate = _by_gpus(medians, r"Allocate of 1, (\d+) GPUs")
    gpus = Axis(low=4, high=4096, ticks={n: f"{n:,}" for n in (4, 16, 64, 256, 1024, 4096)}, scale=math.log)
    seconds = Axis(low=0.1, high=20, ticks={n: f"{n} s" for n in (0.1, 0.3, 1, 3, 10, 20)}, scale=math.log)
    milliseconds = Axis(low=0, high=3, ticks={n: f"{n} ms" for n in range(4)})
    parts = [
        text(24, 34, "The more GPUs, the longer? By the number of GPUs on the node", size=18, bold=True),
        *legend(24, 58, COLOURS, 120),
        text(330, 58, "Measured on two machines; the reference's was about 1.6 times as fast.", grey=True),
    ]
    starts, allocates = (
        {"this plugin": o, "the reference": r} for o, r in ((start, REFERENCE_START), (allocate, REFERENCE_ALLOCATE))
    )
    parts += chart((LEFT, TOP), PLOT, "Start until all are Healthy", (gpus, seconds), starts, COLOURS)
    parts += chart((LEFT + COLUMN, TOP), PLOT, "Allocate of one", (gpus, milliseconds), allocates, COLOURS)
    return document(WIDTH, HEIGHT, parts)


def _by_gpus(medians: dict[str, float], title: str) -> list[Point]:
    """What figures of this title say, by the number of GPUs in it."""
    found = ((re.fullmatch(title, what), value) for what, value in medians.items())
    return sorted((float(match[1]), value) for match, value in found if match)


if __name__ == "__main__":
    main()

"""A VFIO node, an IOMMU group and a PCI address are never in the hands of two pods at once.

Whatever resource name and number they were given by, and by whatever run of the plugin; and the hands of a VM that
outlives its pod count as well. A random search over the pure middle, in a world of its own (`helpers/world.py`).

`ONE_HOLDER_STEPS` makes the search longer; `just one-holder` does.
"""

from __future__ import annotations

import os

import pytest
from search import search

STEPS = int(os.environ.get("ONE_HOLDER_STEPS", "15000"))
_PARTS = 3


@pytest.mark.timeout(max(120, STEPS // 100))
@pytest.mark.parametrize("part", range(_PARTS))
def test_nothing_is_ever_in_two_hands_and_everything_is_offered_again(part: int) -> None:
    outcome = search(STEPS // _PARTS, first_seed=1_000_000 * part)
    assert outcome.failed is None, outcome.story()

"""One structure for many devices, by vote."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fleetune import sparsity, structures
from fleetune.architectures import Layout
from fleetune.structures import Structure


def voted(layout: Layout, found: Sequence[tuple[Structure, int]], reached: Sequence[float]) -> Structure:
    """One structure for devices of these structures and weights (their rows): what most of the weight has kept, at their median sparsity.

    The whole model where there are none. Of units with equal votes the lower number stays.
    """
    whole = structures.whole(layout)
    if not found:
        return whole
    votes = [[0.0] * group.units for group in layout.groups]
    for structure, weight in found:
        for group, bits in enumerate(structure.kept):
            for unit in structures.units(bits):
                votes[group][unit] += weight
    return structures.choose(layout, whole, sparsity.keeps(layout, statistics.median(reached)), votes)

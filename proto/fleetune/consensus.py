"""One structure for many devices, by vote."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fleetune import sparsity, structures
from fleetune.architectures import Layout
from fleetune.importances import Scores
from fleetune.structures import Structure

_BELOW_A_VOTE = 0.5
"""What importance adds to a unit's votes at the most: it decides among units with equally many."""


def voted(
    layout: Layout, found: Sequence[tuple[Structure, int]], reached: Sequence[float], scores: Sequence[Scores | None] = ()
) -> Structure:
    """One structure for devices of these structures and weights (their rows): what most of the weight has kept, at their median sparsity.

    The whole model where there are none. Of units with equal votes the one with the higher mean importance stays where `scores` has that of
    devices, in the same order (each group's scaled to a sum of 1, so that none of them speaks louder), and else the lower number.
    """
    whole = structures.whole(layout)
    if not found:
        return whole
    votes = [[0.0] * group.units for group in layout.groups]
    for structure, weight in found:
        for group, bits in enumerate(structure.kept):
            for unit in structures.units(bits):
                votes[group][unit] += weight
    told = [(own, weight) for (_, weight), own in zip(found, scores, strict=False) if own is not None]
    total = sum(weight for _, weight in told)
    for own, weight in told:
        for group, values in enumerate(own):
            scale = math.fsum(values)
            for unit, value in enumerate(values):
                votes[group][unit] += _BELOW_A_VOTE * weight / total * value / scale if scale > 0 else 0.0
    return structures.choose(layout, whole, sparsity.keeps(layout, statistics.median(reached)), votes)

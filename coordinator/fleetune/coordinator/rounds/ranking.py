"""Which triplets of a round's adapters stay, by the scores that came with its updates; pure.

The budget says how many may be alive after the round (`rounds.arbitration`), the scores say which. What is decided is part of the round's
record, and follows from the updates alone: a fold that is done again after a restart drops the same ones.

| symbol | name |
| --- | --- |
| r_m | `Ranks` |
| b_0, b_T | `RankSettings.first`, `RankSettings.end` of it |
| score_i | `Update.scores` |
| p_i | `Update.samples` |
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from fleetune.coordinator.domain import RankSettings, RoundEntry
from fleetune.coordinator.rounds import arbitration
from fleetune.coordinator.rounds.arbitration import Budget, Scored

Ranks = Mapping[str, int]
"""Module -> triplets that its adapter has; a module without any is not named."""

Alive = dict[str, str]
"""Module -> a 1 for each of its triplets that stays, a 0 for each that goes."""

SCORE_BYTES = 2


def decided(settings: RankSettings, rounds: int, entry: RoundEntry) -> Alive:
    """What stays of a round's triplets once its updates are folded. The same again for the same updates.

    A device whose scores are all 0, since none of its gradients could be used, has no say. Where nobody has one nothing goes, and
    what was due goes after a later round.
    """
    devices: list[Scored] = []
    for task in entry.trained():
        if task.update is not None:
            scores = unpacked(entry.ranks, task.update.scores)
            if any(value > 0 for values in scores.values() for value in values):
                devices.append(Scored(float(task.update.samples), scores))
    there = sum(entry.ranks.values())
    wanted = budget(settings, rounds).at(entry.number) if devices else there
    if wanted >= there:
        return {module: "1" * rank for module, rank in entry.ranks.items()}
    if settings.arbitration == "vote":
        alive = arbitration.by_vote(entry.ranks, devices, wanted, settings.threshold)
    else:
        alive = arbitration.by_score(entry.ranks, devices, wanted)
    return {module: "".join("1" if lives else "0" for lives in mask) for module, mask in alive.items()}


def budget(settings: RankSettings, rounds: int) -> Budget:
    """At least one triplet stays: without any there is no adapter to publish."""
    last = max(1, min(settings.first, round(settings.end * settings.first)))
    return Budget(settings.first, last, rounds, math.ceil(settings.warm_share * rounds), math.ceil(settings.final_share * rounds))


def left(alive: Mapping[str, str]) -> dict[str, int]:
    """The ranks after a decision."""
    counts = {module: mask.count("1") for module, mask in alive.items()}
    return {module: count for module, count in counts.items() if count}


def unpacked(ranks: Ranks, scores: str) -> dict[str, tuple[float, ...]]:
    """Scores by module, as `Update.scores` holds them: hex of float16, modules in the order of their names."""
    raw = bytes.fromhex(scores)
    found: dict[str, tuple[float, ...]] = {}
    begin = 0
    for module in sorted(ranks):
        end = begin + SCORE_BYTES * ranks[module]
        found[module] = struct.unpack(f"<{ranks[module]}e", raw[begin:end])
        begin = end
    return found


def objection(ranks: Ranks, scores: Mapping[str, bytes]) -> str:
    """Why scores that came from the network cannot be those of a round's triplets, for a person; empty where they can."""
    if strange := sorted(scores.keys() ^ ranks.keys()):
        has = "scores" if strange[0] in scores else "no scores"
        return f"the update has {has} of {strange[0][:200]!r}; those of the round's {len(ranks)} modules are asked for."
    for module, raw in sorted(scores.items()):
        if len(raw) != SCORE_BYTES * ranks[module]:
            asked = f"{SCORE_BYTES} for each of its {ranks[module]} triplets are asked for."
            return f"the update has {len(raw)} bytes of scores of {module!r}; {asked}"
        for value in struct.unpack(f"<{ranks[module]}e", raw):
            if not 0 <= value < math.inf:
                return f"the update scores a triplet of {module!r} with {value:g}; numbers at or above 0 are asked for."
    return ""


def packed(scores: Mapping[str, bytes]) -> str:
    """Of scores without an objection, as `Update.scores` holds them."""
    return b"".join(scores[module] for module in sorted(scores)).hex()

"""The planning problem: blocks in depth order, devices with their times, memory and links, and one shared uplink.

| paper or field | here | unit | meaning |
| --- | --- | --- | --- |
| K, L | `len(devices)`, `len(blocks)` | | devices; blocks, the first next to the loss, the last next to the embeddings |
| t[k,l] | `ready_s` | s | everything before the upload starts: download, forward, backward from the loss down to block l |
| D[l] | `payload_bits` | bit | what is uploaded for block l |
| s[k] | `bits_per_unit` | bit/s per unit | what one unit of the shared resource carries for device k |
| P g / N0 | `snr_hz` | Hz | power-limited radio: the rate is b log2(1 + snr_hz / b) instead of b s[k]; NaN where it is not |
| B, b[k] | `total`, shares | Hz, bit/s or share of airtime | the shared resource |
| cap[k] | `max_share` | the same | most of the resource that device k can use; infinite where nothing bounds it |

In a Transformer's own numbering, layer 0 is next to the embeddings: block l (from 1) is layer L - l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from fleetune.errors import ConfigError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.intp]

ResourceKind = Literal["bit/s", "hz", "airtime"]


@dataclass(frozen=True, eq=False)
class Fleet:
    """One planning problem; arrays are (K, L), (K,) or (L,) as said in the table above.

    Times may be infinite (the device cannot do it); everything else is finite but `max_share`. Raises ConfigError for shapes and
    numbers that make no sense; files are checked with more words by `planfile`.
    """

    blocks: tuple[str, ...]
    devices: tuple[str, ...]
    ready_s: Floats
    fits: Bools
    payload_bits: Floats
    bits_per_unit: Floats
    snr_hz: Floats
    max_share: Floats
    rounds_since_trained: Floats
    total: float
    kind: ResourceKind = "bit/s"

    def __post_init__(self) -> None:
        counts = (len(self.devices), len(self.blocks))
        for name, values, shape in (
            ("ready_s", self.ready_s, counts),
            ("fits", self.fits, counts),
            ("payload_bits", self.payload_bits, counts[1:]),
            ("bits_per_unit", self.bits_per_unit, counts[:1]),
            ("snr_hz", self.snr_hz, counts[:1]),
            ("max_share", self.max_share, counts[:1]),
            ("rounds_since_trained", self.rounds_since_trained, counts[1:]),
        ):
            if values.shape != shape:
                raise ConfigError(f"{name} has shape {values.shape}; {counts[0]} devices and {counts[1]} blocks need {shape}.")
        for name, values in (("ready_s", self.ready_s), ("max_share", self.max_share)):
            if not bool((values >= 0).all()):
                raise ConfigError(f"{name} holds a negative number or NaN; 0 or more is allowed.")
        for name, values in (
            ("payload_bits", self.payload_bits),
            ("bits_per_unit", self.bits_per_unit),
            ("snr_hz", self.snr_hz[~np.isnan(self.snr_hz)]),
            ("rounds_since_trained", self.rounds_since_trained),
            ("total", np.array([self.total])),
        ):
            if not bool(((values >= 0) & np.isfinite(values)).all()):
                raise ConfigError(f"{name} holds a number that is negative or not finite; 0 or more is allowed.")

    def only(self, devices: Sequence[int] | Ints, blocks: Sequence[int] | Ints) -> Fleet:
        """The same problem with these devices and blocks alone, in this order; a block that stands twice is a replica."""
        rows, columns = np.asarray(devices, dtype=np.intp), np.asarray(blocks, dtype=np.intp)
        return replace(
            self,
            blocks=tuple(self.blocks[block] for block in cast("Sequence[int]", columns.tolist())),
            devices=tuple(self.devices[device] for device in cast("Sequence[int]", rows.tolist())),
            ready_s=self.ready_s[np.ix_(rows, columns)],
            fits=self.fits[np.ix_(rows, columns)],
            payload_bits=self.payload_bits[columns],
            bits_per_unit=self.bits_per_unit[rows],
            snr_hz=self.snr_hz[rows],
            max_share=self.max_share[rows],
            rounds_since_trained=self.rounds_since_trained[columns],
        )

    def by_name(self) -> Fleet:
        """The same problem with its devices in the order of their names: ties must not depend on who registered first."""
        order = sorted(range(len(self.devices)), key=lambda device: self.devices[device])
        return self.only(order, range(len(self.blocks)))

    def without(self, device: str) -> Fleet:
        """The same problem after a device has left. An unknown name changes nothing."""
        stay = [index for index, name in enumerate(self.devices) if name != device]
        return self.only(stay, range(len(self.blocks)))

    def replicated(self, counts: Sequence[int]) -> Fleet:
        """The problem in which block l is trained by counts[l] devices (0 leaves it out); their gradients are to be averaged."""
        if len(counts) != len(self.blocks) or any(count < 0 for count in counts):
            raise ConfigError(f"replica counts {list(counts)[:20]} do not fit {len(self.blocks)} blocks; one count of 0 or more each.")
        columns = [block for block, count in enumerate(counts) for _ in range(count)]
        return self.only(range(len(self.devices)), columns)

    def forbidding(self, forbidden: Bools) -> Fleet:
        """The same problem without the pairs marked in `forbidden` (K, L)."""
        return replace(self, fits=self.fits & ~forbidden)

    @property
    def usable(self) -> Bools:
        """Pairs (K, L) that end at all if they are given enough time: the block fits, and its payload can be sent."""
        sends = (np.where(np.isnan(self.snr_hz), self.bits_per_unit, self.snr_hz) > 0) & (self.max_share > 0) & (self.total > 0)
        return cast("Bools", self.fits & np.isfinite(self.ready_s) & (sends[:, None] | (self.payload_bits == 0)[None, :]))


def fleet_of(
    ready_s: npt.ArrayLike,
    payload_bits: npt.ArrayLike,
    bits_per_unit: npt.ArrayLike,
    total: float,
    *,
    fits: npt.ArrayLike | None = None,
    snr_hz: npt.ArrayLike | None = None,
    max_share: npt.ArrayLike | None = None,
    rounds_since_trained: npt.ArrayLike | None = None,
    devices: Sequence[str] | None = None,
    blocks: Sequence[str] | None = None,
    kind: ResourceKind = "bit/s",
) -> Fleet:
    """A fleet from arrays, with names and what is optional filled in.

    >>> fleet = fleet_of([[1.0, 2.0], [3.0, 4.0]], [1e6, 1e6], [1.0, 1.0], 2e6)
    >>> fleet.devices, fleet.blocks
    (('d0', 'd1'), ('block.0', 'block.1'))
    """
    times = np.array(ready_s, dtype=np.float64)
    if times.ndim != 2:
        raise ConfigError(f"ready_s has {times.ndim} dimensions; two are needed, devices by blocks.")
    device_count, block_count = times.shape
    width = max(len(str(device_count - 1)), 1)
    return Fleet(
        blocks=tuple(blocks) if blocks is not None else tuple(f"block.{index}" for index in range(block_count)),
        devices=tuple(devices) if devices is not None else tuple(f"d{index:0{width}}" for index in range(device_count)),
        ready_s=times,
        fits=np.ones(times.shape, dtype=np.bool_) if fits is None else np.array(fits, dtype=np.bool_),
        payload_bits=np.array(payload_bits, dtype=np.float64),
        bits_per_unit=np.array(bits_per_unit, dtype=np.float64),
        snr_hz=_or_else(snr_hz, device_count, np.nan),
        max_share=_or_else(max_share, device_count, np.inf),
        rounds_since_trained=_or_else(rounds_since_trained, block_count, 0.0),
        total=float(total),
        kind=kind,
    )


def _or_else(values: npt.ArrayLike | None, count: int, missing: float) -> Floats:
    return np.full(count, missing) if values is None else np.array(values, dtype=np.float64)

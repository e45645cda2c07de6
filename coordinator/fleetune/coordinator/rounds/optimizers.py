"""Server optimisers: how the mean of the devices' deltas moves the global state.

FedAvgM: Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification".
FedAdam and FedYogi: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.

| paper | here | meaning |
| --- | --- | --- |
| Delta_t | `delta` | pseudo-gradient: the weighted mean of the devices' deltas |
| eta | `learning_rate` | server step |
| beta | `momentum` | FedAvgM: how much of m is kept |
| beta_1, beta_2 | `beta1`, `beta2` | decay of the first and the second moment |
| tau | `tau` | adaptivity: smaller adapts more |
| m_t, v_t | `moments[:, 0]`, `moments[:, 1]` | first and second moment |

FedAvgM: m = beta m + Delta; x += eta m. Others: m = beta_1 m + (1 - beta_1) Delta; x += eta m / (sqrt(v) + tau), with
FedAdam: v = beta_2 v + (1 - beta_2) Delta^2, and FedYogi: v = v - (1 - beta_2) Delta^2 sign(v - Delta^2).
As in Algorithm 2, there is no bias correction, m starts at 0 and v at tau^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fleetune.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FedAvgM:
    """Momentum on the server."""

    kind: ClassVar[str] = "fedavgm"
    moments: ClassVar[int] = 1
    learning_rate: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)
        _check_decay("momentum", self.momentum)

    def initial(self) -> tuple[float, ...]:
        """Each moment of a coordinate that has never been covered."""
        return (0.0,)

    def step(self, delta: Floats, moments: Floats, scratch: Floats) -> None:
        """Update `moments` (n, 1) and turn `delta` (n,) into the change of the state, both in place."""
        m = moments[:, 0]
        m *= self.momentum
        m += delta
        np.multiply(m, self.learning_rate, out=delta)


@dataclass(frozen=True)
class _Adaptive:
    """What FedAdam and FedYogi share; they differ in the second moment."""

    moments: ClassVar[int] = 2
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_positive("learning_rate", self.learning_rate)
        _check_decay("beta1", self.beta1)
        _check_decay("beta2", self.beta2)
        _check_positive("tau", self.tau)

    def initial(self) -> tuple[float, ...]:
        """Each moment of a coordinate that has never been covered."""
        return (0.0, self.tau**2)

    def step(self, delta: Floats, moments: Floats, scratch: Floats) -> None:
        """Update `moments` (n, 2) and turn `delta` (n,) into the change of the state, both in place; `scratch` (n,) is overwritten."""
        m, v = moments[:, 0], moments[:, 1]
        np.multiply(delta, 1.0 - self.beta1, out=scratch)
        m *= self.beta1
        m += scratch
        np.multiply(delta, delta, out=delta)
        self._second(v, delta, scratch)
        np.sqrt(v, out=scratch)
        scratch += self.tau
        np.divide(m, scratch, out=delta)
        delta *= self.learning_rate

    def _second(self, v: Floats, squared: Floats, scratch: Floats) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class FedAdam(_Adaptive):
    """Adam on the server."""

    kind: ClassVar[str] = "fedadam"

    def _second(self, v: Floats, squared: Floats, scratch: Floats) -> None:
        np.multiply(squared, 1.0 - self.beta2, out=scratch)
        v *= self.beta2
        v += scratch


@dataclass(frozen=True)
class FedYogi(_Adaptive):
    """Yogi on the server: the second moment forgets large steps slowly."""

    kind: ClassVar[str] = "fedyogi"

    def _second(self, v: Floats, squared: Floats, scratch: Floats) -> None:
        np.subtract(v, squared, out=scratch)
        np.sign(scratch, out=scratch)
        scratch *= squared
        scratch *= 1.0 - self.beta2
        v -= scratch


ServerOptimizer = FedAvgM | FedAdam | FedYogi
OPTIMIZERS: Mapping[str, type[FedAvgM] | type[FedAdam] | type[FedYogi]] = {cls.kind: cls for cls in (FedAvgM, FedAdam, FedYogi)}


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"The server optimiser's {name} is {value}; a finite number above 0 is needed.")


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"The server optimiser's {name} is {value}; a number from 0 to below 1 is needed.")

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

AdamW, for gradients: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2.

| paper | here | meaning |
| --- | --- | --- |
| g_t | `gradient` | the mean of the devices' gradients, clipped |
| eta_t alpha | `learning_rate` | rate of this round, its schedule included |
| lambda | `weight_decay`, times the rate as in torch | pull to 0 |
| beta_1, beta_2, epsilon | `beta1`, `beta2`, `epsilon` | |
| t | `steps` | steps that this tensor has taken, this one included |

m = beta_1 m + (1 - beta_1) g; v = beta_2 v + (1 - beta_2) g^2; both start at 0; with m' = m / (1 - beta_1^t), v' = v / (1 - beta_2^t):
x = x (1 - rate lambda) - rate m' / (sqrt(v') + epsilon). A tensor without a gradient takes no step: nothing of it decays.
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


@dataclass(frozen=True)
class AdamW:
    """What torch.optim.AdamW does after torch.nn.utils.clip_grad_norm_, in float64; its moments are kept in float32."""

    kind: ClassVar[str] = "adamw"
    moments: ClassVar[int] = 2
    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    """Of all gradients together; 0 leaves them as they are."""

    def __post_init__(self) -> None:
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"The server optimiser's {name} is {value}; a finite number of 0 or more is needed.")
        _check_decay("beta1", self.beta1)
        _check_decay("beta2", self.beta2)
        _check_positive("epsilon", self.epsilon)

    def initial(self) -> tuple[float, ...]:
        """Each moment of a coordinate that has taken no step."""
        return (0.0, 0.0)

    def clip(self, norm: float) -> float:
        """The factor for gradients whose norm is `norm`."""
        # torch's own small number: without it the results would differ in the sixth digit.
        return min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm > 0 else 1.0

    def step(self, gradient: Floats, moments: Floats, weights: Floats, scratch: Floats, steps: int) -> None:
        """Update `moments` (n, 2) and `weights` (n,) in place; `gradient` (n,) and `scratch` (n,) are overwritten."""
        m, v = moments[:, 0], moments[:, 1]
        np.multiply(gradient, 1.0 - self.beta1, out=scratch)
        m *= self.beta1
        m += scratch
        np.multiply(gradient, gradient, out=gradient)
        gradient *= 1.0 - self.beta2
        v *= self.beta2
        v += gradient
        np.sqrt(v, out=gradient)
        gradient /= math.sqrt(1.0 - self.beta2**steps)
        gradient += self.epsilon
        np.divide(m, gradient, out=scratch)
        scratch *= self.learning_rate / (1.0 - self.beta1**steps)
        weights *= 1.0 - self.learning_rate * self.weight_decay
        weights -= scratch


ServerOptimizer = FedAvgM | FedAdam | FedYogi
OPTIMIZERS: Mapping[str, type[FedAvgM] | type[FedAdam] | type[FedYogi]] = {cls.kind: cls for cls in (FedAvgM, FedAdam, FedYogi)}


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"The server optimiser's {name} is {value}; a finite number above 0 is needed.")


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"The server optimiser's {name} is {value}; a number from 0 to below 1 is needed.")

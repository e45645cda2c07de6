"""The methods this coordinator knows, by name."""

from __future__ import annotations

from fleetune.coordinator.methods import deft, echo, fedara, fedavg_lora, fedspine
from fleetune.coordinator.methods.base import Method

_ALL: tuple[Method, ...] = (deft.METHOD, echo.METHOD, fedara.METHOD, fedavg_lora.METHOD, fedspine.METHOD)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}

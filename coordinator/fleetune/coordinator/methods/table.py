"""The methods this coordinator knows, by name."""

from __future__ import annotations

from fleetune.coordinator.methods import deft, echo, fedavg_lora, fedspine
from fleetune.coordinator.methods.base import Method

METHODS: dict[str, Method] = {method.name: method for method in (deft.METHOD, echo.METHOD, fedavg_lora.METHOD, fedspine.METHOD)}

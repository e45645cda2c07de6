"""The ways to run a testbed, by name; each is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import cast

from fleetune.coordinator.testbed.backend import Backend, Place

BACKENDS: dict[str, str] = {
    "compose": "fleetune.coordinator.testbed.compose:ComposeBackend",
    "netns": "fleetune.coordinator.testbed.netns:NetnsBackend",
    "process": "fleetune.coordinator.testbed.process:ProcessBackend",
}


def make(name: str, place: Place) -> Backend:
    """The backend of that name, which has touched nothing yet."""
    module, _, symbol = BACKENDS[name].partition(":")
    return cast("Backend", getattr(importlib.import_module(module), symbol)(place))

"""Names of the methods that this agent can compute, without importing any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fleetune.errors import UnsupportedError

if TYPE_CHECKING:
    from fleetune.agent.methods.work import Trained, Work
    from fleetune.child.entry import Emit
    from fleetune.v1 import messages_pb2

METHODS: Mapping[str, str] = {
    "deft": "fleetune.agent.methods.deft",
    "echo": "fleetune.agent.methods.echo",
    "fedara": "fleetune.agent.methods.fedara",
    "fedavg_lora": "fleetune.agent.methods.fedavg_lora",
    "fedspine": "fleetune.agent.methods.fedspine",
}


@dataclass(frozen=True)
class Method:
    """The two functions of a method module."""

    train: Callable[[Work, Emit], Trained]
    evaluate: Callable[[Work, Emit], messages_pb2.Evaluation]


def load(name: str) -> Method:
    """Imports a method's module. Raises UnsupportedError for a name that is not in the table."""
    if name not in METHODS:
        raise UnsupportedError(
            f"This agent does not know the method {name!r}; it knows {', '.join(sorted(METHODS))}.",
            "Update Fleetune on this device.",
        )
    module = importlib.import_module(METHODS[name])
    return cast("Method", module)  # a module with these two functions has this shape; a test holds every row to it

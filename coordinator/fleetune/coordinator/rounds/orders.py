"""What passes between the engine and the transport: tasks out, and the receipts of what comes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from google.protobuf.message import Message

from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.job import LiveJob

ReceiptStatus = Literal["accepted", "duplicate", "late", "refused"]


@dataclass(frozen=True)
class Receipt:
    status: ReceiptStatus
    reason: str = ""


@dataclass(frozen=True)
class Order:
    """A task as it leaves the engine for the transport."""

    command: machine.SendTask
    job: LiveJob
    payload: Message
    deadline_s: float
    uplink_bits_per_s: float = 0.0
    """The rate of its upload by the round's plan; 0 is no bound."""


class Dispatcher(Protocol):
    """The transport's side: calls return at once; a device that is not connected gets it when it is back."""

    def send_task(self, order: Order) -> None: ...

    def withdraw(self, device_id: str, task_id: str, reason: str) -> None: ...

    def set_uplink(self, device_id: str, task_id: str, bits_per_s: float) -> None:
        """From now on the task's update is sent at this rate; 0 is no bound. Lost where the device is not connected."""
        ...

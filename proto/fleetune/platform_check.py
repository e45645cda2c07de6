"""Whether this Python can run Fleetune at all: 64-bit userlands only."""

from __future__ import annotations

import platform
import struct

from fleetune.errors import UnsupportedError


def require_64bit() -> None:
    """Raise UnsupportedError in a 32-bit userland. Call before importing grpc or numpy, which have no wheels there."""
    reason = why_unsupported(struct.calcsize("P"), platform.machine())
    if reason:
        raise UnsupportedError(reason, "Install a 64-bit system (for a Raspberry Pi: Raspberry Pi OS 64-bit) and its own Python.")


def why_unsupported(pointer_bytes: int, machine: str) -> str:
    """Empty where supported. A 64-bit kernel under a 32-bit userland says aarch64, so the pointer size decides, not the machine."""
    if pointer_bytes >= 8:
        return ""
    return (
        f"This Python is a {pointer_bytes * 8}-bit build on {machine or 'this machine'}; Fleetune needs 64 bits, as PyTorch and NumPy do."
    )

"""The one exception root: errors that a person can act on."""

from __future__ import annotations


class FleetuneError(Exception):
    """Says what is wrong, with which value, what is allowed, and what to do.

    `message` is one sentence; `remedy` tells the next step and may be empty.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()


class ConfigError(FleetuneError):
    """A configuration file or setting cannot be used."""


class DataError(FleetuneError):
    """Rows do not meet the job's data contract, or there are none."""


class ModelError(FleetuneError):
    """Base, adapter and targets do not fit together."""


class NotFiniteError(FleetuneError):
    """A loss or an update became NaN or Inf."""


class WireError(FleetuneError):
    """Bytes from the other side break the protocol: wrong checksum, size, layout or order."""


class DiskFullError(FleetuneError):
    """No space left where the state lies."""


class DurabilityError(FleetuneError):
    """A flush to disk failed: nothing is known of what was written since the last one, so the process must end."""


class UnreachableError(FleetuneError):
    """The other side does not answer."""


class UnsupportedError(FleetuneError):
    """This installation lacks what the request needs."""

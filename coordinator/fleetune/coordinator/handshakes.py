"""What the server shows and takes in TLS handshakes, and how that changes under it without a cut."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc


@dataclass(frozen=True)
class Offer:
    """Key, certificate chain and the roots of those who may come in; all PEM."""

    key: bytes = field(repr=False)
    chain: bytes
    roots: bytes


class Handshakes:
    """Credentials whose content may be replaced: connections stay, and the next handshake takes the new."""

    def __init__(self, offer: Offer, look: Callable[[], None] | None = None) -> None:
        """`look` is called at every handshake, on a thread of gRPC's, and may replace the offer for it. It must raise nothing."""
        self._offer = offer
        self._look = look
        self._version = 0
        self._lock = threading.Lock()

    def replace(self, offer: Offer) -> None:
        with self._lock:
            if offer != self._offer:
                self._offer, self._version = offer, self._version + 1

    def credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        """For one server. `mutual`: nobody comes in without a certificate from one of the roots."""
        told = self._version

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal told
            if self._look is not None:
                self._look()
            with self._lock:
                if told == self._version:
                    return None
                told = self._version
                return _configuration(self._offer, mutual)

        first = _configuration(self._offer, mutual)
        return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=mutual)  # type: ignore[arg-type]  # None: unchanged


def _configuration(offer: Offer, mutual: bool) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(offer.key, offer.chain)], offer.roots if mutual else None)

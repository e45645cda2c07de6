"""Twenty coordinators that are started on one state folder at once: one of them serves, the others say why they do not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleetune.v1 import control_pb2
from support.fleet import Fleet, FleetError

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

STARTS = 20


def entered(fleet: Fleet) -> bool:
    """False where its coordinator ended before any was ready."""
    try:
        fleet.__enter__()
    except FleetError:
        return False
    return True


def test_of_twenty_parallel_starts_exactly_one_lives(tmp_path: Path) -> None:
    fleets = [Fleet(tmp_path, {}, plaintext=True) for _ in range(STARTS)]
    with ThreadPoolExecutor(STARTS) as pool:
        waiting = [fleet for fleet, there in zip(fleets, pool.map(entered, fleets), strict=True) if there]
    try:
        # Those that were slower than the first to be ready have found its address, and are about to end.
        waiting[0].poll(lambda: sum(fleet.alive("coordinator") for fleet in fleets) == 1, "all but one to end")
        (living,) = [fleet for fleet in fleets if fleet.alive("coordinator")]
        assert living.control.ServerInfo(control_pb2.ServerInfoRequest(), timeout=180).protocol_major == 1
        codes = {fleet.wait_exit("coordinator") for fleet in fleets if fleet is not living}
        assert 0 not in codes and not any(code < 0 for code in codes), codes
        log = living.log_of("coordinator")
        assert log.count(str(living.pid("coordinator"))) >= 1
        assert "Traceback" not in log
    finally:
        for fleet in waiting:
            fleet.__exit__(None, None, None)

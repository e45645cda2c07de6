"""What a coordinator says is held within what clocks and the outbox can take."""

from __future__ import annotations

import math

import pytest

from fleetune.agent import convert
from fleetune.errors import WireError
from fleetune.v1 import fleet_pb2, messages_pb2


@pytest.mark.parametrize("said", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e300])
def test_whatever_times_a_coordinator_wishes_the_agents_clocks_can_keep_them(said: float) -> None:
    welcome = convert.welcome(fleet_pb2.Welcome(heartbeat_s=said, lease_s=said))
    assert 0.05 <= welcome.heartbeat_s <= convert.HEARTBEAT_S_MAX
    assert 2 * welcome.heartbeat_s <= welcome.lease_s <= convert.LEASE_S_MAX


@pytest.mark.parametrize("said", [math.nan, math.inf, -1.0])
def test_a_model_is_kept_warm_for_a_time_that_ends(said: float) -> None:
    message = messages_pb2.Task(task_id="t", kind=messages_pb2.TASK_KIND_TRAIN, keep_warm_s=said)
    assert 0 <= convert.task(message, epoch=1).keep_warm_s <= convert.KEEP_WARM_S_MAX


def test_a_size_that_the_outbox_cannot_hold_is_refused() -> None:
    message = messages_pb2.Task(task_id="t", kind=messages_pb2.TASK_KIND_TRAIN)
    message.state.digest, message.state.size_bytes = "0" * 64, 2**63
    with pytest.raises(WireError, match=str(2**63)):
        convert.task(message, epoch=1)

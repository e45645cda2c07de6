"""What children are told of threads."""

from __future__ import annotations

from fleetune.child import threads


def test_threads_that_wait_do_not_spin() -> None:
    assert threads.environment(2, {}) == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


def test_without_a_number_the_child_counts_its_cores_itself() -> None:
    assert "OMP_NUM_THREADS" not in threads.environment(0, {})


def test_what_an_owner_has_set_is_left_alone() -> None:
    assert "OMP_WAIT_POLICY" not in threads.environment(2, {"OMP_WAIT_POLICY": "active"})

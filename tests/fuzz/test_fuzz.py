"""Every reader of untrusted bytes keeps its promises for some thousands of inputs; bench/fuzz.py is the long form."""

from __future__ import annotations

import pytest

from support import fuzz_engine, fuzz_table, fuzz_targets

EXECUTIONS = 16_000
"""Of all targets together; the slowest takes a millisecond for one."""


@pytest.mark.parametrize("name", fuzz_table.TARGETS)
def test_whatever_bytes_come_the_reader_keeps_its_promises(name: str) -> None:
    kind = fuzz_table.TARGETS[name]
    target = kind()
    try:
        shares = sum(other.share for other in fuzz_table.TARGETS.values())
        outcome = fuzz_engine.fuzz(target, EXECUTIONS * kind.share // shares, seed=1)
    finally:
        target.close()
    for crash in outcome.crashes:
        raise AssertionError(f"{name} broke its promise for {crash.data!r}") from crash.error
    # An engine that only makes what is refused at the first byte would find nothing either.
    assert outcome.outcomes > 10


@pytest.mark.parametrize("name", fuzz_table.TARGETS)
def test_the_seeds_are_taken_and_each_says_something_else(name: str) -> None:
    target = fuzz_table.TARGETS[name]()
    try:
        answers = [target.run(seed) for seed in target.seeds()]
    finally:
        target.close()
    assert len(set(answers)) > len(answers) // 2
    assert not any(answer.startswith("WireError") for answer in answers)


class _Broken(fuzz_engine.Target):
    """A reader with a planted bug each: it raises, hangs, or takes memory, on inputs that a mutation finds."""

    name = "broken"
    words = (b"crash", b"hang", b"eat")
    memory_bytes_max = 1 << 20

    def seeds(self) -> list[bytes]:
        return [b"some words"]

    def run(self, data: bytes) -> str:
        if b"crash" in data:
            raise KeyError("planted")
        if b"eat" in data:
            return f"ate {len(bytearray(2 << 20))}"
        while b"hang" in data:
            pass
        return "fine"


def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_engine, "HANG_S", 0.05)
    outcome = fuzz_engine.fuzz(_Broken(), 5000, seed=1, crashes_max=40)
    assert {type(crash.error) for crash in outcome.crashes} == {KeyError, fuzz_engine.HangError, fuzz_engine.MemoryBoundError}


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, second = (fuzz_engine.fuzz(fuzz_targets.TensorHeader(), 500, seed=3).corpus for _ in range(2))
    assert first == second

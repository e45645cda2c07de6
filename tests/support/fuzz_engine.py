"""A seeded mutation fuzzer without any instrumentation: what a target answers, not its branches, tells which inputs are worth keeping."""

from __future__ import annotations

import abc
import random
import signal
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

HANG_S = 5.0
"""No input may take more of a processor; those here are a few kilobytes."""

BLOCKED_FACTOR = 12
"""So many times that much by the wall, for what waits: on a busy machine a second of a processor takes many."""

MEMORY_EVERY = 64
"""Each so many executions the memory that Python takes is measured, and whenever an input is kept."""

CORPUS_MAX = 4000
INPUT_BYTES_MAX = 8192
_NUMBERS = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


class Target(abc.ABC):
    """One reader of untrusted bytes. `run` raises nothing, unless the reader breaks its promise."""

    name: str = ""
    modules: Sequence[str] = ()
    """Where the reader lies: what coverage is counted of."""
    share: int = 1
    """Part of the executions that it gets."""
    words: Sequence[bytes] = ()
    """What its format is made of."""
    memory_bytes_max: int = 4 << 20

    @abc.abstractmethod
    def seeds(self) -> Sequence[bytes]:
        """Valid inputs to begin from."""

    @abc.abstractmethod
    def run(self, data: bytes) -> str:
        """Read `data`; the answer names what happened. AssertionError or any other exception is a finding."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what it holds."""


@dataclass(frozen=True)
class Crash:
    data: bytes
    error: BaseException


@dataclass
class Outcome:
    """What a run of the plain engine found."""

    executions: int = 0
    seconds: float = 0.0
    outcomes: int = 0
    memory_peak_bytes: int = 0
    corpus: list[bytes] = field(default_factory=list[bytes])
    """Inputs that gave an answer of their own."""
    crashes: list[Crash] = field(default_factory=list[Crash])


class HangError(Exception):
    """An input took longer than HANG_S."""


class MemoryBoundError(Exception):
    """An input took more memory than its reader promises."""


def fuzz(target: Target, executions: int, seed: int, crashes_max: int = 1, known: Sequence[bytes] = ()) -> Outcome:
    """Run `target` on its seeds and on mutations of what proved interesting; the same seed gives the same inputs.

    `known` are inputs that an earlier run kept.
    """
    rng = random.Random(f"{target.name}/{seed}")
    seen: set[str] = set()
    outcome = Outcome()
    corpus = outcome.corpus
    begin = time.monotonic()
    with strict_bounds():
        for index, data in enumerate(_inputs(target, rng, [*target.seeds(), *known], corpus)):
            if index >= executions or len(outcome.crashes) >= crashes_max:
                break
            outcome.executions += 1
            try:
                answer, peak = execute(target, data, index % MEMORY_EVERY == 0)
                if answer not in seen:
                    seen.add(answer)
                    if len(corpus) < CORPUS_MAX:
                        corpus.append(data)
                    peak = execute(target, data, True)[1]
            except Exception as error:  # noqa: BLE001 - a finding, whatever it is
                outcome.crashes.append(Crash(data, error))
                continue
            outcome.memory_peak_bytes = max(outcome.memory_peak_bytes, peak)
    outcome.seconds, outcome.outcomes = time.monotonic() - begin, len(seen)
    return outcome


def execute(target: Target, data: bytes, measure: bool, hang_s: float | None = None) -> tuple[str, int]:
    """The target's answer, and the peak of Python's memory while it read (0 unless measured).

    `hang_s` (HANG_S unless told) arms the clock of `strict_bounds`; 0 leaves the process's own alone.
    """
    hang_s = HANG_S if hang_s is None else hang_s
    if hang_s:
        _arm(hang_s)
    try:
        if not measure:
            return target.run(data), 0
        tracemalloc.start()
        try:
            answer = target.run(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    finally:
        if hang_s:
            _arm(0)
    if peak > target.memory_bytes_max:
        raise MemoryBoundError(f"{target.name}: {len(data)} bytes made it take {peak} bytes; {target.memory_bytes_max} are allowed.")
    return answer, peak


def mutator(words: Sequence[bytes]) -> Callable[[random.Random, bytes, bytes], bytes]:
    """A function that changes its first input a little, with pieces of the second."""

    def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(1 + min(int(rng.expovariate(0.7)), 12)):
            _change(rng, changed, other, words)
        return bytes(changed[:INPUT_BYTES_MAX])

    return mutate


@contextmanager
def strict_bounds() -> Iterator[None]:
    """While it is open, an input of `execute` that takes too long is ended by a HangError; a warning is a finding, too."""
    before = [(number, signal.signal(number, _on_alarm)) for number in (signal.SIGPROF, signal.SIGALRM)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _inputs(target: Target, rng: random.Random, seeds: Sequence[bytes], corpus: Sequence[bytes]) -> Iterator[bytes]:
    yield from seeds
    mutate = mutator(target.words)
    while True:
        pool = corpus if corpus and rng.random() < 0.7 else seeds
        yield mutate(rng, rng.choice(pool), rng.choice(corpus or seeds))


def _change(rng: random.Random, data: bytearray, other: bytes, words: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + 1 + int(rng.expovariate(0.2)))
    match rng.randrange(10):
        case 0 if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = data[at:end] * rng.randrange(1, 4)
        case 4:
            data[at:at] = rng.choice(words) if words else rng.randbytes(4)
        case 5:
            data[at:end] = rng.choice(words) if words else rng.randbytes(4)
        case 6 if other:
            begin = rng.randrange(len(other))
            data[at:end] = other[begin : begin + 1 + int(rng.expovariate(0.05))]
        case 7:
            data[at:end] = rng.choice(_NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
        case 8:
            data[at:end] = str(rng.choice(_NUMBERS)).encode()
        case _:
            if rng.random() < 0.2:
                del data[at:]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))


def _arm(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, BLOCKED_FACTOR * seconds)


def _on_alarm(_signal: int, _frame: FrameType | None) -> None:
    raise HangError(f"an input took more than {HANG_S:g} s of a processor, or {BLOCKED_FACTOR * HANG_S:g} s")

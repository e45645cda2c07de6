"""A planned job's round machine on a desk: figures, links and plans in short words."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.coordinator.domain import Candidate, DepthBlock, DeviceFigures, LinkFigures, PlanSettings, Prepared, Update
from fleetune.coordinator.rounds import machine as m
from fleetune.coordinator.rounds import planning
from fleetune.coordinator.rounds.machine import Command
from support.machines import Desk, blob, only

DEPTHS = 3
BLOCKS = tuple(DepthBlock(f"layer.{DEPTHS - depth}", (f"layer.{DEPTHS - depth}.weight",), 1000) for depth in range(1, DEPTHS + 1))
LINK = LinkFigures(1e6, 1e7, 0.01, "measured")


def figures(speed: float = 1.0, held: int = DEPTHS, depths: int = DEPTHS) -> DeviceFigures:
    """Of a device that takes `speed` seconds more for each depth, and has memory for `held` of them."""
    return DeviceFigures(
        8,
        tuple(speed * (4 + depth) for depth in range(1, depths + 1)),
        tuple(100 * depth for depth in range(1, depths + 1)),
        1000,
        1000 + 100 * held,
    )


def candidates(*names: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(f"id-{name}", name, link=LINK) for name in names)


class PlanDesk(Desk):
    """`done` keeps every command; plans are made as they are asked for, unless `hold` is set."""

    def __init__(self, settings: PlanSettings | None = None, **changes: object) -> None:
        super().__init__(planning=settings or PlanSettings(rows=8), **changes)
        self.hold = False
        self.asked: list[m.PlanRound] = []
        self.away: set[str] = set()
        self.free: Sequence[Candidate] = ()
        """Who is free when a spare is sought."""

    def do(self, event: m.Event) -> list[Command]:
        commands = super().do(event)
        found = list(commands)
        for command in commands:
            if isinstance(command, m.PlanRound):
                self.asked.append(command)
                if not self.hold:
                    found += self.answer(command)
            elif isinstance(command, m.SeekSpares) and not self.hold:
                found += self.do(m.SparesOffered(command.round_number, tuple(self.free)))
        return found

    def answer(self, command: m.PlanRound) -> list[Command]:
        made = planning.plan_round(command.request)
        gone = frozenset(f"id-{name}" for name in self.away)
        if isinstance(made, str):
            return self.do(m.Planned(command.asked, None, made, gone))
        return self.do(m.Planned(command.asked, made, gone=gone))

    def prepare(self) -> list[Command]:
        commands = self.do(m.Started())
        return commands + self.do(m.PreparedEvent(Prepared(blob("state 0"), "t" * 64, blocks=BLOCKS)))

    def open(self, *names: str) -> list[m.SendTask]:
        if self.machine.status == "queued":
            self.prepare()
        return only(self.do(m.Offered(candidates(*names))), m.SendTask)

    def tell(self, name: str, told: DeviceFigures | None = None) -> list[Command]:
        return self.do(m.FiguresArrived(self.task(name, "measure"), told or figures()))

    def training(self, *names: str) -> dict[str, tuple[int, ...]]:
        """Open a round with these devices, measured where they were not; who trains what."""
        self.open(*names)
        assert self.machine.round is not None
        for task in [t for t in self.machine.round.tasks.values() if t.kind == "measure"]:
            self.tell(task.device_name)
        return self.parts()

    def parts(self) -> dict[str, tuple[int, ...]]:
        assert self.machine.round is not None
        assert self.machine.round.plan is not None
        return {part.device_id.removeprefix("id-"): part.depths for part in self.machine.round.plan.parts}

    def update(self, name: str, samples: int = 8, metrics: dict[str, float] | None = None, **told: object) -> list[Command]:
        assert self.machine.round is not None
        made = Update(blob(f"{name} {self.machine.round.number}"), samples, metrics or {}, kind="gradient", **told)  # type: ignore[arg-type]
        return self.do(m.UpdateArrived(self.task(name), made))

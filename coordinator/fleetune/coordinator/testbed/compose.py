"""A testbed of containers: limits and links that the kernel holds, on any machine with a Docker engine and compose."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from fleetune.coordinator.faults import MachineError
from fleetune.coordinator.testbed import composefile, containergroup, crew, engine, images, plain, statefile
from fleetune.coordinator.testbed.backend import COORDINATOR, FaultKind, Life, Place, Sample
from fleetune.coordinator.testbed.composefile import LABEL, MEMBER_LABEL, STATE, Plan
from fleetune.coordinator.testbed.containergroup import ContainerGroup
from fleetune.coordinator.testbed.engine import Engine

FAULTS: frozenset[FaultKind] = frozenset({"kill", "pause", "cut", "throttle", "fill_disk", "out_of_memory"})
PLAN, FILE = "plan.json", "compose.json"
SUBNETS = ipaddress.IPv4Network("198.18.0.0/17")
"""Half of what is set aside for benchmarks of networks (RFC 2544): a /24 of it for each testbed."""

READY_S = 180.0
ONLINE_S = 300.0
"""Six agents that start at once on half a core each have to share this machine's real ones."""

COMPOSE_S = 300.0
LOOK_S = 0.5
RESTARTS_MAX = 3
LOG_LINES = 200
TAIL_LINES = 15
HOG_S = 120.0
HOG_ROOM_BYTES = 32 << 20
SCRIPT = "/usr/local/lib/fleetune/testbed.sh"
FILLED = f"{STATE}/.filled"

_LIVES: Mapping[str, Life] = {"running": "running", "paused": "paused"}
# Takes memory, and writes to it, until the kernel ends something.
_HOG = "held = []\nwhile True: held.append(bytearray(b'\\1') * (1 << 20))"
# Room is given out without being written: a gigabyte takes no time, and holds as well.
_FILL = f"""
import errno, os
file = os.open({FILLED!r}, os.O_WRONLY | os.O_CREAT, 0o600)
size, piece = 0, 1 << 30
while piece >= 512:
    try:
        os.posix_fallocate(file, size, piece)
        size += piece
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        piece //= 2
print(size)
"""


class ComposeBackend:
    """Containers and all else of it are found by labels, so a new process, and one after a crash, sees what there is."""

    name = "compose"

    def __init__(self, place: Place) -> None:
        self._place = place
        self._engine = Engine()
        self._groups: dict[str, ContainerGroup | None] = {}

    @property
    def faults(self) -> frozenset[FaultKind]:
        """Without filled disks where the engine's kernel gave no loop devices."""
        plan = self._plan()
        return FAULTS if plan is None or plan.disks else FAULTS - {"fill_disk"}

    # ------------------------------------------------------------------------------------------------------------ up and down

    def up(self) -> None:
        compose = engine.compose_command()
        facts = self._engine.facts()
        if self._containers():
            raise MachineError(f"containers of {self._place.prefix} are there already.", "`fleetune testbed down` removes them.")
        options = self._place.options or {}
        image = images.ensure(self._engine, options.get("image", ""), options.get("base", ""))
        try:
            self._place.own.mkdir(mode=0o700, exist_ok=True)
            plan = Plan(image, self._free_subnet(), float(facts.cores), self._make_disks(image))
            self._write(plan)
            self._compose(compose, "up", "-d", "--no-build", COORDINATOR)
            self._until(lambda: self._verb("health").returncode == 0, READY_S, "the coordinator serves", [COORDINATOR])
            names = [device.name for device in self._place.spec.devices]
            if names:
                made = json.loads(self._said(self._verb("token", "create", "--uses", str(len(names)), "--json")))
                # Read by an account of the containers; the folder keeps the rest of this machine out.
                self._put(composefile.JOIN_LINE, plain.text(plain.table(made).get("line")) + "\n")
                self._compose(compose, "up", "-d", "--no-build")
                self._until(lambda: set(names) <= self._online(), ONLINE_S, "all devices are online", names)
        except BaseException:
            with contextlib.suppress(MachineError):  # what went wrong first is what has to be told
                self.down()
            raise

    def stop(self) -> None:
        """Agents first: what they still send is taken. SIGTERM, and SIGKILL for who takes longer than its unit would allow."""
        there = self._containers()
        for wave in ([there[name] for name in there if name != COORDINATOR], [there[COORDINATOR]] if COORDINATOR in there else []):
            frozen = [each for each in wave if each["state"] == "paused"]
            if frozen:
                self._engine.command("unpause", *(each["id"] for each in frozen))
            if wave:
                self._engine.command("stop", "-t", str(composefile.STOP_S), *(each["id"] for each in wave), timeout_s=COMPOSE_S)

    def check(self) -> list[dict[str, Any]]:
        plan = self._plan()
        if plan is None:
            return []
        state = composefile.volume(self._place, COORDINATOR)
        options = ["--rm", "--network", "none", "--user", "fleetune", "--label", f"{LABEL}={self._place.prefix}"]
        command = ["run", *options, "-v", f"{state}:{STATE}", "--entrypoint", "fleetune", plan.image]
        done = self._engine.command(*command, "check", composefile.COORDINATOR_STATE, "--json", check=False, timeout_s=COMPOSE_S)
        try:
            return [dict(each) for each in plain.tables(plain.table(json.loads(done.stdout)).get("violations"))]
        except ValueError as error:
            raise MachineError(
                f"`fleetune check` of the testbed's coordinator ended with {done.returncode}: {done.stderr.strip()[-500:]}."
            ) from error

    def machine(self) -> dict[str, Any]:
        facts = self._engine.facts()
        return {**crew.environment_facts(), "docker": facts.version, "cores": facts.cores}

    def down(self) -> Sequence[str]:
        removed: list[str] = []
        ours = f"{LABEL}={self._place.prefix}"
        containers = [plain.text(each.get("Id")) for each in self._engine.containers(ours)]
        if containers:
            self._engine.command("rm", "--force", *containers, timeout_s=COMPOSE_S)
            removed.append(f"{len(containers)} containers")
        disks = self._release_disks()
        if disks:
            removed.append(f"{disks} disks")
        volumes = self._engine.volumes(ours)
        if volumes:
            self._engine.command("volume", "rm", "--force", *volumes)
            removed.append(f"{len(volumes)} volumes")
        networks = [plain.text(each.get("Id")) for each in self._engine.networks(ours)]
        if networks:
            self._engine.command("network", "rm", *networks)
            removed.append(f"{len(networks)} networks")
        if self._place.own.exists():
            shutil.rmtree(self._place.own)
            removed.append(str(self._place.own))
        return removed

    # --------------------------------------------------------------------------------------------------------------- looking

    def lives(self) -> Mapping[str, Life]:
        there = self._containers()
        return {name: _LIVES.get(there[name]["state"], "ended") if name in there else "missing" for name in self._members()}

    def samples(self) -> Mapping[str, Sample]:
        there = {name: each["id"] for name, each in self._containers().items() if each["state"] in _LIVES}
        with ThreadPoolExecutor(max_workers=8) as pool:
            return dict(zip(there, pool.map(self._sample, there.values()), strict=True))

    def verb(self, *arguments: str) -> Sequence[str]:
        return self._inside(COORDINATOR, "fleetune", "fleetune", *arguments, words=["exec", "-i"])

    def log(self, member: str) -> str:
        done = self._engine.command("logs", "--tail", str(LOG_LINES), self._id(member), check=False)
        return done.stdout + done.stderr

    # ---------------------------------------------------------------------------------------------------------------- faults

    def kill(self, member: str) -> None:
        self._engine.command("kill", "--signal", "KILL", self._id(member))

    def restart(self, member: str) -> None:
        self._engine.command("start", self._id(member))

    def pause(self, member: str) -> None:
        self._engine.command("pause", self._id(member))

    def resume(self, member: str) -> None:
        if self.lives().get(member) == "paused":  # a pause that was interrupted may not have come about
            self._engine.command("unpause", self._id(member))

    def cut(self, member: str) -> None:
        self._run(member, "root", SCRIPT, "cut")

    def mend(self, member: str) -> None:
        self.throttle(member, None, None)

    def throttle(self, member: str, up_mbit: float | None, down_mbit: float | None) -> None:
        own = {device.name: (device.up_mbit, device.down_mbit) for device in self._place.spec.devices}
        up, down = own.get(member, (0.0, 0.0))  # the coordinator's link is as fast as it goes
        self._run(
            member, "root", SCRIPT, "link", f"{up if up_mbit is None else up_mbit:g}", f"{down if down_mbit is None else down_mbit:g}"
        )

    def fill_disk(self, member: str) -> None:
        if "fill_disk" not in self.faults:
            raise MachineError(f"{member} has no disk of its own: the engine's kernel gave no loop devices.", "Leave fill_disk out.")
        self._run(member, "fleetune", "python3", "-IS", "-c", _FILL)

    def free_disk(self, member: str) -> None:
        self._run(member, "fleetune", "rm", "-f", FILLED)

    def exhaust_memory(self, member: str) -> None:
        container = self._id(member)
        limit = plain.count(plain.table(self._engine.inspect(container).get("HostConfig")).get("Memory"))
        used = self._sample(container).memory_bytes
        if not limit or used is None:
            raise MachineError(
                f"the memory of {member} cannot be exhausted: its limit or its use is not known.", "Leave out_of_memory out."
            )
        # The limit comes down to what is used, in place of the use going up to the limit: this machine may not have so much to give, and
        # the largest process, which the kernel chooses, is then the trainer where there is one.
        self._limit_memory(container, min(limit, used + HOG_ROOM_BYTES))
        try:
            done = self._engine.command(*self._exec(member, "fleetune"), "python3", "-IS", "-c", _HOG, check=False, timeout_s=HOG_S)
        finally:
            with contextlib.suppress(MachineError):  # where all of it ended, it is started again with the limit that it has now
                self._limit_memory(container, limit)
        if done.returncode == 0:
            raise MachineError(f"the memory of {member} was not exhausted.", "See its limit in DIR/backend/compose.json.")

    def _limit_memory(self, container: str, size_bytes: int) -> None:
        self._engine.command("update", "--memory", str(size_bytes), "--memory-swap", str(size_bytes), container)

    # ------------------------------------------------------------------------------------------------------------ containers

    def _members(self) -> list[str]:
        return [COORDINATOR, *(device.name for device in self._place.spec.devices)]

    def _containers(self) -> dict[str, dict[str, str]]:
        """Member -> its container's id and state."""
        found: dict[str, dict[str, str]] = {}
        for each in self._engine.containers(f"{LABEL}={self._place.prefix}"):
            member = plain.text(plain.table(each.get("Labels")).get(MEMBER_LABEL))
            if member:
                found[member] = {"id": plain.text(each.get("Id")), "state": plain.text(each.get("State"))}
        return found

    def _id(self, member: str) -> str:
        there = self._containers()
        if member not in there:
            raise MachineError(
                f"there is no container of {member} in {self._place.prefix}.", "`fleetune testbed status` shows what is there."
            )
        return there[member]["id"]

    def _exec(self, member: str, user: str, words: Sequence[str] = ("exec",)) -> list[str]:
        return [*words, "--user", user, self._id(member)]

    def _inside(self, member: str, user: str, *command: str, words: Sequence[str] = ("exec",)) -> list[str]:
        return [self._engine.program(), *self._exec(member, user, words), *command]

    def _run(self, member: str, user: str, *command: str) -> str:
        return self._engine.command(*self._exec(member, user), *command).stdout

    def _verb(self, *arguments: str) -> Any:
        return engine.execute(self.verb(*arguments), timeout_s=READY_S, check=False)

    def _said(self, done: Any) -> str:
        if done.returncode:
            raise MachineError(f"the testbed's coordinator was asked in vain: {done.stderr.strip()[-500:]}.", self._tail(COORDINATOR))
        return cast("str", done.stdout)

    def _online(self) -> set[str]:
        found = json.loads(self._said(self._verb("devices", "--json")))
        rows = plain.tables(found) or plain.tables(plain.table(found).get("devices"))
        return {plain.text(each.get("name")) for each in rows if each.get("online") is True}

    def _until(self, there: Callable[[], bool], within_s: float, what: str, members: Sequence[str]) -> None:
        deadline_s = time.monotonic() + within_s
        while True:
            states = self._containers()
            for member in members:
                state = states[member]["state"] if member in states else "gone"
                # Started again a few times it would have come up.
                if state in ("gone", "exited", "dead") or (state == "restarting" and self._restarts(states[member]["id"]) >= RESTARTS_MAX):
                    raise MachineError(f"{member} has ended.", self._tail(member))
            if there():
                return
            if time.monotonic() > deadline_s:
                raise MachineError(f"not within {within_s:g} s: {what}.", self._tail(members[0]))
            time.sleep(LOOK_S)

    def _restarts(self, container: str) -> int:
        return plain.count(self._engine.inspect(container).get("RestartCount"))

    def _tail(self, member: str) -> str:
        with contextlib.suppress(MachineError):
            return "It wrote last:\n" + "\n".join(f"    {line}" for line in self.log(member).splitlines()[-TAIL_LINES:])
        return ""

    # --------------------------------------------------------------------------------------------------------------- samples

    def _sample(self, container: str) -> Sample:
        # The engine's own figures come once a second, and are waited for.
        for _ in range(2):
            if container not in self._groups:
                process = plain.count(plain.table(self._engine.inspect(container).get("State")).get("Pid"))
                self._groups[container] = containergroup.find(process) if process else None
            group = self._groups[container]
            if group is None:
                break
            try:
                return group.sample()
            except (OSError, ValueError, KeyError):  # it was started again, and has another first process
                del self._groups[container]
        self._groups.pop(container, None)
        return _told(self._engine.stats(container))

    # ---------------------------------------------------------------------------------------------------------- what is made

    def _compose(self, compose: Sequence[str], *arguments: str) -> None:
        own = self._place.own
        options = ["--project-name", self._place.prefix, "--file", str(own / FILE), "--project-directory", str(own)]
        engine.execute([*compose, *options, *arguments], timeout_s=COMPOSE_S)

    def _write(self, plan: Plan) -> None:
        own = self._place.own
        statefile.write_json(own / PLAN, {"image": plan.image, "subnet": plan.subnet, "cores": plan.cores, "disks": dict(plan.disks)})
        statefile.write_json(own / FILE, composefile.document(self._place, plan))
        self._put(composefile.JOIN_LINE, "")

    def _put(self, name: str, text: str) -> None:
        # In place: the containers see this very file.
        file = self._place.own / name
        file.write_text(text, encoding="utf-8")
        file.chmod(0o644)

    def _plan(self) -> Plan | None:
        try:
            found = plain.table(json.loads((self._place.own / PLAN).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        disks = {name: plain.text(device) for name, device in plain.table(found.get("disks")).items()}
        return Plan(plain.text(found.get("image")), plain.text(found.get("subnet")), plain.number(found.get("cores")) or 1.0, disks)

    def _free_subnet(self) -> str:
        taken: list[ipaddress.IPv4Network] = []
        for network in self._engine.networks():
            for each in plain.tables(plain.table(network.get("IPAM")).get("Config")):
                with contextlib.suppress(ValueError):
                    taken.append(ipaddress.IPv4Network(plain.text(each.get("Subnet")), strict=False))
        choices = list(SUBNETS.subnets(new_prefix=24))
        begin = zlib.crc32(self._place.prefix.encode()) % len(choices)  # two testbeds that start at once look in different places
        for choice in choices[begin:] + choices[:begin]:
            if not any(choice.overlaps(other) for other in taken):
                return str(choice)
        raise MachineError(
            f"all of {SUBNETS} is taken by networks of this engine.", "`docker network prune` removes those that nobody uses."
        )

    # ----------------------------------------------------------------------------------------------------------------- disks

    def _make_disks(self, image: str) -> dict[str, str]:
        """A disk of its own size for each device: a file behind a loop device. {} where the kernel gives none: plain volumes then."""
        sizes = [f"{device.name}={device.disk_mib}" for device in self._place.spec.devices if device.disk_mib > 0]
        if not sizes or (self._place.options or {}).get("disks") == "plain":
            return {}
        self._engine.command("volume", "create", "--label", f"{LABEL}={self._place.prefix}", self._store)
        done = self._disks(image, "make", *sizes)
        lines = [line.split() for line in done.stdout.splitlines()]
        if done.returncode == 0 and len(lines) == len(sizes) and all(len(words) == 2 for words in lines):
            return {words[0]: words[1] for words in lines}
        self._disks(image, "release")
        return {}

    def _release_disks(self) -> int:
        plan = self._plan()
        if self._store not in self._engine.volumes(f"{LABEL}={self._place.prefix}"):
            return 0
        image = plan.image if plan is not None else self._any_image()
        return len(self._disks(image, "release").stdout.split()) if image else 0

    def _any_image(self) -> str:
        """After a half start nothing says which it was; every testbed's image has the tool."""
        return next((name for name in self._engine.images() if name.startswith(f"{images.NAME}:")), "")

    def _disks(self, image: str, *arguments: str) -> Any:
        # The one container with a right on the host: loop devices are the whole machine's. It ends when it has done that.
        rights = ["--cap-add", "SYS_ADMIN", "--device-cgroup-rule", "b 7:* rwm", "--device-cgroup-rule", "c 10:237 rwm", "-v", "/dev:/dev"]
        options = ["--rm", "--network", "none", "--label", f"{LABEL}={self._place.prefix}", *rights, "-v", f"{self._store}:/disks"]
        command = ["run", *options, "--entrypoint", "/usr/local/lib/fleetune/disks.sh", image]
        return self._engine.command(*command, self._store, *arguments, check=False, timeout_s=COMPOSE_S)

    @property
    def _store(self) -> str:
        return f"{self._place.prefix}_disks"


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _told(stats: Mapping[str, object]) -> Sample:
    """Of the engine's own figures: all there is where it runs on another kernel, as on a Mac."""
    memory = plain.table(stats.get("memory_stats"))
    cpu_ns = plain.number(plain.table(plain.table(stats.get("cpu_stats")).get("cpu_usage")).get("total_usage"))
    link = plain.table(plain.table(stats.get("networks")).get("eth0"))
    return Sample(
        cpu_s=None if cpu_ns is None else cpu_ns / 1e9,
        memory_bytes=_whole(plain.number(memory.get("usage"))),
        memory_peak_bytes=_whole(plain.number(memory.get("max_usage"))),
        sent_bytes=_whole(plain.number(link.get("tx_bytes"))),
        received_bytes=_whole(plain.number(link.get("rx_bytes"))),
        out_of_memory_kills=None,
    )

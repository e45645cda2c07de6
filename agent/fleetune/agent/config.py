"""The agent's own settings: one row each, from agent.toml, the environment and the command line."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetune import settings
from fleetune.agent import identity
from fleetune.agent.limits import HoursError, Limits, hours_window
from fleetune.complaints import Complaint, ComplaintsError, shown
from fleetune.settings import Kind, Setting

ENVIRONMENT_PREFIX = "FLEETUNE_AGENT_"
CONFIG_VARIABLE = "FLEETUNE_AGENT_CONFIG"
FORMATS = ("jsonl", "csv", "parquet")
ACCELERATORS = ("auto", "cpu", "cuda", "mps")


def _check_address(text: str) -> str:
    host, _, port = text.rpartition(":")
    right = bool(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536 and not any(c.isspace() for c in host)
    return "" if right else "HOST:PORT with a port from 1 to 65535, for example 192.0.2.7:7433"


def _check_name(text: str) -> str:
    return "" if not text or identity.NAME.fullmatch(text) else identity.NAME_WORDS


def _check_tag(text: str) -> str:
    return "" if identity.NAME.fullmatch(text) else f"texts of {identity.NAME_WORDS}"


def _check_hours(text: str) -> str:
    try:
        hours_window(text)
    except HoursError as error:
        return error.allowed
    return ""


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "coordinator",
        Kind.TEXT,
        "",
        "Address of the coordinator; the agent dials it, so this machine needs no open port.",
        check=_check_address,
        default_words="what the join line said; with `plaintext`, `127.0.0.1:7433`",
    ),
    Setting(
        "name",
        Kind.TEXT,
        "",
        "What people call this device; unique in the fleet. Once joined, it is the name in the certificate.",
        check=_check_name,
        default_words="the host name",
    ),
    Setting(
        "plaintext",
        Kind.SWITCH,
        False,
        "Without certificate and encryption, to a coordinator on this same machine that runs so too.",
    ),
    Setting(
        "state_dir",
        Kind.PLACE,
        "",
        "Folder for the device's id, its outbox and its cache; made at the first start.",
        default_words="`$STATE_DIRECTORY` of systemd, else `$XDG_STATE_HOME/fleetune-agent`, else `~/.local/state/fleetune-agent`",
    ),
    Setting("tags", Kind.TEXTS, (), 'Words by which jobs choose devices, for example "orin" or "lab-2".', check=_check_tag),
    Setting("data.*.train", Kind.PLACE, "", "File with the rows to train on, under the name that jobs use.", default_words="none"),
    Setting("data.*.validation", Kind.PLACE, "", "File with the rows that this device evaluates on.", default_words="none"),
    Setting("data.*.format", Kind.TEXT, "", "Format of the files.", choices=FORMATS, default_words="by the file name's ending"),
    Setting(
        "models.*",
        Kind.PLACE,
        "",
        "Folder of a local copy of a base model, under its hub id or folder name; used if its digest is the job's.",
        default_words="none",
    ),
    Setting("training.cores", Kind.INTEGER, 0, "Cores that training uses; 0 is all that this agent may use.", "cores", 0, 4096),
    Setting("training.accelerator", Kind.TEXT, "auto", "Where training runs; auto takes the GPU if there is one.", choices=ACCELERATORS),
    Setting("training.memory_mib", Kind.INTEGER, 0, "Memory that the training process may take; 0 is what is free.", "MiB", 0, 16_777_216),
    Setting(
        "training.keep_warm_s",
        Kind.NUMBER,
        120.0,
        "How long the model stays loaded after a task, at the most; never on boards under 2 GiB or while memory is short.",
        "seconds",
        0,
        86_400,
    ),
    Setting(
        "training.allow_hub",
        Kind.SWITCH,
        True,
        "Whether this device may fetch base models from the Hugging Face hub; otherwise the coordinator sends them.",
    ),
    Setting("limits.on_mains_only", Kind.SWITCH, False, "Train only on mains power, not on battery."),
    Setting("limits.idle_only", Kind.SWITCH, False, "Train only while other programs leave this machine alone."),
    Setting(
        "limits.idle_cpu_percent",
        Kind.NUMBER,
        20.0,
        "Load of other programs, over all cores, from which on this machine is in use.",
        "percent",
        0,
        100,
    ),
    Setting(
        "limits.hours", Kind.TEXTS, (), 'Local times of day to train in, for example "22:00-06:00"; empty is always.', check=_check_hours
    ),
    Setting("limits.allow_metered", Kind.SWITCH, False, "Train also while the way to the coordinator is a metered link."),
    Setting(
        "limits.metered_interfaces",
        Kind.TEXTS,
        ("wwan*", "ppp*", "rmnet*"),
        "Network interfaces that are paid by volume; `*` stands for any characters.",
    ),
    Setting(
        "link.up_mbps",
        Kind.NUMBER,
        0.0,
        "What this device's link carries towards the coordinator; 0 is measured.",
        "Mbit/s",
        0,
        1_000_000,
    ),
    Setting("link.down_mbps", Kind.NUMBER, 0.0, "The same from the coordinator to here; 0 is measured.", "Mbit/s", 0, 1_000_000),
    Setting(
        "link.metered",
        Kind.SWITCH,
        False,
        "Whether the link is paid by volume, whatever its interface: nothing is sent to measure it, and `limits.allow_metered` counts.",
    ),
    Setting(
        "cache.max_gib", Kind.NUMBER, 20.0, "Room for base models and states; what was used longest ago goes first.", "GiB", 0.1, 1_000_000
    ),
    Setting("log.level", Kind.TEXT, "info", "How much is logged.", choices=("debug", "info", "warning", "error")),
    Setting(
        "log.format",
        Kind.TEXT,
        "auto",
        "text for people, json for collectors; auto is text on a terminal.",
        choices=("auto", "text", "json"),
    ),
)


@dataclass(frozen=True)
class DataPlace:
    """Where rows of one data name lie. `format` is empty where the file name's ending tells."""

    train: Path | None
    validation: Path | None
    format: str


@dataclass(frozen=True)
class TrainingSettings:
    """What training may take. 0 cores or MiB: all that this agent may use."""

    cores: int
    accelerator: str
    memory_mib: int
    keep_warm_s: float
    allow_hub: bool


@dataclass(frozen=True)
class LinkSettings:
    """What the owner says of the link. Rates in Mbit/s; 0 is measured."""

    up_mbps: float = 0.0
    down_mbps: float = 0.0
    metered: bool = False


@dataclass(frozen=True)
class AgentConfig:
    """Every setting of an agent. `file` is None where there was none; `unused_environment` holds variables that no setting has."""

    coordinator: str
    """HOST:PORT; empty where nobody set it: the identity knows."""
    name: str
    name_is_set: bool
    """Not only taken from the host."""
    plaintext: bool
    state_dir: Path
    tags: tuple[str, ...]
    data: Mapping[str, DataPlace]
    models: Mapping[str, Path]
    training: TrainingSettings
    limits: Limits
    link: LinkSettings
    cache_max_bytes: int
    log_level: str
    log_format: str
    file: Path | None
    unused_environment: tuple[str, ...]


def load(
    path: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
    *,
    home: Path | None = None,
    working_folder: Path | None = None,
    host_name: str | None = None,
) -> AgentConfig:
    """The settings of `path` (or of none), changed by FLEETUNE_AGENT_* variables and then by `overrides` keyed by dotted path.

    Raises ComplaintsError with everything that is wrong, ConfigError for a file that cannot be read or is no TOML.
    """
    working_folder = Path.cwd() if working_folder is None else working_folder
    document = settings.read_file(path) if path is not None else {}
    folder = working_folder if path is None else (working_folder / path).parent
    sources = settings.Sources(document, folder, _own(environment), ENVIRONMENT_PREFIX, overrides or {}, working_folder)
    found = settings.read(SETTINGS, sources)
    complaints = [*found.complaints, *_data_complaints(found)]
    if complaints:
        raise ComplaintsError(str(path) if path is not None else "the agent's configuration", complaints)
    return AgentConfig(
        coordinator=found.text("coordinator"),
        name_is_set=bool(found.text("name")),
        plaintext=found.switch("plaintext"),
        name=found.text("name") or name_from_host(socket.gethostname() if host_name is None else host_name),
        state_dir=found.place("state_dir") or default_state_dir(environment, Path.home() if home is None else home),
        tags=tuple(dict.fromkeys(found.texts("tags"))),
        data=_data(found),
        models={name: place for name in found.names("models") if (place := found.place("models", name)) is not None},
        training=TrainingSettings(
            cores=found.integer("training.cores"),
            accelerator=found.text("training.accelerator"),
            memory_mib=found.integer("training.memory_mib"),
            keep_warm_s=found.number("training.keep_warm_s"),
            allow_hub=found.switch("training.allow_hub"),
        ),
        limits=Limits(
            on_mains_only=found.switch("limits.on_mains_only"),
            idle_only=found.switch("limits.idle_only"),
            idle_cpu_percent=found.number("limits.idle_cpu_percent"),
            hours=tuple(hours_window(text) for text in found.texts("limits.hours")),
            allow_metered=found.switch("limits.allow_metered"),
            metered_interfaces=found.texts("limits.metered_interfaces"),
        ),
        link=LinkSettings(found.number("link.up_mbps"), found.number("link.down_mbps"), found.switch("link.metered")),
        cache_max_bytes=int(found.number("cache.max_gib") * 1024**3),
        log_level=found.text("log.level"),
        log_format=found.text("log.format"),
        file=path,
        unused_environment=found.unused_environment,
    )


def find_file(environment: Mapping[str, str], home: Path) -> Path | None:
    """The configuration to read when none is named: $FLEETUNE_AGENT_CONFIG, the person's own, the machine's; None where there is none."""
    named = environment.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    own = Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "fleetune" / "agent.toml"
    return next((path for path in (own, Path("/etc/fleetune/agent.toml")) if path.is_file()), None)


def default_state_dir(environment: Mapping[str, str], home: Path) -> Path:
    """Where state lies when no setting says so. systemd names a folder of its own when its unit has StateDirectory=."""
    of_unit = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    if of_unit:
        return Path(of_unit)
    of_person = environment.get("XDG_STATE_HOME", "")
    return (Path(of_person) if of_person.startswith("/") else home / ".local" / "state") / "fleetune-agent"


def name_from_host(host_name: str) -> str:
    """The first part of a host name, with every character that a device name may not have as "-"."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", host_name.partition(".")[0])[:63].strip("-")
    return name or "device"


def missing_files(config: AgentConfig) -> list[Complaint]:
    """Named files and folders that are not there now: worth a warning at the start, since a disk may be mounted later."""
    places = [
        *((f"data.{settings.dotted([name])}.train", place.train) for name, place in config.data.items()),
        *((f"data.{settings.dotted([name])}.validation", place.validation) for name, place in config.data.items()),
    ]
    missing = [
        Complaint(path, str(place), "an existing file", "Correct the path, or put the file there before the first task.")
        for path, place in places
        if place is not None and not place.is_file()
    ]
    return missing + [
        Complaint(
            f"models.{settings.dotted([name])}", str(place), "an existing folder", "Correct the path; until then the model is fetched."
        )
        for name, place in config.models.items()
        if not place.is_dir()
    ]


def _own(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in environment.items() if name.startswith(ENVIRONMENT_PREFIX) and name != CONFIG_VARIABLE}


def _data(found: settings.Settings) -> dict[str, DataPlace]:
    return {
        name: DataPlace(found.place("data", name, "train"), found.place("data", name, "validation"), found.text("data", name, "format"))
        for name in found.names("data")
    }


def _data_complaints(found: settings.Settings) -> Sequence[Complaint]:
    complaints: list[Complaint] = []
    wrong = {complaint.path for complaint in found.complaints}
    for name, place in _data(found).items():
        path = f"data.{settings.dotted([name])}"
        if not identity.NAME.fullmatch(name):
            complaints.append(Complaint(path, "", f"a name of {identity.NAME_WORDS}", "Rename it to what the jobs call it."))
        if place.train is None and place.validation is None and f"{path}.train" not in wrong and f"{path}.validation" not in wrong:
            complaints.append(Complaint(path, "", "train, validation or both", "Say where the rows lie."))
        for part, file in (("train", place.train), ("validation", place.validation)):
            if file is not None and not place.format and file.suffix.lower().lstrip(".") not in FORMATS and f"{path}.format" not in wrong:
                complaints.append(
                    Complaint(
                        f"{path}.{part}",
                        shown(file.name),
                        "a file ending in .jsonl, .csv or .parquet",
                        f"Set {path}.format to the file's format.",
                    )
                )
    return complaints
